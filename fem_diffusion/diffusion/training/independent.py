"""Laws of independent latents with hard bounds, as pairs show them: what a known prior gives, estimated.

Between two bounds the law is uniform, beyond one exponential, and normal without any, each with a spline where held-out
latents are likelier so. At a hard bound a density is finite: there the spline goes on with slope one, as the law does.
All this is of use where latents are independent as far as pairs tell: then they are standard normal on that scale, the
emulator gives the density of their posterior, and no sample leaves the bounds.
"""

import math
from dataclasses import replace

import torch
from scipy import stats
from torch import Tensor

from fem_diffusion.diffusion.maps.fitted import gaussianised
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.sampling.support import find_support
from fem_diffusion.diffusion.tensors import distinct
from fem_diffusion.errors import InputError
from fem_diffusion.marginal import Marginal

__all__ = ["are_independent", "bounded_laws", "check_draws"]

# Share of the latents held out, and standard errors by which a spline has to be better.
_HELD_OUT, _ERRORS = 0.25, 2.0
# Probability with which independent latents are taken for others, and random directions that are looked along.
_CHANCE, _DIRECTIONS = 1e-3, 50
# Probability of draws of a law that is given below which they are none.
_NO_DRAW = 1e-9


def bounded_laws(z: Tensor) -> MonotoneMap | None:
    """Map of latents (n, r) to independent standard normal ones; None without hard bounds, or if they are dependent."""
    support = find_support(z)
    if support is None:
        return None
    # Pairs may come in an order of their own: those held out are to be any of them.
    z = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))]
    hard = torch.stack([torch.isfinite(support.lower), torch.isfinite(support.upper)], 1)
    laws = tuple(_law(column, float(low), float(high)) for column, low, high in zip(
        z.T, support.lower, support.upper))
    scale = MonotoneMap.of(("law",) * len(laws), laws=laws)
    apart = round(_HELD_OUT * len(z))
    spline = _with_spline(z[apart:], scale, hard)
    if spline is not None:
        gain = _log_density(spline, z[:apart]) - _log_density(scale, z[:apart])
        curved = gain.mean(0) > _ERRORS * gain.std(0) / math.sqrt(apart)
        spline = _with_spline(z, scale, hard) if bool(curved.any()) else None
    if spline is not None:
        straight = ~curved[:, None]
        scale = replace(spline, knots=torch.where(straight, spline.values, spline.knots),
                        slopes=torch.where(straight, torch.ones_like(spline.slopes), spline.slopes))
    return scale if are_independent(scale.forward(z)) else None


def _law(x: Tensor, low: float, high: float) -> Marginal:
    """The simplest law of numbers (n,) between two bounds, of which either may be infinite."""
    mean = float(x.mean())
    if math.isfinite(low) and math.isfinite(high):
        return Marginal(stats.uniform(low, high - low))
    if math.isfinite(low):
        return Marginal(stats.expon(low, mean - low))
    if math.isfinite(high):
        return Marginal(stats.weibull_max(1.0, high, high - mean))
    return Marginal(stats.norm(mean, float(x.std())))


def _with_spline(z: Tensor, scale: MonotoneMap, hard: Tensor) -> MonotoneMap | None:
    """The spline that makes latents (n, r) Gaussian, straight at `hard` bounds (r, 2)."""
    found = gaussianised(z, scale)
    if found is None:
        return None
    slopes = found.slopes.clone()
    for side in (0, -1):
        slopes[hard[:, side], side] = 1.0
    return replace(found, slopes=slopes)


def _log_density(scale: MonotoneMap, z: Tensor) -> Tensor:
    """Log density (n, r) of each of latents (n, r) that are standard normal on a scale, up to a constant."""
    return scale.log_slope(z) - scale.forward(z).square() / 2


def check_draws(z: Tensor, scale: MonotoneMap | None) -> None:
    """InputError unless latents (n, r) are draws of the independent laws of a map, standard normal where there is none.

    By Kolmogorov's and Smirnov's test of each, by its mean and mean square, and by how they go together.
    """
    z = z[distinct(z)[0]]   # one may be read several times
    u = z if scale is None else scale.forward(z)
    n, r = z.shape
    outside = ~torch.isfinite(u).all(0)
    values, squares = u.numpy(), u.square().sum(0).numpy()
    for i in range(r):
        law = "N(0, 1)" if scale is None else scale.laws[i]
        if outside[i]:
            raise InputError(f"Latent {i} has values beyond the bounds of its prior {law}: check its units, or leave "
                             "prior out.")
        p = 3 * r * min(stats.kstest(values[:, i], "norm").pvalue, math.erfc(abs(float(u[:, i].mean())) * (n / 2)**0.5),
                        2 * stats.chi2.sf(squares[i], n), 2 * stats.chi2.cdf(squares[i], n))
        if p < _NO_DRAW:
            raise InputError(f"Latent {i} is no draw of its prior {law} (p = {p:.1g}): give the law that the pairs "
                             "were drawn from, or leave prior and standard_prior out.")
    if not are_independent(u, _NO_DRAW):
        raise InputError("The latents depend on each other, and the prior that is given is of independent ones: give "
                         "other coordinates, in which they are independent, or leave prior and standard_prior out.")


def are_independent(u: Tensor, chance: float = _CHANCE) -> bool:
    """Whether numbers (n, r) are standard normal and independent of each other, as far as they tell.

    Correlations of numbers and of their sizes are looked at, pair by pair, and the law along random directions and of
    the distance from the origin: numbers of which all projections are normal are jointly so (Cramér and Wold 1936).
    False is wrong with this chance.
    """
    n, r = u.shape
    parts = torch.cat([u, u.abs()], 1)
    parts = (parts - parts.mean(0)) / parts.std(0)
    far = (parts.T @ parts / n).abs() * math.sqrt(n)
    far[(torch.arange(2 * r)[:, None] - torch.arange(2 * r)) % r == 0] = 0.0
    p = math.erfc(float(far.max()) / math.sqrt(2)) * 2 * r * (r - 1) if r > 1 else 1.0
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(r, _DIRECTIONS, generator=generator, dtype=u.dtype)
    along = (u @ (along / along.norm(dim=0))).numpy()
    values = [stats.kstest(x, "norm", method="asymp").pvalue for x in along.T]
    values.append(stats.kstest(u.square().sum(1).numpy(), "chi2", (r,), method="asymp").pvalue)
    return min(p, len(values) * float(min(values))) > chance
