"""Pictures hold what they claim, on lines and on maps, and refuse what they cannot draw."""

import matplotlib
import numpy as np
import pytest
from firedrake import (
    ExtrudedMesh, Function, FunctionSpace, MixedFunctionSpace, SpatialCoordinate, TensorFunctionSpace,
    UnitIcosahedralSphereMesh, UnitIntervalMesh, UnitSquareMesh, VectorFunctionSpace, as_vector, sin,
)

from matplotlib import pyplot as plt

from fem_diffusion.trust import calibrate
from fem_diffusion.diffusion import History
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import owned_size
from fem_diffusion.plot import plot_calibration, plot_history, plot_predictive, plot_samples
from fem_diffusion.samples import Samples

matplotlib.use("Agg")
SQUARE = UnitSquareMesh(2, 2)


@pytest.fixture(autouse=True)
def _closed():
    """Figures are kept by pyplot until they are closed."""
    yield
    plt.close("all")


def _samples(V):
    return Samples(V, np.random.default_rng(0).standard_normal((30, V.dim())), np.zeros((30, 2)))


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


@pytest.mark.parametrize("V, words", [
    (lambda: VectorFunctionSpace(UnitIntervalMesh(2), "CG", 1, dim=2), "Bands are drawn of scalar fields"),
    (lambda: TensorFunctionSpace(SQUARE, "CG", 1, symmetry=True), "no tensors"),
    (lambda: FunctionSpace(UnitIntervalMesh(2), "Hermite", 3), "are not values"),
    (lambda: FunctionSpace(UnitIcosahedralSphereMesh(0), "CG", 1), "no surfaces in space")])
def test_what_cannot_be_drawn_is_refused(V, words):
    with pytest.raises(InputError, match=words):
        plot_samples(_samples(V()))


def _lines(ax):
    """Places of the vertical lines by label."""
    return {line.get_label(): line.get_xdata()[0] for line in ax.lines}


def test_a_number_has_a_histogram_with_interval_truth_and_reference():
    samples = _samples(FunctionSpace(SQUARE, "R", 0))
    ax = samples.plot(truth=Function(samples.V).assign(0.3), reference=([0.1], [0.2]), xlabel="rate [1/s]")
    column, lines = samples.values[:, 0], _lines(ax)
    assert lines["posterior mean"] == pytest.approx(column.mean())
    assert (lines["truth"], lines["reference mean"], lines["reference 95 %"]) == pytest.approx((0.3, 0.1, 0.1 - 0.392))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rate [1/s]", "density")
    bars = [patch for patch in ax.patches if patch.get_height() != 1]
    assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(1)
    interval, = (patch for patch in ax.patches if patch.get_label() == "95 % interval")
    ends = interval.get_x(), interval.get_x() + interval.get_width()
    assert ends == pytest.approx(np.quantile(column, [0.025, 0.975]))
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert labels == {"30 samples", "95 % interval", "posterior mean", "truth", "reference mean", "reference 95 %"}


def test_several_numbers_have_a_histogram_each():
    for V, titles in [(VectorFunctionSpace(SQUARE, "R", 0, dim=4), ["0", "1", "2", "3"]),
                      (TensorFunctionSpace(SQUARE, "R", 0), ["0,0", "0,1", "1,0", "1,1"]),
                      (TensorFunctionSpace(SQUARE, "R", 0, symmetry=True), ["0", "1", "2"])]:
        samples = _samples(V)
        axes = samples.plot()
        assert [ax.get_title() for ax in axes] == [f"component {title}" for title in titles]
        assert [_lines(ax)["posterior mean"] for ax in axes] == pytest.approx(samples.values.mean(axis=0))
    given = plt.subplots(3)[1]
    assert samples.plot(axes=given)[1] is given[1]


def test_a_number_and_a_field_of_a_product_have_their_pictures():
    samples = _samples(MixedFunctionSpace([FunctionSpace(SQUARE, "R", 0), FunctionSpace(SQUARE, "CG", 1)]))
    truth = Function(samples.V)
    truth.subfunctions[0].assign(0.5)
    assert _lines(samples.component(0).plot(truth=truth.subfunctions[0]))["truth"] == 0.5
    assert len(samples.component(1).plot(truth=truth.subfunctions[1])) == 4
    with pytest.raises(InputError, match="truth is .*in the space of the samples"):
        samples.component(0).plot(truth=truth.subfunctions[1])


def test_what_is_constant_along_an_extrusion_is_drawn_on_the_base():
    mesh = ExtrudedMesh(UnitIntervalMesh(6), 3)
    V = FunctionSpace(mesh, "CG", 2, vfamily="R", vdegree=0)
    wave = Function(V).project(sin(3 * SpatialCoordinate(mesh)[0]))
    samples = Samples(V, np.stack([wave.dat.data_ro, -wave.dat.data_ro]), np.zeros((2, 1)))
    ax = samples.plot(truth=wave)
    truth = next(line for line in ax.lines if line.get_label() == "truth")
    assert len(truth.get_xdata()) == 13
    np.testing.assert_allclose(truth.get_ydata(), np.sin(3 * truth.get_xdata()), atol=2e-3)
    over = ExtrudedMesh(SQUARE, 2)
    assert len(plot_samples(_samples(FunctionSpace(over, "CG", 1, vfamily="R", vdegree=0)))) == 3


def test_a_vector_of_one_component_is_drawn_with_its_sign():
    V = VectorFunctionSpace(UnitIntervalMesh(3), "CG", 1, dim=1)
    down = Function(V).interpolate(as_vector([-1 - SpatialCoordinate(V.mesh())[0]]))
    ax = Samples(V, np.tile(down.dat.data_ro.ravel(), (2, 1)), np.zeros((2, 1))).plot(truth=down)
    np.testing.assert_allclose([line.get_ydata() for line in ax.lines if line.get_label() == "truth"],
                               [-1 - np.linspace(0, 1, 4)])
    maps = VectorFunctionSpace(SQUARE, "CG", 1, dim=1)
    axes = plot_samples(Samples(maps, np.full((2, maps.dim()), -1.0), np.zeros((2, 1))))
    assert axes[0].collections[0].get_array().max() == pytest.approx(-1)


LINE = FunctionSpace(UnitIntervalMesh(4), "CG", 1)
MAP = FunctionSpace(SQUARE, "CG", 1)
NUMBER = FunctionSpace(SQUARE, "R", 0)


@pytest.mark.parametrize("V, given, words", [
    *((V, given, words) for V in (LINE, MAP, NUMBER) for given, words in (
        (dict(truth=1.0), "truth is 1.0: give a Function"),
        (dict(truth=Function(FunctionSpace(SQUARE, "CG", 2))), "truth is .*in the space of the samples"),
        (dict(truth=Function(V).assign(np.nan)), "truth holds values"), (dict(axes="ax"), "axes is 'ax'"),
        (dict(axes=[]), "axes is"), (dict(ylabel=3), "ylabel is of type int"))),
    *((V, given, words) for V in (LINE, NUMBER) for given, words in (
        (dict(reference=1.0), "reference is of type float"), (dict(reference=([0.0],)), "reference is of type tuple"),
        (dict(reference=(np.zeros(3), np.ones(3))), "reference has the shape"),
        (dict(reference=(np.zeros(V.dim()), -np.ones(V.dim()))), "negative standard deviations"),
        (dict(reference=(np.full(V.dim(), np.nan), np.ones(V.dim()))), "not finite"))),
    (LINE, dict(curves=-1), "curves is -1"), (LINE, dict(curves=2.0), "curves is 2.0"),
    (LINE, dict(curves=True), "curves is True"), (NUMBER, dict(curves=3), "numbers have no use for curves"),
    (MAP, dict(curves=3), "maps have no use for curves"), (MAP, dict(xlabel="x"), "maps have no use for xlabel"),
    (MAP, dict(reference=(np.zeros(9), np.ones(9))), "maps have no use for reference"),
])
def test_bad_arguments_of_pictures(V, given, words):
    with pytest.raises(InputError, match=words):
        plot_samples(_samples(V), **given)


def test_bad_samples_and_results_are_refused():
    for values, words in [(np.full((3, 5), np.nan), "not finite"), (np.zeros((0, 5)), "no samples"),
                          (np.zeros((3, 4)), "has the shape"), (np.zeros((3, 5), complex), "real and imaginary")]:
        with pytest.raises(InputError, match=words):
            plot_samples(Samples(LINE, values, np.zeros((3, 1))))
    predictions = np.zeros((5, 3))
    for call, words in [
            (lambda: plot_samples(np.zeros((3, 5))), "samples is of type ndarray"),
            (lambda: plot_samples(Samples(MAP, np.zeros((1, 9)), np.zeros((1, 1)))), "at least 2 samples"),
            (lambda: plot_predictive([0, np.nan, 0], predictions), "y holds values of sensor 1"),
            (lambda: plot_predictive(np.zeros(4), predictions), r"predictions has the shape \(5, 3\): give \(n, 4\)"),
            (lambda: plot_predictive(np.zeros(3), predictions * np.nan), "of sensor 0, sensor 1, sensor 2"),
            (lambda: plot_predictive(np.zeros(3), np.zeros((0, 3))), "no predictions"),
            (lambda: plot_predictive("abc", predictions), "y holds"),
            (lambda: plot_history([1.0, 0.9]), "history is of type list"),
            (lambda: plot_calibration(np.zeros((3, 2))), "calibration is of type ndarray"),
            (lambda: plot_history(History([1], [1.0], [1.0], 1.0, 0), axes=3), "axes is 3")]:
        with pytest.raises(InputError, match=words):
            call()


def test_numbers_of_numpy_draw_the_same():
    samples = _samples(LINE)
    lines = [samples.plot(curves=n, reference=reference).lines for n, reference in (
        (3, (np.zeros(5), np.ones(5))), (np.int64(3), ([0] * 5, [1] * 5)),
        (3, (Function(LINE), Function(LINE).assign(1.0))))]
    for other in lines[1:]:
        for mine, right in zip(other, lines[0], strict=True):
            np.testing.assert_array_equal(mine.get_xydata(), right.get_xydata())
    assert len(samples.plot(curves=0).lines) == 1


def test_training_curve_says_when_the_network_is_not_kept():
    kept = plot_history(History([1, 2], [1.0, 0.9], [1.0, 0.95], 1.0, 2))
    dropped = plot_history(History([1, 2], [1.0, 0.9], [1.1, 1.2], 1.0, 0))
    assert not kept.get_title() and "no weights are kept" in dropped.get_title()


@pytest.mark.filterwarnings("error")
def test_training_curve_says_where_nothing_was_trained():
    axes = plot_history(History())
    assert "nothing was trained" in axes.get_title() and not axes.lines


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


@pytest.mark.parallel(2)
def test_two_ranks_draw_on_the_first_and_refuse_together():
    mesh = UnitSquareMesh(3, 3)
    V = VectorFunctionSpace(mesh, "R", 0, dim=2)
    values = np.random.default_rng(0).standard_normal((30, 2))
    samples = Samples(V, values[:, :owned_size(V)], np.zeros((30, 2)))
    axes = samples.plot(truth=Function(V).assign(0.5))
    if mesh.comm.rank == 0:
        assert [_lines(ax)["posterior mean"] for ax in axes] == pytest.approx(values.mean(axis=0))
        assert _lines(axes[1])["truth"] == 0.5
    else:
        assert axes is None
    with pytest.raises(InputError, match="axes is 'ax'"):
        samples.plot(axes="ax" if mesh.comm.rank else None)


def test_a_map_on_a_periodic_extrusion_is_refused():
    mesh = ExtrudedMesh(UnitIntervalMesh(3), 3, periodic=True)
    with pytest.raises(InputError, match="periodic extrusions: use save"):
        _samples(FunctionSpace(mesh, "CG", 1)).plot()
