"""Has the posterior collapsed onto the training pairs? Two numbers that say so, and a warning.

A network that recognises a training pair by its measurement answers with the parameter of that pair: its posterior is
narrower at training measurements than at held-out ones, and its samples lie on training parameters.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from fem_diffusion.checks import check_kind, check_seed
from fem_diffusion.diffusion.checks import check_tensor
from fem_diffusion.diffusion.denoiser import Conditioned
from fem_diffusion.diffusion.sampling.sample import Sampler, sample_latents
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
    spread_ratio, neighbour_ratio : float
        Posterior standard deviation at training measurements over that at held-out ones, geometric means; distance of
        samples at held-out measurements from the nearest training latents, over that of the held-out latents, medians.
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


def measure_collapse(training: tuple[Conditioned, Tensor], held_out: tuple[Conditioned, Tensor], trained: Tensor,
                     seed: int = 0) -> Collapse:
    """Compare the model at measurements that it was trained on with others.

    InputError if shapes disagree, a value is not finite and real, there are fewer than two pairs, held-out latents are
    training latents, or the seed is none.

    Parameters
    ----------
    training, held_out : tuple of Conditioned and Tensor
        Denoiser at measurements, and the latents (n, r) behind them; at least two of each.
    trained : Tensor
        All latents of the training, shape (m, r).
    """
    for name, (conditioned, z) in (("training", training), ("held_out", held_out)):
        check_kind(conditioned, f"{name}[0]", Conditioned, "what Denoiser.at returns")
        check_tensor(z, f"{name}[1]", (len(conditioned), conditioned.r), "latents")
        if len(z) < 2:
            raise InputError(f"{name} holds {len(z)} pairs: give at least two.")
    seed = check_seed(seed)

    def log_spread(conditioned: Conditioned) -> float:
        few = conditioned.select(torch.arange(min(len(conditioned), _PAIRS)))
        w = few.located.whiten(sample_latents(few, _SAMPLES, sampler, seed=seed, progress=False).transpose(0, 1))
        return float(w.var(0).sum(1).log().mean()) / 2
    sampler, scale = Sampler(steps=_STEPS, corrections=0), trained.std(0)

    def distance(z: Tensor) -> float:
        # In parts: all distances at once may be gigabytes.
        nearest = [torch.cdist(z / scale, part / scale).amin(1) for part in trained.split(_CHUNK)]
        return float(torch.stack(nearest).amin(0).median())
    conditioned, z = held_out[0].select(torch.arange(min(len(held_out[1]), 4 * _PAIRS))), held_out[1][:4 * _PAIRS]
    apart = distance(z)
    if not apart > 0:
        raise InputError("Held-out latents are training latents: pass pairs that training has not seen.")
    drawn = sample_latents(conditioned, 1, sampler, seed=seed, progress=False)[:, 0]
    spread = math.exp(log_spread(training[0]) - log_spread(held_out[0]))
    return Collapse(spread, distance(drawn) / apart)
