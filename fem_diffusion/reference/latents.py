"""What references share: a measurement with its noise whitened, the problem in latents, and its most probable point."""

from functools import cached_property

import numpy as np
import torch
from firedrake import ConvergenceError
from scipy.optimize import least_squares

from fem_diffusion.checks import check_array, check_kind
from fem_diffusion.diffusion import GaussianNoise
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import coefficients, field
from fem_diffusion.problem import InverseProblem, check_problem

__all__ = ["LatentProblem", "check_measurement", "map_point"]


def check_measurement(problem: InverseProblem, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A measurement (k,), and the matrix W (k, k) that whitens its noise, W R Wᵀ = I.

    InputError is raised without derivative, linear sensors or constant Gaussian noise, or if y does not fit them.
    """
    _, observation = check_problem(problem).differentiable()
    y = check_array(y, "y", (len(observation),), names=observation.names)
    noise = check_kind(problem.noise, "The noise", GaussianNoise, "GaussianNoise, because references need its density")
    if noise.relative.any():
        raise InputError("The noise is relative, so its covariance depends on the state: give references constant "
                         "noise, GaussianNoise(std=...) or GaussianNoise(covariance=...).")
    covariance = noise.covariance(torch.zeros(1, len(y), dtype=torch.float64)).numpy()
    # Each sensor in units of its noise: pascals beside mole fractions lose nothing.
    std = np.sqrt(np.diag(covariance))
    scaled = covariance / np.outer(std, std) if std.all() else covariance
    try:
        return y, np.linalg.inv(np.linalg.cholesky(scaled)) / std
    except np.linalg.LinAlgError:
        raise InputError("The noise covariance is singular, so there is no density: add a std to it.") from None


class LatentProblem:
    """A measurement in the latents of a Gaussian prior: -log p(z | y) = |z|²/2 + |misfit(z)|²/2 up to a constant.

    Problem and y are as for `check_measurement`, the basis is the prior's Karhunen-Loève basis.
    """

    def __init__(self, problem: InverseProblem, y: np.ndarray, basis: ModalBasis):
        self.problem, self.basis = problem, check_kind(basis, "basis", ModalBasis, "karhunen_loeve(prior)")
        self.y, self.whiten = check_measurement(problem, y)
        if not basis.standard_prior or basis.V != problem.V:
            raise InputError("The basis has no standard normal latents in the space of the prior's fields: give "
                             "karhunen_loeve(problem.prior).")

    def parameters(self, z: np.ndarray) -> np.ndarray:
        """Owned coefficients of the parameters (B, n_owned of M) with latents (B, r), without modes past r."""
        return self.problem.prior.transform_many(self.basis.decode(z))

    def misfit(self, z: np.ndarray) -> np.ndarray:
        """Readings minus measurement in units of the noise (B, k), by the forward model; NaN where it fails."""
        try:
            return (self.problem.readings(self.parameters(z)) - self.y) @ self.whiten.T
        except (SolveError, ConvergenceError):
            if len(z) == 1:
                return np.full((1, len(self.y)), np.nan)
            return np.concatenate([self.misfit(row[None]) for row in z])

    def pull_back(self, rows: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Gradients by latents z (B, r) for those by the parameter, owned rows (B, n_owned of M): shape (B, r)."""
        prior, fields = self.problem.prior, self.basis.decode(z)
        if self._pointwise:
            pulled = rows * prior.slope_many(fields)
        else:
            pulled = np.concatenate([prior.pull_back(row[None], at) for row, at in zip(rows, fields)])
        return self.problem.comm.allreduce(pulled @ self.basis.scaled_modes.T)

    @cached_property
    def _pointwise(self) -> bool:
        """Whether the transform acts at each node by itself, which is faster."""
        try:
            self.problem.prior.slope_many(coefficients(self.basis.mean)[None])
        except InputError:
            return False
        return True

    def linearised(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of the whitened misfit at z (r,): by the parameter (k, n_owned of M), and by latents (k, r)."""
        rows = self.whiten @ self.problem.sensitivity(field(self.problem.M, self.parameters(z[None])[0]))
        pulled = self.problem.prior.pull_back(rows, self.basis.decode(z[None])[0])
        return rows, self.problem.comm.allreduce(pulled @ self.basis.scaled_modes.T)


def map_point(latent: LatentProblem) -> np.ndarray:
    """Latents of the maximum a posteriori point (r,), by SciPy's Gauss-Newton method; SolveError if none is found."""
    r, comm = latent.basis.r, latent.problem.comm

    def residual(z: np.ndarray) -> np.ndarray:
        # Where the solver fails the trust region shrinks.
        misfit = np.nan_to_num(latent.misfit(z[None])[0], nan=np.inf)
        return comm.bcast(np.concatenate([misfit, z]))

    def jacobian(z: np.ndarray) -> np.ndarray:
        return comm.bcast(np.vstack([latent.linearised(z)[1], np.eye(r)]))
    try:
        found = least_squares(residual, np.zeros(r), jacobian, xtol=1e-10, ftol=1e-12, gtol=1e-8, max_nfev=200)
    except ValueError as error:
        raise SolveError(f"The forward problem has no solution at the prior mean ({error}): check it there.") from error
    if not found.success:
        raise SolveError(f"No maximum a posteriori point was found ({found.message}): check the measurement and the "
                         "solver's tolerance.")
    return found.x
