r"""The posterior that the emulator implies, and Hamiltonian moves that leave it as it is.

For Gaussian latents the density of the posterior is known up to the emulator,

.. math:: -\log p(z | y) = \tfrac12 |y - b - B f(z)|^2_{(R + B \Sigma B^T)^{-1}}
          + \tfrac12 |z - \bar z|^2_{C^{-1}} + \text{const}.

In base coordinates, where it is nearly standard normal, one leapfrog trajectory of a quarter period makes a nearly
independent sample (Neal 2011, section 5.3). Two things are made of that. *Corrections*: a few moves take samples of the
network to the emulator's posterior. *Training*: the latents behind a simulated measurement are an exact sample of
their posterior, so moves that start there give more of them, and no warm-up is needed.

Where the noise depends on the latents the first term is that of its law, with the determinant, and the posterior may be
far from Gaussian, with places that moves do not leave and modes that they do not reach: there `EmulatorDensity.draw`
takes points from the base to the emulator's posterior by tempering.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located, apply, cholesky, solve_lower
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.maps.noise import MappedNoise
from fem_diffusion.diffusion.noise import Noise
from fem_diffusion.diffusion.sampling.hamiltonian import hamiltonian_move, shorter
from fem_diffusion.diffusion.sampling.mixtures import fit_mixture, standard_normal
from fem_diffusion.diffusion.sampling.tempered import tempered
from fem_diffusion.diffusion.tensors import Tensors

__all__ = ["EmulatorDensity", "emulator_density"]

_LEAPS = 4
# Points of each posterior that are tempered together, at least and at first; temperatures that do little to shares,
# latents up to which a second run begins with a mixture.
_FEWEST, _FIRST, _NEAR, _MIXED = 256, 1000, 3, 5
# Moves at each temperature where the integral is wanted.
_MOVES = 4
# Points whose states are held at once.
_ROWS = 4096


@dataclass(frozen=True, eq=False, repr=False)
class EmulatorDensity(Tensors):
    """Posterior densities of B measurements in base coordinates; from `emulator_density`.

    `base` holds the law of the latents and the emulator, `located` is the base at each measurement; `rows` (B, k, s)
    and `target` (B, k) are sensors and readings in units of noise and emulator error. Where the base has a law of the
    noise, they are in the units of the sensors, those of the users where readings are mapped, and `noise` is that law,
    with the emulator's error in its variance; and where noise is learnt, too.
    """

    base: GaussianBase
    located: Located
    rows: Tensor
    target: Tensor
    noise: Noise | None = None

    @property
    def _rows(self) -> int:
        """How many points are evaluated at once."""
        return _ROWS if self.base.learnt is None else min(_ROWS, self.base.learnt.together)

    def energy(self, w: Tensor) -> Tensor:
        """Negative log density (n, B) up to a constant, at n points each (n, B, r)."""
        if len(w) > 1 and w[..., 0].numel() > self._rows:
            return torch.cat([self.energy(part) for part in w.split(max(1, self._rows // w.shape[1]))])
        z = self.located.colour(w)
        away = z - self.base.mean
        prior = ((away @ self.base.precision) * away).sum(2) / 2
        if self.base.bent:
            return prior - self._by_law(z)
        c = self.base.emulator(z.flatten(0, 1)).view(*z.shape[:2], -1)
        return prior + (self.target - apply(self.rows, c)).square().sum(2) / 2

    def force(self, w: Tensor) -> Tensor:
        """Gradient of `energy`, shape (n, B, r)."""
        if len(w) > 1 and w[..., 0].numel() > self._rows:
            return torch.cat([self.force(part) for part in w.split(max(1, self._rows // w.shape[1]))])
        z = self.located.colour(w)
        flat = z.flatten(0, 1)
        if self.noise is not None:
            with torch.enable_grad():
                at = z.detach().requires_grad_()
                pulled, = torch.autograd.grad(self._by_law(at).sum(), at)
        else:
            c, pull = self.base.emulator.with_pull(flat)
            rest = self.target - apply(self.rows, c.view(*z.shape[:2], -1))
            if self.base.learnt is None:
                pulled = pull(apply(self.rows.mT, rest).flatten(0, 1)).view_as(z)
            else:
                by_rest, by_z = self.base.learnt.with_pull(rest.flatten(0, 1), flat)
                pulled = (by_z - pull(by_rest)).view_as(z)
        return apply(self.located.factor.mT, (z - self.base.mean) @ self.base.precision - pulled)

    def _by_law(self, z: Tensor) -> Tensor:
        """Log density (n, B) of the readings up to a constant at n latents each (n, B, r), of which the noise depends.
        """
        flat = z.flatten(0, 1)
        y = self.target[0] if len(self.target) == 1 else self.target.expand(len(z), -1, -1).flatten(0, 1)
        c = self.base.emulator(flat)
        if self.noise is None:
            assert self.base.learnt is not None
            return self.base.learnt.log_density(y - c, flat).view(z.shape[:2])
        assert self.base.law is not None
        clean = self.base.law.clean(c, flat)
        if isinstance(self.noise, MappedNoise):
            return self.noise.users_density(y, clean).view(z.shape[:2])
        return self.noise.log_density(y, clean).view(z.shape[:2])   # pyright: ignore[reportOptionalCall]

    def draw(self, n: int, moves: int, generator: torch.Generator) -> Tensor:
        """Points of the law itself (n, B, r), by tempering from the base, with so many moves at the end."""
        found, _ = self._tempered(n, moves, generator)
        # Copies of one point stand side by side.
        return found[torch.randperm(len(found), generator=generator, device=found.device)[:n]]

    def log_integral(self, generator: torch.Generator) -> Tensor:
        """Logarithm (B,) of the integral of exp(-energy) over base coordinates, by tempering.

        Off by 0.05 for two latents; too small where many have a curved posterior, by some 0.2 for ten, 0.7 for twenty.
        """
        return self._tempered(_FIRST, _MOVES, generator)[1]

    def _tempered(self, n: int, moves: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """At least n points (., B, r), integrals (B,): from the base, or from a mixture of what is found from there."""
        start, n = standard_normal(self.located.mean), max(n, _FEWEST)
        found, integral, steps = tempered(start, min(n, _FIRST), self.energy, self.force, moves, generator)
        # Of many latents a mixture covers too little, and costs too much, for what it brings.
        again = steps > _NEAR and found.shape[2] <= _MIXED
        if not again and len(found) == n:
            return found, integral
        if again:
            start = fit_mixture(found, int(torch.randint(2**31, (), generator=generator, device=found.device)))
        return tempered(start, n, self.energy, self.force, moves, generator)[:2]

    def move(self, w: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One Hamiltonian move of n points each, (n, B, r); the new points and which were accepted, (n, B)."""
        length = math.pi / 2 / _LEAPS * (0.8 + 0.4 * float(torch.rand((), generator=generator, device=w.device)))
        if self.base.bent:
            length = length * shorter(w, generator)[..., None]
        return hamiltonian_move(w, self.energy, self.force, length, _LEAPS, generator)


def emulator_density(base: GaussianBase, layout: Layout, y: Tensor, located: Located) -> EmulatorDensity:
    """The emulator's posterior of measurements `y` (B, k), which ``base.locate(layout, y)`` has located.

    The latents have to be Gaussian; there are B layouts, or one of them all.
    """
    if base.learnt is not None:
        return EmulatorDensity(base, located, layout.rows.expand(len(y), -1, -1), y)
    if base.law is not None:
        error = base.noise(layout)[0].diagonal()
        noise = base.law.noise.widened(error)
        y = noise.scale.inverse(y) if isinstance(noise, MappedNoise) else y
        return EmulatorDensity(base, located, layout.rows.expand(len(y), -1, -1), y, noise)
    root, target = cholesky(base.noise(layout)), y - layout.offset
    rows = torch.linalg.solve_triangular(root, layout.rows.expand(len(root), -1, -1), upper=False)
    return EmulatorDensity(base, located, rows, solve_lower(root, target))
