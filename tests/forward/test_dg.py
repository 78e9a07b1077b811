"""AdvectionDiffusion with a discontinuous state: orders, bounds, every unknown, ranks, errors."""

import numpy as np
import pytest
from firedrake import (COMM_SELF, COMM_WORLD, Constant, Function, FunctionSpace, SpatialCoordinate, TestFunction,
                       UnitSquareMesh, as_vector, assemble, dx, errornorm, norm, sin)

from channel import CASES, as_function, case, channel, draws, manufactured_error, owned, quadratic
from fem_diffusion import AdvectionDiffusion, Boundary, Physics
from fem_diffusion.errors import InputError

slow = pytest.mark.slow


# --- accuracy

def observed_order(meshes, *args, **kwargs):
    coarse, fine = (manufactured_error(mesh, *args, **kwargs) for mesh in meshes)
    return np.log2(coarse / fine)


@pytest.mark.parametrize("degree", [1, pytest.param(2, marks=slow), pytest.param(3, marks=slow)])
@pytest.mark.parametrize("kappa", [1.0, 1e-4])
def test_order(degree, kappa):
    meshes = [UnitSquareMesh(n, n) for n in (8, 16)]
    assert observed_order(meshes, degree, kappa, family="DG") >= degree + 0.85


@slow
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_order_on_quadrilaterals(degree):
    meshes = [UnitSquareMesh(n, n, quadrilateral=True) for n in (8, 16)]
    assert observed_order(meshes, degree, 1e-2, family="DQ") >= degree + 0.85


@slow
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_order_with_tensor_diffusivity(scale):
    meshes = [UnitSquareMesh(n, n) for n in (16, 32)]
    assert observed_order(meshes, 1, scale * np.array([[1.0, 0.6], [0.6, 0.5]]), family="DG") >= 1.85


@slow
@pytest.mark.parametrize("reaction", [quadratic, lambda u: 2 * u], ids=["quadratic", "linear"])
def test_order_with_reaction(reaction):
    meshes = [UnitSquareMesh(n, n) for n in (8, 16)]
    assert observed_order(meshes, 1, 1e-2, reaction, family="DG") >= 1.85


def test_upwind_keeps_bounds():
    """Degree 0 without noteworthy diffusion: states stay between the values that flow in, for a swirling flow."""
    mesh = UnitSquareMesh(10, 10, quadrilateral=True)
    V, (x, y) = FunctionSpace(mesh, "DQ", 0), SpatialCoordinate(mesh)
    problem = AdvectionDiffusion(V, FunctionSpace(mesh, "CG", 1), ("dirichlet", "on_boundary"),
                                 Physics(diffusivity=1e-12, velocity=as_vector([1 + y, x - 0.5])))
    state = owned(problem(Function(problem.M).interpolate(1 + sin(9 * y))))
    assert 0 < state.min() < 0.3 and 1.7 < state.max() < 2.0


@slow
def test_it_converges_to_the_continuous_state():
    gap = []
    for n in (8, 16):
        mesh = UnitSquareMesh(n, n)
        y = SpatialCoordinate(mesh)[1]
        problems = [channel(mesh=mesh, family=family, unknown=("dirichlet", 1), reaction=quadratic)
                    for family in ("CG", "DG")]
        gap.append(errornorm(*(problem(Function(problem.M).interpolate(1 + y)) for problem in problems)))
    assert gap[1] < 0.45 * gap[0] < 0.02


def test_degree_0_on_triangles_warns_of_its_diffusion():
    with pytest.warns(UserWarning, match="does not converge on triangles"):
        channel(n=3, family="DG", degree=0)
    channel(mesh=UnitSquareMesh(3, 3, quadrilateral=True), family="DG", degree=0)


# --- unknowns and blocks

@pytest.mark.parametrize("name, reaction", [
    ("dirichlet", None), *(pytest.param(name, r, marks=slow) for name in CASES for r in (None, quadratic)
                           if (name, r) != ("dirichlet", None))])
def test_blocks_and_derivatives(name, reaction):
    """A block equals single solves; `sensitivity` is the derivative by differences; Dirichlet needs no lift."""
    problem = case(name, reaction, family="DG")
    assert problem.bcs == [] and problem.linear == (reaction is None)
    assert problem.operator_depends_on_parameter == (name in ("diffusivity", "velocity"))
    m, direction, other = draws(problem, 3)
    states = problem.solve_many(np.array([m, other, m + 1e-4 * direction, m - 1e-4 * direction]), block=3)
    single = owned(problem(as_function(problem.M, m)))
    assert np.linalg.norm(states[0] - single) <= 1e-8 * np.linalg.norm(single)
    assert np.linalg.norm(states[1] - single) > 1e-3 * np.linalg.norm(single)   # the unknown acts
    rows = np.random.default_rng(3).standard_normal((2, problem.V.dim()))
    slope = rows @ (states[2] - states[3]) / 2e-4
    found = problem.sensitivity(as_function(problem.M, m), rows) @ direction
    assert abs(found - slope).max() <= 1e-5 * abs(slope).max()


# --- parallel

def summary(name, comm):
    """Norms of states and a derivative of their mean: the same however the mesh is spread."""
    mesh = UnitSquareMesh(6, 6, comm=comm)
    problem = channel(mesh=mesh, family="DG", **CASES[name])
    x = SpatialCoordinate(mesh)
    ms = [Function(problem.M).interpolate(1 + sin((k + 2) * x[0] + x[1])) for k in range(3)]
    states = [as_function(problem.V, row) for row in problem.solve_many(ms, block=2)]
    assert errornorm(problem(ms[2]), states[2]) <= 1e-9
    row = owned(assemble(TestFunction(problem.V) * dx))
    change = problem.sensitivity(ms[0], row[None]) @ owned(ms[1])
    return np.array([norm(u) for u in states] + [comm.allreduce(change[0])])


@pytest.mark.parallel(2)
def test_ranks():
    """Two ranks find what one finds (not slow, because a child would deselect what is)."""
    spread, alone = (summary("dirichlet", comm) for comm in (COMM_WORLD, COMM_SELF))
    assert np.allclose(spread, alone, rtol=1e-9, atol=0)


# --- errors

@pytest.mark.parametrize("change, words", [
    (dict(supg=True), "where V is continuous"),
    (dict(dirichlet={}, robin={}), "only up to a constant"),
    (dict(dirichlet={1: "none"}), "must be a number"),
    (dict(unknown=("dirichlet", 1), dirichlet={1: lambda m: Constant(1.0)}), "no use of the parameter"),
    (dict(unknown=("dirichlet", 9)), "names marker 9"),
])
def test_wrong_arguments(change, words):
    with pytest.raises(InputError, match=words):
        channel(n=3, family="DG", **change)


@pytest.mark.parametrize("family, degree", [("CR", 1), ("Real", 0)])
def test_wrong_spaces(family, degree):
    mesh = UnitSquareMesh(3, 3)
    V = FunctionSpace(mesh, family, degree)
    with pytest.raises(InputError, match="continuous or discontinuous"):
        AdvectionDiffusion(V, V, "source", bcs=Boundary(dirichlet={1: 0}))
