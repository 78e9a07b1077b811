"""Forward problems of the user's own: plain functions and objects with solve_many."""

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, UnitIntervalMesh

from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary
from fem_diffusion.forward.callable import CallableForward, as_forward
from fem_diffusion.forward.protocol import Differentiable, Forward

V, W = (FunctionSpace(UnitIntervalMesh(4), "CG", degree) for degree in (1, 2))
ROWS = np.arange(15.0).reshape(3, 5)


def test_a_plain_function_solves_one_by_one_and_our_problems_are_kept():
    problem = AdvectionDiffusion(V, V, "source", bcs=Boundary(dirichlet={1: 0}))
    wrapped = as_forward(lambda m: problem(m), V)
    assert isinstance(wrapped, Forward) and not isinstance(wrapped, Differentiable)
    np.testing.assert_allclose(wrapped.solve_many(ROWS), problem.solve_many(ROWS), atol=1e-12)
    assert as_forward(problem, V) is problem and isinstance(problem, Differentiable)
    assert CallableForward(problem, V, V).solve_many(ROWS[:0]).shape == (0, 5)
    assert repr(wrapped).startswith("CallableForward(<lambda>")


def test_a_function_that_returns_the_same_function_again_and_fails_for_one():
    kept = Function(V)

    def solver(m):
        if m.dat.data_ro[0] == 5.0:
            raise SolveError("no state.")
        return kept.assign(2 * m)
    forward = CallableForward(solver, V)
    np.testing.assert_array_equal(forward.solve_many(ROWS[[0, 2]]), 2 * ROWS[[0, 2]])
    with pytest.raises(SolveError):
        forward.solve_many(ROWS)


@pytest.mark.parametrize("make, words", [
    (lambda: as_forward(3, V), "forward is 3: give a function"),
    (lambda: as_forward(AdvectionDiffusion, V), "give a function"),
    (lambda: as_forward(lambda: None, V), "does not take 1 arguments"),
    (lambda: CallableForward(Function, V), "give a function"),
    (lambda: CallableForward(lambda m: m, None), "M must be a FunctionSpace"),
    (lambda: CallableForward(lambda m: m, V, W).solve_many(ROWS), "returned a Function in .*: return a Function in"),
    (lambda: CallableForward(lambda m: 1.0, V).solve_many(ROWS), "returned float: return a Function"),
])
def test_what_is_no_forward_problem_gets_a_remedy(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_an_object_with_solve_many_needs_its_spaces():
    class Half:
        solve_many = staticmethod(lambda ms: ms)
    with pytest.raises(InputError, match="no M, U, __call__: give it"):
        as_forward(Half(), V)
