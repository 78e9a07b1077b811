"""TransientAdvectionDiffusion: orders in time and space, every unknown, blocks, adjoints, ranks, errors."""

import numpy as np
import pytest
from firedrake import (COMM_SELF, COMM_WORLD, Constant, FacetNormal, Function, FunctionSpace, IntervalMesh,
                       MixedFunctionSpace, SpatialCoordinate, Submesh, TestFunction, UnitIntervalMesh, UnitSquareMesh,
                       VectorFunctionSpace, as_vector, assemble, cos, div, dot, dx, errornorm, exp, grad, inner, norm,
                       sin)
from firedrake.adjoint import Control, ReducedFunctional, continue_annotation, pause_annotation, set_working_tape, \
    taylor_test
from pyadjoint import get_working_tape
from ufl import diff, variable

from channel import as_function, grouped, owned, quadratic
from fem_diffusion import (
    AdvectionDiffusion, Boundary, GaussianPrior, InverseProblem, Physics, TimeSteps, TransientAdvectionDiffusion,
    point_sensors, simulate,
)
from fem_diffusion.errors import InputError, SolveError

NODES = [0.0, 0.3, 0.5]   # of parameters in space and time


def channel(n=6, unknown="initial", M=None, family="CG", mesh=None, **change):
    """A small problem with all kinds of conditions and a source that depends on time."""
    mesh = mesh or UnitSquareMesh(n, n)
    V, t = FunctionSpace(mesh, family, 1), Constant(0.0)
    x, y = SpatialCoordinate(mesh)
    given = dict(times=[0.25, 0.5], time_step=0.125, t=t, velocity=as_vector([1 + y, 0.2 - 0.1 * x]),
                 diffusivity=0.1 + 0.05 * x, initial=1 + x * y, source=sin(3 * x + t),
                 dirichlet={1: 0.5 + y}, robin={4: (1.0, 0.2)}, outflow=(2,))
    kind = unknown if isinstance(unknown, str) else unknown[0]
    given.pop(kind if kind in given and kind != "dirichlet" else "", None)
    if kind == "dirichlet":
        given["dirichlet"] = {2: 0.3 + t * y}
        del given["outflow"]
    return TransientAdvectionDiffusion(V, M or V, unknown, **grouped(**given | change))


def in_time(mesh):
    """Parameter space of functions of time alone."""
    return FunctionSpace(IntervalMesh(5, 0.5, comm=mesh.comm), "CG", 1)


def case(name, comm=COMM_WORLD, **change):
    """One of the unknowns below."""
    mesh = UnitSquareMesh(6, 6, comm=comm)
    x, y = SpatialCoordinate(mesh)
    shape = exp(-10 * (x - 0.4)**2 - 10 * (y - 0.5)**2)
    wall = Submesh(mesh, 1, 3)
    t = Constant(0.0)
    options = {
        "initial": dict(unknown="initial"),
        "exponential initial, reaction": dict(unknown="initial", initial=exp, reaction=quadratic),
        "source": dict(unknown="source"),
        "strength": dict(unknown=("source", shape), M=in_time(mesh)),
        "exponential strength": dict(unknown="source", source=lambda s: exp(s) * shape, M=in_time(mesh)),
        "flux": dict(unknown=("flux", 3), M=FunctionSpace(wall, "CG", 1)),
        "flux times sin(t)": dict(unknown=("flux", 3), flux={3: lambda m: sin(t) * m}, t=t, source=1.0),
        "flux in space and time": dict(unknown=("flux", 3), M=VectorFunctionSpace(wall, "CG", 1, dim=3),
                                       parameter_times=NODES),
        "squared flux in space and time, reaction": dict(
            unknown=("flux", 3), M=VectorFunctionSpace(mesh, "CG", 1, dim=3), parameter_times=NODES,
            flux={3: lambda m: m**2}, reaction=quadratic),
        "dirichlet": dict(unknown=("dirichlet", 1)),
        "dirichlet in time": dict(unknown=("dirichlet", 1), dirichlet={1: lambda s: (1 + y) * s}, M=in_time(mesh)),
        "dirichlet in space and time": dict(unknown=("dirichlet", 1), M=VectorFunctionSpace(mesh, "CG", 1, dim=3),
                                            parameter_times=NODES),
        "diffusivity": dict(unknown="diffusivity", diffusivity=lambda m: 0.1 * exp(m)),
        "diffusivity in space and time": dict(unknown="diffusivity", diffusivity=lambda m: 0.1 * exp(m), source=1.0,
                                              M=VectorFunctionSpace(mesh, "CG", 1, dim=3), parameter_times=NODES),
        "velocity": dict(unknown="velocity", velocity=lambda m: as_vector([1, 0]) + m, reaction=quadratic,
                         M=VectorFunctionSpace(mesh, "CG", 1)),
        "velocity depends on time": dict(unknown="initial", velocity=as_vector([1 + t, 0.3]), t=t),
        "several": dict(unknown=["initial", ("flux", 3), ("dirichlet", 1)], dirichlet={2: 0.3}, outflow=(),
                        M=MixedFunctionSpace([FunctionSpace(mesh, "CG", 1), FunctionSpace(wall, "CG", 1),
                                              FunctionSpace(mesh, "CG", 1)]))}[name]
    return channel(mesh=mesh, **(options | change))


QUICK = ["flux in space and time", "several"]
SLOW = ["initial", "strength", "dirichlet in time", "squared flux in space and time, reaction",
        "diffusivity in space and time", "exponential initial, reaction", "source", "exponential strength", "flux",
        "flux times sin(t)", "dirichlet", "dirichlet in space and time", "diffusivity", "velocity",
        "velocity depends on time"]
each_case = pytest.mark.parametrize("name, family", [
    *((name, "CG") for name in QUICK),
    *(pytest.param(name, "CG", marks=pytest.mark.slow) for name in SLOW),
    *(pytest.param(name, "DG", marks=pytest.mark.slow) for name in QUICK + SLOW)])


# --- accuracy

def error_at_end(mesh, family, degree, steps, theta, exact, kappa=0.05, end=1.0, **change):
    """L2 error at the end for a solution ``exact(t)`` with Dirichlet, Robin and flux conditions that follow it."""
    V, t = FunctionSpace(mesh, family, degree), Constant(0.0)
    x, y = SpatialCoordinate(mesh)
    u, v = exact(x, y, t), as_vector([1 + y, 0.5 - 0.2 * x])
    kappa = Constant(kappa)
    q = kappa * dot(FacetNormal(mesh), grad(u))
    s = variable(t)
    rate = diff(exact(x, y, s), s)
    f = rate + dot(v, grad(u)) - div(kappa * grad(u))
    problem = TransientAdvectionDiffusion(V, V, "initial", **grouped(times=[end], time_step=end / steps, theta=theta,
                                                                     t=t, velocity=v, diffusivity=kappa, source=f,
                                                                     dirichlet={1: u, 3: u}, flux={4: q},
                                                                     robin={2: (0.7, u + q / 0.7)}, **change))
    state = problem(Function(V).interpolate(exact(x, y, 0.0)))
    last = as_function(V, owned(state))
    t.assign(end)
    return errornorm(exact(x, y, end), last, degree_rise=2)


@pytest.mark.parametrize("family", ["CG", pytest.param("DG", marks=pytest.mark.slow)])
@pytest.mark.parametrize("theta, order", [(0.5, 2), (1.0, 1)])
def test_order_in_time(family, theta, order):
    """The solution is quadratic in space, so all error comes from time, with SUPG only where that is consistent."""
    def exact(x, y, t):
        return (1 + x * y + y**2) * exp(-2 * t)
    coarse, fine = (error_at_end(UnitSquareMesh(2, 2), family, 2, steps, theta, exact) for steps in (8, 16))
    assert fine > 1e-6   # else space or rounding would have been measured
    assert abs(np.log2(coarse / fine) - order) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("family, degree", [("CG", 1), ("CG", 2), ("DG", 1), ("DG", 2)])
@pytest.mark.parametrize("kappa", [0.05, 1e-4])
def test_order_in_space_and_time(family, degree, kappa):
    def exact(x, y, t):
        return sin(2 * x + y + t) + cos(3 * y - x * x) * exp(-t)
    steps = {1: (16, 32), 2: (24, 68)}[degree]   # third order in space needs finer steps in time
    coarse, fine = (error_at_end(UnitSquareMesh(n, n), family, degree, k, 0.5, exact, kappa)
                    for n, k in zip((8, 16), steps))
    # With hardly any diffusion SUPG is of order p + 1/2 at least (Johnson, Navert, Pitkaranta 1984) and nears p + 1
    # late: 2.66 and 2.75 for p = 2 on these meshes and the next.
    assert np.log2(coarse / fine) >= degree + (0.6 if (family, kappa) == ("CG", 1e-4) else 0.8)


def test_supg_suppresses_oscillations():
    """A front that moves with the flow."""
    mesh = UnitIntervalMesh(40)
    V = FunctionSpace(mesh, "CG", 1)
    overshoot = {}
    for supg in (True, False):
        problem = TransientAdvectionDiffusion(V, V, "initial", TimeSteps(times=[0.4], time_step=0.02),
                                              Physics(velocity=(1.0,), diffusivity=1e-5), Boundary(dirichlet={1: 1.0}),
                                              supg=supg)
        state = owned(problem(Function(V)))
        overshoot[supg] = max(state.max() - 1, -state.min())
    assert overshoot[True] < 0.6 * overshoot[False]


@pytest.mark.slow
def test_long_time_gives_the_steady_state():
    mesh = UnitSquareMesh(6, 6)
    V = FunctionSpace(mesh, "CG", 1)
    given = dict(velocity=(1.0, 0.3), diffusivity=[[0.3, 0.1], [0.1, 0.2]], dirichlet={1: 0.5}, reaction=quadratic,
                 supg=False)
    m = Function(V).assign(1.0)
    steady = AdvectionDiffusion(V, V, "source", **grouped(**given))(m)
    late = TransientAdvectionDiffusion(V, V, "source", **grouped(times=[40.0], time_step=0.5, theta=1.0, **given))(m)
    assert np.linalg.norm(owned(late) - owned(steady)) < 1e-8 * np.linalg.norm(owned(steady))


# --- states and unknowns

def test_state_is_a_time_series_at_every_point():
    """∂u/∂t + ∂u/∂x = 1 from 0 with 0 at the inflow: u = min(t, x), read by sensors of the vector-valued state."""
    mesh = UnitSquareMesh(10, 10)
    V = FunctionSpace(mesh, "CG", 1)
    problem = TransientAdvectionDiffusion(V, V, "source", TimeSteps(times=[0, 0.1, 0.4], time_step=0.01),
                                          Physics(velocity=(1.0, 0.0), diffusivity=1e-8), Boundary(dirichlet={1: 0.0}))
    sensors = point_sensors(problem.U, [(0.9, 0.5), (0.2, 0.3)])
    u = problem(Function(V).assign(1.0))
    assert u.function_space() == problem.U and problem.U.value_shape == (3,)
    assert np.allclose(sensors(u), [0, 0.1, 0.4, 0, 0.1, 0.2], atol=0.01)
    prior = GaussianPrior(V, std=1.0, correlation_length=0.3)
    data = simulate(InverseProblem(prior, problem, sensors), 3, seed=1, keep_states=True, progress=False)
    assert data.states.shape == (3, 3 * V.dim()) and data.readings.shape == (3, 6)
    assert np.allclose(sensors(problem(as_function(V, data.coefficients[2]))), data.readings[2])
    with pytest.raises(InputError, match="same spaces"):
        InverseProblem(prior, problem, point_sensors(V, [(0.5, 0.5)]))


@each_case
def test_blocks_and_derivatives(name, family):
    """A block equals single solves; `sensitivity` is the derivative by differences."""
    problem = case(name, family=family)
    m, direction, other = draws(problem, 3)
    states = problem.solve_many(np.array([m, other, m + 1e-4 * direction, m - 1e-4 * direction]), block=3)
    single = owned(problem(as_function(problem.M, m)))
    assert np.linalg.norm(states[0] - single) <= 1e-9 * np.linalg.norm(single)
    assert np.linalg.norm(states[1] - single) > 1e-3 * np.linalg.norm(single)   # the unknown acts
    rows = np.random.default_rng(3).standard_normal((2, problem.U.dim()))
    slope = rows @ (states[2] - states[3]) / 2e-4
    found = problem.sensitivity(as_function(problem.M, m), rows) @ direction
    assert abs(found - slope).max() <= 1e-5 * abs(slope).max()
    assert problem.linear == ("reaction" not in name and name != "velocity")
    assert problem.operator_depends_on_parameter == ("diffusivity" in name or name == "velocity")


def draws(problem, n, seed=1):
    """Owned coefficients of n parameters, in serial."""
    return 0.5 * np.random.default_rng(seed).standard_normal((n, owned(Function(problem.M)).size))


@pytest.mark.slow
def test_strength_in_time_is_the_source_in_time():
    """Nodal values of 1 - 2t on the interval, and of t + y in space and time, are these functions."""
    mesh = UnitSquareMesh(4, 4)
    x, y = SpatialCoordinate(mesh)
    t, V, M = Constant(0.0), FunctionSpace(mesh, "CG", 1), in_time(mesh)
    strength = channel(mesh=mesh, unknown=("source", x * y), M=M)
    s = Function(M).interpolate(1 - 2 * SpatialCoordinate(M.mesh())[0])
    known = channel(mesh=mesh, unknown="source", source=lambda m: m + (1 - 2 * t) * x * y, t=t)
    assert errornorm(strength(s), known(Function(V))) < 1e-12
    W = VectorFunctionSpace(mesh, "CG", 1, dim=3)
    for unknown in (("flux", 3), ("dirichlet", 1)):
        moving = channel(mesh=mesh, unknown=unknown, M=W, parameter_times=NODES)
        m = Function(W).interpolate(as_vector([node + y for node in NODES]))
        value = {unknown[0]: {unknown[1]: t + y}}
        fixed = {"outflow": (), "dirichlet": {1: t + y, 2: 0.3 + t * y}} if unknown[0] == "dirichlet" else value
        known = channel(mesh=mesh, unknown="source", source=lambda m: m + sin(3 * x + t), t=t, **fixed)
        assert errornorm(moving(m), known(Function(V))) < 1e-12


def test_responses_of_few_coefficients_are_the_march():
    problem = case("strength")
    ms = draws(problem, 9)
    few, many = problem.solve_many(ms[:2]), problem.solve_many(ms)
    assert "_response" in vars(problem)
    assert np.linalg.norm(many[:2] - few) <= 1e-12 * np.linalg.norm(few)
    ms[7, 2] = np.nan
    with pytest.raises(SolveError, match="sample 7"):
        problem.solve_many(ms)


def test_taylor():
    problem = case("initial")
    m, h = (as_function(problem.M, values) for values in draws(problem, 2))
    with set_working_tape():
        continue_annotation()
        u = problem(m)
        J = assemble(inner(u, u)**2 * dx)
        pause_annotation()
        assert len(get_working_tape().get_blocks()) == 2   # the march is one block
        functional = ReducedFunctional(J, Control(m))
        assert abs(functional(h) - J) > 1e-6 * abs(J)   # replays with the new parameter
        assert taylor_test(functional, m, h) > 1.95


@pytest.mark.slow
def test_members_that_the_chord_loses_go_to_newton():
    problem = channel(reaction=lambda u: u**5, dirichlet={1: 0}, source=0, supg=False)
    ms = np.abs(draws(problem, 3)) * np.array([[0.1], [8.0], [30.0]])
    states = problem.solve_many(ms)
    for m, state in zip(ms, states):
        single = owned(problem(as_function(problem.M, m)))
        assert np.linalg.norm(state - single) <= 1e-8 * np.linalg.norm(single)


def test_no_solution_names_sample_and_time():
    mesh = UnitIntervalMesh(8)   # u' = u² from 1 has no solution after t = 1
    V = FunctionSpace(mesh, "CG", 1)
    problem = TransientAdvectionDiffusion(V, V, "initial", TimeSteps(times=[2.0], time_step=0.5, theta=1.0),
                                          Physics(reaction=lambda u: -u**2))
    with pytest.raises(SolveError, match="sample 1: step to t = .*time_step"):
        problem.solve_many([Function(V).assign(0.01), Function(V).assign(1.0)])
    assert np.isfinite(problem.solve_many([Function(V).assign(0.01)])).all()


@pytest.mark.parametrize("name", ["initial", pytest.param("diffusivity", marks=pytest.mark.slow)])
def test_nan_is_a_solve_error(name):
    problem = case(name)
    ms = draws(problem, 2)
    ms[1, 0] = np.nan
    with pytest.raises(SolveError, match="sample 1"):
        problem.solve_many(ms)
    assert np.isfinite(problem.solve_many(ms[:1])).all()


# --- parallel

def summary(name, comm):
    """Norms of states and a directional derivative of their mean: the same however the mesh is spread."""
    problem = case(name, comm)
    ms = []
    for k in range(3):
        m = Function(problem.M)
        for part in m.subfunctions:
            x = SpatialCoordinate(part.function_space().mesh())
            wave = 1 + sin((k + 2) * x[0])
            shape = part.function_space().value_shape
            part.interpolate(as_vector([wave / (2 + i) for i in range(shape[0])]) if shape else wave)
        ms.append(m)
    states = [as_function(problem.U, row) for row in problem.solve_many(ms, block=2)]
    row = owned(assemble(dot(TestFunction(problem.U), as_vector([1, 2])) * dx))
    change = problem.sensitivity(ms[0], row[None]) @ owned(ms[1])
    return np.array([norm(u) for u in states] + [comm.allreduce(change[0])])


@pytest.mark.parallel(2)
def test_ranks():
    """Two ranks find what one finds (one mpiexec for all; not slow, because a child would deselect what is)."""
    for name in QUICK:
        spread, alone = (summary(name, comm) for comm in (COMM_WORLD, COMM_SELF))
        assert np.allclose(spread, alone, rtol=1e-8, atol=0), name


def test_the_initial_state_is_that_of_time_0():
    t = Constant(0.5)
    problem = channel(n=3, t=t, times=[0.0, 0.5], initial=lambda m: m * exp(-t), dirichlet={}, supg=False)
    state = owned(problem(Function(problem.M).assign(2.0)))
    assert np.allclose(state.reshape(-1, 2)[:, 0], 2.0)


# --- errors

@pytest.mark.parametrize("change, words", [
    (dict(times=[]), "increasing, from 0 on"),
    (dict(times=[0.5, 0.25]), "increasing"),
    (dict(times=[-0.5, 0.5]), "from 0 on"),
    (dict(times=[0.0]), "holds 0 only"),
    (dict(times=["later"]), "times holds .*real numbers"),
    (dict(times=[0.25, 0.3]), r"times\[1\] = 0.3 is no multiple of time_step = 0.125"),
    (dict(time_step=0.0), "above 0"),
    (dict(time_step=-0.125), "above 0"),
    (dict(time_step="small"), "above 0"),
    (dict(theta=0.4), "theta is 0.4: .*at least 0.5 and at most 1"),
    (dict(t=0.0), "scalar Constant"),
    (dict(t=Constant((0.0, 1.0))), "scalar Constant"),
    (dict(parameter_times=[0.0]), "two or more increasing"),
    (dict(parameter_times=[0.0, 0.4]), "at least the last saved time 0.5"),
    (dict(parameter_times=[0.1, 0.5]), "from 0"),
    (dict(parameter_times=[0.0, 0.5]), "no unknown has as many components"),
    (dict(initial=3.0), "is the unknown"),
    (dict(initial=lambda m: Constant(1.0)), "no use of the parameter"),
    (dict(unknown="start"), "must be one of 'initial'"),
    (dict(unknown=("source", 1.0)), "IntervalMesh"),
    (dict(unknown="source", initial="none"), "initial must be a number"),
    (dict(unknown=["initial", "initial"]), "each coefficient once"),
    (dict(unknown=["initial", "source"]), "MixedFunctionSpace"),
    (dict(reaction=1.0), "callable"),
])
def test_wrong_arguments(change, words):
    with pytest.raises(InputError, match=words):
        channel(n=3, **change)


def test_wrong_spaces_and_parameters():
    mesh = UnitSquareMesh(3, 3)
    short = FunctionSpace(IntervalMesh(3, 0.3), "CG", 1)
    for M, unknown, words in [(short, ("source", 1.0), "reach from 0 to the last time"),
                              (short, "initial", "function of time alone"),
                              (VectorFunctionSpace(mesh, "CG", 1, dim=3), ("flux", 3), "value shape"),
                              (FunctionSpace(UnitSquareMesh(3, 3), "CG", 1), "initial", "on V's mesh")]:
        with pytest.raises(InputError, match=words):
            channel(mesh=mesh, unknown=unknown, M=M)
    problem = channel(mesh=mesh)
    with pytest.raises(InputError, match="must be a Function in"):
        problem(Function(problem.U))
    with pytest.raises(InputError, match="owned coefficients"):
        problem.solve_many(np.zeros((2, 3)))
    with pytest.raises(InputError, match="block"):
        problem.solve_many([Function(problem.M)], block=0)
    with pytest.raises(InputError, match="rows .* has the shape"):
        problem.sensitivity(Function(problem.M), np.zeros((1, problem.V.dim())))
