r"""Noise whose law the base does not hold as one covariance: relative, with unknown levels, or with outliers.

Readings tell nothing of a level by their mean, so no joint Gaussian sees it; what they leave of themselves does. Around
a linearisation :math:`y = e + G(z - \bar z) + \varepsilon`, the standard normal number :math:`\zeta` of a level has the
marginal likelihood :math:`N(e; 0, S)` with :math:`S = G C G^T + \Sigma + R(\zeta)`; Fisher scoring finds the mode of
its posterior, of precision :math:`1 + F`, :math:`F = \tfrac12 \mathrm{tr}(S^{-1} \partial R\, S^{-1} \partial R)`. Of
outliers every sensor has a variance of its own, that of the scale mixture which Student's law is, given its residual
(Lange, Little and Taylor 1989). So the Gaussian of a measurement stands where its posterior is; the emulator's density
knows the law itself.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.noise import Noise
from fem_diffusion.diffusion.tensors import Tensors

if TYPE_CHECKING:
    from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located

__all__ = ["NoiseLaw"]

# Rounds of linearisation and variances, steps of the scoring, step of differences, largest step, and what is left of
# the prior's variance of a level, at most.
_ROUNDS, _SCORES, _FINE, _LONGEST, _MOST = 5, 12, 1e-4, 1.0, 0.98


@dataclass(frozen=True, eq=False, repr=False)
class NoiseLaw(Tensors):
    """A noise model whose density is known, and where latents have its levels.

    Parameters
    ----------
    noise : Noise
        Of k sensors, with l levels.
    rows, offset : Tensor
        Standard normal numbers of the levels, rows · z + offset, shape (l, r) and (l,).
    covariance : Tensor
        Of the noise, averaged over training measurements, shape (k, k).
    """

    noise: Noise
    rows: Tensor
    offset: Tensor
    covariance: Tensor

    def clean(self, c: Tensor, z: Tensor) -> Tensor:
        """Noise-free readings (..., k) at latents (..., r) with the numbers of the levels behind them."""
        return torch.cat([c, z @ self.rows.mT + self.offset], -1)

    def locate(self, base: "GaussianBase", layout: Layout, y: Tensor) -> "Located":
        """Gaussians at measurements `y` (B, k), with levels and variances as these tell them."""
        own, zeta, square = base.noise(layout), y.new_zeros(len(y), len(self.rows)), torch.zeros_like(y)
        R, more = self._near(y, zeta, square), None
        located = base.update(layout, y, own + R)
        curved = not base.emulator.affine or self.noise.heavy
        for _ in range(_ROUNDS if curved else 1):
            scale = torch.diagonal(own + R, dim1=1, dim2=2).sqrt()
            # Of z, as `Located` has it of base coordinates and in units of the noise.
            G = scale[:, :, None] * located.sensitivity @ located.whitener
            left, seen = scale * located.misfit, (G @ located.factor).square().sum(2)
            square = left.square() + seen
            if len(self.rows):
                e = left + (G @ (located.mean - base.mean)[:, :, None])[:, :, 0]
                signal = G @ base.factor
                zeta, variance = self._levels(signal @ signal.mT + own, e, y, zeta, square)
                variance = variance.clamp(max=_MOST)
                more = self.rows, zeta / (1 - variance) - self.offset, variance / (1 - variance)
            R = self._near(y, zeta, square)
            located = base.update(layout, y, own + R, more, located)
        return located

    def _near(self, y: Tensor, zeta: Tensor, square: Tensor) -> Tensor:
        return self.noise.near(torch.cat([y, zeta], 1), square)

    def _levels(self, rest: Tensor, e: Tensor, y: Tensor, zeta: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Mode (B, l) of the levels' numbers and variance (B, l), for the covariance (B, k, k) of all but the noise."""
        identity = torch.eye(zeta.shape[1], dtype=y.dtype, device=y.device)
        precision = identity
        for _ in range(_SCORES):
            inverse = torch.linalg.inv(rest + self._near(y, zeta, square))
            pulled = (inverse @ e[:, :, None])[:, :, 0]
            slopes = [(self._near(y, zeta + step, square) - self._near(y, zeta - step, square)) / (2 * _FINE)
                      for step in _FINE * identity]
            scores = torch.stack([(pulled * (slope @ pulled[:, :, None])[:, :, 0]).sum(1)
                                  - (inverse * slope).sum((1, 2)) for slope in slopes], 1) / 2
            turned = [inverse @ slope for slope in slopes]
            F = torch.stack([torch.stack([(a * b.mT).sum((1, 2)) for a in turned], 1) for b in turned], 1) / 2
            precision = F + identity
            step = torch.linalg.solve(precision, (scores - zeta)[:, :, None])[:, :, 0]
            zeta = zeta + step.clamp(-_LONGEST, _LONGEST)
        return zeta, torch.linalg.inv(precision).diagonal(dim1=1, dim2=2)
