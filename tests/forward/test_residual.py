"""What residuals of the user's own may hold: conditions, views, quadratures; as the user's loop, or refused."""

import numpy as np
import pytest
from firedrake import (
    Constant, DirichletBC, EquationBC, Function, FunctionSpace, LinearVariationalProblem, LinearVariationalSolver,
    MixedFunctionSpace, NonlinearVariationalProblem, SpatialCoordinate, TestFunction, TestFunctions, TrialFunction,
    UnitSquareMesh, VectorFunctionSpace, conditional, ds, dx, exp, grad, gt, inner, interpolate, solve, split, sqrt,
)

from fem_diffusion import (
    AdvectionDiffusion, Boundary, GaussianPrior, InverseProblem, March, Physics, Steady, point_sensors, simulate,
)
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import assign, coefficients, field

EXACT = {"snes_rtol": 1e-12, "snes_atol": 1e-14}


@pytest.fixture(scope="module")
def made():
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    return V, Function(V), Function(V), TestFunction(V)


def draws(V, n=3):
    return np.random.default_rng(0).standard_normal((n, V.dim()))


def equal_to_a_loop(F, u, m, bcs, rows, problem=None):
    """A block, single solves and the derivative, beside Firedrake's own solves."""
    problem = problem or Steady(F, u, m, bcs)
    states = []
    for row in rows:
        assign(m, row)
        u.assign(0)
        solve(F == 0, u, bcs, solver_parameters=EXACT)
        states.append(coefficients(u))
    u.assign(0)
    m.assign(0)
    size = np.abs(states).max()
    np.testing.assert_allclose(problem.solve_many(rows), states, rtol=0, atol=1e-8 * size)
    for row, state in zip(rows, states):
        np.testing.assert_allclose(coefficients(problem(field(problem.M, row))), state, rtol=0, atol=1e-10 * size)
    if not problem.jumps:
        w, along, h = draws(problem.V, 1), draws(problem.M, 2)[1], 1e-4
        ends = problem.solve_many(rows[0] + h * np.array([[1], [-1]]) * along) @ w[0]
        slope = problem.sensitivity(field(problem.M, rows[0]), w)[0] @ along
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-6 * np.abs(ends).max())
    return problem


@pytest.mark.parametrize("values", [
    [(1, lambda m: m), (2, lambda m: 2 * m)],
    [(1, lambda m: m), ((1, 3), lambda m: 2 + m**2)],
    [(1, lambda m: m + 1), (3, lambda m: Constant(5)), (4, lambda m: m**2)],
    [(3, lambda m: Constant(5)), (1, exp)]], ids=["two", "overlapping", "known between", "known first"])
def test_of_several_conditions_with_the_parameter_the_last_one_holds_at_corners(made, values):
    V, u, m, v = made
    F = inner(grad(u), grad(v)) * dx - v * dx + u * v * dx
    equal_to_a_loop(F, u, m, [DirichletBC(V, value(m), marker) for marker, value in values], draws(V))


def test_a_condition_may_be_undefined_elsewhere(made):
    V, u, m, v = made
    rows = draws(V)
    left = coefficients(Function(V).interpolate(SpatialCoordinate(V.mesh())[0])) < 0.1
    rows[:, left] = np.abs(rows[:, left])
    equal_to_a_loop(inner(grad(u), grad(v)) * dx - v * dx, u, m, DirichletBC(V, sqrt(m), 1), rows)


@pytest.mark.parametrize("term", [
    lambda u, m, v: -conditional(gt(m, 0), 3, 1) * v * dx,
    lambda u, m, v: conditional(gt(m, 0), 3, 1) * inner(grad(u), grad(v)) * dx - v * dx + u * v * dx,
    lambda u, m, v: u**3 * v * dx - conditional(gt(m, 0), 3, 1) * v * ds(1) - v * dx],
    ids=["source", "operator", "flux"])
def test_level_sets_are_solved_and_have_no_derivative(made, term):
    V, u, m, v = made
    F = inner(grad(u), grad(v)) * dx + term(u, m, v)
    problem = equal_to_a_loop(F, u, m, DirichletBC(V, 0, 1), draws(V))
    with pytest.raises(InputError, match="decides a condition.*max_value"):
        problem.sensitivity(m, np.ones((1, V.dim())))
    inverse = InverseProblem(GaussianPrior(V, 1.0, 0.5), problem, point_sensors(V, [(0.5, 0.5)]), 0.1)
    with pytest.raises(InputError, match="decides a condition"):
        simulate(inverse, 2, seed=0, derivatives=True, progress=False)


def test_a_reaction_that_jumps_is_not_linear(made):
    """It is there in all of the domain, and not in a state of zeros."""
    V, u, m, v = made

    def reaction(w):
        return conditional(gt(w, 0.5), 0.1, 0.0)
    F = inner(grad(u), grad(v)) * dx + reaction(u) * v * dx - m * v * dx
    bcs, rows = DirichletBC(V, 1, 1), 0.1 * draws(V)
    assert not equal_to_a_loop(F, u, m, bcs, rows).linear
    ours = AdvectionDiffusion(V, V, "source", Physics(reaction=reaction), Boundary(dirichlet={1: 1}))
    assert not ours.linear
    np.testing.assert_allclose(ours.solve_many(rows), Steady(F, u, m, bcs).solve_many(rows), rtol=0, atol=1e-8)


def test_conditions_in_time_and_of_initial_states(made):
    V, u, m, v = made
    old, t = Function(V), Constant(0.0)
    F = (u - old) / 0.1 * v * dx + inner(grad(u), grad(v)) * dx - conditional(gt(m, t), 1, 0) * v * dx
    bcs, initial, rows = DirichletBC(V, t, 1), conditional(gt(m, 0.5), 1, 0), draws(V)
    found = March(F, u, old, m, 0.1, 0.3, bcs, initial=initial, t=t).solve_many(rows)
    for row, state in zip(rows, found):
        assign(m, row)
        old.interpolate(initial)
        for k in range(3):
            t.assign(0.1 * (k + 1))
            solve(F == 0, u, bcs, solver_parameters=EXACT)
            old.assign(u)
        np.testing.assert_allclose(state, coefficients(u), rtol=0, atol=1e-8)
    for f in (u, m):
        f.assign(0)


def test_parts_of_a_form_have_the_quadrature_of_the_whole(made):
    """Of what is no polynomial, integrals of a part by itself would be others; derivatives would be those of others."""
    V, u, m, v = made
    F = inner(grad(u), grad(v)) * dx + u**7 * v * dx - exp(2 * m) * v * dx + exp(m) * u * v * ds(2)
    equal_to_a_loop(F, u, m, DirichletBC(V, 0, 1), draws(V))


def test_problems_keep_the_quadrature_that_they_were_made_with(made):
    V, u, m, v = made
    rows, bcs = draws(V), DirichletBC(V, 0, 1)
    F = inner(grad(u), grad(v)) * dx - exp(3 * m) * v * dx(degree=1)
    given = NonlinearVariationalProblem(inner(grad(u), grad(v)) * dx - exp(3 * m) * v * dx, u, bcs,
                                        form_compiler_parameters={"quadrature_degree": 1})
    equal_to_a_loop(F, u, m, bcs, rows, Steady.from_problem(given, m))
    a, L = inner(exp(m) * grad(TrialFunction(V)), grad(v)) * dx, exp(3 * m) * (1 + m**4) * v * dx
    both = LinearVariationalProblem(a, L, u, bcs, constant_jacobian=False)
    found, solver = Steady.from_problem(both, m).solve_many(rows), LinearVariationalSolver(both)
    for row, state in zip(rows, found):
        assign(m, row)
        u.assign(0)
        solver.solve()
        np.testing.assert_allclose(state, coefficients(u), rtol=0, atol=1e-6 * np.abs(state).max())
    for f in (u, m):
        f.assign(0)
    with pytest.raises(InputError, match="restrict=False"):
        Steady.from_problem(NonlinearVariationalProblem(F, u, bcs, restrict=True), m)


def test_what_a_linear_form_and_its_spaces_cannot_be_is_told(made):
    V, u, m, v = made
    R, W = FunctionSpace(V.mesh(), "R", 0), VectorFunctionSpace(V.mesh(), "CG", 1)
    a = inner(grad(u), grad(v)) * dx
    pairs, vectors, several = Function(V * V), Function(W), Function(V * R)
    w, q = TestFunctions(V * R)
    one, number = split(several)
    for F, state, parameter, bcs, words in (
            (a - m * dx, u, m, (), "not linear in its test function.*once"),
            (a - m * v**2 * dx, u, m, (), "not linear in its test function"),
            (a - interpolate(exp(m), V) * v * dx, u, m, (), "interpolation"),
            (a - split(pairs)[0] * v * dx - pairs.subfunctions[1] * v * dx, u, pairs, (), r"split\(m\)"),
            (a - vectors[0] * v * dx - vectors.sub(1) * v * dx, u, vectors, (), r"m\[i\]"),
            (a - vectors[0] * v * dx, u, vectors, DirichletBC(V, 2 * vectors.sub(0), 1), r"m\[i\]"),
            (inner(grad(one), grad(w)) * dx + number * w * dx + one * q * dx - m * w * dx, several, m, (), "numbers"),
            (conditional(gt(u, 0), 1, 0) * v * dx - m * v * dx, u, m, (), "is zero"),
            (a - m * v * dx, u, m, None, "sequence of DirichletBC"),
            (a - m * v * dx, u, m, EquationBC(u * v * ds(1) == 0, u, 1), "DirichletBC.*weakly")):
        with pytest.raises(InputError, match=words):
            Steady(F, state, parameter, bcs)
    # A component that is known.
    known = Steady(a + vectors.sub(0) * u * v * dx - m * v * dx, u, m, DirichletBC(V, 0, 1))
    assert np.isfinite(known.solve_many(draws(V))).all()


def test_what_changes_beside_the_coefficients_is_told(made):
    V, u, m, v = made
    bc, rows, x = DirichletBC(V, 1.0, 1), draws(V), V.mesh().coordinates
    problem = Steady(inner(grad(u), grad(v)) * dx - m * v * dx, u, m, bc)
    before, places = problem.solve_many(rows), x.copy(deepcopy=True)
    bc.set_value(1.0)   # as it was
    np.testing.assert_array_equal(problem.solve_many(rows), before)
    bc.set_value(2.0)
    with pytest.raises(InputError, match="condition.*has changed"):
        problem.solve_many(rows)
    bc.set_value(1.0)
    x.assign(2 * places)
    try:
        with pytest.raises(InputError, match="coordinates.*has changed"):
            problem(m)
    finally:
        x.assign(places)


@pytest.mark.parametrize("pressure", [False, True])
def test_iterations_do_not_hide_what_is_left_open(made, pressure):
    V, u, m, v = made
    if pressure:
        Z = MixedFunctionSpace([V, V])   # the second component is open up to a constant
        u, m = Function(Z), Function(Z)
        (a, b), (w, q) = split(u), TestFunctions(Z)
        F = a * w * dx + inner(grad(a), grad(w)) * dx + inner(grad(b), grad(q)) * dx - m[0] * w * dx
    else:
        F = inner(grad(u), grad(v)) * dx - m * v * dx
    problem = Steady(F, u, m, solver_parameters={"ksp_type": "gmres", "pc_type": "none"})
    with pytest.raises(SolveError, match="singular"):
        problem(m)
