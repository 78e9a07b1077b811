r"""What the solver says of samples near one measurement: where they should be, and how wide.

Let :math:`E(z) = -\log p(z | y)` and J the derivative of the readings by standard normal latents, in units of the
noise, at the most probable point near the samples. Its singular vectors V with singular values s are directions of
which the data tell where s is large, and :math:`1/\sqrt{1 + s^2}` is how wide the posterior is there. Samples of the
posterior itself, Gaussian or not, satisfy Stein's identities

.. math:: E\,\nabla E(z) = 0, \qquad E\,\nabla E(z) (z - \bar z)^T = I .

With :math:`a = \sqrt{1 + s^2}\, V^T (z - \bar z)` and :math:`b = V^T \nabla E / \sqrt{1 + s^2}` the mean of b is how
far the samples are off, and that of a b the square of how much too wide they are, in units of that width.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, f, t as student

__all__ = ["Shape", "shapes"]

# Singular values from which on a direction counts as told by the data.
_TOLD = 0.5


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
