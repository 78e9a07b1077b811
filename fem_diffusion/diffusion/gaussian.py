r"""The Gaussian base: for every measurement a Gaussian :math:`N(\mu_y, P)` that carries the linear part of the answer.

The base is the conditional law of the joint Gaussian of latents and measurements,

.. math:: \mu_y = \bar z + K (y - \bar y), \qquad K = C_{zy} S^{-1}, \qquad P = C_{zz} - K S K^T,

with :math:`S = C_{yy}` (the Kalman update). The diffusion runs in base coordinates
:math:`w = P^{-1/2}(z - \mu_y)`, where the prior noise is aligned with the posterior. Where the base is the truth,
:math:`w` is standard normal for every measurement and the network has nothing to learn.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fem_diffusion.checks import LARGEST, check_flag
from fem_diffusion.diffusion._checks import check_near, check_tensor
from fem_diffusion.errors import InputError

__all__ = ["GaussianBase", "fit_base", "linear_base", "plain_base"]

# Directions that the data determine to better than this fraction of the prior's standard deviation are not resolved.
_SMALLEST_STD = 1e-6
# A sensor that varies by so many roundings of its mean does not vary.
_ROUNDINGS = 4


@dataclass(frozen=True)
class GaussianBase:
    """Gaussian approximation of p(z | y), affine in the measurement.

    Parameters
    ----------
    latent_mean : Tensor
        Mean of the latents, shape (r,).
    measurement_mean : Tensor
        Mean of the measurements, shape (k,).
    gain : Tensor
        Kalman gain K, shape (r, k).
    factor : Tensor
        L with L Lᵀ = P, shape (r, r).
    factor_inverse : Tensor
        Inverse of L, shape (r, r).
    whitener : Tensor
        W with W S Wᵀ = I, shape (k, k).
    """

    latent_mean: Tensor
    measurement_mean: Tensor
    gain: Tensor
    factor: Tensor
    factor_inverse: Tensor
    whitener: Tensor

    @property
    def r(self) -> int:
        """Number of latents."""
        return self.gain.shape[0]

    @property
    def k(self) -> int:
        """Number of measurements."""
        return self.gain.shape[1]

    @property
    def covariance(self) -> Tensor:
        """Covariance P of the base, shape (r, r)."""
        return self.factor @ self.factor.T

    def mean(self, y: Tensor) -> Tensor:
        """Mean of z given measurements `y` (B, k); shape (B, r)."""
        return self.latent_mean + (y - self.measurement_mean) @ self.gain.T

    def whiten(self, z: Tensor, y: Tensor) -> Tensor:
        """Base coordinates w (B, r) of latents `z` (B, r) for measurements `y` (B, k)."""
        return (z - self.mean(y)) @ self.factor_inverse.T

    def colour(self, w: Tensor, y: Tensor) -> Tensor:
        """Latents z (B, r) of base coordinates `w` (B, r) for measurements `y` (B, k)."""
        return self.mean(y) + w @ self.factor.T

    def features(self, y: Tensor) -> Tensor:
        """Measurements `y` (B, k) centred and whitened, shape (B, k): what the network sees of them."""
        return (y - self.measurement_mean) @ self.whitener.T

    def check_measurements(self, y: Tensor) -> Tensor:
        """Measurements (B, k) as a tensor like the base's; InputError where they are no numbers that it can take."""
        shape = ("B", self.k)
        y = check_tensor(y, "The measurement", shape, "sensors").to(self.latent_mean)
        check_near(self.features(y))
        return y

    def to(self, *args, **kwargs) -> "GaussianBase":
        """Copy with every tensor moved by `torch.Tensor.to`."""
        return GaussianBase(*(getattr(self, f.name).to(*args, **kwargs) for f in fields(self)))


def _from_moments(latent_mean, latent_covariance, measurement_mean, cross, measurement_covariance) -> GaussianBase:
    """Condition the joint Gaussian with these moments; `cross` is C_zy, shape (r, k)."""
    # Each sensor in units of its own spread: pascals beside mole fractions lose nothing.
    spread = torch.diagonal(measurement_covariance).clamp(min=0).sqrt()
    rounding = _ROUNDINGS * torch.finfo(spread.dtype).eps * measurement_mean.abs()
    if not (spread > rounding).all():
        dead = torch.where(~(spread > rounding))[0].tolist()
        raise InputError(f"The covariance of the measurements is not positive: sensors {dead} read the same in all "
                         "pairs, without noise. Leave them out, or give them noise.")
    values, vectors = torch.linalg.eigh(measurement_covariance / spread / spread[:, None])
    floor = values[-1] * torch.finfo(values.dtype).eps * len(values)
    if not values[-1] > 0 or values[0] < -floor:
        raise InputError("The covariance of the measurements is not positive; check the observations and the noise.")
    # Symmetric roots: eigenvectors of close eigenvalues turn with rounding, their products do not.
    whitener = vectors / values.clamp(min=floor).sqrt() @ vectors.T / spread
    half_gain = cross @ whitener.T
    gain = half_gain @ whitener
    posterior = latent_covariance - half_gain @ half_gain.T
    # Each latent in units of its own prior spread, too.
    unit = torch.diagonal(latent_covariance).sqrt()
    variances, axes = torch.linalg.eigh((posterior + posterior.T) / 2 / unit / unit[:, None])
    scale = variances.clamp(min=_SMALLEST_STD**2).sqrt()
    return GaussianBase(latent_mean, measurement_mean, gain, unit[:, None] * (axes * scale @ axes.T),
                        axes / scale @ axes.T / unit, whitener)


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
        In the dtype of `operator`; its law is the posterior.

    Raises
    ------
    InputError
        If shapes disagree, a number is not finite and real, or G Gᵀ + R is not positive.
    """
    k, r = check_tensor(operator, "The operator", ("k", "r"), "latents").shape
    offset = operator.new_zeros(k) if offset is None else check_tensor(offset, "The offset", (k,), "sensors")
    check_tensor(noise_covariance, "The noise covariance", (k, k), "sensors")
    return _from_moments(operator.new_zeros(r), torch.eye(r, dtype=operator.dtype, device=operator.device), offset,
                         operator.T, operator @ operator.T + noise_covariance)


def fit_base(z: Tensor, y: Tensor, noise_covariance: Tensor, standard_prior: bool = False) -> GaussianBase:
    """Base from training pairs: the joint Gaussian of latents and noise-free observations, plus the noise.

    The observation is regressed on the latents, y = ȳ + G (z - z̄) + residual, and the moments follow from
    G, the covariance of the residual and R. Where the forward map is linear this is exact for any number of pairs
    above r, although sample covariances of z and y are not.

    Parameters
    ----------
    z : Tensor
        Latents, shape (n, r).
    y : Tensor
        Noise-free observations, shape (n, k).
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
        If the shapes disagree, there are not more pairs than latents + 1, or a latent does not vary.
    """
    n, r = check_pairs(z, y, 1)
    check_tensor(noise_covariance, "The noise covariance", (y.shape[1], y.shape[1]), "sensors")
    check_flag(standard_prior, "standard_prior")
    z, y = z.double(), y.double()
    z_sample_mean, y_sample_mean = z.mean(0), y.mean(0)
    centred, response = z - z_sample_mean, y - y_sample_mean
    operator = regress(centred, response)
    residual = response - centred @ operator.T
    if standard_prior:
        latent_mean, latent_covariance = z.new_zeros(r), torch.eye(r, dtype=z.dtype, device=z.device)
    else:
        latent_mean, latent_covariance = z_sample_mean, centred.T @ centred / (n - 1)
    measurement_mean = y_sample_mean + operator @ (latent_mean - z_sample_mean)
    cross = latent_covariance @ operator.T
    measurement_covariance = (operator @ cross + residual.T @ residual / (n - r - 1) + noise_covariance.double())
    return _from_moments(latent_mean, latent_covariance, measurement_mean, cross, measurement_covariance)


def plain_base(z: Tensor, y: Tensor, noise_covariance: Tensor) -> GaussianBase:
    """Base that standardises latents and measurements and knows nothing of how they depend on each other.

    Parameters
    ----------
    z : Tensor
        Latents, shape (n, r).
    y : Tensor
        Noise-free observations, shape (n, k).
    noise_covariance : Tensor
        R, shape (k, k).

    Returns
    -------
    GaussianBase
        With a gain of zero and a diagonal covariance.

    Raises
    ------
    InputError
        If the shapes disagree, there are fewer than two pairs, or a latent or measurement does not vary.
    """
    check_pairs(z, y)
    check_tensor(noise_covariance, "The noise covariance", (y.shape[1], y.shape[1]), "sensors")
    z, y = z.double(), y.double()
    return _from_moments(z.mean(0), torch.diag(z.var(0)), y.mean(0), z.new_zeros(z.shape[1], y.shape[1]),
                         torch.cov(y.T).reshape(y.shape[1], y.shape[1]) + noise_covariance.double())


def spread(centred: Tensor) -> Tensor:
    """Root mean square of each column, shape (r,); 1 where it is zero."""
    size = centred.square().mean(0).sqrt()
    return torch.where(size > 0, size, 1.0)


def regress(z: Tensor, y: Tensor) -> Tensor:
    """Matrix G (k, r) of the least squares fit y = G z for centred z (n, r) and y (n, k)."""
    # Each latent in units of its own spread: what counts as a rank must not depend on units.
    unit = spread(z)
    return torch.linalg.lstsq(z / unit, y).solution.T / unit


def check_pairs(z: Tensor, y: Tensor, more: int | None = None) -> tuple[int, int]:
    """Numbers of pairs and latents; InputError unless latents (n, r) and observations (n, k) can be regressed.

    At least two pairs, and more than latents and `more` together where that is given.
    """
    check_tensor(z, "z", ("n", "r"), "latents")
    check_tensor(y, "y", ("n", "k"), "sensors")
    (n, r), k = z.shape, y.shape[1]
    if len(y) != n or not r or not k:
        raise InputError(f"Latents (n, r) and observations (n, k) are needed for the same pairs, not {tuple(z.shape)} "
                         f"and {tuple(y.shape)}.")
    if n <= (1 if more is None else r + more):
        raise InputError(f"{n} pairs cannot determine a base for {r} latents: simulate more, or keep fewer modes.")
    if not (z.amax(0) > z.amin(0)).all():
        raise InputError("A latent takes the same value in all pairs: leave it out.")
    for name, x in (("latents", z), ("sensors", y)):
        size = x.abs().amax(0)
        small = (size > 0) & (size < 1 / LARGEST)
        if small.any():
            raise InputError(f"All values of {name} {torch.where(small)[0].tolist()} are below {1 / LARGEST:g}, where "
                             "squares vanish: take other units.")
    return n, r
