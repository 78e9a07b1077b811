"""Latents with hard bounds: found in the training pairs, kept by the sampler.

A uniform or otherwise truncated prior has a density that jumps to zero at a bound. A network smooths the jump and leaks
a little beyond it; the sampler draws such rows again, so that the law is the network's restricted to the support.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Support", "find_support"]

# A bound is hard if this share of the range next to it holds at least this share of the pairs, and this many.
_WINDOW, _SHARE, _PAIRS = 0.02, 0.006, 10


@dataclass(frozen=True)
class Support:
    """Bounds of the latents.

    Parameters
    ----------
    lower, upper : Tensor
        Shape (r,); infinite where there is no bound.
    """

    lower: Tensor
    upper: Tensor

    def contains(self, z: Tensor) -> Tensor:
        """Whether rows of `z` (B, r) lie within the bounds, shape (B,)."""
        return ((z >= self.lower.to(z)) & (z <= self.upper.to(z))).all(1)


def find_support(z: Tensor) -> Support | None:
    """Bounds at which the density of the latents jumps to zero.

    A uniform density has 2 % of its pairs in the outer 2 % of its range, a normal one only one or two pairs. Bounds
    lie one mean spacing beyond the outermost pair.

    Parameters
    ----------
    z : Tensor
        Latents, shape (n, r).

    Returns
    -------
    Support or None
        None where no latent has a hard bound.
    """
    low, high = z.amin(0), z.amax(0)
    extent, enough = high - low, max(_PAIRS, _SHARE * len(z))
    hard_low = (z <= low + _WINDOW * extent).sum(0) >= enough
    hard_high = (z >= high - _WINDOW * extent).sum(0) >= enough
    if not (hard_low | hard_high).any():
        return None
    gap, none = extent / len(z), torch.full_like(low, math.inf)
    return Support(torch.where(hard_low, low - gap, -none), torch.where(hard_high, high + gap, none))
