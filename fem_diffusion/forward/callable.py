"""Solvers of the user's own that are plain functions."""

from collections.abc import Callable
from typing import Any

import numpy as np
from firedrake import Function
from firedrake.adjoint import stop_annotating
from firedrake.functionspaceimpl import WithGeometry

from fem_diffusion.checks import check_callable, together
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, field, owned_size
from fem_diffusion.fields.checks import check_space
from fem_diffusion.forward.protocol import Forward

__all__ = ["CallableForward", "as_forward", "check_state"]


class CallableForward:
    """A forward problem made of a function that solves for one parameter; a block of them is a loop.

    Parameters
    ----------
    function : callable
        ``m -> u``. It gets a new Function, and may return the same one again and again. What it raises on one rank is
        raised on all.
    M, U : FunctionSpace
        Of the parameter and, where it is given, of the state; states in another one are refused.
    """

    def __init__(self, function: Callable[[Function], Function], M: WithGeometry, U: WithGeometry | None = None
                 ) -> None:
        self.function = check_callable(function, "forward", "a function m -> u", 1)
        self.M, self.U = check_space(M, "M"), None if U is None else check_space(U, "U")

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"CallableForward({name}; parameter: {self.M.ufl_element()}, {self.M.dim()} coefficients)"

    def __call__(self, m: Function) -> Function:
        """What the function returns for a parameter (collective)."""
        return together(self.M.comm, lambda: self._solved(m), watched=True)

    def _solved(self, m: Function) -> Function:
        """As a call, on this rank alone."""
        u = self.function(m)
        return u if self.U is None else check_state(u, self.U)

    def solve_many(self, parameters: np.ndarray) -> np.ndarray:
        """States (B, n_owned of U) of parameters (B, n_owned of M), one by one; what a solve raises is passed on."""
        rows = []
        for row in parameters:
            with stop_annotating():
                u = self(field(self.M, row))
            rows.append(coefficients(together(self.M.comm, lambda: _function(u))))
        return np.array(rows).reshape(len(rows), -1 if rows else owned_size(self.U) if self.U else 0)


def check_state(u: Any, U: WithGeometry) -> Function:
    """What a forward problem has returned, a Function in U; InputError where it is something else."""
    if isinstance(u, Function) and u.function_space() == U:
        return u
    what = type(u).__name__
    if isinstance(u, Function):
        V = u.function_space()
        what = f"a Function in {V.ufl_element()}" + " on another mesh" * (V.mesh() != U.mesh())
    raise InputError(f"The forward problem returned {what}: return a Function in {U.ufl_element()} on the mesh of the "
                     "observation, or build it and the observation on the same space.")


def _function(u: Function) -> Function:
    if not isinstance(u, Function):
        raise InputError(f"The forward problem returned {type(u).__name__}: return a Function.")
    return u


def as_forward(forward: Forward | Callable[[Function], Function], M: WithGeometry) -> Forward:
    """A forward problem as it is, or a plain function ``m -> u`` of Functions in M as a `CallableForward`."""
    if isinstance(forward, type) or not hasattr(forward, "solve_many"):
        return CallableForward(forward, M)
    missing = [name for name in ("M", "U", "__call__") if not hasattr(forward, name)]
    if missing or not isinstance(forward, Forward):
        raise InputError(f"The forward problem is of type {type(forward).__name__}, which has solve_many but no "
                         f"{', '.join(missing)}: give it what fem_diffusion.forward.protocol.Forward lists.")
    return forward
