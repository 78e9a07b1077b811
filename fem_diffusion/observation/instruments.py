"""Instruments that see more than a point: averages over patches and along lines; and random places for sensors.

The integrals become sums over points: quadrature points of every cell for patches, Gauss points of every segment for
lines. So thousands of rows cost a few matrix products, and no form is assembled for each of them.
"""

from collections.abc import Callable, Sequence

import numpy as np
from finat.ufl import FiniteElement
from firedrake import (
    Constant, Function, FunctionSpace, SpatialCoordinate, TestFunction, TrialFunction, assemble, dx, exp, interpolate,
)
from firedrake.functionspaceimpl import WithGeometry
from firedrake.mesh import MeshGeometry
from firedrake.petsc import PETSc
from numpy.typing import ArrayLike
from pyadjoint import no_annotations
from scipy.sparse import csr_matrix, identity, kron, vstack

from fem_diffusion.checks import check_array, check_count, check_kind, check_number, check_seed
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import bounding_box, coefficients, multiply, on_root
from fem_diffusion.observation.linear import (
    Observation, checked_names, checked_points, compare_row, component_space, labels,
)
from fem_diffusion.observation.points import locate, sensor_rows

__all__ = ["line_averages", "patch_averages", "random_points"]

_BLOCK = 256  # rows whose footprints are held at once
_AGREE = 0.05  # how far two quadrature rules may differ on a footprint
_CANDIDATES = 20000  # random points that are looked for in the mesh at once


@no_annotations
def patch_averages(U: WithGeometry, centres: ArrayLike, radii: ArrayLike, names: Sequence[str] | None = None, *,
                   component: int | None = None) -> Observation:
    """Sensors that average the state around points, with the weight ``exp(-|x - c|²/(2 ρ²))``.

    Weights are normalised over the domain, so a constant state gives that constant; weights below 1e-12 of the largest
    of their row are left out.

    Parameters
    ----------
    centres : array_like
        Shape (k, gdim); those of rank 0 count.
    radii : float | array_like
        The ρ of all footprints, or of each, shape (k,), in the units of the mesh.
    U, names, component
        As for `point_sensors`; the state, or the component, is scalar.

    Raises
    ------
    InputError
        As for `point_sensors`, and if the state is not scalar, a radius is not positive, or a footprint is too small
        for the mesh or outside of it.
    """
    W, embed = _scalar_space(U, component)
    mesh = W.mesh()
    centres = checked_points(mesh, centres, "centres")
    radii = on_root(mesh.comm, lambda: check_array(radii, "radii", (), (len(centres),)))
    if not (radii > 0).all():
        raise InputError("radii must be one positive number or one for each centre, not "
                         f"{np.array2string(radii, threshold=5)}.")
    radii = np.broadcast_to(radii, len(centres))
    degree = 2 * max(2, W.ufl_element().embedded_superdegree)
    (at_points, weights, places), (_, fine_weights, fine_places) = (_quadrature(W, d) for d in (degree, degree + 2))
    blocks = []
    for start in range(0, len(centres), _BLOCK):
        part = slice(start, start + _BLOCK)
        footprints = weights * _footprints(places, centres[part], radii[part])
        fine = fine_weights * _footprints(fine_places, centres[part], radii[part])
        volume, check = mesh.comm.allreduce(np.stack([footprints.sum(axis=1), fine.sum(axis=1)]))
        unseen = ~(np.abs(volume - check) <= _AGREE * check) | (check < 1e-200)
        if unseen.any():
            i = start + int(np.argmax(unseen))
            raise InputError(f"the mesh does not resolve patch {i} at {tuple(centres[i].tolist())} of radius "
                             f"{radii[i]:g}: make the radius as large as a cell, refine the mesh there, move the "
                             "centre inside, or use point_sensors.")
        rows = multiply(at_points, footprints / volume[:, None], transpose=True)
        largest = np.max(mesh.comm.allgather(np.abs(rows).max(axis=1, initial=0.0)), axis=0)
        rows[np.abs(rows) < 1e-12 * largest[:, None]] = 0.0
        blocks.append(csr_matrix(rows))
    compare_row(W, blocks[0][:1], "patch 0", lambda u: _direct_average(u, centres[0], radii[0], degree))
    default = [f"{label}±{radius:g}" for label, radius in zip(labels(centres), radii)]
    return Observation(U, embed(vstack(blocks, format="csr")), checked_names(names, default, len(centres)), centres)


@no_annotations
def line_averages(U: WithGeometry, starts: ArrayLike, ends: ArrayLike, points: int = 8,
                  names: Sequence[str] | None = None, *, component: int | None = None,
                  tolerance: float = 1e-6) -> Observation:
    """Sensors that average the state along straight segments, as a beam of light does; `points` are the midpoints.

    Parameters
    ----------
    starts, ends : array_like
        Ends of the segments, shape (k, gdim) each; those of rank 0 count.
    points : int
        Gauss points of a segment; more than the cells it crosses times the degree of the state are of little use.
    U, names, component, tolerance
        As for `point_sensors`; the state, or the component, is scalar.

    Raises
    ------
    InputError
        As for `point_sensors`, and if the state is not scalar or a segment leaves the mesh.
    """
    W, embed = _scalar_space(U, component)
    mesh, count = W.mesh(), check_count(points, "points")
    tolerance = check_number(tolerance, "tolerance", above=0)
    starts, ends = checked_points(mesh, starts, "starts"), checked_points(mesh, ends, "ends")
    if starts.shape != ends.shape:
        raise InputError(f"there are {len(starts)} starts and {len(ends)} ends: give one of each for a segment.")
    nodes, weights = np.polynomial.legendre.leggauss(count)
    nodes, weights = np.concatenate([[0.0, 1.0], (nodes + 1) / 2]), np.concatenate([[0.0, 0.0], weights / 2])
    places = starts[:, None] + nodes[:, None] * (ends - starts)[:, None]
    vom, index, found = locate(mesh, places.reshape(-1, places.shape[2]), tolerance)
    outside = np.flatnonzero(~found.reshape(len(starts), -1).all(axis=1))
    if len(outside):
        first = ", ".join(f"{i} from {tuple(starts[i].tolist())} to {tuple(ends[i].tolist())}" for i in outside[:5])
        raise InputError(f"{len(outside)} of {len(starts)} segments leave the mesh (segment {first}): move their ends, "
                         "cut them at the boundary, or give a larger tolerance.")
    rows = kron(identity(len(starts)), weights[None], format="csr") @ sensor_rows(W, vom, index, found.size)
    rows.eliminate_zeros()
    default = [f"{start} to {end}" for start, end in zip(labels(starts), labels(ends))]
    return Observation(U, embed(rows), checked_names(names, default, len(starts)), (starts + ends) / 2)


@no_annotations
def random_points(mesh: MeshGeometry, n: int, seed: int, *, tolerance: float = 1e-6) -> np.ndarray:
    """Points (n, gdim) spread evenly over the volume of a mesh, for sensors at random places.

    The mesh may have any cells, holes and re-entrant corners, and be extruded. The points are the same on any number of
    ranks, and the first ones do not depend on n; `tolerance` is as for `point_sensors`. InputError if a number is out
    of range, or the mesh is a surface or a curve in space.
    """
    n, rng = check_count(n), np.random.default_rng(check_seed(seed))
    tolerance = check_number(tolerance, "tolerance", above=0)
    check_kind(mesh, "mesh", MeshGeometry, "a mesh")
    gdim = mesh.geometric_dimension
    if mesh.topological_dimension != gdim:
        raise InputError(f"the mesh is {mesh.topological_dimension}-dimensional in {gdim} dimensions: a random point "
                         "of space is not on it; choose among its nodes, mesh.coordinates.dat.data_ro.")
    low, high = bounding_box(mesh)
    if mesh.ufl_coordinate_element().embedded_subdegree > 1:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)  # curved cells bulge past their nodes
    share = float(assemble(Constant(1.0) * dx(mesh))) / np.prod(high - low)
    chosen = np.empty((0, gdim))
    while len(chosen) < n:
        trials = int(min(_CANDIDATES, 16 + 1.2 * (n - len(chosen)) / share))
        candidates = low + (high - low) * rng.random((trials, gdim))
        chosen = np.concatenate([chosen, candidates[locate(mesh, candidates, tolerance)[2]]])
    return chosen[:n]


def _direct_average(u: Function, centre: np.ndarray, radius: float, degree: int) -> float:
    """Average of a Function with the weight of `patch_averages`."""
    x = SpatialCoordinate(u.function_space().mesh())
    # Constants, so that the forms are compiled once for all places.
    square = sum((x[i] - Constant(c))**2 for i, c in enumerate(centre))
    weight, over = exp(-square / (2 * Constant(radius)**2)), dx(u.function_space().mesh(), degree=degree)
    return assemble(weight * u * over) / assemble(weight * over)


def _scalar_space(U: WithGeometry, component: int | None) -> tuple[WithGeometry, Callable[[csr_matrix], csr_matrix]]:
    """As `component_space`; a vector is refused."""
    W, embed = component_space(U, component)
    if W.value_shape:
        raise InputError(f"the state has value shape {W.value_shape}: averages are of scalars; use functionals for "
                         "an entry of a vector.")
    return W, embed


def _footprints(places: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Weights ``exp(-|x - c|²/(2 ρ²))``, shape (k, n) for places (gdim, n), centres (k, gdim) and radii (k,)."""
    square = sum((x - c[:, None])**2 for x, c in zip(places, centres.T))
    return np.exp(-square / (2 * radii[:, None]**2))


def _quadrature(W: WithGeometry, degree: int) -> tuple[PETSc.Mat, np.ndarray, np.ndarray]:
    """Quadrature points of this rank's cells: matrix of the values there, weights (n,) and coordinates (gdim, n)."""
    Q = FunctionSpace(W.mesh(), FiniteElement("Quadrature", W.mesh().ufl_cell(), degree=degree, quad_scheme="default"))
    at_points = assemble(interpolate(TrialFunction(W), Q), mat_type="aij").petscmat
    places = coefficients([assemble(interpolate(x, Q)) for x in SpatialCoordinate(W.mesh())])
    return at_points, coefficients(assemble(TestFunction(Q) * dx(degree=degree))), places
