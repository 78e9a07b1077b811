r"""The sensors of a measurement as a trained model sees them, and what they may read next to each other.

Latents read :math:`h(z) = b + B f(z)` through the emulator, of fixed sensors with B = I and b = 0, and a measurement is
:math:`y = h(z) + \epsilon + e`, the emulator's error and noise. Some of the sensors are sensors again, so a model that
was trained once answers without a sensor that failed, and for each sensor from all others. Of sensors L that are left
out, those that are kept tell by the latents and, where errors are correlated, by what they leave themselves:

.. math:: y_L | z, y_K \sim N(h_L + S_{LK} S_{KK}^{-1} (y_K - h_K),\; S_{LL} - S_{LK} S_{KK}^{-1} S_{KL}) .
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fem_diffusion.diffusion.base.layouts import Layout, decorrelated
from fem_diffusion.diffusion.denoiser import Conditioned, Denoiser
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.maps.noise import carried
from fem_diffusion.diffusion.noise import GaussianNoise, Noise
from fem_diffusion.diffusion.training.range import Distance, measure_distance

__all__ = ["EmulatedSensors"]


@dataclass(frozen=True, eq=False)
class EmulatedSensors:
    """A denoiser, and the k sensors of a measurement; all of it the same on all ranks.

    Parameters
    ----------
    denoiser : Denoiser
        Of fixed sensors that of these, of a family that of any.
    noise : Noise or None
        Of these sensors; None where the pairs of fixed ones held noise already.
    covariance : Tensor
        Of the noise, of fixed sensors averaged over training readings, on the scale of the base, shape (k, k).
    rows, offset : Tensor or None
        Of a family, what the sensors see of the state coordinates, shape (k, s) and (k,).
    seen : Tensor or None
        Of fixed sensors, readings without noise with the levels behind them, over which noise is averaged, (n, k + l).
    """

    denoiser: Denoiser
    noise: Noise | None
    covariance: Tensor
    rows: Tensor | None = None
    offset: Tensor | None = None
    seen: Tensor | None = None

    @classmethod
    def fixed(cls, denoiser: Denoiser, noise: Noise | None, seen: Tensor) -> "EmulatedSensors":
        """The fixed sensors of a denoiser, with readings over which their noise is averaged."""
        return cls(denoiser, noise, _covariance(noise, denoiser.readings, seen, denoiser.base.k), seen=seen)

    def __len__(self) -> int:
        return len(self.covariance)

    @property
    def family(self) -> bool:
        """Whether the denoiser knows other sensors as well."""
        return self.rows is not None

    def some(self, index: np.ndarray, noise: Noise | None = None) -> "EmulatedSensors":
        """Some of the sensors, by their numbers (m,), of which some of fixed ones may come again.

        Their noise is selected where it is not given; InputError where it is of all sensors together.
        """
        if self.noise is not None and noise is None:
            noise = self.noise.select(torch.from_numpy(index))
        chosen = torch.from_numpy(index)
        if self.rows is not None and self.offset is not None:
            return replace(self, noise=noise, rows=self.rows[chosen], offset=self.offset[chosen],
                           covariance=self.covariance[chosen][:, chosen])
        assert self.seen is not None
        seen = self.seen[:, torch.cat([chosen, torch.arange(len(self), self.seen.shape[1])])]   # and all levels
        scale = self.denoiser.readings and self.denoiser.readings.select(chosen)
        after = _covariance(noise, scale, seen, len(index))
        return EmulatedSensors(self.denoiser.select(chosen, self.covariance, after, noise), noise, after, seen=seen)

    def locate(self, y: np.ndarray) -> Conditioned:
        """The denoiser at readings (B, k)."""
        if self.rows is None or self.offset is None:
            return self.denoiser.at(torch.from_numpy(y))
        layout, mixed = decorrelated(self.rows, self.offset, self.covariance, torch.from_numpy(y))
        return self.denoiser.at(mixed, layout)

    @property
    def used(self) -> Tensor:
        """Numbers of the sensors of which anything is made."""
        return torch.arange(len(self)) if self.family else self.denoiser.base.used

    def distance(self, seen: Tensor, noise: Noise | None, y: Tensor, names: Sequence[str]) -> Distance:
        """How far readings (k,) in use are from those seen (n, k + l), without noise and with levels behind them."""
        used, levels, scale = self.used, torch.arange(len(self), seen.shape[1]), self.denoiser.readings
        return measure_distance(seen[:, torch.cat([used, levels])], noise, y[used],
                                [names[int(i)] for i in used], scale and scale.select(used))

    def read(self, z: Tensor) -> Tensor:
        """Readings without noise (..., k) at latents (..., r), both on the scale of the base."""
        c = self.denoiser.base.emulated(z.flatten(0, -2))[0].unflatten(0, z.shape[:-1])
        return c if self.rows is None or self.offset is None else self.offset + c @ self.rows.T

    @property
    def total(self) -> Tensor:
        """Covariance of emulator error and of noise, but of a law that no covariance holds, shape (k, k)."""
        base = self.denoiser.base
        if self.rows is not None:
            return self.covariance + self.rows @ base.emulator.residual @ self.rows.T
        return base.noise(Layout.readings(base.k, base.mean))[0] if base.learnt is None else base.scatter

    @property
    def constant(self) -> bool:
        """Whether `total` is all there is of the errors, whatever the readings."""
        law = carried(self.noise, self.denoiser.readings)
        given = law is None or self.family or isinstance(law, GaussianNoise) and law.constant
        return given and self.denoiser.base.law is None and self.denoiser.base.learnt is None

    @property
    def exact(self) -> bool:
        """Whether latents and readings are jointly Gaussian to the model."""
        denoiser = self.denoiser
        plain = denoiser.network is None and denoiser.support is None and denoiser.base.affine
        plain = plain and denoiser.latents is None and denoiser.readings is None
        return plain and self.constant

    def others(self, z: Tensor, y: Tensor, left: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
        """Draws (n, B, l) of what sensors `left` (l,) read with noise, at draws of latents (n, B, r) given those kept.

        `y` (B, k) are the readings, of which those of sensors `kept` (m,) count.
        """
        latents, scale = self.denoiser.latents, self.denoiser.readings
        if latents is not None:
            z = latents.forward(z)
        if scale is None:
            return self._others(z, y, left, kept, generator)
        return scale.select(left).inverse(self._others(z, scale.forward(y), left, kept, generator))

    def _others(self, z: Tensor, y: Tensor, left: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
        """As `others`, all on the scale of the base."""
        base = self.denoiser.base
        if base.learnt is not None:
            flat = z.flatten(0, 1)
            c = base.emulator(flat)
            rest = y[:, kept].expand(*z.shape[:2], -1).flatten(0, 1) - c[:, kept]
            mean, covariance = base.learnt.others(rest, flat, kept, left, generator)
            mean = mean + c[:, left]
            return (mean + _normal(mean, covariance, generator)).unflatten(0, z.shape[:2])
        clean, law, S = self.read(z), base.law, self.total
        noise = carried(self.noise, self.denoiser.readings)
        if law is not None and noise is not None:
            return noise.widened(S.diagonal()).sample(
                law.clean(clean.flatten(0, 1), z.flatten(0, 1)), generator).view_as(clean)[..., left]
        if not self.constant and noise is not None:
            noisy = noise.sample(clean.flatten(0, 1), generator).view_as(clean)[..., left]
            error = (S - self.covariance)[left][:, left]
            return noisy + _normal(noisy, error, generator)
        gain = torch.linalg.solve(S[kept][:, kept], S[kept][:, left]).T
        mean = clean[..., left] + (y[:, kept] - clean[..., kept]) @ gain.T
        return mean + _normal(mean, S[left][:, left] - gain @ S[kept][:, left], generator)


def _covariance(noise: Noise | None, scale: MonotoneMap | None, seen: Tensor, k: int) -> Tensor:
    """Covariance (k, k) of noise on a scale, over readings in the users' units with levels behind them (n, k + l)."""
    law = carried(noise, scale)
    if law is None:
        return seen.new_zeros(k, k)
    return law.covariance(seen if scale is None else torch.cat([scale.forward(seen[:, :k]), seen[:, k:]], 1))


def _normal(like: Tensor, covariance: Tensor, generator: torch.Generator) -> Tensor:
    """Draws of Gaussians of a covariance (l, l) or (..., l, l), which rounding may have made indefinite, (..., l)."""
    scale = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).sqrt()
    values, axes = torch.linalg.eigh(covariance / scale[..., None] / scale[..., None, :])
    root = scale[..., None] * axes * values.clamp(min=0).sqrt()[..., None, :]
    return (root @ torch.randn(like.shape, generator=generator, dtype=like.dtype)[..., None])[..., 0]
