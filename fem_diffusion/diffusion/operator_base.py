r"""The Gaussian base for any set of sensors: the forward map linearised where the posterior is.

With an emulator f of the state coordinates, sensors :math:`y = b + B c + e` and a Gaussian law N(z̄, C) of the latents,
the base is found by iterated posterior linearisation (Garcia-Fernandez et al. 2015, doi:10.1109/TSP.2015.2454485).
Given a Gaussian guess N(μ, L Lᵀ) of the posterior, the best affine fit to f over that guess is

.. math:: f(\mu + L\xi) \approx \bar c + A \xi, \qquad \bar c = E f, \quad A = E f \xi^T, \quad
          \Omega = E (f - \bar c - A\xi)(f - \bar c - A\xi)^T,

and the Kalman update of N(z̄, C) with that affine map and the noise R + B (Σ + Ω) Bᵀ is the next guess; R is the noise
of the sensors, Σ what the emulator leaves. The first guess is N(z̄, C) itself, which gives the joint Gaussian of
latents and measurement. Expectations are means over fixed points with the first three moments of a standard normal.
Where f is affine and the latents are Gaussian the first update is the exact posterior. Everything is batched over
layouts, and neither the order nor the number of sensors matters.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fem_diffusion.diffusion.emulator import Emulator
from fem_diffusion.diffusion.sensors import Sensors
from fem_diffusion.errors import SolveError

__all__ = ["UPDATES", "Located", "OperatorBase", "cholesky"]

UPDATES = 6
# Below so many latents points lie on two shells; there are at least so many points.
_FEW, _FEWEST_POINTS = 16, 48


@dataclass(frozen=True)
class Located:
    """Gaussians N(mean, P) of B measurements, with P⁻¹ = M Mᵀ, and what the sensors see there.

    Parameters
    ----------
    mean : Tensor
        Shape (B, r).
    factor : Tensor
        M⁻ᵀ, upper triangular, shape (B, r, r): z = mean + factor w.
    whitener : Tensor
        Mᵀ, shape (B, r, r).
    sensitivity : Tensor
        Derivative of the readings by w, in units of their noise, shape (B, k, r).
    misfit : Tensor
        Readings minus what is expected at the mean, in units of their noise, shape (B, k).
    """

    mean: Tensor
    factor: Tensor
    whitener: Tensor
    sensitivity: Tensor
    misfit: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation of each latent, shape (B, r)."""
        return self.factor.square().sum(2).sqrt()

    def whiten(self, z: Tensor) -> Tensor:
        """Base coordinates w (B, r) of latents (B, r)."""
        return _apply(self.whitener, z - self.mean)


@dataclass(frozen=True)
class OperatorBase:
    """Law of the latents and emulator: gives a Gaussian for every measurement by any sensors.

    Parameters
    ----------
    mean : Tensor
        Of the latents, shape (r,).
    factor : Tensor
        F with F Fᵀ = C, the covariance of the latents, upper triangular, shape (r, r).
    emulator : Emulator
        Of the state coordinates.
    updates : int
        Kalman updates: 1 stops at the joint Gaussian of latents and measurement, more follow the posterior.
    """

    mean: Tensor
    factor: Tensor
    emulator: Emulator
    updates: int = UPDATES

    @property
    def r(self) -> int:
        """Number of latents."""
        return len(self.mean)

    def to(self, device: str | torch.device) -> "OperatorBase":
        """A copy on another device; this one stays where it is."""
        return OperatorBase(self.mean.to(device), self.factor.to(device), deepcopy(self.emulator).to(device),
                            self.updates)

    @property
    def precision(self) -> Tensor:
        """C⁻¹, shape (r, r)."""
        identity = torch.eye(self.r, dtype=self.factor.dtype, device=self.factor.device)
        inverse = torch.linalg.solve_triangular(self.factor, identity, upper=True)
        return inverse.T @ inverse

    def noise(self, sensors: Sensors) -> Tensor:
        """Covariance of sensor noise and emulator error, R + B Σ Bᵀ, shape (B, k, k)."""
        return torch.diag_embed(sensors.variance) + sensors.rows @ self.emulator.residual @ sensors.rows.mT

    def locate(self, sensors: Sensors, y: Tensor) -> Located:
        """Gaussian approximation of the posterior of each measurement.

        Parameters
        ----------
        sensors : Sensors
            Of B layouts.
        y : Tensor
            Measurements, shape (B, k).

        Returns
        -------
        Located

        Raises
        ------
        SolveError
            If a covariance is not positive.
        """
        size, identity = len(sensors), torch.eye(self.r, dtype=y.dtype, device=y.device)
        prior = self.factor.expand(size, -1, -1)
        precision, prior_mean, noise = self.precision, self.mean.expand(size, -1), self.noise(sensors)
        mean, factor, affine = prior_mean, prior, self.emulator.head is None
        points = None if affine else _points(self.r, y)
        for _ in range(1 if affine else self.updates):
            if affine:
                G, expected, rest = sensors.rows @ self.emulator.matrix, sensors.read(self.emulator(mean)), noise
            else:
                G, expected, spread = self._fit(sensors.rows, mean, factor, points)
                expected, rest = sensors.offset + expected, noise + spread
            root = cholesky(rest)
            target = y - expected + _apply(G, mean - prior_mean)
            white, target = (torch.linalg.solve_triangular(root, x, upper=False) for x in (G, target.unsqueeze(2)))
            M = cholesky(precision + white.mT @ white)
            mean = prior_mean + torch.cholesky_solve(white.mT @ target, M).squeeze(2)
            factor = torch.linalg.solve_triangular(M.mT, identity.expand_as(M), upper=True)
        scale = torch.diagonal(noise, dim1=1, dim2=2).sqrt()
        misfit = torch.where(sensors.present, y - sensors.read(self.emulator(mean)), 0.0)
        return Located(mean, factor, M.mT, G @ factor / scale[:, :, None], misfit / scale)

    def standardised(self, located: Located) -> Located:
        """The same Gaussians of latents that are centred and divided by their prior standard deviations.

        Base coordinates are the same, and what a network sees does not depend on the units of latents.
        """
        std = self.factor.square().sum(1).sqrt()
        return replace(located, mean=(located.mean - self.mean) / std, factor=located.factor / std[:, None],
                       whitener=located.whitener * std)

    def _fit(self, rows: Tensor, mean: Tensor, factor: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Best affine fit over N(mean, factor factorᵀ) to readings without offset.

        Returns the derivative by z (B, k, r), the mean (B, k), and the covariance of what is not affine (B, k, k).
        """
        z = mean[:, None] + points @ factor.mT
        c = self.emulator(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        readings = rows @ c.mT
        expected = readings.mean(2)
        slope = (readings - expected[:, :, None]) @ points / len(points)
        rest = readings - expected[:, :, None] - slope @ points.T
        # slope belongs to ξ = factor⁻¹ (z - mean).
        slope = torch.linalg.solve_triangular(factor, slope, upper=True, left=False)
        return slope, expected, rest @ rest.mT / len(points)


def cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factors (B, n, n); SolveError where a matrix is not positive."""
    root, info = torch.linalg.cholesky_ex(matrix)
    if info.any():
        raise SolveError("The base of a layout has no positive covariance: the emulator grows without bound between "
                         "the training latents. Simulate more pairs, or keep fewer modes.")
    return root


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Products (B, m) of matrices (B, m, n) with vectors (B, n)."""
    return (matrix @ x.unsqueeze(2)).squeeze(2)


def _points(r: int, like: Tensor) -> Tensor:
    """Points (n, r) with the mean, covariance and third moments of a standard normal, in general position.

    For few latents they lie on two shells, in several rotations, to come near the fourth moments as well, on which
    depends what counts as not affine; for many latents a normal law is near one shell itself.
    """
    generator = torch.Generator().manual_seed(0)
    apart = 0.0 if r >= _FEW else min(1.0, (2 / r)**0.5)
    shells = [(r * (1 + sign * apart))**0.5 for sign in ((1, -1) if apart else (0,))]
    points = []
    while 2 * len(shells) * r * len(points) < _FEWEST_POINTS or not points:
        rotation = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
        points.append(torch.cat([radius * side for radius in shells for side in (rotation, -rotation)]))
    return torch.cat(points).to(like)
