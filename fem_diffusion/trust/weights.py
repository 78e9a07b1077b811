"""Importance weights: samples of one law as those of another, where the two are near."""

from dataclasses import dataclass

import numpy as np
from arviz_stats.base.array import array_stats
from scipy.special import logsumexp

__all__ = ["Weights", "mixture", "resample", "smoothed"]

# Fewer weights than these say nothing about their tail.
_FEWEST = 25
# Largest weight over the mean one, up to which weights count as near equal.
_EVEN = 3.0
# Iterations for the constants of a mixture, and change at which they end.
_ROUNDS, _CLOSE = 1000, 1e-8


@dataclass(frozen=True, eq=False)
class Weights:
    """Normalised weights (n,), their effective sample size, and the tail index k-hat of the raw ones."""

    values: np.ndarray
    ess: float
    khat: float


def smoothed(energy: np.ndarray, proposal: np.ndarray) -> Weights:
    """Pareto-smoothed weights (n,) of draws of exp(-proposal) for the law exp(-energy) (Vehtari et al. 2024, PSIS).

    Energies (n,) are known up to constants; an infinite one is a weight of zero. Above a k-hat of 0.7 weights do not
    say what the law is; infinity stands for too few draws to tell.
    """
    log = np.where(np.isfinite(energy), proposal - energy, -np.inf)
    there = np.isfinite(log)
    values, khat = np.zeros(len(log)), np.inf
    if there.sum() >= _FEWEST:
        log = log[there] - log[there].max()
        # Weights that are near equal have no tail, whatever its shape.
        khat = 0.0
        if np.exp(log).mean() < 1 / _EVEN:
            # ArviZ takes the log likelihoods whose inverse the weights are.
            # Where nearly all weight is on one draw there is no tail to fit.
            with np.errstate(all="ignore"):
                smooth, khat = array_stats.psislw(-log)
            log, khat = (smooth, khat) if np.isfinite(smooth).all() and np.isfinite(khat) else (log, np.inf)
        values[there] = np.exp(log - log.max())
        values /= values.sum()
    ess = float(1 / (values**2).sum()) if values.any() else 0.0
    return Weights(values, ess, float(khat))


def mixture(energies: np.ndarray, counts: np.ndarray, former: bool = False) -> np.ndarray:
    """Energies (n,) of the mixture of K laws that n draws are of, from those under each law, (K, n).

    The first counts[0] draws are of the first law and so on. Energies are known up to constants, which follow from the
    draws themselves (Shirts and Chodera 2008, equation 11): so a draw that one law had missed is none of another.
    `former` leaves out, for each draw, the laws that come after its own: those that have learnt from it say of it what
    the truth says, and of the places between draws they do not.
    """
    shares, free = np.log(counts / counts.sum())[:, None], np.zeros((len(counts), 1))
    for _ in range(_ROUNDS if len(counts) > 1 else 0):
        mixed = logsumexp(shares + free - energies, axis=0)
        found = -logsumexp(-energies - mixed, axis=1)[:, None]
        found -= found[0]
        done, free = np.abs(found - free).max() < _CLOSE, found
        if done:
            break
    if former:
        laws = np.arange(len(counts))
        shares = np.where(laws[:, None] <= np.repeat(laws, counts), shares, -np.inf)
        shares = shares - logsumexp(shares, axis=0)
    return -logsumexp(shares + free - energies, axis=0)


def resample(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers (n,) of draws with weights (N,), each drawn as often as n times its weight, rounded up or down."""
    places = (np.arange(n) + rng.uniform()) / n
    return np.minimum(np.searchsorted(np.cumsum(weights), places), len(weights) - 1)
