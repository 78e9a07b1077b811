"""What corrections spend solves on besides samples: a search for where the posterior is, and derivatives there."""

import itertools
from contextlib import suppress
from pathlib import Path

import numpy as np

from fem_diffusion.checks import stream
from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.progress import bar
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.point import aside, descend, find_points
from fem_diffusion.simulation.journal import Journal
from fem_diffusion.trust.proposals import Learner

__all__ = ["PILOT", "Run", "linearise", "searched"]

# First solves.
PILOT = 200
# Derivatives at most, and latents for each solve that one of them costs, at least.
_SLOPES, _TELLING = 60, 2
# Gradients, at least and at most, share of the solves that a search may take, and share at which it is stopped.
_FEWEST_STEPS, _SEARCH, _SHARE, _STOPPED = 30, 300, 0.2, 0.75
# Solves of a linearisation with which Gauss-Newton steps are cheap, steps that they may take, and searches.
_DIRECT, _STEPS, _STARTS = 40, 15, 4


class Run:
    """One correction: budget, journal and progress."""

    def __init__(self, latent: LatentProblem, solves: int, seed: int, path: Path | None, progress: bool):
        self.latent, self.budget, self.seed, self.path = latent, solves, seed, path
        self.comm, self.solves, self.pulls = latent.everyone, 0, 0
        self.watched = progress and self.comm.rank == 0
        self.shown = bar(solves, "correct", self.watched)
        self.journal = self.open("learning")

    @property
    def left(self) -> int:
        """Forward solves that may still be spent, and adjoint ones."""
        return self.budget - max(self.solves, self.pulls)

    def open(self, name: str) -> Journal:
        """What keeps the solves of a phase."""
        return Journal(None if self.path is None else self.path / name, self.comm, extends=True)

    def spend(self, solves: int, pulls: int = 0) -> None:
        """Count solves."""
        self.solves, self.pulls = self.solves + solves, self.pulls + pulls
        self.shown.update(self.budget - self.left - self.shown.n)

    def solve(self, z: np.ndarray) -> np.ndarray:
        """Readings (B, k) at latents (B, R)."""
        readings = self.journal.ask(z, self.latent.readings)
        self.spend(len(z))
        return readings

    def solve_all(self, z: np.ndarray, size: int) -> np.ndarray:
        """Readings (B, k) at latents (B, R), of which `size` are kept together."""
        parts = [self.solve(z[i:i + size]) for i in range(0, len(z), size)]
        return np.concatenate(parts) if parts else np.empty((0, self.latent.width))


def linearise(run: Run, learner: Learner, z: np.ndarray, readings: np.ndarray) -> None:
    """Derivatives at some points (B, R) of a round, for as many solves, where they tell more than solves do."""
    latent, k = run.latent, readings.shape[1]
    count = min(max(1, len(z) // (1 + k)), _SLOPES - len(learner.places))
    count = run.comm.bcast(min(count, run.left // (1 + k)))
    if not latent.differentiable or _TELLING * (1 + k) > latent.r or count < 1:
        return

    def compute(places: np.ndarray) -> np.ndarray:
        rows = []
        for place in places:
            try:
                rows.append(latent.linearised(place)[1].ravel())
            except SolveError:
                rows.append(np.full(k * latent.r, np.nan))
        return np.array(rows)
    found = run.journal.ask(z[:count], compute).reshape(count, k, latent.r)
    run.spend(count, count * k)
    on_root(run.comm, lambda: learner.learn(z[:count], readings[:count], found))


def searched(run: Run, learner: Learner, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Points around the most probable ones, the first of these, and a factor of its covariance.

    Searches start at some samples (n, R), too, so that a second mode is seen. None where the solves are too few.
    """
    latent = run.latent
    r, dear = latent.r, len(latent.y) if latent.differentiable else 2 * latent.r
    cost = 2 if latent.differentiable else 1 + dear
    most = min(_SEARCH, int(_SHARE * run.left / cost))
    if most < _FEWEST_STEPS:
        return None
    direct = min(_STARTS, int(_SHARE * run.left / (_STEPS * (1 + dear)))) if dear <= _DIRECT else 0

    def search(_: np.ndarray) -> np.ndarray:
        before, found = (latent.solves, latent.pulls), []
        if direct:
            with suppress(SolveError):
                found = find_points(latent, np.vstack([aside(r), samples[:direct - 1]]))
        else:
            centre, factor = descend(latent, most)
            if 1 + dear <= _SHARE * run.left and np.isfinite(centre).all():
                factor = np.linalg.inv(np.linalg.cholesky(latent.expanded(centre)[1])).T
            found = [(centre, factor)]
        answer = np.full((_STARTS, r * (r + 1)), np.nan)
        for row, (centre, factor) in zip(answer, found):
            row[:] = np.concatenate([centre, factor.ravel()])
        return np.concatenate([answer.ravel(), [latent.solves - before[0], latent.pulls - before[1]]])[None]
    latent.limit = latent.solves + int(_STOPPED * run.left), latent.pulls + int(_STOPPED * run.left)
    try:
        answer = run.journal.ask(np.zeros((1, r)), search)[0]
    finally:
        latent.limit = None
    run.spend(*(int(x) for x in answer[-2:]))
    found = [row for row in answer[:-2].reshape(_STARTS, -1) if np.isfinite(row).all()]
    if not found:
        return None
    places = [(row[:r], row[r:].reshape(r, r)) for row in found]
    normal = np.random.default_rng(stream(run.seed, "laplace")).standard_normal((min(PILOT, run.left // 2), r))
    z = np.stack([centre + factor @ row for row, (centre, factor) in zip(normal, itertools.cycle(places))])
    readings = run.solve(z)

    def take() -> None:
        # What is far from the measurement, and an emulator that led there, teach nothing of its neighbourhood.
        learner.forget()
        learner.add(z, readings)
        learner.begin()
    on_root(run.comm, take)
    return z, *places[0]
