"""What the problem classes share: blocks of owned coefficients, a vector a row, products with the derivative, tapes."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from firedrake import Cofunction, Function
from firedrake.adjoint import annotate_tape
from firedrake.functionspaceimpl import WithGeometry
from pyadjoint import Block, get_working_tape, no_annotations, stop_annotating
from scipy.sparse import spmatrix
from ufl.core.expr import Expr

from fem_diffusion.checks import check_count
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import assign, coefficients, owned_size
from fem_diffusion.fields.checks import check_function
from fem_diffusion.forward.adjoint import Backward
from fem_diffusion.forward.stepper import Lose, Stepper, refuse
from fem_diffusion.forward.protocol import dense_rows
from fem_diffusion.forward.solvers import NOT_FINITE, norms

__all__ = ["JUMPS", "BlockForward", "SkippedWarning", "check_parameter"]

LARGEST = 256          # coefficients of a parameter, on all ranks, up to which responses to each of them are kept
MEMORY = 500_000_000   # bytes of these responses, on this rank
JUMPS = ("The parameter decides a condition, as in conditional(gt(m, 0), a, b), and derivatives know nothing of a jump"
         ": write what is continuous with max_value, min_value or abs; else take what needs no derivative, such "
         "as fit, or pcn in place of hmc.")
MAKE = "make one with Function(problem.M).interpolate(...)"


class SkippedWarning(UserWarning):
    """Samples whose solve failed are missing; what is learned from the others has the prior conditioned on success."""


class BlockForward:
    """A forward problem that solves for many parameters together wherever it can."""

    U: WithGeometry

    def __init__(self, stepper: Stepper, m: Function) -> None:
        self._stepper, self.m, self.V, self.M = stepper, m, stepper.V, stepper.M
        self.linear, self.operator_depends_on_parameter = stepper.linear, stepper.by_member

    @cached_property
    def jumps(self) -> bool:
        """Whether the parameter decides a condition, as that of a level set, so that there is no `sensitivity`."""
        return self._stepper.e.jumps

    def __repr__(self) -> str:
        names = [x.kind if x.marker is None else (x.kind, x.marker) for x in self._stepper.e.unknowns]
        return (f"{type(self).__name__}(V={self.V.ufl_element()} on {self.V.mesh().name}, {self.V.dim()} unknowns; "
                f"parameter: {names[0] if len(names) == 1 else names}, {self.M.dim()} coefficients)")

    def __call__(self, m: Function) -> Function:
        """The state, a new Function in `U`, for a parameter in `M`; recorded if a tape of firedrake.adjoint is running.

        A steady problem with one unknown is recorded as Firedrake's own solve, any other as one block without second
        derivatives. InputError if m is not a Function in M or a coefficient has changed since the problem was made,
        SolveError if the solver fails.
        """
        check_parameter(m, self.M)
        self._stepper.kept.check()
        if not annotate_tape() or (self._stepper.e.steps is None and self._stepper.one):
            return self._alone(m)
        with stop_annotating():
            state = self._alone(m)
        block = _ForwardBlock(self, m)
        get_working_tape().add_block(block)
        block.add_output(state.create_block_variable())
        return state

    def solve_many(self, ms: Sequence[Function] | np.ndarray, block: int = 64,
                   on_failure: str | Callable[[int, str], object] = "raise") -> np.ndarray:
        """Owned coefficients (n, n_owned of U) of the states of many parameters, as in ``u.dat.vec_ro``.

        Blocks share one factorisation wherever the problem allows. A sample that does not converge with its block is
        solved by itself, from the usual start and then, of a steady problem, along the way from a parameter whose state
        is known. What is lost then has failed. InputError if an argument has the wrong kind or shape, on any rank.

        Parameters
        ----------
        ms : sequence of Function, or ndarray
            Parameters in `M`, or their owned coefficients of shape (n, n_owned of M), as in ``m.dat.vec_ro``.
        block : int
            Samples solved together.
        on_failure : "raise", "nan" or callable
            What a sample without a state does: SolveError, which names the first one; NaN in its row, with one
            SkippedWarning that names them; or that and a call with its number and the reason, on all ranks, and no
            warning.
        """
        ms, block = _parameter_rows(ms, self.M), check_count(block, "block")
        if on_failure not in ("raise", "nan") and not callable(on_failure):
            raise InputError(f"on_failure is {on_failure!r}: give 'raise', 'nan' or a function of number and reason.")
        out, lost = np.empty((len(ms), owned_size(self.U))), {}
        self._stepper.kept.check()
        with stop_annotating():
            few = self._stepper.affine and ("_response" in vars(self) or self._pays(len(ms)))
            for first in range(0, len(ms), block):
                part = slice(first, first + block)
                if few:   # sums of responses
                    base, rows = self._response
                    out[part] = base + np.concatenate(self.M.comm.allgather(ms[part]), axis=1) @ rows
                else:
                    out[part] = self._states(ms[part], lambda i, why: lost.setdefault(first + i, why))
                for i in np.flatnonzero(~np.isfinite(norms(out[part], self.V.mesh().comm))):
                    lost.setdefault(first + int(i), NOT_FINITE)
                if lost and on_failure == "raise":
                    break
        self._tell(lost, len(ms), on_failure)
        out[list(lost)] = np.nan
        return out

    def _tell(self, lost: dict[int, str], n: int, on_failure: str | Callable[[int, str], object]) -> None:
        """Raise, warn or call, as `solve_many` has it."""
        if not lost:
            return
        if callable(on_failure):
            for number, why in sorted(lost.items()):
                on_failure(number, why)
            return
        number, why = min(lost.items())
        if on_failure == "raise":
            raise SolveError(f"sample {number}: {why} on_failure='nan' goes on without it.")
        names = ", ".join(map(str, sorted(lost)[:10])) + ", ..." * (len(lost) > 10)
        warnings.warn(f"{len(lost)} of {n} samples have no state ({names}) and are NaN; the first: {why}",
                      SkippedWarning, stacklevel=3)

    def _alone(self, m: Function) -> Function:
        """The state of one parameter."""
        raise NotImplementedError

    def _states(self, ms: np.ndarray, lose: Lose = refuse) -> np.ndarray:
        """States (n, n_owned of U) of one block, NaN for those that `lose` hears of."""
        size, out = self._stepper.most or len(ms), np.full((len(ms), owned_size(self.U)), np.nan)
        for i in range(0, len(ms), size):
            part = ms[i:i + size]
            try:
                out[i:i + size] = self._stepper.run(part, lambda j, why: lose(i + j, why)).reshape(len(part), -1)
            except SolveError as error:
                if len(part) > 1:   # what they share fails
                    raise
                lose(i, str(error))
        return out

    def _pays(self, n: int) -> bool:
        """Whether n samples are enough to keep the responses to each coefficient of the parameter."""
        comm, size = self.M.comm, owned_size(self.U)
        return self.M.dim() <= min(n, LARGEST) and comm.allreduce(self.M.dim() * size * 8) / comm.size <= MEMORY

    @cached_property
    def _response(self) -> tuple[np.ndarray, np.ndarray]:
        """State at zero (1, n_owned of U), and what a unit of each coefficient adds (dim of M, n_owned of U)."""
        owned, comm = owned_size(self.M), self.M.comm
        first = sum(comm.allgather(owned)[:comm.rank])
        base = self._states(np.zeros((1, owned)))
        return base, self._states(np.eye(self.M.dim(), owned, -first)) - base

    @no_annotations
    def sensitivity(self, m: Function, rows: spmatrix | np.ndarray, state: Function | None = None) -> np.ndarray:
        """``d(rows·u)/dm``, this rank's columns of it, (k, n_owned of M), by the adjoint of all rows together.

        InputError if m, state or rows do not fit their spaces or are not finite, or the problem `jumps`; SolveError if
        a state that is needed is not found.

        Parameters
        ----------
        m : Function
            Parameter in `M`.
        rows : scipy sparse matrix or ndarray
            Observation rows of shape (k, n_owned of U): this rank's columns of the global rows.
        state : Function, optional
            ``problem(m)`` where it is known already; saves a steady problem a solve.
        """
        if self.jumps:
            raise InputError(JUMPS)
        check_function(m, self.M, "the parameter", MAKE)
        array = dense_rows(rows, self.U)
        if state is not None:
            check_function(state, self.U, "state", "pass problem(m)")
        self._stepper.kept.check()
        array = array.reshape(len(array), owned_size(self.V), -1)
        return self._backward.rows(coefficients(m)[None], array, self._path(m, state))

    @cached_property
    def _backward(self) -> Backward:
        return Backward(self._stepper)

    def _path(self, m: Function, state: Function | None) -> list[np.ndarray] | None:
        """States at all steps, where they are known already; the march back finds those that it needs."""


class _ForwardBlock(Block):
    """The map from parameter to state on the tape; its adjoint is `sensitivity` with one row."""

    def __init__(self, problem: BlockForward, m: Function) -> None:
        super().__init__()
        self.problem = problem
        self.add_dependency(m)

    def recompute_component(self, inputs: list, block_variable: object, idx: int, prepared: object) -> Function:
        """The state for a new parameter."""
        with stop_annotating():
            return self.problem(inputs[0])

    def evaluate_adj_component(self, inputs: list, adj_inputs: list, block_variable: object, idx: int,
                               prepared: object = None) -> Cofunction:
        """The derivative with respect to the parameter."""
        gradient = Cofunction(self.problem.M.dual())
        assign(gradient, self.problem.sensitivity(inputs[0], coefficients(adj_inputs[0])[None])[0])
        return gradient


def check_parameter(m: Function, M: WithGeometry) -> None:
    """Refuse what is no Function in M; one that is not finite is left to the solver."""
    if not isinstance(m, Function) or m.function_space() != M:
        check_function(m, M, "the parameter", MAKE)


def _parameter_rows(ms: Any, M: WithGeometry) -> np.ndarray:
    """Owned coefficients (n, n_owned of M) of Functions or of an array, checked on all ranks together."""
    if isinstance(ms, Function):
        raise InputError("solve_many takes a sequence of parameters: put the single Function in a list.")
    if not isinstance(ms, np.ndarray):
        ms = list(ms) if isinstance(ms, Iterable) and not isinstance(ms, (Expr, Mapping)) else [None]
        if not all(isinstance(m, Function) and m.function_space() == M for m in ms):
            raise InputError(f"every parameter must be a Function in {M}: {MAKE}.")
        ms = np.array([coefficients(m) for m in ms]).reshape(len(ms), owned_size(M))
    good = ms.ndim == 2 and ms.shape[1] == owned_size(M) and ms.dtype.kind in "fiu"
    everywhere = M.comm.allgather((good, ms.shape[:1]))
    if not all(ok for ok, _ in everywhere) or len(set(n for _, n in everywhere)) > 1:
        raise InputError(f"the parameters are {ms.shape} of {ms.dtype}: give an array (n, {owned_size(M)}) of real "
                         "numbers here, with the same n on every rank (owned coefficients, as in m.dat.vec_ro).")
    return ms
