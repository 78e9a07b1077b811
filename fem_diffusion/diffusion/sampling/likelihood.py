r"""Density of samples through the probability-flow ODE.

Along :math:`dv/d\theta = -N` the density of v obeys
:math:`\tfrac{d}{d\theta} \log p(v(\theta), \theta) = \nabla\cdot N` (the instantaneous change of variables, Song et
al. 2021, eq. 39). At :math:`\theta = \pi/2` the law of v is standard normal, at :math:`\theta = 0` v is w, and
:math:`z = \mu_y + P^{1/2} w`. So

.. math:: \log p(z | y) = \log N(v(\pi/2); 0, I) - \int_0^{\pi/2} \nabla\cdot N\, d\theta - \log |P^{1/2}| ,

and where latents are mapped, the logarithm of the map's slope is added.

Where no network takes part and the emulator has a density, samples are of that, and its integral is estimated.

The trajectory needs many values of N, the integral few of its divergence, which cost r times as much: so the one is
integrated first, and the other along it by Gauss's rule, with as few nodes as some of the rows need.
"""

import math
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from fem_diffusion.checks import check_count, check_kind, check_seed
from fem_diffusion.diffusion.checks import check_tensor
from fem_diffusion.diffusion.denoiser import Conditioned
from fem_diffusion.diffusion.sampling.scheme import adaptive_path
from fem_diffusion.errors import SolveError

__all__ = ["log_density"]

_EXACT = 256
# Measurements whose integrals are estimated together.
_TOGETHER = 16
# Numbers of nodes that are tried on some rows, until the next one changes the integral by no more than this.
_NODES, _PILOT, _TOLERANCE = (6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256), 32, 1e-3


def log_density(conditioned: Conditioned, z: Tensor, *, probes: int | None = None, seed: int = 0,
                chunk: int = 1024) -> Tensor:
    """Log density (B, n) of latents given measurements, by the diffusion model without corrections.

    Without a network it is that of the emulator, where there is one: of the law that corrections lead to. Its integral
    is estimated by 1,000 points, with an error that all latents of a measurement share, 0.05 for two of them; where
    posteriors are curved in all, densities are too large, by some 0.2 for ten latents and 0.7 for twenty.

    It is minus infinity outside the support of the latents; inside, the law is not divided by the mass that stays
    inside hard bounds, where there are any. InputError if shapes disagree, a value is not finite and real, or another
    argument is of the wrong kind; SolveError if the flow cannot be integrated, or tempering does not reach the law of
    the emulator.

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
        Of the probes, and of the points; rows that are integrated together by the flow.
    """
    check_kind(conditioned, "conditioned", Conditioned, "what Denoiser.at returns")
    located, r = conditioned.located, conditioned.r
    check_tensor(z, "z", (len(conditioned), "n", r), "latents")
    z, chunk = z.to(located.mean), check_count(chunk, "chunk")
    probes = check_count((0 if r <= _EXACT else 8) if probes is None else probes, "probes", least=0)
    generator = torch.Generator(z.device).manual_seed(check_seed(seed))
    inside = None if conditioned.latents is None else conditioned.latents.contains(z)
    # Where no map leads, a stand-in.
    at = z if inside is None else torch.where(inside[..., None], z, conditioned.back(torch.zeros_like(z)))
    w = located.whiten(conditioned.mapped(at).transpose(0, 1)).transpose(0, 1)
    if conditioned.network is None and conditioned.density is not None:
        density = torch.cat([_emulated(conditioned.select(index), w[index], seed)
                             for index in torch.arange(len(z), device=z.device).split(_TOGETHER)])
    else:
        rows = torch.arange(len(z), device=z.device).repeat_interleave(z.shape[1])
        nodes, parts = 0, []
        for index, part in zip(rows.split(chunk), w.flatten(0, 1).split(chunk)):
            flow = _Flow(conditioned.select(index), part, probes, generator)
            nodes = nodes or _nodes(flow)
            parts.append(flow.log_density(nodes))
        density = torch.cat([z.new_empty(0), *parts]).view(z.shape[:2])
    density = density - located.log_determinant[:, None]
    if conditioned.latents is not None and inside is not None:
        density = torch.where(inside, density + conditioned.latents.log_slope(at).sum(-1), -math.inf)
    if conditioned.support is not None:
        density[~conditioned.support.contains(z)] = -math.inf
    return density


@torch.no_grad()
def _emulated(conditioned: Conditioned, w: Tensor, seed: int) -> Tensor:
    """Log density (B, n) of the emulator in base coordinates (B, n, r)."""
    density = conditioned.density
    assert density is not None
    generator = torch.Generator(w.device).manual_seed(seed)
    return -density.energy(w.transpose(0, 1)).T - density.log_integral(generator)[:, None]


class _Flow:
    """Trajectories in base coordinates of a row (B, r) for each measurement, from the samples to noise."""

    def __init__(self, conditioned: Conditioned, w: Tensor, probes: int, generator: torch.Generator) -> None:
        self.conditioned, self.w = conditioned, w
        # Rademacher vectors, the same along a trajectory, keep the divergence smooth.
        self.signs = torch.randint(0, 2, (probes, *w.shape), generator=generator, device=w.device) * 2.0 - 1

    def log_density(self, nodes: int) -> Tensor:
        """Log density in base coordinates, shape (B,), with the divergence at so many nodes."""
        return Normal(0.0, 1.0).log_prob(self.at(math.pi / 2)).sum(1) - self.divergence(nodes)

    @cached_property
    def at(self) -> Callable[[float], Tensor]:
        """States (B, r) at an angle."""
        if self.conditioned.network is None:
            return lambda angle: self.w
        return adaptive_path(lambda angle, v: -self.conditioned.residual(v[None], angle)[0], self.w, 0.0, math.pi / 2)

    def divergence(self, nodes: int, most: int | None = None) -> Tensor:
        """Integral of the divergence of N by Gauss's rule, of all or of `most` rows, shape (B,)."""
        places, weights = np.polynomial.legendre.leggauss(nodes)
        parts = (weight * self._divergence(math.pi / 4 * (1 + place), most) for place, weight in zip(places, weights))
        return math.pi / 4 * sum(parts, self.w.new_zeros(()))

    def _divergence(self, angle: float, most: int | None) -> Tensor:
        v, conditioned, signs = self.at(angle)[:most], self.conditioned, self.signs[:, :most]
        if conditioned.network is None:
            return v.new_zeros(len(v))
        if len(conditioned) > len(v):
            conditioned = conditioned.select(torch.arange(len(v), device=v.device))
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            speed = conditioned.residual(v[None], angle)[0]
            if not len(signs):
                return torch.stack([torch.autograd.grad(speed[:, i].sum(), v, retain_graph=True)[0][:, i]
                                    for i in range(v.shape[1])]).sum(0)
            products = (torch.autograd.grad(speed, v, sign.to(v), retain_graph=True)[0] for sign in signs)
            return torch.stack([(sign.to(v) * x).sum(1) for sign, x in zip(signs, products)]).mean(0)


def _nodes(flow: _Flow) -> int:
    """As few nodes of Gauss's rule as the first rows need; SolveError if the most do not suffice."""
    if flow.conditioned.network is None:
        return 1
    former = flow.divergence(_NODES[0], _PILOT)
    for fewer, more in pairwise(_NODES):
        total = flow.divergence(more, _PILOT)
        if float((total - former).square().mean().sqrt()) <= _TOLERANCE:
            return fewer
        former = total
    raise SolveError("The divergence of the flow could not be integrated: check the training curve of the network.")
