"""Where a monitor shows a field: maps of plane meshes, bands along lines, slices through three dimensions."""

from dataclasses import replace

import numpy as np
from firedrake import H1, FunctionSpace, SpatialCoordinate, TrialFunction, VectorFunctionSpace, assemble, interpolate
from firedrake.functionspaceimpl import WithGeometry
from scipy.sparse import csr_matrix, diags, hstack

from fem_diffusion.checks import check_count, check_number
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import owned_size
from fem_diffusion.monitor.bundle import Area
from fem_diffusion.page import words

__all__ = ["area_of", "component_of"]

# Below this share of the mesh's size a coordinate is the same everywhere.
_FLAT = 1e-9
_AXES = "xyz"
_BITS = np.array([(a, a | bit) for bit in (1, 2, 4) for a in range(8) if not a & bit])
# Of a cell, how its corners make triangles, or of one in three dimensions its edges.
_SIDES = {"interval": [(0, 1)], "triangle": [(0, 1, 2)], "quadrilateral": [(0, 1, 2), (1, 3, 2)],
          "interval * interval": [(0, 1, 2), (1, 3, 2)]}
_EDGES = {"tetrahedron": np.array([(a, b) for b in range(4) for a in range(b)]), "hexahedron": _BITS,
          "quadrilateral * interval": _BITS,
          "triangle * interval": np.array([(0, 2), (2, 4), (0, 4), (1, 3), (3, 5), (1, 5), (0, 1), (2, 3), (4, 5)])}


def component_of(M: WithGeometry, component: int) -> tuple[WithGeometry, int]:
    """A component of a space, and how many coefficients stand before it; InputError if there are not so many."""
    if check_count(component, "component", least=0) >= len(M):
        raise InputError(f"component is {component}: the parameter has {len(M)}.")
    spaces = [W.collapse() if len(M) > 1 else W for W in M]
    return spaces[component], sum(owned_size(W) for W in spaces[:component])


def area_of(M: WithGeometry, component: int, name: str, unit: str, length: str,
            plane: tuple[str, float] | None = None) -> Area | None:
    """Where a component of a parameter is shown; None of vectors, numbers and surfaces that are not flat.

    InputError if a plane is given where there is nothing to be cut, or does not meet the mesh.
    """
    W, before = component_of(M, component)
    mesh = W.mesh()
    cell = str(mesh.ufl_cell().cellname)
    if W.value_shape or W.finat_element is None or cell not in (*_SIDES, *_EDGES) or getattr(
            mesh, "variable_layers", False):
        return None
    if plane is not None and cell not in _EDGES:
        raise InputError("A plane cuts a field in three dimensions, which this one is not: leave plane out.")
    # Where the field or the mesh jumps, as at a periodic seam, each cell has corners of its own; on a line always.
    smooth = all(element in H1 for element in (W.ufl_element(), mesh.coordinates.function_space().ufl_element()))
    smooth = smooth and cell != "interval"
    simple = cell in ("interval", "triangle", "tetrahedron")
    family = ("CG" if smooth else "DG") if simple else ("Q" if smooth else "DQ")
    # Nodes of a default DG space lie inside the cells.
    C = FunctionSpace(mesh, family, 1, variant="equispaced")
    matrix = assemble(interpolate(TrialFunction(W), C), mat_type="aij").petscmat
    indptr, indices, data = matrix.getValuesCSR()
    rows = csr_matrix((data, indices, indptr), shape=matrix.getSize())
    rows.eliminate_zeros()
    size = owned_size(M)
    rows = hstack([csr_matrix((rows.shape[0], before)), rows,
                   csr_matrix((rows.shape[0], size - before - rows.shape[1]))], format="csr")
    places = VectorFunctionSpace(mesh, family, 1, variant="equispaced")
    corners = assemble(interpolate(SpatialCoordinate(mesh), places)).dat.data_ro.reshape(rows.shape[0], -1).copy()
    cells = _cells(C)
    whole = Area(corners, cells, rows, tuple(_AXES[:corners.shape[1]]), name, unit, length)
    if cell in _EDGES:
        return _slice(whole, _EDGES[cell], plane)
    whole = _flat(replace(whole, cells=np.vstack([cells[:, side] for side in _SIDES[cell]])))
    if cell == "interval":
        return _line(whole)
    return whole if len(whole.axes) == 2 else None


def _cells(C: WithGeometry) -> np.ndarray:
    """Numbers of the nodes of all cells (t, m)."""
    found = C.cell_node_map()
    if not C.mesh().extruded:
        return found.values.astype(np.int64)
    layers = np.arange(C.mesh().layers - 1)
    return (found.values[:, None] + layers[:, None] * found.offset).reshape(-1, found.values.shape[1]).astype(np.int64)


def _flat(area: Area) -> Area:
    """The area without coordinates that are the same everywhere, as on a straight boundary."""
    extent = np.ptp(area.corners, axis=0)
    kept = np.flatnonzero(extent > _FLAT * extent.max())
    return replace(area, corners=area.corners[:, kept], axes=tuple(area.axes[i] for i in kept))


def _line(area: Area) -> Area | None:
    """Cells of a line one after the other, by their coordinate, or along a curve by its length; None where it branches.
    """
    ends = area.corners[area.cells]     # (t, 2, d)
    if len(area.axes) == 1:
        order, swapped, axes = ends[:, :, 0].min(axis=1).argsort(), ends[:, 0, 0] > ends[:, 1, 0], area.axes
        places = np.sort(ends[order, :, 0], axis=1)
    else:
        found = _chain(ends)
        if found is None:
            return None
        order, swapped = found
        far = np.cumsum(np.linalg.norm(ends[order, 1] - ends[order, 0], axis=1))
        places, axes = np.column_stack([[0.0, *far[:-1]], far]), ("along the line",)
    cells = np.where(swapped[:, None], area.cells[:, ::-1], area.cells)[order]
    return replace(area, corners=places.reshape(-1, 1), cells=np.arange(cells.size).reshape(-1, 2),
                   rows=area.rows[cells.ravel()], axes=axes)


def _chain(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The order (t,) of cells with these ends (t, 2, d) along a curve, and which of them, by number, are turned round.

    None unless they make up one.
    """
    step = _FLAT * np.ptp(ends.reshape(-1, ends.shape[2]), axis=0).max()
    _, nodes = np.unique(np.rint(ends.reshape(-1, ends.shape[2]) / step), axis=0, return_inverse=True)
    nodes = nodes.reshape(-1, 2)
    at: dict[int, list[int]] = {}
    for i, pair in enumerate(nodes.tolist()):
        for node in pair:
            at.setdefault(node, []).append(i)
    single = [node for node, mine in at.items() if len(mine) == 1]
    if max(map(len, at.values())) > 2 or len(single) not in (0, 2):
        return None
    node = min(single) if single else int(nodes[0, 0])
    order, turned, done = [], np.zeros(len(nodes), dtype=bool), set[int]()
    while (following := [i for i in at[node] if i not in done]):
        i = following[0]
        done.add(i)
        order.append(i)
        turned[i] = nodes[i, 0] != node
        node = int(nodes[i, 0] if turned[i] else nodes[i, 1])
    return (np.array(order), turned) if len(order) == len(nodes) else None


def _slice(area: Area, edges: np.ndarray, plane: tuple[str, float] | None) -> Area:
    """Where a plane cuts cells (t, m) with these edges (e, 2): polygons between its places on edges, in triangles."""
    wrong = InputError(f"plane is {plane!r}: give an axis and a place on it, such as ('z', 1.5).")
    if plane is not None and not (isinstance(plane, (tuple, list)) and len(plane) == 2 and plane[0] in tuple(_AXES)):
        raise wrong
    axis = 2 if plane is None else _AXES.index(plane[0])
    low, high = area.corners[:, axis].min(), area.corners[:, axis].max()
    at = (low + high) / 2 if plane is None else check_number(plane[1], "plane")
    height = area.corners[:, axis] - at
    above = height >= 0
    if above.all():     # the plane is the lowest side of the mesh
        above = height > 0
    ends = area.cells[:, edges]
    cut = above[ends[:, :, 0]] != above[ends[:, :, 1]]
    if not cut.any():
        raise InputError(f"The plane {_AXES[axis]} = {at:g} does not meet the mesh, which reaches from {low:g} to "
                         f"{high:g}: give one that does.")
    pairs, inverse = np.unique(np.sort(ends[cut], axis=1), axis=0, return_inverse=True)
    number = np.full(cut.shape, -1)
    number[cut] = inverse.ravel()
    first, last = pairs.T
    share = height[first] / (height[first] - height[last])
    places = area.corners[first] + share[:, None] * (area.corners[last] - area.corners[first])
    kept = [i for i in range(3) if i != axis]
    places, triangles = places[:, kept], []
    for mine in number[cut.sum(axis=1) > 2]:
        mine = mine[mine >= 0]
        x, y = (places[mine] - places[mine].mean(axis=0)).T
        mine = mine[np.arctan2(y, x).argsort()]
        triangles += [(mine[0], b, c) for b, c in zip(mine[1:-1], mine[2:])]
    rows = diags(1 - share) @ area.rows[first] + diags(share) @ area.rows[last]
    return replace(area, corners=places, cells=np.array(triangles, dtype=np.int64), rows=csr_matrix(rows),
                   axes=tuple(_AXES[i] for i in kept),
                   where=f"at {_AXES[axis]} = {words.place([at], area.length)}")
