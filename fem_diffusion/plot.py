"""Pictures for talks: samples with their uncertainty, posterior predictive, training curve."""

import numpy as np
from firedrake import Function, SpatialCoordinate, assemble, interpolate
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt

from fem_diffusion.fields import coefficients
from fem_diffusion.diffusion import History
from fem_diffusion.errors import InputError

__all__ = ["plot_calibration", "plot_history", "plot_predictive", "plot_samples"]

TRUTH, MODEL, REFERENCE = "black", "tab:blue", "tab:orange"


def plot_samples(samples, axes=None, truth: Function | None = None, reference: tuple | None = None, curves: int = 20,
                 xlabel: str = "position", ylabel: str = "parameter"):
    """Draw samples of a scalar parameter.

    On a one-dimensional mesh (a boundary part, too): mean, 95 % band, single samples, truth and reference along the
    coordinate that varies most. On a two-dimensional one: maps of mean, standard deviation and one sample, and of the
    truth where it is given.

    Parameters
    ----------
    samples : Samples
        What `Posterior.sample` returned.
    axes : matplotlib Axes (1D) or sequence of them (2D), optional
        Where to draw; a new figure where left out.
    truth : Function, optional
        In the space of the samples.
    reference : tuple of numpy.ndarray, optional
        1D only: mean and standard deviation of a reference posterior, owned coefficients, shape (n_owned,) each;
        its band is mean ± 1.96 standard deviations, or pass (mean, lower, upper).
    curves : int
        1D only: number of single samples.
    xlabel, ylabel : str
        Labels with units.

    Returns
    -------
    matplotlib Axes or sequence of them on rank 0, None elsewhere.

    Raises
    ------
    InputError
        If the parameter is not scalar, the mesh is three-dimensional, or a map is asked for on several ranks.
    """
    V = samples.V
    if len(V) > 1:
        raise InputError(f"plot_samples draws one parameter and these samples have {len(V)}: pass one of them, "
                         "samples.component(0).plot() and so on, or use save().")
    if V.value_size != 1:
        raise InputError("plot_samples draws scalar parameters; use save() and a viewer for vectors.")
    dimension = V.mesh().topological_dimension
    if dimension == 1:
        return _plot_lines(samples, axes, truth, reference, curves, xlabel, ylabel)
    if V.mesh().geometric_dimension != 2 or V.comm.size > 1:
        raise InputError("plot_samples draws lines on any number of ranks and maps on one; use save() and a viewer.")
    return _plot_maps(samples, axes, truth, ylabel)


def _plot_lines(samples, axes, truth, reference, curves, xlabel, ylabel):
    V = samples.V
    x = _gather(V, np.stack([coefficients(assemble(interpolate(c, V))) for c in SpatialCoordinate(V.mesh())]))
    lines = _gather(V, samples.values[:curves])
    summary = _gather(V, coefficients([samples.mean(), samples.quantile(0.025), samples.quantile(0.975)]))
    truth = None if truth is None else _gather(V, coefficients(truth)[None])
    if reference is not None:
        if len(reference) == 2:
            mean, std = reference
            reference = (mean, mean - 1.96 * std, mean + 1.96 * std)
        reference = _gather(V, np.stack(reference))
    if V.comm.rank != 0:
        return None
    x = x[np.argmax(np.ptp(x, axis=1))]
    order = np.argsort(x)
    x = x[order]
    axes = axes if axes is not None else plt.subplots(figsize=(7, 4), layout="constrained")[1]
    axes.plot(x, lines[:, order].T, color=MODEL, linewidth=0.6, alpha=0.35)
    mean, lower, upper = summary[:, order]
    axes.fill_between(x, lower, upper, color=MODEL, alpha=0.2, label="95 % band")
    axes.plot(x, mean, color=MODEL, linewidth=2, label="posterior mean")
    axes.plot([], [], color=MODEL, linewidth=0.6, alpha=0.6, label=f"{len(lines)} samples")
    if reference is not None:
        axes.plot(x, reference[0, order], "--", color=REFERENCE, linewidth=1.6, label="reference mean")
        axes.plot(x, reference[1:, order].T, ":", color=REFERENCE, linewidth=1.6)
        axes.plot([], [], ":", color=REFERENCE, linewidth=1.6, label="reference 95 %")
    if truth is not None:
        axes.plot(x, truth[0, order], color=TRUTH, linewidth=1.5, label="truth")
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(x[0], x[-1]))
    axes.legend(fontsize="small", frameon=False)
    return axes


def _plot_maps(samples, axes, truth, label):
    panels = {"posterior mean": samples.mean(), "standard deviation": samples.std(), "one sample": samples[0]}
    if truth is not None:
        panels = {"truth": truth, **panels}
    if axes is None:
        axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained")[1]
    values = np.concatenate([coefficients(f) for name, f in panels.items() if name != "standard deviation"])
    for ax, (name, function) in zip(axes, panels.items()):
        scale = {"cmap": "magma"} if name == "standard deviation" else {"vmin": values.min(), "vmax": values.max()}
        ax.figure.colorbar(tripcolor(function, axes=ax, **scale), ax=ax, label=label)
        ax.set(title=name, aspect="equal", xlabel="x", ylabel="y")
    return axes


def plot_predictive(y: np.ndarray, predictions: np.ndarray, axes=None, ylabel: str = "measurement"):
    """Measurements against the posterior predictive, a 95 % interval for each sensor.

    Parameters
    ----------
    y : numpy.ndarray
        Measurement, shape (k,).
    predictions : numpy.ndarray
        Simulated measurements of posterior samples, noise included, shape (n, k).
    axes : matplotlib Axes, optional
        Where to draw; a new figure where left out.
    ylabel : str
        Label with unit.

    Returns
    -------
    matplotlib Axes
    """
    axes = axes if axes is not None else plt.subplots(figsize=(7, 4), layout="constrained")[1]
    sensors = np.arange(len(y))
    lower, middle, upper = np.quantile(predictions, [0.025, 0.5, 0.975], axis=0)
    axes.errorbar(sensors, middle, yerr=[middle - lower, upper - middle], fmt="o", color=MODEL, markersize=4, capsize=3,
                  label="posterior predictive, 95 %")
    axes.plot(sensors, y, "x", color=TRUTH, markersize=7, label="measured")
    axes.set(xlabel="sensor", ylabel=ylabel, xticks=sensors)
    axes.legend(fontsize="small", frameon=False)
    return axes


def plot_history(history: History, axes=None):
    """Training curve: loss over optimiser steps, with the level of the Gaussian base alone.

    Parameters
    ----------
    history : History
        Of a `ConditionalModel`.
    axes : matplotlib Axes, optional
        Where to draw; a new figure where left out.

    Returns
    -------
    matplotlib Axes
    """
    axes = axes if axes is not None else plt.subplots(figsize=(7, 4), layout="constrained")[1]
    axes.plot(history.step, history.train, color=MODEL, alpha=0.5, label="training")
    axes.plot(history.step, history.validation, color=MODEL, linewidth=2, label="validation (held-out pairs)")
    axes.axhline(history.base, color=REFERENCE, linestyle="--", label="Gaussian base alone")
    if history.best_step:
        axes.axvline(history.best_step, color=TRUTH, linewidth=0.8, linestyle=":", label="weights kept")
    else:
        axes.set_title("no gain on held-out pairs: the Gaussian base alone is kept", fontsize="medium")
    axes.set(xlabel="optimiser step", ylabel="denoising loss (1 = unit variance target)")
    axes.legend(fontsize="small", frameon=False)
    return axes


def plot_calibration(calibration, axes=None):
    """Ranks of held-out truths among their draws: the share below each level, minus the level itself.

    Parameters
    ----------
    calibration : Calibration
        Of `calibrate` or `calibrate_model`.
    axes : matplotlib Axes, optional
        Where to draw; a new figure where left out.

    Returns
    -------
    matplotlib Axes
        A curve for each coordinate; 95 % of curves of calibrated draws stay wholly within the band (Kolmogorov).
    """
    axes = axes if axes is not None else plt.subplots(figsize=(5, 4), layout="constrained")[1]
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


def _gather(V, values: np.ndarray) -> np.ndarray | None:
    """Rows of owned coefficients (n, n_owned) put together on rank 0, shape (n, n_global); None elsewhere."""
    parts = V.comm.gather(values)
    return np.concatenate(parts, axis=1) if V.comm.rank == 0 else None
