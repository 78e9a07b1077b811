r"""What no parameter explains of one measurement, in total and sensor by sensor, and how far from the prior it leads.

Let J be the derivative of the readings by standard normal latents, in units of the noise, at a point :math:`\hat z`.
Where model and noise are right, :math:`d = y - h(\hat z) + J \hat z` is as :math:`J \zeta + \varepsilon`, wherever
the point is as long as the problem is linear. What nothing explains is :math:`\hat r = (1 + J J^T)^{-1} d`, and
:math:`J^T \hat r` is the most probable point. Sensor by sensor :math:`t_i = (\Lambda d)_i / \Lambda_{ii}^{1/2}`,
with :math:`\Lambda` the inverse of the covariance of d in the sensors' own units, is what one reads beside what the
others let expect.

Draws of d give the law of every size that is looked at. Beyond all of them its tail is that of Gaussian noise: sums of
squares with different weights are bounded by Chernoff, the largest of t by Bonferroni.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, norm

__all__ = ["Residual", "residual"]

# Draws of the law of a residual, and sensors that are named.
_DRAWS, _NAMED = 4000, 5


@dataclass(frozen=True)
class Residual:
    """What no parameter near the samples explains of a measurement.

    Parameters
    ----------
    size, expected, p : float
        Norm of the residual in units of the noise, its root mean square under the model, and the p-value, two-sided.
    prior, prior_p : float
        Distance of the most probable point from the prior mean over what is expected, and p of one so far out.
    t, sensor_p : numpy.ndarray
        What each sensor reads beside what the others let expect, in standard deviations, and its p-value, shape (k,).
    largest_p : float
        Of the largest of these.
    odd, others_p : tuple of int, float
        Sensors that the others contradict, the worst first, and p of all others together without these.
    spread : numpy.ndarray
        Standard deviation of each reading given the others, in the units of the sensors, shape (k,).
    """

    size: float
    expected: float
    p: float
    prior: float
    prior_p: float
    t: np.ndarray
    sensor_p: np.ndarray
    largest_p: float
    odd: tuple[int, ...]
    others_p: float
    spread: np.ndarray


def residual(d: np.ndarray, seen: np.ndarray, whiten: np.ndarray, noise: np.ndarray | None, seed: int,
             level: float) -> Residual:
    """What nothing explains, of d (k,) with the covariance 1 + J Jᵀ, `seen` (k, k) being J Jᵀ.

    Parameters
    ----------
    whiten : numpy.ndarray
        W (k, k), which whitens the noise.
    noise : numpy.ndarray or None
        Draws of whitened noise (n, k); standard normal ones where left out.
    seed, level : int, float
        Of the draws; p-value below which sensors are named.
    """
    k = len(d)
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((_DRAWS, k)) if noise is None else noise
    values, axes = np.linalg.eigh((seen + seen.T) / 2)
    values = np.maximum(values, 0.0)
    factor, left = axes * np.sqrt(values), axes / (1 + values) @ axes.T
    draws = rng.standard_normal((len(noise), k)) @ factor.T + noise
    rest, rests = left @ d, draws @ left
    sizes, away = np.linalg.norm(rests, axis=1), np.linalg.norm(rests @ factor, axis=1)
    size, out = float(np.linalg.norm(rest)), float(np.linalg.norm(rest @ factor))
    precision = whiten.T @ left @ whiten
    root = np.sqrt(precision.diagonal())
    t, ts = rest @ whiten / root, rests @ whiten / root
    largest, most = np.abs(ts).max(axis=1), float(np.abs(t).max())
    expected = np.sqrt((sizes**2).mean())
    tail = _tail(1 / (1 + values), size**2)
    p = min(1.0, 2 * min(_above(sizes, size, tail), _above(-sizes, -size, tail)))
    unwhiten = np.linalg.inv(whiten)
    threshold = max(float(np.quantile(largest, 1 - level)), float(norm.isf(level / (2 * k))))
    odd, others_p = _odd(unwhiten @ d, unwhiten @ (np.eye(k) + seen) @ unwhiten.T, threshold)
    return Residual(size, float(expected), p, out / max(float(np.sqrt((away**2).mean())), 1e-300),
                    _above(away, out, _tail(values / (1 + values), out**2)), t, 2 * norm.sf(np.abs(t)),
                    _above(largest, most, 2 * k * float(norm.sf(most))), odd, others_p, 1 / root)


def _above(draws: np.ndarray, value: float, tail: float) -> float:
    """Share of draws of a law that are at least as large as a value; beyond all of them at most the chance `tail`."""
    above = int((draws >= value).sum())
    return (1 + above) / (1 + len(draws)) if above else min(tail, 1 / (1 + len(draws)))


def _tail(weights: np.ndarray, value: float) -> float:
    """A bound of the chance that squares of standard normal numbers, times weights, sum up to a value or farther out.

    Chernoff's: the smallest exp(K(a) - a value) with K(a) = -log(1 - 2 a weights) / 2, summed up.
    """
    weights = weights[weights > 1e-12 * weights.max(initial=0.0)]
    if not len(weights) or not 0 < value < np.inf:
        return 0.0 if value == np.inf else 1.0
    low, high = -len(weights) / (2 * value), (1 - 1e-9) / (2 * weights.max())

    def slope(a: float) -> float:
        return float((weights / (1 - 2 * a * weights)).sum()) - value
    a = high if slope(high) < 0 else low if slope(low) > 0 else float(brentq(slope, low, high))
    return float(min(1.0, np.exp(-np.log1p(-2 * a * weights).sum() / 2 - a * value)))


def _odd(d: np.ndarray, covariance: np.ndarray, threshold: float) -> tuple[tuple[int, ...], float]:
    """Entries of d (k,), the worst first, without which all others are as their covariance (k, k) says; p of these."""
    odd, kept = [], list(range(len(d)))
    while True:
        precision = np.linalg.inv(covariance[np.ix_(kept, kept)])
        pulled = precision @ d[kept]
        t = np.abs(pulled) / np.sqrt(precision.diagonal())
        if t.max() < threshold or len(odd) == min(_NAMED, max(1, len(d) // 2)) or len(kept) == 1:
            break
        odd.append(kept.pop(int(t.argmax())))
    if t.max() >= threshold and len(kept) == 1 and not odd:
        odd = kept
    return tuple(odd), float(chi2(len(kept)).sf(pulled @ d[kept]))
