"""Reference posteriors: exact for linear-Gaussian problems, preconditioned Hamiltonian Monte Carlo for the rest."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from tqdm import tqdm

from fem_diffusion.checks import (
    check_array, check_count, check_flag, check_number, check_seed, shape_fits, shape_words,
)
from fem_diffusion.comparison.distances import positive_root
from fem_diffusion.errors import InputError, SolveError

__all__ = ["HMCResult", "gauss_newton", "hmc", "linear_gaussian_posterior"]


def linear_gaussian_posterior(operator: np.ndarray, prior_covariance: np.ndarray, noise_covariance: np.ndarray,
                              innovation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact posterior of y = B m + e with m ~ N(m̄, C), e ~ N(0, R) (Stuart 2010, theorem 6.20).

    Parameters
    ----------
    operator : numpy.ndarray
        B, shape (k, n).
    prior_covariance : numpy.ndarray
        C, shape (n, n).
    noise_covariance : numpy.ndarray
        R, shape (k, k).
    innovation : numpy.ndarray
        y - B m̄, shape (k,).

    Returns
    -------
    tuple of numpy.ndarray
        Mean minus prior mean, shape (n,), and covariance, shape (n, n).

    Raises
    ------
    InputError
        If shapes disagree, a number is not finite and real, or B C Bᵀ + R is not positive definite.
    """
    operator = check_array(operator, "operator", ("k", "n"))
    k, n = operator.shape
    prior_covariance = check_array(prior_covariance, "prior_covariance", (n, n))
    noise_covariance = check_array(noise_covariance, "noise_covariance", (k, k))
    innovation = check_array(innovation, "innovation", (k,))
    cross = prior_covariance @ operator.T
    root = positive_root(operator @ cross + noise_covariance, "The covariance of the measurement")
    gain = cho_solve((root, True), cross.T).T
    covariance = prior_covariance - gain @ cross.T
    return gain @ innovation, (covariance + covariance.T) / 2


def gauss_newton(linearise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], r: int, *, iterations: int = 50,
                 tolerance: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Maximum a posteriori point for a standard normal prior and whitened misfit, with its Hessian.

    Minimises |z|²/2 + |e(z)|²/2 by Gauss-Newton steps with halving.

    Parameters
    ----------
    linearise : Callable
        Maps z (r,), a copy, to the misfit e = R^(-1/2) (h(z) - y), shape (k,), and its Jacobian, shape (k, r).
    r : int
        Number of latents.
    iterations : int
        Largest number of steps.
    tolerance : float
        Stop where the gradient's norm has fallen below this times its first value or 1.

    Returns
    -------
    tuple of numpy.ndarray
        The point, shape (r,), and the Gauss-Newton Hessian I + Jᵀ J there, shape (r, r).

    Raises
    ------
    InputError
        If a number is not positive, or `linearise` returns other shapes, or values that are not finite at z = 0.
    SolveError
        If the iteration does not converge.
    """
    if not callable(linearise):
        raise InputError(f"linearise is {linearise!r}: give a function of z (r,) that returns misfit and Jacobian.")
    r, iterations = check_count(r, "r"), check_count(iterations, "iterations")
    tolerance = check_number(tolerance, "tolerance", above=0)

    def linearised(z):
        result = linearise(z.copy())
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise InputError(f"linearise returns {type(result).__name__}: return misfit (k,) and Jacobian (k, {r}).")
        misfit = _real(result[0], "The misfit of linearise", ("k",))
        return misfit, _real(result[1], "The Jacobian of linearise", (len(misfit), r))
    z = np.zeros(r)
    misfit, jacobian = linearised(z)
    if not np.isfinite(misfit).all() or not np.isfinite(jacobian).all():
        raise InputError("Misfit or Jacobian at z = 0 hold values that are not finite: check the forward model at the "
                         "prior mean.")
    first = None
    for _ in range(iterations):
        gradient = z + jacobian.T @ misfit
        hessian = np.eye(r) + jacobian.T @ jacobian
        first = np.linalg.norm(gradient) if first is None else first
        if np.linalg.norm(gradient) <= tolerance * max(first, 1.0):
            return z, hessian
        step, value = np.linalg.solve(hessian, gradient), z @ z + misfit @ misfit
        for halving in range(30):
            trial = z - step / 2**halving
            misfit, jacobian = linearised(trial)
            if trial @ trial + misfit @ misfit < value:
                break
        else:
            return z, hessian  # rounding, not the step, limits the decrease
        z = trial
    raise SolveError(f"Gauss-Newton did not converge in {iterations} iterations; raise the number, or check the data.")


def _real(values, name: str, shape: tuple) -> np.ndarray:
    """A copy, since a function may return the same array in every call; InputError unless real and of a shape."""
    values = np.array(values)
    if values.dtype.kind not in "fiu" or not shape_fits(values.shape, shape):
        raise InputError(f"{name} is {values.dtype} of shape {values.shape}: return real numbers of shape "
                         f"{shape_words(shape)}.")
    return values.astype(float)


@dataclass(frozen=True)
class HMCResult:
    """Samples of Hamiltonian Monte Carlo.

    Parameters
    ----------
    samples : numpy.ndarray
        Latents, shape (chains, draws, r).
    acceptance : float
        Share of accepted proposals after warm-up.
    """

    samples: np.ndarray
    acceptance: float

    def moments(self, transform: Callable[[np.ndarray], np.ndarray]):
        """Mean and standard deviation of a transform of the samples, with Monte Carlo standard errors.

        Chains are independent, so the spread of the chains' own moments gives the errors of the pooled ones.

        Parameters
        ----------
        transform : Callable
            Latents (B, r), a copy, to nodal values (B, n).

        Returns
        -------
        tuple of numpy.ndarray
            Mean, standard deviation, and the standard errors of both, shape (n,) each.
        """
        # The transform may write into what it gets, and may return the same array in every call.
        values = np.stack([np.array(transform(chain.copy())) for chain in self.samples])
        mean = values.mean(axis=(0, 1))
        square = ((values - mean)**2).mean(axis=1)
        std = np.sqrt(square.mean(axis=0))
        root = np.sqrt(len(values))
        return mean, std, values.mean(axis=1).std(axis=0, ddof=1) / root, square.std(axis=0, ddof=1) / root / (2 * std)


def hmc(potential: Callable[[np.ndarray], np.ndarray], gradient: Callable[[np.ndarray], np.ndarray],
        centre: np.ndarray, hessian: np.ndarray, *, chains: int = 100, draws: int = 100, warmup: int = 20,
        step: float = 0.3, leaps: int = 6, seed: int = 0, progress: bool = False) -> HMCResult:
    """Hamiltonian Monte Carlo preconditioned by a Hessian, many chains at once (Neal 2011, section 5.4.1).

    The leapfrog trajectory is reversible and keeps volume for any force that depends on the position alone, and the
    acceptance test uses `potential`; so `gradient` may come from a cheap approximation of the forward model: the law
    stays exact and only the acceptance suffers.

    Parameters
    ----------
    potential : Callable
        Negative log density up to a constant, (chains, r) to (chains,).
    gradient : Callable
        Its gradient or an approximation, (chains, r) to (chains, r).
    centre : numpy.ndarray
        Where the chains start around, e.g. the maximum a posteriori point, shape (r,).
    hessian : numpy.ndarray
        Preconditioner, symmetric positive definite, shape (r, r).
    chains, draws, warmup : int
        Number of chains, of kept draws a chain, and of draws that are thrown away first.
    step, leaps : float, int
        Mean leapfrog step, in preconditioned coordinates, and steps a draw; the step is jittered by 20 %.
    seed : int
        Of all draws.
    progress : bool
        Show a progress bar.

    Returns
    -------
    HMCResult

    Raises
    ------
    InputError
        If a number is not positive, the Hessian is not symmetric positive definite, or a function returns another
        shape.
    SolveError
        If less than a tenth of the proposals is accepted.
    """
    for name, function in (("potential", potential), ("gradient", gradient)):
        if not callable(function):
            raise InputError(f"{name} is {function!r}: give a function of latents (chains, r).")
    chains, draws, leaps = (check_count(n, name) for name, n in (
        ("chains", chains), ("draws", draws), ("leaps", leaps)))
    check_flag(progress, "progress")
    warmup, step = check_count(warmup, "warmup", least=0), check_number(step, "step", above=0)
    rng = np.random.default_rng(check_seed(seed))
    centre = check_array(centre, "centre", ("r",))
    r = len(centre)
    # z = centre + A x turns the Hessian into the identity.
    root = positive_root(check_array(hessian, "hessian", (r, r)), "The Hessian")
    transform = solve_triangular(root, np.eye(r), lower=True).T
    x = rng.standard_normal((chains, r))
    kept, accepted = np.empty((chains, draws, r)), 0.0

    def energies(x):
        # An infinite energy refuses a proposal.
        return _real(potential(centre + x @ transform.T), "The potential", (chains,))

    def force(x):
        return _real(gradient(centre + x @ transform.T), "The gradient", (chains, r)) @ transform
    energy = energies(x)
    for i in tqdm(range(warmup + draws), desc="hmc", disable=not progress):
        momentum = rng.standard_normal((chains, r))
        length = step * rng.uniform(0.8, 1.2)
        position, moved = x, momentum - length / 2 * force(x)
        for leap in range(leaps):
            position = position + length * moved
            moved = moved - (length if leap < leaps - 1 else length / 2) * force(position)
        proposed = energies(position)
        gain = energy + (momentum**2).sum(axis=1) / 2 - proposed - (moved**2).sum(axis=1) / 2
        accept = np.log(rng.uniform(size=chains)) < gain
        x, energy = np.where(accept[:, None], position, x), np.where(accept, proposed, energy)
        if i >= warmup:
            kept[:, i - warmup] = centre + x @ transform.T
            accepted += accept.mean() / draws
    if accepted < 0.1:
        raise SolveError(f"Hamiltonian Monte Carlo accepted {accepted:.1%} of its proposals: take a smaller step, "
                         "or a better gradient.")
    return HMCResult(kept, accepted)
