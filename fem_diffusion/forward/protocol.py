"""What a forward problem is to this package: the door for solvers of your own.

A plain function ``m -> u`` will do everywhere (`as_forward` wraps it). A class with the methods below is faster where
many solves share work, and one with a derivative serves Gauss-Newton, Laplace and Hamiltonian Monte Carlo as well.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from firedrake import Function
from firedrake.functionspaceimpl import WithGeometry
from scipy.sparse import spmatrix

from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_rows
from fem_diffusion.fields.coefficients import owned_size
from fem_diffusion.observation.linear import Observation

__all__ = ["Differentiable", "Forward", "dense_rows"]


@runtime_checkable
class Forward(Protocol):
    """The map from a parameter to a state; it has no memory, and the same parameter gives the same state.

    Attributes
    ----------
    M, U : FunctionSpace
        Of the parameter and of the state; U is None where it is not known before the first solve.
    """

    M: WithGeometry
    U: WithGeometry | None

    def __call__(self, m: Function) -> Function:
        """The state, a new Function in U, for a Function in M; SolveError where there is none."""

    def solve_many(self, parameters: np.ndarray) -> np.ndarray:
        """Owned coefficients of the states, shape (B, n_owned of U), for those of parameters, (B, n_owned of M)."""
        ...


@runtime_checkable
class Differentiable(Forward, Protocol):
    """A forward problem that knows its derivative."""

    def sensitivity(self, m: Function, rows: spmatrix | np.ndarray) -> np.ndarray:
        """``rows · du/dm`` at m: owned columns (k, n_owned of M), of rows whose owned columns are (k, n_owned of U)."""
        ...


def dense_rows(rows: Any, U: WithGeometry) -> np.ndarray:
    """Rows over the owned coefficients of a state as an array (k, n_owned of U), as many on every rank.

    InputError if they are of another shape, not finite, or an Observation.
    """
    if isinstance(rows, Observation):
        raise InputError("rows is an Observation: pass its rows, observation.rows.")
    array = check_rows(getattr(rows, "toarray", lambda: rows)(), U, "rows (owned coefficients of the state)")
    if len(set(U.comm.allgather(len(array)))) > 1:
        raise InputError(f"rows has {len(array)} rows on this rank and another number elsewhere: give shape (k, "
                         f"{owned_size(U)}) here, with the same k on every rank.")
    return array
