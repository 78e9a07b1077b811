"""What pictures share: colours, checked axes, and sensors drawn where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from firedrake.mesh import MeshGeometry
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fem_diffusion.checks import check_array
from fem_diffusion.errors import InputError
from fem_diffusion.observation.linear import Observation

__all__ = ["LIMIT", "MODEL", "REFERENCE", "TRUTH", "Asked", "Marks", "check_axes", "log_where_wide", "marks_of",
           "one_axes"]

TRUTH, MODEL, REFERENCE = "black", "tab:blue", "tab:orange"
LIMIT = "tab:red"       # of a threshold
# More names than this cover the picture, more characters each other.
_NAMED, _NAME = 40, 16
_WIDE = 100     # ratio of readings from which they are on a logarithmic scale
_NEAR = 0.02    # of the length of a curve: a sensor is on it


@dataclass(frozen=True)
class Asked:
    """What a picture is to show, and its words.

    Parameters
    ----------
    quantiles, threshold
        Levels of quantiles, and the value of which the probability of more is asked.
    name, units, mesh_units : str
        Of the parameter, and of lengths.
    position, density : str or None
        Labels of the user's own.
    """

    quantiles: tuple[float, ...] = ()
    threshold: float | None = None
    name: str = "parameter"
    units: str | None = None
    mesh_units: str | None = None
    position: str | None = None
    density: str = "density"

    @property
    def value(self) -> str:
        """Label of the parameter."""
        return f"{self.name} [{self.units}]" if self.units else self.name

    @property
    def limit(self) -> str:
        """The threshold with its unit."""
        return f"{self.threshold:g} {self.units or ''}".strip()

    def along(self, name: str) -> str:
        """Label of a length."""
        return f"{name} [{self.mesh_units}]" if self.mesh_units else name


@dataclass(frozen=True)
class Marks:
    """Sensors at points (k, gdim) with a short name each, empty where there are too many to be named."""

    points: np.ndarray
    names: tuple[str, ...]

    def draw(self, axes: Axes, places: np.ndarray, near: np.ndarray | None = None) -> None:
        """Draw them at places (k, 2) of the axes; those that are not `near` the plane that is drawn are hollow."""
        near = np.ones(len(places), dtype=bool) if near is None else near
        for some, colour in ((near, "white"), (~near, "none")):
            if not some.any():      # an empty line that is not clipped has no size, and spoils the layout
                continue
            axes.plot(*places[some].T, "o", color=colour, markeredgecolor="black", markersize=4.5, clip_on=False,
                      linestyle="none")
        for place, name in zip(places, self.names):
            # A name is no formula, whatever it holds.
            text = axes.annotate(name, place, (4, 3), textcoords="offset points", fontsize="xx-small",
                                 annotation_clip=False, parse_math=False,
                                 bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 0.6})
            text.set_in_layout(False)

    def draw_along(self, axes: Axes, x: np.ndarray, places: np.ndarray) -> None:
        """Draw them at the foot of a curve with these positions x (p,) and places (p, gdim), each at the nearest."""
        apart = np.linalg.norm(self.points[:, None] - places, axis=2)
        nearest, near = np.argmin(apart, axis=1), apart.min(axis=1) <= _NEAR * np.ptp(x)
        feet = axes.get_xaxis_transform()
        for some, colour, words in ((near, "black", ""), (~near, "none", " away from here")):
            if some.any():
                axes.plot(x[nearest[some]], np.full(some.sum(), 0.02), "^", markerfacecolor=colour, markersize=5,
                          markeredgecolor="black" if colour == "black" else "grey", transform=feet, clip_on=False,
                          linestyle="none", label=f"{some.sum()} sensor{'s' if some.sum() > 1 else ''}{words}")
        named = near[:len(self.names)] if len(self.names) <= _NAMED // 2 else []
        for place, name in ((x[nearest[i]], self.names[i]) for i in np.flatnonzero(named)):
            axes.annotate(name, (place, 0.02), (0, 7), xycoords=feet, textcoords="offset points", ha="center",
                          fontsize="xx-small", parse_math=False)


def marks_of(sensors: Any, mesh: MeshGeometry) -> Marks | None:
    """The sensors of an Observation, or at points (k, gdim), on the pictures of a mesh; None where there are none.

    Rows at one point are one sensor. Names that users gave are drawn, numbers of rows in the place of others.
    InputError if they are of another dimension, or none of them has a place.
    """
    if sensors is None:
        return None
    gdim, given = mesh.geometric_dimension, ()
    if isinstance(sensors, Observation):
        points, given = sensors.points, sensors.names
    else:
        points = check_array(sensors, "sensors", ("k", gdim), *([("k",)] if gdim == 1 else [])).reshape(-1, gdim)
    if points.shape[1] != gdim:
        raise InputError(f"The sensors have {points.shape[1]} coordinates and the mesh of the samples {gdim}: give "
                         "points on that mesh.")
    placed = np.flatnonzero(np.isfinite(points).all(axis=1))
    if not len(placed):
        raise InputError("None of the sensors has a place (functionals have none): leave sensors out.")
    first = placed[np.sort(np.unique(points[placed], axis=0, return_index=True)[1])]
    names = [given[i].split("[")[0].strip() if given and not given[i].startswith("(") else str(i) for i in first]
    names = [name if len(name) <= _NAME else f"{name[:_NAME - 1]}…" for name in names]
    return Marks(points[first], tuple(names) if len(names) <= _NAMED else ())


def check_axes(axes: Any, count: int) -> None:
    """Refuse what is not None, nor axes for so many pictures."""
    if axes is not None:
        many = [axes] if isinstance(axes, Axes) else list(axes) if isinstance(axes, (Sequence, np.ndarray)) else []
        if len(many) < count or not all(isinstance(ax, Axes) for ax in many):
            what = "a matplotlib Axes" if count == 1 else f"a row of {count} matplotlib Axes (axes.ravel() of an array)"
            raise InputError(f"axes is {axes!r}: give {what}, or leave it out for a new figure.")


def one_axes(axes: Any, size: tuple[float, float] = (7, 4)) -> Axes:
    """The one axes to draw on, checked."""
    check_axes(axes, 1)
    if axes is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    return axes if isinstance(axes, Axes) else axes[0]


def log_where_wide(axes: Axes, y: np.ndarray, low: np.ndarray) -> None:
    """A logarithmic scale for readings (k,) and the least that is predicted of them, positive and over decades."""
    if min(np.min(y), np.min(low)) > 0 and np.max(y) > _WIDE * np.min(y):
        axes.set_yscale("log")
