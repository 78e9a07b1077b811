"""Observation operators against the analytic values of polynomials, in serial and in parallel."""

import numpy as np
import pytest
from firedrake import (
    Constant, CubedSphereMesh, ExtrudedMesh, FacetNormal, Function, FunctionSpace, IcosahedralSphereMesh,
    MixedFunctionSpace, SpatialCoordinate, Submesh, UnitCubeMesh, UnitIntervalMesh, UnitSquareMesh,
    VectorFunctionSpace, as_vector, assemble, conditional, cross, div, dot, ds, dx, grad, lt, split, sqrt,
)
from mpi4py import MPI

from fem_diffusion.errors import InputError
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary
from fem_diffusion.observation.instruments import line_averages, random_points
from fem_diffusion.observation.linear import functionals, point_sensors
from fem_diffusion.prior.gaussian import GaussianPrior

POINTS = np.random.default_rng(1).random((9, 3))


def quadratic(x):
    """A polynomial that CG2 holds exactly; x indexes coordinates, as UFL or as an array."""
    return 1 + 2 * x[0] - 3 * x[1] * x[1] + x[0] * x[1]


@pytest.fixture(scope="module")
def mesh():
    return UnitSquareMesh(5, 5)


@pytest.fixture(scope="module")
def U(mesh):
    return FunctionSpace(mesh, "CG", 2)


@pytest.fixture(scope="module")
def state(U):
    return Function(U).interpolate(quadratic(SpatialCoordinate(U.mesh())))


@pytest.mark.parallel([1, 2, 3])
def test_points_analytic_in_the_users_order_and_none_outside():
    U = FunctionSpace(UnitSquareMesh(5, 5), "CG", 2)
    u = Function(U).interpolate(quadratic(SpatialCoordinate(U.mesh())))
    corners = np.array([[0, 0], [1, 1], [0.2, 0.4], [0.2, 0.4]])  # a vertex, twice, and the boundary
    points = np.concatenate([POINTS[:, :2], corners])
    sensors = point_sensors(U, points)
    assert sensors.rows.shape == (13, U.dof_dset.layout_vec.getLocalSize())
    np.testing.assert_allclose(sensors(u), quadratic(points.T), rtol=0, atol=1e-13)
    values = U.comm.allgather(sensors(u))
    assert all(np.array_equal(values[0], v) for v in values)
    np.testing.assert_array_equal(sensors.points, points)
    tolerance = U.mesh().tolerance
    with pytest.raises(InputError, match=r"1 of 3 sensors .*sensor 1 at \(1.001, 0.5\)"):
        point_sensors(U, [[0.1, 0.1], [1.001, 0.5], [0.9, 0.9]])
    assert U.mesh().tolerance == tolerance


@pytest.mark.parallel([1, 3])
def test_vector_points_and_functionals_in_parallel():
    mesh = UnitSquareMesh(5, 5)
    x = SpatialCoordinate(mesh)
    U = VectorFunctionSpace(mesh, "CG", 2)
    u = Function(U).interpolate(as_vector([quadratic(x), x[0] - 2 * x[1]]))
    points = POINTS[:, :2]
    flux = functionals(U, [lambda w: dot(w, FacetNormal(mesh)) * ds(2), lambda w: div(w) * dx])
    sensors = point_sensors(U, points) + flux
    expected = np.stack([quadratic(points.T), points[:, 0] - 2 * points[:, 1]], axis=1).ravel()
    expected = np.append(expected, [1 + 2 - 1 + 0.5, 2 + 0.5 - 2])
    np.testing.assert_allclose(sensors(u), expected, atol=1e-13)
    assert len(sensors) == 20 and sensors.names[1].endswith("[1]")


@pytest.mark.parametrize("mesh, dim", [(UnitIntervalMesh, 1), (UnitCubeMesh, 3)])
def test_points_in_one_and_three_dimensions(mesh, dim):
    U = FunctionSpace(mesh(*[3] * dim), "CG", 1)
    x = SpatialCoordinate(U.mesh())
    u = Function(U).interpolate(2 - sum((i + 1) * x[i] for i in range(dim)))
    points = POINTS[:, :dim]
    np.testing.assert_allclose(point_sensors(U, points)(u), 2 - points @ np.arange(1, dim + 1), atol=1e-13)


def test_points_on_a_boundary_submesh(mesh):
    sub = Submesh(mesh, 1, 2)
    U = FunctionSpace(sub, "CG", 2)
    u = Function(U).interpolate(SpatialCoordinate(sub)[1]**2)
    points = np.array([[1, 0.9], [1, 0.33]])
    np.testing.assert_allclose(point_sensors(U, points)(u), points[:, 1]**2, atol=1e-12)


def test_functionals_analytic(mesh, U, state):
    n, x = FacetNormal(mesh), SpatialCoordinate(mesh)
    kappa = Constant(3.0)
    patch = conditional(lt(x[0], 0.4), 1 / 0.4, 0)
    observed = functionals(U, [lambda u: u * ds(2), lambda u: -kappa * dot(grad(u), n) * ds(4),
                               lambda u: patch * u * dx(degree=4)], names=list("abc"))
    right = 1 + 2 - 1 + 0.5             # integral of 3 - 3 y² + y
    top = -3 * (-6 + 0.5)               # -κ ∂u/∂y at y = 1 is -κ (-6 + x)
    average = 1 + 2 * 0.2 - 1 + 0.2 * 0.5
    np.testing.assert_allclose(observed(state), [right, top, average], atol=1e-12)
    assert observed.names == ("a", "b", "c") and np.isnan(observed.points).all()


def test_batch_stack_and_mixed_space(mesh, U, state):
    sensors = point_sensors(U, POINTS[:2, :2]) + functionals(U, [lambda u: u * dx])
    coefficients = np.stack([state.dat.data_ro, 2 * state.dat.data_ro])
    np.testing.assert_allclose(sensors.apply(coefficients), np.outer([1, 2], sensors(state)), atol=1e-13)
    W = MixedFunctionSpace([U, FunctionSpace(mesh, "DG", 0)])
    w = Function(W)
    w.sub(0).assign(1.0)
    w.sub(1).assign(5.0)
    observed = functionals(W, [lambda w: split(w)[1] * dx, lambda w: split(w)[0] * ds(1)])
    np.testing.assert_allclose(observed(w), [5, 1])


def test_components_of_a_mixed_state_and_some_of_the_rows(mesh, U):
    x = SpatialCoordinate(mesh)
    W = MixedFunctionSpace([VectorFunctionSpace(mesh, "CG", 2), U])
    w = Function(W)
    w.sub(0).interpolate(as_vector([quadratic(x), x[0] - 2 * x[1]]))
    w.sub(1).interpolate(quadratic(x) + 1)
    points = POINTS[:3, :2]
    velocity, pressure = (point_sensors(W, points, component=i) for i in (0, 1))
    np.testing.assert_allclose(pressure(w), quadratic(points.T) + 1, atol=1e-13)
    np.testing.assert_allclose(velocity[1::2](w), points[:, 0] - 2 * points[:, 1], atol=1e-13)
    both = velocity + pressure
    failed = np.isin(np.arange(9), [1, 6])
    for rows, kept in ((4, [4]), (-1, [8]), ([7, 0], [7, 0]), (~failed, [0, 2, 3, 4, 5, 7, 8]), (np.s_[6:], [6, 7, 8])):
        some = both[rows]
        np.testing.assert_allclose(some(w), both(w)[kept])
        assert some.names == tuple(both.names[i] for i in kept) and len(some.points) == len(some) == len(kept)
    for rows, words in ((9, "no such row"), ([True, False], "boolean"), (np.s_[9:], "keep at least one"),
                        ("abc", "whole numbers"), ([[0], [1]], "one dimension"), ([], "keep at least one")):
        with pytest.raises(InputError, match=words):
            both[rows]
    for component, words in ((None, "component=0 to 1"), (2, "components 0 to 1"), (True, "components 0 to 1")):
        with pytest.raises(InputError, match=words):
            point_sensors(W, points, component=component)


@pytest.mark.parametrize("points, words", [
    ([[0.1, np.nan], [0.5, 0.5]], r"points holds values in rows \[0\] that are not finite"),
    ([[0.1, 0.2, 0.3]], r"shape \(1, 3\)"),
    ([0.1, 0.2], r"shape \(2,\)"),
    (np.zeros((0, 2)), r"shape \(0, 2\)"),
])
def test_bad_points(U, points, words):
    with pytest.raises(InputError, match=words):
        point_sensors(U, points)


@pytest.mark.parametrize("form", [
    lambda u: u**2 * ds(2), lambda u: u * ds(2) + Constant(1.0) * ds(2), lambda u: Constant(1.0) * dx,
    lambda u: conditional(lt(u, 0), u, 0) * dx, lambda u: u, lambda u: 3.0, lambda u: abs(u) * dx, "u * ds",
])
def test_functional_that_is_not_linear(mesh, U, form):
    with pytest.raises(InputError, match="functional 1"):
        functionals(U, [lambda u: u * dx, form])


def test_other_input_errors(mesh, U, state):
    other = FunctionSpace(mesh, "CG", 1)
    sensors = point_sensors(U, [[0.5, 0.5]])
    for action, words in [
        (lambda: sensors + point_sensors(other, [[0.5, 0.5]]), "cannot stack"),
        (lambda: sensors(Function(other)), "expected a Function in"),
        (lambda: sensors(3.0), "float"),
        (lambda: sensors((state, state)), "one mixed Function"),
        (lambda: sensors.apply(np.zeros(3)), "shape"),
        (lambda: point_sensors(U, [[0.5, 0.5]], names=["a", "b"]), "2 names for 1"),
        (lambda: point_sensors(MixedFunctionSpace([U, other]), [[0.5, 0.5]]), "mixed"),
        (lambda: functionals(U, []), "no forms"),
    ]:
        with pytest.raises(InputError, match=words):
            action()


SPHERES = {"triangles": lambda: IcosahedralSphereMesh(1.0, 2), "quadrilaterals": lambda: CubedSphereMesh(1.0, 2)}


@pytest.mark.parametrize("cells, family, degree", [
    ("triangles", "RT", 1), ("triangles", "BDM", 1), ("triangles", "N1curl", 1), ("quadrilaterals", "RTCE", 1)])
def test_a_wind_on_the_sphere_is_read_with_its_own_sign(cells, family, degree):
    """Interpolants of a known tangential field, read at every 7th cell, are as close to it as elsewhere."""
    mesh = SPHERES[cells]()
    x = SpatialCoordinate(mesh)
    mesh.init_cell_orientations(x)
    axis, V = np.array([0.3, 0.2, 1.0]), FunctionSpace(mesh, family, degree)
    wind = Function(V).interpolate(cross(Constant(axis), x))
    places = Function(VectorFunctionSpace(mesh, "DG" if cells == "triangles" else "DQ", 0)).interpolate(x)
    places = places.dat.data_ro[::7]
    sensors = point_sensors(V, places, tolerance=1e-3)
    np.testing.assert_allclose(sensors(wind).reshape(-1, 3), np.cross(axis, places), atol=0.03)
    # Away from the centres, against a discontinuous copy in which every value is its own cell's.
    off = places + 0.02 * np.cross(places, [1.0, 0.0, 0.0])
    D = VectorFunctionSpace(mesh, "DG" if cells == "triangles" else "DQ", degree)
    np.testing.assert_allclose(point_sensors(V, off, tolerance=1e-2)(wind),
                               point_sensors(D, off, tolerance=1e-2)(Function(D).interpolate(wind)), atol=1e-2)


@pytest.mark.parallel(2)
def test_a_wind_on_the_sphere_on_two_ranks():
    mesh = SPHERES["triangles"]()
    x = SpatialCoordinate(mesh)
    mesh.init_cell_orientations(x)
    axis, V = np.array([0.3, 0.2, 1.0]), FunctionSpace(mesh, "RT", 1)
    places = Function(VectorFunctionSpace(mesh, "DG", 0)).interpolate(x).dat.data_ro
    places = np.concatenate(mesh.comm.allgather(places))[::7]
    values = point_sensors(V, places, tolerance=1e-3)(Function(V).interpolate(cross(Constant(axis), x)))
    np.testing.assert_allclose(values.reshape(-1, 3), np.cross(axis, places), atol=0.03)


def test_what_firedrake_cannot_read_is_refused():
    sphere = SPHERES["quadrilaterals"]()
    sphere.init_cell_orientations(SpatialCoordinate(sphere))
    with pytest.warns(FutureWarning, match="Variable layer"):
        steps = ExtrudedMesh(UnitIntervalMesh(4), layers=[[0, 2], [0, 3], [1, 2], [0, 3]], layer_height=0.25)
    square = UnitSquareMesh(2, 2)
    numbers, many = FunctionSpace(square, "R", 0), VectorFunctionSpace(square, "R", 0)
    # Which points Firedrake gets wrong depends on their order.
    places = Function(VectorFunctionSpace(sphere, "DQ", 0)).interpolate(SpatialCoordinate(sphere)).dat.data_ro[::7]
    W, x = FunctionSpace(steps, "CG", 1), SpatialCoordinate(steps)
    for action, words in [
        (lambda: point_sensors(FunctionSpace(sphere, "RTCF", 1), places, tolerance=1e-3), "VectorFunctionSpace"),
        (lambda: point_sensors(W, [[0.1, 0.1]]), "variable layers.*Submesh"),
        (lambda: line_averages(W, [[0.1, 0.1]], [[0.2, 0.2]]), "variable layers.*Submesh"),
        (lambda: random_points(steps, 2, seed=1), "variable layers.*Submesh"),
        (lambda: GaussianPrior(W, 1.0, 0.3).sample(1), "variable layers.*Submesh"),
        (lambda: AdvectionDiffusion(W, W, "source", bcs=Boundary(dirichlet={"on_boundary": 0})),
         "variable layers.*Submesh"),
        (lambda: point_sensors(numbers, [[0.5, 0.5]]), "use functionals"),
        (lambda: functionals(many, [lambda u: u[0] * dx]), "for each number"),
        (lambda: functionals(W, [lambda u: sqrt(x[0] - 2) * u * dx]), "functional 0 has weights"),
    ]:
        with pytest.raises(InputError, match=words):
            action()
    assert functionals(W, [lambda u: u * dx])(Function(W).assign(1.0))[0] == pytest.approx(10 / 16)


def test_sum_of_observations(U, state):
    places = POINTS[:3, :2]
    total = sum(point_sensors(U, places[[i]], names=[f"sensor {i}"]) for i in range(3))
    np.testing.assert_allclose(total(state), point_sensors(U, places)(state))
    assert total.names == ("sensor 0", "sensor 1", "sensor 2")
    with pytest.raises(TypeError):
        1 + total


def test_rows_agree_with_an_assembled_form(mesh, U, state):
    x = SpatialCoordinate(mesh)
    observed = functionals(U, [lambda u: x[0] * u.dx(1) * dx])
    assert observed(state)[0] == pytest.approx(assemble(x[0] * state.dx(1) * dx), abs=1e-13)


@pytest.mark.parametrize("family", ["BDMCF", "BDMCE", "RTCF", "RTCE"])
def test_elements_that_understate_their_degree_are_read(family):
    """Firedrake says degree 1 of BDMCF, whose values are quadratic: an exact copy has more."""
    mesh = UnitSquareMesh(4, 4, quadrilateral=True, comm=MPI.COMM_SELF)
    U, D = FunctionSpace(mesh, family, 1), VectorFunctionSpace(mesh, "DQ", 3)
    points = np.random.default_rng(1).random((20, 2))
    u = Function(U)
    u.dat.data[:] = np.random.default_rng(0).standard_normal(U.dim())
    exact = point_sensors(D, points)(Function(D).interpolate(u))
    np.testing.assert_allclose(point_sensors(U, points)(u), exact, atol=1e-12)
