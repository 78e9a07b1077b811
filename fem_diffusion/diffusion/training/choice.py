r"""Which of two densities knows more of held-out latents: that of a denoiser, or the emulator's.

The emulator's posterior is known up to a constant, which depends on the measurement, so the two are compared as
classifiers. Latents :math:`z_0` are hidden among K samples of the denoiser's density q, and the emulator's density p
has to find them: its odds are the weights :math:`w_i = p(z_i | y) / q(z_i | y)`, and its score

.. math:: \log \frac{(K + 1)\, w_0}{w_0 + \dots + w_K}

has a mean that is not above zero where q is the posterior, and that tends to the difference of the mean log densities
as K grows. So what p gains is what a denoiser gains whose samples are weighted by it.
"""

import math

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.density import EmulatorDensity
from fem_diffusion.diffusion.denoiser import Conditioned
from fem_diffusion.diffusion.sampling.likelihood import log_density
from fem_diffusion.diffusion.sampling.sample import Sampler, sample_latents

__all__ = ["advantage"]

_SAMPLES = 15


def advantage(conditioned: Conditioned, density: EmulatorDensity, z: Tensor, seed: int) -> Tensor:
    """What the emulator's densities know more of latents (B, r) than a denoiser at the same measurements, (B,)."""
    drawn = sample_latents(conditioned, _SAMPLES, Sampler(corrections=0), seed=seed, progress=False)
    found = torch.cat([z[:, None].to(drawn), drawn], 1)
    with torch.no_grad():
        energy = density.energy(density.located.whiten(found.transpose(0, 1))).T
    weights = -energy - log_density(conditioned, found)
    return math.log(1 + _SAMPLES) + weights[:, 0] - torch.logsumexp(weights, 1)
