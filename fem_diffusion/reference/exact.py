"""The posterior of a linear-Gaussian problem: a Kalman update with the prior's covariance operator and the solver."""

from dataclasses import dataclass

import numpy as np
from firedrake import Function

from fem_diffusion.checks import alike, check_count, check_seed, stream
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, field
from fem_diffusion.prior.protocol import GaussianCore
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.likelihood import Likelihood
from fem_diffusion.reference.looks import gaussian_conflict
from fem_diffusion.samples import Samples

__all__ = ["ExactPosterior", "exact"]

# What may be missing of a reading's change, as a share of its prior spread and noise, and what solvers leave of itself.
_AFFINE, _ROUNDING = 1e-6, 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class ExactPosterior:
    """p(m | y) of a linear-Gaussian problem for one measurement, from `exact`.

    Parameters
    ----------
    problem, prior : InverseProblem, GaussianCore
        Affine with Gaussian noise, and its prior.
    y : numpy.ndarray
        The measurement, shape (k,).
    rows, innovation : numpy.ndarray
        Derivative of the readings by the parameter (k, n_owned), and measurement minus the readings at the prior mean
        (k,), in units of the noise.
    gain, cross : numpy.ndarray
        Rows of the Kalman gain, and prior covariance of readings and parameter, shape (k, n_owned) each.
    """

    problem: InverseProblem
    prior: GaussianCore
    y: np.ndarray
    rows: np.ndarray
    innovation: np.ndarray
    gain: np.ndarray
    cross: np.ndarray

    def mean(self) -> Function:
        """Posterior mean."""
        return field(self.problem.M, coefficients(self.prior.mean) + self.innovation @ self.gain, name="mean")

    def std(self) -> Function:
        """Pointwise standard deviation at the nodes; one solve with the prior's operator for each unknown."""
        std = coefficients(self.prior.pointwise_std(exact=True))
        return field(self.problem.M, np.sqrt(np.maximum(std**2 - (self.cross * self.gain).sum(axis=0), 0)), name="std")

    def sample(self, n: int, *, seed: int) -> Samples:
        """Prior draws plus their own update (Matheron's rule): nothing dense is built, and any ranks will do."""
        n, seed = alike(self.problem.comm, lambda: {"n": check_count(n), "seed": check_seed(seed)})
        seed = stream(seed, "exact")
        draws = self.prior.sample_many(n, seed)
        noise = np.random.default_rng([seed, 1]).standard_normal((n, len(self.rows)))
        seen = self.problem.comm.allreduce((draws - coefficients(self.prior.mean)) @ self.rows.T)
        return Samples(self.problem.M, draws + (self.innovation - seen - noise) @ self.gain, np.empty((n, 0)))

    def predictive(self, n: int, *, seed: int) -> np.ndarray:
        """Readings of n samples with noise, shape (n, k), one solve each."""
        return self.problem.measurements(self.sample(n, seed=seed).values, seed=seed)

    def __repr__(self) -> str:
        return f"ExactPosterior: Gaussian, given {len(self.rows)} readings\n{self.problem!r}"


def exact(problem: InverseProblem, y: np.ndarray) -> ExactPosterior:
    """The posterior of a linear-Gaussian problem, by k adjoint solves.

    Parameters
    ----------
    problem : InverseProblem
        With a GaussianPrior or a product of them, constant Gaussian noise, linear sensors, and a forward model that is
        affine in the parameter and has a derivative.
    y : array_like of shape (k,)
        The measurement.

    InputError is raised if the problem is not of that kind, or y is of another shape or not finite. MeasurementWarning
    tells of a measurement that is in conflict with prior, noise or sensors.
    """
    likelihood = Likelihood(problem, y)
    if not likelihood.gaussian:
        kind = "of unknown size" if problem.levels else "not Gaussian" if likelihood.constant else "relative"
        raise InputError(f"The noise is {kind}, so the posterior is "
                         "not Gaussian: take hmc, or give GaussianNoise of constant covariance.")
    y, whiten = likelihood.y, likelihood.matrix(likelihood.y)
    prior, comm = problem.prior, problem.comm
    if not isinstance(prior, GaussianCore):
        raise InputError(f"The prior is a {type(prior).__name__}: give a GaussianPrior, or take hmc.")
    mean = coefficients(prior.mean)
    rows = whiten @ problem.sensitivity(prior.mean)
    offset = whiten @ problem.readings(mean[None])[0]
    cross = prior.apply_covariance(rows)
    seen = comm.allreduce(rows @ cross.T)
    # The derivative at the prior mean has to tell what a prior sample gives.
    m = prior.sample_many(1, 0)
    change = comm.allreduce(rows @ (m[0] - mean))
    tolerance = _AFFINE * (1 + np.sqrt(seen.diagonal())) + _ROUNDING * np.abs(offset)
    if not (np.abs(whiten @ problem.readings(m)[0] - offset - change) <= tolerance).all():
        raise InputError("The forward problem is not affine in the parameter, so its posterior is not Gaussian: take "
                         "hmc.")
    innovation, whole = whiten @ y - offset, seen + np.eye(len(seen))
    if len(y):
        gaussian_conflict(problem.names, comm.bcast((innovation, seen, whiten)), likelihood.chances, 3)
    return ExactPosterior(problem, prior, y, rows, innovation, np.linalg.solve(whole, cross), cross)
