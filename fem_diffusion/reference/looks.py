"""What is looked at before a posterior is handed out: do its residuals have the law of the noise, and what is left out.

Whitened residuals of a posterior draw have, over measurements, the law of the noise itself, whatever the problem: their
squares sum up to chi-square with k degrees of freedom. The mean over draws spreads less, so that what is rarer than a
level is rarer still where nothing is wrong.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import chi2

from fem_diffusion.diffusion import MeasurementWarning
from fem_diffusion.errors import SolveError
from fem_diffusion.reference.latents import LatentProblem

__all__ = ["Told", "conflict", "gaussian_conflict", "point_conflict", "unseen"]

# Chance below which a measurement is in conflict with its problem.
_CONFLICT = 1e-5
# One sensor in so many may be what is wrong; share of a misfit that an odd one makes, and that one makes alone;
# smallest share of its variance that a posterior leaves of a residual; draws a sensor that tell their covariance.
_FEW, _SHARE, _ALONE, _LEFT, _DRAWS = 4, 0.4, 0.6, 0.05, 5


class Told(NamedTuple):
    """Notes, and their light: "red" for a conflict, "yellow" for noise that is smaller than assumed, "green" for none.
    """

    notes: tuple[str, ...] = ()
    light: str = "green"


def conflict(latent: LatentProblem, readings: np.ndarray, what: str, weights: np.ndarray | None = None,
             z: np.ndarray | None = None) -> Told:
    """What noise-free readings (n, k) of posterior draws say about problem and measurement (collective).

    A note with a MeasurementWarning, at the caller's caller's caller, where their residuals are no noise. Draws count
    by their weights (n,); those whose solves have failed do not. Where they are few, the problem that is linearised at
    latents z (r,) tells which sensors are odd.
    """
    good = np.isfinite(readings).all(axis=1)
    if not good.any() or not len(latent.y):
        return Told()
    white = latent.whitened(readings[good])
    share = np.ones(len(white)) if weights is None else weights[good]
    share = share / share.sum()
    size, mean = float(share @ (white**2).sum(axis=1)), share @ white
    chances, whiten = latent.chances(size), latent.noise_matrix(share @ readings[good])
    spread = (white - mean).T @ ((white - mean) * share[:, None])
    if len(white) < _DRAWS * len(mean):
        spread = np.zeros_like(spread)
        if min(chances) <= _CONFLICT and latent.differentiable and z is not None:
            with contextlib.suppress(SolveError):
                mean, jacobian = latent.linearised(z)
                spread, whiten = _spread(jacobian), latent.whitener(z)
    return _told(latent.problem.names, what, size, mean, spread, whiten, chances, 4)


def _spread(jacobian: np.ndarray) -> np.ndarray:
    """Covariance (k, k) of whitened readings of the Gaussian posterior with their derivative (k, r)."""
    return jacobian @ np.linalg.solve(np.eye(jacobian.shape[1]) + jacobian.T @ jacobian, jacobian.T)


def point_conflict(latent: LatentProblem, z: np.ndarray) -> Told:
    """As `conflict`, of the most probable latents (r,), by the linearised problem there: costs of `linearised`."""
    if not len(latent.y):
        return Told()
    misfit, jacobian = latent.linearised(z)
    free = len(misfit) + len(z) if latent.least_squares else None
    return gaussian_conflict(latent.problem.names, misfit, _spread(jacobian), latent.whitener(z), float(z @ z), free,
                             latent.chances, 4)


def gaussian_conflict(names: tuple[str, ...], misfit: np.ndarray, spread: np.ndarray, whiten: np.ndarray,
                      squared: float, free: int | None, chances: Callable[[float], tuple[float, float]],
                      depth: int) -> Told:
    """As `conflict`, of draws with a mean whitened `misfit` (k,) of covariance `spread` (k, k), so many calls up.

    Where twice the energy is the squares of misfit and latents, the latter `squared` at the mean, their sum there is at
    most that of the truth, chi-square with k + r degrees of freedom, and has k of them in a linear problem: `free`.
    """
    size = float(misfit @ misfit + spread.trace())
    found = _told(names, "most probable parameter", size, misfit, spread, whiten, chances(size), depth)
    if not found.notes and free is not None and chi2.sf(float(misfit @ misfit) + squared, free) < _CONFLICT:
        note = (f"The most probable parameter is {np.sqrt(squared):.2g} prior standard deviations from the prior "
                 "mean, farther than prior and noise allow: the measurement is in conflict with the problem.")
        warnings.warn(f"{note} Check sensors, prior and forward problem.", MeasurementWarning, stacklevel=depth)
        return Told((note,), "red")
    return found


def _odd(misfit: np.ndarray, spread: np.ndarray, whiten: np.ndarray) -> list[tuple[int, float]]:
    """Sensors without which the others agree, and how many standard deviations each is from what those tell.

    Of a Gaussian posterior whose whitened misfit has this mean and covariance (k, k): with S the covariance of
    measurements, d how far this one is from its prediction, and S⁻¹ = Wᵀ(I - spread)W, it is (S⁻¹d) / sqrt(diag S⁻¹);
    the farthest is left out, and the next is looked for without it. Where that takes more than a few, only one that
    makes most of the misfit counts.
    """
    values, axes = np.linalg.eigh((spread + spread.T) / 2)
    Q = whiten.T @ (axes * np.maximum(1 - values, _LEFT)) @ axes.T @ whiten
    q, rest, found, alone = whiten.T @ misfit, list(range(len(misfit))), [], 0
    while chi2.sf(size := float(q @ np.linalg.solve(Q, q)), len(q)) < _CONFLICT:
        apart = np.abs(q) / np.sqrt(Q.diagonal())
        i = int(apart.argmax())
        found.append((rest.pop(i), float(apart[i])))
        if len(found) > max(1, len(misfit) // _FEW) or not rest or apart[i]**2 < _SHARE * size:
            return found[:alone]
        alone = alone or int(apart[i]**2 > _ALONE * size)
        others = np.arange(len(q)) != i
        Q, q = (Q - np.outer(Q[i], Q[i]) / Q[i, i])[others][:, others], (q - Q[i] * q[i] / Q[i, i])[others]
    return found


def _told(names: tuple[str, ...], what: str, size: float, misfit: np.ndarray, spread: np.ndarray, whiten: np.ndarray,
          chances: tuple[float, float], depth: int) -> Told:
    """A note, and a warning, where it is improbable that a squared residual is so large, or so small."""
    if min(chances) > _CONFLICT:
        return Told()
    large = chances[0] <= chances[1]
    odd = _odd(misfit, spread, whiten) if large else []
    worst = " and ".join(f"sensor {names[i] if names else i} ({apart:.2g} standard deviations)" for i, apart in odd)
    why = ("the measurement is in conflict with the problem"
           + f", for the others contradict {worst}" * bool(worst) if large else
           "the noise is smaller than assumed, and the posterior wider than it need be")
    note = (f"The residuals of the {what} are {np.sqrt(size / len(misfit)):.2g} noise standard deviations, root mean "
            f"square, which is not the law of the noise: {why}.")
    at = "these sensors" if len(odd) > 1 else "this sensor" if odd else "the units of the sensors"
    warnings.warn(f"{note} Check {at}, the noise and the forward problem.", MeasurementWarning, stacklevel=depth + 1)
    return Told((note,), "red" if large else "yellow")


def unseen(latent: LatentProblem, z: np.ndarray, seed: int = 0) -> tuple[float, np.ndarray]:
    """What modes past r add to the reading that sees most of them, in standard deviations of its noise (collective).

    The root mean square over those of the latents z (B, r) for which both solves succeed, and the readings (B, k)
    without them. NaN where there are none, and where such modes are not known (POD): there nothing is solved.
    """
    if not latent.basis.standard_prior:
        return np.nan, np.full((len(z), len(latent.y)), np.nan)
    whole, part = latent.refilled(z, seed)
    change = (whole - part)[np.isfinite(whole - part).all(axis=1)]
    return float((np.sqrt((change**2).mean(axis=0)) / latent.noise_std).max()) if len(change) else np.nan, part
