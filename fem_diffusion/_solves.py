"""Solves of a forward problem for many prior samples, of which some may fail, on any number of ranks.

What a failure is: the user's code raises, or parameter, state or readings are not finite. What no failure is: a
mistake, an `InputError`, such as a state in another space, which every sample would repeat.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field as dataclass_field
from functools import cached_property

import numpy as np
from firedrake import Function
from mpi4py import MPI

from fem_diffusion.errors import DataError, InputError, SolveError
from fem_diffusion.fields import coefficients, field

__all__ = ["Job", "Solved", "Tally", "block_seed", "check_lengths", "check_share"]

# A rank that is done waits so long for the others, in seconds, and in units of its own time: then they hang.
_PATIENCE, _TIMES = 300.0, 20.0
# Samples that are solved by themselves, the first ones that succeed: a changed prior, solver or sensor shows in them.
_PROBES, _CANDIDATES = 2, 8
# Failures are counted from so many samples on: the first ones say little about a share.
_ENOUGH = 50
_MISTAKE, _FAILURE = "mistake", "failure"


def block_seed(seed: int, index: int) -> int:
    """Seed of the prior draws of one block."""
    # A SeedSequence spreads the pair over 32 bits without overlap between neighbours.
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


@dataclass
class Solved:
    """Results of consecutive samples, of which some are left out.

    Parameters
    ----------
    rows : list of int
        Positions of those that are solved.
    observations, states : list of numpy.ndarray
        One for each, shape (k,) and (n_owned of U,); no states where they are not kept.
    failed : dict of int to str
        Position to reason of those that failed.
    """

    rows: list = dataclass_field(default_factory=list)
    observations: list = dataclass_field(default_factory=list)
    states: list = dataclass_field(default_factory=list)
    failed: dict = dataclass_field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of samples that have had their turn."""
        return len(self.rows) + len(self.failed)


@dataclass(frozen=True)
class Job:
    """What is solved: prior, forward problem and observation of `simulate`.

    Parameters
    ----------
    prior, forward, observation
        As for `simulate`.
    seed : int
        Of all draws.
    keep_states : bool
        Whether states are results.
    """

    prior: object
    forward: Callable[[Function], Function]
    observation: Callable
    seed: int
    keep_states: bool

    def __post_init__(self):
        # Collectives of our own must not meet those that another rank is stuck in.
        object.__setattr__(self, "_watch", self.prior.V.comm.Dup())

    def close(self) -> None:
        """Free what MPI holds (collective)."""
        self._watch.Free()

    @cached_property
    def probe(self) -> tuple[np.ndarray, np.ndarray]:
        """Fields (p, n_owned) and readings (p, k) of a few samples, each by one call; NaN where there are none."""
        fields, parameters = self.draw(0, _CANDIDATES)
        readings, reason = {}, None
        for i, values in enumerate(parameters):
            if len(readings) < _PROBES:
                _, found, why = self._together(lambda: self._observed(self.forward(field(self.prior.V, values))))
                readings |= {} if found is None else {i: found}
                reason = reason or why
        if not readings:
            raise SolveError(f"The forward problem failed for each of the first {_CANDIDATES} samples; the first: "
                             f"{reason}. Mend the solver or the prior.")
        check_lengths(readings.values())
        nothing = np.full(len(next(iter(readings.values()))), np.nan)
        return fields, np.array([readings.get(i, nothing) for i in range(_CANDIDATES)])

    def draw(self, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Fields before any transform and parameters of the first samples of a block, shape (size, n_owned) each."""
        gaussian = getattr(self.prior, "base", self.prior)
        # A copy: a prior of the user's own may hand out the same array again.
        fields = np.array(gaussian.sample_many(size, block_seed(self.seed, index)), dtype=float)
        finite = self._watch.allreduce(np.isfinite(fields).all(axis=1).astype(int), MPI.MIN)
        if not finite.all():
            raise DataError(f"Samples {np.flatnonzero(finite == 0).tolist()} of block {index} (seed {self.seed}) are "
                            "not finite as they come from the prior: mend the prior.")
        return fields, fields if gaussian is self.prior else self.prior.transform_many(fields)

    def solve(self, parameters: np.ndarray, found: Solved, first: int = 0, stop: bool = True) -> None:
        """States and readings of parameters (n, n_owned), added to `found` as they come.

        Parameters
        ----------
        parameters : numpy.ndarray
            Owned coefficients.
        found : Solved
            Gets the results; holds those before an exception.
        first : int
            Position of the first one.
        stop : bool
            Whether to stop after the first failure.
        """
        if self._solve_together(parameters, found, first):
            return
        for i, values in enumerate(parameters, first):
            state, readings, reason = self._together(lambda: self._solve_one(values))
            if reason is None:
                self._keep(found, i, state, readings)
            else:
                found.failed[i] = reason
                if stop:
                    return

    def _solve_together(self, parameters, found, first) -> bool:
        """Whether all were solved as one block, which is fast, but does not tell who failed."""
        many = getattr(self.forward, "solve_many", None)
        if many is None or not hasattr(self.observation, "apply") or not len(parameters):
            return False

        def run():
            # A copy: the parameters of an untransformed prior are the fields that are kept.
            states = np.array(many(parameters.copy()), dtype=float)
            return states, self.observation.apply(states), None
        states, observations, reason = self._together(run)
        if reason is not None:
            return False
        for i, (state, readings) in enumerate(zip(states, observations), first):
            self._keep(found, i, state, readings)
        return True

    def _keep(self, found, i, state, readings) -> None:
        found.rows.append(i)
        found.observations.append(readings)
        if self.keep_states:
            found.states.append(state)

    def _solve_one(self, values):
        if not np.isfinite(values).all():
            return None, None, "the parameter is not finite"
        many = getattr(self.forward, "solve_many", None)
        if many is not None and hasattr(self.observation, "apply"):
            states = np.array(many(values[None].copy()), dtype=float)
            return states[0], self.observation.apply(states)[0], None
        return self._observed(self.forward(field(self.prior.V, values)))

    def _observed(self, state):
        """Coefficients of a state, where they can be had, and its readings."""
        # First of all, because an observation of the user's own may change the state.
        kept = coefficients(state) if isinstance(state, Function) else None
        readings = np.array(self.observation(state))
        if readings.ndim > 1 or readings.dtype.kind not in "biuf":
            raise InputError(f"The observation gave an array of shape {readings.shape} and type {readings.dtype}: let "
                             "it return k real numbers.")
        return kept, np.atleast_1d(readings).astype(float), None

    def _together(self, run):
        """Result of `run` on all ranks, or why there is none on one of them; raises their mistakes on all."""
        start = time.monotonic()
        outcome, result = None, (None, None, None)
        try:
            result = run()
            outcome = None if result[2] is None else (_FAILURE, result[2])
        except InputError as error:
            outcome = _MISTAKE, str(error)
        except Exception as error:
            outcome = _FAILURE, f"{type(error).__name__}: {' '.join(str(error).split())}"
        if outcome is None:
            arrays = [x for x in result[:2] if x is not None]
            if not all(np.isfinite(x).all() for x in arrays):
                outcome = _FAILURE, "the state or its readings are not finite"
        shape = None if result[1] is None else result[1].shape
        everywhere = self._gathered((outcome, shape), time.monotonic() - start)
        worst = max((found for found, _ in everywhere if found is not None), default=None)
        if worst is not None and worst[0] == _MISTAKE:
            raise InputError(worst[1])
        if worst is not None:
            return None, None, worst[1]
        if not hasattr(self.observation, "apply"):
            self._check_readings(result[1], [shape for _, shape in everywhere])
        return result

    def _check_readings(self, readings, shapes) -> None:
        """Refuse readings that are not the same on all ranks."""
        low = high = readings
        if len(shapes) > 1 and len(set(shapes)) == 1:
            low, high = (self._watch.allreduce(readings, op=op) for op in (MPI.MIN, MPI.MAX))
        scale = np.abs(readings).max(initial=0.0)
        if len(set(shapes)) > 1 or (high - low > 1e-6 * scale).any():
            raise InputError("The observation gives other readings on other ranks: let it sum over ranks, as assemble "
                             "and Observation do.")

    def _gathered(self, mine, spent: float) -> list:
        """What all ranks have to say, in order; the run ends where one of them never comes."""
        comm = self._watch
        if comm.size == 1:
            return [mine]
        request, start, patience = comm.Ibarrier(), time.monotonic(), max(_PATIENCE, _TIMES * spent)
        while not request.Test():
            waited = time.monotonic() - start
            if waited > patience:
                print(f"fem_diffusion: rank {comm.rank} has waited {patience:.0f} s for the other ranks to end the "
                      f"solve of a sample (its own outcome: {mine[0] or 'a state'}). They wait for it in turn: an "
                      "exception on one rank only, perhaps caught there. Raise exceptions on all ranks, or on none.",
                      file=sys.stderr, flush=True)
                comm.Abort(1)
            time.sleep(0 if waited < 0.01 else 1e-3)
        return comm.allgather(mine)


class Tally:
    """Counts failures and stops where there are too many.

    Parameters
    ----------
    seed, size : int
        Seed of the simulation and samples in a block, for messages.
    n : int
        Samples wanted.
    most : float
        Share of failures that is tolerated.
    """

    def __init__(self, seed: int, size: int, n: int, most: float):
        self.seed, self.size, self.n, self.most = seed, size, n, most
        self.failed, self.drawn = [], 0

    @property
    def stops(self) -> bool:
        """Whether one failure is too many."""
        return self.most == 0

    def add(self, index: int, block) -> None:
        """Count a block; raises SolveError where the share of failures is too large."""
        self.failed += [(index, position, reason) for position, reason in block.failed.items()]
        self.drawn += block.count
        if self.stops and self.failed:
            raise self.error(*self.failed[0], True)
        if self.drawn >= min(_ENOUGH, self.n):
            check_share([reason for *_, reason in self.failed], self.drawn, self.most)

    def error(self, index: int, position: int, reason: str, kept: bool) -> SolveError:
        """What is to be raised for a failed sample."""
        number = index * self.size + position
        keeping = ("what is solved is kept, and on_failure='skip' goes on without this sample" if kept else
                   "on_failure='skip' goes on without it, and `path` keeps what is solved")
        return SolveError(f"The forward problem failed for sample {number} (position {position} of block {index}, seed "
                          f"{self.seed}): {reason}. simulated_parameter(prior, {number}, seed={self.seed}, "
                          f"block={self.size}) is its parameter; {keeping}.")


def check_share(reasons: list[str], drawn: int, most: float) -> None:
    """Raise SolveError where more than this share of the samples drawn have failed."""
    if len(reasons) > most * drawn:
        raise SolveError(f"The forward problem failed for {len(reasons)} of {drawn} samples, more than most_failures "
                         f"= {most:.0%}; the first: {reasons[0]}. Mend the solver or the prior, or raise "
                         "most_failures; what is solved is kept where there is a `path`.")


def check_lengths(readings) -> None:
    """Raise InputError unless all readings (k,) are equally many."""
    lengths = sorted({len(x) for x in readings})
    if len(lengths) > 1:
        raise InputError(f"The observation gives {' or '.join(map(str, lengths))} readings: let it return equally many "
                         "for every state.")
