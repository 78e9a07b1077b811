"""Calibration on held-out pairs: are the truths where the draws say they are?

Nothing exact is needed here. If (z, y) is a joint sample and x_1..x_n are draws of p(z | y), the rank of z among
the draws is uniform on 0..n in every coordinate (Talts et al. 2018, theorem 1). Functions of draws (m, n, r) and truths
(m, r) raise InputError if shapes disagree or a value is not finite and real.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial.distance import pdist
from scipy.stats import chisquare

from fem_diffusion.checks import alike, check_all, check_array, check_count, check_kind, check_number, check_seed
from fem_diffusion.diffusion import Sampler, sample_latents
from fem_diffusion.errors import InputError

if TYPE_CHECKING:
    from fem_diffusion.model.model import Model
    from fem_diffusion.simulation.data_set import DataSet

__all__ = ["Calibration", "calibrate", "calibrate_model", "energy_score", "sbc_p_values", "sbc_ranks"]


def sbc_ranks(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Rank (m, r) of each truth among its n independent draws, whole numbers in 0..n, coordinate by coordinate."""
    draws, truth = _pair(draws, truth)
    return (draws < truth[:, None]).sum(axis=1)


def _pair(draws: np.ndarray, truth: np.ndarray, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Draws (m, n, r) with n >= least, and truths (m, r)."""
    draws = check_array(draws, "draws", ("m", "n", "r"))
    truth = check_array(truth, "truth", (len(draws), draws.shape[2]))
    if not draws.size or draws.shape[1] < least:
        raise InputError(f"Draws (m, n, r) with n >= {least} and truths (m, r) are needed, not {draws.shape} and "
                         f"{truth.shape}.")
    return draws, truth


def sbc_p_values(ranks: np.ndarray, n: int, bins: int | None = None) -> np.ndarray:
    """p-value of Pearson's chi-square test for uniform ranks (m, r) among n draws, for each coordinate, shape (r,).

    Where bins are left out there are m / 10, but at least 2 and at most 20, so that each expects about ten truths or
    more. InputError is raised if ranks are no integers in 0..n, or for fewer than two or more than n + 1 bins.
    """
    n, ranks = check_count(n, "n"), check_array(ranks, "ranks", ("m", "r"))
    m = len(ranks)
    if not m or (ranks % 1 != 0).any() or (ranks < 0).any() or (ranks > n).any():
        raise InputError(f"ranks must be integers between 0 and {n}: pass what sbc_ranks returns.")
    ranks = ranks.astype(int)
    bins = check_count(min(max(m // 10, 2), 20, n + 1) if bins is None else bins, "bins")
    if not 2 <= bins <= n + 1:
        raise InputError(f"Choose between 2 and {n + 1} bins for ranks among {n} draws, not {bins}.")
    # Bins hold unequal numbers of ranks where n + 1 is no multiple of their number.
    bin_of_rank = np.arange(n + 1) * bins // (n + 1)
    expected = m * np.bincount(bin_of_rank) / (n + 1)
    counts = [np.bincount(bin_of_rank[column], minlength=bins) for column in ranks.T]
    return np.array([chisquare(count, expected).pvalue for count in counts])


@dataclass(frozen=True)
class Calibration:
    """What held-out pairs say about a sampler.

    Parameters
    ----------
    ranks, p_values : numpy.ndarray
        Of the truths among the draws, shape (m, r), and of uniform ranks, shape (r,).
    coverage : dict of float to float
        Level of a central interval to the share of truths inside, averaged over coordinates.
    energy_score : numpy.ndarray
        Of each pair, shape (m,); lower is better, and the true conditional has the lowest mean.
    draws : int
        Number n of draws a truth.
    """

    ranks: np.ndarray
    p_values: np.ndarray
    coverage: dict[float, float]
    energy_score: np.ndarray
    draws: int

    @property
    def p_value(self) -> float:
        """One p-value for all coordinates: the smallest, times their number (Bonferroni), at most 1."""
        return float(min(1.0, len(self.p_values) * self.p_values.min()))

    def coverage_error(self, level: float) -> float:
        """Standard error of the coverage at a level; pairs are independent, coordinates of one pair are not."""
        level = check_number(level, "level", above=0, below=1)
        inside = _inside(self.ranks, self.draws, level).mean(axis=1)
        return float(inside.std(ddof=1) / np.sqrt(len(inside)))

    def table(self) -> str:
        """Coverage with its standard error as a Markdown table, and the p-value of uniform ranks."""
        lines = ["", "| central interval | truths inside | standard error |", "|---|---|---|"]
        lines += [f"| {level:.0%} | {share:.1%} | {self.coverage_error(level):.1%} |"
                  for level, share in self.coverage.items()]
        return "\n".join([*lines, "", f"{len(self.ranks)} held-out pairs; uniform ranks of all latents: "
                          f"p = {self.p_value:.2f}", ""])


def energy_score(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Energy score of an ensemble for each truth, E|x - z| - E|x - x'| / 2 (Gneiting and Raftery 2007, eq. 21).

    It is proper: its mean over many pairs is least for the true conditional law. The estimate, of shape (m,) and in
    units of the latents, is unbiased in the number n >= 2 of independent draws.
    """
    draws, truth = _pair(draws, truth, 2)
    distance = np.linalg.norm(draws - truth[:, None], axis=2).mean(axis=1)
    return distance - np.array([pdist(ensemble).mean() for ensemble in draws]) / 2


def _inside(ranks: np.ndarray, n: int, level: float) -> np.ndarray:
    """Whether ranks among n draws lie in the central interval of a level; shape of the ranks."""
    return np.abs((ranks + 0.5) / (n + 1) - 0.5) <= level / 2


def calibrate(draws: np.ndarray, truth: np.ndarray, levels: Sequence[float] = (0.5, 0.9)) -> Calibration:
    """Ranks, coverage and energy score of draws for held-out pairs.

    An interval of level p is made of the ranks whose centre (rank + 1/2) / (n + 1) lies within p / 2 of one half; where
    n + 1 is a multiple of 20, levels of 50 % and 90 % are met exactly.

    Parameters
    ----------
    draws : numpy.ndarray
        n independent draws of the sampler for the measurement of each of m pairs, shape (m, n, r), n >= 2.
    truth : numpy.ndarray
        Latents of the pairs, shape (m, r).
    levels : sequence of float
        Of the central intervals, between 0 and 1.
    """
    levels = [check_number(level, "A level", above=0, below=1) for level in check_all(levels, "levels", Real, "levels")]
    ranks, score = sbc_ranks(draws, truth), energy_score(draws, truth)
    n = np.shape(draws)[1]
    coverage = {level: float(_inside(ranks, n, level).mean()) for level in levels}
    return Calibration(ranks, sbc_p_values(ranks, n), coverage, score, n)


def calibrate_model(model: "Model", data: "DataSet", *, seed: int, draws: int = 99, leading: int | None = None,
                    levels: Sequence[float] = (0.5, 0.9), sampler: Sampler = Sampler()) -> Calibration:
    """Calibration of a trained model in its latents, on pairs that were not used in training (collective).

    Parameters
    ----------
    model : Model
        For fixed sensors. The noise is that of its problem; where that has none, the readings hold it already.
    data : DataSet
        Held-out pairs, from `simulate` with another seed.
    seed, draws : int
        Of noise and draws; draws a pair.
    leading : int, optional
        Look at the first latents only, those with the largest prior variance; all where left out.
    levels : sequence of float
        As for `calibrate`.

    InputError is raised for arguments out of range, and for a family, where each pair would need sensors of its own.
    """
    from fem_diffusion.citations import cite
    from fem_diffusion.fields.coefficients import on_root

    seed, draws, leading = alike(model.problem.comm, lambda: {
        "seed": check_seed(seed), "draws": check_count(draws, "draws", least=2),
        "leading": None if leading is None else check_count(leading, "leading")})
    check_kind(sampler, "sampler", Sampler, "a Sampler(...)")
    if model.problem.family:
        raise InputError("A family is calibrated for chosen sensors: draw from `model.condition(y, sensors, noise)` "
                         "for each pair, and pass the draws to calibrate.")
    y, noise = torch.from_numpy(check_array(data.readings, "The readings", ("n", "k"))), model.problem.noise
    if model.problem.levels:
        y = torch.cat([y, torch.from_numpy(model.problem.normal_levels(np.asarray(data.coefficients)))], 1)
    truth = model.basis.encode(data.coefficients)

    def run() -> Calibration:
        measured = y if noise is None else noise.sample(y, torch.Generator().manual_seed(seed))
        z = sample_latents(model.denoiser.at(measured), draws, sampler, seed=seed + 1,
                           progress=False).cpu().numpy()
        return calibrate(z[:, :, :leading], truth[:, :leading], levels)
    cite("Talts2018")
    return on_root(model.problem.comm, run)
