"""Bases from moments: of a linear problem, of training pairs, or of standardisation alone."""

import torch
from torch import Tensor

from fem_diffusion.checks import LARGEST, check_flag
from fem_diffusion.diffusion.base.emulator import affine_emulator
from fem_diffusion.diffusion.base.gaussian import GaussianBase
from fem_diffusion.diffusion.base.regression import check_pairs, regress
from fem_diffusion.diffusion.checks import check_tensor
from fem_diffusion.errors import InputError

__all__ = ["check_base", "fit_base", "law", "linear_base", "plain_base"]

# A sensor that varies by so many roundings of its mean does not vary.
_ROUNDINGS = 4
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

    Parameters
    ----------
    operator : Tensor
        G, shape (k, r).
    noise_covariance : Tensor
        R, shape (k, k).
    offset : Tensor, optional
        Observation of the prior mean, shape (k,); zero where left out.

    Returns
    -------
    GaussianBase
        In double precision; its law is the posterior.

    Raises
    ------
    InputError
        If shapes disagree, a number is not finite and real, or G Gᵀ + R is not positive.
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
    although sample covariances of z and y are not.

    Parameters
    ----------
    z : Tensor
        Latents, shape (n, r).
    y : Tensor
        Noise-free readings, shape (n, k).
    noise_covariance : Tensor
        R, shape (k, k).
    standard_prior : bool
        Take the prior moments of z as known, N(0, I), as for a Karhunen-Loeve basis; otherwise from the pairs.

    Returns
    -------
    GaussianBase
        In double precision on the device of `z`.

    Raises
    ------
    InputError
        If the shapes disagree, there are not more pairs than latents + 1, a latent does not vary, latents depend
        linearly on each other, or a reading does not vary and has no noise.
    """
    n, r = check_pairs(z, y, 1)
    check_tensor(noise_covariance, "The noise covariance", (y.shape[1], y.shape[1]), "sensors")
    check_flag(standard_prior, "standard_prior")
    matrix, offset, residual = regress(z.double(), y.double())
    emulator = affine_emulator(matrix, offset, residual + noise_covariance.to(residual))
    return check_base(GaussianBase(*law(z.double(), standard_prior), emulator))


def plain_base(z: Tensor, y: Tensor, noise_covariance: Tensor) -> GaussianBase:
    """Base that standardises latents and measurements and knows nothing of how they depend on each other.

    Parameters
    ----------
    z : Tensor
        Latents, shape (n, r).
    y : Tensor
        Noise-free readings, shape (n, k).
    noise_covariance : Tensor
        R, shape (k, k).

    Returns
    -------
    GaussianBase
        With an emulator of zero slope and a diagonal covariance.

    Raises
    ------
    InputError
        If the shapes disagree, there are fewer than two pairs, or a latent or measurement does not vary.
    """
    check_pairs(z, y)
    k, r = y.shape[1], z.shape[1]
    check_tensor(noise_covariance, "The noise covariance", (k, k), "sensors")
    z, y = z.double(), y.double()
    covariance = torch.cov(y.T).reshape(k, k) + noise_covariance.to(y)
    emulator = affine_emulator(y.new_zeros(k, r), y.mean(0), covariance)
    return check_base(GaussianBase(z.mean(0), torch.diag(z.std(0)), emulator))


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
