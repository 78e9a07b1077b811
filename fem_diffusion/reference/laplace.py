"""The Gaussian that has the most probable point as mean and the Gauss-Newton Hessian there as precision."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from firedrake import Function
from scipy.linalg import qr

from fem_diffusion.checks import alike, check_count, check_seed, stream
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import coefficients, field
from fem_diffusion.prior.draws import restricted
from fem_diffusion.problem import InverseProblem, check_problem
from fem_diffusion.reference.chains import reference_latents
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.looks import point_conflict
from fem_diffusion.reference.point import find_point
from fem_diffusion.samples import Samples

__all__ = ["LaplacePosterior", "factorised", "laplace", "low_rank"]

# Directions that are looked at together, and what those that are left may add to the precision.
_BLOCK, _LEFT = 20, 1e-2
_MOMENTS = 1000    # samples for moments of transformed fields


@dataclass(frozen=True, eq=False, repr=False)
class LaplacePosterior:
    """A Gaussian in the latents near p(m | y), from `laplace`; modes past r are the prior's.

    Parameters
    ----------
    problem : InverseProblem
        What was solved.
    centre, factor : numpy.ndarray
        Mean of the latents (r,), and a factor F (r, r) of their covariance F Fᵀ.
    solves, pulls : int
        Forward and adjoint solves that it took.
    """

    problem: InverseProblem
    latent: LatentProblem
    centre: np.ndarray
    factor: np.ndarray
    solves: int
    pulls: int

    @property
    def y(self) -> np.ndarray:
        """The measurement, shape (k,)."""
        return self.latent.y

    @property
    def basis(self) -> ModalBasis:
        """Coordinates of the latents."""
        return self.latent.basis

    @property
    def covariance(self) -> np.ndarray:
        """Of the latents, shape (r, r)."""
        return self.factor @ self.factor.T

    def sample(self, n: int, *, seed: int) -> Samples:
        """Draws of the Gaussian, transformed; SolveError if a constrained prior allows hardly any."""
        n, seed = alike(self.problem.comm, lambda: {"n": check_count(n), "seed": check_seed(seed)})
        rng = np.random.default_rng(stream(seed, "laplace"))

        def draw(number: int) -> tuple[np.ndarray]:
            return self.centre + rng.standard_normal((n, len(self.centre))) @ self.factor.T,
        z, = restricted(self.latent.allowed, n, draw, "take hmc, which keeps to the constraint")
        return self.latent.samples(z, seed)

    @cached_property
    def _draws(self) -> Samples:
        return self.sample(_MOMENTS, seed=0)

    def mean(self) -> Function:
        """Mean; of a transformed field that of 1,000 samples."""
        if self._plain:
            return field(self.problem.M, self.latent.parameters(self.centre[None])[0], name="mean")
        return self._draws.mean()

    def std(self) -> Function:
        """Pointwise standard deviation at the nodes; of a transformed field that of 1,000 samples."""
        if not self._plain:
            return self._draws.std()
        modes, core = self.latent.basis.scaled_modes, self.problem.prior.core
        left = coefficients(core.pointwise_std())**2 - (modes**2).sum(axis=0)      # pyright: ignore
        variance = ((self.factor.T @ modes)**2).sum(axis=0) + np.maximum(left, 0.0)
        return field(self.problem.M, np.sqrt(variance), name="std")

    @property
    def _plain(self) -> bool:
        """Whether the parameter is the Gaussian field itself."""
        return self.problem.prior.core is self.problem.prior

    def predictive(self, n: int, *, seed: int) -> np.ndarray:
        """Readings of n samples with noise, shape (n, k), one solve each."""
        return self.problem.measurements(self.sample(n, seed=seed).values, seed=seed)

    def __repr__(self) -> str:
        shrunk = 1 - np.linalg.eigvalsh(self.covariance)
        return (f"LaplacePosterior: Gaussian of {len(self.centre)} latents, of which the readings tell "
                f"{shrunk.sum():.1f}, {self.solves:,} solves and {self.pulls:,} adjoint solves\n{self.problem!r}")


def laplace(problem: InverseProblem, y: np.ndarray, *, basis: ModalBasis | None = None, seed: int = 0
            ) -> LaplacePosterior:
    """Laplace's approximation: a Gaussian around the most probable latents.

    The Hessian takes one adjoint solve for each reading or, where there are many more of these than latents, a
    randomised factorisation of at most r + 20 linearised solves each way, by this seed.

    Parameters, errors and warnings are those of `map_point`; the basis is as for `hmc`.
    """
    seed, = alike(check_problem(problem).comm, lambda: {"seed": check_seed(seed)})
    latent = reference_latents(problem, y, basis)
    centre = find_point(latent)[0]
    factor = factorised(low_rank(latent, centre, seed))
    point_conflict(latent, centre)
    return LaplacePosterior(problem, latent, centre, factor, latent.solves, latent.pulls)


def factorised(jacobian: np.ndarray) -> np.ndarray:
    """Symmetric factor F (r, r) of the inverse of I + JᵀJ, for whitened derivatives J (l, r)."""
    _, values, directions = np.linalg.svd(jacobian, full_matrices=False)
    return np.eye(jacobian.shape[1]) + directions.T * (1 / np.sqrt(1 + values**2) - 1) @ directions


def low_rank(latent: LatentProblem, z: np.ndarray, seed: int) -> np.ndarray:
    """A matrix J (l, r) with the Gauss-Newton Hessian I + JᵀJ at latents z (r,).

    With more readings than r + 20, by the randomised range finder of Halko, Martinsson and Tropp 2011, algorithm 4.2:
    orthonormal Q with what random directions change in the readings, and J = Qᵀ (whitened derivative). It ends when
    directions that are new change next to nothing, and is exact with r of them.
    """
    k, r = len(latent.y), latent.r
    if k <= r + _BLOCK or not latent.differentiable:
        return latent.linearised(z)[1]
    rng, W = np.random.default_rng(stream(seed, "directions")), latent.whitener(z)
    Q = np.empty((k, 0))
    directions = qr(rng.standard_normal((r, r)), mode="economic")[0].T
    for first in range(0, r, _BLOCK):
        pushed = W @ latent.slopes(z, directions[first:first + _BLOCK]).T
        if np.isnan(pushed).any():
            return latent.linearised(z)[1]
        new = pushed - Q @ (Q.T @ pushed)
        # Orthogonal directions: their mean square is that of each which is left.
        if first and (new**2).sum() / new.shape[1] * (r - first) < _LEFT:
            break
        basis, size, _ = qr(new - Q @ (Q.T @ new), mode="economic", pivoting=True)
        keep = np.abs(np.diag(size)) > 1e-9 * max(np.abs(size[0, 0]), 1e-300)
        Q = np.hstack([Q, basis[:, keep]])
    return latent.pull(z, Q.T @ W)
