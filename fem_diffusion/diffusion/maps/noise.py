r"""Noise of readings that are mapped to another scale: drawn on the users' own, and mapped then.

With :math:`\eta = T(y)` and clean readings :math:`c = T(x)` the density is that of the noise itself,
:math:`p(\eta | c) = p(y | x) / T'(y)`. Its covariance at c is that of the noise times the slopes there, to first order,
and an error of the emulator, of variance v on the mapped scale, counts as :math:`v / T'(x)^2` beside the noise.

Noise of variance :math:`a^2 + b^2 x^2` is of one size on the scale asinh(b x / a) (Bartlett 1947): one of the scales to
choose from.
"""

import math
from copy import copy

import torch
from torch import Tensor

from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.noise import Noise
from fem_diffusion.diffusion.noise_laws import DrawnNoise

__all__ = ["MappedNoise", "carried", "even_noise"]

# Draws, at least, by which a covariance is told, and for each sensor.
_DRAWS, _EACH = 4000, 50
# Readings at which the size of noise is looked at, where it is known.
_PLACES = 500
# Units of asinh that are tried, from a share of the smallest reading to a multiple of the largest, so many a decade;
# and nats by which one has to be likelier than noise of one size (a chance of 0.003).
_FINE, _COARSE, _EACH_DECADE, _GAIN = 1e-3, 3.0, 20, 4.5


def carried(noise: Noise | None, scale: MonotoneMap | None) -> Noise | None:
    """Noise of readings on a map's scale; itself where there is none."""
    return noise if noise is None or scale is None else MappedNoise(noise, scale)


def even_noise(noise: Noise, y: Tensor, generator: torch.Generator) -> MonotoneMap | None:
    """The scale of each reading on which noise is of one size, from noise-free ones (n, k + l) with levels behind them.

    None where that is the identity of all.
    """
    if noise.constant:
        return None
    if isinstance(noise, DrawnNoise):
        square = (noise.sample(y, generator) - noise.readings(y)).square()
    else:
        y = y[:_PLACES]
        square = noise.each(y).diagonal(dim1=-2, dim2=-1)
    x = noise.readings(y).abs()
    units = torch.stack([_even(a, b) if bool((a > 0).any()) else a.new_tensor(torch.inf) for a, b in zip(
        x.T, square.T)])
    even = torch.isinf(units)
    if bool(even.all()):
        return None
    kinds = tuple("identity" if one else "asinh" for one in even.tolist())
    return MonotoneMap.of(kinds, unit=torch.where(even, torch.ones_like(units), units))


def _even(x: Tensor, square: Tensor) -> Tensor:
    """The likeliest a / b of Gaussian errors of these squares (n,) and variances a² + b² x², for sizes x (n,).

    Infinite where variances that do not depend on x are as likely.
    """
    low, high = float(x[x > 0].min()) * _FINE, float(x.max()) * _COARSE
    units = torch.logspace(math.log10(low), math.log10(high), 2 + round(_EACH_DECADE * math.log10(high / low))).to(x)
    shape = 1 + (x / units[:, None]).square()
    scores = -len(x) / 2 * (square / shape).mean(1).clamp(min=1e-300).log() - shape.log().sum(1) / 2
    gain = scores.max() + len(x) / 2 * square.mean().clamp(min=1e-300).log()
    return units[scores.argmax()] if float(gain) > _GAIN else units.new_tensor(torch.inf)


class MappedNoise(DrawnNoise):
    """The noise of readings on a map's scale.

    Parameters
    ----------
    noise : Noise
        On the users' scale.
    scale : MonotoneMap
        Of its k readings.
    """

    def __init__(self, noise: Noise, scale: MonotoneMap):
        self.inner, self.scale, self.levels, self.heavy = noise, scale, noise.levels, noise.heavy
        self.law, self._more = noise.told, None
        if noise.log_density is None:
            self.log_density = None   # pyright: ignore[reportAttributeAccessIssue]

    def _clean(self, c: Tensor) -> Tensor:
        """Noise-free readings as the noise itself takes them, of mapped ones with levels behind them."""
        k = c.shape[-1] - len(self.levels)
        return torch.cat([self.scale.inverse(c[..., :k]), c[..., k:]], -1)

    def _slopes(self, clean: Tensor) -> Tensor:
        """dT/dx at noise-free readings (..., k), with levels behind them or without."""
        return self.scale.log_slope(self.inner.readings(clean)).exp()

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """As `Noise.sample`."""
        x = self._clean(y)
        return self.scale.forward(self._whole(x).sample(x, generator))

    def _whole(self, x: Tensor) -> Noise:
        """The noise itself with the emulator's error, at clean readings (B, k) of the users."""
        return self.inner if self._more is None else self.inner.widened(self._more / self._slopes(x).square())

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        """As `GaussianNoise.log_density`."""
        reading = self.scale.inverse(y)
        return self.users_density(reading, clean) - self.scale.log_slope(reading).sum(-1)

    def users_density(self, reading: Tensor, clean: Tensor) -> Tensor:
        """As `log_density`, of a measurement in the users' units, in which the density is, too."""
        x = self._clean(clean)
        inner = self._whole(x)
        assert inner.log_density is not None
        return inner.log_density(reading, x)

    def _errors(self, y: Tensor) -> Tensor:
        """Draws of the noise for each row, the same in every call, shape (B, k) with B larger than that of `y`."""
        times = -(-max(_DRAWS, _EACH * y.shape[-1]) // len(y))
        many = y.repeat(times, 1)
        return self.sample(many, torch.Generator(y.device).manual_seed(0)) - self.readings(many)

    def each(self, y: Tensor) -> Tensor:
        """As `Noise.each`, to first order."""
        return self._beside(y, self.inner.each(self._clean(y)))

    def near(self, y: Tensor, square: Tensor) -> Tensor:
        """As `Noise.near`, to first order."""
        x = self._clean(y)
        return self._beside(y, self.inner.near(x, square / self._slopes(x).square()))

    def _beside(self, y: Tensor, covariance: Tensor) -> Tensor:
        slopes = self._slopes(self._clean(y))
        return slopes[..., :, None] * covariance * slopes[..., None, :]

    def widened(self, variance: Tensor) -> "MappedNoise":
        """As `Noise.widened`, to first order."""
        part = copy(self)
        part._more = variance
        return part

    def select(self, sensors: Tensor) -> "MappedNoise":
        """As `Noise.select`."""
        return MappedNoise(self.inner.select(sensors), self.scale.select(sensors))

    def known(self, normal: Tensor) -> "MappedNoise":
        """As `Noise.known`."""
        return MappedNoise(self.inner.known(normal), self.scale)

    def check(self, k: int) -> None:
        """As `Noise.check`."""
        self.inner.check(k)
