"""Solves of a forward problem for many prior samples, of which some may fail, on any number of ranks.

What a failure is: the user's code raises, or parameter, state or readings are not finite. What no failure is: a
mistake, such as a state in another space (`InputError`), which every sample would repeat.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field as dataclass_field
from functools import cached_property
from typing import Any

import numpy as np
from firedrake import Function
from mpi4py import MPI

from fem_diffusion.checks import LARGEST, MISTAKES, together
from fem_diffusion.errors import DataError, InputError, SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.checks import solver_reason
from fem_diffusion.fields.coefficients import coefficients, field, owned_size
from fem_diffusion.forward.blocks import BlockForward
from fem_diffusion.forward.callable import CallableForward
from fem_diffusion.forward.taped import Taped
from fem_diffusion.observation.family import SensorFamily
from fem_diffusion.observation.linear import Observation, no_sensors
from fem_diffusion.prior.chain_rule import ChainRule
from fem_diffusion.problem import InverseProblem
from fem_diffusion.simulation.data_set import Block

__all__ = ["Job", "Solved", "Tally", "block_seed", "check_lengths"]

# Samples that are solved by themselves, the first ones that succeed: a changed prior, solver or sensor shows in them.
_PROBES, _CANDIDATES = 2, 8
# Step of differences in prior standard deviations, and how far a derivative may be from them.
_STEP, _OFF = 0.1, 0.2
# Memory of parameters that are solved at once, on this rank.
_BYTES = 2**28
# Failures are counted from so many samples on: the first ones say little about a share.
_ENOUGH = 50


def block_seed(seed: int, index: int) -> int:
    """Seed of the prior draws of one block."""
    # A SeedSequence spreads the pair over 32 bits without overlap between neighbours.
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


@dataclass
class Solved:
    """Samples of a block by position, or the reason of a failure.

    Results are state (n_owned of U,) or None, readings (k,), and their derivative by latents (k, R) or None.
    """

    results: dict[int, tuple[np.ndarray | None, np.ndarray, np.ndarray | None]] = dataclass_field(
        default_factory=dict)
    failed: dict[int, str] = dataclass_field(default_factory=dict)


class _Failed(Exception):
    """A sample has no state or no readings, and why."""


class Job:
    """What is solved: the problem of `simulate`, its seed, whether states are results, and latents of derivatives."""

    def __init__(self, problem: InverseProblem, seed: int, keep_states: bool, basis: ModalBasis | None = None):
        self.problem, self.seed, self.keep_states, self.basis = problem, seed, keep_states, basis
        self._forward, sensors = problem.forward, problem.observation
        if basis is not None:
            self._back = ChainRule(problem.prior, basis)
            solver = problem.differentiable()[0]
            # One solve serves state and derivative: ours take a state, a tape is kept until the next solve.
            self._forward = solver if isinstance(solver, Taped) else self._forward
        self._observation = sensors = no_sensors(problem.U) if isinstance(sensors, SensorFamily) else sensors
        # A plain function gains nothing from blocks, and is asked sample by sample, so that nothing solved is lost.
        blocks = isinstance(sensors, Observation) and not isinstance(self._forward, CallableForward)
        self._blocks = sensors.apply if blocks else None
        # Collectives of our own must not meet those that another rank is stuck in.
        self._watch = problem.comm.Dup()

    def close(self) -> None:
        """Free what MPI holds (collective)."""
        self._watch.Free()

    @cached_property
    def probe(self) -> tuple[np.ndarray, np.ndarray]:
        """What `look` finds at first."""
        return self.look()

    def look(self) -> tuple[np.ndarray, np.ndarray]:
        """Fields (p, n_owned) and readings (p, k) of a few samples, each by one call; NaN where there are none."""
        fields = self.draw(0, _CANDIDATES)
        readings, reasons = {}, []
        for i, values in enumerate(self._parameters(fields)):
            try:
                readings |= {i: self._solve_one(values)[1]} if len(readings) < _PROBES else {}
            except _Failed as error:
                reasons.append(error)
        if not readings:
            raise SolveError(f"The forward problem failed for each of the first {_CANDIDATES} samples; the first: "
                             f"{reasons[0]}. Mend the solver or the prior.")
        check_lengths(readings.values())
        nothing = np.full(len(next(iter(readings.values()))), np.nan)
        return fields, np.array([readings.get(i, nothing) for i in range(_CANDIDATES)])

    def draw(self, index: int, size: int) -> np.ndarray:
        """Fields before any transform of the first samples of a block, shape (size, n_owned)."""
        prior = self.problem.prior
        try:
            # A copy: a prior of the user's own may hand out the same array again.
            fields = self._together(lambda: np.array(
                prior.core.sample_many(size, block_seed(self.seed, index)), dtype=float))
            broken = self._watch.allreduce((~np.isfinite(fields).all(axis=1)).astype(int))
            if broken.any():
                raise DataError(f"Samples {np.flatnonzero(broken).tolist()} of block {index} (seed {self.seed}) are "
                                "not finite as they come from the prior: mend the prior.")
            return fields
        except _Failed as error:
            raise DataError(f"The prior failed for block {index} (seed {self.seed}): {error}. Mend it.") from None

    def _parameters(self, fields: np.ndarray) -> np.ndarray:
        """Parameters (n, n_owned of M) of fields (n, n_owned); DataError where the prior's transform fails."""
        try:   # copies: a solver may write into what it gets, and so may a transform
            return self._together(lambda: np.array(self.problem.prior.transform_many(fields.copy()), dtype=float))
        except _Failed as error:
            raise DataError(f"The prior's transform failed: {error}. Mend it.") from None

    def solve(self, fields: np.ndarray, positions: Sequence[int], found: Solved,
              enough: Callable[[Solved], bool]) -> None:
        """Solve for fields at positions among fields (n, n_owned) before any transform.

        It stops where `enough` finds too many failures; `found` is filled on the way.
        """
        width = max(owned_size(self.problem.V), owned_size(self.problem.M))
        size = max(1, _BYTES // (8 * max(1, self._watch.allreduce(width, MPI.MAX))))
        # There may be more unknowns than memory for copies of a whole block.
        for some in (positions[i:i + size] for i in range(0, len(positions), size)):
            self._solve_part(fields[some], some, found, enough)
            if enough(found):
                return

    def _solve_part(self, fields: np.ndarray, positions: Sequence[int], found: Solved,
                    enough: Callable[[Solved], bool]) -> None:
        """As `solve`, of fields (m, n_owned) that stand at these positions, all of them together."""
        parameters = self._parameters(fields)
        together, apply, lost = None, self._blocks, {}
        if apply is not None and len(parameters):
            # A whole block at once is fast, but a solver of the user's own does not tell who fails.
            with contextlib.suppress(_Failed):
                together = self._solve_many(parameters, apply, lost)
        for row, i in enumerate(positions):
            try:
                if together and row in lost:
                    raise _Failed(lost[row])
                if apply is None:
                    kept, readings = self._solve_one(parameters[row])
                else:
                    kept, readings = (part[row if together else 0] for part in (
                        together or self._solve_many(parameters[row:row + 1], apply)))
                slope = None if self.basis is None else self._derive(parameters[row], fields[row], kept)
            except _Failed as error:
                found.failed[i] = str(error)
                if enough(found):
                    return
            else:
                found.results[i] = kept if self.keep_states else None, readings, slope

    def _derive(self, values: np.ndarray, at: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """Derivative (k, R) at a parameter (n_owned of M,) of a field (n_owned,) that has just been solved for."""
        problem, U = self.problem, self.problem.U
        known = None if state is None or U is None else field(U, state)
        rows = self._together(lambda: problem.sensitivity(field(problem.M, values), state=known))
        return self._together(lambda: _finite(self._back.at(rows, at), "derivative"))

    def compare(self) -> None:
        """InputError where the derivative is not that of the readings, by two solves, as where a transform jumps."""
        if self.basis is None:
            return
        fields = self.draw(0, _CANDIDATES)
        along = np.random.default_rng(0).standard_normal(self.basis.r) @ self.basis.scaled_modes
        for at, values in zip(fields, self._parameters(fields)):
            with contextlib.suppress(_Failed):
                kept = self._solve_one(values)[0]
                matrix = self._derive(values, at, kept)
                slope = matrix @ self.basis.encode(coefficients(self.basis.mean) + along)
                ahead, behind = (self._solve_one(self.problem.prior.transform_many((at + step * along)[None])[0])[1]
                                 for step in (_STEP, -_STEP))
                change = (ahead - behind) / (2 * _STEP)
                wrong = np.linalg.norm(change - slope) > _OFF * np.linalg.norm(change) + 1e-6 * np.linalg.norm(ahead)
                if wrong or not matrix.any():
                    raise InputError("The derivative of the readings by the latents is not what differences of two "
                                     "solves show: a transform that jumps, such as level_set, has none. Simulate "
                                     "without derivatives.")
                return

    def _solve_many(self, parameters: np.ndarray, observe: Callable, lost: dict[int, str] | None = None
                    ) -> tuple[np.ndarray, np.ndarray]:
        """States and readings of parameters (n, n_owned) as one block; _Failed where one of them fails.

        A solver that tells which of them have no state puts these and the reasons into `lost`, and zeros in their rows.
        """
        def run() -> np.ndarray:
            if lost is None or not isinstance(self._forward, BlockForward):
                return self.problem.states(parameters, self._forward)
            states = self.problem.states(parameters, self._forward, on_failure=lost.setdefault)
            states[list(lost)] = 0.0
            return states
        return self._solve(parameters, run, lambda x: x, observe)

    def _solve_one(self, values: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        """State and readings of one parameter (n_owned,) by a call; _Failed where it fails."""
        return self._solve(values, lambda: self._forward(field(self.problem.M, values)),
                           lambda u: coefficients(u) if isinstance(u, Function) else None, self._observed)

    def _solve(self, parameters: np.ndarray, run: Callable, kept_of: Callable, observe: Callable) -> tuple:
        """What is kept of a state, and its readings; _Failed where one of these steps fails."""
        # Each step ends with word from all ranks before the next one starts: steps hold sums over ranks, where the
        # others would wait for a rank that has stopped.
        self._together(lambda: _finite(parameters, "parameter"))
        state = self._together(run)
        # Before it is observed, because an observation of the user's own may change the state.
        kept = self._together(lambda: kept_of(state))
        self._together(lambda: kept is None or _finite(kept, "state"))
        readings = self._together(lambda: observe(state))
        all_ranks = self._watch.allgather(readings) if self._watch.size > 1 else [readings]
        tolerance = 1e-6 * np.abs(np.nan_to_num(readings)).max(initial=0.0)
        same = all(x.shape == readings.shape and np.allclose(x, readings, 0, tolerance, True) for x in all_ranks)
        if not self._watch.allreduce(same, MPI.LAND):
            raise InputError("The observation gives other readings on other ranks: let it sum over ranks, as assemble "
                             "and Observation do.")
        return kept, self._together(lambda: _finite(readings, "reading"))

    def _observed(self, state: Function) -> np.ndarray:
        """Readings (k,) of a state."""
        readings = np.array(self._observation(state))
        if readings.ndim > 1 or readings.dtype.kind not in "biuf":
            raise InputError(f"The observation gave an array of shape {readings.shape} and type {readings.dtype}: let "
                             "it return k real numbers.")
        return np.atleast_1d(readings).astype(float)

    def _together(self, run: Callable) -> Any:
        """Result of `run` on this rank; _Failed on all where one rank has none, mistakes are raised on all."""
        def tried() -> Any:
            try:
                return run()
            except (*MISTAKES, _Failed):
                raise
            except Exception as error:
                raise _Failed(f"{type(error).__name__}: {solver_reason(error)}") from error
        return together(self._watch, tried, watched=True)


def _finite(x: np.ndarray, what: str) -> np.ndarray:
    """The array, or _Failed where its numbers or their squares are not finite."""
    if not (np.abs(x) <= LARGEST).all():
        raise _Failed(f"the {what} is not finite, or beyond {LARGEST:g}")
    return x


class Tally:
    """Counts failures among n samples in blocks of a size, and stops where more than a share of them are."""

    def __init__(self, seed: int, size: int, n: int, most: float):
        self.seed, self.size, self.n, self.most = seed, size, n, most
        self.failed: list[tuple[int, int, str]] = []
        self.drawn = 0

    @property
    def stops(self) -> bool:
        """Whether one failure is too many."""
        return self.most == 0

    def exceeded(self, found: Solved) -> bool:
        """Whether there are too many failures, with those of a block that is being solved."""
        failed = len(self.failed) + len(found.failed)
        drawn = self.drawn + len(found.results) + len(found.failed)
        return failed > 0 if self.stops else drawn >= min(_ENOUGH, self.n) and failed > self.most * drawn

    def add(self, index: int, block: Block) -> None:
        """Count a block; raises SolveError where the share of failures is too large."""
        self.failed += [(index, position, reason) for position, reason in block.failed.items()]
        self.drawn += block.count
        if self.stops and self.failed:
            raise self.error(*self.failed[0], True)
        if self.drawn >= min(_ENOUGH, self.n):
            self.check([reason for *_, reason in self.failed], self.drawn)

    def check(self, reasons: list[str], drawn: int) -> None:
        """Raise SolveError where more than the tolerated share of the samples drawn have failed."""
        if len(reasons) > self.most * drawn:
            raise SolveError(f"The forward problem failed for {len(reasons)} of {drawn} samples, more than skip = "
                             f"{self.most:.0%}; the first: {reasons[0]}. Mend the solver or the prior, or raise skip; "
                             "what is solved is kept where there is a `path`.")

    def error(self, index: int, position: int, reason: str, kept: bool) -> SolveError:
        """What is to be raised for a failed sample."""
        number = index * self.size + position
        keeping = ("what is solved is kept, and skip=0.1 goes on without this sample" if kept else
                   "skip=0.1 goes on without it, and `path` keeps what is solved")
        return SolveError(f"The forward problem failed for sample {number} (position {position} of block {index}, seed "
                          f"{self.seed}): {reason}. simulated_parameter(problem, {number}, seed={self.seed}, "
                          f"block={self.size}) is its parameter; {keeping}.")


def check_lengths(readings: Collection[np.ndarray]) -> None:
    """Raise InputError unless all readings (k,) are equally many."""
    lengths = sorted({len(x) for x in readings})
    if len(lengths) > 1:
        raise InputError(f"The observation gives {' or '.join(map(str, lengths))} readings: let it return equally many "
                         "for every state.")
