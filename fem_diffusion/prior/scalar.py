"""Priors of numbers of any law: rates, strengths, times."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from firedrake.functionspaceimpl import WithGeometry
from scipy.special import log_ndtr, ndtri_exp
from scipy.stats import norm

from fem_diffusion.checks import check_flag
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_rows, check_space
from fem_diffusion.fields.coefficients import is_real, owned_size
from fem_diffusion.marginal import Marginal
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.protocol import Prior

__all__ = ["ScalarPrior"]

_END = 37.0     # normal scores beyond which double precision knows no probabilities


class ScalarPrior(Prior):
    """Independent numbers of any continuous law, ``x = F⁻¹(Φ(z))`` of a standard normal z; no sample leaves its bounds.

    `core` is the law of z, so bases, references and corrections work as for Gaussian fields, alone and in a
    `ProductPrior`. Summaries call the numbers by the name of the space.

    Parameters
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Space of family "R", scalar or vector: ``FunctionSpace(mesh, "R", 0, name="rate")``.
    distribution : scipy.stats frozen distribution, or sequence of them
        Of every number, or one for each, in the units of the numbers: ``scipy.stats.lognorm(0.5, scale=2)``,
        ``uniform(1, 2)`` (from 1 to 3), ``loguniform(1e-3, 1)``; see `Marginal` for which will do.

    ordered : bool
        Whether the numbers, of one law, grow from the first to the last: they are then its order statistics, the law of
        independent numbers given that order, x_k = F⁻¹(U_k) with ``log U_k = Σ_{j >= k} log Φ(z_j) / j`` (Devroye 1986,
        section V.3.2).

    Raises
    ------
    InputError
        If the space is not of numbers, a distribution is discrete, multivariate or not frozen, its quantiles fail,
        there are not as many as numbers, or ordered numbers have several laws.
    """

    def __init__(self, V: WithGeometry, distribution: Any, *, ordered: bool = False) -> None:
        self.V, self.ordered = check_space(V), check_flag(ordered, "ordered")
        if len(V) > 1 or not is_real(V):
            raise InputError(f'V is {V.ufl_element()}: a ScalarPrior is of numbers, FunctionSpace(mesh, "R", 0); of a '
                             "field take TransformedPrior.")
        given = isinstance(distribution, Sequence)
        if given and self.ordered:
            raise InputError("ordered numbers have one law: give one distribution, and leave the list out.")
        if given and len(distribution) != V.dim():
            raise InputError(f"distribution has {len(distribution)} entries for {V.dim()} numbers: give one for each, "
                             "or one alone.")
        self.marginals = tuple(Marginal(one, f"distribution {i}" if given else "distribution")
                               for i, one in enumerate(distribution if given else [distribution]))
        if not given:
            self.marginals *= V.dim()
        start = sum(V.comm.allgather(owned_size(V))[:V.comm.rank])
        self._own, self._core = self.marginals[start:start + owned_size(V)], GaussianPrior(V, std=1.0)

    @property
    def core(self) -> GaussianPrior:
        """The standard normal numbers."""
        return self._core

    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """As `Prior.sample_many`."""
        return self.transform_many(self.core.sample_many(n, seed))

    def transform_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.transform_many`."""
        values = check_rows(values, self.V, "values")
        if self.ordered:
            values = _scores(values)[0]
        for column, marginal in zip(values.T, self._own):
            column[:] = marginal.of_normal(column)
        return values

    def pull_back(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """As `Prior.pull_back`."""
        rows, values = check_rows(rows, self.V, "rows"), check_rows(np.asarray(at)[None], self.V, "at")
        if not self.ordered:
            return rows * self._slopes(values)
        scores, to_sums, from_latents = _scores(values)
        # The derivative of x_k by z_j is a product, where j >= k.
        return np.cumsum(rows * self._slopes(scores) * to_sums, axis=1) * from_latents

    def slope_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.slope_many`; InputError, too, for ordered numbers, which do not depend on one latent each."""
        if self.ordered:
            raise InputError("Ordered numbers depend on several latents each: use pull_back.")
        return self._slopes(check_rows(values, self.V, "values"))

    def _slopes(self, values: np.ndarray) -> np.ndarray:
        """Derivatives of the quantiles at normal scores (n, n_owned), which are overwritten."""
        for column, marginal in zip(values.T, self._own):
            column[:] = marginal.slope(column)
        return values

    def __repr__(self) -> str:
        laws = [repr(marginal) for marginal in self.marginals]
        same = len(set(laws)) == 1 and len(laws) > 1
        order = ", ordered" * self.ordered
        return f"ScalarPrior({self.V.name or 'number'} ~ {laws[0] if same else ', '.join(laws)}{' each' * same}{order})"


def _scores(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal scores y (n, b) of growing numbers from independent ones z (n, b), and two factors of their derivative.

    They are dy_k / d log U_k, and d log U_k / dz_j of all k <= j.
    """
    j = np.arange(1, z.shape[1] + 1)
    logs = log_ndtr(z)
    sums = np.cumsum((logs / j)[:, ::-1], axis=1)[:, ::-1]
    with np.errstate(divide="ignore"):
        y = np.where(sums < -0.5, ndtri_exp(sums), -ndtri_exp(np.log(-np.expm1(sums))))
    # Beyond what double precision resolves.
    y = np.clip(y, -_END, _END)
    return y, np.exp(sums - norm.logpdf(y)), np.exp(norm.logpdf(z) - logs) / j
