r"""Monotone maps from numbers: the scale of each by its profile likelihood, and splines that make it Gaussian.

Were numbers Gaussian on a scale g, their mean log density would be
:math:`-\log \mathrm{std}\, g(x) + E \log g'(x)` up to a constant: the scale with the largest takes the place of the
identity where it gains enough. A spline goes through as many quantiles as the numbers tell, and on from the outermost
ones by least squares through what lies beyond, straight on that scale.
"""

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtri
from torch import Tensor

from fem_diffusion.diffusion.maps.monotone import MonotoneMap

__all__ = ["fit_scales", "gaussianised"]

# Gain of log density, in nats, from which a scale is worth its name.
_WORTH = 0.05
# Shares of the numbers whose sizes are tried as the unit of asinh, and share of the smallest that makes it a logarithm.
_SHARES, _FINE = (0.02, 0.1, 0.25, 0.5, 0.75), 1e-3
# Numbers beyond the outermost quantile, and distance of quantiles in standard deviations.
_BEYOND, _STEP = 25, 0.35
# Least and largest slope of a spline, in units of the standard deviation of the numbers on their scale.
_SLOPES = 0.02, 1e4
# Share of equal numbers from which no scale makes them Gaussian.
_TIES = 0.02


def fit_scales(x: Tensor, positive: bool = False) -> MonotoneMap | None:
    """The likeliest scale of each of n numbers (N, n); None where that is the identity of all.

    Where `positive`, numbers that all are so take their logarithm, and nothing else is inside; otherwise asinh stands
    for it, which knows what to do with the rest.
    """
    n = x.shape[1]
    kinds, centre, unit = ["identity"] * n, x.new_zeros(n), x.new_ones(n)
    size, median = x.abs(), x.median(0).values
    spread = (x - median).abs()
    for i in range(n):
        column = x[:, i:i + 1]
        if not float(column.std()) > 1e-12 * float(size[:, i].max()):
            continue
        least = float(size[:, i].min())
        tried = [("identity", 0.0, 1.0)]
        if least > 0:
            logs = positive and bool((column > 0).all())
            tried.append(("log", 0.0, 1.0) if logs else ("asinh", 0.0, _FINE * least))
        for middle, away in ((0.0, size[:, i]), (float(median[i]), spread[:, i])):
            units = torch.quantile(away[:100_000], torch.tensor(_SHARES, dtype=x.dtype))
            tried += [("asinh", middle, float(u)) for u in units if float(u) > 1e-12 * float(away.max()) > 0]
        scores = [_likelihood(column, *one) for one in tried]
        best = max(range(len(tried)), key=lambda j: scores[j])
        if scores[best] > scores[0] + _WORTH:
            kinds[i], centre[i], unit[i] = tried[best]
    if set(kinds) == {"identity"}:
        return None
    return MonotoneMap.of(tuple(kinds), centre, unit)


def _likelihood(column: Tensor, kind: str, centre: float, unit: float) -> float:
    """Mean log density of numbers (N, 1) that were Gaussian on a scale, up to a constant."""
    scale = MonotoneMap.of((kind,), column.new_full((1,), centre), column.new_full((1,), unit))
    return float(scale.log_slope(column).mean() - scale.forward(column).std().clamp(min=1e-300).log())


def gaussianised(x: Tensor, scale: MonotoneMap | None) -> MonotoneMap | None:
    """Maps that make each of n numbers (N, n) Gaussian, by splines on a scale; None where numbers are too few."""
    N, n = x.shape
    most = -float(ndtri(_BEYOND / N)) if N > 8 * _BEYOND else 0.0
    scale = MonotoneMap.of(("identity",) * n) if scale is None else scale
    m = int(most / _STEP)
    if m < 2:
        return None
    z = np.linspace(-most, most, 2 * m + 1)
    ordered = scale.forward(x).sort(0).values.numpy()
    scores = ndtri((np.arange(N) + 0.5) / N)
    parts = [_spline(column, scores, z) for column in ordered.T]
    knots, values, slopes = (torch.from_numpy(np.stack(part)) for part in zip(*parts))
    return MonotoneMap(scale.kinds, scale.centre, scale.unit, knots, values, slopes, scale.laws)


def _spline(ordered: np.ndarray, scores: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Knots, values and slopes (m,) that take sorted numbers (N,) to their scores (N,), through scores z (m,)."""
    m, std = len(z), float(ordered.std())
    if np.mean(np.diff(ordered) <= 0) > _TIES or not std > 0:
        unit = std if std > 0 else 1.0
        return ordered.mean() + unit * z, z, np.full(m, 1 / unit)
    knots = np.interp(z, scores, ordered)
    low, high = (bound / std for bound in _SLOPES)
    tails = []
    for beyond, end in ((slice(None, _BEYOND), 0), (slice(-_BEYOND, None), -1)):
        away = ordered[beyond] - knots[end]
        tails.append(np.clip(np.sum(away * (scores[beyond] - z[end])) / max(np.sum(away**2), 1e-300), low, high))
    # No piece is steeper or flatter than the bounds, whatever gaps and heaps there are.
    pieces = np.clip(np.diff(knots), np.diff(z) / high, np.diff(z) / low)
    knots = knots[m // 2] + np.concatenate([[0.0], np.cumsum(pieces)]) - np.sum(pieces[:m // 2])
    slopes = np.clip(PchipInterpolator(knots, z).derivative()(knots), low, high)
    slopes[0], slopes[-1] = tails
    return knots, z, slopes
