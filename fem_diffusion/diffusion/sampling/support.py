"""Latents with hard bounds: found in the training pairs, kept by the sampler.

A uniform or otherwise truncated prior has a density that jumps to zero at a bound. A network smooths the jump and leaks
a little beyond it; the sampler draws such rows again, so that the law is the network's restricted to the support.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fem_diffusion.diffusion.checks import check_tensor

__all__ = ["Support", "find_support"]

# The outermost share of the pairs, and at least so many, tell whether a bound is hard, if there are so many times more.
_SHARE, _LEAST, _TIMES = 0.01, 100, 10
# Density next to a hard bound, at least, in units of that between the quartiles.
_DENSITY = 0.1


@dataclass(frozen=True, eq=False)
class Support:
    """Bounds of the latents, shape (r,); infinite where there is none."""

    lower: Tensor
    upper: Tensor

    def contains(self, z: Tensor) -> Tensor:
        """Whether latents `z` (..., r) lie within the bounds, shape (...)."""
        return ((z >= self.lower.to(z)) & (z <= self.upper.to(z))).all(-1)


def find_support(z: Tensor) -> Support | None:
    """Bounds at which the density of latents (n, r) jumps to zero; None without any, or with fewer than 1,000 pairs.

    Next to a jump pairs lie evenly: the middle one of the m outermost halves the distance from the first to the last.
    In a tail they crowd towards the last. So the ratio of the two distances, which knows no scale, is 1/2 with a
    standard deviation of 1 / (2 sqrt(m)) at a jump, and 0.7 to 0.9 in the tails of gamma, lognormal, normal and t laws.
    A small mode far away has few pairs, too, so the density next to the bound must be a tenth of that between the
    quartiles. Bounds lie one mean spacing beyond the outermost pair. InputError if `z` is no tensor of finite real
    numbers of that shape.
    """
    check_tensor(z, "z", ("n", "r"), "latents")
    m = max(_LEAST, round(_SHARE * len(z)))
    if len(z) < _TIMES * m:
        return None
    ordered = z.sort(0).values
    quartiles = ordered[3 * len(z) // 4] - ordered[len(z) // 4]
    longest = m / len(z) * quartiles / (0.5 * _DENSITY)
    lower, lower_hard = _edge(ordered[:m], longest)
    upper, upper_hard = _edge(-ordered.flip(0)[:m], longest)
    if not (lower_hard | upper_hard).any():
        return None
    none = torch.full_like(lower, math.inf)
    return Support(torch.where(lower_hard, lower, -none), torch.where(upper_hard, -upper, none))


def _edge(outermost: Tensor, longest: Tensor) -> tuple[Tensor, Tensor]:
    """Lower bound (r,) and whether it is hard; `longest` (r,) is the distance over which a bound spreads m latents."""
    m = len(outermost)
    extent = outermost[-1] - outermost[0]
    even = outermost[m // 2] - outermost[0] < (0.5 + 1 / math.sqrt(m)) * extent
    return outermost[0] - extent / (m - 1), even & (extent > 0) & (extent < longest)
