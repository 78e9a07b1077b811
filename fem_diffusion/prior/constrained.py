"""A prior restricted to the parameters that fulfil a condition."""

from collections.abc import Callable
from typing import Any

import numpy as np
from firedrake import Function

from fem_diffusion.checks import check_callable, check_count, check_seed, together
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_rows
from fem_diffusion.fields.coefficients import field
from fem_diffusion.prior.draws import prior_fields
from fem_diffusion.prior.protocol import Prior, check_prior

__all__ = ["ConstrainedPrior"]


class ConstrainedPrior(Prior):
    """A prior given that ``inside(m)`` is true: its density where that holds, and none elsewhere.

    The posterior is that of the unconstrained prior, restricted and scaled. So `simulate` and `fit` take no notice, and
    no pair is lost; all that hands out samples keeps to the constraint: draws that are outside are drawn again, chains
    and corrections do not go there, and nothing is solved there.

    Parameters
    ----------
    prior : Prior
        Of any kind, transformed or a product as well.
    inside : callable
        Maps a parameter, a Function, a copy, to True or False, the same on all ranks:
        ``lambda m: assemble(m * dx) < 1.0`` (collective).

    InputError if an argument is something else, or `inside` gives neither, or another answer on other ranks; SolveError
    of draws if hardly any fulfil the constraint.
    """

    def __init__(self, prior: Prior, inside: Callable[[Function], Any]) -> None:
        self._inner = check_prior(prior)
        self.inside = check_callable(inside, "inside", "a function of a Function that returns True or False", 1)
        self.V = self._inner.V

    @property
    def core(self) -> Prior:
        """Prior of the field before any transform, without the constraint."""
        return self._inner.core

    @property
    def allows(self) -> Callable[[np.ndarray], np.ndarray]:
        """As `Prior.allows`."""
        return self._allowed

    def _allowed(self, fields: np.ndarray) -> np.ndarray:
        fields = check_rows(fields, self.core.V, "fields")
        found = np.ones(len(fields), dtype=bool) if self._inner.allows is None else self._inner.allows(fields)
        values = self._inner.transform_many(fields[found])
        found[found] = [self._holds(row) for row in values]
        return found

    def _holds(self, values: np.ndarray) -> bool:
        comm = self.V.comm
        answer = together(comm, lambda: self.inside(field(self.V, values)), watched=True)
        answers = comm.allgather(bool(answer) if isinstance(answer, (bool, np.bool_)) else None)
        if None in answers or len(set(answers)) > 1:
            raise InputError(f"inside gives {answer!r}" + " on this rank, and another answer elsewhere" * (
                None not in answers) + ": let it return True or False, the same on all ranks, such as "
                "bool(assemble(m * dx) < 1).")
        return bool(answer)

    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """As `Prior.sample_many`; SolveError where the constraint allows hardly any draw."""
        return self.transform_many(prior_fields(self, check_count(n), check_seed(seed)))

    def transform_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.transform_many`."""
        return self._inner.transform_many(values)

    def pull_back(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """As `Prior.pull_back`."""
        return self._inner.pull_back(rows, at)

    def slope_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.slope_many`."""
        return self._inner.slope_many(values)

    def __repr__(self) -> str:
        return f"ConstrainedPrior({self._inner!r}, {getattr(self.inside, '__name__', 'inside')})"
