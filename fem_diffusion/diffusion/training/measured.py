"""What fixed sensors and families have different in training, and the candidates for the base of either."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.emulator import fit_emulator, regress, roots, spread
from fem_diffusion.diffusion.base.fitted import check_base, fit_base, law, plain_base
from fem_diffusion.diffusion.base.gaussian import UPDATES, GaussianBase
from fem_diffusion.diffusion.base.law import NoiseLaw
from fem_diffusion.diffusion.base.layouts import Layout, LayoutFamily
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.noise import Noise
from fem_diffusion.diffusion.tensors import Tensors
from fem_diffusion.diffusion.training.cells import spread_over_cells
from fem_diffusion.diffusion.training.loop import TrainingOptions
from fem_diffusion.diffusion.training.scatter import fit_noise
from fem_diffusion.errors import InputError

__all__ = ["Measured", "candidates", "of_family", "of_fixed"]

# Latents times readings up to which a base that follows the posterior is worth its price where it only serves a
# network: with 64 and 96 training takes ten times as long under it.
_FOLLOWED = 2000


@dataclass(frozen=True)
class Measured(Tensors):
    """What fixed sensors and families have different: how a reading is drawn, and what its noise is.

    `covariance` (s, s) is the noise that the base's residual has to hold, where its law does not, `errors` what errors
    of coordinates count alike, as `fit_emulator` takes them, None where the law of the noise is not known, and `share`
    how much an emulator's error makes of the noise.
    """

    noise: Noise | LayoutFamily | None
    covariance: Tensor
    errors: Tensor | None
    share: Callable[[Tensor], float]

    @property
    def family(self) -> bool:
        return isinstance(self.noise, LayoutFamily)

    def measure(self, c: Tensor, generator: torch.Generator) -> tuple[Layout, Tensor]:
        """A layout and measurements (B, k) of coordinates (B, s)."""
        if isinstance(self.noise, LayoutFamily):
            layout = self.noise.draw(len(c), generator)
            return layout, layout.measure(c, generator)
        y = c if self.noise is None else self.noise.sample(c, generator)
        return Layout.readings(y.shape[1], y), y


def of_family(c: Tensor, family: LayoutFamily) -> Measured:
    """Of a family, whose pairs hold states in coordinates (n, s)."""
    s = c.shape[1]
    rows = torch.cat([kind.rows.flatten(0, 1) for kind in family.kinds]).double()
    if rows.shape[1] != s:
        raise InputError(f"The sensors see {rows.shape[1]} state coordinates and the pairs hold {s}: make both from "
                         "one basis of states.")
    std = torch.cat([kind.std[0].flatten() for kind in family.kinds]).double()

    def share(residual: Tensor) -> float:
        return float((((rows @ residual) * rows).sum(1) / std**2).max())
    family = family.to("cpu", torch.float64)
    return Measured(family, c.new_zeros(s, s), 1 / family.weights, share)


def of_fixed(y: Tensor, noise: Noise | None) -> Measured:
    """Of fixed sensors, whose pairs hold readings (n, k) with the numbers of levels behind them."""
    k = y.shape[1] - (0 if noise is None else len(noise.levels))
    covariance = y.new_zeros(k, k) if noise is None else noise.covariance(y)
    known = noise is not None and noise.told and bool((covariance.diagonal() > 0).all())

    def share(residual: Tensor) -> float:
        if not known:
            return math.inf
        whitener, _ = roots(covariance)
        return float(torch.linalg.eigvalsh(whitener @ residual @ whitener.T)[-1])
    return Measured(noise, covariance, covariance if known else None, share)


def candidates(z: Tensor, y: Tensor, slopes: Tensor | None, parts: Measured, kind: str, standard_prior: bool,
               curve: MonotoneMap | None, options: TrainingOptions, checkpoint: str | os.PathLike | None,
               progress: bool) -> list[GaussianBase]:
    """Candidates for the base, on the CPU: the joint Gaussian, and one that follows the posterior.

    A `curve` is the map that has made the latents, before which the emulator takes them.

    Where the law of the noise is not known, the first is a joint Gaussian; emulators that are more than that, and may
    stand for a network, follow where the law of the latents is known: they know the noise as held-out pairs show it.
    The joint Gaussian is all there is, too, where latents and readings of fixed sensors are many and the law of the
    latents is not known: there is no density then, and an emulator only serves a base that costs more than the network.
    """
    seen, of_noise = y, None
    if isinstance(parts.noise, Noise):
        y = parts.noise.readings(seen)
        if parts.noise.law:
            rows, offset, _ = regress(z, seen[:, y.shape[1]:], None if slopes is None else slopes[:, y.shape[1]:])
            of_noise = NoiseLaw(parts.noise, rows, offset, parts.covariance)
    centred = y + parts.noise.mean(seen) if isinstance(parts.noise, Noise) else y
    if kind == "plain":
        return [plain_base(z, centred, parts.covariance)]
    x, mean, std = z, z.new_zeros(z.shape[1]), z.new_ones(z.shape[1])
    if curve is not None:
        given = curve.inverse(z)
        mean, std = given.mean(0), spread(given - given.mean(0))
        x = (given - mean) / std
        slopes = None if slopes is None else slopes * (curve.log_slope(given).exp() * std)[:, None]
    dear = z.shape[1] * y.shape[1] > _FOLLOWED and not (standard_prior or parts.family or y.shape != seen.shape)
    if dear and slopes is None:
        return [fit_base(z, centred, parts.covariance)]
    if parts.errors is None:
        base = own = fit_base(z, centred, parts.covariance, standard_prior)
        if curve is not None:
            emulator = fit_base(x, centred, parts.covariance).emulator
            own = replace(base, emulator=emulator.bent(curve, mean, std))
        learnt = None
        if standard_prior:
            cells = spread_over_cells(y) if parts.noise is None else None
            learnt = fit_noise(x, y, own.emulator(z), own.emulator.residual,
                               cells or (lambda c, generator: parts.measure(c, generator)[1]), options,
                               None if checkpoint is None else f"{checkpoint}.noise", progress)
        if learnt is not None and curve is not None:
            learnt = replace(learnt, network=learnt.network.bent(curve, mean, std))
        if learnt is None and curve is None:
            return [base]
        return [base, *(replace(own, learnt=learnt, updates=n) for n in (1, UPDATES))]
    moments = law(z, standard_prior)  # refuses latents that depend on each other, before anything is trained
    emulator, _ = fit_emulator(x, y, parts.errors, slopes=None if slopes is None else slopes[:, :y.shape[1]],
                               options=options, progress=progress,
                               checkpoint=None if checkpoint is None else f"{checkpoint}.emulator")
    emulator = emulator if curve is None else emulator.bent(curve, mean, std)
    if of_noise is None:
        emulator.residual = emulator.residual + parts.covariance
    base = GaussianBase(*moments, emulator, law=of_noise)
    base = check_base(base) if of_noise is None else base
    return [base] if emulator.affine else [base, replace(base, updates=UPDATES)]
