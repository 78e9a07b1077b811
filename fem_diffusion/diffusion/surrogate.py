r"""The posterior that the emulator implies, and Hamiltonian moves that leave it as it is.

For Gaussian latents the density of the posterior is known up to the emulator,

.. math:: -\log p(z | y) = \tfrac12 |y - b - B f(z)|^2_{(R + B \Sigma B^T)^{-1}}
          + \tfrac12 |z - \bar z|^2_{C^{-1}} + \text{const}.

In base coordinates, where it is nearly standard normal, one leapfrog trajectory of a quarter period makes a nearly
independent sample (Neal 2011, section 5.3). Two things are made of that. *Corrections*: a few moves take samples of the
network to the emulator's posterior. *Training*: the latents behind a simulated measurement are an exact sample of
their posterior, so moves that start there give more of them, and no warm-up is needed.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fem_diffusion.diffusion.operator_base import Located, OperatorBase, cholesky
from fem_diffusion.diffusion.sensors import Sensors

__all__ = ["Surrogate", "surrogate"]

_LEAPS = 4
# Points whose states are held at once.
_ROWS = 4096


@dataclass(frozen=True)
class Surrogate:
    """Posterior densities of B measurements in base coordinates; from `surrogate`.

    Parameters
    ----------
    base : OperatorBase
        Law of the latents and emulator.
    mean, factor : Tensor
        Of the base of each measurement, shape (B, r) and (B, r, r).
    rows, target : Tensor
        Sensors and readings in units of noise and emulator error, shape (B, k, s) and (B, k).
    precision : Tensor
        Of the latents, shape (r, r).
    """

    base: OperatorBase
    mean: Tensor
    factor: Tensor
    rows: Tensor
    target: Tensor
    precision: Tensor

    def to(self, device: str | torch.device) -> "Surrogate":
        """A copy on another device; this one stays where it is."""
        tensors = [x.to(device) for x in (self.mean, self.factor, self.rows, self.target, self.precision)]
        return Surrogate(self.base.to(device), *tensors)

    def energy(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log density (B, n) up to a constant, and its gradient (B, n, r), at n points each (B, n, r)."""
        if w.shape[1] > _ROWS:
            parts = [self.energy(part) for part in w.split(_ROWS, dim=1)]
            return torch.cat([value for value, _ in parts], 1), torch.cat([slope for _, slope in parts], 1)
        z = self.mean[:, None] + w @ self.factor.mT
        away = z - self.base.mean
        c, pull = self.base.emulator.with_pull(z.flatten(0, 1))
        misfit = self.target[:, None] - c.unflatten(0, z.shape[:2]) @ self.rows.mT
        pulled = pull((misfit @ self.rows).flatten(0, 1)).view_as(z)
        slope = away @ self.precision
        value = (misfit.square().sum(2) + (slope * away).sum(2)) / 2
        return value, (slope - pulled) @ self.factor

    def move(self, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One Hamiltonian move of n points each, (B, n, r); the new points and which were accepted, (B, n)."""
        length = math.pi / 2 / _LEAPS * (0.8 + 0.4 * float(torch.rand((), generator=generator, device=w.device)))
        momentum = torch.randn(w.shape, generator=generator, dtype=w.dtype, device=w.device)
        value, gradient = self.energy(w)
        start = value + momentum.square().sum(2) / 2
        place = w
        for _ in range(_LEAPS):
            momentum = momentum - length / 2 * gradient
            place = place + length * momentum
            value, gradient = self.energy(place)
            momentum = momentum - length / 2 * gradient
        gain = start - value - momentum.square().sum(2) / 2
        draw = torch.rand(gain.shape, generator=generator, dtype=w.dtype, device=w.device)
        accept = torch.log(draw) < gain
        return torch.where(accept[..., None], place, w), accept


def surrogate(base: OperatorBase, sensors: Sensors, y: Tensor, located: Located) -> Surrogate:
    """The emulator's posterior of located measurements.

    Parameters
    ----------
    base : OperatorBase
        Whose latents are Gaussian.
    sensors : Sensors
        Of B layouts.
    y : Tensor
        Measurements, shape (B, k).
    located : Located
        From ``base.locate(sensors, y)``.

    Returns
    -------
    Surrogate
    """
    root = cholesky(base.noise(sensors))
    rows, target = (torch.linalg.solve_triangular(root, x, upper=False)
                    for x in (sensors.rows, (y - sensors.offset).unsqueeze(2)))
    return Surrogate(base, located.mean, located.factor, rows, target.squeeze(2), base.precision)
