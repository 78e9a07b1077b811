"""Bases from moments: of a linear problem, of training pairs, or of standardisation alone."""

import warnings

import torch
from torch import Tensor

from fem_diffusion.checks import LARGEST, check_flag
from fem_diffusion.diffusion.base.emulator import affine_emulator, regress, roots
from fem_diffusion.diffusion.base.gaussian import GaussianBase
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.checks import check_pairs, check_tensor
from fem_diffusion.diffusion.tensors import distinct
from fem_diffusion.errors import InputError

__all__ = [
    "check_base", "fit_base", "law", "linear_base", "plain_base", "standard_error", "tell_copies", "tell_uncertain",
]

# Standard error of the base, in posterior standard deviations, from which pairs are too few.
_UNCERTAIN = 0.5
# A sensor that varies by so many roundings of its mean does not vary.
_ROUNDINGS = 4
# Share of the pairs that may be copies of others.
_COPIES = 1e-3
# Share of the variance of a latent that the others may leave at least.
_DEPENDENT = 1e-12


def law(z: Tensor, standard_prior: bool) -> tuple[Tensor, Tensor]:
    """Mean (r,) and upper triangular factor (r, r) of the covariance of latents (n, r); N(0, I) where that is known."""
    r = z.shape[1]
    if standard_prior:
        return z.new_zeros(r), torch.eye(r, dtype=z.dtype, device=z.device)
    covariance = torch.cov(z.T).reshape(r, r)
    unit = covariance.diagonal().sqrt()
    # Upper triangular, from the Cholesky factor of the covariance in reversed order.
    factor, info = torch.linalg.cholesky_ex((covariance / unit / unit[:, None]).flip(0, 1))
    if info.any() or (factor.diagonal()**2 < _DEPENDENT).any():
        raise InputError("The latents depend linearly on each other in all pairs: keep fewer modes, or simulate more.")
    return z.mean(0), unit[:, None] * factor.flip(0, 1)


def linear_base(operator: Tensor, noise_covariance: Tensor, offset: Tensor | None = None) -> GaussianBase:
    """Exact base of a linear-Gaussian problem y = offset + G z + e with z ~ N(0, I), e ~ N(0, R).

    InputError if shapes disagree, a number is not finite and real, or G Gᵀ + R is not positive.

    Parameters
    ----------
    operator, noise_covariance : Tensor
        G, shape (k, r), and R, shape (k, k).
    offset : Tensor, optional
        Observation of the prior mean, shape (k,); zero where left out.
    """
    k, r = check_tensor(operator, "The operator", ("k", "r"), "latents").shape
    offset = operator.new_zeros(k) if offset is None else check_tensor(offset, "The offset", (k,), "sensors")
    check_tensor(noise_covariance, "The noise covariance", (k, k), "sensors")
    emulator = affine_emulator(operator, offset, noise_covariance)
    return check_base(GaussianBase(*law(emulator.matrix.new_zeros(1, r), True), emulator))


def fit_base(z: Tensor, y: Tensor, noise_covariance: Tensor, standard_prior: bool = False) -> GaussianBase:
    """Base from training pairs: the joint Gaussian of latents and noise-free readings, plus the noise.

    The readings are regressed on the latents, y = ȳ + G (z - z̄) + residual, and the moments follow from G, the
    covariance of the residual and R. Where the forward map is linear this is exact for any number of pairs above r,
    although sample covariances of z and y are not. InputError if the shapes disagree, there are not more pairs than
    latents + 1, a latent does not vary, latents depend linearly on each other, or a reading does not vary and has no
    noise.

    Parameters
    ----------
    z, y : Tensor
        Latents, shape (n, r), and noise-free readings, shape (n, k).
    noise_covariance : Tensor
        R, shape (k, k).
    standard_prior : bool
        Take the prior moments of z as known, N(0, I), as for a Karhunen-Loeve basis; otherwise from the pairs.
    """
    n, r = check_pairs(z, y, 1)
    check_tensor(noise_covariance, "The noise covariance", (y.shape[1], y.shape[1]), "sensors")
    check_flag(standard_prior, "standard_prior")
    matrix, offset, residual = regress(z.double(), y.double())
    emulator = affine_emulator(matrix, offset, residual + noise_covariance.to(residual))
    return check_base(GaussianBase(*law(z.double(), standard_prior), emulator))


def plain_base(z: Tensor, y: Tensor, noise_covariance: Tensor) -> GaussianBase:
    """Base that standardises latents and measurements and knows nothing of how they depend on each other.

    Its emulator has no slope. InputError if the shapes disagree, there are fewer than two pairs, or a latent or
    measurement does not vary; parameters as for `fit_base`.
    """
    check_pairs(z, y)
    k, r = y.shape[1], z.shape[1]
    check_tensor(noise_covariance, "The noise covariance", (k, k), "sensors")
    z, y = z.double(), y.double()
    covariance = torch.cov(y.T).reshape(k, k) + noise_covariance.to(y)
    emulator = affine_emulator(y.new_zeros(k, r), y.mean(0), covariance)
    return check_base(GaussianBase(z.mean(0), torch.diag(z.std(0)), emulator))


def standard_error(base: GaussianBase, n: int, noise_covariance: Tensor, sloped: bool = False) -> float:
    """How uncertain an affine base from n pairs is: its posterior mean where most so, in posterior standard deviations.

    A regression errs at latents z by the covariance S of what it leaves, without the noise R (k, k) that is known,
    times zᵀ (Z Zᵀ)⁻¹ z + 1 / n: at posterior means (d + 1) / (n - r - 1), where d of the latents are told; with
    derivatives beside the pairs (`sloped`) less than 3 / n. The update takes that to the mean. Zero where the base is
    no affine one.
    """
    emulator, r = base.emulator, base.r
    if not base.affine:
        return 0.0
    noise, left = base.noise(Layout.readings(base.k, base.mean))[0], emulator.residual
    # A law of the noise is beside what the regression leaves, and not in it.
    noise, left = (noise, left - noise_covariance) if base.law is None else (noise + noise_covariance, left)
    whitener = roots(noise)[0]
    white = whitener @ emulator.matrix @ base.factor
    values, axes = torch.linalg.eigh(white.T @ white)
    gain = (axes / (1 + values.clamp(min=0)).sqrt()).T @ white.T @ whitener
    spread = float(torch.linalg.eigvalsh(gain @ left @ gain.T)[-1].clamp(min=0))
    told = float((values / (1 + values)).clamp(min=0).sum())
    return (spread * (3 / n if sloped else (told + 1) / max(n - r - 1, 1)))**0.5


def tell_uncertain(base: GaussianBase, n: int, noise_covariance: Tensor, sloped: bool) -> None:
    """Warn where `standard_error` says that n pairs are too few."""
    error = standard_error(base, n, noise_covariance, sloped)
    if error > _UNCERTAIN:
        warnings.warn(f"{n} pairs leave the Gaussian base of {base.r} latents uncertain: posterior means by some "
                      f"{error:.2g} posterior standard deviations. Simulate more pairs, or keep their derivatives, "
                      "simulate(..., derivatives=True), or fewer modes.", stacklevel=3)


def tell_copies(z: Tensor, y: Tensor) -> None:
    """Warn where pairs of latents (n, r) and readings (n, k) come again."""
    n = len(z)
    # A handful, as of a source that is sometimes none, takes nothing away.
    if len(distinct(z)[0]) < n and (copies := n - len(distinct(torch.cat([z, y], 1))[0])) > _COPIES * n:
        warnings.warn(f"{copies:,} of {n:,} pairs are copies of others, from which nothing new is learned: simulate "
                      "more, each with a seed of its own, or leave the copies out.", stacklevel=3)


def check_base(base: GaussianBase) -> GaussianBase:
    """The base, unless readings do not vary or their covariance is not positive."""
    emulator = base.emulator
    signal = emulator.matrix @ base.factor
    covariance = signal @ signal.T + emulator.residual
    spread = covariance.diagonal().clamp(min=0).sqrt()
    mean = emulator.offset + emulator.matrix @ base.mean
    dead = ~(spread > _ROUNDINGS * torch.finfo(spread.dtype).eps * mean.abs()) | (spread < 1 / LARGEST)
    if dead.any():
        raise InputError(f"The covariance of the measurements is not positive: sensors {torch.where(dead)[0].tolist()} "
                         "read the same in all pairs, without noise. Leave them out, or give them noise.")
    values = torch.linalg.eigvalsh(covariance / spread / spread[:, None])
    if values[0] < -values[-1] * torch.finfo(values.dtype).eps * len(values):
        raise InputError("The covariance of the measurements is not positive: check the readings and the noise.")
    return base
