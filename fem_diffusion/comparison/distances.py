"""Distances between sets of samples, with the error that chance alone gives.

Two-sample distances take the reference (n, r) first and the samples (m, r) second. Their scale (bandwidth,
regularisation, standardisation) comes from the reference, so that a sampler does not choose the ruler it is measured
with. The one exception is numerical: `sinkhorn` raises its regularisation for samples so far away that its iteration
would underflow. All raise InputError if sets do not fit together or are not finite and real, or a number is out of
range, and InstallError if the library behind them is missing.
"""

import warnings
from types import ModuleType

import numpy as np
from scipy.linalg import solve_triangular
from scipy.spatial.distance import cdist, pdist
from scipy.stats import chi2

from fem_diffusion.checks import check_array, check_count, check_number, check_seed
from fem_diffusion.errors import InputError, InstallError

__all__ = ["c2st", "mmd", "moment_p_values", "positive_root", "sinkhorn", "sliced_wasserstein"]

# Beyond this exponent the scaling factors of Sinkhorn's iteration leave the range of double precision.
_LARGEST_EXPONENT = 300.0


def moment_p_values(samples: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> tuple[float, float]:
    """How likely independent samples of N(mean, covariance) are to miss its moments by as much as these do.

    In whitened coordinates the squared error of the sample mean, times n, is chi-square with r degrees of freedom;
    half the squared Frobenius error of the sample covariance, times n, is so with r (r + 1) / 2 as n grows.

    Parameters
    ----------
    samples, mean, covariance : numpy.ndarray
        Shapes (n, r) with n > r, (r,), and (r, r), positive definite.

    Returns
    -------
    tuple of float
        p-values for the mean and for the covariance; below 1e-4 say that the samples have another law.
    """
    samples = check_array(samples, "samples", ("n", "r"))
    n, r = samples.shape
    mean, covariance = check_array(mean, "mean", (r,)), check_array(covariance, "covariance", (r, r))
    if n <= r:
        raise InputError(f"{n} samples of {r} coordinates: more samples than coordinates are needed.")
    white = solve_triangular(positive_root(covariance, "covariance"), (samples - mean).T, lower=True).T
    error = white.mean(axis=0)
    defect = np.cov(white, rowvar=False).reshape(r, r) - np.eye(r)
    return (float(chi2.sf(n * error @ error, r)), float(chi2.sf(n / 2 * (defect**2).sum(), r * (r + 1) // 2)))


def sliced_wasserstein(reference: np.ndarray, samples: np.ndarray, *, projections: int = 500, seed: int = 0) -> float:
    """Sliced Wasserstein-2 distance along so many random directions, through POT (Bonneel et al. 2015, eq. 9)."""
    reference, samples = _pair(reference, samples)
    projections, seed = check_count(projections, "projections"), check_seed(seed)
    return float(_ot().sliced_wasserstein_distance(reference, samples, n_projections=projections, seed=seed))


def sinkhorn(reference: np.ndarray, samples: np.ndarray, *, regularisation: float = 0.1,
             iterations: int = 500, tolerance: float = 1e-4) -> float:
    """Root of the debiased Sinkhorn divergence for squared Euclidean cost, in units of the samples, through POT.

    The divergence is W(a, b) - W(a, a) / 2 - W(b, b) / 2 with W the transport cost of the plan that entropy
    regularises (Genevay et al. 2018, eq. 3); it vanishes for equal samples and its root tends to the
    Wasserstein-2 distance as the regularisation falls.

    Parameters
    ----------
    reference, samples : numpy.ndarray
        Shapes (n, r) and (m, r).
    regularisation : float
        Weight of the entropy in units of the reference's median squared distance, so that it means the same on every
        scale. It is raised to 1/300 of the largest squared distance where it is less: samples far from the reference.
    iterations, tolerance : int, float
        Each of the three problems stops after so many, or where the plan misses its marginals by less than this.
    """
    reference, samples = _pair(reference, samples)
    regularisation = check_number(regularisation, "regularisation", above=0)
    iterations, tolerance = check_count(iterations, "iterations"), check_number(tolerance, "tolerance", above=0)
    divergence = _ot().bregman.empirical_sinkhorn_divergence
    both = np.concatenate([reference, samples])
    epsilon = max(regularisation * _median_square(reference), pdist(both, "sqeuclidean").max() / _LARGEST_EXPONENT)
    # warn=False: a plan that stops at the largest number of iterations is off by far less than sampling noise.
    return float(np.sqrt(divergence(reference, samples, epsilon, numIterMax=iterations, stopThr=tolerance, warn=False)))


def mmd(reference: np.ndarray, samples: np.ndarray) -> float:
    """Maximum mean discrepancy with a Gaussian kernel, the root of the biased estimate (Gretton et al. 2012, eq. 5).

    The kernel is ``exp(-|x - y|² / (2 h²))`` with h the median distance within the reference. For two sets of one law
    the square has the expectation (1/n + 1/m) (1 - E k(x, x')), the floor that chance alone gives; at most 2.
    """
    reference, samples = _pair(reference, samples)
    width = 2 * _median_square(reference)

    def kernel_mean(x: np.ndarray, y: np.ndarray) -> float:
        return np.exp(-cdist(x, y, "sqeuclidean") / width).mean()
    square = kernel_mean(reference, reference) + kernel_mean(samples, samples) - 2 * kernel_mean(reference, samples)
    return float(np.sqrt(max(square, 0.0)))


def c2st(reference: np.ndarray, samples: np.ndarray, *, folds: int = 5, seed: int = 1) -> float:
    """Classifier two-sample test as sbibm defines it (Lueckmann et al. 2021; Lopez-Paz and Oquab 2017).

    Held-out accuracy, mean over the folds, of a two-layer perceptron (10 r units each, relu, Adam), through
    scikit-learn, that tells the two sets apart, both standardised by the reference: 0.5 for one law, if the sets are of
    equal size, 1 for laws that do not overlap. There are at most as many folds as samples of either set.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    reference, samples = _pair(reference, samples)
    folds, seed = check_count(folds, "folds", least=2), check_seed(seed)
    if min(len(reference), len(samples)) < folds:
        raise InputError(f"C2ST in {folds} folds needs at least as many samples of each kind; draw more.")
    scale = reference.std(axis=0, ddof=1)
    if not (scale > 0).all():
        raise InputError("C2ST standardises by the reference, which is constant in one coordinate; leave that out.")
    data = (np.concatenate([reference, samples]) - reference.mean(axis=0)) / scale
    label = np.repeat([0, 1], [len(reference), len(samples)])
    width = 10 * data.shape[1]
    classifier = MLPClassifier((width, width), max_iter=10000, random_state=seed)
    with warnings.catch_warnings():
        # A classifier that stops early is a weaker test, not a wrong one.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(classifier, data, label, cv=KFold(folds, shuffle=True, random_state=seed)).mean())


def _pair(reference: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sample sets as finite arrays (n, r) and (m, r)."""
    a = check_array(reference, "The first set of samples", ("n", "r"))
    b = check_array(samples, "The second", ("m", "r"))
    if a.shape[1] != b.shape[1] or not a.size or not b.size:
        raise InputError(f"Two sets of samples (n, r) and (m, r) are needed, not {a.shape} and {b.shape}.")
    return a, b


def positive_root(matrix: np.ndarray, name: str) -> np.ndarray:
    """Lower Cholesky factor of a positive definite matrix (r, r); InputError where it is none."""
    size = np.sqrt(np.maximum(np.diag(matrix), 0))
    try:
        # A Cholesky factor knows no units; the lower triangle alone would be read.
        if (np.abs(matrix - matrix.T) > 1e-6 * np.outer(size, size)).any():
            raise InputError(f"{name} is not symmetric: take the mean of it and its transpose.")
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError as error:
        raise InputError(f"{name} is not positive definite: check it, or leave out coordinates that do not vary.") \
            from error


def _median_square(reference: np.ndarray) -> float:
    """Median squared distance between the points of a set (n, r)."""
    value = float(np.median(pdist(reference, "sqeuclidean"))) if len(reference) > 1 else 0.0
    if not value > 0:
        raise InputError("The reference samples have no spread, so the distance has no scale; draw more of them.")
    return value


def _ot() -> ModuleType:
    """The POT package."""
    try:
        import ot
    except ImportError as error:
        raise InstallError("This distance needs POT: pip install 'fem_diffusion[comparison]'.") from error
    return ot
