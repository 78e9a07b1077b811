"""Reference posteriors of finite element problems: exact where they are linear and Gaussian, by Monte Carlo elsewhere.

They use the finite element model itself, for one measurement at a time; nothing here is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.checks import (
    check_array, check_callable, check_count, check_flag, check_kind, check_number, check_seed,
)
from fem_diffusion.reference.dense import gauss_newton, hmc
from fem_diffusion.diffusion import CallableNoise, GaussianNoise
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, field
from fem_diffusion.observation.linear import Observation
from fem_diffusion.prior.product import is_gaussian
from fem_diffusion.prior.protocol import Prior

__all__ = ["ExactPosterior", "MonteCarloPosterior", "exact_posterior", "hmc_posterior"]

# Beyond so many prior standard deviations a trajectory is refused without a solve.
_FAR = 12
# What may be missing of a reading's change, as a share of its prior spread and noise, and what solvers leave of itself.
_AFFINE, _ROUNDING = 1e-6, 1e-9


@dataclass(frozen=True, eq=False)
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
    names : tuple of str
        Of the sensors.
    """

    prior: object
    operator: np.ndarray
    offset: np.ndarray
    gain: np.ndarray
    std: np.ndarray
    noise_std: np.ndarray
    names: tuple

    def mean(self, y: np.ndarray) -> np.ndarray:
        """Posterior mean for a measurement (k,), owned coefficients, shape (n_owned,).

        Raises
        ------
        InputError
            If the measurement is of the wrong length or not finite; the message names the sensors.
        """
        y = check_array(y, "y", (len(self.names),), names=self.names)
        return coefficients(self.prior.mean) + (y - self.offset) @ self.gain

    def sample(self, n: int, y: np.ndarray, seed: int) -> np.ndarray:
        """Samples for a measurement (k,), owned coefficients, shape (n, n_owned).

        Prior draws plus their own update (Matheron's rule), so nothing dense is built and any number of ranks will do.

        Raises
        ------
        InputError
            As for `mean`; also if n is no positive or seed no non-negative integer.
        """
        n, seed, y = check_count(n), check_seed(seed), check_array(y, "y", (len(self.names),), names=self.names)
        draws = self.prior.sample_many(n, seed)
        noise = self.noise_std * np.random.default_rng([seed, 1]).standard_normal((n, len(y)))
        seen = (draws - coefficients(self.prior.mean)) @ self.operator.T
        return draws + (y - self.offset - self.prior.V.comm.allreduce(seen) - noise) @ self.gain


def exact_posterior(prior, forward, observation, noise_std) -> ExactPosterior:
    """Kalman update with the prior's covariance operator and the finite element model.

    Parameters
    ----------
    prior : GaussianPrior or ProductPrior
        Of the parameter; all components Gaussian.
    forward : AdvectionDiffusion
        Affine in the parameter; any object with ``sensitivity(m, rows)`` and a call will do. It gets copies.
    observation : Observation
        The k sensors.
    noise_std : float, array_like of shape (k,) or GaussianNoise
        Standard deviation of independent noise; a GaussianNoise of constant std will do.

    Returns
    -------
    ExactPosterior

    Raises
    ------
    InputError
        If an argument is of the wrong kind or shape, a standard deviation is not positive (the message names the
        sensors), the prior is not Gaussian, or `forward` is not affine.
    """
    if not isinstance(prior, Prior) or not is_gaussian(prior):
        raise InputError(f"prior is of type {type(prior).__name__}: give a GaussianPrior, or take hmc_posterior.")
    _check_model(forward, observation, "__call__")
    noise_std = _noise_std(noise_std, observation)
    mean = prior.mean.copy(deepcopy=True)
    operator = np.array(forward.sensitivity(mean, observation.rows))
    offset = observation(forward(prior.mean.copy(deepcopy=True)))
    cross = prior.apply_covariance(operator)
    # Each sensor in units of its noise: pascals beside mole fractions lose nothing.
    seen = prior.V.comm.allreduce(operator @ cross.T) / noise_std / noise_std[:, None]
    spread = noise_std * (1 + np.sqrt(seen.diagonal()))
    _check_affine(prior, forward, observation, operator, offset, _AFFINE * spread + _ROUNDING * np.abs(offset))
    gain = np.linalg.solve(seen + np.eye(len(seen)), cross / noise_std[:, None]) / noise_std[:, None]
    # Of a product component by component, which can be asked for the exact deviation.
    std = np.concatenate([coefficients(part.pointwise_std(exact=True)) for part in getattr(prior, "priors", (prior,))])
    variance = std**2 - (cross * gain).sum(axis=0)
    return ExactPosterior(prior, operator, offset, gain, np.sqrt(np.maximum(variance, 0.0)), noise_std,
                          observation.names)


def _check_model(forward, observation, *methods):
    """Refuse a forward problem that lacks a method, and sensors of another space than its states."""
    check_kind(observation, "observation", Observation, "point_sensors(...) or another Observation")
    missing = [name for name in ("sensitivity", *methods) if not callable(getattr(forward, name, None))]
    if missing or isinstance(forward, type):
        raise InputError(f"forward is of type {type(forward).__name__}, without {', '.join(missing) or 'state'}: give "
                         "an AdvectionDiffusion, or an object with its methods.")
    if getattr(forward, "state_space", observation.U) != observation.U:
        raise InputError("The observation is of another space than the states of the forward problem: build it on "
                         "forward.state_space.")


def _noise_std(noise, observation):
    """Standard deviations of the sensors, shape (k,)."""
    k = len(observation)
    if isinstance(noise, CallableNoise):
        raise InputError("noise_std is a CallableNoise: give the standard deviations of Gaussian noise.")
    if isinstance(noise, GaussianNoise):
        matrix = noise.covariance(torch.zeros(1, k, dtype=torch.float64)).numpy()
        if noise.relative.any() or np.count_nonzero(matrix - np.diag(np.diag(matrix))):
            raise InputError("The noise is relative or correlated: this reference takes independent noise of constant "
                             "std; give noise_std as numbers.")
        noise = np.sqrt(np.diag(matrix))
    std = np.broadcast_to(check_array(noise, "noise_std", (), (k,), names=observation.names), k)
    bad = [observation.names[i] for i in np.flatnonzero(std <= 0)]
    if bad:
        raise InputError(f"noise_std is not positive for {', '.join(bad)}: give every sensor noise, because without it "
                         "the posterior has no density.")
    return std


def _check_affine(prior, forward, observation, operator, offset, tolerance):
    """Raise InputError where the derivative at the prior mean does not tell what a prior sample gives."""
    m = prior.sample(seed=0)
    change = prior.V.comm.allreduce(operator @ (coefficients(m) - coefficients(prior.mean)))
    found = observation(forward(m)) - offset   # last, because a user's solver may write into m
    if not (np.abs(found - change) <= tolerance).all():
        raise InputError("The forward problem is not affine in the parameter, so its posterior is not Gaussian: take "
                         "hmc_posterior.")


@dataclass(frozen=True, eq=False)
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
        Any object with ``solve_many`` and ``sensitivity`` will do. It gets copies.
    observation : Observation
        The k sensors.
    y : numpy.ndarray
        Measurement, shape (k,).
    noise_std : float, array_like of shape (k,) or GaussianNoise
        As for `exact_posterior`.
    slope : Callable
        Derivative of the parameter by the field, node by node, as a function of the parameter's coefficients: itself
        for an exponential, ones where there is no transform. It gets copies.
    seed, chains, draws, step, leaps, progress
        As for `hmc`. Where the posterior is far from Gaussian, a shorter step frees chains in its tails.

    Returns
    -------
    MonteCarloPosterior

    Raises
    ------
    InputError
        If an argument is of the wrong kind or shape, y or noise_std is not finite or a deviation not positive (the
        message names the sensors), or `slope` returns another shape.
    SolveError
        If the search for the maximum or the chains fail.
    """
    check_kind(basis, "basis", ModalBasis, "karhunen_loeve(prior)")
    _check_model(forward, observation, "solve_many")
    noise_std = _noise_std(noise_std, observation)
    y = check_array(y, "y", (len(observation),), names=observation.names)
    check_callable(slope, "slope", "a function of the parameter's coefficients", 1)
    # Standard errors come from the spread between chains.
    seed, chains = check_seed(seed), check_count(chains, "chains", least=2)
    draws, leaps = check_count(draws, "draws"), check_count(leaps, "leaps")
    step, progress = check_number(step, "step", above=0), check_flag(progress, "progress")
    comm = basis.V.comm

    def parameters(z):
        return basis.parameters(z)

    def observe(m):
        return observation.apply(forward.solve_many(m.copy()))

    def derivative(m):
        return np.array(forward.sensitivity(field(basis.parameter_space, m[0]), observation.rows))

    def chain_rule(rows, m):
        factor = np.asarray(slope(m.copy()))
        if factor.shape != m.shape:
            raise InputError(f"slope returned the shape {factor.shape} for {m.shape}: return one number for each.")
        return comm.allreduce((rows * factor) @ basis.scaled_modes.T)

    def linearise(z):
        m = parameters(z[None])
        jacobian = chain_rule(derivative(m), m)
        return (observe(m)[0] - y) / noise_std, jacobian / np.reshape(noise_std, (-1, 1))
    centre, hessian = gauss_newton(linearise, basis.r)
    m_map = parameters(centre[None])
    rows = derivative(m_map)
    offset = observe(m_map)[0]

    def potential(z):
        inside = np.abs(z).max(axis=1) < _FAR
        misfit = (observe(parameters(np.where(inside[:, None], z, centre))) - y) / noise_std
        return np.where(inside, ((z**2).sum(axis=1) + (misfit**2).sum(axis=1)) / 2, np.inf)

    def gradient(z):
        m = parameters(np.clip(z, -_FAR, _FAR))
        misfit = offset + comm.allreduce((m - m_map) @ rows.T) - y
        return z + chain_rule((misfit / np.square(noise_std)) @ rows, m)
    result = hmc(potential, gradient, centre, hessian, chains=chains, draws=draws, warmup=10, step=step, leaps=leaps,
                 seed=seed, progress=progress)
    mean, std, mean_error, std_error = result.moments(parameters)
    lower, upper = np.quantile(parameters(result.samples.reshape(-1, basis.r)), [0.025, 0.975], axis=0)
    return MonteCarloPosterior(mean, std, lower, upper, mean_error, std_error, result.acceptance)
