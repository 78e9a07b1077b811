r"""Readings that say nothing: told from the others before anything learns them by heart.

A network that sees many readings of which few matter, or noise that is learnt of all of them, spends its pairs on what
they do not say. Of readings whose law depends neither on the latents nor on the others nothing can be learned:
:math:`p(z | y) = p(z | y_\mathrm{told})`. Dependence is looked for in ranks, in whose scale units are gone: in
correlations of :math:`\cos(\pi a u)`, a = 1, ..., 4, with those of a latent, or of two together, and of a reading that
tells; and in tails, that are there together. What readings tell only together shows the F test of a regression on all
of them, and, in the end, the noise of `fit_noise`: where it knows more of what is left, given latents and the readings
that tell, than a constant law does, all readings stay. What it does not find it would not use.
"""

import math
import os
from dataclasses import replace

import torch
from scipy.stats import f, norm, poisson
from torch import Tensor

from fem_diffusion.diffusion.base.emulator import affine_emulator
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.training.loop import TrainingOptions
from fem_diffusion.diffusion.training.scatter import depends

__all__ = ["telling", "widened"]

# Pairs below which all readings stay, and pairs that are looked at; latents up to which two are looked at together, and
# readings at most.
_FEWEST, _LOOKED_AT, _TOGETHER, _MOST = 1000, 10000, 64, 1000
# Waves of one number, and of each of two together; shares of the pairs in a tail.
_WAVES, _OF_TWO, _TAILS = 4, 2, (0.003, 0.01, 0.03)
# How rare is what is no chance, of all that is looked at.
_NO_CHANCE = 1e-3
# Some readings may repeat others: shares of variance that count as none, and by which covariances are raised.
_REPEATS, _RAISED = 1e-6, 1e-6


def telling(z: Tensor, y: Tensor, options: TrainingOptions = TrainingOptions(),
            checkpoint: str | os.PathLike | None = None, progress: bool = False) -> Tensor | None:
    """Numbers of the readings (n, k), with their noise, that tell of the latents (n, r); None where all shall stay.

    They do where most tell: few others do little harm.
    """
    k, r = y.shape[1], z.shape[1]
    # A reading that never varies is refused later, by its number.
    if len(z) < _FEWEST or r > _TOGETHER or k > min(len(z) // 2, _MOST) or bool((y == y[0]).all(0).any()):
        return None
    # Pairs may come in an order of their own.
    some = torch.randperm(len(z), generator=torch.Generator().manual_seed(options.seed))[:_LOOKED_AT]
    places = _places(z[some]), _places(y[some])
    u, v = (_waves(place) for place in places)
    rare = _NO_CHANCE / (k * _WAVES * (_WAVES * (r + k) + _OF_TWO**2 * r * r))
    tails = _tails(places[1])
    told = _depend(v, u.flatten(1), rare) | _meet(_tails(places[0]), tails, rare)
    for i in range(r - 1):
        if 2 * int(told.sum()) > k:
            return None
        two = u[:, i, :_OF_TWO, None, None] * u[:, i + 1:, :_OF_TWO].mT[:, None]
        told |= _depend(v, _standard(two.flatten(1)), rare)
    new = told
    while new.any():
        new = (_depend(v, v[:, new].flatten(1), rare) | _meet(tails[:, new], tails, rare)) & ~told
        told |= new
    if not told.any() or 2 * int(told.sum()) > k or _together(v[:, ~told], torch.cat([u, v[:, told]], 1).flatten(1)):
        return None
    inner = _normal(torch.cat([places[0], places[1][:, told]], 1))
    return None if depends(inner, _normal(places[1][:, ~told]), options, checkpoint, progress) else torch.where(told)[0]


def _places(x: Tensor) -> Tensor:
    """Ranks of numbers (n, m) between 0 and 1, those in the middle where some are equal."""
    ordered, own = x.T.sort(dim=1).values.contiguous(), x.T.contiguous()
    first, last = (torch.searchsorted(ordered, own, right=right) for right in (False, True))
    return (first + last).T.float() / (2 * len(x))


def _standard(x: Tensor) -> Tensor:
    """Columns of mean zero and size one, or zero where they do not vary."""
    x = x - x.mean(0)
    size = x.square().mean(0).sqrt()
    return torch.where(size > 1e-6, x / size.clamp(min=1e-6), 0.0)


def _normal(places: Tensor) -> Tensor:
    """Normal scores (n, m) of ranks, of size one."""
    return _standard(torch.special.ndtri(places.double()))


def _waves(places: Tensor) -> Tensor:
    """Waves (n, m, 4) of ranks (n, m)."""
    waves = torch.cos(math.pi * places[..., None] * torch.arange(1, _WAVES + 1))
    return _standard(waves.flatten(1)).view_as(waves)


def _tails(places: Tensor) -> Tensor:
    """Whether ranks (n, m) are in tails, as numbers (n, m, 6)."""
    return torch.stack([side for share in _TAILS for side in (places < share, places > 1 - share)], 2).float()


def _depend(v: Tensor, u: Tensor, rare: float) -> Tensor:
    """Whether waves of readings (n, k, 4) go with any of some numbers (n, m) by more than chance, shape (k,)."""
    most = float(norm.isf(rare / 2)) * math.sqrt(len(v))
    return (u.T @ v.flatten(1)).abs().amax(0).unflatten(0, v.shape[1:]).amax(1) > most


def _meet(u: Tensor, v: Tensor, rare: float) -> Tensor:
    """Whether tails of readings (n, k, 6) are there with any of others (n, m, 6) more often than by chance, (k,)."""
    u, v = u.flatten(1), v.flatten(1)
    chance = torch.outer(u.mean(0), v.sum(0))
    found = torch.from_numpy(poisson.sf((u.T @ v - 1).numpy(), chance.clamp(min=1e-12).numpy()))
    return (found < rare).any(0).unflatten(0, (-1, 2 * len(_TAILS))).any(1)


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
    return best < _NO_CHANCE / (_WAVES * u.shape[1])


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
