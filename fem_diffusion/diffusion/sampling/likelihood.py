r"""Density of samples through the probability-flow ODE.

Along :math:`dv/d\theta = -N` the density of v obeys
:math:`\tfrac{d}{d\theta} \log p(v(\theta), \theta) = \nabla\cdot N` (the instantaneous change of variables, Song et
al. 2021, eq. 39). At :math:`\theta = \pi/2` the law of v is standard normal, at :math:`\theta = 0` v is w, and
:math:`z = \mu_y + P^{1/2} w`. So

.. math:: \log p(z | y) = \log N(v(\pi/2); 0, I) - \int_0^{\pi/2} \nabla\cdot N\, d\theta - \log |P^{1/2}| .
"""

import math

import torch
from torch import Tensor
from torch.distributions import Normal

from fem_diffusion.checks import check_count, check_kind, check_seed
from fem_diffusion.diffusion.checks import check_tensor
from fem_diffusion.diffusion.denoiser import Conditioned
from fem_diffusion.diffusion.sampling.scheme import adaptive_flow

__all__ = ["log_density"]

_EXACT = 256


def log_density(conditioned: Conditioned, z: Tensor, *, probes: int | None = None, seed: int = 0,
                chunk: int = 256) -> Tensor:
    """Log density (B, n) of latents given measurements, by the diffusion model without corrections.

    It is minus infinity outside the support of the latents; inside, the law is not divided by the mass that stays
    inside hard bounds, where there are any. InputError if shapes disagree, a value is not finite and real, or another
    argument is of the wrong kind; SolveError if the flow cannot be integrated.

    Parameters
    ----------
    conditioned : Conditioned
        From `Denoiser.at`, with B measurements.
    z : Tensor
        Latents, shape (B, n, r): n of each measurement.
    probes : int, optional
        Random vectors of Hutchinson's estimate of the divergence; 0 takes the exact divergence, at the cost of r
        derivatives. Where left out: exact for r <= 256, otherwise 8 probes.
    seed, chunk : int
        Of the probes; rows that are integrated together.
    """
    check_kind(conditioned, "conditioned", Conditioned, "what Denoiser.at returns")
    located, r = conditioned.located, conditioned.r
    check_tensor(z, "z", (len(conditioned), "n", r), "latents")
    z, chunk = z.to(located.mean), check_count(chunk, "chunk")
    probes = check_count((0 if r <= _EXACT else 8) if probes is None else probes, "probes", least=0)
    generator = torch.Generator(z.device).manual_seed(check_seed(seed))
    w = located.whiten(z.transpose(0, 1)).transpose(0, 1)
    rows = torch.arange(len(z), device=z.device).repeat_interleave(z.shape[1]).split(chunk)
    parts = zip(rows, w.flatten(0, 1).split(chunk))
    density = torch.cat([_integrate(conditioned.select(index), part, probes, generator) for index, part in parts])
    density = density.view(z.shape[:2]) - located.log_determinant[:, None]
    if conditioned.support is not None:
        density[~conditioned.support.contains(z)] = -math.inf
    return density


def _integrate(conditioned: Conditioned, w: Tensor, probes: int, generator: torch.Generator) -> Tensor:
    """Log density in base coordinates of a row (B, r) for each measurement, shape (B,)."""
    # Rademacher vectors, the same along a trajectory, keep the right-hand side smooth.
    signs = torch.randint(0, 2, (probes, *w.shape), generator=generator, device=w.device) * 2.0 - 1 if probes else None

    def right(angle: float, state: Tensor) -> Tensor:
        speed, divergence = _speed_and_divergence(conditioned, state[:, :-1], angle, signs)
        return torch.cat([-speed, divergence[:, None]], dim=1)
    end = adaptive_flow(right, torch.cat([w, w.new_zeros(len(w), 1)], dim=1), 0.0, math.pi / 2)
    return Normal(0.0, 1.0).log_prob(end[:, :-1]).sum(1) - end[:, -1]


def _speed_and_divergence(conditioned: Conditioned, v: Tensor, angle: float,
                          signs: Tensor | None) -> tuple[Tensor, Tensor]:
    """N (B, r) and its divergence (B,)."""
    if conditioned.network is None:
        return torch.zeros_like(v), v.new_zeros(len(v))
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        speed = conditioned.residual(v[None], angle)[0]
        if signs is None:
            divergence = torch.stack([torch.autograd.grad(speed[:, i].sum(), v, retain_graph=True)[0][:, i]
                                      for i in range(v.shape[1])]).sum(0)
        else:
            products = (torch.autograd.grad(speed, v, sign.to(v), retain_graph=True)[0] for sign in signs)
            divergence = torch.stack([(sign.to(v) * x).sum(1) for sign, x in zip(signs, products)]).mean(0)
    return speed.detach(), divergence
