"""The picture of readings against what samples predict."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fem_diffusion.page.picture import new_figure
from fem_diffusion.plot.style import MODEL, TRUTH, log_where_wide

__all__ = ["readings_picture"]

_LABELLED = 24  # sensors


def readings_picture(y: np.ndarray, clean: np.ndarray, std: np.ndarray, names: Sequence[str],
                     label: str) -> Figure:
    """Readings y (k,) against what samples predict without noise (n, k), and with noise of deviations std (k,).

    Below, how far each reading is off its prediction, in standard deviations of that.
    """
    figure = new_figure(6.0, 4.8)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    places = np.arange(len(y))
    middle, total = clean.mean(axis=0), np.sqrt(clean.var(axis=0, ddof=1) + std**2)
    low, high = np.quantile(clean, [0.025, 0.975], axis=0)
    axes.vlines(places, middle - 1.96 * total, middle + 1.96 * total, color=MODEL, linewidth=1.2, alpha=0.7,
                label="predicted reading, 95 %")
    axes.vlines(places, low, high, color=MODEL, linewidth=4, alpha=0.4, label="without noise, 95 %")
    axes.plot(places, middle, "_", color=MODEL, markersize=8)
    axes.plot(places, y, "x", color=TRUTH, markersize=6, label="measured")
    axes.set(ylabel=label, xlim=(-0.6, len(y) - 0.4))
    log_where_wide(axes, y, low)
    below.axhspan(-1.96, 1.96, color=MODEL, alpha=0.12, linewidth=0)
    below.axhline(0, color=MODEL, linewidth=1)
    off = np.divide(y - middle, total, out=np.zeros_like(y), where=total > 0)
    below.vlines(places, 0, off, color=TRUTH, linewidth=0.8)
    below.plot(places, off, "x", color=TRUTH, markersize=5)
    reach = max(3.0, 1.15 * float(np.abs(off).max(initial=0)))
    below.set(ylabel="off by\n[std]", ylim=(-reach, reach), xlabel="number of the reading")
    if len(y) <= _LABELLED and max(map(len, names)) > 3:
        below.set_xlabel("")
        below.set_xticks(places, [name if len(name) <= 16 else f"{name[:15]}…" for name in names], parse_math=False,
                         rotation=45, ha="right")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize="small",
                  frameon=False)
    return figure
