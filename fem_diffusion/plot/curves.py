"""Bands along curves, and histograms of numbers."""

from typing import Any

import numpy as np
from firedrake.functionspaceimpl import WithGeometry
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fem_diffusion.fields.keyed import gather_rows
from fem_diffusion.plot.places import Curve
from fem_diffusion.plot.style import LIMIT, MODEL, REFERENCE, TRUTH, Asked, Marks, one_axes

__all__ = ["plot_curve", "plot_numbers"]


def plot_curve(curve: Curve, values: np.ndarray, axes: Any, truth: np.ndarray | None, reference: np.ndarray | None,
               curves: int, asked: Asked, marks: Marks | None) -> Axes | np.ndarray | None:
    """Mean, band, quantiles and single samples of values (n, n_owned); with a threshold also how likely it is passed.

    Returns the axes, two of them with a threshold, on rank 0 and None elsewhere (collective).
    """
    levels = [0.025, 0.975, *asked.quantiles]

    def summary(values: np.ndarray) -> np.ndarray:
        share = (values > (np.inf if asked.threshold is None else asked.threshold)).mean(axis=0)
        return np.stack([values.mean(axis=0), share, *np.quantile(values, levels, axis=0), *values[:curves]])
    if curve.nodal:
        rows = curve.take(summary(values))
    else:
        rows = curve.take(values)
        # Where the curve is outside of the mesh there is nothing to be compared.
        rows = None if rows is None else np.where(np.isnan(rows[0]), np.nan, summary(rows))
    truth, reference = (None if part is None else curve.take(np.atleast_2d(part)) for part in (truth, reference))
    if rows is None:    # everywhere but on rank 0
        return None
    if asked.threshold is None:
        axes, below = one_axes(axes), None
    elif axes is None:
        axes, below = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(2, 1), layout="constrained")[1]
    else:
        axes, below = list(axes)[:2]
    x, (mean, share, lower, upper) = curve.x, rows[:4]
    quantiles, lines = rows[4:len(levels) + 2], rows[len(levels) + 2:]
    if curves:
        axes.plot(x, lines.T, color=MODEL, linewidth=0.6, alpha=0.35)
    axes.fill_between(x, lower, upper, color=MODEL, alpha=0.2, linewidth=0, label="95 % band")
    axes.plot(x, mean, color=MODEL, linewidth=2, label="posterior mean")
    if curves:
        axes.plot([], [], color=MODEL, linewidth=0.6, alpha=0.6, label=f"{len(lines)} samples")
    for q, line, style in zip(asked.quantiles, quantiles, ("-.", ":", "--") * len(quantiles)):
        axes.plot(x, line, style, color=MODEL, linewidth=1.4, label=f"{100 * q:g} % quantile")
    if reference is not None:
        axes.plot(x, reference[0], "--", color=REFERENCE, linewidth=1.6, label="reference mean")
        axes.plot(x, reference[1:].T, ":", color=REFERENCE, linewidth=1.6)
        axes.plot([], [], ":", color=REFERENCE, linewidth=1.6, label="reference 95 %")
    if truth is not None:
        axes.plot(x, truth[0], color=TRUTH, linewidth=1.5, label="truth")
    axes.set(ylabel=asked.value, xlim=(x[0], x[-1]))
    lowest = axes
    if below is not None:
        axes.axhline(asked.threshold, color=LIMIT, linewidth=1.2, linestyle=(0, (5, 2)), label=asked.limit)
        below.plot(x, share, color=LIMIT, linewidth=1.8)
        below.fill_between(x, 0, share, color=LIMIT, alpha=0.15, linewidth=0)
        below.set(ylim=(0, 1), xlim=(x[0], x[-1]), ylabel="probability\nof more")
        axes.label_outer()
        lowest = below
    lowest.set_xlabel(asked.position or asked.along(curve.label))
    if marks is not None:
        marks.draw_along(axes, x, curve.places)
    axes.legend(fontsize="small", frameon=False)
    return axes if below is None else np.array([axes, below])


def plot_numbers(V: WithGeometry, values: np.ndarray, axes: Any, truth: np.ndarray | None,
                 reference: np.ndarray | None, asked: Asked) -> Axes | np.ndarray | None:
    """A histogram of each number, with its interval; the axes on rank 0, None elsewhere (collective)."""
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
    for i, (ax, place) in enumerate(zip(axes, entries(V, count))):
        column = numbers[:, i]
        lower, upper = np.quantile(column, [0.025, 0.975])
        ax.hist(column, bins=min(max(8, round(2 * len(column)**(1 / 3))), 60), density=True, color=MODEL, alpha=0.35,
                label=f"{len(column)} samples")
        ax.axvspan(lower, upper, color=MODEL, alpha=0.12, linewidth=0, label="95 % interval")
        ax.axvline(column.mean(), color=MODEL, linewidth=2, label="posterior mean")
        for q, style in zip(asked.quantiles, ("-.", ":", "--") * len(asked.quantiles)):
            ax.axvline(np.quantile(column, q), linestyle=style, color=MODEL, linewidth=1.4,
                       label=f"{100 * q:g} % quantile")
        if reference is not None:
            ax.axvline(reference[0, i], linestyle="--", color=REFERENCE, linewidth=1.6, label="reference mean")
            for bound, label in zip(reference[1:, i], ("reference 95 %", None)):
                ax.axvline(bound, linestyle=":", color=REFERENCE, linewidth=1.6, label=label)
        if truth is not None:
            ax.axvline(truth[0, i], color=TRUTH, linewidth=1.5, label="truth")
        if asked.threshold is not None:
            share = f"{(column > asked.threshold).mean():.2g}"
            ax.axvline(asked.threshold, color=LIMIT, linewidth=1.2, linestyle=(0, (5, 2)),
                       label=f"{asked.limit}: passed with probability {share}")
        ax.set(xlabel=asked.value, ylabel=asked.density, title="" if count == 1 else f"component {place}")
    # Probabilities differ from number to number.
    if figure is None or count == 1 or asked.threshold is not None:
        for ax in axes if asked.threshold is not None else axes[:1]:
            ax.legend(fontsize="small", frameon=False)
    else:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]), fontsize="small", frameon=False)
    return axes[0] if count == 1 else axes


def entries(V: WithGeometry, count: int) -> list[str]:
    """Names of the numbers of a Real space."""
    if len(V.value_shape) > 1 and V.value_size == count:
        return [",".join(map(str, place)) for place in np.ndindex(V.value_shape)]
    return [str(i) for i in range(count)]
