"""Steady problems from residuals: as the user's own loop, in any space, with derivatives, on any number of ranks."""

import numpy as np
import pytest
from firedrake import (
    Constant, DirichletBC, FacetNormal, Function, FunctionSpace, LinearVariationalProblem, LinearVariationalSolver,
    MixedFunctionSpace, NonlinearVariationalProblem, NonlinearVariationalSolver, SpatialCoordinate, TestFunction,
    TestFunctions, TrialFunction, UnitSquareMesh, VectorFunctionSpace, as_vector, assemble, avg, div, dot, ds, dS, dx,
    exp, grad, inner, jump, sin, split, sym,
)
from firedrake.adjoint import Control, ReducedFunctional, continue_annotation, pause_annotation, taylor_test
from pyadjoint import Tape, set_working_tape

from fem_diffusion import (
    AdvectionDiffusion, Boundary, GaussianPrior, InverseProblem, Physics, SkippedWarning, Steady, TransformedPrior,
    point_sensors, simulate,
)
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients, field, owned_size

MESH = {}


def mesh(n=6):
    if n not in MESH:
        MESH[n] = UnitSquareMesh(n, n)
    return MESH[n]


def scalar(degree=1):
    V = FunctionSpace(mesh(), "CG", degree)
    return V, Function(V), Function(FunctionSpace(mesh(), "CG", 1)), TestFunction(V)


def source():
    V, u, m, v = scalar(2)
    return inner(grad(u), grad(v)) * dx + u * v * dx - m * v * dx, u, m, DirichletBC(V, 1.0, 1)


def logistic():
    V, u, m, v = scalar()
    return inner(grad(u), grad(v)) * dx - 3 * u * (1 - u) * v * dx - exp(m) * v * dx, u, m, [DirichletBC(V, 0, 1)]


def in_one():
    """The parameter, affine and not, in one integral with what is not affine in the state."""
    V, u, m, v = scalar()
    return (inner(grad(u), grad(v)) + (u**3 + m) * v) * dx, u, m, DirichletBC(V, 1, 1)


def in_one_bent():
    V, u, m, v = scalar()
    return (inner(grad(u), grad(v)) + (exp(u) - exp(m)) * v) * dx, u, m, DirichletBC(V, 1, 1)


def diffusivity():
    V, u, m, v = scalar()
    return exp(m) * inner(grad(u), grad(v)) * dx - v * dx, u, m, [DirichletBC(V, 0, "on_boundary")]


def conduction():
    """The Jacobian contains state and parameter."""
    V, u, m, v = scalar()
    return exp(m) * (1 + 0.3 * u) * inner(grad(u), grad(v)) * dx - v * ds(2), u, m, [DirichletBC(V, 0, 1)]


def raised():
    """The parameter is the value on a side, and a source."""
    V = FunctionSpace(mesh(), "CG", 1)
    u, m, v = Function(V), Function(V), TestFunction(V)
    F = inner(grad(u), grad(v)) * dx + u**3 * v * dx - m * v * dx
    return F, u, m, [DirichletBC(V, 0.5, 1), DirichletBC(V, 1 + m**2, 2)]


def stokes():
    Z = VectorFunctionSpace(mesh(), "CG", 2) * FunctionSpace(mesh(), "CG", 1)
    z, m = Function(Z), Function(VectorFunctionSpace(mesh(), "CG", 1))
    (u, p), (v, q) = split(z), TestFunctions(Z)
    y = SpatialCoordinate(mesh())[1]
    F = (inner(grad(u), grad(v)) - p * div(v) - q * div(u) - inner(m, v)) * dx
    return F, z, m, [DirichletBC(Z.sub(0), as_vector([y * (1 - y), 0]), 1), DirichletBC(Z.sub(0), 0, (3, 4))]


def navier_stokes():
    F, z, m, bcs = stokes()
    u, v = split(z)[0], TestFunctions(z.function_space())[0]
    return F + inner(dot(grad(u), u), v) * dx, z, m, bcs


def elastic():
    V = VectorFunctionSpace(mesh(), "CG", 1)
    u, m, v = Function(V), Function(FunctionSpace(mesh(), "DG", 0)), TestFunction(V)
    strain = sym(grad(u))
    F = exp(m) * (inner(2 * strain, sym(grad(v))) + div(u) * div(v)) * dx - inner(Constant((0, -1)), v) * ds(4)
    return F, u, m, [DirichletBC(V, 0, 3), DirichletBC(V.sub(0), 0, 1)]


def mixed_poisson():
    W = FunctionSpace(mesh(), "RT", 1) * FunctionSpace(mesh(), "DG", 0)
    w, m = Function(W), Function(FunctionSpace(mesh(), "DG", 0))
    (s, u), (t, v) = split(w), TestFunctions(W)
    return (dot(s, t) + div(t) * u + div(s) * v + m * v) * dx, w, m, DirichletBC(W.sub(0), Constant((0, 0)), (1, 2))


def interior_penalty():
    V = FunctionSpace(mesh(), "DG", 1)
    u, m, v, n, h = Function(V), Function(V), TestFunction(V), FacetNormal(mesh()), 1 / 6
    F = inner(grad(u), grad(v)) * dx - m * v * dx + u * v * dx
    F += (-inner(jump(u, n), avg(grad(v))) - inner(avg(grad(u)), jump(v, n)) + 8 / h * jump(u) * jump(v)) * dS
    return F, u, m, []


def facets_bent():
    """The Jacobian contains state and parameter, and integrals over interior facets."""
    V = FunctionSpace(mesh(), "DG", 1)
    u, m, v, n, h = Function(V), Function(FunctionSpace(mesh(), "CG", 1)), TestFunction(V), FacetNormal(mesh()), 1 / 6
    k = exp(m)
    F = (k * inner(grad(u), grad(v)) + (u**3 - 1) * v) * dx + 8 / h * (u - m) * v * ds
    F += (-inner(jump(u, n), avg(k * grad(v))) - inner(avg(k * grad(u)), jump(v, n)) + 8 / h * jump(u) * jump(v)) * dS
    return F, u, m, []


def several():
    """A field and a number in one parameter."""
    V, u, _, v = scalar()
    M = MixedFunctionSpace([FunctionSpace(mesh(), "CG", 1), FunctionSpace(mesh(), "R", 0)])
    m = Function(M)
    f, c = split(m)
    return inner(grad(u), grad(v)) * dx + u * v * dx - f * v * dx - exp(c) * v * ds(2), u, m, DirichletBC(V, 0, 1)


def several_affine():
    """The same, affine in both."""
    _, u, m, bcs = several()
    (f, c), v = split(m), TestFunction(u.function_space())
    return inner(grad(u), grad(v)) * dx + u * v * dx - f * v * dx - c * v * ds(2), u, m, bcs


# Whether the residual is affine in the state, and whether its derivative contains the parameter.
CASES = {source: (True, False), logistic: (False, False), in_one: (False, False), in_one_bent: (False, False),
         diffusivity: (True, True), conduction: (False, True),
         raised: (False, False), stokes: (True, False), navier_stokes: (False, False), elastic: (True, True),
         mixed_poisson: (True, False), interior_penalty: (True, False), facets_bent: (False, True),
         several: (True, False),
         several_affine: (True, False)}


def parameters(M, n, seed=0):
    """Smooth ones, the same on any number of ranks."""
    rows = []
    for i in range(n):
        m = Function(M)
        for part, W in zip(m.subfunctions, M.subspaces):
            if W.ufl_element().family() == "Real":
                part.assign(0.1 * (i - seed))
                continue
            x, y = SpatialCoordinate(W.mesh())
            wave = 0.5 * sin((i + 1 + seed) * x + 2 * y) + 0.1 * i
            part.interpolate(wave if W.value_shape == () else as_vector([wave, x * wave]))
        rows.append(coefficients(m))
    return np.array(rows)


def loop(F, u, m, bcs, rows):
    """States by the user's own solver."""
    linear = {"ksp_type": "preonly", "pc_type": "lu", "mat_type": "aij", "pc_factor_mat_solver_type": "mumps"}
    solver = NonlinearVariationalSolver(NonlinearVariationalProblem(F, u, bcs), solver_parameters={
        "snes_rtol": 1e-12, "snes_atol": 1e-13, "snes_linesearch_type": "basic"} | linear)
    states = []
    for row in rows:
        m.assign(field(m.function_space(), row))
        u.assign(0)
        solver.solve()
        states.append(coefficients(u))
    return np.array(states)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_any_residual_is_solved_as_by_a_loop(case):
    F, u, m, bcs = case()
    problem = Steady(F, u, m, bcs)
    assert (problem.linear, problem.operator_depends_on_parameter) == CASES[case]
    rows = parameters(problem.M, 5)
    before = coefficients(u), coefficients(m)
    found = problem.solve_many(rows)
    np.testing.assert_array_equal(coefficients(u), before[0])
    np.testing.assert_array_equal(coefficients(m), before[1])
    right = loop(F, u, m, bcs, rows)
    scale = np.sqrt(problem.V.comm.allreduce((right**2).sum()))
    assert np.sqrt(problem.V.comm.allreduce(((found - right)**2).sum())) < 1e-8 * scale
    one = coefficients(problem(field(problem.M, rows[2])))
    assert np.sqrt(problem.V.comm.allreduce(((one - right[2])**2).sum())) < 1e-8 * scale


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("case", CASES)
def test_sensitivities_are_derivatives(case):
    problem = Steady(*case())
    here, direction = parameters(problem.M, 1)[0], parameters(problem.M, 1, seed=3)[0]
    comm, rng = problem.V.comm, np.random.default_rng(problem.V.comm.rank)
    rows = rng.standard_normal((2, owned_size(problem.V)))
    found = comm.allreduce(problem.sensitivity(field(problem.M, here), rows) @ direction)
    errors = []
    for step in (1e-1, 1e-2):
        ends = problem.solve_many(here + step * np.array([[1.0], [-1.0]]) * direction)
        slope = comm.allreduce(rows @ (ends[0] - ends[1])) / (2 * step)
        errors.append(np.abs(slope - found).max() / np.abs(found).max())
    # Central differences: of second order, unless they are exact.
    assert errors[1] < 2e-2 * errors[0] + 1e-8 and errors[1] < 1e-3


@pytest.mark.parametrize("case", [source, conduction, raised, stokes])
def test_a_solve_is_recorded(case):
    problem = Steady(*case())
    m = field(problem.M, parameters(problem.M, 1)[0])
    tape = Tape()
    with set_working_tape(tape):
        continue_annotation()
        try:
            J = ReducedFunctional(assemble(inner(problem(m), problem(m)) * dx), Control(m))
        finally:
            pause_annotation()
        assert taylor_test(J, m, field(problem.M, parameters(problem.M, 1, seed=2)[0])) > 1.9


def test_advection_diffusion_is_one_of_them():
    V, u, m, v = scalar()
    F = 0.3 * inner(grad(u), grad(v)) * dx + u**3 * v * dx - m * v * dx
    ours = AdvectionDiffusion(V, m.function_space(), "source", Physics(diffusivity=0.3, reaction=lambda u: u**3),
                              Boundary(dirichlet={1: 0.2}))
    rows = parameters(V, 3)
    np.testing.assert_allclose(Steady(F, u, m, DirichletBC(V, 0.2, 1)).solve_many(rows), ours.solve_many(rows),
                               rtol=1e-8)
    assert isinstance(ours, Steady)


def test_problems_of_the_users_own():
    V, u, m, v = scalar()
    w, bc = TrialFunction(V), DirichletBC(V, 0, 1)
    rows = parameters(m.function_space(), 3)
    given = LinearVariationalProblem(inner(grad(w), grad(v)) * dx, m * v * dx, u, bc)
    found = Steady.from_problem(given, m).solve_many(rows)
    solver = LinearVariationalSolver(given)
    for row, state in zip(rows, found):
        m.assign(field(m.function_space(), row))
        solver.solve()
        np.testing.assert_allclose(coefficients(u), state, atol=1e-4 * np.abs(state).max())
    F, u, m, bcs = logistic()
    found = Steady.from_problem(NonlinearVariationalProblem(F, u, bcs), m).solve_many(rows)
    np.testing.assert_allclose(found, loop(F, u, m, bcs, rows), rtol=1e-7, atol=1e-9)


def test_a_solution_that_is_known():
    """Manufactured: second order with linear elements."""
    errors = []
    for n in (8, 16):
        V = FunctionSpace(mesh(n), "CG", 1)
        u, m, v = Function(V), Function(V), TestFunction(V)
        x, y = SpatialCoordinate(mesh(n))
        right = x * (1 - x) * sin(3 * y)
        F = exp(m) * inner(grad(u), grad(v)) * dx + u**2 * v * dx
        f = -div(exp(x) * grad(right)) + right**2
        problem = Steady(F - f * v * dx, u, m, DirichletBC(V, right, "on_boundary"))
        found = problem(Function(V).interpolate(x))
        errors.append(np.sqrt(assemble((found - right)**2 * dx)))
    assert np.log2(errors[0] / errors[1]) > 1.8


def test_newton_starts_from_what_the_state_holds():
    """The logistic equation has a zero solution and a positive one."""
    V, u, m, v = scalar()
    F = (0.01 * inner(grad(u), grad(v)) - u * (1 - u) * v - m * v) * dx
    rows = 0.01 + 0.01 * np.arange(3)[:, None] * np.ones(V.dim())
    above = Steady(F, u.assign(2.0), m, DirichletBC(V, 0, 1))
    assert above.solve_many(rows).max() > 0.9 and coefficients(above(field(V, rows[0]))).max() > 0.9
    below = Steady(F, u.assign(0.0), m, DirichletBC(V, 0, 1))
    assert below(field(V, rows[0])).dat.data_ro.max() < 0.5


def test_members_that_have_no_solution_are_named():
    V, u, m, v = scalar()
    problem = Steady((exp(u) - m) * v * dx, u, m)
    rows = np.full((3, V.dim()), 5.0)
    np.testing.assert_allclose(problem.solve_many(rows), np.log(5), rtol=1e-9)
    rows[1] = -5.0
    with pytest.raises(SolveError, match="sample 1"):
        problem.solve_many(rows)


@pytest.mark.parametrize("change, words", [
    (lambda F, u, m, bcs: (F, u, Function(m.function_space()), bcs), "contains m"),
    (lambda F, u, m, bcs: (F, Function(u.function_space()), m, bcs), "does not contain u"),
    (lambda F, u, m, bcs: (F, m, m, bcs), "arguments|contain u"),
    (lambda F, u, m, bcs: (0.0, u, m, bcs), "residual"),
    (lambda F, u, m, bcs: (F, u, 1.0, bcs), "Function that F contains"),
    (lambda F, u, m, bcs: (assemble(F), u, m, bcs), "residual"),
    (lambda F, u, m, bcs: (F, u, m, [1.0]), "DirichletBC"),
    (lambda F, u, m, bcs: (F, u, m, DirichletBC(FunctionSpace(mesh(), "CG", 3), 0, 1)), "space of u"),
    (lambda F, u, m, bcs: (inner(grad(TrialFunction(u.function_space())), grad(TestFunction(u.function_space()))) * dx,
                           u, m, bcs), "2 arguments"),
])
def test_what_is_no_residual_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        Steady(*change(*source()))


def rotating():
    """An unknown velocity, so that the operator is not symmetric, and a reaction."""
    V = FunctionSpace(mesh(), "CG", 1)
    u, m, v = Function(V), Function(VectorFunctionSpace(mesh(), "CG", 1)), TestFunction(V)
    F = (inner(grad(u), grad(v)) + 5 * dot(m, grad(u)) * v + u * v - v) * dx
    return F, u, m, DirichletBC(V, 0, 1)


def viscous():
    """A saddle point with an unknown log-viscosity."""
    F, z, m, bcs = stokes()
    M = FunctionSpace(mesh(), "CG", 1)
    g, u, v = Function(M), split(z)[0], TestFunctions(z.function_space())[0]
    return F + inner((exp(g) - 1) * grad(u), grad(v)) * dx + inner(m - as_vector([0, 1]), v) * dx, z, g, bcs


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("case", [diffusivity, elastic, conduction, rotating, viscous, facets_bent])
def test_operators_of_their_own_share_a_factorisation(case, monkeypatch):
    F, u, m, bcs = case()
    problem, rows = Steady(F, u, m, bcs), parameters(m.function_space(), 8)
    right = loop(F, u, m, bcs, rows)
    with monkeypatch.context() as patch:   # none is left to a solver for one
        patch.setattr(problem._stepper, "state", lambda row: pytest.fail("a member is lost"))
        found = problem.solve_many(rows)
        assert np.linalg.norm(problem.solve_many(rows[::-1])[::-1] - found) < 1e-8 * np.linalg.norm(found)
    scale = np.sqrt(problem.V.comm.allreduce((right**2).sum()))
    assert np.sqrt(problem.V.comm.allreduce(((found - right)**2).sum())) < 1e-8 * scale
    problem.sensitivity(field(problem.M, rows[0]), np.ones((1, owned_size(problem.V))))   # factorises another operator
    again = problem.solve_many(rows)
    assert np.sqrt(problem.V.comm.allreduce(((again - right)**2).sum())) < 1e-8 * scale


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", ["constant", "function", "condition"])
def test_a_coefficient_that_changes_is_told(kind):
    V, u, m, v = scalar()
    x = Constant(2.0) if kind == "constant" else Function(V).assign(2.0)
    c, g = (1.0, x) if kind == "condition" else (x, 0.0)
    problem = Steady(c * inner(grad(u), grad(v)) * dx - m * v * dx, u, m, DirichletBC(V, g, "on_boundary"))
    rows = parameters(problem.M, 2)
    before = problem.solve_many(rows)
    x.assign(2.0)   # written, but as it was
    np.testing.assert_allclose(problem.solve_many(rows), before, rtol=1e-12, atol=1e-14)
    x.assign(3.0)
    parameter = field(problem.M, rows[0])
    for ask in (lambda: problem(parameter), lambda: problem.solve_many(rows),
                lambda: problem.sensitivity(parameter, np.ones((1, owned_size(V))))):
        with pytest.raises(InputError, match="has changed since the forward problem was made.*make.*again"):
            ask()
    x.assign(2.0)
    np.testing.assert_allclose(coefficients(problem(parameter)), before[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [diffusivity, conduction])
def test_members_far_from_all_others_are_found(case):
    F, u, m, bcs = case()
    problem, rows = Steady(F, u, m, bcs), 6 * parameters(m.function_space(), 9) - 3
    found, right = problem.solve_many(rows), loop(F, u, m, bcs, rows)
    assert np.linalg.norm(found - right) < 1e-7 * np.linalg.norm(right)


def failing(**options):
    """u = log(m), which has no state where m is negative."""
    V, u, m, v = scalar()
    rows = np.full((5, V.dim()), 5.0)
    rows[[1, 3]] = -5.0
    return Steady((exp(u) - m) * v * dx, u, m, **options), rows


def test_what_a_failure_does_is_chosen():
    problem, rows = failing()
    with pytest.raises(SolveError, match="sample 1: .*on_failure='nan'"):
        problem.solve_many(rows)
    with pytest.warns(SkippedWarning, match=r"2 of 5 samples have no state \(1, 3\)"):
        found = problem.solve_many(rows, block=2, on_failure="nan")
    assert np.isnan(found[[1, 3]]).all()
    np.testing.assert_allclose(found[[0, 2, 4]], np.log(5), rtol=1e-9)
    told = {}
    problem.solve_many(rows, on_failure=told.setdefault)
    assert list(told) == [1, 3] and all("range of the parameter" in why for why in told.values())
    with pytest.raises(InputError, match="on_failure"):
        problem.solve_many(rows, on_failure="ignore")


def test_a_parameter_that_newton_does_not_reach_is_approached():
    few = {"snes_max_it": 8, "snes_linesearch_type": "basic", "ksp_type": "preonly", "pc_type": "lu"}
    problem, rows = failing(solver_parameters=few)
    rows = 2.0 + np.array([0.0, 0.1, 400.0])[:, None] * np.ones(rows.shape[1])
    problem.linearise_at(field(problem.M, rows[0]))
    np.testing.assert_allclose(problem.solve_many(rows), np.log(rows), rtol=1e-8)
    far = field(problem.M, rows[2])
    np.testing.assert_allclose(coefficients(problem(far)), np.log(rows[2]), rtol=1e-8)
    problem._stepper._continued = lambda row: None
    with pytest.raises(SolveError):
        problem(far)


def test_simulate_takes_the_members_that_are_found(monkeypatch):
    problem, _ = failing()
    prior = TransformedPrior(GaussianPrior(problem.M, 1.0, 0.5), lambda g: 1.5 + g)
    inverse = InverseProblem(prior, problem, point_sensors(problem.V, [(0.5, 0.5)]))
    with pytest.warns(SkippedWarning):
        right = simulate(inverse, 60, seed=1, skip=0.9, progress=False)
    assert 0 < len(right.skipped) < 40 and "range of the parameter" in right.skipped[0][1]
    calls, solve = [], problem.solve_many
    monkeypatch.setattr(problem, "solve_many", lambda ms, **given: calls.append(len(ms)) or solve(ms, **given))
    with pytest.warns(SkippedWarning):
        simulate(inverse, 60, seed=1, skip=0.9, progress=False)
    assert calls == [60]   # nothing is solved twice


def neumann():
    """A constant is left open."""
    V, u, m, v = scalar()
    return inner(grad(u), grad(v)) * dx - m * v * dx, u, m, []


def floating():
    """As well, with an operator that depends on the parameter."""
    V, u, m, v = scalar()
    return exp(m) * inner(grad(u), grad(v)) * dx - (SpatialCoordinate(mesh())[0] - 0.5) * v * dx, u, m, []


def enclosed():
    """The pressure is open up to a constant."""
    F, z, m, _ = stokes()
    return F, z, m, DirichletBC(z.function_space().sub(0), 0, "on_boundary")


@pytest.mark.parametrize("ask", [
    lambda problem, m: problem(m), lambda problem, m: problem.solve_many([m, m]),
    lambda problem, m: problem.sensitivity(m, np.eye(1, problem.V.dim()))], ids=["call", "block", "sensitivity"])
@pytest.mark.parametrize("case", [neumann, floating, enclosed])
def test_what_leaves_the_state_open_is_refused(case, ask):
    F, u, m, bcs = case()
    with pytest.raises(SolveError, match="singular|DIVERGED_LINEAR_SOLVE"):
        ask(Steady(F, u, m, bcs), m)
