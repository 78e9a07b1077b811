r"""Derivatives of any solver that ``firedrake.adjoint`` can record.

A solve leaves a tape of blocks, each of which knows its own derivative. For a row w over the coefficients of the
state, one sweep back through the tape gives :math:`w^T \partial u / \partial m`.

The tape is made afresh by every solve, of the user's own function, and never replayed at another parameter: a replay
takes as long, follows no branch that another parameter would take, and gives wrong derivatives in silence where
Dirichlet values of a solver that is built once depend on the parameter (firedrake 2026.10). What a tape does not see,
such as a step through NumPy, it leaves out of the derivative, in silence as well. So the first derivative is compared
with differences of the function itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from firedrake import Cofunction, Constant, ConvergenceError, Function
from firedrake.adjoint import (
    Control, Tape, annotate_tape, compute_derivative, continue_annotation, get_working_tape, pause_annotation,
    set_working_tape,
)
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from scipy.sparse import spmatrix

from fem_diffusion.checks import check_kind
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.checks import check_function
from fem_diffusion.fields.coefficients import assign, by_component, coefficients, field, largest, owned_size
from fem_diffusion.forward.callable import CallableForward
from fem_diffusion.forward.protocol import dense_rows

__all__ = ["Taped"]

_MAKE = "make one with Function(M).interpolate(...)"
# Steps of differences, in units of the direction, and what two of them may differ by, at best and at worst.
_STEPS, _SETTLED, _UNSETTLED = (1e-2, 1e-3, 1e-4, 1e-6, 1e-1), 1e-3, 2e-2
# What a tape may miss of a derivative: quadrature of a form and of its derivative are not quite the same.
_MISSED = 2e-2
# Rows that are compared for each component of the state; responses below these shares count as none.
_ROWS, _ROUNDING, _SMALL = 3, 1e-9, 1e-3
_REMEDY = ("let every step from the parameter to the state be one of Firedrake (no NumPy, no .dat), or give an object "
           "with sensitivity(m, rows) as Differentiable has it")


class Taped(CallableForward):
    """A solver with the derivative that ``firedrake.adjoint`` records.

    From the first derivative on, the last solve is kept with its tape, so that a derivative at the same parameter costs
    one sweep a row and no solve. The tape is its own: one that the user records is left alone, but for a call while it
    runs, which is recorded there.

    Parameters
    ----------
    forward : callable or ReducedFunctional
        ``m -> u``, of which every step is one of Firedrake; or an object with ``derivative(adj_input=...)`` as well,
        such as a ReducedFunctional of one control in M whose functional is the state. Such an object has its own tape
        and replays it, and is solved again for a derivative.
    M, U : FunctionSpace
        Of the parameter and, where it is given, of the state; states in another one are refused.

    InputError if it is neither, or the object has other controls.
    """

    def __init__(self, forward: Callable[[Function], Function], M: WithGeometry, U: WithGeometry | None = None) -> None:
        super().__init__(forward, M, U)
        self._pulls: Callable | None = getattr(forward, "derivative", None)
        controls = list(getattr(forward, "controls", ()))
        if self._pulls is not None and controls and [_space(x.control) for x in controls] != [M]:
            raise InputError(f"The ReducedFunctional has {len(controls)} controls, in {_space(controls[0].control)}: "
                             f"give one of a single control in {M}; a mixed space holds several unknowns.")
        self._last: _Solved | None = None
        self._trusted = False

    def __repr__(self) -> str:
        return super().__repr__().replace("CallableForward", "Taped", 1)

    def __call__(self, m: Function) -> Function:
        """The state for a parameter; recorded by the user's tape where one is running."""
        if annotate_tape() or not self._trusted:
            return super().__call__(m)
        return field(*self._at(check_function(m, self.M, "the parameter", _MAKE)).state)

    def sensitivity(self, m: Function, rows: spmatrix | np.ndarray) -> np.ndarray:
        """``rows · du/dm``, this rank's columns of it, shape (k, n_owned of M), by one sweep back for each row.

        `rows` are this rank's columns (k, n_owned of U). The first time the derivative is checked as by `check`.
        InputError if the check finds it wrong, or an argument does not fit; what a solve raises is passed on.
        """
        check_function(m, self.M, "the parameter", _MAKE)
        if not self._trusted:
            self.check(m)
        solved = self._at(m)
        return self._pulled(solved, dense_rows(rows, solved.state[0]))

    def check(self, m: Function, direction: Function | None = None, rows: spmatrix | np.ndarray | None = None) -> None:
        """Compare the derivative with differences of the solver, by some five solves for each component of M.

        InputError where more than 2 % of the change is missing, or differences do not settle, so that nothing can be
        compared.

        Parameters
        ----------
        m, direction : Function
            Where, and how parameters vary; where the latter is left out, at random and by the size of m.
        rows : scipy sparse matrix or ndarray
            What is seen of the state, this rank's columns (k, n_owned of U); where left out, all of its components.
        """
        base = coefficients(check_function(m, self.M, "the parameter", _MAKE))
        comm, rng = self.M.comm, np.random.default_rng([1, self.M.comm.rank])
        if direction is not None:
            along = coefficients(check_function(direction, self.M, "direction", _MAKE))
        else:
            along = np.concatenate([(largest(comm, part) or 1.0) * rng.standard_normal(part.shape[1])
                                    for part in by_component(self.M, base[None])])
        solved = self._at(m)
        U, state = solved.state
        if rows is None:
            # Each component of the state by itself: pressures beside velocities hide nothing.
            seen = rng.standard_normal((_ROWS, len(U), len(state))) * (_parts(U) == np.arange(len(U))[:, None])
            seen = seen.reshape(-1, len(state))
        else:
            seen = dense_rows(rows, U)
        few = len(seen) <= _ROWS * max(len(U), 2)
        mix = np.eye(len(seen)) if few else np.random.default_rng(2).standard_normal((_ROWS, len(seen)))
        for i in range(len(self.M)):
            part = np.where(_parts(self.M) == i, along, 0.0)
            if not largest(comm, part) > 0:
                continue
            change, sizes, doubts = self._difference(base, part, seen, solved.state)
            good = (sizes > 0) & (doubts < _UNSETTLED)
            weights = mix / np.where(good, sizes, np.inf)
            pulled = self._pulled(solved, weights @ seen)
            missing = np.abs(comm.allreduce(pulled @ part) - weights @ change)
            share = float(missing.max(initial=0.0)) / (1.0 if few else max(good.sum(), 1)**0.5)
            if share > _MISSED + doubts[good].max(initial=0.0):
                self._refuse(share, i, not largest(comm, pulled * (part != 0)) > 0)
        self._trusted = True

    def _refuse(self, share: float, i: int, nothing: bool) -> None:
        """InputError: a share of the change with component i of the parameter is missing on the tape."""
        of = f" (component {i})" if len(self.M) > 1 else ""
        if nothing:
            raise InputError(f"The state changes with the parameter{of}, and the tape of firedrake.adjoint knows "
                             f"nothing of it: {_REMEDY}.")
        raise InputError(f"The derivative that firedrake.adjoint records misses {share:.0%} of how the state changes "
                         f"with the parameter{of}: {_REMEDY}; where little is missing, give measures a quadrature "
                         "degree, such as dx(degree=4).")

    def _difference(self, base: np.ndarray, along: np.ndarray, rows: np.ndarray,
                    state: tuple[WithGeometry, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Change of what rows (k, n_owned of U) see along a direction, from differences; sizes and doubts, (k,) each.

        A size of zero says that a row sees no change.
        """
        comm, found = self.M.comm, None

        def size(x: np.ndarray) -> np.ndarray:
            # Without cancellation, so that a row that sees next to nothing does not count as one that sees much.
            return np.sqrt(comm.allreduce(((rows * x)**2).sum(axis=1))) + np.abs(comm.allreduce(rows @ x))
        level = size(state[1])
        for step in _STEPS:
            try:
                whole, half = ((self._plain(base + h * along, state[0]) - self._plain(base - h * along, state[0]))
                               / (2 * h) for h in (step, step / 2))
            except InputError:
                raise
            except Exception:   # whatever a solver of the user's own raises where it finds no state
                continue
            change = (4 * half - whole) / 3
            sizes = size(change)
            sizes[sizes <= _ROUNDING / step * level] = 0.0
            doubts = np.abs(comm.allreduce(rows @ (whole - half))) / np.where(sizes > 0, sizes, np.inf)
            relative = sizes / np.where(level > 0, level, 1.0)
            worst = float(doubts[relative >= _SMALL * relative.max(initial=0.0)].max(initial=0.0))
            if found is None or worst < found[0]:
                found = worst, comm.allreduce(rows @ change), sizes, doubts
            if worst < _SETTLED:
                break
        if found is None or found[0] > _UNSETTLED:
            raise InputError("Differences of the forward problem do not settle"
                             + (", because its solves fail" if found is None else f" (to {found[0]:.0%} at best)")
                             + ", so a derivative cannot be checked: tighten the solver's tolerances, or look for "
                             "jumps in how the state depends on the parameter.")
        return found[1:]

    def _plain(self, values: np.ndarray, U: WithGeometry) -> np.ndarray:
        """Owned coefficients of the state, without a record of it."""
        with _own_tape(False):
            return coefficients(_state(super().__call__(field(self.M, values)), U))

    def _at(self, m: Function) -> "_Solved":
        """The solve at a parameter, with its tape: the last one, or a new one."""
        values = coefficients(m)
        last = self._last
        if last is not None and self.M.comm.allreduce(np.array_equal(last.values, values), MPI.LAND):
            return last
        self._last = None   # whatever happens next
        if self._pulls is not None:
            return self._of_functional(values, self._pulls)
        with _own_tape(True) as tape:
            start = field(self.M, values)
            control = _Start(start)
            try:
                u = _state(super().__call__(start), self.U)
                continue_annotation()   # which a solver that records by itself has paused
                # A copy is ours: the user may use the same Functions for the next solve.
                end = u.copy(deepcopy=True)
            except (SolveError, ConvergenceError, InputError):
                raise
            except Exception as error:
                self._explain(values, error)
                raise
            state = end.function_space(), coefficients(end)
        _release(tape, end)

        def pull(row: Cofunction) -> Cofunction | None:
            return compute_derivative(end, control, tape=tape, adj_value=row)
        self._last = _Solved(values, state, pull, tape)
        return self._last

    def _explain(self, values: np.ndarray, error: Exception) -> None:
        """InputError where a solve has failed because it was recorded."""
        try:
            self._plain(values, self.U)
        except Exception:
            return
        raise InputError(f"firedrake.adjoint cannot record the forward problem ({type(error).__name__}: "
                         f"{' '.join(str(error).split())}): give an object with sensitivity(m, rows).") from error

    def _of_functional(self, values: np.ndarray, derivative: Callable) -> "_Solved":
        """A solve by an object with a derivative; none is kept, because others may use it meanwhile."""
        tape = getattr(self.function, "tape", None)
        with _own_tape(False, tape):
            u = _state(super().__call__(field(self.M, values)), self.U)
            state = u.function_space(), coefficients(u)
        return _Solved(values, state, lambda row: derivative(adj_input=row), tape)

    def _pulled(self, solved: "_Solved", rows: np.ndarray) -> np.ndarray:
        """Derivative (k, n_owned of M) of rows (k, n_owned of U)."""
        result = np.zeros((len(rows), owned_size(self.M)))
        with _own_tape(False, solved.tape) as tape, _factors_kept(tape):
            for row, line in zip(rows, result):
                found = solved.pull(assign(Cofunction(solved.state[0].dual()), row))
                if found is not None:
                    line[:] = coefficients(check_kind(found, "The derivative of the forward problem", Cofunction,
                                                      "a Cofunction, without a Riesz map"))
        return result


@dataclass(frozen=True, eq=False)
class _Solved:
    """A solve: owned coefficients of the parameter, space of the state and its own, and how a row is pulled back."""

    values: np.ndarray
    state: tuple[WithGeometry, np.ndarray]
    pull: Callable[[Cofunction], Cofunction | None]
    tape: Tape | None


class _Start(Control):
    """A control that tells that there is no dependence by None, where pyadjoint writes to the log."""

    def get_derivative(self, apply_riesz: bool = False) -> Any:
        return self.block_variable.adj_value


@contextlib.contextmanager
def _own_tape(record: bool, tape: Tape | None = None) -> Iterator[Tape]:
    """A tape that works, and records or not; after it the user's own works again, and runs if it did."""
    running = annotate_tape()
    try:
        with set_working_tape(tape) as own:
            (continue_annotation if record else pause_annotation)()
            yield own
    finally:
        (continue_annotation if running else pause_annotation)()


@contextlib.contextmanager
def _factors_kept(tape: Tape) -> Iterator[None]:
    """Solvers that are built once keep the factors of their adjoint for all rows, and for none of another parameter."""
    # These are Firedrake's own: where it has no such names, each row costs a factorisation.
    kept = [x for block in tape.get_blocks() if isinstance(x := getattr(block, "_ad_solvers", None), dict)]
    for solvers in kept:
        solvers["update_adjoint"] = True   # for a Jacobian that is constant at one parameter
    adjoints = [x["adjoint_lvs"] for x in kept if hasattr(x.get("adjoint_lvs"), "invalidate_jacobian")]
    # One that several blocks share, as steps in time do, has another Jacobian at each.
    once = [x for x in adjoints if sum(x is y for y in adjoints) == 1 and not x._problem._constant_jacobian]
    for adjoint in once:
        adjoint._problem._constant_jacobian = True
        adjoint.invalidate_jacobian()
    try:
        yield
    finally:
        for adjoint in once:
            adjoint._problem._constant_jacobian = False


def _release(tape: Tape, end: Function) -> None:
    """Let all Functions but `end` forget a tape, so that the next one sees the values that they have then."""
    # What another tape may hold is an input to it where it was written into, as after stop_annotating(modifies).
    alone = not annotate_tape() and not get_working_tape().get_blocks()
    for block in tape.get_blocks():
        for variable in [*block.get_outputs(), *(block.get_dependencies() if alone else ())]:
            mine = variable.output
            known = isinstance(mine, (Function, Cofunction, Constant)) and mine is not end
            if known and mine.block_variable is variable:
                mine.clear_block_variable()


def _parts(V: WithGeometry) -> np.ndarray:
    """Number of the component that each owned coefficient is of, shape (n_owned,)."""
    return np.repeat(np.arange(len(V)), [owned_size(W) for W in V])


def _space(x: Any) -> WithGeometry | None:
    """Function space of a Function; None of anything else."""
    return x.function_space() if isinstance(x, Function) else None


def _state(u: Any, U: WithGeometry | None) -> Function:
    """The state, a Function; InputError where it is something else, such as a number."""
    return check_kind(u, "What the forward problem returned", Function,
                      "the state, a Function" + (f" in {U}" if U is not None else ""))
