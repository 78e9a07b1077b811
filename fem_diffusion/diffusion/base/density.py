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

from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located, apply, cholesky, solve_lower
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.noise import Noise
from fem_diffusion.diffusion.sampling.hamiltonian import hamiltonian_move
from fem_diffusion.diffusion.tensors import Tensors

__all__ = ["EmulatorDensity", "emulator_density"]

_LEAPS = 4
# Points whose states are held at once.
_ROWS = 4096


@dataclass(frozen=True, eq=False, repr=False)
class EmulatorDensity(Tensors):
    """Posterior densities of B measurements in base coordinates; from `emulator_density`.

    `base` holds the law of the latents and the emulator, `located` is the base at each measurement; `rows` (B, k, s)
    and `target` (B, k) are sensors and readings in units of noise and emulator error. Where the base has a law of the
    noise, they are in the units of the sensors, and `noise` is that law, with the emulator's error in its variance.
    """

    base: GaussianBase
    located: Located
    rows: Tensor
    target: Tensor
    noise: Noise | None = None

    def energy(self, w: Tensor) -> Tensor:
        """Negative log density (n, B) up to a constant, at n points each (n, B, r)."""
        if len(w) > 1 and w[..., 0].numel() > _ROWS:
            return torch.cat([self.energy(part) for part in w.split(max(1, _ROWS // w.shape[1]))])
        z = self.located.colour(w)
        if self.noise is not None:
            return self._by_law(z)
        away, c = z - self.base.mean, self.base.emulator(z.flatten(0, 1)).view(*z.shape[:2], -1)
        misfit = self.target - apply(self.rows, c)
        return (misfit.square().sum(2) + ((away @ self.base.precision) * away).sum(2)) / 2

    def force(self, w: Tensor) -> Tensor:
        """Gradient of `energy`, shape (n, B, r)."""
        if len(w) > 1 and w[..., 0].numel() > _ROWS:
            return torch.cat([self.force(part) for part in w.split(max(1, _ROWS // w.shape[1]))])
        z = self.located.colour(w)
        if self.noise is not None:
            with torch.enable_grad():
                at = z.detach().requires_grad_()
                slope, = torch.autograd.grad(self._by_law(at).sum(), at)
            return apply(self.located.factor.mT, slope)
        c, pull = self.base.emulator.with_pull(z.flatten(0, 1))
        misfit = self.target - apply(self.rows, c.view(*z.shape[:2], -1))
        pulled = pull(apply(self.rows.mT, misfit).flatten(0, 1)).view_as(z)
        return apply(self.located.factor.mT, (z - self.base.mean) @ self.base.precision - pulled)

    def _by_law(self, z: Tensor) -> Tensor:
        """Negative log density (n, B) up to a constant, at n latents each (n, B, r), for noise of another law."""
        assert self.noise is not None and self.base.law is not None
        flat, away = z.flatten(0, 1), z - self.base.mean
        clean = self.base.law.clean(self.base.emulator(flat), flat)
        found = self.noise.log_density(self.target.expand(len(z), -1, -1).flatten(0, 1), clean)   # pyright: ignore
        return ((away @ self.base.precision) * away).sum(2) / 2 - found.view(z.shape[:2])

    def move(self, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One Hamiltonian move of n points each, (n, B, r); the new points and which were accepted, (n, B)."""
        length = math.pi / 2 / _LEAPS * (0.8 + 0.4 * float(torch.rand((), generator=generator, device=w.device)))
        if self.noise is not None:
            # Where noise grows with the readings, the density has walls that long steps never leave.
            u = torch.rand(w.shape[:2], generator=generator, dtype=w.dtype, device=w.device)
            return hamiltonian_move(w, self.energy, self.force, length * torch.where(
                u < 0.25, 10**-(8 * u), 1.0)[..., None], _LEAPS, generator)
        return hamiltonian_move(w, self.energy, self.force, length, _LEAPS, generator)


def emulator_density(base: GaussianBase, layout: Layout, y: Tensor, located: Located) -> EmulatorDensity:
    """The emulator's posterior of measurements `y` (B, k), which ``base.locate(layout, y)`` has located.

    The latents have to be Gaussian; there are B layouts, or one of them all.
    """
    if base.law is not None:
        error = base.noise(layout)[0].diagonal()
        return EmulatorDensity(base, located, layout.rows.expand(len(y), -1, -1), y, base.law.noise.widened(error))
    root, target = cholesky(base.noise(layout)), y - layout.offset
    rows = torch.linalg.solve_triangular(root, layout.rows.expand(len(root), -1, -1), upper=False)
    return EmulatorDensity(base, located, rows, solve_lower(root, target))
