"""Problems in time from residuals: as the user's own time loop, in any space, with derivatives, on any ranks."""

import numpy as np
import pytest
from firedrake import (
    Constant, DirichletBC, FacetNormal, Function, FunctionSpace, NonlinearVariationalProblem,
    NonlinearVariationalSolver, SpatialCoordinate, TestFunction, TestFunctions, UnitSquareMesh, VectorFunctionSpace,
    as_vector, assemble, avg, cos, div, dot, ds, dS, dx, exp, grad, inner, jump, sin, split,
)
from firedrake.adjoint import Control, ReducedFunctional, continue_annotation, pause_annotation, taylor_test
from pyadjoint import Tape, set_working_tape

from fem_diffusion import March, Physics, TimeSteps, TransientAdvectionDiffusion, point_sensors
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients, field, owned_size
from test_steady import parameters

DT, STEPS = 0.1, 4
MESH = {}


def mesh(n=6):
    if n not in MESH:
        MESH[n] = UnitSquareMesh(n, n)
    return MESH[n]


def scalar(family="CG"):
    V = FunctionSpace(mesh(), family, 1)
    return V, Function(V), Function(V), Function(FunctionSpace(mesh(), "CG", 1)), TestFunction(V)


def heat():
    """Crank-Nicolson, source unknown, data that depend on time, an initial state that misses the condition."""
    V, u, old, m, v = scalar()
    t = Constant(0.0)
    x, y = SpatialCoordinate(mesh())
    old.interpolate(1 + x * y)
    F = inner((u - old) / DT, v) * dx + inner(grad((u + old) / 2), grad(v)) * dx - m * sin(t - DT / 2) * v * dx
    return dict(F=F, u=u, u_old=old, m=m, bcs=DirichletBC(V, t * y, 1), t=t)


def from_the_start():
    """The initial state unknown, implicit Euler."""
    V, u, old, m, v = scalar()
    dt = Constant(DT)
    F = ((u - old) / dt * v + inner(grad(u), grad(v))) * dx
    return dict(F=F, u=u, u_old=old, m=m, bcs=[DirichletBC(V, 0, 1)], dt=dt, initial=exp(m))


def everywhere():
    """Initial state, source and boundary value at once, with a nonlinear reaction."""
    V, u, old, m, v = scalar()
    mid = (u + old) / 2
    F = ((u - old) / DT * v + inner(grad(mid), grad(v)) + mid**3 * v - m * v) * dx
    return dict(F=F, u=u, u_old=old, m=m, bcs=DirichletBC(V, 1 + m**2, 2), initial=m)


def conductive():
    """The operator contains the parameter."""
    V, u, old, m, v = scalar()
    old.assign(1)
    F = ((u - old) / DT * v + exp(m) * inner(grad(u), grad(v))) * dx
    return dict(F=F, u=u, u_old=old, m=m, bcs=DirichletBC(V, 0, 1))


def porous():
    """It contains the state as well."""
    V, u, old, m, v = scalar()
    old.assign(1)
    F = ((u - old) / DT * v + exp(m) * (1 + u**2) * inner(grad(u), grad(v))) * dx
    return dict(F=F, u=u, u_old=old, m=m, bcs=DirichletBC(V, 0, 1))


def semi_implicit():
    """Linear in the new state, with the former one in the operator and alone in a reaction."""
    V, u, old, m, v = scalar()
    old.assign(0.5)
    F = ((u - old) / DT * v + (1 + old**2) * inner(grad(u), grad(v)) - old * (1 - old) * v - m * v) * dx
    return dict(F=F, u=u, u_old=old, m=m, bcs=[])


def stokes():
    """Velocity and pressure; the former pressure does not count."""
    Z = VectorFunctionSpace(mesh(), "CG", 2) * FunctionSpace(mesh(), "CG", 1)
    z, old, m = Function(Z), Function(Z), Function(VectorFunctionSpace(mesh(), "CG", 1))
    (u, p), (u0, _), (v, q), t = split(z), split(old), TestFunctions(Z), Constant(0.0)
    y = SpatialCoordinate(mesh())[1]
    F = (inner(u - u0, v) / DT + inner(grad(u), grad(v)) - p * div(v) - q * div(u) - inner(m, v)) * dx
    bcs = [DirichletBC(Z.sub(0), as_vector([t * y * (1 - y), 0]), 1), DirichletBC(Z.sub(0), 0, (3, 4))]
    return dict(F=F, u=z, u_old=old, m=m, bcs=bcs, t=t)


def navier_stokes():
    given = stokes()
    u, v = split(given["u"])[0], TestFunctions(given["u"].function_space())[0]
    return given | {"F": given["F"] + inner(dot(grad(u), u), v) * dx}


def vectors():
    """A vector whose initial state is unknown, and a condition on one component."""
    V = VectorFunctionSpace(mesh(), "CG", 1)
    u, old, m, v = Function(V), Function(V), Function(FunctionSpace(mesh(), "CG", 1)), TestFunction(V)
    F = (inner(u - old, v) / DT + inner(grad(u), grad(v)) + div(u) * div(v)) * dx
    return dict(F=F, u=u, u_old=old, m=m, bcs=DirichletBC(V.sub(0), 0, 1), initial=as_vector([m, m**2]))


def mixed_heat():
    """Flux in H(div) and a discontinuous temperature that is unknown at first."""
    W = FunctionSpace(mesh(), "RT", 1) * FunctionSpace(mesh(), "DG", 0)
    w, old, m = Function(W), Function(W), Function(FunctionSpace(mesh(), "DG", 0))
    (s, u), (_, u0), (r, v) = split(w), split(old), TestFunctions(W)
    F = (inner(s, r) + div(r) * u - (u - u0) / DT * v + div(s) * v) * dx
    return dict(F=F, u=w, u_old=old, m=m, bcs=DirichletBC(W.sub(0), Constant((0, 0)), (1, 2)),
                initial=as_vector([0 * m, 0 * m, m]))


def upwind():
    """Discontinuous transport: the former state has another sparsity pattern."""
    V, u, old, m, v = scalar("DG")
    b, n = as_vector([1.0, 0.3]), FacetNormal(mesh())
    flow = (dot(b, n) + abs(dot(b, n))) / 2
    F = inner(u - old, v) / DT * dx - u * dot(b, grad(v)) * dx + jump(v) * jump(flow * u) * dS + flow * u * v * ds
    F += 0.01 * inner(avg(grad(u)), avg(grad(v))) * dS
    return dict(F=F, u=u, u_old=old, m=m, bcs=[], initial=sin(m))


# Whether a step is affine in the states, and whether its derivative contains the parameter.
CASES = {heat: (True, False), from_the_start: (True, False), everywhere: (False, False), conductive: (True, True),
         porous: (False, True), semi_implicit: (False, False), stokes: (True, False), navier_stokes: (False, False),
         vectors: (True, False), mixed_heat: (True, False), upwind: (True, False)}


def posed(case, **change):
    given = case() | change
    F, u, old, m = (given.pop(name) for name in ("F", "u", "u_old", "m"))
    return March(F, u, old, m, given.pop("dt", DT), DT * STEPS, given.pop("bcs"), **given)


def loop(case, rows, saved):
    """The states at the saved steps (n, n_owned of V, number of them) by the user's own time loop."""
    given = case()
    u, old, m, t = given["u"], given["u_old"], given["m"], given.get("t", Constant(0.0))
    start = coefficients(old)
    solver = NonlinearVariationalSolver(NonlinearVariationalProblem(given["F"], u, given["bcs"]), solver_parameters={
        "snes_rtol": 1e-12, "snes_atol": 1e-13, "snes_linesearch_type": "basic", "ksp_type": "preonly",
        "pc_type": "lu", "mat_type": "aij", "pc_factor_mat_solver_type": "mumps"})
    result = []
    for row in rows:
        m.assign(field(m.function_space(), row))
        old.assign(field(old.function_space(), start))
        if "initial" in given:
            old.interpolate(given["initial"])
        states = [coefficients(old)]
        t.assign(0)
        for _ in range(STEPS):
            t.assign(float(t) + DT)
            u.assign(old)
            solver.solve()
            old.assign(u)
            states.append(coefficients(u))
        result.append(np.array(states)[saved].T)
    return np.array(result)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_any_residual_marches_as_a_time_loop(case):
    problem = posed(case, times=[0, 2 * DT, STEPS * DT])
    assert (problem.linear, problem.operator_depends_on_parameter) == CASES[case]
    rows, comm = parameters(problem.M, 4), problem.V.comm
    found = problem.solve_many(rows)
    right = loop(case, rows, [0, 2, STEPS]).reshape(found.shape)
    scale = np.sqrt(comm.allreduce((right**2).sum()))
    assert np.sqrt(comm.allreduce(((found - right)**2).sum())) < 1e-8 * scale
    one = coefficients(problem(field(problem.M, rows[2])))
    assert np.sqrt(comm.allreduce(((one - right[2])**2).sum())) < 1e-8 * scale
    last = posed(case)
    assert last.U == last.V
    ends = found.reshape(len(rows), -1, 3)[:, :, 2]
    assert np.sqrt(comm.allreduce(((last.solve_many(rows) - ends)**2).sum())) < 1e-9 * scale


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("case", CASES)
def test_sensitivities_are_derivatives(case):
    problem = posed(case, times=[DT, STEPS * DT])
    here, direction = parameters(problem.M, 1)[0], parameters(problem.M, 1, seed=3)[0]
    comm, rng = problem.V.comm, np.random.default_rng(problem.V.comm.rank)
    rows = rng.standard_normal((2, owned_size(problem.U)))
    found = comm.allreduce(problem.sensitivity(field(problem.M, here), rows) @ direction)
    errors = []
    for step in (1e-1, 1e-2):
        ends = problem.solve_many(here + step * np.array([[1.0], [-1.0]]) * direction)
        slope = comm.allreduce(rows @ (ends[0] - ends[1])) / (2 * step)
        errors.append(np.abs(slope - found).max() / np.abs(found).max())
    # Central differences: of second order, unless they are exact.
    assert errors[1] < 2e-2 * errors[0] + 1e-8 and errors[1] < 1e-3


@pytest.mark.parametrize("case", [heat, everywhere, stokes])
def test_a_march_is_recorded(case):
    problem = posed(case)
    m = field(problem.M, parameters(problem.M, 1)[0])
    tape = Tape()
    with set_working_tape(tape):
        continue_annotation()
        try:
            J = ReducedFunctional(assemble(inner(problem(m), problem(m))**2 * dx), Control(m))
        finally:
            pause_annotation()
        assert taylor_test(J, m, field(problem.M, parameters(problem.M, 1, seed=2)[0])) > 1.9


@pytest.mark.parametrize("theta, order", [(0.5, 2), (1.0, 1)])
def test_a_solution_that_is_known(theta, order):
    """Manufactured, with a nonlinear reaction; quadratic in space, so that all error comes from time."""
    V = FunctionSpace(mesh(3), "CG", 2)
    x, y = SpatialCoordinate(mesh(3))
    errors = []
    for steps in (8, 16):
        u, old, m, v, t, dt = Function(V), Function(V), Function(V), TestFunction(V), Constant(0.0), Constant(1 / steps)
        mid = theta * u + (1 - theta) * old
        when = t - (1 - theta) * dt
        right = (1 + x * y + y**2) * cos(t)
        now = (1 + x * y + y**2) * cos(when)
        f = -(1 + x * y + y**2) * sin(when) - 2 * cos(when) + now**3
        F = ((u - old) / dt * v + inner(grad(mid), grad(v)) + mid**3 * v - f * v) * dx
        problem = March(F, u, old, m, dt, 1.0, DirichletBC(V, right, "on_boundary"), initial=m, t=t)
        found = problem(Function(V).interpolate(1 + x * y + y**2))
        t.assign(1.0)
        errors.append(np.sqrt(assemble((found - right)**2 * dx)))
    assert errors[1] > 1e-8 and abs(np.log2(errors[0] / errors[1]) - order) < 0.15


def test_transient_advection_diffusion_is_one_of_them():
    V, u, old, m, v = scalar()
    mid = (u + old) / 2
    F = ((u - old) / DT * v + 0.3 * inner(grad(mid), grad(v)) + mid**3 * v) * dx
    ours = TransientAdvectionDiffusion(V, V, "initial", TimeSteps([2 * DT], DT),
                                       Physics(diffusivity=0.3, reaction=lambda u: u**3))
    rows = parameters(V, 3)
    np.testing.assert_allclose(March(F, u, old, m, DT, 2 * DT, initial=m).solve_many(rows), ours.solve_many(rows),
                               rtol=1e-8)
    assert isinstance(ours, March)


def test_sensors_read_time_series_of_a_component():
    problem = posed(stokes, times=[DT, STEPS * DT])
    m = field(problem.M, parameters(problem.M, 1)[0])
    place = [(0.3, 0.4)]
    series = point_sensors(problem.U, place, component=0)(problem(m)).reshape(2, 2)
    for j, T in enumerate((DT, STEPS * DT)):
        given = stokes()
        one = March(given["F"], given["u"], given["u_old"], given["m"], DT, T, given["bcs"], t=given["t"])
        np.testing.assert_allclose(point_sensors(one.U, place, component=0)(one(m)), series[:, j], rtol=1e-8)


def test_what_the_user_holds_is_left_alone():
    given = heat()
    u, old, m = given["u"], given["u_old"], given["m"]
    before = [coefficients(x) for x in (u, old, m)]
    March(given["F"], u, old, m, DT, DT, given["bcs"], t=given["t"]).solve_many(parameters(m.function_space(), 2))
    for x, values in zip((u, old, m), before):
        np.testing.assert_array_equal(coefficients(x), values)


def test_a_step_without_solution_names_sample_and_time():
    V, u, old, m, v = scalar()
    F = ((u - old) / 0.5 - u**2) * v * dx   # u' = u² from 1 has no solution after t = 1
    problem = March(F, u, old, m, 0.5, 2.0, initial=m)
    rows = np.array([0.01, 1.0])[:, None] * np.ones(V.dim())
    with pytest.raises(SolveError, match="sample 1: step to t = "):
        problem.solve_many(rows)


@pytest.mark.parametrize("change, words", [
    (dict(u_old=1.0), "u_old"),
    (dict(u_old=Function(FunctionSpace(mesh(), "CG", 2))), "space of u"),
    (dict(u_old=Function(FunctionSpace(mesh(), "CG", 1))), "does not contain u_old"),
    (dict(dt=0.0), "dt"), (dict(dt="small"), "dt"), (dict(T=-1.0), "T"), (dict(T=0.25), "no multiple"),
    (dict(times=[0.1]), "last saved time be T"), (dict(t=0.0), "scalar Constant"),
    (dict(initial=1.0), "UFL expression of shape"), (dict(initial=as_vector([1.0, 2.0])), "shape"),
    (dict(m=Function(FunctionSpace(mesh(), "CG", 1))), "contains m"),
    (dict(bcs=[1.0]), "DirichletBC"),
])
def test_what_is_no_step_is_refused(change, words):
    given = dict(heat(), dt=DT, T=0.4) | change
    F, u, old, m, dt, T, bcs = (given.pop(name) for name in ("F", "u", "u_old", "m", "dt", "T", "bcs"))
    with pytest.raises(InputError, match=words):
        March(F, u, old, m, dt, T, bcs, **given)
