"""Priors of numbers of any law: rates, strengths, times."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from firedrake.functionspaceimpl import WithGeometry

from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_rows, check_space
from fem_diffusion.fields.coefficients import is_real, owned_size
from fem_diffusion.marginal import Marginal
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.protocol import Prior

__all__ = ["ScalarPrior"]


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

    Raises
    ------
    InputError
        If the space is not of numbers, a distribution is discrete, multivariate or not frozen, its quantiles fail, or
        there are not as many as numbers.
    """

    def __init__(self, V: WithGeometry, distribution: Any) -> None:
        self.V = check_space(V)
        if len(V) > 1 or not is_real(V):
            raise InputError(f'V is {V.ufl_element()}: a ScalarPrior is of numbers, FunctionSpace(mesh, "R", 0); of a '
                             "field take TransformedPrior.")
        given = isinstance(distribution, Sequence)
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
        for column, marginal in zip(values.T, self._own):
            column[:] = marginal.of_normal(column)
        return values

    def pull_back(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """As `Prior.pull_back`."""
        return check_rows(rows, self.V, "rows") * self.slope_many(np.asarray(at)[None])

    def slope_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.slope_many`."""
        values = check_rows(values, self.V, "values")
        for column, marginal in zip(values.T, self._own):
            column[:] = marginal.slope(column)
        return values

    def __repr__(self) -> str:
        laws = [repr(marginal) for marginal in self.marginals]
        same = len(set(laws)) == 1 and len(laws) > 1
        return f"ScalarPrior({self.V.name or 'number'} ~ {laws[0] if same else ', '.join(laws)}{' each' * same})"
