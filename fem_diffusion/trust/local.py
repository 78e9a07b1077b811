r"""What the solver says of samples near one measurement: where they should be, how wide, and what nothing explains.

Let :math:`E(z) = -\log p(z | y)` and J the derivative of the readings by standard normal latents, in units of the
noise, at the most probable point near the samples. Its singular vectors V with singular values s are directions of
which the data tell where s is large, and :math:`1/\sqrt{1 + s^2}` is how wide the posterior is there. Samples of the
posterior itself, Gaussian or not, satisfy Stein's identities

.. math:: E\,\nabla E(z) = 0, \qquad E\,\nabla E(z) (z - \bar z)^T = I .

With :math:`a = \sqrt{1 + s^2}\, V^T (z - \bar z)` and :math:`b = V^T \nabla E / \sqrt{1 + s^2}` the mean of b is how
far the samples are off, and that of a b the square of how much too wide they are, in units of that width.

What no parameter explains is the residual at that point, in units of the noise :math:`\hat r = (1 + J J^T)^{-1} d`
with :math:`d = y - h(\hat z) + J \hat z`. Where model and noise are right, d is as :math:`J \zeta + \varepsilon`, and
draws of that give the law of every size that is looked at. Sensor by sensor :math:`t_i = (\Lambda d)_i /
\Lambda_{ii}^{1/2}`, with :math:`\Lambda` the inverse of the covariance of d in the sensors' own units, is what one
reads beside what the others let expect.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, f, norm, t as student

__all__ = ["Residual", "Shape", "residual", "shapes"]

# Singular values from which on a direction counts as told by the data.
_TOLD = 0.5
# Draws of the law of a residual, and sensors that are named.
_DRAWS, _NAMED = 4000, 5


@dataclass(frozen=True)
class Shape:
    """How samples lie beside the posterior in some directions.

    Parameters
    ----------
    count : int
        Number of directions.
    shift, width : float
        How far off they are, root mean square in units of the posterior's width, without what chance makes of it; how
        many times too wide, root mean square.
    shift_p, width_p : float
        Of samples of the posterior being so far off, or as far from its width, up or down.
    widths, widest_p : numpy.ndarray, float
        Direction by direction, shape (count,), and p of the one that is farthest from 1.
    """

    count: int
    shift: float
    shift_p: float
    width: float
    width_p: float
    widths: np.ndarray
    widest_p: float


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


def shapes(z: np.ndarray, gradient: np.ndarray, jacobian: np.ndarray) -> tuple[Shape | None, Shape | None]:
    """Samples (n, r) with the gradients (n, r) of the energy there, beside the posterior with derivative J (k, r).

    In the directions of which the data tell, and in all others; None where there are none.
    """
    _, s, rows = np.linalg.svd(jacobian)
    s = np.concatenate([s, np.zeros(len(rows) - len(s))])
    scale = np.sqrt(1 + s**2)
    a, b = (z - z.mean(axis=0)) @ rows.T * scale, gradient @ rows.T / scale
    told = s >= _TOLD
    return _shape(a[:, told], b[:, told]), _shape(a[:, ~told], b[:, ~told])


def _shape(a: np.ndarray, b: np.ndarray) -> Shape | None:
    n, count = a.shape
    if not count:
        return None
    mean, covariance = b.mean(axis=0), np.atleast_2d(np.cov(b.T))
    variance = float(covariance.trace()) / count
    score = n * (mean**2).sum() / (count * variance)
    shift = np.sqrt(max((mean**2).mean() - variance / n, 0.0))
    products = a * (b - mean) * n / (n - 1)
    widths, each = zip(*map(_width, products.T, [n - 1] * count))
    width, width_p = _width(products.mean(axis=1), count * (n - 1))
    free = _rank(covariance, n)
    return Shape(count, float(shift), float(f(free, free * (n - 1)).sf(score)), width, width_p, np.array(widths),
                 min(1.0, count * min(each)))


def _width(products: np.ndarray, free: int) -> tuple[float, float]:
    """Root of the mean of independent products (n,), and p of a mean so far from one, up or down.

    The mean is as a chi-square law over its degrees of freedom, at most `free`; fewer where laws that are not Gaussian
    spread more. Where products spread so much that their mean is not known from zero, a small one says nothing, and the
    t-test of a mean of one has to find it too small as well.
    """
    n, mean = len(products), float(products.mean())
    error = float(products.std(ddof=1)) / np.sqrt(n)
    size = max(mean, 1e-4)
    degrees = float(np.clip(2 * size**2 / max(error**2, 1e-300), 2.0, free))
    low = max(chi2(degrees).cdf(degrees * size), student(n - 1).cdf((mean - 1) / max(error, 1e-300)))
    return float(np.sqrt(size)), min(1.0, 2 * float(min(low, chi2(degrees).sf(degrees * size))))


def _rank(covariance: np.ndarray, n: int) -> float:
    """Number of equal and independent directions that spread as n vectors of a covariance (r, r) do, at most r.

    tr(S)² / tr(S²), with an estimate of the latter that has no bias (Chen, Zhang and Zhong 2010, section 2).
    """
    whole, r = float(covariance.trace()), len(covariance)
    squares = (n - 1)**2 / ((n - 2) * (n + 1)) * (float((covariance**2).sum()) - whole**2 / (n - 1))
    return float(np.clip(whole**2 / max(squares, whole**2 / r), 1.0, r))


def residual(misfit: np.ndarray, z: np.ndarray, jacobian: np.ndarray, whiten: np.ndarray, noise: np.ndarray | None,
             seed: int, level: float) -> Residual:
    """What nothing explains, from the whitened misfit (k,) and its derivative J (k, r) at latents z (r,).

    Parameters
    ----------
    whiten : numpy.ndarray
        W (k, k), which whitens the noise.
    noise : numpy.ndarray or None
        Draws of whitened noise (n, k); standard normal ones where left out.
    seed, level : int, float
        Of the draws; p-value below which sensors are named.
    """
    k, r = jacobian.shape
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((_DRAWS, k)) if noise is None else noise
    d = jacobian @ z - misfit
    draws = rng.standard_normal((len(noise), r)) @ jacobian.T + noise
    left = np.linalg.inv(np.eye(k) + jacobian @ jacobian.T)
    rest, rests = left @ d, draws @ left
    sizes, away = np.linalg.norm(rests, axis=1), np.linalg.norm(rests @ jacobian, axis=1)
    size, out = float(np.linalg.norm(rest)), float(np.linalg.norm(rest @ jacobian))
    precision = whiten.T @ left @ whiten
    root = np.sqrt(precision.diagonal())
    t, ts = rest @ whiten / root, rests @ whiten / root
    largest = np.abs(ts).max(axis=1)
    expected = np.sqrt((sizes**2).mean())
    p = min(1.0, 2 * min(_above(sizes, size), _above(-sizes, -size)))
    unwhiten = np.linalg.inv(whiten)
    threshold = max(float(np.quantile(largest, 1 - level)), float(norm.isf(level / (2 * k))))
    odd, others_p = _odd(unwhiten @ d, unwhiten @ (np.eye(k) + jacobian @ jacobian.T) @ unwhiten.T, threshold)
    return Residual(size, float(expected), p, out / max(float(np.sqrt((away**2).mean())), 1e-300), _above(away, out), t,
                    2 * norm.sf(np.abs(t)), _above(largest, float(np.abs(t).max())), odd, others_p, 1 / root)


def _above(draws: np.ndarray, value: float) -> float:
    """Share of draws of a law that are at least as large as a value, which counts as one of them."""
    return float((1 + (draws >= value).sum()) / (1 + len(draws)))


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
