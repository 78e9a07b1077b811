"""The picture of a cross-validation: what each sensor reads beside what the others let expect."""

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fem_diffusion.plot.style import LIMIT, MODEL, TRUTH

if TYPE_CHECKING:
    from fem_diffusion.trust.cross import CrossValidation

__all__ = ["plot_cross"]

_COLOURS = {"green": "#2e7d32", "yellow": "#b26a00", "red": "#c62828"}
_LETTERS, _NAMED, _REACH = 22, 40, 6.0


def plot_cross(found: "CrossValidation") -> Figure:
    """Residuals of each sensor: at every time and in total; of one measurement readings and predictions."""
    n, k = found.values.shape
    odd = np.array([name in found.worst for name in found.names])
    if n == 1:
        figure = Figure(figsize=(max(6.0, 3 + 0.45 * k), 5.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        _one(above, below, found, odd)
    else:
        figure = Figure(figsize=(12, max(3.6, 1.6 + 0.3 * min(k, _NAMED))), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1.2))
        _course(figure, left, found, odd)
        _total(right, found, odd)
    for axes in figure.axes[:2]:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_caption(found), color=_COLOURS[found.light], fontsize=12.5, fontweight="bold", x=0.01, ha="left")
    return figure


def _caption(found: "CrossValidation") -> str:
    if found.worst:
        names = ", ".join(found.worst[:3]) + (", ..." if len(found.worst) > 3 else "")
        return f"Sensors disagree: the others contradict {names}"
    if found.noise is not None and found.verdict.startswith("noise"):
        return f"{found.verdict.capitalize()}: {found.noise} times"
    share = found.coverage[0.9][0]
    return f"Consistent: {share:.0%} of the readings are in their 90 % intervals"


def _one(above: Axes, below: Axes, found: "CrossValidation", odd: np.ndarray) -> None:
    """Readings of one measurement against predictions."""
    x, y, mean, std = np.arange(len(odd)), found.values[0], found.mean[0], found.std[0]
    above.vlines(x, mean - 1.96 * std, mean + 1.96 * std, color=MODEL, linewidth=5, alpha=0.35,
                 label="the others let expect, 95 %")
    above.plot(x, mean, "_", color=MODEL, markersize=10)
    below.axhspan(-1.96, 1.96, color=MODEL, alpha=0.12, linewidth=0)
    below.axhline(0, color=MODEL, linewidth=1)
    for rows, colour, label in ((~odd, TRUTH, "read"), (odd, LIMIT, "read, contradicted by the others")):
        if rows.any():
            above.plot(x[rows], y[rows], "x", color=colour, markersize=7, label=label)
            below.vlines(x[rows], 0, found.residuals[0, rows], color=colour, linewidth=0.8)
            below.plot(x[rows], found.residuals[0, rows], "x", color=colour, markersize=6)
    above.set_ylabel("reading")
    below.set_ylabel("residual [std]")
    if len(x) <= _NAMED:
        below.set_xticks(x, _short(found.names), rotation=40, ha="right", fontsize=8.5, parse_math=False)
    below.set_xlabel("sensor")
    above.legend(frameon=False, fontsize=8.5, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def _course(figure: Figure, axes: Axes, found: "CrossValidation", odd: np.ndarray) -> None:
    """Residuals of all sensors in the course of time, as colours; crosses where single readings were left out."""
    n, k = found.values.shape
    axes.set_facecolor("#d9d9d9")
    colours = axes.imshow(found.residuals.T, aspect="auto", cmap="PuOr_r", vmin=-_REACH, vmax=_REACH,
                          interpolation="nearest", extent=(-0.5, n - 0.5, k - 0.5, -0.5))
    rows, columns = np.nonzero(found.outliers)
    if len(rows):
        axes.plot(rows, columns, "x", color="black", markersize=5, markeredgewidth=1.2, label="left out by itself")
    axes.plot([], [], "s", color="#d9d9d9", label="no reading")
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    ticks = np.unique(np.linspace(0, n - 1, 5).round().astype(int))
    dates = np.issubdtype(found.times.dtype, np.datetime64)
    labels = [str(np.datetime_as_string(time, unit="m")).replace("T", "\n") if dates else f"{time:g}"
              for time in found.times[ticks]]
    axes.set_xticks(ticks, labels, fontsize=8.5)
    axes.set_xlabel("time")
    if k <= _NAMED:
        axes.set_yticks(range(k), _short(found.names), fontsize=8.5, parse_math=False)
        for label, bad in zip(axes.get_yticklabels(), odd):
            label.set_color(LIMIT if bad else TRUTH)
    axes.set_ylabel("sensor")
    figure.colorbar(colours, ax=axes, extend="both", label="residual [std]", pad=0.01)


def _total(axes: Axes, found: "CrossValidation", odd: np.ndarray) -> None:
    """Median and central 90 % of the residuals of each sensor, beside what they should be."""
    axes.axvspan(-1.645, 1.645, color=MODEL, alpha=0.12, linewidth=0, label="as they should be")
    axes.axvline(0, color=MODEL, linewidth=1)
    for i, bad in enumerate(odd):
        t = found.residuals[np.isfinite(found.residuals[:, i]), i]
        if len(t):
            low, middle, high = np.quantile(t, [0.05, 0.5, 0.95]).clip(-2 * _REACH, 2 * _REACH)
            colour = LIMIT if bad else TRUTH
            axes.plot([low, high], [i, i], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot(middle, i, "o", color=colour, markersize=5)
    reach = max(3.0, 1.05 * float(np.abs(axes.get_xlim()).max()))
    axes.set(xlim=(-reach, reach), xlabel="residuals: median and 90 % [std]")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1, 1))


def _short(names: tuple[str, ...]) -> list[str]:
    return [name if len(name) <= _LETTERS else f"{name[:_LETTERS - 1]}…" for name in names]
