r"""Readings that say nothing: told from the others before anything learns them by heart.

A network that sees many readings of which few matter, or noise that is learnt of all of them, spends its pairs on what
they do not say. Of readings that depend neither on the latents nor on others that do, nothing can be learned:
:math:`p(z | y) = p(z | y_\mathrm{told})`. Dependence is looked for in ranks, in whose scale tails and units are
gone: in correlations of :math:`\cos(\pi a u)`, a = 1, ..., 4, with those of a latent, or of two together, and of a
reading that tells. What many readings may tell together, and none alone, the F test of a regression on all of them
shows; where it does, all readings stay.
"""

import math
from dataclasses import replace

import torch
from scipy.stats import f, norm
from torch import Tensor

from fem_diffusion.diffusion.base.emulator import affine_emulator
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.maps.monotone import MonotoneMap

__all__ = ["telling", "widened"]

# Pairs below which all readings stay, and pairs that are looked at; latents up to which two are looked at together.
_FEWEST, _LOOKED_AT, _TOGETHER = 1000, 10000, 64
# Waves of one number, and of each of two together.
_WAVES, _OF_TWO = 4, 2
# Standard errors of a correlation that are no chance, and so rare is what no regression finds by chance.
_NO_CHANCE = 5.0
# Some readings may repeat others: shares of variance that count as none, and by which covariances are raised.
_REPEATS, _RAISED = 1e-6, 1e-6


def telling(z: Tensor, y: Tensor) -> Tensor | None:
    """Numbers of the readings (n, k), with their noise, that tell of the latents (n, r); None where all shall stay.

    They do where most tell: few others do little harm.
    """
    k = y.shape[1]
    # A reading that never varies is refused later, by its number.
    if len(z) < _FEWEST or z.shape[1] > _TOGETHER or bool((y == y[0]).all(0).any()):
        return None
    # Pairs may come in an order of their own.
    some = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:_LOOKED_AT]
    u, v = _waves(z[some]), _waves(y[some])
    told = _depend(v, u.flatten(1))
    for i in range(z.shape[1] - 1):
        if 2 * int(told.sum()) > k:
            return None
        two = u[:, i, :_OF_TWO, None, None] * u[:, i + 1:, :_OF_TWO].mT[:, None]
        told |= _depend(v, _standard(two.flatten(1)))
    new = told
    while new.any():
        new = _depend(v, v[:, new].flatten(1)) & ~told
        told |= new
    if not told.any() or 2 * int(told.sum()) > k or 2 * k > len(v) or _together(
            v[:, ~told], torch.cat([u, v[:, told]], 1).flatten(1)):
        return None
    return torch.where(told)[0]


def _standard(x: Tensor) -> Tensor:
    """Columns of mean zero and size one, or zero where they do not vary."""
    x = x - x.mean(0)
    size = x.square().mean(0).sqrt()
    return torch.where(size > 1e-6, x / size.clamp(min=1e-6), 0.0)


def _waves(x: Tensor) -> Tensor:
    """Waves (n, m, 4) of the ranks of numbers (n, m), those in the middle where some are equal."""
    ordered, own = x.T.sort(dim=1).values.contiguous(), x.T.contiguous()
    first, last = (torch.searchsorted(ordered, own, right=right) for right in (False, True))
    place = (first + last).T.float() / (2 * len(x))
    waves = torch.cos(math.pi * place[..., None] * torch.arange(1, _WAVES + 1))
    return _standard(waves.flatten(1)).view_as(waves)


def _depend(v: Tensor, u: Tensor) -> Tensor:
    """Whether waves of readings (n, k, 4) go with any of some numbers (n, m) by more than chance, shape (k,)."""
    return (u.T @ v.flatten(1)).abs().amax(0).unflatten(0, v.shape[1:]).amax(1) > _NO_CHANCE * math.sqrt(len(v))


def _together(v: Tensor, u: Tensor) -> bool:
    """Whether numbers (n, m) are tied to one wave of all of the readings (n, k, 4), by the F test of a regression."""
    n, best = len(v), 1.0
    for wave in v.double().unbind(2):
        values, axes = torch.linalg.eigh(wave.T @ wave / n)
        kept = values > _REPEATS * values[-1]
        p = int(kept.sum())
        if p:   # a wave of readings of yes and no may be zero
            white = wave @ axes[:, kept] / values[kept].sqrt()
            share = (white.T @ u.double() / n).square().sum(0).max()   # of the variance
            best = min(best, float(f.sf(share / p / (1 - share) * (n - 1 - p), p, n - 1 - p)))
    return best < norm.sf(_NO_CHANCE)


def widened(denoiser: Denoiser, y: Tensor, told: Tensor) -> Denoiser:
    """A denoiser of the readings `told` (j,), by their numbers, as one of all, of whose pairs y (n, k) are."""
    k, base, y = y.shape[1], denoiser.base, y.double()
    others = torch.ones(k, dtype=torch.bool).scatter(0, told, False).nonzero()[:, 0]
    order = torch.cat([told, others]).argsort()
    covariance = torch.cov(y[:, others].T).reshape(len(others), len(others))
    covariance = (1 - _RAISED) * covariance + _RAISED * torch.diag(covariance.diagonal())
    emulator, learnt = base.emulator, base.learnt
    wide = affine_emulator(torch.cat([emulator.matrix, emulator.matrix.new_zeros(len(others), base.r)])[order],
                           torch.cat([emulator.offset, y[:, others].mean(0)])[order],
                           torch.block_diag(emulator.residual, covariance)[order][:, order])
    if emulator.curve is not None:
        wide = wide.bent(emulator.curve, emulator.curve_mean, emulator.curve_std)
    if learnt is not None:
        learnt = replace(learnt, aside=torch.linalg.cholesky(covariance), sensors=order)
    readings = denoiser.readings and _joined(denoiser.readings, len(others)).select(order)
    return replace(denoiser, base=replace(base, emulator=wide, learnt=learnt, told=told), readings=readings)


def _joined(scale: MonotoneMap, n: int) -> MonotoneMap:
    """A map, and n numbers behind it that stay as they are."""
    zero = scale.centre.new_zeros(n)
    knots = torch.linspace(-1, 1, scale.knots.shape[1], dtype=zero.dtype).expand(n, -1)
    return MonotoneMap((*scale.kinds, *n * ("identity",)), torch.cat([scale.centre, zero]),
                       torch.cat([scale.unit, zero + 1]), torch.cat([scale.knots, knots]),
                       torch.cat([scale.values, knots]), torch.cat([scale.slopes, torch.ones_like(knots)]),
                       (*scale.laws, *n * (None,)))
