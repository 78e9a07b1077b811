"""What is looked at before a posterior is handed out: does it explain the measurement, and what is left out.

Two looks. Whitened residuals of a posterior draw have, over measurements, the law of the noise itself, whatever the
problem: their squares sum up to chi-square with k degrees of freedom, and the mean over draws spreads less, so that
what is rarer than a level is rarer still where nothing is wrong. But hundreds of modes take in what a broken sensor
reads. Where the problem is linearised, `residual` tells what they had to do for it, as in `check`.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fem_diffusion.diffusion import MeasurementWarning
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.residual import Residual, residual

__all__ = ["Told", "conflict", "gaussian_conflict", "point_conflict", "unseen"]

# Chance below which a measurement is in conflict with its problem.
_CONFLICT = 1e-5
# Smallest share of its variance that a posterior leaves of a residual, and draws a sensor that tell their covariance.
_LEFT, _DRAWS = 0.05, 5
# Readings up to which a derivative is taken for a look, and squares of its misfit, in units of those of draws, beyond
# which their mean is no likely point, as between two modes.
_ROWS, _OFF = 100, 2.0


class Told(NamedTuple):
    """Notes, and their light: "red" for a conflict, "yellow" for noise that is smaller than assumed, "green" for none.
    """

    notes: tuple[str, ...] = ()
    light: str = "green"


# The innovation d (k,) and the covariance J Jᵀ (k, k) of what is seen, both whitened, and what whitens, (k, k).
_Linear = tuple[np.ndarray, np.ndarray, np.ndarray]


def conflict(latent: LatentProblem, readings: np.ndarray, what: str, weights: np.ndarray | None = None,
             z: np.ndarray | None = None) -> Told:
    """What noise-free readings (n, k) of posterior draws say about problem and measurement (collective).

    A note with a MeasurementWarning, at the caller's caller's caller, where their residuals are no noise. Draws count
    by their weights (n,); those whose solves have failed do not. With z (r,), the mean of the draws, and a derivative
    the problem that is linearised there tells the rest, and which sensors are odd: two solves and an adjoint one for
    each of up to 100 readings.
    """
    good = np.isfinite(readings).all(axis=1)
    if not good.any() or not len(latent.y):
        return Told()
    k = len(latent.y)
    white = latent.whitened(readings[good])[:, :k]
    share = np.ones(len(white)) if weights is None else weights[good]
    share = share / share.sum()
    size, mean = float(share @ (white**2).sum(axis=1)), share @ white
    found = near = None if z is None else _near(latent, z, size)
    if found is None:
        left = np.eye(len(mean))
        if len(white) >= _DRAWS * len(mean):
            values, axes = np.linalg.eigh((white - mean).T @ ((white - mean) * share[:, None]))
            left = axes * np.maximum(1 - values, _LEFT) @ axes.T
        whole = np.linalg.inv(left)
        found = -whole @ mean, whole - np.eye(len(mean)), latent.noise_matrix(share @ readings[good])[:k, :k]
    rest = latent.everyone.bcast(residual(*found, latent.noise_draws, 0, _CONFLICT))
    return _told(latent.problem.names, what, size, latent.chances(size), rest, near is not None, 5)


def _near(latent: LatentProblem, z: np.ndarray, size: float) -> _Linear | None:
    """The problem linearised at the mean z (r,) of draws, if there is a derivative and the mean is a likely point."""
    if not (latent.differentiable and latent.basis.standard_prior and len(latent.y) <= _ROWS):
        return None
    # Draws are not lost for a derivative of the user's own that fails.
    with contextlib.suppress(Exception):
        misfit, jacobian, whiten = _of_sensors(latent, z)
        if misfit @ misfit <= _OFF * max(size, len(misfit)):
            return jacobian @ z - misfit, jacobian @ jacobian.T, whiten
    return None


def _of_sensors(latent: LatentProblem, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `LatentProblem.linearised`, with what whitens the noise, without the entries of unknown levels."""
    k = len(latent.y)
    misfit, jacobian = latent.linearised(z)
    return misfit[:k], jacobian[:k], latent.whitener(z)[:k, :k]


def point_conflict(latent: LatentProblem, z: np.ndarray) -> Told:
    """As `conflict`, of the most probable latents (r,), by the linearised problem there: costs of `linearised`."""
    if not len(latent.y):
        return Told()
    misfit, jacobian, whiten = _of_sensors(latent, z)
    linear = jacobian @ z - misfit, jacobian @ jacobian.T, whiten
    return gaussian_conflict(latent.problem.names, latent.everyone.bcast(linear), latent.chances, 4, misfit,
                             latent.noise_draws, latent.basis.standard_prior)


def gaussian_conflict(names: tuple[str, ...], linear: _Linear, chances: Callable[[float], tuple[float, float]],
                      depth: int, misfit: np.ndarray | None = None, draws: np.ndarray | None = None,
                      normal: bool = True) -> Told:
    """As `conflict`, of a posterior that is Gaussian, or taken to be so, so many calls up.

    Around a whitened misfit (k,), that of the linear problem where left out; `draws` are those of noise of the user's
    own, and `normal` says whether latents are so.
    """
    d, seen, _ = linear
    left = np.linalg.inv(np.eye(len(d)) + seen)
    misfit = -left @ d if misfit is None else misfit
    size = float(misfit @ misfit + (left * seen).sum())
    return _told(names, "most probable parameter", size, chances(size), residual(*linear, draws, 0, _CONFLICT), normal,
                 depth + 1)


def _told(names: tuple[str, ...], what: str, size: float, chances: tuple[float, float], rest: Residual, known: bool,
          depth: int) -> Told:
    """A note, and a warning, where a squared residual is improbable, or what nothing explains, if its law is known."""
    # Where without the odd ones the others are odd still, it is not the sensors; one alone has no others.
    several = len(rest.t) > 1
    odd = rest.odd if rest.others_p >= _CONFLICT and several else ()
    worst = " and ".join(f"sensor {names[i] if names else i} ({abs(rest.t[i]):.2g} standard deviations)" for i in odd)
    why = "the measurement is in conflict with the problem" + f", for the others contradict {worst}" * bool(worst)
    small = "the noise is smaller than assumed, and the posterior wider than it need be"
    light, ratio = "red", rest.size / rest.expected
    at = "these sensors" if len(odd) > 1 else "this sensor" if odd else "the units of the sensors"
    if min(chances) <= _CONFLICT:
        light = "red" if chances[0] <= chances[1] else "yellow"
        note = (f"The residuals of the {what} are {np.sqrt(size / len(rest.t)):.2g} noise standard deviations, root "
                f"mean square, which is not the law of the noise: {why if light == 'red' else small}.")
    elif not known:
        return Told()
    elif several and (rest.largest_p < _CONFLICT or rest.p < _CONFLICT and ratio > 1):
        note = (f"Nothing near the {what} explains the measurement, and what is left of it is {ratio:.2g} times what "
                f"the noise would leave: {why}.")
    elif rest.p < _CONFLICT and ratio <= 1:
        light = "yellow"
        note = f"What is left of the measurement is {ratio:.2g} times what the noise would leave: {small}."
    elif rest.prior_p < _CONFLICT and rest.prior > 1:
        at = "sensors, the prior"
        note = (f"The parameter that fits best is {rest.prior:.2g} times as far from the prior mean as prior and noise "
                f"let expect: {why}.")
    else:
        return Told()
    at = "the units of the sensors" if light == "yellow" else at
    warnings.warn(f"{note} Check {at}, the noise and the forward problem.", MeasurementWarning, stacklevel=depth)
    return Told((note,), light)


def unseen(latent: LatentProblem, z: np.ndarray, seed: int = 0) -> tuple[float, np.ndarray]:
    """What modes past r add to the reading that sees most of them, in standard deviations of its noise (collective).

    The root mean square over those of the latents z (B, r) for which both solves succeed, and the readings (B, k)
    without them. NaN where there are none, and where such modes are not known (POD): there nothing is solved.
    """
    if not latent.basis.standard_prior:
        return np.nan, np.full((len(z), latent.width), np.nan)
    whole, part = latent.refilled(z, seed)
    change = (whole - part)[np.isfinite(whole - part).all(axis=1)]
    return float((np.sqrt((change**2).mean(axis=0)) / latent.noise_std).max()) if len(change) else np.nan, part
