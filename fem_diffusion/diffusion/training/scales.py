r"""On which scales latents and readings are learned: chosen by held-out pairs.

Candidates are the users' own scales, the likeliest scale of each number, and splines that make each Gaussian, of
latents, of readings, or of both, and of readings the scale on which their noise is of one size. Each makes a joint
Gaussian of latents and readings with noise, whose density of held-out latents, in the users' coordinates, is its score.
Where the law of the latents is known and that of the noise, the posterior has the density of an emulator, so what
counts is how well readings can be told from latents, on either side of their map: the score is the density of held-out
readings, in the users' coordinates, by the regression of `visible_modes`. Where the noise has to be learnt, a second
regression, of the logarithms of what the first leaves, tells how wide it is: noise that depends on the latents shall
not be taken for a scale of the readings. Another scale is taken where it beats the one before by more than two standard
errors.

Latents are standard normal for the density of an emulator. A network that learns their posterior from pairs needs no
such law: near a bound the map turns what is the same everywhere into something that is not, and the sampler keeps
bounds by itself. So it has latents between two bounds as they are, and others on the better scale.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fem_diffusion.diffusion.base.emulator import regress, spread
from fem_diffusion.diffusion.base.layouts import LayoutFamily
from fem_diffusion.diffusion.base.visible import Regression
from fem_diffusion.diffusion.maps.fitted import fit_scales, gaussianised
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.maps.noise import carried, even_noise
from fem_diffusion.diffusion.noise import GaussianNoise, Noise
from fem_diffusion.diffusion.tensors import Tensors

__all__ = ["Scales", "choose_scales"]

# Pairs that are looked at, share held out, pairs that each number wants, and the least.
_LOOKED_AT, _HELD_OUT, _EACH, _FEWEST = 10000, 0.25, 4, 200
# Pairs of which a kernel learns, and rounds in which it learns its weights.
_LEARNED, _ROUNDS = 1200, 2
# Standard errors, and nats, by which another scale has to be better.
_ERRORS, _WORTH = 2.0, 0.05
# Nats of one pair beyond which it counts no more.
_IMPOSSIBLE = 10.0
# Share of the noise's variance that least squares leave of what is linear, and of a mean square that is nothing.
_FLAT, _NOTHING = 1e-3, 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class Scales(Tensors):
    """Maps of latents and of readings; None for the users' own scale.

    Where latents of a known law are mapped, but readings are more nearly linear in what they were, `curve` is that map.
    Where they are mapped for a density of the emulator alone, and a network learns them `straight`, so it is said.
    """

    latents: MonotoneMap | None = None
    readings: MonotoneMap | None = None
    curve: MonotoneMap | None = None
    straight: bool = False

    def pairs(self, z: Tensor, y: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents (n, r), noise-free readings with levels behind (n, k + l), their slopes (n, k + l, r), all mapped."""
        if self.readings is not None:
            k = len(self.readings)
            if slopes is not None:
                own = self.readings.log_slope(y[:, :k]).exp()[:, :, None] * slopes[:, :k]
                slopes = torch.cat([own, slopes[:, k:]], 1)
            y = torch.cat([self.readings.forward(y[:, :k]), y[:, k:]], 1)
        if self.latents is not None:
            if slopes is not None:
                slopes = slopes / self.latents.log_slope(z).exp()[:, None]
            z = self.latents.forward(z)
        return z, y, slopes


def choose_scales(z: Tensor, y: Tensor, noise: Noise | LayoutFamily | None, latents: MonotoneMap | None,
                  fixed: bool, seed: int = 0, stay: bool = False) -> Scales:
    """The scales with which the joint Gaussian tells most of held-out latents.

    Takes latents (n, r), of which a map is known, or which are as they should be, where `fixed`, and readings without
    noise, with levels behind them (n, k + l); of a family, coordinates of the state, which stay as they are. Latents
    that are to `stay` are amplitudes of modes to a network.
    """
    generator, family = torch.Generator().manual_seed(seed), isinstance(noise, LayoutFamily)
    # Pairs may come in an order of their own: those held out are to be any of them.
    some = torch.randperm(len(z), generator=generator)[:_LOOKED_AT]
    z, y = z[some], y[some]
    n, r = z.shape
    apart = round(_HELD_OUT * n)
    # A reading that is always the same has no scale; the base refuses it.
    if n < _FEWEST or n - apart < _EACH * (r + y.shape[1]) or bool((y == y[0]).all(0).any()):
        return Scales(latents, curve=latents)
    if isinstance(noise, LayoutFamily):
        noise = GaussianNoise(std=(1 / noise.weights).numpy())
    k = y.shape[1] - (0 if noise is None else len(noise.levels))
    seen = y if noise is None else noise.sample(y, generator)
    read: list[MonotoneMap | None] = [None]
    if not family:
        even = None if noise is None else even_noise(noise, y[apart:], generator)
        read += [part for part in (even, *_maps(seen[apart:], False)) if part is not None and bool(
            torch.isfinite(part.forward(y[apart:, :k])).all())]
    told = noise if noise is not None and noise.told else None
    if fixed:
        many = [latents] if latents is None else [None, latents]
        if len(many) == 1 and (len(read) == 1 or told is not None and _linear(z, y[:, :k], told.covariance(y))):
            return Scales(latents)
        score = partial(_by_spread, z, seen) if told is None else partial(_by_emulator, z, y, seen, told)
    else:
        many = [None] if stay else [None, *_maps(z[apart:], True)]
        if family:
            # Layouts see less of the state than all of its coordinates tell here: only logarithms are sure to gain.
            many = [part for part in many if part is None or not part.knots.numel() and "asinh" not in part.kinds]
        score = partial(_by_base, z, seen, apart)
    best, scores = None, None
    for i, j in sorted(((i, j) for i in range(len(many)) for j in range(len(read))), key=sum):
        found = Scales(many[i], read[j])
        new = score(found)
        if scores is None or _gains(new, scores):
            best, scores = found, new
    assert best is not None
    if latents is None:
        return best
    straight = not family and told is None
    if straight and not all(one is not None and np.isfinite(one.bounds).all() for one in latents.laws or ()):
        on, own = (_by_base(z, seen, apart, Scales(part, best.readings)) for part in (latents, None))
        straight = not _gains(on, own)
    return Scales(latents, best.readings, latents if best.latents is None else None, straight)


def _gains(new: Tensor, old: Tensor) -> bool:
    """Whether log densities (n,) of one scale are surely larger than those of another."""
    # One pair that a bad scale finds impossible would hold all of the gain, and make it look like chance.
    gain = (new - old).clamp(max=_IMPOSSIBLE)
    return bool(torch.isfinite(new).all()) and float(gain.mean()) > max(
        _WORTH, _ERRORS * float(gain.std()) / math.sqrt(len(gain)))


def _maps(x: Tensor, positive: bool) -> list[MonotoneMap]:
    """The likeliest scale, where it is another one, and splines on it, of numbers (N, n)."""
    scale = fit_scales(x, positive)
    return [part for part in (scale, gaussianised(x, scale)) if part is not None]


def _linear(z: Tensor, y: Tensor, R: Tensor) -> bool:
    """Whether least squares leave of readings next to nothing beside their noise, of covariance R (k, k)."""
    return bool((regress(z, y)[2].diagonal() <= _FLAT * R.diagonal()).all())


def _by_emulator(z: Tensor, y: Tensor, seen: Tensor, noise: Noise, scales: Scales) -> Tensor:
    """Log density of the first readings, in the users' coordinates, by a regression of the rest on latents.

    Those who look at more pairs than a kernel learns of get the first of these.
    """
    z, y, seen = z[:_LEARNED], y[:_LEARNED], seen[:_LEARNED]
    apart = round(_HELD_OUT * len(z))
    u, v, _ = scales.pairs(z, y)
    law = carried(noise, scales.readings)
    assert law is not None
    R, v = law.covariance(v), law.readings(v)
    unit = spread(v - v.mean(0))
    found = _learned(_unit(u), (v - v.mean(0)) / unit, R / unit / unit[:, None], apart).scores - unit.log().sum()
    return found if scales.readings is None else found + scales.readings.log_slope(seen[:apart]).sum(1)


def _by_spread(z: Tensor, y: Tensor, scales: Scales) -> Tensor:
    """As `_by_emulator` of readings that hold their noise, whose width is learned as well."""
    z, y = z[:_LEARNED], y[:_LEARNED]
    apart = round(_HELD_OUT * len(z))
    u, v, _ = scales.pairs(z, y)
    u, none = _unit(u), v.new_zeros(v.shape[1], v.shape[1])
    unit = spread(v - v.mean(0))
    v = (v - v.mean(0)) / unit
    rest = v - _learned(u, v, none, apart)(u)
    # Of readings that hold no noise nothing may be left.
    logs = torch.log(rest.square() + _NOTHING * rest.square().mean(0) + _NOTHING**2)
    middle = logs.mean(0)
    logs = middle + _learned(u, logs - middle, none, apart)(u)
    white = rest * torch.exp(-logs / 2)
    covariance = white[apart:].T @ white[apart:] / len(white[apart:])
    root = torch.linalg.cholesky(covariance + torch.diag(_NOTHING * covariance.diagonal() + _NOTHING**2))
    white = torch.linalg.solve_triangular(root, white[:apart].T, upper=False).square().sum(0)
    found = -(white + logs[:apart].sum(1)) / 2 - root.diagonal().log().sum() - unit.log().sum()
    return found if scales.readings is None else found + scales.readings.log_slope(y[:apart]).sum(1)


def _unit(u: Tensor) -> Tensor:
    """Columns of mean zero and size one."""
    return (u - u.mean(0)) / spread(u - u.mean(0))


def _learned(u: Tensor, v: Tensor, R: Tensor, apart: int) -> Regression:
    """Regression of centred numbers (n, k) with noise R (k, k) on latents (n, r), with `apart` held out."""
    weights = torch.ones(u.shape[1], dtype=u.dtype)
    for _ in range(_ROUNDS):
        weights = Regression(u, v, R, weights, held_out=apart).importance().sqrt()
    return Regression(u, v, R, weights, held_out=apart)


def _by_base(z: Tensor, y: Tensor, apart: int, scales: Scales) -> Tensor:
    """Log density (apart,) of the first latents, in the users' coordinates, by a regression of the rest on readings."""
    u, v, _ = scales.pairs(z, y)
    matrix, offset, residual = regress(v[apart:], u[apart:])
    rest = u[:apart] - offset - v[:apart] @ matrix.T
    unit = residual.diagonal().clamp(min=1e-300).sqrt()
    root, failed = torch.linalg.cholesky_ex(residual / unit / unit[:, None])
    if failed.any():
        return rest.new_full((apart,), -math.inf)
    white = torch.linalg.solve_triangular(root, (rest / unit).T, upper=False).square().sum(0)
    found = -white / 2 - (unit.log() + root.diagonal().log()).sum() - math.log(2 * math.pi) / 2 * z.shape[1]
    return found if scales.latents is None else found + scales.latents.log_slope(z[:apart]).sum(1)
