"""Degrees of freedom are found again by the geometry alone, on any number of ranks."""

import numpy as np
import pytest
from firedrake import (COMM_SELF, COMM_WORLD, ExtrudedMesh, Function, FunctionSpace, IcosahedralSphereMesh,
                       PeriodicUnitSquareMesh, SpatialCoordinate, Submesh, TensorFunctionSpace, UnitCubeMesh,
                       UnitIntervalMesh, UnitSquareMesh, VectorFunctionSpace, as_matrix, as_vector, cos, pi, sin)

from fem_diffusion.fields.coefficients import coefficients, geometric_key, owned_columns
from fem_diffusion.prior.gaussian import GaussianPrior


def square(comm, nx=6, ny=5, height=lambda y: y, **options):
    """Unit square with its heights moved."""
    mesh = UnitSquareMesh(nx, ny, comm=comm, **options)
    mesh.coordinates.dat.data[:, 1] = height(mesh.coordinates.dat.data_ro[:, 1])
    return mesh


def graded(comm, nx=60, ny=40, growth=1.26):
    """Layers that grow from a wall, by default from a thickness of 2.5e-5."""
    return square(comm, nx, ny, lambda y: (growth**(ny * y) - 1) / (growth**ny - 1))


def extruded(comm, **options):
    return ExtrudedMesh(UnitIntervalMesh(6, comm=comm), 6, **options)


def far(comm):
    """As in map coordinates: the place of the domain is much larger than its size."""
    mesh = square(comm)
    mesh.coordinates.dat.data[:] += 1e5
    return mesh


def place(mesh):
    """Not the same at any two places; periodic with the meshes."""
    x = SpatialCoordinate(mesh)
    waves = sum((1 + 0.3 * j) * sin(2 * pi * c + 0.4) + cos(2 * pi * c) for j, c in enumerate(x))
    return waves + sin(2 * pi * 318311 * x[1])


def cell(mesh):
    """As `place`, but of a cell."""
    W = VectorFunctionSpace(mesh, "DQ" if mesh.extruded else "DG", 0)
    centre = Function(W).interpolate(SpatialCoordinate(mesh))
    return place(mesh) + 3 * centre[0] + 5 * centre[1]


def scalar(mesh, family, degree, value=place, **options):
    """A space and what to interpolate into it."""
    return FunctionSpace(mesh, family, degree, **options), value(mesh)


def taylor_hood(comm):
    mesh = square(comm)
    p = place(mesh)
    return VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1), as_vector([p, 2 * p, 3 * p])


def tensors(comm):
    mesh = square(comm)
    p = place(mesh)
    return TensorFunctionSpace(mesh, "CG", 1, symmetry=True), as_matrix([[p, 2 * p], [2 * p, 3 * p]])


def edges(comm):
    mesh = square(comm)
    return FunctionSpace(mesh, "RT", 1), as_vector([place(mesh), 1.0])


CASES = {
    "graded": lambda comm: scalar(graded(comm), "CG", 2),
    "graded to 1e-9": lambda comm: scalar(graded(comm, 8, 40, 1.7), "CG", 2),
    "thin": lambda comm: scalar(square(comm, height=lambda y: 1e-6 * y), "CG", 3),
    "thin, discontinuous": lambda comm: scalar(square(comm, height=lambda y: 1e-6 * y), "DG", 1, cell),
    "far": lambda comm: scalar(far(comm), "CG", 2),
    "constants": lambda comm: scalar(square(comm), "DG", 0),
    "periodic": lambda comm: scalar(PeriodicUnitSquareMesh(8, 8, comm=comm), "CG", 1),
    "periodic, discontinuous": lambda comm: scalar(PeriodicUnitSquareMesh(8, 8, comm=comm), "DG", 1, cell),
    "extruded": lambda comm: scalar(extruded(comm), "DQ", 1, cell),
    "extruded, periodic": lambda comm: scalar(extruded(comm, periodic=True), "CG", 1),
    "constant in depth": lambda comm: scalar(extruded(comm), "CG", 1, vfamily="R", vdegree=0,
                                             value=lambda mesh: SpatialCoordinate(mesh)[0]),
    "quadrilaterals": lambda comm: scalar(square(comm, quadrilateral=True), "CG", 2),
    "cube": lambda comm: scalar(UnitCubeMesh(3, 3, 3, comm=comm), "CG", 2),
    "sphere": lambda comm: scalar(IcosahedralSphereMesh(1.0, 1, comm=comm), "CG", 2),
    "boundary": lambda comm: scalar(Submesh(square(comm), 1, 1), "CG", 1),
    "mixed": taylor_hood,
    "symmetric tensors": tensors,
}


def disagreement(make):
    """How far a function that one rank wrote is from the same one here."""
    (alone, first), (V, second) = make(COMM_SELF), make(COMM_WORLD)
    columns = owned_columns(geometric_key(alone), V)
    if columns is None:
        return np.inf
    written, ours = (coefficients(_interpolated(W, f)) for W, f in ((alone, first), (V, second)))
    return COMM_WORLD.allreduce(np.abs(written[columns] - ours).max(initial=0.0), max)


def _interpolated(V, value):
    """Of a mixed space component by component, as the entries of `value` follow each other."""
    f, start = Function(V), 0
    if len(V) == 1:
        return f.interpolate(value)
    for part in f.subfunctions:
        size = part.function_space().value_size
        entries = [value[start + k] for k in range(size)]
        part.interpolate(as_vector(entries) if part.ufl_shape else entries[0])
        start += size
    return f


@pytest.mark.parallel(2)
def test_every_degree_of_freedom_is_found_on_another_number_of_ranks():
    # One test for all, as starting ranks takes longer than any of them.
    errors = {name: disagreement(make) for name, make in CASES.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-6} == {}
    # Edges point from one vertex number to another: what would be read with a wrong sign is refused.
    assert disagreement(edges) in (np.inf, pytest.approx(0.0, abs=1e-9))


@pytest.mark.parallel(2)
def test_a_prior_draws_the_same_on_thin_cells_on_another_number_of_ranks():
    """White noise belongs to places, not to the numbering: also where cells are a millionth as high as wide."""
    draws = []
    for comm in (COMM_SELF, COMM_WORLD):
        V = scalar(square(comm, height=lambda y: 1e-6 * y), "CG", 2)[0]
        draws.append((V, GaussianPrior(V, 1.0, 0.3, normalise=False).sample_many(2, seed=1)))
    (alone, first), (V, second) = draws
    columns = owned_columns(geometric_key(alone), V)
    np.testing.assert_allclose(first[:, columns], second, atol=1e-6 * np.abs(first).max())


@pytest.mark.parametrize("name", ["graded", "extruded", "mixed", "symmetric tensors"])
def test_any_order_is_undone(name):
    V = CASES[name](COMM_SELF)[0]
    order = np.random.default_rng(0).permutation(V.dim())
    np.testing.assert_array_equal(order[owned_columns(geometric_key(V)[order], V)], np.arange(V.dim()))


def moved(mesh, node, by):
    mesh.coordinates.dat.data[node] += by
    return mesh


@pytest.mark.parametrize("stored, ours", [
    (lambda: FunctionSpace(graded(COMM_SELF), "CG", 2),
     lambda: FunctionSpace(moved(graded(COMM_SELF), 1200, [1e-9, 0]), "CG", 2)),
    (lambda: FunctionSpace(square(COMM_SELF, 12, 10), "CG", 1), lambda: FunctionSpace(square(COMM_SELF), "CG", 2)),
    (lambda: FunctionSpace(square(COMM_SELF), "CG", 1),
     lambda: FunctionSpace(moved(square(COMM_SELF), slice(None), [0.01, 0]), "CG", 1)),
    (lambda: FunctionSpace(square(COMM_SELF), "CG", 1),
     lambda: FunctionSpace(square(COMM_SELF, height=lambda y: 1.01 * y), "CG", 1)),
    (lambda: FunctionSpace(PeriodicUnitSquareMesh(4, 4, diagonal="left"), "CG", 1),
     lambda: FunctionSpace(PeriodicUnitSquareMesh(4, 4, diagonal="right"), "CG", 1)),
    (lambda: VectorFunctionSpace(square(COMM_SELF), "CG", 1), lambda: FunctionSpace(square(COMM_SELF), "CG", 2)),
], ids=["moved by little", "degree", "shifted", "stretched", "diagonals", "components"])
def test_another_mesh_or_space_is_refused(stored, ours):
    key, V = geometric_key(stored()), ours()
    assert owned_columns(key, V) is None
    assert owned_columns(key[np.random.default_rng(0).permutation(len(key))], V) is None
