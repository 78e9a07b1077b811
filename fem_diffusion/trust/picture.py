"""The picture of a check: what the sensors read beside what samples predict, and how wide the posterior is."""

from typing import TYPE_CHECKING, Any

import numpy as np

from fem_diffusion.errors import InstallError

if TYPE_CHECKING:
    from fem_diffusion.trust.check import Check

__all__ = ["plot_check"]

_COLOURS = {"green": "#2e7d32", "yellow": "#b26a00", "red": "#c62828"}
_BLUE, _GREY = "#1f5fa8", "#6b6b6b"
# Sensors whose names fit below an axis, directions that are drawn, and letters of a name.
_NAMED, _DIRECTIONS, _LETTERS = 24, 20, 14


def plot_check(found: "Check") -> Any:
    """A Matplotlib figure: readings and predictions sensor by sensor, the same in units of the noise, and widths."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InstallError("Pictures need Matplotlib: pip install 'fem_diffusion[plot]'.") from error
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    wide = len(found.widths) > 0
    grid = figure.add_gridspec(2, 2 if wide else 1, height_ratios=(3, 2), width_ratios=(3, 1.3) if wide else None)
    above = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=above)
    k = len(found.y)
    x = np.arange(k)
    odd = np.array([name in found.worst for name in found.names])
    low, middle, high = np.quantile(found.readings, (0.05, 0.5, 0.95), axis=0)
    for axes, centre, unit in ((above, 0.0, 1.0), (below, found.y, found.noise_std)):
        axes.bar(x, (high - low) / unit, 0.62, (low - centre) / unit, color=_BLUE, alpha=0.3, lw=0,
                 label="samples predict (90 %)")
        axes.hlines((middle - centre) / unit, x - 0.31, x + 0.31, color=_BLUE, lw=1.6)
    for rows, colour, label in ((~odd, "black", "measurement ± 2 noise std"),
                                (odd, _COLOURS["red"], "contradicted by the others")):
        if rows.any():
            above.errorbar(x[rows], found.y[rows], 2 * found.noise_std[rows], fmt="o", ms=4.5, capsize=2.5,
                           color=colour, lw=1.2, label=label)
            below.plot(x[rows], 0 * x[rows], "o", ms=4.5, color=colour)
    below.axhspan(-2, 2, color="black", alpha=0.07, lw=0)
    above.set_ylabel("reading")
    below.set_ylabel("predicted − read\n(noise std)")
    above.legend(frameon=False, fontsize=8.5, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    above.tick_params(labelbottom=False)
    if k <= _NAMED:
        names = [name if len(name) <= _LETTERS else f"{name[:_LETTERS - 1]}…" for name in found.names]
        turned = sum(map(len, names)) > 60
        below.set_xticks(x, names, rotation=40 if turned else 0, ha="right" if turned else "center", fontsize=8.5)
    below.set_xlabel("sensor")
    if wide:
        _widths(figure.add_subplot(grid[:, 1]), found.widths[:_DIRECTIONS])
    for axes in (above, below):
        axes.use_sticky_edges = False
        axes.margins(y=0.08)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{found.verdict.capitalize()}: {_caption(found)}", color=_COLOURS[found.light], fontsize=12.5,
                    fontweight="bold", x=0.01, ha="left")
    return figure


def _widths(axes: Any, widths: np.ndarray) -> None:
    """Posterior standard deviation over the solver's, direction by direction, on a logarithmic scale."""
    place = np.arange(len(widths))[::-1]
    axes.axvspan(1 / 1.25, 1.25, color=_COLOURS["green"], alpha=0.13, lw=0)
    axes.axvline(1, color=_COLOURS["green"], lw=1)
    axes.hlines(place, 1, widths, color=_GREY, lw=1.2)
    axes.plot(widths, place, "o", color=_BLUE, ms=6)
    axes.set_xscale("log", base=2)
    reach = max(2.3, 1.15 * float(np.exp(np.abs(np.log(widths)).max())))
    axes.set_xlim(1 / reach, reach)
    ticks = [t for t in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16) if 1 / reach <= t <= reach]
    axes.set_xticks(ticks, [f"1/{round(1 / t)}" if t < 1 else f"{t:g}" for t in ticks])
    axes.set_yticks(place, [str(i + 1) for i in range(len(widths))], fontsize=8.5)
    axes.set_ylabel("direction of which the data tell, best first")
    axes.set_xlabel("posterior std / the solver's")
    axes.set_title("too narrow  |  too wide", fontsize=9.5, color=_GREY)


def _caption(found: "Check") -> str:
    if found.verdict == "conflict":
        many = len(found.worst) > 1
        return (f"sensor{'s' * many} {', '.join(found.worst[:3])} contradict{'s' * (not many)} the others"
                if found.worst else "the measurement does not go together with model or noise")
    if found.verdict == "biased":
        return f"off by {found.shift:.1f} posterior standard deviations"
    if found.verdict == "trustworthy":
        return f"samples miss the readings by {found.misfit:.1f} noise std, as they should"
    return f"by a factor of about {max(found.width, 1 / max(found.width, 1e-3)):.1f}"
