"""Noise models: what separates a measurement from the noise-free observation of the state."""

from collections.abc import Callable
from copy import copy
from math import log, pi
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fem_diffusion.checks import LARGEST, check_array, check_count
from fem_diffusion.diffusion.checks import check_generator
from fem_diffusion.diffusion.maps.laws import of_normal
from fem_diffusion.errors import InputError
from fem_diffusion.marginal import Marginal

__all__ = ["GaussianNoise", "Noise", "as_noise"]

# Rounding of a covariance, in units of the standard deviations.
_ASYMMETRY, _NEGATIVE = 1e-8, 1e-10


class Noise:
    """What separates measurements from noise-free readings: the protocol of all noise models.

    Sampling draws it afresh in training, `mean` and `covariance` make the Gaussian base, `log_density` is what
    references, checks and corrections know of it; it is None of a model that has none.

    A standard deviation may be unknown: `levels` are the laws of such numbers, and noise-free readings (B, k) are then
    given as (B, k + l), with the standard normal number of each level behind them, ``x = F⁻¹(Φ(z))``.
    """

    constant: bool = False   # whether it does not depend on the readings or on a level
    levels: tuple[Marginal, ...] = ()
    law: bool = False        # whether the emulator's density of a posterior has this density in it
    heavy: bool = False      # whether it has outliers
    log_density: Callable[[Tensor, Tensor], Tensor] | None

    @property
    def told(self) -> bool:
        """Whether its density is known, with its covariance at each reading."""
        return self.law

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy measurements (B, k) for noise-free ones (B, k), of their dtype and on their device."""
        raise NotImplementedError

    def mean(self, y: Tensor) -> Tensor:
        """Mean of the noise over noise-free readings `y` (B, k), shape (k,); zero unless a model says otherwise."""
        return y.new_zeros(self.readings(y).shape[-1])

    def covariance(self, y: Tensor) -> Tensor:
        """Covariance (k, k) averaged over noise-free readings `y` (B, k)."""
        return self.each(y.reshape(-1, y.shape[-1])).mean(0)

    def each(self, y: Tensor) -> Tensor:
        """Covariances (B, k, k) at noise-free readings `y` (B, k)."""
        raise NotImplementedError

    def near(self, y: Tensor, square: Tensor) -> Tensor:
        """As `each`, of Gaussian noise that is as likely near residuals of these squares (B, k)."""
        return self.each(y)

    def widened(self, variance: Tensor) -> "Noise":
        """The noise with more variance (k,) of each sensor, or (B, k), where an emulator's error counts so."""
        raise NotImplementedError

    def readings(self, clean: Tensor) -> Tensor:
        """Noise-free readings (..., k) without the levels behind them."""
        return clean[..., :clean.shape[-1] - len(self.levels)]

    def select(self, sensors: Tensor) -> "Noise":
        """Noise of some of the sensors, by their numbers; InputError of a model that does not know it."""
        raise InputError(f"{type(self).__name__} is of all sensors together: give noise for those that are left, or "
                         "GaussianNoise or StudentNoise, which know it of each.")

    def known(self, normal: Tensor) -> "Noise":
        """The noise with its levels at these standard normal numbers (l,); itself where it has none."""
        return self

    def check(self, k: int) -> None:
        """Raise InputError where the noise is for another number of sensors than k."""


class GaussianNoise(Noise):
    """Gaussian noise, e ~ N(0, R(y)) with R(y) = std^2 I + relative^2 diag(y^2) + covariance.

    ``GaussianNoise(std=scipy.stats.loguniform(0.005, 0.05))`` has an unknown standard deviation of this law, the same
    for all its sensors: it is one more number of the parameter, with a posterior of its own.

    InputError if an argument is not of finite real numbers, a standard deviation is negative, the parts are for
    different numbers of sensors, the covariance is not symmetric positive semidefinite, or there is no noise (the
    posterior then has no density).

    Parameters
    ----------
    std : float, array_like of shape (k,), or frozen distribution of SciPy
        Standard deviation of each sensor, in units of the measurement, or the law of one of all sensors.
    relative : float or array_like of shape (k,)
        As a fraction of the noise-free value.
    covariance : array_like of shape (k, k), optional
        Covariance of correlated noise, symmetric positive semidefinite and not zero, in units of the measurement
        squared. Sensors may be of any units, and some may have none of this noise.
    """

    def __init__(self, std: ArrayLike | Any = 0.0, relative: ArrayLike = 0.0, covariance: ArrayLike | None = None):
        self.levels, std = as_levels(std)
        self._more = None
        self.std, self.relative = (torch.from_numpy(check_array(x, f"Noise {name!r}", (), ("k",)))
                                   for name, x in (("std", std), ("relative", relative)))
        for name, value in (("std", self.std), ("relative", self.relative)):
            # Squares of smaller numbers vanish.
            if ((value < 0) | (value > 0) & (value < 1 / LARGEST)).any():
                raise InputError(f"Noise {name!r} is negative or below {1 / LARGEST:g}: give 0 or a larger number.")
        self.correlated = self._factor = None
        if covariance is not None:
            self.correlated = torch.from_numpy(check_array(covariance, "The noise covariance", ("k", "k")))
            self._factor = _factor(self.correlated)
        if len(self._sizes) > 1:
            raise InputError(f"Parts of the noise are for {self._sizes} sensors: give all of them for one number.")
        # Correlated noise may leave a sensor exact, as a whole it must be there.
        correlated = self.correlated is not None and bool(self.correlated.any())
        if not correlated and not self.levels and not ((self.std > 0) | (self.relative > 0)).all():
            raise InputError("Every sensor needs noise: give 'std', 'relative' or 'covariance' a positive value, or "
                             "pass noise=None where the observations hold noise already.")

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy measurements (B, k) for noise-free ones (B, k), of their dtype and on their device."""
        variance = self._variance(y)
        check_generator(generator, y.device)
        y, scale = self.readings(y), variance.sqrt()
        like = {"generator": generator, "dtype": y.dtype, "device": y.device}
        noisy = y + scale * torch.randn(y.shape, **like)
        return noisy if self._factor is None else noisy + torch.randn(y.shape, **like) @ self._factor.to(y).T

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        """log p(y | clean) of a measurement y (k,), or one each (B, k), for noise-free readings `clean` (B, k): (B,).

        It is normalised and differentiable in `clean`, on which the covariance depends where noise is relative.
        InputError if the shapes disagree, or the covariance is singular.
        """
        variance = self._variance(clean)
        clean, y = self.readings(clean), y.to(clean)
        if clean.ndim != 2 or y.shape not in (clean.shape[1:], clean.shape):
            raise InputError(f"y has the shape {tuple(y.shape)} and the readings {tuple(clean.shape)}: give (k,) and "
                             "(B, k).")
        constant = clean.shape[1] * log(2 * pi)
        if self.correlated is None:
            return -((y - clean)**2 / variance + torch.log(variance) + log(2 * pi)).sum(1) / 2
        matrix = self.correlated.to(clean)
        # One factor serves all rows where the noise is constant.
        total = matrix + torch.diag_embed(variance.expand(clean.shape)[:1 if self.constant else None])
        # Each sensor in units of its noise: pascals beside mole fractions lose nothing.
        unit = total.diagonal(dim1=1, dim2=2).clamp(min=1 / LARGEST**2).sqrt()
        root, failed = torch.linalg.cholesky_ex(total / unit[:, :, None] / unit[:, None])
        if (failed > 0).any():
            raise InputError("The noise covariance is singular, so there is no density: add a std to it.")
        residual = torch.linalg.solve_triangular(root, ((y - clean) / unit)[:, :, None], upper=False)
        determinant = 2 * (torch.log(unit) + torch.log(root.diagonal(dim1=1, dim2=2))).sum(1)
        return -(residual.square().sum((1, 2)) + determinant + constant) / 2

    def covariance(self, y: Tensor) -> Tensor:
        """Covariance R averaged over noise-free observations `y` of shape (B, k); shape (k, k)."""
        diagonal = self._variance(y).expand_as(self.readings(y))
        matrix = torch.diag(diagonal.reshape(-1, diagonal.shape[-1]).mean(0))
        return matrix if self.correlated is None else matrix + self.correlated.to(y)

    def each(self, y: Tensor) -> Tensor:
        """As `Noise.each`."""
        matrix = torch.diag_embed(self._variance(y).expand_as(self.readings(y)))
        return matrix if self.correlated is None else matrix + self.correlated.to(y)

    def known(self, normal: Tensor) -> "GaussianNoise":
        """As `Noise.known`."""
        part = copy(self)
        if self.levels:
            part.std, part.levels = of_normal(self.levels[0], normal[0]).double(), ()
        return part

    def widened(self, variance: Tensor) -> "GaussianNoise":
        """As `Noise.widened`."""
        part = copy(self)
        part._more = variance
        return part

    def _variance(self, y: Tensor) -> Tensor:
        """Variance of independent noise, of a shape that goes with noise-free readings (..., k)."""
        self._check_observations(y)
        clean = self.readings(y)
        variance = self.std.to(y)**2 + (self.relative.to(y) * clean)**2
        if self.levels:
            variance = variance + of_normal(self.levels[0], y[..., -1:])**2
        return variance if self._more is None else variance + self._more.to(y)

    def select(self, sensors: Tensor) -> "GaussianNoise":
        """Noise of some of the sensors, by their numbers."""
        # The parts are sound already, and a sensor without noise of its own stays one.
        part = copy(self)
        part.std, part.relative = (x[sensors] if x.ndim else x for x in (self.std, self.relative))
        part._more = None if self._more is None else self._more[sensors]
        if self.correlated is not None:
            part.correlated = self.correlated[sensors][:, sensors]
            part._factor = _factor(part.correlated)
        return part

    @property
    def constant(self) -> bool:   # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the noise does not depend on the readings or on a level."""
        return not self.levels and not bool(self.relative.any())

    @property
    def told(self) -> bool:
        """As `Noise.told`."""
        return True

    @property
    def law(self) -> bool:   # pyright: ignore[reportIncompatibleVariableOverride]
        """As `Noise.law`: where one covariance does not hold it."""
        return not self.constant

    def check(self, k: int) -> None:
        """Raise InputError where the noise is for another number of sensors than k."""
        if set(self._sizes) - {k}:
            raise InputError(f"The noise model is for {self._sizes} sensors, the observations have {k}: give one "
                             "number for all, or one for each.")

    def _check_observations(self, y: Tensor) -> None:
        if not isinstance(y, Tensor) or not y.is_floating_point() or not y.ndim:
            raise InputError("Noise is made for a floating-point tensor (B, k): pass torch.as_tensor(y, "
                             "dtype=torch.float64).")
        self.check(y.shape[-1] - len(self.levels))

    @property
    def _sizes(self) -> list[int]:
        """Numbers of sensors that the parts are for."""
        return sorted({len(x) for x in (self.std, self.relative, self.correlated) if x is not None and x.ndim})


def as_levels(std: Any) -> tuple[tuple[Marginal, ...], Any]:
    """The law of an unknown standard deviation and zero, or none and the known one; InputError of a negative one."""
    if isinstance(std, Marginal) or hasattr(std, "support"):
        level = std if isinstance(std, Marginal) else Marginal(std, "std")
        if level.bounds[0] < 0:
            raise InputError(f"std is of the law {level}, which may be negative: give one of positive numbers, such as "
                             "scipy.stats.loguniform(0.005, 0.05).")
        return (level,), 0.0
    return (), std


def as_noise(noise: Noise | ArrayLike | None, k: int | None = None) -> Noise | None:
    """The noise model that is meant; InputError if it is none, or for another number of sensors than k.

    Numbers are standard deviations in units of the measurement; None stays where the observations hold noise already.
    """
    if isinstance(noise, dict) or callable(noise):
        raise InputError(f"noise is of type {type(noise).__name__}: pass "
                         f"{'GaussianNoise(**noise)' if isinstance(noise, dict) else 'CallableNoise(noise)'}.")
    if not (noise is None or isinstance(noise, Noise)):
        noise = GaussianNoise(std=noise)
    if k is not None and noise is not None:
        noise.check(check_count(k, "k"))
    return noise


def _factor(matrix: Tensor) -> Tensor:
    """A factor F of a positive semidefinite matrix (k, k) = F Fᵀ, symmetric in units of the standard deviations."""
    if not len(matrix):
        return matrix
    variance = matrix.diagonal()
    if (variance < 0).any():
        raise InputError(f"The noise covariance has negative variances at sensors {_where(variance < 0)}: mend them.")
    # Each sensor in units of its own noise: pascals beside mole fractions lose nothing.
    unit = variance.sqrt()
    scale = torch.where(unit > 0, unit, 1.0)
    scaled = matrix / scale / scale[:, None]
    if (scaled - scaled.T).abs().max() > _ASYMMETRY:
        raise InputError("The noise covariance must be symmetric: take the mean of it and its transpose.")
    if (matrix[unit == 0] != 0).any() or (matrix[:, unit == 0] != 0).any():
        raise InputError(f"Sensors {_where(unit == 0)} have covariances and no variance: mend the noise covariance.")
    values, vectors = torch.linalg.eigh((scaled + scaled.T) / 2)
    if values[0] < -_NEGATIVE * values[-1].abs():
        raise InputError(f"The noise covariance has a negative eigenvalue ({values[0]:.3g} in units of the sensors' "
                         "own variances): mend it, or add to its diagonal.")
    # The symmetric root: eigenvectors of close eigenvalues turn with rounding, their products do not.
    return unit[:, None] * (vectors * values.clamp(min=0).sqrt() @ vectors.T)


def _where(mask: Tensor) -> list[int]:
    return torch.where(mask)[0].tolist()
