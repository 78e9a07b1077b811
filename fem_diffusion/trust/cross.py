r"""Cross-validation on real readings: each sensor predicted from all others, without a truth.

Where latents and readings are jointly Gaussian to a model, :math:`y \sim N(m, S)`, what the others K let expect of
sensors L is

.. math:: y_L | y_K \sim N(m_L + S_{LK} S_{KK}^{-1} (y_K - m_K),\; S_{LL} - S_{LK} S_{KK}^{-1} S_{KL}) .

Otherwise the model answers for the others alone, and its samples read what they read, with noise. Residuals in units of
the predicted standard deviation are of mean square one where prior, model and noise are right.

*Which disagree.* A p-value of one reading is Gaussian, or from the draws with a tail that falls as a power. Readings of
one sensor at many times depend on each other in unknown ways, so its p-values count by quantiles, whatever the
dependence (Meinshausen, Meier and Bühlmann 2009, doi:10.1198/jasa.2009.tm08647): :math:`q_\gamma / \gamma` at
:math:`\gamma` = 10 and 50 %, times two. The worst sensor is left out, then all are predicted again. A single reading
that the others do not support is left out by itself, in units of the typical size of residuals. Where the others
disagree still when nearly half of the sensors are left out, or those that are left show that the noise is larger, it
is no matter of sensors: then these are compared in such units, too.

*The noise.* With :math:`S(\lambda) = G C G^T + \Sigma + \lambda^2 R`, linearised at each posterior, the factor
:math:`\lambda` of the noise is the one for which residuals have the mean square one, and those for which it is one
within its error over sensors are not excluded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import norm

from fem_diffusion.checks import alike, check_count, check_seed, stream
from fem_diffusion.diffusion import sample_latents
from fem_diffusion.diffusion.sensors import EmulatedSensors
from fem_diffusion.diffusion.training.range import upper_tail
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.trust.cross_words import judge, larger
from fem_diffusion.trust.noise_scale import NoiseScale, noise_scale

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["CrossValidation", "cross_validate"]

# p-value below which a sensor, or a reading, of all of them disagrees.
_LEVEL = 0.01
_SHARES = (0.1, 0.5)
# Readings that show the typical size of residuals, and the median of |N(0, 1)|.
_TYPICAL, _MEDIAN = 8, 0.6745
# Draws of noise for each of latents, which show its tail, and measurements whose draws are held at once.
_REPEATS, _TOGETHER = 10, 64
# Rounds in which single readings are left out, and levels of intervals that are counted.
_ROUNDS, _LEVELS = 4, (0.5, 0.9, 0.95)
_WITHOUT = "Predictions are those of the Gaussian base: the network knows all sensors together only."


@dataclass(frozen=True, eq=False, repr=False)
class CrossValidation:
    """What sensors say of each other; printed as a verdict in words.

    Parameters
    ----------
    names : tuple of str
        Of the k columns.
    times, values : numpy.ndarray
        Shape (n,) and (n, k), NaN where there was no reading.
    mean, std : numpy.ndarray
        What the others let expect of each reading, noise included, shape (n, k).
    residuals : numpy.ndarray
        Reading minus mean, over std, shape (n, k).
    p_values : numpy.ndarray
        Of each reading given the others, two-sided, shape (n, k).
    worst : tuple of str
        Sensors that the others contradict, the worst first.
    outliers : numpy.ndarray
        Single readings that the others contradict, of other sensors, shape (n, k), bool.
    agree : numpy.ndarray
        Readings that the others were predicted from, shape (n, k), bool.
    coverage : dict of float to tuple of float
        Level of a central interval to the share of readings that agree inside, and its standard error over sensors.
    noise : NoiseScale or None
        By what the noise would have to be multiplied; None where that is not told, and `notes` say why.
    draws : int or None
        Of each prediction; None where it is exact.
    notes : tuple of str
        What could not be looked at, in plain words.
    """

    names: tuple[str, ...]
    times: np.ndarray
    values: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    residuals: np.ndarray
    p_values: np.ndarray
    worst: tuple[str, ...]
    outliers: np.ndarray
    agree: np.ndarray
    coverage: dict[float, tuple[float, float]]
    noise: NoiseScale | None
    draws: int | None
    notes: tuple[str, ...]

    @cached_property
    def _judged(self) -> tuple[str, str, tuple[str, ...]]:
        return judge(self)

    @property
    def verdict(self) -> str:
        """Words: consistent, sensors disagree, noise larger than assumed, noise smaller than assumed, too wide."""
        return self._judged[0]

    @property
    def light(self) -> str:
        """One of "green", "yellow" and "red"."""
        return self._judged[1]

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was found and what to do, in plain words."""
        return self._judged[2]

    @property
    def cleaned(self) -> np.ndarray:
        """The measurements with NaN in place of readings that the others contradict, shape (n, k)."""
        return np.where(self.agree, self.values, np.nan)

    def __str__(self) -> str:
        return "\n".join([f"Cross-validation: {self.verdict} ({self.light})",
                          *(f"- {line}" for line in self.sentences)])

    __repr__ = __str__

    def plot(self) -> Any:
        """Readings against what the others let expect, as a Matplotlib figure."""
        from fem_diffusion.trust.cross_picture import plot_cross

        return plot_cross(self)


def cross_validate(sensors: EmulatedSensors, values: np.ndarray, names: Sequence[str], comm: "MPI.Comm", *,
                   times: np.ndarray | None = None, draws: int = 200, seed: int = 0) -> CrossValidation:
    """Predict each sensor from the others, for each of several measurements (collective).

    Columns whose names differ by an index alone, "(0.3, 0.1)[0]" and "(0.3, 0.1)[1]", are one sensor, such as a time
    series or a vector, and are left out together.

    Parameters
    ----------
    sensors : EmulatedSensors
        As a model sees them; those of a posterior.
    values : numpy.ndarray
        Measurements (n, k), NaN where a sensor failed.
    draws, seed : int
        Samples of each prediction that is not exact, at least 100.

    Raises
    ------
    InputError
        If there are no two sensors that read at one time, or a number is out of range.
    """
    draws, seed = alike(comm, lambda: {"draws": check_count(draws, "draws", least=100), "seed": check_seed(seed)})
    names = tuple(names)
    groups = _groups(names)
    # What says nothing of the field is of no law that a model knows.
    values = np.where(np.isin(np.arange(len(names)), sensors.used.numpy()), values, np.nan)
    there = ~np.isnan(values)
    if not any(sum(bool(row[group].any()) for group in groups) > 1 for row in there):
        raise InputError("Cross-validation predicts a sensor from the others: it takes two that read at one time.")
    times = np.arange(len(values)) if times is None else times
    return on_root(comm, lambda: _Cross(sensors, values, names, groups, times, draws, seed).found())


def _groups(names: tuple[str, ...]) -> list[np.ndarray]:
    """Columns of each sensor."""
    keys: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        head, bracket, index = name.rpartition("[")
        inside = index.rstrip("]").replace(",", "").replace(" ", "")
        keys.setdefault(head if bracket and inside.isdecimal() else name, []).append(i)
    return [np.array(columns) for columns in keys.values()]


class _Cross:
    """The work: predictions, and the sensors and readings that are left out of them."""

    def __init__(self, sensors: EmulatedSensors, values: np.ndarray, names: tuple[str, ...], groups: list[np.ndarray],
                 times: np.ndarray, draws: int, seed: int):
        self.sensors, self.values, self.names, self.groups, self.times = sensors, values, names, groups, times
        self.draws, self.seed, self.there = draws, seed, ~np.isnan(values)
        self.use = self.there.copy()
        self.mean, self.std, self.log_p = (np.full(values.shape, np.nan) for _ in range(3))
        self.parts: dict[tuple[int, ...], EmulatedSensors] = {}

    def found(self) -> CrossValidation:
        """The result."""
        odd = self._disagreeing(1.0)
        if odd is None or odd and larger(noise_scale(self.sensors, self.values, self.use, self.groups)):
            odd = self._disagreeing(None) or []
        for _ in range(_ROUNDS):
            single = self._single()
            if not single.any():
                break
            self.use &= ~single
            self._predict(np.flatnonzero(single.any(axis=1)))
        own = np.concatenate([self.groups[i] for i in odd]) if odd else np.zeros(0, dtype=int)
        outliers = self.there & ~self.use
        outliers[:, own] = False
        residuals = (self.values - self.mean) / self.std
        scale = noise_scale(self.sensors, self.values, self.use, self.groups)
        worst = tuple(self.names[self.groups[i][0]] for i in odd)
        coverage = {level: self._coverage(level) for level in _LEVELS}
        notes = [scale] if isinstance(scale, str) else []
        if self.sensors.denoiser.network is not None and not self.sensors.family:
            notes.append(_WITHOUT)
        if (unused := len(self.names) - len(self.sensors.used)) > 0:
            notes.append(f"{unused} of {len(self.names)} readings say nothing of the field, and are not compared.")
        return CrossValidation(
            self.names, self.times, self.values, self.mean, self.std, residuals, np.exp(self.log_p), worst, outliers,
            self.use, coverage, None if isinstance(scale, str) else scale,
            None if self.sensors.exact else self.draws, tuple(notes))

    def _disagreeing(self, unit: float | None) -> list[int] | None:
        """Sensors that disagree with the others, the worst first, now left out, with residuals in some unit.

        None where without as many as may be left out the others disagree still: then it is no matter of sensors.
        """
        odd: list[int] = []
        self.use = self.there.copy()
        everything, most = np.arange(len(self.values)), max(1, (len(self.groups) - 1) // 2)
        self._predict(everything)
        while (worst := self._worst(odd, unit)) is not None:
            if len(odd) == most:
                return None if unit is not None else odd
            odd.append(worst)
            self.use[:, self.groups[worst]] = False
            self._predict(everything)
        return odd

    def _predict(self, rows: np.ndarray) -> None:
        """Predict readings at some of the times from those in use."""
        patterns, which = np.unique(np.hstack([self.use, self.there])[rows], axis=0, return_inverse=True)
        k = len(self.names)
        for number, pattern in enumerate(patterns):
            members = rows[which.ravel() == number]
            for group in self.groups:
                left = group[pattern[k:][group]]
                kept = np.setdiff1d(np.flatnonzero(pattern[:k]), group)
                if len(left) and len(kept):
                    self._fill(members, left, kept)
                elif len(left):
                    self.mean[np.ix_(members, left)] = np.nan   # nothing is left that could tell

    def _fill(self, rows: np.ndarray, left: np.ndarray, kept: np.ndarray) -> None:
        """Predict sensors that are left out from those kept, at times with both."""
        y, at = self.values[rows], np.ix_(rows, left)
        if self.sensors.exact:
            m, S = self._joint
            gain = np.linalg.solve(S[np.ix_(kept, kept)], S[np.ix_(kept, left)]).T
            self.mean[at] = m[left] + (y[:, kept] - m[kept]) @ gain.T
            self.std[at] = np.sqrt((S[np.ix_(left, left)] - gain @ S[np.ix_(kept, left)]).diagonal())
            t = np.abs(y[:, left] - self.mean[at]) / self.std[at]
            self.log_p[at] = np.minimum(0.0, math.log(2) + norm.logsf(t))
            return
        for some in np.split(np.arange(len(rows)), range(_TOGETHER, len(rows), _TOGETHER)):
            at, drawn = np.ix_(rows[some], left), self._draws(y[some], left, kept)
            self.mean[at], self.std[at] = drawn.mean(axis=0), drawn.std(axis=0, ddof=1)
            t = np.abs(y[np.ix_(some, left)] - self.mean[at]) / self.std[at]
            seen = np.abs(drawn - self.mean[at]) / self.std[at]
            self.log_p[at] = [[_log_p(seen[:, i, j], t[i, j]) for j in range(len(left))] for i in range(len(some))]

    def _draws(self, y: np.ndarray, left: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Draws (n, B, l) of what sensors that are left out read."""
        key = tuple(kept.tolist())
        some = self.parts[key] = self.parts.get(key) or self.sensors.some(kept)
        own = stream(self.seed, f"{key} {left.tolist()} {len(y)}")
        z = sample_latents(some.locate(y[:, kept]), self.draws, seed=own, progress=False).transpose(0, 1)
        with torch.no_grad():
            return self.sensors.others(
                z.repeat(_REPEATS, 1, 1), torch.from_numpy(np.nan_to_num(y)), torch.from_numpy(left),
                torch.from_numpy(kept), torch.Generator().manual_seed(own + 1)).numpy()

    @cached_property
    def _joint(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (k,) and covariance (k, k) of readings under the prior."""
        sensors, base = self.sensors, self.sensors.denoiser.base
        signal = base.emulator.matrix @ base.factor
        signal = signal if sensors.rows is None else sensors.rows @ signal
        return sensors.read(base.mean[None])[0].detach().numpy(), (signal @ signal.T + sensors.total).numpy()

    def _typical(self) -> float:
        """The typical size of residuals in use, where it is above one."""
        t = np.abs((self.values - self.mean) / self.std)[self.use]
        t = t[np.isfinite(t)]
        return max(1.0, float(np.median(t)) / _MEDIAN) if len(t) >= _TYPICAL else 1.0

    def _scaled(self, unit: float | None) -> np.ndarray:
        """Logarithms of p-values (n, k), of residuals in this unit, or in that of their typical size."""
        unit = self._typical() if unit is None else unit
        if unit == 1.0:
            return self.log_p
        t = np.abs((self.values - self.mean) / self.std) / unit
        gaussian = np.minimum(0.0, math.log(2) + norm.logsf(t))
        return gaussian if self.sensors.exact else np.maximum(gaussian, self.log_p)

    def _worst(self, odd: Sequence[int], unit: float | None) -> int | None:
        """The sensor that disagrees most with the others, of those not yet left out; None where none does."""
        log_p, found = self._scaled(unit), np.zeros(len(self.groups))
        for i, group in enumerate(self.groups):
            mine = np.sort(log_p[:, group][np.isfinite(log_p[:, group])])
            if i not in odd and len(mine):
                # One reading of several is no sensor.
                counts = {max(math.ceil(share * len(mine)), min(len(mine), 2)) for share in _SHARES}
                found[i] = min(mine[c - 1] + math.log(len(counts) * len(mine) / c) for c in counts)
        worst = int(np.argmin(found))
        return worst if found[worst] + math.log(len(self.groups)) < math.log(_LEVEL) else None

    def _single(self) -> np.ndarray:
        """The worst reading of each time, where it disagrees, of sensors not left out, shape (n, k), bool."""
        log_p = np.where(self.use & np.isfinite(self.log_p), self._scaled(None), 0.0)
        single = np.zeros(log_p.shape, dtype=bool)
        single[np.arange(len(log_p)), log_p.argmin(axis=1)] = True
        return single & (log_p + math.log(max(1, self.use.sum())) < math.log(_LEVEL))

    def _coverage(self, level: float) -> tuple[float, float]:
        """Share of readings in use inside a central interval, and its standard error, sensors being independent."""
        inside = np.where(self.use & np.isfinite(self.log_p), self.log_p > math.log1p(-level), np.nan)
        shares = [(np.nansum(inside[:, group]), np.isfinite(inside[:, group]).sum()) for group in self.groups]
        hits, counts = np.array([pair for pair in shares if pair[1]], dtype=float).T
        total, k = counts.sum(), len(counts)
        share, some = hits.sum() / total, (hits.sum() + 2) / (total + 4)    # Agresti and Coull, where all are inside
        error = np.sqrt(k / max(1, k - 1) * ((hits - share * counts)**2).sum()) / total
        error = max(error, np.sqrt(some * (1 - some) / (total + 4)))
        return float(share), float(error)


def _log_p(seen: np.ndarray, t: float) -> float:
    """Logarithm of the chance of a residual of size t, beside sizes (n,) of draws, beyond which it falls as a power."""
    n, above = len(seen), int((seen >= t).sum())
    if above:
        return math.log((1 + above) / (n + 1))
    start, rate, m = upper_tail(torch.from_numpy(seen).clamp(min=1e-12).log())
    power = math.log(m / (n + 1)) - m * math.log1p(max(0.0, math.log(t) - start) / (m * rate))
    return min(power, -math.log(n + 1))
