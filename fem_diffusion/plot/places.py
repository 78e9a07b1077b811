"""Fields on planes, lines and boundaries of a mesh: where the points are, and what the values are there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from firedrake import DirichletBC, SpatialCoordinate, assemble, interpolate
from firedrake.functionspaceimpl import WithGeometry
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist

from fem_diffusion.checks import check_array, check_number, together
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_marker
from fem_diffusion.fields.coefficients import bounding_box, coefficients
from fem_diffusion.fields.keyed import gather_rows
from fem_diffusion.observation.points import locate, point_rows

__all__ = ["Curve", "Plane", "boundary_curve", "line_curve", "mesh_curve", "nodes_of", "plane_of"]

_TOLERANCE = 1e-6       # of a cell's size
_PIXELS, _ARROWS, _STEPS = 150, 16, 200
_AXES = "xyz"


@dataclass(frozen=True)
class Plane:
    """A regular grid in a plane of a mesh, or over the whole of a plane one, with the rows that read fields there.

    Parameters
    ----------
    axes : tuple of int
        The two coordinates that are drawn.
    normal : tuple of int and float, or None
        The coordinate that is constant, and its value.
    low, high : numpy.ndarray
        Corners of the picture, shape (2,).
    shape : tuple of int
        Rows and columns of the grid.
    rows : scipy.sparse.csr_matrix
        This rank's columns, shape (n, n_owned of the scalar space).
    found : numpy.ndarray
        Mask (n,) of the points that are in the mesh.
    """

    axes: tuple[int, int]
    normal: tuple[int, float] | None
    low: np.ndarray
    high: np.ndarray
    shape: tuple[int, int]
    rows: csr_matrix
    found: np.ndarray
    V: WithGeometry

    def image(self, values: np.ndarray) -> np.ndarray:
        """Values of a field with owned coefficients (n_owned,) on the grid, NaN outside the mesh (collective)."""
        image = self.V.comm.allreduce(self.rows @ values)
        return np.where(self.found, image, np.nan).reshape(self.shape)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, lower and upper end, as Matplotlib wants them."""
        return self.low[0], self.high[0], self.low[1], self.high[1]

    @property
    def centres(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of the grid along its two axes."""
        return _centres(self.low[0], self.high[0], self.shape[1]), _centres(self.low[1], self.high[1], self.shape[0])


def _centres(low: float, high: float, count: int) -> np.ndarray:
    """Middles of equal parts of an interval."""
    return low + (high - low) * (np.arange(count) + 0.5) / count


def plane_of(V: WithGeometry, where: Any = None, coarse: bool = False) -> Plane:
    """Grid over a mesh in two dimensions, or in a plane of one in three, for a scalar space V (collective).

    `where` is the name of the coordinate that is constant and its value; the plane through the middle, across the
    shortest side, where left out. A coarse grid is for arrows. InputError if there is no such plane, or it misses the
    mesh.
    """
    mesh = V.mesh()
    low, high = bounding_box(mesh)
    size, normal = high - low, None
    if mesh.geometric_dimension == 3:
        axis, at = 2 - int(np.argmin(size[::-1])), None
        if where is not None:
            if not isinstance(where, (tuple, list)) or len(where) != 2 or where[0] not in tuple(_AXES):
                raise InputError(f"slice is {where!r}: give a coordinate and its value, such as ('z', 0.5).")
            axis, at = _AXES.index(where[0]), check_number(where[1], "the value of slice")
        normal = axis, float((low[axis] + high[axis]) / 2) if at is None else at
        if not low[axis] <= normal[1] <= high[axis]:
            raise InputError(f"slice is at {_AXES[axis]} = {normal[1]:g} and the mesh lies between {low[axis]:g} and "
                             f"{high[axis]:g}: move it there.")
    axes = tuple(i for i in range(mesh.geometric_dimension) if normal is None or i != normal[0])
    low, high = low[list(axes)], high[list(axes)]
    longest = (high - low).max() / (_ARROWS if coarse else _PIXELS)
    columns, lines = (max(2, round(width / longest)) for width in high - low)
    x, y = np.meshgrid(_centres(low[0], high[0], columns), _centres(low[1], high[1], lines))
    points = np.empty((x.size, mesh.geometric_dimension))
    points[:, axes[0]], points[:, axes[1]] = x.ravel(), y.ravel()
    if normal is not None:
        points[:, normal[0]] = normal[1]
    rows, found = _rows(V, points)
    if not found.any():
        raise InputError("The slice meets no part of the mesh: move it.")
    return Plane((axes[0], axes[1]), normal, low, high, (lines, columns), rows, found, V)


def _rows(V: WithGeometry, points: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
    """This rank's columns of the rows that read a scalar space at points (k, gdim), and a mask of those in the mesh."""
    vom, index, found = locate(V.mesh(), points, _TOLERANCE)
    return point_rows(V, vom, index, len(points)), found


@dataclass(frozen=True)
class Curve:
    """Where bands are drawn: along a mesh of lines, along a line through a mesh, or along a boundary.

    Parameters
    ----------
    x, places : numpy.ndarray
        Position of each point, shape (p,), and its coordinates (p, gdim); on rank 0.
    label : str
        Of the positions.
    take : Callable
        Rows of owned coefficients (m, n_owned) to the values at the points, (m, p), on rank 0 (collective).
    nodal : bool
        Whether the points are nodes.
    """

    x: np.ndarray
    places: np.ndarray
    label: str
    take: Callable[[np.ndarray], np.ndarray | None]
    nodal: bool


def nodes_of(V: WithGeometry) -> np.ndarray:
    """Coordinates of the nodes owned here, shape (gdim, n_owned)."""
    return np.stack([coefficients(assemble(interpolate(c, V))) for c in SpatialCoordinate(V.mesh())])


def mesh_curve(V: WithGeometry) -> Curve:
    """The nodes of a mesh of lines, along the coordinate that varies most."""
    places = gather_rows(V, nodes_of(V))
    if places is None:      # everywhere but on rank 0
        return Curve(np.empty(0), np.empty((0, 0)), "", lambda rows: gather_rows(V, rows), True)
    x = places[np.argmax(np.ptp(places, axis=1))]
    order = np.argsort(x)

    def take(rows: np.ndarray) -> np.ndarray | None:
        found = gather_rows(V, rows)
        return None if found is None else found[:, order]
    return Curve(x[order], places[:, order].T, "position", take, True)


def line_curve(V: WithGeometry, line: Any) -> Curve:
    """Points along the line between two, shape (2, gdim); InputError if it misses the mesh."""
    mesh = V.mesh()
    ends = together(V.comm, lambda: check_array(line, "line", (2, mesh.geometric_dimension)))
    length = float(np.linalg.norm(ends[1] - ends[0]))
    if not length > 0:
        raise InputError("The two ends of line are one point: give different ones.")
    share = np.linspace(0, 1, _STEPS + 1)
    points = ends[0] + share[:, None] * (ends[1] - ends[0])
    matrix, found = _rows(V, points)
    if not found.any():
        raise InputError(f"line leads from {tuple(ends[0].tolist())} to {tuple(ends[1].tolist())} and misses the mesh: "
                         "move its ends.")
    moving = np.flatnonzero(np.abs(ends[1] - ends[0]) > 1e-12 * length)
    x, label = share * length, "distance along the line"
    if len(moving) == 1:
        x, label = points[:, moving[0]], _AXES[moving[0]]

    def take(rows: np.ndarray) -> np.ndarray | None:
        values = V.comm.reduce((matrix @ rows.T).T)
        return None if values is None else np.where(found, values, np.nan)
    return Curve(x, points, label, take, False)


def boundary_curve(V: WithGeometry, marker: Any) -> Curve:
    """The nodes of a boundary of a plane mesh, in their order along it; InputError if there are none."""
    mesh = V.mesh()
    check_marker(marker, "boundary")
    if mesh.geometric_dimension != 2 or mesh.topological_dimension != 2:
        raise InputError(f"boundary is drawn of meshes in a plane, not of one with {mesh.geometric_dimension} "
                         "coordinates: give slice or line.")
    try:
        nodes = DirichletBC(V, 0.0, marker).nodes
    except (LookupError, ValueError) as error:
        raise InputError(f"boundary is {marker!r}, which the mesh does not have ({error}): give one of its "
                         "markers.") from error
    mine = np.isin(np.arange(V.node_set.size), nodes)
    chosen = gather_rows(V, mine[None].astype(float))
    places = gather_rows(V, nodes_of(V))
    count = V.comm.bcast(None if chosen is None else int(chosen.sum()))
    if count < 2:
        raise InputError(f"The space of the samples has {count} nodes on boundary {marker!r}: take a marker of the "
                         "mesh, and a continuous space.")
    order, x = np.empty(0, dtype=int), np.empty(0)
    if chosen is not None and places is not None:
        there = np.flatnonzero(chosen[0])
        path, x = _along(places[:, there].T)
        order = there[path]

    def take(rows: np.ndarray) -> np.ndarray | None:
        found = gather_rows(V, rows)
        return None if found is None else found[:, order]
    place = "boundary" if isinstance(marker, str) else f"boundary {marker}"
    points = np.empty((0, 2)) if places is None else places[:, order].T
    return Curve(x, points, f"distance along the {place}", take, True)


def _along(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of points (p, 2) on a curve, open or closed, and the distances along it: both ends of a path grow."""
    apart = cdist(points, points)
    path, left = [0], set(range(1, len(points)))
    while left:
        rest = np.fromiter(left, dtype=int)
        ends = apart[[path[0], path[-1]]][:, rest]
        end, nearest = np.unravel_index(np.argmin(ends), ends.shape)
        point = int(rest[nearest])
        path.insert(0 if end == 0 and len(path) > 1 else len(path), point)
        left.remove(point)
    if tuple(points[path[-1]]) < tuple(points[path[0]]):
        path.reverse()
    steps = apart[path[:-1], path[1:]]
    return np.array(path), np.concatenate([[0.0], np.cumsum(steps)])
