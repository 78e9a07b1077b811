"""Distances between samples and a known posterior, with the Monte Carlo error that is to be expected."""

import numpy as np
from scipy.stats import chi2

from fem_diffusion.errors import InputError, InstallError

__all__ = ["moment_p_values", "sliced_wasserstein"]


def moment_p_values(samples: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> tuple[float, float]:
    """How likely independent samples of N(mean, covariance) are to miss its moments by as much as these do.

    In whitened coordinates the squared error of the sample mean, times n, is chi-square with r degrees of freedom;
    half the squared Frobenius error of the sample covariance, times n, is so with r (r + 1) / 2 as n grows.

    Parameters
    ----------
    samples : numpy.ndarray
        Shape (n, r).
    mean : numpy.ndarray
        Shape (r,).
    covariance : numpy.ndarray
        Shape (r, r), positive definite.

    Returns
    -------
    tuple of float
        p-values for the mean and for the covariance; below 1e-4 say that the samples have another law.

    Raises
    ------
    InputError
        If shapes disagree or there are not more than r samples.
    """
    n, r = np.shape(samples)
    if np.shape(mean) != (r,) or np.shape(covariance) != (r, r) or n <= r:
        raise InputError(f"Samples of shape {(n, r)} do not fit a mean {np.shape(mean)} and a covariance "
                         f"{np.shape(covariance)}; more than r samples are needed.")
    white = np.linalg.solve(np.linalg.cholesky(covariance), (samples - mean).T).T
    error = white.mean(axis=0)
    defect = np.cov(white, rowvar=False).reshape(r, r) - np.eye(r)
    return (float(chi2.sf(n * error @ error, r)), float(chi2.sf(n / 2 * (defect**2).sum(), r * (r + 1) // 2)))


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, *, projections: int = 500, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance between samples (n, r) and (m, r), through POT (Bonneel et al. 2015, eq. 9).

    Raises
    ------
    InstallError
        If POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise InstallError("This distance needs POT: pip install 'fem_diffusion[diagnostics]'.") from error
    return float(ot.sliced_wasserstein_distance(np.asarray(a), np.asarray(b), n_projections=projections, seed=seed))
