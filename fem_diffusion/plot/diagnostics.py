"""Pictures of what was trained, and of how it fits measurements and held-out pairs."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from fem_diffusion.checks import check_array, check_kind, check_text
from fem_diffusion.diffusion import History
from fem_diffusion.errors import InputError
from fem_diffusion.plot.style import MODEL, REFERENCE, TRUTH, log_where_wide, one_axes
from fem_diffusion.trust import Calibration

__all__ = ["plot_calibration", "plot_history", "plot_predictive"]


def plot_predictive(y: np.ndarray, predictions: np.ndarray, axes: Axes | None = None,
                    ylabel: str = "measurement") -> Axes:
    """A measurement y (k,) against simulated ones of posterior samples, noise included, shape (n, k).

    Each sensor has a 95 % interval; ylabel has its unit, and the figure is new where no axes are given. InputError is
    raised if the shapes do not match, or a number is not finite; the message says of which sensor.
    """
    names = [f"sensor {i}" for i in range(len(y))] if isinstance(y, (Sequence, np.ndarray)) else None
    y = check_array(y, "y", ("k",), names=names)
    predictions = check_array(predictions, "predictions", ("n", len(y)), names=names)
    if not predictions.size:
        raise InputError("There are no predictions, or no sensors: give one at least.")
    check_text(ylabel, "ylabel")
    axes, sensors = one_axes(axes), np.arange(len(y))
    lower, middle, upper = np.quantile(predictions, [0.025, 0.5, 0.975], axis=0)
    axes.errorbar(sensors, middle, yerr=[middle - lower, upper - middle], fmt="o", color=MODEL, markersize=4, capsize=3,
                  label="posterior predictive, 95 %")
    axes.plot(sensors, y, "x", color=TRUTH, markersize=7, label="measured")
    axes.set(xlabel="sensor", ylabel=ylabel, xticks=sensors)
    log_where_wide(axes, y, lower)
    axes.legend(fontsize="small", frameon=False)
    return axes


def plot_history(history: History, axes: Axes | None = None) -> Axes:
    """Training curve of a `Model`: loss over optimiser steps, with the level of the Gaussian base alone.

    The figure is new where no axes are given. InputError is raised where `history` is something else.
    """
    check_kind(history, "history", History, "the history of a model, model.history")
    axes = one_axes(axes)
    if history.step:
        axes.plot(history.step, history.train, color=MODEL, alpha=0.5, label="training")
        axes.plot(history.step, history.validation, color=MODEL, linewidth=2, label="validation (held-out pairs)")
        axes.axhline(history.base, color=REFERENCE, linestyle="--", label="Gaussian base alone")
        if history.best_step:
            axes.axvline(history.best_step, color=TRUTH, linewidth=0.8, linestyle=":", label="weights kept")
        axes.legend(fontsize="small", frameon=False)
    if not history.best_step:
        axes.set_title("no weights are kept: the base, or its emulator, tells as much" if history.step else
                       "nothing was trained: the Gaussian base needs no network", fontsize="medium")
    axes.set(xlabel="optimiser step", ylabel="denoising loss (1 = unit variance target)")
    return axes


def plot_calibration(calibration: Calibration, axes: Axes | None = None) -> Axes:
    """Ranks of held-out truths among their draws: the share below each level, minus the level itself.

    There is a curve for each coordinate; 95 % of those of calibrated draws stay wholly within the band (Kolmogorov).
    The figure is new where no axes are given. InputError is raised for what `calibrate` has not returned.
    """
    check_kind(calibration, "calibration", Calibration, "what calibrate returned")
    axes = one_axes(axes, (5, 4))
    pairs, coordinates = calibration.ranks.shape
    level = np.linspace(0, 1, 201)
    position = np.sort((calibration.ranks + 0.5) / (calibration.draws + 1), axis=0)
    for column in position.T:
        axes.plot(level, np.searchsorted(column, level) / pairs - level, color=MODEL, linewidth=0.8, alpha=0.6)
    axes.plot([], [], color=MODEL, linewidth=0.8, label=f"{coordinates} latents")
    band = 1.358 / np.sqrt(pairs)  # the 95 % point of Kolmogorov's statistic
    axes.axhspan(-band, band, color="grey", alpha=0.15, label=f"95 % of calibrated curves, {pairs} pairs")
    axes.axhline(0.0, color=TRUTH, linewidth=0.8)
    axes.set(xlabel="rank of the truth among the draws (share)", ylabel="share of truths below, minus rank",
             xlim=(0, 1), ylim=(-2 * band, 2 * band))
    axes.legend(fontsize="small", frameon=False)
    return axes
