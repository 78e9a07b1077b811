"""What the package asks of a prior: the door for priors of users' own."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from firedrake import DirichletBC, Function
from firedrake.functionspaceimpl import WithGeometry

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import field
from fem_diffusion.fields.checks import check_rows

__all__ = ["GaussianCore", "Prior", "check_prior"]


@runtime_checkable
class Prior(Protocol):
    """Distribution of a parameter, a random Function in the space `V`.

    A class of your own inherits from it, sets `V` and writes `sample_many`: the rest follows, without a transform. For
    a function from seed to Function there is `CallablePrior`.
    """

    V: WithGeometry

    @property
    def core(self) -> "Prior":
        """Prior of the field before any transform; the prior itself where there is none."""
        return self

    @property
    def allows(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """Which fields before any transform, (n, n_owned of core.V) to (n,), a prior is restricted to; None of all."""
        return None

    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """Draw n samples: coefficients in ``V``, shape (n, n_owned).

        The same seed gives the same samples, on any number of ranks. InputError if n is no positive or seed no
        non-negative integer.
        """
        ...

    def sample(self, seed: int) -> Function:
        """Draw one sample, a new Function in ``V``; the seed is as for `sample_many`."""
        return field(self.V, self.sample_many(1, seed)[0])

    def transform_many(self, values: np.ndarray) -> np.ndarray:
        """Parameters of fields: coefficients in ``core.V``, shape (n, n_owned), to those in ``V``, (n, n_owned of V).

        InputError if `values` are of another shape, or not real and finite.
        """
        return check_rows(values, self.core.V, "values")

    def pull_back(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Derivative of the transform at one field, transposed, times rows: the chain rule for gradients.

        It serves any transform, whatever the two spaces, and assembles a matrix for each field; where the transform is
        pointwise and there are many fields, `slope_many` is cheaper.

        Parameters
        ----------
        rows : numpy.ndarray
            Dual coefficients in ``V``, shape (k, n_owned of V); the result is in ``core.V``, (k, n_owned of core.V).
        at : numpy.ndarray
            Coefficients of the field, shape (n_owned of core.V,).

        Raises
        ------
        InputError
            If an array is of another shape or not finite, or the transform has no derivative.
        """
        return check_rows(rows, self.V, "rows")

    def slope_many(self, values: np.ndarray) -> np.ndarray:
        """Derivative of a pointwise transform between fields of one space, of each coefficient: shape (n, n_owned).

        It is the diagonal that `pull_back` multiplies by, at many fields for one interpolation each. `values` are as
        for `transform_many`; InputError if the transform is not pointwise, where `pull_back` serves.
        """
        return np.ones_like(check_rows(values, self.core.V, "values"))


@runtime_checkable
class GaussianCore(Prior, Protocol):
    """A Gaussian prior, for Karhunen-Loeve modes and exact posteriors; every sample satisfies `bcs`."""

    mean: Function
    bcs: tuple[DirichletBC, ...]

    def apply_covariance(self, x: np.ndarray) -> np.ndarray:
        """Apply the covariance to dual coefficients (k, n_owned): coefficients of that shape.

        InputError if x has another shape, or is not real and finite.
        """
        ...

    def pointwise_std(self, exact: bool = False) -> Function:
        """Standard deviation of the samples at the nodes, in ``V``; InputError of a prior that does not tell it."""
        raise InputError(f"{type(self).__name__} does not tell its pointwise standard deviation: take that of draws.")


def check_prior(prior: object, name: str = "prior") -> Prior:
    """One of our priors, or one of a class of the user's own."""
    if isinstance(prior, type) or not isinstance(prior, Prior) or not isinstance(prior.V, WithGeometry):
        found = "a class" if isinstance(prior, type) else type(prior).__name__
        raise InputError(f"{name} is {found}: give a prior, such as GaussianPrior(...), "
                         "CallablePrior(V, sample) for a sampler of your own, or a class that inherits from Prior.")
    return prior
