"""Derivatives of solvers that firedrake.adjoint records: right, quiet, and refused where the tape misses something."""

import numpy as np
import pytest
from channel import CASES, as_function, case, channel, draws, owned, quadratic
from firedrake import (
    Constant, DirichletBC, Function, FunctionSpace, LinearVariationalProblem, LinearVariationalSolver,
    NonlinearVariationalProblem, NonlinearVariationalSolver, SpatialCoordinate, TestFunction, TestFunctions,
    TrialFunction, UnitSquareMesh, VectorFunctionSpace, assemble, div, dx, exp, grad, inner, solve, split,
)
from firedrake.adjoint import (
    Control, ReducedFunctional, Tape, annotate_tape, continue_annotation, get_working_tape, pause_annotation,
    set_working_tape,
)

from fem_diffusion import Differentiable, GaussianPrior, InverseProblem, Taped, point_sensors
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import field, owned_size
from fem_diffusion.forward.callable import CallableForward

MESH = UnitSquareMesh(6, 6)
V, R = FunctionSpace(MESH, "CG", 1), FunctionSpace(MESH, "R", 0)
v, (x, y) = TestFunction(V), SpatialCoordinate(MESH)
dX = dx(degree=4)   # else quadrature of a form and of its derivative differ


def _random(M, scale=0.3, seed=0):
    rng = np.random.default_rng([seed, M.comm.rank])
    return field(M, scale * rng.standard_normal(owned_size(M)))


def _heated():
    """Steady conduction by a solver that is built once, whose boundary values are the parameter; and a counter."""
    u, g, calls = Function(V), Function(V), []
    F = inner((1 + u**2) * grad(u), grad(v)) * dX - v * dX
    solver = NonlinearVariationalSolver(NonlinearVariationalProblem(F, u, bcs=DirichletBC(V, g, (1, 2))))

    def run(m):
        calls.append(1)
        u.assign(Constant(0.0))
        g.assign(m)
        solver.solve()
        return u
    return run, calls


def _cooling(steps=4):
    """A loop in time, whose first state is written through NumPy."""
    old, new, k = Function(V), Function(V), Function(V)
    F = (new - old) / 0.1 * v * dX + inner(exp(k) * (1 + new**2) * grad(new), grad(v)) * dX - x * v * dX
    solver = NonlinearVariationalSolver(NonlinearVariationalProblem(F, new))

    def run(m):
        k.assign(m)
        old.dat.data[:] = new.dat.data[:] = 0
        for _ in range(steps):
            solver.solve()
            old.assign(new)
        return old
    return run


def _once(constant):
    """A linear problem whose solver keeps its Jacobian until it is told to make another."""
    u, k, w = Function(V), Function(V), TrialFunction(V)
    solver = LinearVariationalSolver(LinearVariationalProblem(
        inner(exp(k) * grad(w), grad(v)) * dX, v * dX, u, bcs=DirichletBC(V, 0, 1), constant_jacobian=constant))

    def run(m):
        k.assign(m)
        solver.invalidate_jacobian()
        solver.solve()
        return u
    return run


def _flow(m):
    """Stokes flow driven by the parameter: a state of two components, with a pressure that an outlet fixes."""
    W = VectorFunctionSpace(MESH, "CG", 2) * V
    w = Function(W)
    (u, p), (a, q) = split(w), TestFunctions(W)
    F = (inner(grad(u), grad(a)) - p * div(a) - q * div(u) - m * a[0] + (u[0]**2) * a[1]) * dX
    solve(F == 0, w, bcs=DirichletBC(W.sub(0), 0, (1, 3, 4)))
    return w


def _numbers(m):
    a = m.subfunctions[0] if len(m.function_space()) > 1 else m
    b = m.subfunctions[1] if len(m.function_space()) > 1 else m
    u = Function(V)
    F = inner((1 + exp(a)) * grad(u), grad(v)) * dX + u**3 * v * dX - (b**2 + 1) * v * x * dX
    solve(F == 0, u, bcs=DirichletBC(V, 0, 1))
    return u


SOLVERS = {
    "boundary values of a solver built once": (lambda: _heated()[0], V),
    "a loop in time": (_cooling, V),
    "a kept Jacobian": (lambda: _once(True), V),
    "a solver built once": (lambda: _once(False), V),
    "velocity and pressure": (lambda: _flow, V),
    "velocity alone": (lambda: lambda m: _flow(m).subfunctions[0], V),
    "a number": (lambda: _numbers, R),
    "a field and a number": (lambda: _numbers, V * R),
    "interpolation": (lambda: lambda m: Function(V).interpolate(exp(m) * x), V),
    "projection": (lambda: lambda m: Function(V).project(m**2), V),
    "the same Function": (lambda: lambda m: m.assign(2 * m), V),
}


def _slope(run, m, direction, rows, h=1e-4):
    """Central difference of what rows see."""
    M = m.function_space()
    ends = [rows @ owned(run(field(M, owned(m) + s * h * owned(direction)))) for s in (1, -1)]
    return M.comm.allreduce((ends[0] - ends[1]) / (2 * h))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_derivative_is_that_of_differences_at_every_point(name):
    make, M = SOLVERS[name]
    run, taped = make(), Taped(make(), M)
    assert isinstance(taped, Differentiable)
    for seed in (1, 2, 3):
        m, direction = _random(M, seed=seed), _random(M, 1.0, seed=seed + 10)
        state = owned(run(field(M, owned(m))))
        rows = np.random.default_rng(seed).standard_normal((2, len(state)))
        slope = _slope(run, m, direction, rows)
        found = taped.sensitivity(m, rows) @ owned(direction)
        assert abs(found - slope).max() <= 1e-6 * abs(slope).max()
        np.testing.assert_allclose(owned(taped(m)), state, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name, reaction", [(name, None) for name in CASES] + [("diffusivity", quadratic)])
def test_it_is_the_sensitivity_of_our_own_problems(name, reaction):
    problem = case(name, reaction, n=4) if name != "velocity" else case(name, reaction)
    taped, rows = Taped(problem.__call__, problem.M), np.random.default_rng(1).standard_normal((3, problem.V.dim()))
    for m in draws(problem, 2):
        m = as_function(problem.M, m)
        wanted = problem.sensitivity(m, rows)
        np.testing.assert_allclose(taped.sensitivity(m, rows), wanted, rtol=0, atol=1e-7 * abs(wanted).max())


def test_it_is_the_sensitivity_of_our_own_problem_by_a_solver_of_the_users_own():
    problem = channel(n=4, unknown="diffusivity", diffusivity=lambda m: 0.1 * exp(m), reaction=quadratic)

    def run(m):
        problem.m.assign(m)
        problem.u.assign(Constant(0.0))
        solve(problem.F == 0, problem.u, bcs=problem.bcs)
        return problem.u
    taped, rows = Taped(run, problem.M), np.eye(problem.V.dim())[::7]
    for m in draws(problem, 2):
        m = as_function(problem.M, m)
        wanted = problem.sensitivity(m, rows)
        np.testing.assert_allclose(taped.sensitivity(m, rows), wanted, rtol=0, atol=1e-6 * abs(wanted).max())


def test_a_taylor_test_has_order_two():
    taped, m, direction = Taped(_heated()[0], V), _random(V), _random(V, 1.0, 1)
    row = np.random.default_rng(3).standard_normal(V.dim())
    slope = (taped.sensitivity(m, row[None]) @ owned(direction))[0]
    values = [row @ owned(taped(field(V, owned(m) + h * owned(direction)))) for h in (0, 4e-3, 2e-3, 1e-3)]
    left = [abs(value - values[0] - h * slope) for value, h in zip(values[1:], (4e-3, 2e-3, 1e-3))]
    assert min(np.log2(np.divide(left[:-1], left[1:]))) > 1.9


def test_one_solve_serves_state_and_derivative():
    run, calls = _heated()
    taped, m, rows = Taped(run, V), _random(V), np.eye(3, V.dim())
    first = owned(taped(m))
    taped.sensitivity(m, rows)
    calls.clear()
    m.assign(0.5 * m)
    state = owned(taped(m))
    found = [taped.sensitivity(m, rows) for _ in range(2)]
    np.testing.assert_array_equal(owned(taped(m)), state)
    assert len(calls) == 1 and abs(state - first).max() > 1e-3
    np.testing.assert_array_equal(*found)
    # The user's solver goes on elsewhere meanwhile.
    run(_random(V, seed=9))
    np.testing.assert_allclose(taped.sensitivity(m, rows), found[0], rtol=1e-10, atol=1e-14)


def _through_numpy(m):
    return field(V, np.sin(owned(m)))


def _half_through_numpy(m):
    k, u = field(V, np.exp(owned(m))), Function(V)
    solve(inner(k * grad(u), grad(v)) * dX + u * v * dX - (x + 0.1 * m) * v * dX == 0, u)
    return u


def _one_component_through_numpy(m):
    a, b = m.subfunctions
    return Function(V).interpolate(a + Constant(float(b.dat.data_ro[0])))


def _jump(m):
    return Function(V).interpolate(m + (1.0 if assemble(m * dX) > 0 else -1.0))


@pytest.mark.parametrize("run, M, words", [
    (_through_numpy, V, "knows nothing of it: let every step .* be one of Firedrake"),
    (_half_through_numpy, V, "misses [0-9]+% of how the state changes.* be one of Firedrake"),
    (_one_component_through_numpy, V * R, "parameter \\(component 1\\), and the tape .* knows nothing"),
    (_jump, V, "Differences of the forward problem do not settle.*jumps"),
])
def test_what_escapes_the_tape_is_found_at_the_first_derivative(run, M, words):
    m = Function(M)
    with pytest.raises(InputError, match=words):
        Taped(run, M).sensitivity(m, np.eye(2, V.dim()))


def test_what_sensors_do_not_see_may_escape():
    m, rows = Function(V), np.zeros((1, V.dim()))
    rows[0, 3] = 1.0

    def run(m):
        u = Function(V).interpolate(exp(m))
        u.dat.data[5] = np.exp(3 * m.dat.data_ro[5])
        return u
    with pytest.raises(InputError, match="misses"):
        Taped(run, V).check(m)
    taped = Taped(run, V)
    taped.check(m, rows=rows)
    np.testing.assert_allclose(taped.sensitivity(m, rows), rows, rtol=1e-12)


def test_a_state_that_does_not_depend_on_the_parameter_has_no_derivative_and_that_is_right():
    taped = Taped(lambda m: Function(V).interpolate(x), V)
    assert not taped.sensitivity(_random(V), np.eye(2, V.dim())).any()


def test_what_cannot_be_recorded_and_what_fails_are_told_apart():
    def silent(m):
        u = Function(V).interpolate(m)
        if annotate_tape():
            raise NotImplementedError("no derivative of this")
        return u
    with pytest.raises(InputError, match="cannot record the forward problem \\(NotImplementedError: no derivative"):
        Taped(silent, V).sensitivity(_random(V), np.eye(2, V.dim()))

    def failing(m):
        raise SolveError("no state.")
    with pytest.raises(SolveError, match="no state"):
        Taped(failing, V).sensitivity(_random(V), np.eye(2, V.dim()))
    with pytest.raises(InputError, match="returned is of type float: give the state"):
        Taped(lambda m: 1.0, V).sensitivity(_random(V), np.eye(2, V.dim()))
    with pytest.raises(InputError, match="rows .* shape"):
        Taped(_flow, V).sensitivity(_random(V), np.eye(2, V.dim()))


def test_a_failed_solve_leaves_no_record_behind():
    def run(m):
        if m.dat.data_ro[0] > 5:
            raise SolveError("no state.")
        return Function(V).interpolate(m**2)
    taped, m, rows = Taped(run, V), Function(V).assign(Constant(1.0)), np.eye(2, V.dim())
    wanted = taped.sensitivity(m, rows)
    with pytest.raises(SolveError):
        taped.sensitivity(Function(V).assign(Constant(9.0)), rows)
    np.testing.assert_array_equal(taped.sensitivity(m, rows), wanted)


@pytest.fixture
def annotating():
    """A user's tape that runs and has one block."""
    with set_working_tape(Tape()) as tape:
        continue_annotation()
        try:
            Function(V).assign(Constant(1.0))
            yield tape
        finally:
            pause_annotation()


def test_the_users_tape_is_left_alone(annotating):
    taped, m = Taped(_heated()[0], V), _random(V)
    blocks = len(annotating.get_blocks())
    found = taped.sensitivity(m, np.eye(2, V.dim()))
    taped.solve_many(owned(m)[None])
    assert (len(annotating.get_blocks()), get_working_tape(), annotate_tape()) == (blocks, annotating, True)
    with pytest.raises(InputError):
        Taped(_through_numpy, V).sensitivity(m, np.eye(2, V.dim()))
    assert (len(annotating.get_blocks()), get_working_tape(), annotate_tape()) == (blocks, annotating, True)
    pause_annotation()
    np.testing.assert_allclose(taped.sensitivity(m, np.eye(2, V.dim())), found, atol=1e-12)
    assert not annotate_tape()


def test_a_call_while_the_users_tape_runs_is_recorded_there(annotating):
    taped, m = Taped(_heated()[0], V), _random(V)
    taped.check(m)
    functional = ReducedFunctional(assemble(taped(m)**2 * dX), Control(m))
    pause_annotation()
    assert abs(functional.derivative().dat.data_ro).max() > 0


def test_a_solver_that_annotates_by_itself():
    def run(m):
        continue_annotation()
        u = Function(V).interpolate(m**2)
        pause_annotation()
        return u
    m, rows = _random(V), np.eye(2, V.dim())
    for before in (False, True):
        taped = Taped(run, V)
        with set_working_tape(Tape()) as tape:
            if before:
                continue_annotation()
            found = taped.sensitivity(m, rows)
            assert annotate_tape() == before and get_working_tape() is tape and not tape.get_blocks()
            pause_annotation()
        np.testing.assert_allclose(found, 2 * owned(m) * rows, atol=1e-14)

    def other(m):
        with set_working_tape(Tape()):
            return Function(V).interpolate(m**2)
    with pytest.raises(InputError, match="knows nothing"):
        Taped(other, V).sensitivity(m, rows)


def test_a_reduced_functional_of_the_users_own():
    m, run = _random(V), _flow
    with set_working_tape(Tape()) as tape:
        continue_annotation()
        state = run(m)
        functional = ReducedFunctional(state, Control(m), tape=tape)
        number = ReducedFunctional(assemble(inner(state, state) * dX), Control(m), tape=tape)
        pause_annotation()
    rows = np.random.default_rng(0).standard_normal((2, state.function_space().dim()))
    taped, here = Taped(functional, V), _random(V, seed=4)
    wanted = Taped(run, V).sensitivity(here, rows)
    np.testing.assert_allclose(taped.sensitivity(here, rows), wanted, atol=1e-8 * abs(wanted).max())
    functional(m)   # elsewhere meanwhile
    np.testing.assert_allclose(taped.sensitivity(here, rows), wanted, atol=1e-8 * abs(wanted).max())
    np.testing.assert_allclose(owned(taped(here)), owned(run(here)), atol=1e-8)
    assert not annotate_tape()
    with pytest.raises(InputError, match="give the state"):
        Taped(number, V).sensitivity(here, rows)
    with pytest.raises(InputError, match="has 1 controls, in .*: give one of a single control"):
        Taped(functional, R)


def test_a_problem_records_a_plain_solver_when_a_derivative_is_asked_for():
    run, calls = _heated()
    prior, sensors = GaussianPrior(V, 0.5, 0.4), point_sensors(V, [[0.3, 0.4], [0.6, 0.7], [0.5, 0.2]])
    problem = InverseProblem(prior, run, sensors, 0.1)
    assert type(problem.forward) is CallableForward and not isinstance(problem.forward, Differentiable)
    m = prior.sample(3)
    before = problem.readings(owned(m)[None])
    assert len(calls) == 1
    found = problem.sensitivity(m)
    np.testing.assert_allclose(found, Taped(_heated()[0], V).sensitivity(m, sensors.rows), rtol=1e-8, atol=1e-12)
    combined = problem.sensitivity(m, np.array([[1.0, -2.0, 0.5]]) @ sensors.rows.toarray())
    np.testing.assert_allclose(combined[0], [1.0, -2.0, 0.5] @ found, rtol=1e-8, atol=1e-12)
    calls.clear()
    np.testing.assert_allclose(problem.readings(owned(m)[None]), before, rtol=1e-7)
    problem.sensitivity(m)
    assert not calls


def test_a_problem_remembers_that_its_solver_has_no_derivative():
    calls = []

    def run(m):
        calls.append(1)
        return _through_numpy(m)
    problem = InverseProblem(GaussianPrior(V, 0.5, 0.4), run, point_sensors(V, [[0.3, 0.4]]), 0.1)
    words = "CallableForward, has no derivative. .*knows nothing.*sensitivity\\(m, rows"
    with pytest.raises(InputError, match=words):
        problem.sensitivity(Function(V))
    tried = len(calls)
    with pytest.raises(InputError, match=words):
        problem.differentiable()
    assert len(calls) == tried


@pytest.mark.parallel(2)
def test_ranks_agree_with_differences_and_with_our_own_sensitivity():
    for name in ("boundary values of a solver built once", "a field and a number"):
        make, M = SOLVERS[name]
        taped, m, direction = Taped(make(), M), _random(M, seed=1), _random(M, 1.0, seed=11)
        state = owned(make()(field(M, owned(m))))
        rows = np.random.default_rng([1, M.comm.rank]).standard_normal((2, len(state)))
        slope = _slope(make(), m, direction, rows)
        found = M.comm.allreduce(taped.sensitivity(m, rows) @ owned(direction))
        assert abs(found - slope).max() <= 1e-6 * abs(slope).max()
    problem = channel(n=5, unknown="diffusivity", diffusivity=lambda m: 0.1 * exp(m))
    m = Function(problem.M).interpolate(0.3 * SpatialCoordinate(problem.M.mesh())[0])
    rows = np.random.default_rng(problem.M.comm.rank).standard_normal((2, owned_size(problem.V)))
    found = Taped(problem.__call__, problem.M).sensitivity(m, rows)
    np.testing.assert_allclose(found, problem.sensitivity(m, rows), atol=1e-7)
