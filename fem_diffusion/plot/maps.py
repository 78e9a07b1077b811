"""Maps of scalar and vector fields: on plane meshes, and on planes through others."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from firedrake.functionspaceimpl import WithGeometry
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import field
from fem_diffusion.plot.places import Plane, plane_of
from fem_diffusion.plot.style import Asked, Marks, check_axes

__all__ = ["map_names", "plot_maps"]

_NEAR = 0.05    # of the size of a mesh: a sensor is in a plane


@dataclass(frozen=True)
class _Panel:
    """A map: owned coefficients of a scalar field (n,), and of the vectors on it (dim, n), colours and their label."""

    row: np.ndarray
    arrows: np.ndarray | None
    scale: dict
    label: str


def map_names(asked: Asked, truth: bool) -> list[str]:
    """Titles of the maps, in their order."""
    return [*(["truth"] if truth else []), "posterior mean", "standard deviation", "one sample",
            *(f"{100 * q:g} % quantile" for q in asked.quantiles),
            *([] if asked.threshold is None else [f"probability of more than\n{asked.limit}"])]


def plot_maps(V: WithGeometry, values: np.ndarray, axes: Any, truth: np.ndarray | None, asked: Asked,
              marks: Marks | None, where: Any) -> np.ndarray | None:
    """Maps of samples (n, n_owned) of a scalar field, or (n, n_owned, dim) of a vector field in V's component space.

    Vectors are drawn as their magnitude with arrows; the standard deviation is then the root of the sum of the
    variances. Returns the axes on rank 0, None elsewhere (collective).
    """
    if len(values) < 2:
        raise InputError("A map of the standard deviation needs at least 2 samples.")
    vector = values.ndim == 3

    def size(x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x, axis=-1) if vector else x

    def value(x: np.ndarray, arrows: bool = True) -> _Panel:
        return _Panel(size(x) if arrows else x, x.T if vector and arrows else None, {}, asked.value)
    std = values.std(axis=0, ddof=1)
    panels = {} if truth is None else {"truth": value(truth)}
    panels["posterior mean"] = value(values.mean(axis=0))
    panels["standard deviation"] = _Panel(size(std), None, {"cmap": "magma"}, asked.value)
    panels["one sample"] = value(values[0])
    for q in asked.quantiles:
        panels[f"{100 * q:g} % quantile"] = value(np.quantile(size(values), q, axis=0), arrows=False)
    if asked.threshold is not None:
        panels[f"probability of more than\n{asked.limit}"] = _Panel(
            (size(values) > asked.threshold).mean(axis=0), None, {"cmap": "cividis", "vmin": 0.0, "vmax": 1.0},
            "probability")
    check_axes(axes, len(panels))
    flat = V.mesh().geometric_dimension == 2 and V.comm.size == 1
    plane = None if flat else plane_of(V, where)
    grid = plane_of(V, where, coarse=True) if vector else None
    images = {name: panel.row if plane is None else plane.image(panel.row) for name, panel in panels.items()}
    arrows = {name: np.stack([grid.image(part) for part in panel.arrows]) for name, panel in panels.items()
              if grid is not None and panel.arrows is not None}
    if V.comm.rank:
        return None
    if axes is None:
        columns = min(len(panels), 4 if len(panels) != 5 else 3)
        rows = -(-len(panels) // columns)
        axes = plt.subplots(rows, columns, figsize=(4.2 * columns, _height(V, plane) * rows), layout="constrained",
                            squeeze=False)[1].ravel()
        for ax in axes[len(panels):]:
            ax.axis("off")
        axes = axes[:len(panels)]
    shown = np.concatenate([images[name].ravel() for name, panel in panels.items() if not panel.scale])
    limits = {"vmin": np.nanmin(shown), "vmax": np.nanmax(shown)}
    across = _across(V, plane)
    for ax, (name, panel) in zip(axes, panels.items()):
        scale = panel.scale or limits
        if plane is None:
            colours = tripcolor(field(V, panel.row), axes=ax, **scale)
            colours.set_rasterized(True)    # a mesh is too many triangles for a vector graphic
        else:
            colours = ax.imshow(images[name], origin="lower", extent=plane.extent, interpolation="none", **scale)
        # As high as the map, whatever its aspect.
        ax.figure.colorbar(colours, cax=ax.inset_axes((1.03, 0, 0.05, 1)), label=panel.label)
        if grid is not None and name in arrows:
            _draw_arrows(ax, grid, arrows[name])
        ax.set_title(name if across is None else f"{name}\nat {across}", fontsize="medium")
        ax.margins(0)
        ax.set(aspect="equal", xlabel=asked.along("xyz"[0 if plane is None else plane.axes[0]]),
               ylabel=asked.along("xyz"[1 if plane is None else plane.axes[1]]))
        if marks is not None:
            _draw_marks(ax, marks, plane)
    return np.asarray(axes, dtype=object)


def _height(V: WithGeometry, plane: Plane | None) -> float:
    """Of a panel, as wide as high on a square, in inches."""
    ends = np.asarray(V.mesh().coordinates.dat.data_ro if plane is None else np.reshape(plane.extent, (2, 2)).T)
    width, height = np.ptp(ends, axis=0)
    return 0.9 + 2.7 * float(np.clip(height / width, 0.25, 1.5))


def _across(V: WithGeometry, plane: Plane | None) -> str | None:
    """Where a slice is, in words."""
    return None if plane is None or plane.normal is None else f"{'xyz'[plane.normal[0]]} = {plane.normal[1]:.3g}"


def _draw_arrows(ax: Any, grid: Plane, vectors: np.ndarray) -> None:
    """Vectors (dim, rows, columns) on a coarse grid, as far as they lie in the plane."""
    u, v = vectors[grid.axes[0]], vectors[grid.axes[1]]
    x, y = grid.centres
    there = np.isfinite(u)
    longest = np.hypot(u, v)[there].max(initial=0.0)
    if longest > 0:
        step = min(x[1] - x[0], y[1] - y[0])
        x, y = np.meshgrid(x, y)
        ax.quiver(x[there], y[there], u[there], v[there], color="white", edgecolor="black", linewidth=0.4,
                  angles="xy", scale_units="xy", scale=longest / (1.2 * step), width=0.006, pivot="mid")


def _draw_marks(ax: Any, marks: Marks, plane: Plane | None) -> None:
    """Sensors on a map; hollow ones are off the plane."""
    if plane is None:
        return marks.draw(ax, marks.points)
    near = None
    if plane.normal is not None:
        away = np.abs(marks.points[:, plane.normal[0]] - plane.normal[1])
        near = away <= _NEAR * float((plane.high - plane.low).max())
    marks.draw(ax, marks.points[:, list(plane.axes)], near)
