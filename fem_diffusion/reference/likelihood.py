"""What a measurement says about noise-free readings: density, its derivative, and the misfit in units of the noise."""

from functools import cached_property

import numpy as np
import torch
from scipy.linalg import block_diag
from scipy.stats import chi2

from fem_diffusion.checks import alike, check_array, check_kind, together
from fem_diffusion.diffusion import GaussianNoise, Noise
from fem_diffusion.errors import InputError
from fem_diffusion.problem import InverseProblem, check_problem

__all__ = ["Likelihood", "whitener"]

_DRAWS = 4096      # of noise of the user's own, for its covariance
_STEP = 1e-5       # of differences of a density, in standard deviations of the noise
_FINE, _NOTHING = 1e-4, 1e-8   # step of differences in levels, and information that is none


class Likelihood:
    """p(y | readings) of one measurement y (k,); arrays are NumPy's and global.

    Where noise has unknown levels, readings (B, k) have their standard normal numbers behind them, and the whitened
    misfit as many entries more: Gauss-Newton Hessians have the Fisher information of the levels so.

    InputError is raised if the problem is of a family, its noise has no density, y does not fit the sensors, or
    differs between ranks.
    """

    def __init__(self, problem: InverseProblem, y: np.ndarray):
        if check_problem(problem).family:
            raise InputError("The observation is of type SensorFamily: choose sensors, and make an InverseProblem of "
                             "those.")
        self.y, = alike(problem.comm, lambda: {"y": check_array(
            y, "y", ("k" if problem.k is None else problem.k,), names=problem.names or None)})
        self.noise = check_kind(problem.noise, "The noise", Noise, "GaussianNoise, StudentNoise, or "
                                "CallableNoise(function, log_density), because references need its density")
        if self.noise.log_density is None:
            raise InputError(f"The noise is of type {type(self.noise).__name__}, without a density: give "
                             "CallableNoise(function, log_density), or GaussianNoise.")
        self._log_density = self.noise.log_density
        # Readings that are the measurement, at the median of every level.
        self.at = np.concatenate([self.y, np.zeros(len(self.noise.levels))])
        at = together(problem.comm, lambda: self._density(torch.from_numpy(self.at[None].copy())), watched=True)
        if not torch.isfinite(at).all():
            raise InputError("The noise gives y no finite density where the readings are y: mend its log_density, or "
                             "add a std to relative noise of readings of zero.")

    @property
    def constant(self) -> bool:
        """Whether one matrix whitens the noise everywhere."""
        return self.noise.constant or not (isinstance(self.noise, GaussianNoise) or self.noise.levels)

    @property
    def gaussian(self) -> bool:
        """Whether -log p(y | readings) is half the squared whitened misfit, up to a constant."""
        return self.constant and isinstance(self.noise, GaussianNoise)

    @cached_property
    def differentiable(self) -> bool:
        """Whether torch differentiates the density."""
        clean = torch.from_numpy(self.at[None].copy()).requires_grad_()
        try:
            torch.autograd.grad(self._density(clean).sum(), clean)
        except RuntimeError:
            return False
        return True

    @cached_property
    def _at_y(self) -> tuple[np.ndarray, np.ndarray]:
        mean, W = whitener(self.noise, self.at)
        return mean, W if not self.noise.levels else block_diag(W, self._information(self.at[None])[0].T)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation (k,) of the noise at readings y; of levels, one over the root of their information."""
        return np.linalg.norm(np.linalg.inv(self._at_y[1]), axis=1)

    @cached_property
    def draws(self) -> np.ndarray | None:
        """Whitened draws (n, k) of noise of the user's own at readings y; None for Gaussian noise."""
        if isinstance(self.noise, GaussianNoise):
            return None
        mean, W = self._at_y
        k = len(self.y)
        return (_errors(self.noise, self.at)[:, :k] - mean) @ W[:k, :k].T

    @cached_property
    def _sizes(self) -> np.ndarray | None:
        """Sums of squares (n,) of these."""
        return None if self.draws is None else (self.draws**2).sum(axis=1)

    def chances(self, size: float) -> tuple[float, float]:
        """Chance that squares of whitened noise sum up to so much or more, and to so much or less.

        Chi-square with k degrees of freedom; for noise of the user's own, whose tails may be heavier, 1 where one of
        its draws goes as far.
        """
        high, low = float(chi2.sf(size, len(self.y))), float(chi2.cdf(size, len(self.y)))
        if self._sizes is None:
            return high, low
        return high if size > self._sizes.max() else 1.0, low if size < self._sizes.min() else 1.0

    def log_density(self, readings: np.ndarray) -> np.ndarray:
        """log p(y | readings), shape (B,), of noise-free readings (B, k); minus infinity where they are not finite."""
        there, found = np.isfinite(readings).all(axis=1), np.full(len(readings), -np.inf)
        if there.any():
            with torch.no_grad():
                found[there] = self._density(torch.from_numpy(readings[there])).numpy()
        return np.where(np.isnan(found), -np.inf, found)

    def score(self, readings: np.ndarray) -> np.ndarray:
        """Derivative of -log p(y | readings) by finite readings (B, k), by torch or by central differences."""
        return self.with_score(readings)[1]

    def with_score(self, readings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p(y | readings), shape (B,), and its score (B, k), of finite readings (B, k)."""
        if self.gaussian:
            return self.log_density(readings), self.whitened(readings) @ self._at_y[1]
        clean = torch.from_numpy(readings.copy())
        if self.differentiable:
            density = self._density(clean.requires_grad_())
            slope = torch.autograd.grad(density.sum(), clean)[0]
            return np.nan_to_num(density.detach().numpy(), nan=-np.inf, posinf=np.inf, neginf=-np.inf), -slope.numpy()
        slopes = []
        for step in torch.from_numpy(np.diag(_STEP * self.std)):
            change = self._density(clean + step) - self._density(clean - step)
            slopes.append(-change.detach().numpy() / (2 * float(step.sum())))
        return self.log_density(readings), np.stack(slopes, axis=1)

    def matrix(self, readings: np.ndarray) -> np.ndarray:
        """What whitens the noise at readings (k,): a matrix (k, k)."""
        if self.constant:
            return self._at_y[1]
        W = whitener(self.noise, readings)[1]
        return W if not self.noise.levels else block_diag(W, self._information(readings[None])[0].T)

    def whitened(self, readings: np.ndarray) -> np.ndarray:
        """Readings (B, k) minus measurement in units of the noise, whitened, shape (B, k).

        Noise that depends on the readings is whitened at these, noise of the user's own by draws of it at readings y.
        """
        if self.constant:
            mean, W = self._at_y
            return (readings + mean - self.y) @ W.T
        if self.noise.levels:
            there, k = np.isfinite(readings).all(axis=1), len(self.y)
            found, some = np.full(readings.shape, np.nan), readings[there]
            roots = np.linalg.cholesky(self.noise.each(torch.from_numpy(some)).numpy())
            white = np.linalg.solve(roots, (some[:, :k] - self.y)[:, :, None])[:, :, 0]
            told = np.linalg.solve(self._information(some), self.score(some)[:, k:, None])[:, :, 0]
            found[there] = np.hstack([white, told])
            return found
        rows = [self.matrix(row) @ (row - self.y) if np.isfinite(row).all() else row for row in readings]
        return np.array(rows).reshape(readings.shape)

    def _information(self, readings: np.ndarray) -> np.ndarray:
        """Cholesky factors (B, l, l) of the Fisher information of the levels' normal numbers, as of Gaussian noise."""
        k, slopes = len(self.y), []
        R = self.noise.each(torch.from_numpy(readings)).numpy()
        for step in np.eye(readings.shape[1])[k:] * _FINE:
            ahead, behind = (self.noise.each(torch.from_numpy(readings + x)).numpy() for x in (step, -step))
            slopes.append(np.linalg.solve(R, (ahead - behind) / (2 * _FINE)))
        found = np.array([[(a * b.swapaxes(1, 2)).sum(axis=(1, 2)) / 2 for a in slopes] for b in slopes])
        # A level that all its sensors have lost tells nothing.
        return np.linalg.cholesky(found.transpose(2, 0, 1) + _NOTHING * np.eye(len(slopes)))

    def _density(self, readings: torch.Tensor) -> torch.Tensor:
        found = self._log_density(torch.from_numpy(self.y), readings)
        if not isinstance(found, torch.Tensor) or found.shape != (len(readings),):
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise InputError(f"The noise's log_density gives {shape} for {len(readings)} rows of readings: let it "
                             "return a tensor with one number for each.")
        return found


def _many(noise: Noise, clean: np.ndarray) -> torch.Tensor:
    """Noise-free readings (k,) as often as noise is drawn there for its moments, shape (B, k)."""
    rows = 1 if isinstance(noise, GaussianNoise) else max(_DRAWS, 50 * len(clean))
    return torch.from_numpy(np.tile(clean, (rows, 1)))


def _errors(noise: Noise, clean: np.ndarray) -> np.ndarray:
    """Draws (n, k) of noise of the user's own at noise-free readings (k,)."""
    return noise.sample(_many(noise, clean), torch.Generator().manual_seed(0)).numpy() - noise.readings(
        torch.from_numpy(clean)).numpy()


def whitener(noise: Noise, clean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (k,) of the noise at noise-free readings (k,), and a matrix W (k, k) that whitens it, W R Wᵀ = I.

    InputError if its covariance is singular.
    """
    many = _many(noise, clean)
    covariance = noise.covariance(many).numpy()
    # Each sensor in units of its noise: pascals beside mole fractions lose nothing.
    std = np.sqrt(np.diag(covariance))
    scaled = covariance / np.outer(std, std) if std.all() else covariance
    try:
        return noise.mean(many).numpy(), np.linalg.inv(np.linalg.cholesky(scaled)) / std
    except np.linalg.LinAlgError:
        raise InputError("The noise covariance is singular, so there is no density: add a std to it.") from None
