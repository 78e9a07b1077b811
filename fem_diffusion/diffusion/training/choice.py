r"""Which of two densities knows more of held-out latents: that of a denoiser, or the emulator's.

The emulator's posterior is known up to a constant, which depends on the measurement, so the two are compared as
classifiers. Latents :math:`z_0` are hidden among K samples of the denoiser's density q, and the emulator's density p
has to find them: its odds are the weights :math:`w_i = p(z_i | y) / q(z_i | y)`, and its score

.. math:: \log \frac{(K + 1)\, w_0}{w_0 + \dots + w_K}

has a mean that is not above zero where q is the posterior, and that tends to the difference of the mean log densities
as K grows. So what p gains is what a denoiser gains whose samples are weighted by it.
"""

import math
import warnings

import torch
from scipy.stats import chisquare
from torch import Tensor

from fem_diffusion.diffusion.base.density import EmulatorDensity
from fem_diffusion.diffusion.base.emulator import spread
from fem_diffusion.diffusion.denoiser import Conditioned
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.sampling.likelihood import log_density
from fem_diffusion.diffusion.sampling.sample import Sampler, sample_latents
from fem_diffusion.errors import SolveError

__all__ = ["advantage", "even"]

_SAMPLES = 15


def advantage(conditioned: Conditioned, density: EmulatorDensity, z: Tensor, seed: int,
              scale: MonotoneMap | None = None) -> Tensor:
    """What the emulator's densities know more of latents (B, r) than a denoiser at the same measurements, (B,).

    The densities may be of latents on another scale. NaN, with a warning, where the denoiser's has no value: a trained
    network is not lost for that.
    """
    drawn = sample_latents(conditioned, _SAMPLES, Sampler(corrections=0), seed=seed, progress=False)
    found = torch.cat([z[:, None].to(drawn), drawn], 1)
    inner = found if scale is None else scale.forward(found.flatten(0, 1)).view_as(found)
    with torch.no_grad():
        energy = density.energy(density.located.whiten(inner.transpose(0, 1))).T
    try:
        weights = -energy - log_density(conditioned, found)
    except SolveError as error:
        warnings.warn(f"The network is kept without being compared with the emulator's density. {error}", stacklevel=4)
        return torch.full((len(z),), torch.nan)
    if scale is not None:
        weights = weights + scale.log_slope(found.flatten(0, 1)).view_as(found).sum(2)
        # Beyond the bounds of the scale there is no density.
        weights = torch.where(torch.isfinite(weights), weights, -torch.inf)
    return math.log(1 + _SAMPLES) + weights[:, 0] - torch.logsumexp(weights, 1)


def even(found: Tensor, seen: Tensor, r: int) -> Tensor:
    """p-values of a truth and samples of each of B posteriors (1 + n, B, r or more) being draws of one law.

    Ranks are compared, and first and second moments of r coordinates, of each and of all: their means, and how they
    go with what tells measurements apart, `seen` (B, m), of which a law that ignores its measurement knows nothing.
    """
    w = found[..., :r]
    squares = torch.cat([w.square(), w.square().sum(2, keepdim=True)], 2)
    found, moments = torch.cat([found, squares[..., -1:]], 2), torch.cat([w, w.sum(2, keepdim=True), squares], 2)
    ranks = (found[1:] < found[0]).sum(0)
    values = chisquare(torch.stack([(ranks == i).sum(0) for i in range(len(found))]).cpu().numpy()).pvalue
    seen = ((seen - seen.mean(0)) / spread(seen - seen.mean(0))).clamp(-2, 2)
    seen = torch.cat([torch.ones_like(seen[:, :1]), seen, seen.square() - seen.square().mean(0)], 1)
    apart = moments[0] - moments[1:].mean(0)
    mean, square = apart.T @ seen / len(seen), apart.square().T @ seen.square() / len(seen)
    z = mean / ((square - mean**2).clamp(min=torch.finfo(w.dtype).tiny) / len(seen)).sqrt()
    return torch.cat([torch.as_tensor(values), torch.erfc(z.abs().flatten() / math.sqrt(2)).cpu()])
