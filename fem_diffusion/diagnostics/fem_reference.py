"""Reference posteriors of finite element problems: exact where they are linear and Gaussian, by Monte Carlo elsewhere.

They use the finite element model itself, for one measurement at a time; nothing here is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fem_diffusion.diagnostics.reference import gauss_newton, hmc
from fem_diffusion.errors import InputError
from fem_diffusion.fields import coefficients, field

__all__ = ["ExactPosterior", "MonteCarloPosterior", "exact_posterior", "hmc_posterior"]

# Beyond so many prior standard deviations a trajectory is refused without a solve.
_FAR = 12
# What rounding and solvers may change of a reading, as a share of the largest.
_AFFINE = 1e-6


@dataclass(frozen=True)
class ExactPosterior:
    """The posterior of a linear-Gaussian problem, for any measurement by its sensors.

    Parameters
    ----------
    prior : GaussianPrior
        Of the parameter.
    operator : numpy.ndarray
        Derivative of the readings by the parameter, shape (k, n_owned).
    offset : numpy.ndarray
        Readings at the prior mean, shape (k,).
    gain : numpy.ndarray
        Rows of the Kalman gain, shape (k, n_owned).
    std : numpy.ndarray
        Pointwise standard deviation, owned coefficients, shape (n_owned,).
    noise_std : numpy.ndarray
        Of each sensor, shape (k,).
    """

    prior: object
    operator: np.ndarray
    offset: np.ndarray
    gain: np.ndarray
    std: np.ndarray
    noise_std: np.ndarray

    def mean(self, y: np.ndarray) -> np.ndarray:
        """Posterior mean for a measurement (k,), owned coefficients, shape (n_owned,)."""
        return coefficients(self.prior.mean) + (y - self.offset) @ self.gain

    def sample(self, n: int, y: np.ndarray, seed: int) -> np.ndarray:
        """Samples for a measurement (k,), owned coefficients, shape (n, n_owned).

        Prior draws plus their own update (Matheron's rule), so nothing dense is built and any number of ranks will do.
        """
        draws = self.prior.sample_many(n, seed)
        noise = self.noise_std * np.random.default_rng([seed, 1]).standard_normal((n, len(y)))
        seen = (draws - coefficients(self.prior.mean)) @ self.operator.T
        return draws + (y - self.offset - self.prior.V.comm.allreduce(seen) - noise) @ self.gain


def exact_posterior(prior, forward, observation, noise_std) -> ExactPosterior:
    """Kalman update with the prior's covariance operator and the finite element model.

    Parameters
    ----------
    prior : GaussianPrior
        Of the parameter.
    forward : AdvectionDiffusion
        Affine in the parameter; any object with ``sensitivity(m, rows)`` and a call will do.
    observation : Observation
        The k sensors.
    noise_std : float or array_like of shape (k,)
        Standard deviation of independent noise.

    Returns
    -------
    ExactPosterior

    Raises
    ------
    InputError
        If `forward` is not affine.
    """
    operator, offset = forward.sensitivity(prior.mean, observation.rows), observation(forward(prior.mean))
    noise_std = np.broadcast_to(np.asarray(noise_std, dtype=float), offset.shape)
    _check_affine(prior, forward, observation, operator, offset)
    cross = prior.apply_covariance(operator)
    gain = np.linalg.solve(prior.V.comm.allreduce(operator @ cross.T) + np.diag(noise_std**2), cross)
    variance = coefficients(prior.pointwise_std(exact=True))**2 - (cross * gain).sum(axis=0)
    return ExactPosterior(prior, operator, offset, gain, np.sqrt(np.maximum(variance, 0.0)), noise_std)


def _check_affine(prior, forward, observation, operator, offset):
    """Raise InputError where the derivative at the prior mean does not tell what a prior sample gives."""
    m = prior.sample(seed=0)
    change = prior.V.comm.allreduce(operator @ (coefficients(m) - coefficients(prior.mean)))
    found = observation(forward(m)) - offset
    if not np.allclose(found, change, rtol=0, atol=_AFFINE * np.abs(found).max(initial=0.0)):
        raise InputError("The forward problem is not affine in the parameter, so its posterior is not Gaussian: take "
                         "hmc_posterior.")


@dataclass(frozen=True)
class MonteCarloPosterior:
    """Moments of the parameter by Hamiltonian Monte Carlo; owned coefficients, shape (n_owned,) each.

    Parameters
    ----------
    mean, std, lower, upper : numpy.ndarray
        Mean, standard deviation, and the bounds of the 95 % band.
    mean_error, std_error : numpy.ndarray
        Monte Carlo standard errors.
    acceptance : float
        Share of accepted proposals.
    """

    mean: np.ndarray
    std: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    mean_error: np.ndarray
    std_error: np.ndarray
    acceptance: float


def hmc_posterior(basis, forward, observation, y: np.ndarray, noise_std, *,
                  slope: Callable[[np.ndarray], np.ndarray] = np.ones_like, seed: int, chains: int = 100,
                  draws: int = 40, step: float = 0.35, leaps: int = 5,
                  progress: bool = False) -> MonteCarloPosterior:
    """Posterior by Hamiltonian Monte Carlo in the latents of a Gaussian field.

    The acceptance test uses the finite element model. The leapfrog force uses its linearisation in the parameter at the
    maximum a posteriori point, which costs no solve.

    Parameters
    ----------
    basis : ModalBasis
        Of `karhunen_loeve`, with its transform.
    forward : AdvectionDiffusion
        Any object with ``solve_many`` and ``sensitivity`` will do.
    observation : Observation
        The k sensors.
    y : numpy.ndarray
        Measurement, shape (k,).
    noise_std : float or array_like of shape (k,)
        Standard deviation of independent noise.
    slope : Callable
        Derivative of the parameter by the field, node by node, as a function of the parameter's coefficients: itself
        for an exponential, ones where there is no transform.
    seed, chains, draws, step, leaps, progress
        As for `hmc`. Where the posterior is far from Gaussian, a shorter step frees chains in its tails.

    Returns
    -------
    MonteCarloPosterior
    """
    comm = basis.V.comm

    def parameters(z):
        return basis.parameters(torch.as_tensor(z))

    def observe(m):
        return observation.apply(forward.solve_many(m))

    def linearise(z):
        m = parameters(z[None])
        rows = forward.sensitivity(field(basis.parameter_space, m[0]), observation.rows)
        jacobian = comm.allreduce((rows * slope(m)) @ basis.scaled_modes.T)
        return (observe(m)[0] - y) / noise_std, jacobian / np.reshape(noise_std, (-1, 1))
    centre, hessian = gauss_newton(linearise, basis.r)
    m_map = parameters(centre[None])
    rows = forward.sensitivity(field(basis.parameter_space, m_map[0]), observation.rows)
    offset = observe(m_map)[0]

    def potential(z):
        inside = np.abs(z).max(axis=1) < _FAR
        misfit = (observe(parameters(np.where(inside[:, None], z, centre))) - y) / noise_std
        return np.where(inside, ((z**2).sum(axis=1) + (misfit**2).sum(axis=1)) / 2, np.inf)

    def gradient(z):
        m = parameters(np.clip(z, -_FAR, _FAR))
        misfit = offset + comm.allreduce((m - m_map) @ rows.T) - y
        return z + comm.allreduce(((misfit / np.square(noise_std)) @ rows * slope(m)) @ basis.scaled_modes.T)
    result = hmc(potential, gradient, centre, hessian, chains=chains, draws=draws, warmup=10, step=step, leaps=leaps,
                 seed=seed, progress=progress)
    mean, std, mean_error, std_error = result.moments(parameters)
    lower, upper = np.quantile(parameters(result.samples.reshape(-1, basis.r)), [0.025, 0.975], axis=0)
    return MonteCarloPosterior(mean, std, lower, upper, mean_error, std_error, result.acceptance)
