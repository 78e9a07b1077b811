"""What the package asks of a prior: the door for priors of users' own."""

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
    """Distribution of a parameter, a random Function.

    A class of your own inherits from it, sets `V` and writes `sample_many`: the rest follows, without a transform. For
    a function from seed to Function there is `CallablePrior`.

    Attributes
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Space of the parameter.
    core : Prior
        Prior of the field before any transform; the prior itself where there is none.
    """

    V: WithGeometry

    @property
    def core(self) -> "Prior":
        """Prior of the field before any transform."""
        return self

    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """Draw n samples (collective).

        Parameters
        ----------
        n : int
            Number of samples.
        seed : int
            Non-negative; the same seed gives the same samples, on any number of ranks.

        Returns
        -------
        numpy.ndarray
            Owned coefficients in ``V``, shape (n, n_owned).

        Raises
        ------
        InputError
            If n is no positive or seed no non-negative integer.
        """
        ...

    def sample(self, seed: int) -> Function:
        """Draw one sample, a new Function in ``V``; arguments as for `sample_many`."""
        return field(self.V, self.sample_many(1, seed)[0])

    def transform_many(self, values: np.ndarray) -> np.ndarray:
        """Parameters of fields (collective); InputError unless `values` are finite coefficients of fields.

        Parameters
        ----------
        values : numpy.ndarray
            Owned coefficients in ``core.V``, shape (n, n_owned of core.V).

        Returns
        -------
        numpy.ndarray
            Owned coefficients in ``V``, shape (n, n_owned).
        """
        return check_rows(values, self.core.V, "values")

    def pull_back(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Derivative of the transform at a field, transposed, times rows: the chain rule for gradients (collective).

        Parameters
        ----------
        rows : numpy.ndarray
            Owned dual coefficients in ``V``, shape (k, n_owned of V).
        at : numpy.ndarray
            Owned coefficients of the field, shape (n_owned of core.V,).

        Returns
        -------
        numpy.ndarray
            Owned dual coefficients, shape (k, n_owned of core.V).

        Raises
        ------
        InputError
            If an array is of another shape or not finite, or the transform has no derivative.
        """
        return check_rows(rows, self.V, "rows")

    def slope_many(self, values: np.ndarray) -> np.ndarray:
        """Derivative of a pointwise transform between fields of one space (collective).

        Parameters
        ----------
        values : numpy.ndarray
            As for `transform_many`.

        Returns
        -------
        numpy.ndarray
            Derivative of each coefficient of the parameter by that of the field, shape (n, n_owned).

        Raises
        ------
        InputError
            If the transform is not pointwise: use `pull_back`.
        """
        return np.ones_like(check_rows(values, self.core.V, "values"))


@runtime_checkable
class GaussianCore(Prior, Protocol):
    """A Gaussian prior, of which Karhunen-Loeve modes and exact posteriors can be made.

    Attributes
    ----------
    mean : firedrake.Function
        In ``V``.
    bcs : tuple of firedrake.DirichletBC
        Conditions that every sample satisfies.
    """

    mean: Function
    bcs: tuple[DirichletBC, ...]

    def apply_covariance(self, x: np.ndarray) -> np.ndarray:
        """Apply the covariance to owned dual coefficients (k, n_owned): owned coefficients of that shape (collective).

        InputError if x has another shape, or is not real and finite.
        """
        ...


def check_prior(prior: object, name: str = "prior") -> Prior:
    """One of our priors, or one of a class of the user's own."""
    if isinstance(prior, type) or not isinstance(prior, Prior) or not isinstance(prior.V, WithGeometry):
        found = "a class" if isinstance(prior, type) else type(prior).__name__
        raise InputError(f"{name} is {found}: give a prior, such as GaussianPrior(...), "
                         "CallablePrior(V, sample) for a sampler of your own, or a class that inherits from Prior.")
    return prior
