"""Solves of an inverse problem that are counted, of which some may fail."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
from firedrake.adjoint import stop_annotating

from fem_diffusion.checks import LARGEST, MISTAKES, together
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.forward.callable import CallableForward
from fem_diffusion.forward.protocol import Forward
from fem_diffusion.observation.linear import Observation
from fem_diffusion.problem import InverseProblem

__all__ = ["CountedSolver", "unrestricted"]


@contextlib.contextmanager
def unrestricted(latent: "CountedSolver") -> Iterator[None]:
    """Without the constraint of a prior, at whose bounds a density has no slope."""
    latent.unrestricted, before = True, latent.unrestricted
    try:
        yield
    finally:
        latent.unrestricted = before


class CountedSolver:
    """Readings of a problem with k sensors; all methods are collective.

    Attributes
    ----------
    solves, pulls : int
        Forward solves so far, one for each parameter, and adjoint ones, one for each row of a sensitivity.
    failure : str
        Why the last solve that failed did; empty where none has.
    limit : tuple of int, or None
        Numbers of forward and adjoint solves beyond which SolveError is raised.
    """

    def __init__(self, problem: InverseProblem, k: int):
        self.problem, self._k, self.solves, self.pulls, self.failure = problem, k, 0, 0, ""
        self.limit: tuple[int, int] | None = None
        self.unrestricted = False

    def _spend(self, solves: int, pulls: int = 0) -> None:
        """Count what is about to be solved."""
        if self.limit is not None and (self.solves + solves > self.limit[0] or self.pulls + pulls > self.limit[1]):
            raise SolveError("All solves that were asked for are spent: give more.")
        self.solves, self.pulls = self.solves + solves, self.pulls + pulls

    def _solve(self, parameters: np.ndarray, derivative: bool = False) -> np.ndarray:
        """Readings (B, k) of owned parameters (B, n_owned of M), rows of NaN where there are none.

        With `derivative` by the solver that keeps what a derivative needs.
        """
        problem, comm, found = self.problem, self.problem.comm, np.full((len(parameters), self._k), np.nan)
        solver, observation = problem.forward, problem.observation
        if derivative:
            solver = problem.differentiable()[0]
        good = np.flatnonzero(comm.allreduce((~(np.abs(parameters) <= LARGEST)).any(axis=1).astype(int)) == 0)
        # A plain function gains nothing from blocks.
        blocks = not isinstance(solver, CallableForward) and isinstance(observation, Observation)
        for rows in [good] if blocks and len(good) else good[:, None]:
            for part in [rows] if len(rows) == 1 else [rows, *rows[:, None]]:
                self._spend(len(part))
                read = self._attempt(lambda: self._read(solver, parameters[part]))
                if read is not None:
                    found[part] = read
                    if len(part) == len(rows):
                        break
        found[(~(np.abs(found) <= LARGEST)).any(axis=1)] = np.nan
        if not self.failure and np.isnan(found).any():
            self.failure = "state or readings are not finite"
        return found

    def _attempt(self, run: Callable[[], np.ndarray]) -> np.ndarray | None:
        """Result of the user's code; None where it raises on some rank. Mistakes are raised."""
        try:
            with stop_annotating():
                return together(self.problem.comm, run, watched=True)
        except MISTAKES:
            raise
        except Exception as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
            return None

    def _read(self, solver: Forward, parameters: np.ndarray) -> np.ndarray:
        """Readings (B, k) of parameters, those of states that are not finite NaN."""
        problem, observe = self.problem, self.problem.observation
        if isinstance(observe, Observation):
            states = problem.states(parameters, solver)
            bad = np.asarray(problem.comm.allreduce((~(np.abs(states) <= LARGEST)).any(axis=1).astype(int))) > 0
            return np.where(bad[:, None], np.nan, observe.apply(np.where(bad[:, None], 0.0, states)))
        read = np.array([problem.read(row, solver) for row in parameters], dtype=float)
        if read.shape != (len(parameters), self._k):
            raise InputError(f"The observation gives {read.shape[1:]} readings and y holds {self._k}: give as many "
                             "as the observation has.")
        return read
