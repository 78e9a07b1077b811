"""The exact posterior of a linear-Gaussian problem in matrices; no Firedrake here."""

import numpy as np
from scipy.linalg import cho_solve

from fem_diffusion.checks import check_array
from fem_diffusion.comparison.distances import positive_root

__all__ = ["linear_gaussian_posterior"]


def linear_gaussian_posterior(operator: np.ndarray, prior_covariance: np.ndarray, noise_covariance: np.ndarray,
                              innovation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact posterior of y = B m + e with m ~ N(m̄, C), e ~ N(0, R) (Stuart 2010, theorem 6.20).

    Parameters
    ----------
    operator, prior_covariance, noise_covariance, innovation : numpy.ndarray
        B (k, n), C (n, n), R (k, k) and y - B m̄ (k,).

    Returns
    -------
    tuple of numpy.ndarray
        Mean minus prior mean, shape (n,), and covariance, shape (n, n).

    InputError is raised if shapes disagree, a number is not finite and real, or B C Bᵀ + R is not positive definite.
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
