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

from fem_diffusion.checks import check_count, check_kind
from fem_diffusion.diffusion._checks import check_generator, check_tensor
from fem_diffusion.diffusion._scheme import adaptive_flow
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.errors import InputError

__all__ = ["log_density"]

_EXACT = 256


def log_density(denoiser: Denoiser, z: Tensor, y: Tensor, *, probes: int | None = None,
                generator: torch.Generator | None = None, chunk: int = 256) -> Tensor:
    """Log density of latents given measurements.

    Parameters
    ----------
    denoiser : Denoiser
        Trained denoiser.
    z : Tensor
        Latents, shape (B, r).
    y : Tensor
        Measurements, shape (B, k).
    probes : int, optional
        Random vectors of Hutchinson's estimate of the divergence; 0 takes the exact divergence, at the cost of r
        derivatives. Where left out: exact for r <= 256, otherwise 8 probes.
    generator : torch.Generator, optional
        Source of the probes, on the device of the base; needed where probes are used.
    chunk : int
        Rows that are integrated together.

    Returns
    -------
    Tensor
        log p(z | y), shape (B,), dtype and device of the base; minus infinity outside the support of the latents.
        Inside, the law is not divided by the mass that stays inside hard bounds, where there are any.

    Raises
    ------
    InputError
        If shapes disagree, a value is not finite and real, probes are asked for without a generator, or another
        argument is of the wrong kind.
    SolveError
        If the flow cannot be integrated.
    """
    base = check_kind(denoiser, "denoiser", Denoiser, "a trained Denoiser").base
    check_tensor(z, "z", ("B", "r"), "latents")
    check_tensor(y, "y", ("B", "k"), "sensors")
    if z.shape[1] != base.r or y.shape != (len(z), base.k):
        raise InputError(f"Latents and measurements must be (B, {base.r}) and (B, {base.k}), not {tuple(z.shape)} and "
                         f"{tuple(y.shape)}.")
    z, y = z.to(base.latent_mean), base.check_measurements(y)
    chunk = check_count(chunk, "chunk")
    probes = check_count((0 if base.r <= _EXACT else 8) if probes is None else probes, "probes", least=0)
    if probes and generator is None:
        raise InputError(f"The divergence of {base.r} latents is estimated with random probes: pass a generator.")
    if generator is not None:
        check_generator(generator, z.device)
    scale = torch.linalg.slogdet(base.factor).logabsdet
    parts = zip(z.split(chunk), y.split(chunk))
    density = torch.cat([_integrate(denoiser, *part, probes, generator) for part in parts]) - scale
    if denoiser.support is not None:
        density[~denoiser.support.contains(z)] = -math.inf
    return density


def _integrate(denoiser, z, y, probes, generator) -> Tensor:
    """log p of w for rows of latents, shape (B,)."""
    features, w = denoiser.features(y), denoiser.base.whiten(z, y)
    # Rademacher vectors, the same along a trajectory, keep the right-hand side smooth.
    signs = torch.randint(0, 2, (probes, *z.shape), generator=generator, device=z.device) * 2.0 - 1 if probes else None

    def right(angle: float, state: Tensor) -> Tensor:
        speed, divergence = _speed_and_divergence(denoiser, state[:, :-1], angle, features, signs)
        return torch.cat([-speed, divergence[:, None]], dim=1)
    end = adaptive_flow(right, torch.cat([w, w.new_zeros(len(w), 1)], dim=1), 0.0, math.pi / 2)
    return Normal(0.0, 1.0).log_prob(end[:, :-1]).sum(1) - end[:, -1]


def _speed_and_divergence(denoiser, v, angle, features, signs) -> tuple[Tensor, Tensor]:
    """N (B, r) and its divergence (B,)."""
    if denoiser.network is None:
        return torch.zeros_like(v), v.new_zeros(len(v))
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        speed = denoiser.residual(v, v.new_full((len(v), 1), angle), features)
        if signs is None:
            rows = (torch.autograd.grad(speed[:, i].sum(), v, retain_graph=True)[0][:, i] for i in range(v.shape[1]))
            divergence = sum(rows)
        else:
            products = (torch.autograd.grad(speed, v, sign.to(v), retain_graph=True)[0] for sign in signs)
            divergence = sum((sign.to(v) * product).sum(1) for sign, product in zip(signs, products)) / len(signs)
    return speed.detach(), divergence
