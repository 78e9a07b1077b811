r"""How far sensors and their readings are from those of the training.

Training readings with fresh noise (n, k) say what one more may be. With mean and covariance S of all the others,
:math:`\Lambda = S^{-1}`, each has a distance :math:`\delta^T\Lambda\delta` and, sensor by sensor, what it reads beside
what the other sensors let expect, :math:`t_i = (\Lambda\delta)_i / \Lambda_{ii}^{1/2}`: one broken sensor shows there
far more than by itself. A measurement is ranked among them, so the law of the readings need not be Gaussian, and no
fitted model takes part, so all pairs will do. Beyond the largest, the tail is taken to fall as a power, which is
cautious; with m exceedances the predictive law of one more is then exact, :math:`(1 + x / (m \bar x))^{-m}`.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.layouts import Layout, LayoutFamily
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.maps.noise import carried
from fem_diffusion.diffusion.noise import Noise

__all__ = ["Distance", "FamilyWarning", "MeasurementWarning", "TrainingRange", "measure_distance", "upper_tail"]

# Share of false alarms; how many times farther than all that was seen no model is asked to go; sensors that are named.
_LEVEL, _FAR, _NAMED = 0.01, 2.0, 5
# Shares of the readings that make up a tail: of few, and of many in units of their root; fewer readings show none.
_TAIL, _TAIL_ROOT, _FEWEST = 0.2, 3.0, 15

# Share of a sensor's prior signal that the most similar training sensor may leave unexplained.
_UNLIKE = 0.1
# How far numbers of sensors and noise levels may leave the range of the training.
_BEYOND = 2.0
# Signals below this share of their noise, and of the strongest such ratio, are none.
_BLIND, _WEAK = 1e-3, 1e-6


class FamilyWarning(UserWarning):
    """An observation operator is far from those of the training: the base holds, the network extrapolates."""


@dataclass(frozen=True, eq=False)
class TrainingRange:
    """What training has seen of sensors.

    Parameters
    ----------
    signals, std : Tensor, tuple of float
        What each candidate sees of the state coordinates, of unit length, shape (K, s); smallest and largest noise over
        prior signal.
    most, strongest : int, float
        Readings in the largest layout; largest prior signal of a candidate, in units of its noise.
    """

    signals: Tensor
    std: tuple[float, float]
    most: int
    strongest: float

    @classmethod
    def of(cls, family: LayoutFamily) -> "TrainingRange":
        """What a family of layouts has to show."""
        signals = torch.cat([kind.rows.flatten(0, 1) for kind in family.kinds])
        std = torch.cat([kind.std.flatten(1) for kind in family.kinds], 1)
        ratio = std / signals.norm(dim=1)
        strongest = float((1 / ratio).max())
        # Candidates that see next to nothing, on a Dirichlet boundary, say nothing about noise either.
        ratio = ratio[_seeing(1 / ratio, strongest)]
        return cls(_unit(signals).float(), (float(ratio.min()), float(ratio.max())),
                   sum(kind.count[1] * kind.rows.shape[1] for kind in family.kinds), strongest)

    def warn(self, layout: Layout, names: Sequence[str]) -> None:
        """Warn where one layout, named row by row, is far from the training; the message names the measure."""
        findings = []
        strength, std = layout.rows[0].norm(dim=1), layout.variance[0].sqrt()
        seeing = torch.where(_seeing(strength / std, self.strongest))[0]
        rows = layout.rows[0][seeing]
        if len(rows):
            alike = (_unit(rows).float() @ self.signals.T).abs().amax(1)
            unlike = 1 - alike.clamp(max=1)**2
            worst = int(unlike.argmax())
            if float(unlike[worst]) > _UNLIKE:
                findings.append(f"sensor {names[int(seeing[worst])]}: the most similar training sensor leaves "
                                f"{unlike[worst]:.0%} of the prior variance of its signal unexplained (1 - squared "
                                "correlation)")
            ratio = std[seeing] / strength[seeing]
            low, high = float(ratio.min()) / self.std[0], float(ratio.max()) / self.std[1]
            if low < 1 / _BEYOND or high > _BEYOND:
                findings.append(f"noise over prior signal reaches {low:.2g} of the smallest and {high:.2g} of the "
                                "largest value of the training")
        if len(names) > _BEYOND * self.most:
            findings.append(f"{len(names)} readings, {len(names) / self.most:.1f} times the most in training")
        if findings:
            warnings.warn("This observation operator is far from the training family: " + "; ".join(findings)
                          + ". The Gaussian base holds for it, the network extrapolates; train with a family that has "
                          "such sensors.", FamilyWarning, stacklevel=3)


def _seeing(ratio: Tensor, strongest: float) -> Tensor:
    """Whether sensors with these ratios of signal to noise, which know no units, see anything."""
    return ratio > min(_BLIND, _WEAK * strongest)


def _unit(rows: Tensor) -> Tensor:
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)


class MeasurementWarning(UserWarning):
    """A measurement is unlike those of the training: a sensor, its units, its noise or the prior are not right."""


@dataclass(frozen=True)
class Distance:
    """How far a measurement is from those that training has seen; from `measure_distance`.

    Parameters
    ----------
    value, largest : float
        Distance in standard deviations of the readings, root mean square over the sensors, and the largest of those
        that training has seen.
    p : float
        Share of measurements of the problem itself that are at least as unlike the training as this one.
    sensors : tuple of float
        What each sensor reads beside what the others let expect, in standard deviations.
    worst : tuple of str
        Sensors without which the measurement would not be unlike the training, the worst first; empty where it is not.
    seen : int
        Number of readings that it is compared with.
    far : bool
        Whether it is more than twice as far as all that training has seen.
    message : str
        What is wrong, and what to do; empty where nothing is.
    """

    value: float
    largest: float
    p: float
    sensors: tuple[float, ...]
    worst: tuple[str, ...] = ()
    seen: int = 0
    far: bool = False
    message: str = field(default="", repr=False)

    def warn(self) -> None:
        """Warn where the measurement is unlike the training."""
        if self.message:
            warnings.warn(self.message, MeasurementWarning, stacklevel=3)


def measure_distance(clean: Tensor, noise: Noise | None, y: Tensor, names: Sequence[str],
                     scale: MonotoneMap | None = None) -> Distance:
    """Distance of a measurement `y` (k,) from training readings without noise (n, k), n > 2, k > 0, on a scale."""
    n, k, read = len(clean), len(y), y
    if scale is not None:
        clean, y = torch.cat([scale.forward(clean[:, :k]), clean[:, k:]], 1), scale.forward(y)
    noise = carried(noise, scale)
    x, covariance = clean, clean.new_zeros(k, k)
    if noise is not None:
        x, covariance = noise.sample(clean, torch.Generator().manual_seed(0)), noise.covariance(clean)
    unit = x.std(0)
    unit = torch.where(unit > 0, unit, y.abs().clamp(min=1e-300))
    x, y, covariance = x / unit, y / unit, covariance / unit / unit[:, None]
    found = _Compared(x, covariance, y)
    seen, apart = (v.square().clamp(min=1e-300).log() / 2 for v in (found.seen, found.apart))
    far = found.p <= _LEVEL and bool(((apart - seen.amax(0)) > math.log(_FAR)).any())
    value, largest = (math.exp(float(v)) / k**0.5 for v in (apart[0], seen[:, 0].max()))
    # Without a sensor that reads wrong the others are as they should be.
    worst, kept, p = [], list(range(k)), found.p
    part = found
    while p <= _LEVEL and len(worst) < min(_NAMED, max(1, k // 2)):
        worst.append(kept.pop(int(part.t.abs().argmax())))
        if not kept:
            break
        part = _Compared(x[:, kept], covariance[kept][:, kept], y[kept])
        p = part.p
    words = ""
    if worst:
        beyond = f", farther away than any of them by a factor of {math.exp(float((apart - seen.amax(0)).max())):.2g}"
        low, middle, high = (unit * (found.expected + side * found.spread) for side in (-1, 0, 1))
        if scale is None:
            ranges = [f"{float(m):.4g} ± {float(h - m):.2g}" for m, h in zip(middle, high)]
        else:
            ranges = [f"{float(a):.3g} to {float(b):.3g}" for a, b in zip(scale.inverse(low), scale.inverse(high))]
        reads = [f"sensor {names[i]} reads {float(read[i]):.4g}, where {ranges[i]} is expected"
                 + " beside the others" * (k > 1) for i in worst]
        words = (f"This measurement is unlike the {n:,} simulated ones that it is compared with (p = {found.p:.1g}"
                 f"{beyond if (apart > seen.amax(0)).any() else ''}): {'; '.join(reads)}"
                 f"{'; and others' if kept and p <= _LEVEL else ''}. Check these sensors, their units and their noise, "
                 "and leave broken ones out. If they are right, the prior is too narrow: widen it and simulate again; "
                 "laplace(problem, y) and posterior.correct(...) do not rely on training.")
    return Distance(value, largest, found.p, tuple(found.t.tolist()), tuple(str(names[i]) for i in worst), n, far,
                    words)


class _Compared:
    """A measurement (k,) beside n others with noise of this covariance, each of them beside all but itself.

    Attributes are `t` (k,), `expected` and `spread` of each reading given the others, `p`, and the two sizes that are
    compared, the distance and the largest |t|: `apart` (2,), and `seen` (n, 2).
    """

    def __init__(self, x: Tensor, noise: Tensor, y: Tensor):
        (n, k), mean = x.shape, x.mean(0)
        d = x - mean
        # So much noise counts besides that readings fewer than sensors have an inverse.
        values, axes = torch.linalg.eigh(d.T @ d + k * noise)
        inverse = axes / values.clamp(min=1e-14 * n * float(values[-1]) + 1e-300) @ axes.T
        diagonal = inverse.diagonal()
        # Sherman and Morrison: what the inverse would be without each of them.
        c = n / (n - 1)
        pulled = d @ inverse
        lever = (pulled * d).sum(1)
        left = (1 - c * lever).clamp(min=1e-10)
        scale = ((n - 2 + k) / (1 + 1 / (n - 1)))**0.5
        t = c * pulled / left[:, None] / (diagonal + c * pulled.square() / left[:, None]).sqrt()
        self.seen = scale * torch.stack([c * (lever.clamp(min=0) / left).sqrt(), t.abs().amax(1)], 1)
        away, scale = y - mean, ((n - 1 + k) / (1 + 1 / n))**0.5
        pulled = inverse @ away
        self.t = scale * pulled / diagonal.sqrt()
        self.expected, self.spread = y - pulled / diagonal, 1 / (scale * diagonal.sqrt())
        self.apart = torch.stack([scale * (pulled @ away).clamp(min=0).sqrt(), self.t.abs().max()])

    @property
    def p(self) -> float:
        """Share of measurements that are at least as unlike the others as this one."""
        seen, apart = (v.clamp(min=1e-150).log() for v in (self.seen, self.apart))
        # Both sizes in units of their own tails count alike.
        tails = [upper_tail(column) for column in seen.T]
        scores = torch.stack([(column - start) / rate for column, (start, rate, _) in zip(seen.T, tails)]).amax(0)
        score = max(float((size - start) / rate) for size, (start, rate, _) in zip(apart, tails))
        return tail_probability(scores, score)


def tail_probability(values: Tensor, at: float) -> float:
    """Share of a law that is at a number or above, by draws (n,) of it, beyond all of which its tail goes on."""
    n, (start, rate, m) = len(values), upper_tail(values)
    above = int((values >= at).sum())
    p = (1 + above) / (n + 1)
    if above or n < _FEWEST:
        return p
    return min(p, m / (n + 1) * (1 + (at - start) / (m * rate))**-m)


def upper_tail(values: Tensor) -> tuple[float, float, int]:
    """Where the tail of values (n,) starts, its mean excess, and the number of values in it."""
    n = len(values)
    m = min(n - 1, math.ceil(min(_TAIL * n, _TAIL_ROOT * n**0.5)))
    largest = values.sort(descending=True).values[:m + 1]
    return float(largest[-1]), max(float((largest[:-1] - largest[-1]).mean()), 1e-6), m
