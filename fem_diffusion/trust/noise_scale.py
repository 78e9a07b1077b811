r"""By what the noise would have to be multiplied for sensors to surprise each other as much as they should.

At each posterior the readings are linearised, :math:`d = y - h(\hat z) + G (\hat z - \bar z) \sim N(0, S)` with
:math:`S(\lambda) = G C G^T + \Sigma + \lambda^2 R`, exactly where latents and readings are jointly Gaussian. What the
others say of sensors g is in :math:`\Lambda = S^{-1}`: a residual :math:`\Lambda_{gg}^{-1} (\Lambda d)_g` with the
covariance :math:`\Lambda_{gg}^{-1}`. Their mean square in units of their deviations falls with :math:`\lambda`, and is
one where the noise is right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import t as student

from fem_diffusion.diffusion.sensors import EmulatedSensors

__all__ = ["NoiseScale", "noise_scale"]

# Factors that are looked at, and the fewest sensors that tell one.
_FACTORS = 2.0**np.linspace(-6, 6, 49)
_FEWEST = 3


@dataclass(frozen=True, eq=False)
class NoiseScale:
    """A factor of the noise's standard deviation.

    Parameters
    ----------
    value : float
        The factor; 1/64 or 64 where it is beyond.
    assumed : numpy.ndarray
        Standard deviation of the noise of each reading that the model was trained with, shape (k,).
    sensors : int
        By which the factor is known.
    factors, statistic : numpy.ndarray
        Growing factors, and of each the mean square residual minus one over its standard error, sensors being
        independent, shape (f,).
    """

    value: float
    assumed: np.ndarray
    sensors: int
    factors: np.ndarray
    statistic: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the noise of each reading as the sensors tell it, shape (k,)."""
        return self.value * self.assumed

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The factors that the sensors do not exclude with this confidence; from 0, or to infinity, where none is."""
        reach = student.isf((1 - level) / 2, self.sensors - 1)
        low, high = (_crossing(self.factors, self.statistic - x) for x in (reach, -reach))
        return (0.0 if low == self.factors[0] else low), (np.inf if high == self.factors[-1] else high)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.2g} ({low:.2g} to {high:.2g})"


def noise_scale(sensors: EmulatedSensors, values: np.ndarray, use: np.ndarray,
                groups: Sequence[np.ndarray]) -> NoiseScale | str:
    """The factor for measurements (n, k), of which readings `use` (n, k) count; columns of each sensor are a group.

    Where none is told, why, in a sentence: the law of the noise has levels or outliers of its own, readings are on
    another scale, or there are less than three sensors.
    """
    law = sensors.denoiser.base.law
    if law is not None and (law.noise.levels or law.noise.heavy):
        return "The law of the noise has outliers or a level of its own, and no factor of it is told."
    if sensors.denoiser.readings is not None:
        return "Readings are on a scale of their own, where their noise has no factor, and none is told."
    squares, counts = np.zeros((len(groups), len(_FACTORS))), np.zeros(len(groups))
    patterns, which = np.unique(use, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        kept = np.flatnonzero(pattern)
        places = [(g, np.searchsorted(kept, group[pattern[group]])) for g, group in enumerate(groups)]
        places = [(g, place) for g, place in places if len(place)]
        if len(places) < 2:
            continue
        rows = np.flatnonzero(which.ravel() == number)
        d, signal, rest, R = _linearised(sensors.some(kept), values[np.ix_(rows, kept)])
        for column, factor in enumerate(_FACTORS):
            precision = np.linalg.inv(signal + rest + factor**2 * R)
            pulled = np.squeeze(precision @ d[:, :, None], 2)
            for g, place in places:
                E = np.linalg.inv(precision[:, place[:, None], place])
                left = np.squeeze(E @ pulled[:, place, None], 2)
                squares[g, column] += (left**2 / E.diagonal(axis1=1, axis2=2)).sum()
        for g, place in places:
            counts[g] += len(rows) * len(place)
    some = counts > 0
    if some.sum() < _FEWEST:
        return "There are too few sensors to tell of the noise."
    squares, counts = squares[some], counts[some]
    G, total = len(counts), counts.sum()
    mean = squares.sum(axis=0) / total
    error = np.sqrt(G / (G - 1) * ((squares - counts[:, None] * mean)**2).sum(axis=0)) / total
    return NoiseScale(_crossing(_FACTORS, np.log(mean)), _noise(sensors).diagonal().sqrt().numpy(), G, _FACTORS,
                      (mean - 1) / error)


def _crossing(factors: np.ndarray, value: np.ndarray) -> float:
    """The factor at which a falling value (f,) is zero; the end of the reach where it is nowhere."""
    below = np.flatnonzero(value <= 0)
    if not len(below) or below[0] == 0:
        return float(factors[0 if len(below) else -1])
    i, x = below[0], np.log(factors)
    share = value[i - 1] / (value[i - 1] - value[i])
    return float(np.exp(x[i - 1] + share * (x[i] - x[i - 1])))


def _noise(sensors: EmulatedSensors) -> torch.Tensor:
    """Covariance of the noise (k, k), with the emulator's error where the pairs held noise already."""
    return sensors.covariance if sensors.covariance.any() else sensors.total


def _linearised(sensors: EmulatedSensors, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """d (B, k), G C Gᵀ (B or 1, k, k), emulator error and noise (k, k) each, of measurements (B, k)."""
    base, readings, total = sensors.denoiser.base, torch.from_numpy(y), sensors.total
    R = _noise(sensors)
    total = total if base.law is None else total + R
    if base.affine:
        z = base.mean[None]
    else:
        z = sensors.locate(y).located.mean
    with torch.enable_grad():
        # One copy of the latents for each reading, so that one sweep gives all rows of the derivative.
        at = z.detach().expand(len(sensors), *z.shape).clone().requires_grad_()
        clean = sensors.read(at)
        slope, = torch.autograd.grad(clean.diagonal(dim1=0, dim2=2).sum(), at)
    G, h = slope.transpose(0, 1), clean[0].detach()
    d = readings - h + ((z - base.mean)[:, None] @ G.mT)[:, 0]
    signal = G @ base.factor
    return d.detach().numpy(), (signal @ signal.mT).detach().numpy(), (total - R).detach().numpy(), R.detach().numpy()
