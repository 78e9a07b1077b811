"""Reference posteriors: exact for linear-Gaussian problems, preconditioned Hamiltonian Monte Carlo for the rest."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

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
    """
    cross = prior_covariance @ operator.T
    gain = np.linalg.solve(operator @ cross + noise_covariance, cross.T).T
    covariance = prior_covariance - gain @ cross.T
    return gain @ innovation, (covariance + covariance.T) / 2


def gauss_newton(linearise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], r: int, *, iterations: int = 50,
                 tolerance: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Maximum a posteriori point for a standard normal prior and whitened misfit, with its Hessian.

    Minimises |z|²/2 + |e(z)|²/2 by Gauss-Newton steps with halving.

    Parameters
    ----------
    linearise : Callable
        Maps z (r,) to the misfit e = R^(-1/2) (h(z) - y), shape (k,), and its Jacobian, shape (k, r).
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
    SolveError
        If the iteration does not converge.
    """
    z = np.zeros(r)
    misfit, jacobian = linearise(z)
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
            misfit, jacobian = linearise(trial)
            if trial @ trial + misfit @ misfit < value:
                break
        else:
            return z, hessian  # rounding, not the step, limits the decrease
        z = trial
    raise SolveError(f"Gauss-Newton did not converge in {iterations} iterations; raise the number, or check the data.")


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
            Latents (B, r) to nodal values (B, n).

        Returns
        -------
        tuple of numpy.ndarray
            Mean, standard deviation, and the standard errors of both, shape (n,) each.
        """
        values = np.stack([transform(chain) for chain in self.samples])
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
        If a number is not positive.
    SolveError
        If less than a tenth of the proposals is accepted.
    """
    if min(chains, draws, leaps, step) <= 0 or warmup < 0:
        raise InputError("chains, draws, leaps and step must be positive, warmup at least 0.")
    rng = np.random.default_rng(seed)
    r = len(centre)
    # z = centre + A x turns the Hessian into the identity.
    transform = np.linalg.inv(np.linalg.cholesky(hessian)).T
    x = rng.standard_normal((chains, r))
    energy = potential(centre + x @ transform.T)
    kept, accepted = np.empty((chains, draws, r)), 0.0

    def force(x):
        return gradient(centre + x @ transform.T) @ transform
    for i in tqdm(range(warmup + draws), desc="hmc", disable=not progress):
        momentum = rng.standard_normal((chains, r))
        length = step * rng.uniform(0.8, 1.2)
        position, moved = x, momentum - length / 2 * force(x)
        for leap in range(leaps):
            position = position + length * moved
            moved = moved - (length if leap < leaps - 1 else length / 2) * force(position)
        proposed = potential(centre + position @ transform.T)
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
