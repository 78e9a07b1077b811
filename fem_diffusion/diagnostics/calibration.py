"""Calibration on held-out pairs: are the truths where the draws say they are?

Nothing exact is needed here. If (z, y) is a joint sample and x_1..x_n are draws of p(z | y), the rank of z among
the draws is uniform on 0..n in every coordinate (Talts et al. 2018, theorem 1).
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import chisquare

from fem_diffusion.diagnostics.distances import energy_score
from fem_diffusion.errors import InputError

__all__ = ["Calibration", "calibrate", "sbc_p_values", "sbc_ranks"]


def sbc_ranks(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Rank of each truth among its draws, coordinate by coordinate.

    Parameters
    ----------
    draws : numpy.ndarray
        n independent draws for each of m truths, shape (m, n, r).
    truth : numpy.ndarray
        Shape (m, r).

    Returns
    -------
    numpy.ndarray
        Whole numbers in 0..n, shape (m, r).

    Raises
    ------
    InputError
        If the shapes disagree or a value is not finite.
    """
    draws, truth = np.asarray(draws), np.asarray(truth)
    if draws.ndim != 3 or truth.shape != (draws.shape[0], draws.shape[2]) or not draws.size:
        raise InputError(f"Draws (m, n, r) and truths (m, r) are needed, not {draws.shape} and {truth.shape}.")
    if not np.isfinite(draws).all() or not np.isfinite(truth).all():
        raise InputError("Draws or truths hold values that are not finite; leave those out or mend the sampler.")
    return (draws < truth[:, None]).sum(axis=1)


def sbc_p_values(ranks: np.ndarray, n: int, bins: int | None = None) -> np.ndarray:
    """p-value of Pearson's chi-square test for uniform ranks, for each coordinate.

    Parameters
    ----------
    ranks : numpy.ndarray
        In 0..n, shape (m, r).
    n : int
        Number of draws a truth.
    bins : int, optional
        Number of bins; where left out m / 10 but at least 2 and at most 20, so that each expects about ten truths or
        more.

    Returns
    -------
    numpy.ndarray
        Shape (r,).

    Raises
    ------
    InputError
        If there are fewer than two bins or more bins than ranks.
    """
    m = len(ranks)
    bins = min(max(m // 10, 2), 20, n + 1) if bins is None else bins
    if not 2 <= bins <= n + 1:
        raise InputError(f"Choose between 2 and {n + 1} bins for ranks among {n} draws, not {bins}.")
    # Bins hold unequal numbers of ranks where n + 1 is no multiple of their number.
    bin_of_rank = np.arange(n + 1) * bins // (n + 1)
    expected = m * np.bincount(bin_of_rank) / (n + 1)
    counts = [np.bincount(bin_of_rank[column], minlength=bins) for column in np.asarray(ranks).T]
    return np.array([chisquare(count, expected).pvalue for count in counts])


@dataclass(frozen=True)
class Calibration:
    """What held-out pairs say about a sampler.

    Parameters
    ----------
    ranks : numpy.ndarray
        Of the truths among the draws, shape (m, r).
    p_values : numpy.ndarray
        Of uniform ranks, shape (r,).
    coverage : dict of float to float
        Level of a central interval to the share of truths inside, averaged over coordinates.
    energy_score : numpy.ndarray
        Of each pair, shape (m,); lower is better, and the true conditional has the lowest mean.
    """

    ranks: np.ndarray
    p_values: np.ndarray
    coverage: dict
    energy_score: np.ndarray

    @property
    def p_value(self) -> float:
        """One p-value for all coordinates: the smallest, times their number (Bonferroni), at most 1."""
        return float(min(1.0, len(self.p_values) * self.p_values.min()))


def calibrate(draws: np.ndarray, truth: np.ndarray, levels: tuple[float, ...] = (0.5, 0.9)) -> Calibration:
    """Ranks, coverage and energy score of draws for held-out pairs.

    An interval of level p is made of the ranks whose centre (rank + 1/2) / (n + 1) lies within p / 2 of one half; where
    n + 1 is a multiple of 20, levels of 50 % and 90 % are met exactly.

    Parameters
    ----------
    draws : numpy.ndarray
        n independent draws of the sampler for the measurement of each of m pairs, shape (m, n, r), n >= 2.
    truth : numpy.ndarray
        Latents of the pairs, shape (m, r).
    levels : tuple of float
        Of the central intervals.

    Returns
    -------
    Calibration

    Raises
    ------
    InputError
        If the shapes disagree or a value is not finite.
    """
    ranks = sbc_ranks(draws, truth)
    n = np.shape(draws)[1]
    distance = np.abs((ranks + 0.5) / (n + 1) - 0.5)
    coverage = {level: float((distance <= level / 2).mean()) for level in levels}
    return Calibration(ranks, sbc_p_values(ranks, n), coverage, energy_score(draws, truth))
