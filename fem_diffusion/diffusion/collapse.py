"""Has the posterior collapsed onto the training pairs? Two numbers that say so, and a warning.

A network that recognises a training pair by its measurement answers with the parameter of that pair: its posterior is
narrower at training measurements than at held-out ones, and its samples lie on training parameters.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fem_diffusion.checks import check_kind, check_seed
from fem_diffusion.diffusion._checks import check_tensor
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.sampling.sample import sample_latents
from fem_diffusion.errors import InputError

__all__ = ["Collapse", "CollapseWarning", "measure_collapse"]

_PAIRS, _SAMPLES, _STEPS, _CHUNK = 256, 16, 8, 8192
# Below these the posterior is called collapsed; without collapse both ratios scatter around 1 by a few percent.
_SPREAD, _NEIGHBOUR = 0.75, 0.75


class CollapseWarning(UserWarning):
    """The posterior is narrower at training measurements than elsewhere."""


@dataclass(frozen=True)
class Collapse:
    """What `measure_collapse` finds; 1 and 1 say that there is no collapse, 0 and 0 that it is complete.

    Parameters
    ----------
    spread_ratio : float
        Posterior standard deviation at training measurements over that at held-out ones, geometric means.
    neighbour_ratio : float
        Distance of samples at held-out measurements from the nearest training latents, over the distance of the
        held-out latents themselves, medians.
    """

    spread_ratio: float
    neighbour_ratio: float

    def warn(self) -> None:
        """Warn where a ratio says that the posterior has collapsed."""
        if self.spread_ratio < _SPREAD or self.neighbour_ratio < _NEIGHBOUR:
            warnings.warn("The posterior collapses onto the training pairs: its spread at training measurements is "
                          f"{self.spread_ratio:.2f} of that at held-out ones, samples are {self.neighbour_ratio:.2f} "
                          "as far from training latents as new ones are. Simulate more pairs, pass noise-free "
                          "observations with a noise model, or train for fewer steps.", CollapseWarning, stacklevel=3)


def measure_collapse(denoiser: Denoiser, training: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor],
                     seed: int = 0) -> Collapse:
    """Compare the model at measurements that it was trained on with others.

    Parameters
    ----------
    denoiser : Denoiser
        Trained denoiser.
    training, held_out : tuple of Tensor
        Latents (n, r) and measurements (n, k), noise included, dtype and device of the base; at least two pairs each.
    seed : int
        Of all draws.

    Returns
    -------
    Collapse

    Raises
    ------
    InputError
        If shapes disagree, a value is not finite and real, there are fewer than two pairs, held-out latents
        are training latents, or the seed is none.
    """
    base = check_kind(denoiser, "denoiser", Denoiser, "a trained Denoiser").base
    for name, pairs in (("training", training), ("held_out", held_out)):
        if not isinstance(pairs, (tuple, list)) or len(pairs) != 2:
            raise InputError(f"{name} is of type {type(pairs).__name__}: pass a pair of latents and measurements.")
        n = len(check_tensor(pairs[0], f"{name}[0]", ("n", base.r), "latents"))
        check_tensor(pairs[1], f"{name}[1]", (n, base.k), "sensors")
        if n < 2:
            raise InputError(f"{name} holds {n} pairs: give at least two.")
    seed = check_seed(seed)
    generator = torch.Generator(training[0].device).manual_seed(seed)

    def samples(y: Tensor, count: int) -> Tensor:
        rows = y.repeat_interleave(count, dim=0)
        z = sample_latents(denoiser, rows, generator=generator, steps=_STEPS)
        return denoiser.base.whiten(z, rows).view(len(y), count, -1)

    def log_spread(y: Tensor) -> float:
        return float(samples(y[:_PAIRS], _SAMPLES).var(1).sum(1).log().mean()) / 2
    scale = training[0].std(0)

    def distance(z: Tensor) -> float:
        # In parts: all distances at once may be gigabytes.
        nearest = [torch.cdist(z / scale, part / scale).amin(1) for part in training[0].split(_CHUNK)]
        return float(torch.stack(nearest).amin(0).median())
    z, y = (x[:4 * _PAIRS] for x in held_out)
    apart = distance(z)
    if not apart > 0:
        raise InputError("Held-out latents are training latents: pass pairs that training has not seen.")
    drawn = denoiser.base.colour(samples(y, 1)[:, 0], y)
    spread = torch.tensor(log_spread(training[1]) - log_spread(held_out[1])).exp()
    return Collapse(float(spread), distance(drawn) / apart)
