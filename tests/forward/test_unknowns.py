"""AdvectionDiffusion: every unknown, blocks of samples, adjoints, ranks."""

import numpy as np
import pytest
from firedrake import (COMM_SELF, COMM_WORLD, ExtrudedMesh, Function, FunctionSpace, IcosahedralSphereMesh,
                       MixedFunctionSpace, SpatialCoordinate, SquareMesh, Submesh, TestFunction, UnitCubeMesh,
                       UnitIntervalMesh, UnitSquareMesh, VectorFunctionSpace, as_tensor, as_vector, assemble, dot, dx,
                       errornorm, exp, grad, norm, sin)
from firedrake.adjoint import (Control, ReducedFunctional, continue_annotation, pause_annotation,
                               set_working_tape, taylor_test)
from scipy import sparse

from channel import CASES, as_function, case, channel, draws, grouped, owned, quadratic
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary, Physics

# Every unknown with a linear equation, one of each kind with a nonlinear one.
PAIRS = [(name, None) for name in CASES] + [(name, quadratic) for name in (
    "source", "exponential flux", "squared dirichlet", "diffusivity")]
each_pair = pytest.mark.parametrize("name, reaction", PAIRS, ids=[
    f"{name}, {'nonlinear' if reaction else 'linear'}" for name, reaction in PAIRS])


# --- unknowns and blocks

@each_pair
def test_solve_many_equals_single_solves(name, reaction):
    problem = case(name, reaction)
    assert problem.linear == (reaction is None)
    assert problem.operator_depends_on_parameter == (name in ("diffusivity", "velocity"))
    ms = draws(problem, 5)
    states = problem.solve_many(ms, block=3)
    single = np.array([owned(problem(as_function(problem.M, m))) for m in ms])
    assert states.shape == single.shape
    assert (np.linalg.norm(states - single, axis=1) <= 1e-8 * np.linalg.norm(single, axis=1)).all()
    assert np.linalg.norm(single[0] - single[1]) > 1e-3 * np.linalg.norm(single[0])   # the unknown acts


@each_pair
def test_sensitivity_is_the_derivative(name, reaction):
    problem = case(name, reaction)
    (m, direction), eps = draws(problem, 2), 1e-4
    rows = sparse.random(3, problem.V.dim(), density=0.3, random_state=3, format="csr")
    sides = [rows @ owned(problem(as_function(problem.M, m + s * eps * direction))) for s in (1, -1)]
    expected = (sides[0] - sides[1]) / (2 * eps)
    there = as_function(problem.M, m)
    for state in (None, problem(there)):
        found = problem.sensitivity(there, rows, state=state) @ direction
        assert abs(found - expected).max() <= 1e-6 * abs(expected).max()
    # Elsewhere it must not return what it has factorised before.
    other = problem.sensitivity(as_function(problem.M, m + direction), rows) @ direction
    constant = problem.linear and name in ("source", "source with offset", "flux", "dirichlet")
    assert (abs(other - expected).max() <= 1e-6 * abs(expected).max()) == constant


@pytest.mark.parametrize("name, reaction", [
    ("flux", None), ("exponential flux", quadratic), ("squared dirichlet", quadratic), ("diffusivity", None),
    ("velocity", None)])
def test_taylor(name, reaction):
    problem = case(name, reaction)
    m, h = (as_function(problem.M, values) for values in draws(problem, 2))
    with set_working_tape():
        continue_annotation()
        u = problem(m)
        J = assemble(u**4 * dx + dot(grad(u), grad(u)) * dx)
        pause_annotation()
        functional = ReducedFunctional(J, Control(m))
        assert abs(functional(h) - J) > 1e-6 * abs(J)   # replays with the new parameter
        assert taylor_test(functional, m, h) > 1.95


@pytest.mark.parametrize("family", ["CG", pytest.param("DG", marks=pytest.mark.slow)])
@pytest.mark.parametrize("others", [("source", ("dirichlet", 1)), ("diffusivity", ("dirichlet", 1))],
                         ids=["affine", "diffusivity"])
def test_several_unknowns(family, others):
    """Flux on a submesh, and two more: the same states as with the values known, and their derivatives."""
    mesh = UnitSquareMesh(6, 6)
    V, on_wall = FunctionSpace(mesh, "CG", 1), FunctionSpace(Submesh(mesh, 1, 3), "CG", 1)
    given = {"source": dict(source=lambda m: m), "diffusivity": dict(diffusivity=lambda m: 0.1 * exp(m))}[others[0]]
    problem = channel(mesh=mesh, unknown=[("flux", 3), *others], M=MixedFunctionSpace([on_wall, V, V]), family=family,
                      outflow=(2,), dirichlet={}, **given)
    x, y = SpatialCoordinate(mesh)
    wave, value = Function(V).interpolate(sin(3 * x * y)), Function(V).interpolate(1 + y)
    known = {"source": dict(source=wave), "diffusivity": dict(diffusivity=0.1 * exp(wave))}[others[0]]
    single = channel(mesh=mesh, M=on_wall, family=family, dirichlet={1: value}, **known)
    flux = Function(on_wall).interpolate(sin(5 * SpatialCoordinate(on_wall.mesh())[0]))
    m = Function(problem.M)
    for part, values in zip(m.subfunctions, (flux, wave, value)):
        part.dat.data[:] = values.dat.data_ro
    assert errornorm(problem(m), single(flux)) < 1e-10
    rng = np.random.default_rng(4)
    direction, rows = rng.standard_normal(owned(m).size), rng.standard_normal((2, problem.V.dim()))
    above, below, state = problem.solve_many(owned(m) + 1e-4 * np.outer([1, -1, 0], direction))
    assert np.linalg.norm(state - owned(problem(m))) <= 1e-9 * np.linalg.norm(state)
    slope = rows @ (above - below) / 2e-4
    assert abs(problem.sensitivity(m, rows) @ direction - slope).max() <= 1e-6 * abs(slope).max()
    with set_working_tape():
        continue_annotation()
        J = assemble(problem(m)**2 * dx)
        pause_annotation()
        assert taylor_test(ReducedFunctional(J, Control(m)), m, as_function(problem.M, direction)) > 1.9


@pytest.mark.parametrize("name", ["flux", "dirichlet", "source"])
def test_many_samples_of_few_coefficients_add_up_responses(name):
    mesh = UnitSquareMesh(5, 5)
    problem = channel(mesh=mesh, unknown=CASES[name]["unknown"], M=FunctionSpace(mesh, "CG", 1))
    ms = draws(problem, 40)
    few, many = problem.solve_many(ms[:2]), problem.solve_many(ms, block=7)
    assert "_response" in vars(problem)
    assert np.linalg.norm(many[:2] - few) <= 1e-12 * np.linalg.norm(few)
    assert np.linalg.norm(many[39] - owned(problem(as_function(problem.M, ms[39])))) <= 1e-11 * np.linalg.norm(many[39])
    ms[11, 3] = np.nan
    with pytest.raises(SolveError, match="sample 11"):
        problem.solve_many(ms)


def test_tensor_diffusivity_from_a_vector_parameter():
    """The parameter may have any shape where a callable makes the coefficient."""
    mesh = UnitSquareMesh(6, 6)
    M = VectorFunctionSpace(mesh, "CG", 1, dim=3)

    def tensor(m):
        return as_tensor([[0.1 * exp(m[0]), 0.02 * m[1]], [0.02 * m[1], 0.1 * exp(m[2])]])

    problem = channel(mesh=mesh, unknown="diffusivity", diffusivity=tensor, M=M)
    m, direction = draws(problem, 2)
    rows = np.random.default_rng(2).standard_normal((2, problem.V.dim()))
    above, below = problem.solve_many(np.array([m + 1e-4 * direction, m - 1e-4 * direction]))
    slope = rows @ (above - below) / 2e-4
    assert abs(problem.sensitivity(as_function(M, m), rows) @ direction - slope).max() <= 1e-6 * abs(slope).max()


def test_functions_and_arrays_are_the_same_samples():
    problem = channel()
    ms = draws(problem, 3)
    functions = [as_function(problem.M, m) for m in ms]
    assert np.array_equal(problem.solve_many(functions), problem.solve_many(ms))
    assert problem.solve_many([]).shape == (0, problem.V.dim())


def test_flux_on_submesh_equals_flux_on_mesh():
    mesh = UnitSquareMesh(8, 8)
    M = FunctionSpace(Submesh(mesh, 1, 3), "CG", 1)
    on_mesh, on_boundary = (channel(mesh=mesh, M=space, reaction=quadratic) for space in (None, M))
    states = [problem(Function(problem.M).interpolate(sin(5 * SpatialCoordinate(problem.M.mesh())[0])))
              for problem in (on_mesh, on_boundary)]
    assert errornorm(*states) < 1e-10
    ms = draws(on_boundary, 3)
    single = owned(on_boundary(as_function(M, ms[2])))
    assert np.linalg.norm(on_boundary.solve_many(ms)[2] - single) <= 1e-8 * np.linalg.norm(single)
    rows = np.eye(2, on_boundary.V.dim(), 40)
    assert on_boundary.sensitivity(as_function(M, ms[0]), rows).shape == (2, M.dim())


def meshes():
    """Meshes, parameter spaces (None: the state's) and unknowns that are less common."""
    extruded, interval = ExtrudedMesh(UnitIntervalMesh(6), 6), UnitIntervalMesh(20)
    quadrilaterals, triangles = UnitSquareMesh(6, 6, quadrilateral=True), UnitSquareMesh(6, 6)
    cube = UnitCubeMesh(3, 3, 3)
    sphere = IcosahedralSphereMesh(1.0, 1)
    sphere.init_cell_orientations(SpatialCoordinate(sphere))
    left = {"dirichlet": {1: 0.3}}
    return {"extruded, flux through the top": (extruded, None, ("flux", "top"), left),
            "extruded, value at the top": (extruded, None, ("dirichlet", "top"), left),
            "interval": (interval, None, ("flux", 2), left),
            "submesh of quadrilaterals": (quadrilaterals, Submesh(quadrilaterals, 1, 3), ("flux", 3), left),
            "submesh in 3D": (cube, Submesh(cube, 2, 5), ("flux", 5), left),
            "two markers": (triangles, None, ("flux", [2, 3]), left),
            "whole boundary": (triangles, None, ("dirichlet", "on_boundary"), {}),
            "sphere": (sphere, None, "source", {"velocity": None})}


@pytest.mark.parametrize("parameters", ["direct", "iterative"])
@pytest.mark.parametrize("name", [
    "interval",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (   # each compiles a dozen kernels of its own
        "extruded, flux through the top", "extruded, value at the top", "submesh of quadrilaterals",
        "submesh in 3D", "two markers", "whole boundary", "sphere"))])
def test_less_common_meshes(name, parameters):
    mesh, where, unknown, options = meshes()[name]
    V = FunctionSpace(mesh, "CG", 1)
    velocity = (1.0, 0.2, 0.1)[:mesh.geometric_dimension]
    problem = AdvectionDiffusion(V, V if where is None else FunctionSpace(where, "CG", 1), unknown,
                                 **grouped(**dict(velocity=velocity, diffusivity=0.1, solver_parameters=parameters,
                                                  reaction=lambda u: u + quadratic(u)) | options))
    m, direction = draws(problem, 2)
    above, below, state = problem.solve_many(np.array([m + 1e-4 * direction, m - 1e-4 * direction, m]))
    assert np.linalg.norm(state - owned(problem(as_function(problem.M, m)))) <= 1e-8 * np.linalg.norm(state)
    row = np.ones((1, V.dim()))
    slope = row @ (above - below) / 2e-4
    assert abs(problem.sensitivity(as_function(problem.M, m), row) @ direction - slope) <= 1e-5 * abs(slope)


@pytest.mark.parametrize("unknown", ["source", ("dirichlet", 1), ("flux", 3)])
def test_parameter_of_another_degree(unknown):
    mesh = UnitSquareMesh(6, 6)
    problem = channel(mesh=mesh, unknown=unknown, M=FunctionSpace(mesh, "CG", 2), reaction=quadratic)
    same = channel(mesh=mesh, unknown=unknown, reaction=quadratic)
    x = SpatialCoordinate(mesh)
    states = [p.solve_many([Function(p.M).interpolate(x[0] - 2 * x[1])])[0] for p in (problem, same)]
    assert abs(states[0] - states[1]).max() < 1e-9


def test_constant_parameter():
    mesh = UnitSquareMesh(6, 6)
    problem = channel(mesh=mesh, unknown="source", M=FunctionSpace(mesh, "R", 0), reaction=quadratic)
    m = Function(problem.M).assign(0.7)
    state = owned(problem(m))
    assert abs(problem.solve_many([m, m])[1] - state).max() < 1e-8 * abs(state).max()
    slope = (owned(problem(Function(problem.M).assign(0.7 + 1e-5))) - state)[30] / 1e-5
    assert abs(problem.sensitivity(m, np.eye(1, problem.V.dim(), 30))[0, 0] - slope) < 1e-4 * abs(slope)


def test_members_that_the_chord_loses_go_to_newton():
    # The slope of the reaction grows a hundredfold between the reference and the samples.
    problem = channel(reaction=lambda u: u + u**5, dirichlet={1: 0}, source=0)
    ms = np.abs(draws(problem, 4, scale=20.0))
    states = problem.solve_many(ms)
    for m, state in zip(ms, states):
        single = owned(problem(as_function(problem.M, m)))
        assert np.linalg.norm(state - single) <= 1e-8 * np.linalg.norm(single)


def test_reference_moves_start_and_keeps_results():
    problem = channel(flux={3: exp}, reaction=quadratic)
    ms = draws(problem, 3)
    before = problem.solve_many(ms)
    problem.linearise_at(as_function(problem.M, ms[0]))
    assert np.linalg.norm(problem.solve_many(ms) - before) <= 1e-8 * np.linalg.norm(before)


def test_blocks_do_not_change_what_single_solves_find():
    # Three solutions are possible; the far block lies on another branch.
    mesh = SquareMesh(8, 8, 5.0)
    V = FunctionSpace(mesh, "CG", 1)
    problem = AdvectionDiffusion(V, V, "source", Physics(diffusivity=0.5, reaction=lambda u: u**3 - 0.6 * u),
                                 Boundary(dirichlet={"on_boundary": 0}))
    m = Function(V).assign(0.01)
    before = owned(problem(m))
    problem.solve_many([Function(V).assign(value) for value in (3.0, 3.1)])
    assert np.array_equal(owned(problem(m)), before)


def test_result_is_new_and_has_no_memory():
    problem = channel(reaction=quadratic)
    a, b = (as_function(problem.M, m) for m in draws(problem, 2))
    first = problem(a)
    kept = owned(first)
    problem(b)
    assert np.array_equal(owned(first), kept)
    assert np.array_equal(owned(problem(a)), kept)
    assert first is not problem.u


def test_options_reach_petsc():
    problem = channel(reaction=quadratic, solver_parameters={"ksp_type": "gmres", "pc_type": "ilu",
                                                             "ksp_rtol": 1e-12}, options_prefix="mine_")
    direct = channel(reaction=quadratic)
    m = draws(problem, 2)
    assert problem._stepper.solver.snes.ksp.getType() == "gmres"
    assert problem._stepper.solver.snes.getOptionsPrefix() == "mine_"
    assert np.allclose(problem.solve_many(m), direct.solve_many(m), rtol=1e-8)


# --- parallel

def summary(name, reaction, comm):
    """Norms of states and a directional derivative of their mean: the same however the mesh is spread."""
    options = CASES[name] | {"reaction": reaction, "mesh": UnitSquareMesh(8, 8, comm=comm)}
    if name == "velocity":
        options["M"] = VectorFunctionSpace(options["mesh"], "CG", 1)
    elif name == "flux":
        options["M"] = FunctionSpace(Submesh(options["mesh"], 1, 3), "CG", 1)
    problem = channel(**options)
    x = SpatialCoordinate(problem.M.mesh())
    ms = [Function(problem.M) for _ in range(3)]
    for k, m in enumerate(ms):
        wave = sin((k + 2) * x[0] + x[1])
        m.interpolate(as_vector([wave, 0.3 * wave]) if problem.M.value_shape else wave)
    states = [as_function(problem.V, row) for row in problem.solve_many(ms, block=2)]
    for m, state in zip(ms, states):
        assert errornorm(problem(m), state) <= 1e-9 * norm(state)
    row = owned(assemble(TestFunction(problem.V) * dx))
    change = problem.sensitivity(ms[0], row[None]) @ owned(ms[1])
    return np.array([norm(u) for u in states] + [comm.allreduce(change[0])])


@pytest.mark.parallel(2)
def test_two_ranks():
    """Two ranks find what one finds, and an error on one rank is an error on both (one mpiexec for all)."""
    assert COMM_WORLD.size == 2
    for name, reaction in [("flux", None), ("flux", quadratic), ("exponential flux", quadratic),
                           ("dirichlet", None), ("squared dirichlet", quadratic), ("source", quadratic),
                           ("velocity", None), ("diffusivity", quadratic)]:
        spread, alone = (summary(name, reaction, comm) for comm in (COMM_WORLD, COMM_SELF))
        assert np.allclose(spread, alone, rtol=1e-9, atol=0), name
    problem = channel()
    ms = np.zeros((2, owned(Function(problem.M)).size + COMM_WORLD.rank))
    with pytest.raises(InputError, match="owned coefficients"):
        problem.solve_many(ms)
    with pytest.raises(InputError, match="owned coefficients"):
        problem.sensitivity(Function(problem.M), ms)
    known = Function(FunctionSpace(problem.V.mesh(), "CG", 1))
    if COMM_WORLD.rank == 1:
        known.dat.data_wo[:] = np.nan
    with pytest.raises(InputError, match="not finite everywhere"):
        channel(mesh=problem.V.mesh(), source=known)
