"""Pictures for talks: samples with their uncertainty, posterior predictive, training curve."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from finat.ufl import TensorProductElement
from firedrake import Function, FunctionSpace, SpatialCoordinate, assemble, interpolate
from firedrake.functionspaceimpl import WithGeometry
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fem_diffusion.checks import check_array, check_count, check_kind, check_text, together
from fem_diffusion.trust import Calibration
from fem_diffusion.diffusion import History
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, field, owned_size
from fem_diffusion.fields.keyed import gather_rows
from fem_diffusion.samples import Samples

__all__ = ["plot_calibration", "plot_history", "plot_predictive", "plot_samples"]

TRUTH, MODEL, REFERENCE = "black", "tab:blue", "tab:orange"


def plot_samples(samples: Samples, axes: Axes | Sequence[Axes] | None = None, truth: Function | None = None,
                 reference: Sequence | None = None, curves: int | None = None, xlabel: str | None = None,
                 ylabel: str | None = None) -> Axes | np.ndarray | None:
    """Draw samples of a scalar parameter, or of a few numbers; the axes are returned, None but on rank 0.

    On a one-dimensional mesh (a boundary part, too): mean, 95 % band, single samples, truth and reference along the
    coordinate that varies most. On a two-dimensional one: maps of mean, standard deviation and one sample, and of the
    truth where it is given. In Real space: for each number a histogram with mean, 95 % interval, truth and reference.
    What is constant along an extrusion is drawn on the base mesh.

    Parameters
    ----------
    axes : matplotlib Axes (lines, one number) or sequence of them (maps, several numbers), optional
        Where to draw; a new figure where left out.
    truth : Function, optional
        In the space of the samples.
    reference : tuple of numpy.ndarray or Function, optional
        Not for maps: mean and standard deviation of a reference posterior, owned coefficients, shape (n_owned,) each;
        its band is mean ± 1.96 standard deviations, or pass (mean, lower, upper).
    curves : int, optional
        Lines only: number of single samples; 20 where left out.
    xlabel, ylabel : str, optional
        With units: position and parameter (lines), or parameter and density (numbers); ylabel of the colours (maps).

    InputError is raised if an argument is of the wrong kind, shape or space, or nothing would be drawn of it; if the
    parameter is neither scalar nor numbers, the mesh is three-dimensional, or a map is asked for on several ranks.
    """
    check_kind(samples, "samples", Samples, "what Posterior.sample returned")
    V, comm = samples.V, samples.V.comm
    if len(V) > 1:
        raise InputError(f"plot_samples draws one parameter and these samples have {len(V)}: pass one of them, "
                         "samples.component(0).plot() and so on, or use save().")
    values = together(comm, lambda: check_array(samples.values, "samples.values", ("n", owned_size(V))))
    if not len(values):
        raise InputError("There are no samples: draw one at least.")
    if truth is not None:
        space = truth.function_space() if isinstance(truth, Function) else None
        if space is None or space.mesh() is not V.mesh() or space.ufl_element() != V.ufl_element():
            raise InputError(f"truth is {truth!r}: give a Function in the space of the samples, {V}.")
        truth = together(comm, lambda: check_array(coefficients(truth), "truth", (owned_size(V),)))
    band = None if reference is None else together(comm, lambda: _reference(reference, owned_size(V)))
    for name, label in (("xlabel", xlabel), ("ylabel", ylabel)):
        check_kind(label, name, (str, type(None)), "a string")
    V = _drawn_space(V)
    if V.ufl_element().family() == "Real":
        _refuse("numbers", curves=curves)
        together(comm, lambda: _axes_for(axes, V.dim()))
        return _plot_numbers(V, values, axes, truth, band, xlabel or "parameter", ylabel or "density")
    if V.value_size != 1:
        raise InputError("plot_samples draws scalar parameters and numbers in Real space; use save() and a viewer for "
                         "vectors and tensors.")
    if V.ufl_element().mapping() != "identity":
        raise InputError(f"the coefficients in {V.ufl_element()} are not values, so their deviations and quantiles are "
                         "not those of the field: interpolate the samples into a CG or DG space.")
    if V.mesh().topological_dimension == 1:
        curves = 20 if curves is None else check_count(curves, "curves", least=0)
        together(comm, lambda: _axes_for(axes, 1))
        return _plot_lines(V, values, axes, truth, band, curves, xlabel or "position", ylabel or "parameter")
    _refuse("maps", curves=curves, reference=reference, xlabel=xlabel)
    if V.mesh().geometric_dimension != 2 or comm.size > 1:
        raise InputError("plot_samples draws lines on any number of ranks and maps on one; use save() and a viewer.")
    if getattr(V.mesh(), "extruded_periodic", False):
        raise InputError("Firedrake draws no maps on periodic extrusions: use save() and a viewer.")
    return _plot_maps(V, values, axes, truth, ylabel or "parameter")


def _refuse(what: str, **arguments: Any) -> None:
    """Refuse arguments that a picture has no use for."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise InputError(f"pictures of {what} have no use for {' and '.join(given)}: leave it out.")


def _drawn_space(V: WithGeometry) -> WithGeometry:
    """A space with the same coefficients: scalar for vectors of one component, of the base mesh along an extrusion."""
    element, mesh = V.ufl_element(), V.mesh()
    if element.family() != "Real" and V.value_size == 1 and V.value_shape:
        element = element.sub_elements[0]
    factors = list(element.factor_elements) if isinstance(element, TensorProductElement) else []
    if [factor.family() == "Real" for factor in factors] == [False, True]:
        element, mesh = factors[0], mesh._base_mesh
    return V if element == V.ufl_element() else FunctionSpace(mesh, element)


def _reference(reference: Sequence, size: int) -> np.ndarray:
    """Mean, lower and upper bound, shape (3, n_owned)."""
    if not isinstance(reference, (tuple, list, np.ndarray)) or len(reference) not in (2, 3):
        raise InputError(f"reference is of type {type(reference).__name__}: give (mean, std) or (mean, lower, upper).")
    mean, *others = (check_array(coefficients(part) if isinstance(part, Function) else part, "reference", (size,))
                     for part in reference)
    if len(others) == 1 and (others[0] < 0).any():
        raise InputError("reference has negative standard deviations: give (mean, std) or (mean, lower, upper).")
    return np.stack([mean, *(others if len(others) == 2 else mean + 1.96 * np.outer([-1, 1], others[0]))])


def _axes_for(axes: Any, count: int) -> None:
    """Refuse what is not None, nor axes for so many pictures."""
    if axes is not None:
        many = [axes] if isinstance(axes, Axes) else list(axes) if isinstance(axes, (Sequence, np.ndarray)) else []
        if len(many) < count or not all(isinstance(ax, Axes) for ax in many):
            what = "a matplotlib Axes" if count == 1 else f"a row of {count} matplotlib Axes (axes.ravel() of an array)"
            raise InputError(f"axes is {axes!r}: give {what}, or leave it out for a new figure.")


def _plot_lines(V: WithGeometry, values: np.ndarray, axes: Any, truth: np.ndarray | None, reference: np.ndarray | None,
                curves: int, xlabel: str, ylabel: str) -> Axes | None:
    x = gather_rows(V, np.stack([coefficients(assemble(interpolate(c, V))) for c in SpatialCoordinate(V.mesh())]))
    lines = gather_rows(V, values[:curves])
    summary = gather_rows(V, np.stack([values.mean(axis=0), *np.quantile(values, [0.025, 0.975], axis=0)]))
    truth = None if truth is None else gather_rows(V, truth[None])
    reference = None if reference is None else gather_rows(V, reference)
    if x is None or lines is None or summary is None:   # everywhere but on rank 0
        return None
    x, axes = x[np.argmax(np.ptp(x, axis=1))], _one(axes)
    order = np.argsort(x)
    x = x[order]
    if curves:
        axes.plot(x, lines[:, order].T, color=MODEL, linewidth=0.6, alpha=0.35)
    mean, lower, upper = summary[:, order]
    axes.fill_between(x, lower, upper, color=MODEL, alpha=0.2, label="95 % band")
    axes.plot(x, mean, color=MODEL, linewidth=2, label="posterior mean")
    if curves:
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


def _one(axes: Any, size: tuple[float, float] = (7, 4)) -> Axes:
    """The one axes to draw on, checked."""
    _axes_for(axes, 1)
    if axes is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    return axes if isinstance(axes, Axes) else axes[0]


def _plot_numbers(V: WithGeometry, values: np.ndarray, axes: Any, truth: np.ndarray | None,
                  reference: np.ndarray | None, xlabel: str, ylabel: str) -> Axes | np.ndarray | None:
    numbers, truth, reference = (None if part is None else gather_rows(V, np.atleast_2d(part))
                                 for part in (values, truth, reference))
    if numbers is None:   # everywhere but on rank 0
        return None
    count = numbers.shape[1]
    figure = None
    if axes is None:
        columns, rows = min(count, 3), -(-count // 3)
        size = (max(3.6 * columns, 5.5), 3.2 * rows + 0.5)
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        for ax in axes.flat[count:]:
            ax.axis("off")
    axes = np.array([axes] if isinstance(axes, Axes) else axes, dtype=object)
    axes = axes.ravel()[:count]
    places = [str(i) for i in range(count)]
    if len(V.value_shape) > 1 and V.value_size == count:
        places = [",".join(map(str, place)) for place in np.ndindex(V.value_shape)]
    for i, (ax, place) in enumerate(zip(axes, places)):
        column = numbers[:, i]
        lower, upper = np.quantile(column, [0.025, 0.975])
        ax.hist(column, bins=min(max(8, round(2 * len(column)**(1 / 3))), 60), density=True, color=MODEL, alpha=0.35,
                label=f"{len(column)} samples")
        ax.axvspan(lower, upper, color=MODEL, alpha=0.12, linewidth=0, label="95 % interval")
        ax.axvline(column.mean(), color=MODEL, linewidth=2, label="posterior mean")
        if reference is not None:
            ax.axvline(reference[0, i], linestyle="--", color=REFERENCE, linewidth=1.6, label="reference mean")
            for bound, label in zip(reference[1:, i], ("reference 95 %", None)):
                ax.axvline(bound, linestyle=":", color=REFERENCE, linewidth=1.6, label=label)
        if truth is not None:
            ax.axvline(truth[0, i], color=TRUTH, linewidth=1.5, label="truth")
        ax.set(xlabel=xlabel, ylabel=ylabel, title="" if count == 1 else f"component {place}")
    if figure is None or count == 1:
        axes[0].legend(fontsize="small", frameon=False)
    else:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), fontsize="small", frameon=False)
    return axes[0] if count == 1 else axes


def _plot_maps(V: WithGeometry, values: np.ndarray, axes: Any, truth: np.ndarray | None, label: str) -> np.ndarray:
    if len(values) < 2:
        raise InputError("A map of the standard deviation needs at least 2 samples.")
    panels = ({} if truth is None else {"truth": truth}) | {"posterior mean": values.mean(
        axis=0), "standard deviation": values.std(axis=0, ddof=1), "one sample": values[0]}
    _axes_for(axes, len(panels))
    if axes is None:
        axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), layout="constrained")[1]
    shown = np.concatenate([rows for name, rows in panels.items() if name != "standard deviation"])
    for ax, (name, rows) in zip(axes, panels.items()):
        scale = {"cmap": "magma"} if name == "standard deviation" else {"vmin": shown.min(), "vmax": shown.max()}
        ax.figure.colorbar(tripcolor(field(V, rows), axes=ax, **scale), ax=ax, label=label)
        ax.set(title=name, aspect="equal", xlabel="x", ylabel="y")
    return axes


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
    axes, sensors = _one(axes), np.arange(len(y))
    lower, middle, upper = np.quantile(predictions, [0.025, 0.5, 0.975], axis=0)
    axes.errorbar(sensors, middle, yerr=[middle - lower, upper - middle], fmt="o", color=MODEL, markersize=4, capsize=3,
                  label="posterior predictive, 95 %")
    axes.plot(sensors, y, "x", color=TRUTH, markersize=7, label="measured")
    axes.set(xlabel="sensor", ylabel=ylabel, xticks=sensors)
    axes.legend(fontsize="small", frameon=False)
    return axes


def plot_history(history: History, axes: Axes | None = None) -> Axes:
    """Training curve of a `Model`: loss over optimiser steps, with the level of the Gaussian base alone.

    The figure is new where no axes are given. InputError is raised where `history` is something else.
    """
    check_kind(history, "history", History, "the history of a model, model.history")
    axes = _one(axes)
    if history.step:
        axes.plot(history.step, history.train, color=MODEL, alpha=0.5, label="training")
        axes.plot(history.step, history.validation, color=MODEL, linewidth=2, label="validation (held-out pairs)")
        axes.axhline(history.base, color=REFERENCE, linestyle="--", label="Gaussian base alone")
        if history.best_step:
            axes.axvline(history.best_step, color=TRUTH, linewidth=0.8, linestyle=":", label="weights kept")
        axes.legend(fontsize="small", frameon=False)
    if not history.best_step:
        axes.set_title("no gain on held-out pairs: the Gaussian base alone is kept" if history.step else
                       "nothing was trained: the Gaussian base needs no network", fontsize="medium")
    axes.set(xlabel="optimiser step", ylabel="denoising loss (1 = unit variance target)")
    return axes


def plot_calibration(calibration: Calibration, axes: Axes | None = None) -> Axes:
    """Ranks of held-out truths among their draws: the share below each level, minus the level itself.

    There is a curve for each coordinate; 95 % of those of calibrated draws stay wholly within the band (Kolmogorov).
    The figure is new where no axes are given. InputError is raised for what `calibrate` has not returned.
    """
    check_kind(calibration, "calibration", Calibration, "what calibrate returned")
    axes = _one(axes, (5, 4))
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
