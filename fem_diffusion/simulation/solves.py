"""Solves of a forward problem for many prior samples, of which some may fail, on any number of ranks.

What a failure is: the user's code raises, or parameter, state or readings are not finite. What no failure is: a
mistake, such as a state in another space (`InputError`), which every sample would repeat.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field as dataclass_field
from functools import cached_property

import numpy as np
from firedrake import Function
from mpi4py import MPI

from fem_diffusion.checks import LARGEST, portable
from fem_diffusion.errors import DataError, FileError, InputError, InstallError, SolveError
from fem_diffusion.fields.coefficients import coefficients, field

__all__ = ["Job", "Solved", "Tally", "block_seed", "check_lengths", "check_share"]

# A rank that is done waits so long for the others, in seconds, and in units of its own time: then they hang.
_PATIENCE, _TIMES = 300.0, 20.0
# Samples that are solved by themselves, the first ones that succeed: a changed prior, solver or sensor shows in them.
_PROBES, _CANDIDATES = 2, 8
# Failures are counted from so many samples on: the first ones say little about a share.
_ENOUGH = 50


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
                result, why = self._solve_one(values)
                readings |= {} if result is None else {i: result[1]}
                reason = reason or why
        if not readings:
            raise SolveError(f"The forward problem failed for each of the first {_CANDIDATES} samples; the first: "
                             f"{reason}. Mend the solver or the prior.")
        check_lengths(readings.values())
        nothing = np.full(len(next(iter(readings.values()))), np.nan)
        return fields, np.array([readings.get(i, nothing) for i in range(_CANDIDATES)])

    def draw(self, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Fields before any transform and parameters of the first samples of a block, shape (size, n_owned) each."""
        core = self.prior.core

        def run():
            # A copy: a prior of the user's own may hand out the same array again.
            fields = np.array(core.sample_many(size, block_seed(self.seed, index)), dtype=float)
            return fields, fields if core is self.prior else self.prior.transform_many(fields)
        drawn, reason = self._together(run)
        if reason is not None:
            raise DataError(f"The prior failed for block {index} (seed {self.seed}): {reason}. Mend the prior.")
        broken = self._watch.allreduce((~np.isfinite(drawn[0]).all(axis=1)).astype(int))
        if broken.any():
            raise DataError(f"Samples {np.flatnonzero(broken).tolist()} of block {index} (seed {self.seed}) are "
                            "not finite as they come from the prior: mend the prior.")
        return drawn

    def solve(self, parameters: np.ndarray, found: Solved, first: int, enough: Callable[[Solved], bool]) -> None:
        """States and readings of parameters (n, n_owned), added to `found` as they come.

        Parameters
        ----------
        parameters : numpy.ndarray
            Owned coefficients.
        found : Solved
            Gets the results; holds those before an exception.
        first : int
            Position of the first one.
        enough : Callable
            Whether there are too many failures to go on.
        """
        blocks = len(parameters) > 0 and hasattr(self.forward, "solve_many") and hasattr(self.observation, "apply")
        # A whole block at once is fast, but does not tell who fails.
        together = self._solve_many(parameters)[0] if blocks else None
        for i, values in enumerate(parameters, first):
            if together is not None:
                result, reason = [part[i - first] for part in together], None
            elif blocks:
                result, reason = self._solve_many(values[None])
                result = result and [part[0] for part in result]
            else:
                result, reason = self._solve_one(values)
            if reason is not None:
                found.failed[i] = reason
                if enough(found):
                    return
                continue
            found.observations.append(result[1])
            if self.keep_states:
                found.states.append(result[0])
            # Last, so that an interruption before it leaves no half of a sample.
            found.rows.append(i)

    def _solve_many(self, parameters: np.ndarray):
        """States and readings of parameters (n, n_owned) as one block, or None and the reason."""
        # A copy: the parameters of an untransformed prior are the fields that are kept.
        states, reason = self._solved(
            parameters, lambda: np.array(self.forward.solve_many(parameters.copy()), dtype=float), lambda x: x)
        return (None, reason) if reason is not None else self._read(states, self.observation.apply, states)

    def _solve_one(self, values: np.ndarray):
        """State and readings of one parameter (n_owned,) by a call, or None and the reason."""
        states = []

        def run():
            states.append(self.forward(field(self.prior.V, values)))

        def coefficients_of(_):
            # Before it is observed, because an observation of the user's own may change the state.
            return coefficients(states[0]) if isinstance(states[0], Function) else None
        kept, reason = self._solved(values, run, coefficients_of)
        return (None, reason) if reason is not None else self._read(kept, self._observed, states[0])

    # Each step ends with word from all ranks before the next one starts: steps hold sums over ranks, where the others
    # would wait for a rank that has stopped.

    def _solved(self, parameters, run, coefficients_of):
        """Coefficients of what `run` solves for finite parameters, or None and the reason."""
        _, reason = self._together(lambda: _finite(parameters, "parameter"))
        if reason is None:
            state, reason = self._together(run)
        if reason is None:
            state, reason = self._together(lambda: coefficients_of(state))
        if reason is None:
            state, reason = self._together(lambda: state if state is None else _finite(state, "state"))
        return (None, reason) if reason is not None else (state, None)

    def _read(self, kept, observe, state):
        """What is kept of a state, and its readings, or None and the reason."""
        readings, reason = self._together(lambda: observe(state))
        if reason is None:
            all_ranks = self._watch.allgather(readings) if self._watch.size > 1 else [readings]
            tolerance = 1e-6 * np.abs(np.nan_to_num(readings)).max(initial=0.0)
            same = all(x.shape == readings.shape and np.allclose(x, readings, 0, tolerance, True) for x in all_ranks)
            if not self._watch.allreduce(same, MPI.LAND):
                raise InputError("The observation gives other readings on other ranks: let it sum over ranks, as "
                                 "assemble and Observation do.")
            readings, reason = self._together(lambda: _finite(readings, "reading"))
        return (None, reason) if reason is not None else ((kept, readings), None)

    def _observed(self, state):
        """Readings (k,) of a state."""
        readings = np.array(self.observation(state))
        if readings.ndim > 1 or readings.dtype.kind not in "biuf":
            raise InputError(f"The observation gave an array of shape {readings.shape} and type {readings.dtype}: let "
                             "it return k real numbers.")
        return np.atleast_1d(readings).astype(float)

    def _together(self, run):
        """Result of `run` on this rank and None, or None and why one rank has none; mistakes are raised on all."""
        start = time.monotonic()
        result = outcome = None
        try:
            result = run()
        except (InputError, FileError, InstallError) as error:
            outcome = portable(error)
        except _NotFinite as error:
            outcome = str(error)
        except Exception as error:
            # PETSc turns what is raised in its callbacks into errors of its own.
            if _interrupted(error):
                raise KeyboardInterrupt from error
            outcome = f"{type(error).__name__}: {' '.join(str(error).split())}"
        everywhere = [found for found in self._gathered(outcome, time.monotonic() - start) if found is not None]
        for found in everywhere:
            if isinstance(found, Exception):
                raise found
        return (None, min(everywhere)) if everywhere else (result, None)

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
                      f"solve of a sample (its own outcome: {mine or 'no exception'}). They wait for it in turn: an "
                      "exception on one rank only, perhaps caught there. Raise exceptions on all ranks, or on none.",
                      file=sys.stderr, flush=True)
                comm.Abort(1)
            time.sleep(0 if waited < 0.01 else 1e-3)
        return comm.allgather(mine)


def _interrupted(error: BaseException | None) -> bool:
    """Whether an exception comes from an interruption by the user."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class _NotFinite(Exception):
    """An array holds NaN or infinity."""


def _finite(x: np.ndarray, what: str) -> np.ndarray:
    """The array, or _NotFinite, also where squares of its numbers would not be."""
    if not (np.abs(x) <= LARGEST).all():
        raise _NotFinite(f"the {what} is not finite, or beyond {LARGEST:g}")
    return x


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

    def exceeded(self, found: Solved) -> bool:
        """Whether there are too many failures, with those of a block that is being solved."""
        failed, drawn = len(self.failed) + len(found.failed), self.drawn + found.count
        return failed > 0 if self.stops else drawn >= min(_ENOUGH, self.n) and failed > self.most * drawn

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
