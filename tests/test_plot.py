"""Pictures hold what they claim, on lines and on maps, and refuse what they cannot draw."""

import matplotlib
import numpy as np
import pytest
import torch
from firedrake import FunctionSpace, UnitCubeMesh, UnitIntervalMesh, UnitSquareMesh, VectorFunctionSpace

from fem_diffusion.diagnostics import calibrate
from fem_diffusion.diffusion import History
from fem_diffusion.errors import InputError
from fem_diffusion.plot import plot_calibration, plot_history, plot_predictive, plot_samples
from fem_diffusion.samples import Samples

matplotlib.use("Agg")


def _samples(V):
    return Samples(V, np.random.default_rng(0).standard_normal((30, V.dim())), torch.zeros(30, 2))


def test_lines_show_mean_band_samples_truth_and_reference():
    samples = _samples(FunctionSpace(UnitIntervalMesh(8), "CG", 1))
    axes = samples.plot(truth=samples[0], reference=(samples.values.mean(0), samples.values.std(0)), xlabel="x [m]")
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"95 % band", "posterior mean", "20 samples", "reference mean", "reference 95 %", "truth"}
    mean = next(line for line in axes.lines if line.get_label() == "posterior mean")
    np.testing.assert_allclose(np.sort(mean.get_ydata()), np.sort(samples.values.mean(0)))
    assert (np.diff(mean.get_xdata()) > 0).all() and axes.get_xlabel() == "x [m]"


def test_maps_show_mean_spread_sample_and_truth():
    samples = _samples(FunctionSpace(UnitSquareMesh(3, 3), "CG", 1))
    axes = plot_samples(samples, truth=samples[1])
    assert [ax.get_title() for ax in axes] == ["truth", "posterior mean", "standard deviation", "one sample"]


@pytest.mark.parametrize("V", [lambda: VectorFunctionSpace(UnitSquareMesh(2, 2), "CG", 1),
                               lambda: FunctionSpace(UnitCubeMesh(1, 1, 1), "CG", 1)])
def test_what_cannot_be_drawn_is_refused(V):
    with pytest.raises(InputError, match="plot_samples draws"):
        plot_samples(_samples(V()))


def test_training_curve_says_when_the_network_is_not_kept():
    kept = plot_history(History([1, 2], [1.0, 0.9], [1.0, 0.95], 1.0, 2))
    dropped = plot_history(History([1, 2], [1.0, 0.9], [1.1, 1.2], 1.0, 0))
    assert not kept.get_title() and "base alone is kept" in dropped.get_title()


def test_predictive_intervals_are_quantiles():
    predictions = np.random.default_rng(0).standard_normal((500, 3))
    axes = plot_predictive(np.zeros(3), predictions, ylabel="concentration")
    bars = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], np.quantile(predictions, [0.025, 0.975], axis=0).T)


def test_ranks_of_right_draws_stay_in_the_band():
    draws = np.random.default_rng(0).standard_normal((200, 100, 4))
    right = plot_calibration(calibrate(draws[:, 1:], draws[:, 0]))
    narrow = plot_calibration(calibrate(0.5 * draws[:, 1:], draws[:, 0]))
    band = 1.358 / np.sqrt(200)
    curves = [[np.abs(line.get_ydata()).max() for line in axes.lines if len(line.get_ydata()) == 201]
              for axes in (right, narrow)]
    assert len(curves[0]) == 4 and max(curves[0]) < 1.3 * band and min(curves[1]) > band
