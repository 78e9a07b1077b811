"""Noise models: what separates a measurement from the noise-free observation of the state."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fem_diffusion.errors import InputError

__all__ = ["CallableNoise", "GaussianNoise"]


class GaussianNoise:
    """Gaussian noise, e ~ N(0, R(y)) with R(y) = std^2 I + relative^2 diag(y^2) + covariance.

    Parameters
    ----------
    std : float or array_like of shape (k,)
        Absolute standard deviation of each sensor, in units of the measurement.
    relative : float or array_like of shape (k,)
        Standard deviation as a fraction of the noise-free value.
    covariance : array_like of shape (k, k), optional
        Covariance of correlated noise, symmetric positive semidefinite, in units of the measurement squared.

    Raises
    ------
    InputError
        If a standard deviation is negative or not finite, the covariance is not symmetric positive semidefinite,
        or no part is positive (without noise the posterior has no density).
    """

    def __init__(self, std=0.0, relative=0.0, covariance=None):
        self.std = torch.as_tensor(std, dtype=torch.float64)
        self.relative = torch.as_tensor(relative, dtype=torch.float64)
        for name, value in (("std", self.std), ("relative", self.relative)):
            if value.ndim > 1 or not torch.isfinite(value).all() or (value < 0).any():
                raise InputError(f"Noise '{name}' must be finite, >= 0 and a number or one number a sensor.")
        self._matrix = self._factor = None
        if covariance is not None:
            self._matrix = torch.as_tensor(covariance, dtype=torch.float64)
            self._factor = _symmetric_factor(self._matrix)
        if self._matrix is None and not ((self.std > 0) | (self.relative > 0)).all():
            raise InputError("Every sensor needs noise: give 'std', 'relative' or 'covariance' a positive value.")

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy measurements for noise-free ones.

        Parameters
        ----------
        y : Tensor
            Noise-free observations, shape (B, k).
        generator : torch.Generator
            Source of randomness, on the device of `y`.

        Returns
        -------
        Tensor
            Measurements, shape (B, k), dtype and device of `y`.
        """
        self._check(y.shape[-1])
        scale = torch.sqrt(self.std.to(y) ** 2 + (self.relative.to(y) * y) ** 2)
        noisy = y + scale * torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        if self._factor is not None:
            white = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
            noisy = noisy + white @ self._factor.to(y).T
        return noisy

    def mean(self, y: Tensor) -> Tensor:
        """Mean of the noise, zero, shape (k,)."""
        return y.new_zeros(y.shape[-1])

    def covariance(self, y: Tensor) -> Tensor:
        """Covariance R averaged over noise-free observations `y` of shape (B, k); shape (k, k)."""
        self._check(y.shape[-1])
        diagonal = (self.std.to(y) ** 2 + (self.relative.to(y) * y) ** 2).mean(0)
        matrix = torch.diag(diagonal)
        return matrix if self._matrix is None else matrix + self._matrix.to(y)

    def _check(self, k: int) -> None:
        sizes = {x.shape[0] for x in (self.std, self.relative, self._matrix) if x is not None and x.ndim}
        if sizes - {k}:
            raise InputError(f"The noise model is for {sorted(sizes)} sensors, the observations have {k}.")


@dataclass(frozen=True)
class CallableNoise:
    """Noise of the user's own making.

    Parameters
    ----------
    function : Callable[[Tensor, torch.Generator], Tensor]
        Maps noise-free observations (B, k) and a generator to measurements (B, k).
    """

    function: Callable[[Tensor, torch.Generator], Tensor]

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy measurements (B, k) for noise-free ones (B, k).

        Raises
        ------
        InputError
            If the user's callable returns another shape or values that are not finite.
        """
        noisy = self.function(y, generator)
        if not isinstance(noisy, Tensor) or noisy.shape != y.shape or not torch.isfinite(noisy).all():
            raise InputError(f"The noise callable must return a finite tensor of shape {tuple(y.shape)}.")
        return noisy

    def mean(self, y: Tensor) -> Tensor:
        """Mean of the noise over `y` (B, k), shape (k,), from the same draws as `covariance`."""
        return self._errors(y).mean(0)

    def covariance(self, y: Tensor) -> Tensor:
        """Covariance (k, k) of the noise averaged over `y` (B, k), estimated from one draw for each row."""
        error = self._errors(y)
        error = error - error.mean(0)
        return error.T @ error / len(error)

    def _errors(self, y: Tensor) -> Tensor:
        """One draw of the noise for each row, the same in every call, shape (B, k)."""
        return self.sample(y, torch.Generator(y.device).manual_seed(0)) - y


def _symmetric_factor(matrix: Tensor) -> Tensor:
    """A factor F with F Fᵀ = matrix, for a positive semidefinite matrix (k, k)."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not torch.isfinite(matrix).all():
        raise InputError("The noise covariance must be a square matrix of finite numbers.")
    if not torch.allclose(matrix, matrix.T, rtol=1e-8, atol=0.0):
        raise InputError("The noise covariance must be symmetric.")
    values, vectors = torch.linalg.eigh(matrix)
    if values[0] < -1e-10 * values[-1].abs():
        raise InputError(f"The noise covariance has a negative eigenvalue ({values[0]:.3g}).")
    return vectors * values.clamp(min=0).sqrt()
