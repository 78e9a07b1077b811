"""Markov chains side by side in the latents: warm-up, draws, diagnostics, and a file from which a killed run goes on.

What moves the chains is a `Kernel`. Its state is a dict of arrays, the random numbers of an iteration depend on seed
and iteration alone, and so a run that goes on from a file gives what it would have given without a break.
"""

import os
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from arviz_stats.base.array import array_stats
from scipy.linalg import cholesky

from fem_diffusion import files
from fem_diffusion.checks import check_file, stream
from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.progress import bar
from fem_diffusion.reference.latents import LatentProblem

__all__ = ["Begin", "Chains", "Kernel", "State", "diagnosed", "learnt", "settle", "walk"]

# Draws of each chain between two looks at how well they mix, and seconds between two writes.
_BLOCK, _PAUSE = 100, 30.0
# What ends a run whose number of draws is open: R-hat of the worst latent, and effective draws of it.
_RHAT, _ENOUGH = 1.01, 400.0
_REMEDY = "Name another file, or remove it to start again."

State = dict[str, np.ndarray]
# Where chains start (chains, r), and centre (r,) and factor F (r, r) of a Gaussian N(centre, F Fᵀ) near their law.
Begin = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Chains:
    """Draws of Markov chains with what they tell about themselves.

    Attributes
    ----------
    draws, energies : numpy.ndarray
        Latents (chains, n, r), and energies (chains, n) of them.
    acceptance : float
        Share of accepted proposals.
    rhat, bulk, tail : numpy.ndarray
        Rank-normalised R-hat, and effective number of draws in the bulk and in the tails (the worse one of the 5 and 95
        % quantiles), of each latent and, last, of the energy: shape (r + 1,) (Vehtari et al. 2021). NaN below 4 draws.
    step, leaps : float, int
        Of a move, as the warm-up has found them.
    exact : bool
        Whether moves take the gradient of the finite element problem.
    solves, pulls : int
        Forward and adjoint solves of this run, with the warm-up.
    """

    draws: np.ndarray
    energies: np.ndarray
    acceptance: float
    rhat: np.ndarray
    bulk: np.ndarray
    tail: np.ndarray
    step: float
    leaps: int
    exact: bool
    solves: int
    pulls: int

    @property
    def worst(self) -> tuple[float, float]:
        """Largest R-hat and smallest effective number of draws; NaN where there are too few draws to tell."""
        return float(self.rhat.max()), float(np.minimum(self.bulk, self.tail).min())

    @property
    def converged(self) -> bool:
        """Whether all latents mix: R-hat at most 1.01 and at least 400 effective draws."""
        rhat, effective = self.worst
        return rhat <= _RHAT and effective >= _ENOUGH

    @property
    def sticky(self) -> bool:
        """Whether some latent hardly mixes, as in a tail that chains rarely enter and leave: R-hat is above 1.01, and
        less than 400 draws and a tenth of them are effective."""
        rhat, effective = self.worst
        return rhat > _RHAT and effective < min(_ENOUGH, self.energies.size / 10)


class Kernel(Protocol):
    """What moves chains. Its state holds `z` (chains, r), `energy` (chains,), `step`, `leaps`, `exact`, and its own."""

    def start(self) -> State:
        """The state of chains that start."""
        ...

    def move(self, state: State, rng: np.random.Generator) -> np.ndarray:
        """Move all chains once, in place; returns what share of the proposals a chain accepts on average, (chains,)."""
        ...

    def cost(self, state: State) -> int:
        """Forward solves that an iteration takes, at most."""
        ...

    def adapt(self, state: State, acceptance: np.ndarray, i: int, warmup: int) -> None:
        """Learn from iteration i of so many of the warm-up, in place."""
        ...


def settle(latent: LatentProblem, z: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Starts (chains, r) from which all chains can move: where there is no solution, the centre or another start.

    SolveError if there is none anywhere.
    """
    failed = ~np.isfinite(latent.energy(z))
    if failed.any() and not np.isfinite(latent.energy(centre[None])).all():
        if failed.all():
            raise SolveError(f"The forward problem has no solution where chains start ({latent.failure}): check it "
                             "there.")
        return np.where(failed[:, None], z[np.flatnonzero(~failed)[0]], z)
    return np.where(failed[:, None], centre, z)


def learnt(factor: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Factor F (r, r), covariance F Fᵀ, from one that is believed and chains (chains, n, r), which are correlated.

    In coordinates in which the believed covariance is the identity, a mean of that and of the draws' own; the more
    draws there are for each latent, the more these count.
    """
    r = z.shape[-1]
    x = np.linalg.solve(factor, (z - z.mean(axis=(0, 1))).reshape(-1, r).T)
    effective, prior = x.shape[1] / 3, 5.0 + r / 2
    covariance = (effective * (x @ x.T) / x.shape[1] + prior * np.eye(r)) / (effective + prior)
    return factor @ cholesky(covariance, lower=True)


def diagnosed(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R-hat, bulk and tail effective number of draws (chains, n, q): shape (q,) each; NaN below 4 draws."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (array_stats.rhat(draws, chain_axis=0, draw_axis=1),
                 array_stats.ess(draws, chain_axis=0, draw_axis=1, method="bulk"),
                 array_stats.ess(draws, chain_axis=0, draw_axis=1, method="tail", prob=(0.05, 0.95)))
    rhat, bulk, tail = (np.asarray(x, dtype=float) for x in found)
    return rhat, bulk, tail


@dataclass
class _Record:
    """A run so far: state, draws (chains, r), energies (chains,) and acceptance (chains,) of iterations, and counts."""

    state: State
    draws: list[np.ndarray]
    energies: list[np.ndarray]
    rates: list[np.ndarray]
    i: int
    solves: int
    pulls: int

    def summary(self, n: int) -> Chains:
        """The first n draws, with what they tell."""
        chains, r = self.state["z"].shape
        draws = np.array(self.draws[:n]).reshape(n, chains, r).swapaxes(0, 1)
        energies = np.array(self.energies[:n]).reshape(n, chains).T
        told = diagnosed(np.concatenate([draws, energies[:, :, None]], axis=2))
        rate = float(np.mean(self.rates[:n])) if n else np.nan
        return Chains(draws, energies, rate, *told, float(self.state["step"][0]), int(self.state["leaps"][0]),
                      bool(self.state["exact"][0]), self.solves, self.pulls)


class _File:
    """Where a run is kept; without a path nowhere."""

    def __init__(self, path: str | os.PathLike | None, latent: LatentProblem, identity: dict):
        self._path = None if path is None else on_root(latent.everyone, lambda: check_file(path))
        self._latent, self._identity = latent, identity

    def read(self) -> _Record | None:
        """The run, where there is one; FileError where the file belongs to another one."""
        path, everyone = self._path, self._latent.everyone
        if path is None or not on_root(everyone, path.exists):
            return None
        content = on_root(everyone, lambda: files.read(path, "chains", _REMEDY))
        arrays = content.arrays
        if content.values.get("identity") != self._identity or not np.array_equal(arrays["y"], self._latent.y):
            raise content.error("belongs to another run (method, chains, seed, warm-up, basis or measurement)")
        state = {name[6:]: x for name, x in arrays.items() if name.startswith("state.")}
        # The latents mean other parameters where prior, mesh or solver are others.
        there = np.flatnonzero(np.isfinite(state["energy"]))[:1]
        if not np.allclose(self._latent.energy(state["z"][there]), state["energy"][there], rtol=1e-6, atol=1e-4):
            raise content.error("belongs to another problem: its chains have other energies here")
        counts = (content.value(name, int) for name in ("i", "solves", "pulls"))
        return _Record(state, list(arrays["draws"]), list(arrays["energies"]), list(arrays["rates"]), *counts)

    def write(self, record: _Record) -> None:
        """Keep the run as it is."""
        path, (chains, r) = self._path, record.state["z"].shape
        if path is not None:
            arrays = {f"state.{name}": x for name, x in record.state.items()} | {
                "y": self._latent.y, "draws": np.array(record.draws).reshape(-1, chains, r),
                "energies": np.array(record.energies).reshape(-1, chains),
                "rates": np.array(record.rates).reshape(-1, chains)}
            values = {"identity": self._identity, "i": record.i, "solves": record.solves, "pulls": record.pulls}
            on_root(self._latent.everyone, lambda: files.write(path, "chains", arrays, values))


def walk(latent: LatentProblem, kernel: Kernel, chains: int, *, seed: int, warmup: int, draws: int | None, most: int,
         budget: int | None, path: str | os.PathLike | None, progress: bool, name: str) -> Chains:
    """So many chains side by side: warm-up, then draws until there are so many, or enough.

    Parameters
    ----------
    draws, most : int or None, int
        Draws of each chain; None for as many as R-hat of 1.01 and 400 effective draws take, checked every 100 draws,
        and not more than `most`.
    budget : int, optional
        Number of forward solves within which the run ends, warm-up included, whatever it has.
    path : path, optional
        A file that keeps the run: the same call goes on from there, also to more draws.

    FileError is raised if the file belongs to another run or cannot be written.
    """
    everyone, before = latent.everyone, (latent.solves, latent.pulls)
    file = _File(path, latent, {"name": name, "seed": seed, "chains": chains, "r": latent.r, "warmup": warmup})
    record = file.read()
    if record is None:
        state = kernel.start()
        record = _Record(state, [], [], [], 0, latent.solves - before[0], latent.pulls - before[1])
        before = latent.solves, latent.pulls
    goal, last = warmup + (most if draws is None else draws), time.monotonic()

    def count() -> None:
        nonlocal before
        record.solves += latent.solves - before[0]
        record.pulls += latent.pulls - before[1]
        before = latent.solves, latent.pulls

    def done() -> bool:
        """Whether the run ends before its last draw; the same on all ranks."""
        if budget is not None and record.solves + kernel.cost(record.state) > budget:
            return True
        n = len(record.draws)
        return draws is None and n > 0 and n % _BLOCK == 0 and bool(everyone.bcast(record.summary(n).converged))
    with bar(goal, name, progress and not everyone.rank, initial=record.i) as shown:
        while record.i < goal and not done():
            acceptance = kernel.move(record.state, np.random.default_rng([stream(seed, name), record.i]))
            if record.i < warmup:
                kernel.adapt(record.state, acceptance, record.i, warmup)
            else:
                record.draws.append(record.state["z"].copy())
                record.energies.append(record.state["energy"].copy())
                record.rates.append(acceptance)
            record.i += 1
            count()
            shown.update()
            if everyone.bcast(time.monotonic() - last > _PAUSE):
                file.write(record)
                last = time.monotonic()
    file.write(record)
    return record.summary(len(record.draws) if draws is None else min(draws, len(record.draws)))
