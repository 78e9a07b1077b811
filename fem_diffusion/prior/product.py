"""Several unknowns at once: independent priors as one prior on a mixed space.

Every coefficient array holds *owned* coefficients, those of the first component first, then those of the second, ...:
this rank's part of ``with f.dat.vec_ro as v: v.array`` for a mixed ``f``.
"""

from functools import cached_property

import numpy as np
from firedrake import DirichletBC, MixedFunctionSpace

from fem_diffusion.checks import check_all, check_seed
from fem_diffusion.fields.modes import split
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, field
from fem_diffusion.fields.doors import check_prior, check_rows

__all__ = ["ProductPrior"]


class ProductPrior:
    """Independent priors of several unknowns.

    Its samples are mixed Functions; a solver takes them apart with ``m.subfunctions`` or ``split(m)``. Spaces may be
    on one mesh, or on a mesh and submeshes of it: a coefficient inside and a flux through the boundary, for example.

    `karhunen_loeve` expands each component by itself, in its own units; so does `pod` where it is given a number of
    modes for each. A `TransformedPrior` may be a component, or may map a whole product into another space.

    Parameters
    ----------
    priors : sequence of GaussianPrior, TransformedPrior or CallablePrior
        At least two.

    Attributes
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Mixed space of the priors' spaces, in their order.
    priors : tuple
        The components.
    base : ProductPrior
        The product of the fields before the transforms; there only where a component is transformed.

    Raises
    ------
    InputError
        If there are less than two priors, one of them is a product or none at all, or they are on other communicators.
    """

    def __init__(self, priors):
        self.priors = check_all(priors, "priors", object, "priors")
        if len(self.priors) < 2:
            raise InputError(f"a product of {len(self.priors)} priors was asked for: give at least two")
        for i, prior in enumerate(self.priors):
            if len(check_prior(prior, f"prior {i}").V) != 1:
                raise InputError(f"prior {i} is {type(prior).__name__}: give a flat list of priors on spaces that are "
                                 "not mixed")
        if any(prior.V.comm.size != self.priors[0].V.comm.size for prior in self.priors):
            raise InputError("the priors live on different communicators: build them on one mesh and its submeshes")
        self.V = MixedFunctionSpace([prior.V for prior in self.priors])
        if any(hasattr(prior, "base") for prior in self.priors):
            self.base = ProductPrior([getattr(prior, "base", prior) for prior in self.priors])

    def sample(self, seed):
        """Draw one sample.

        Parameters
        ----------
        seed : int
            Non-negative; the components draw from independent streams made from it.

        Returns
        -------
        firedrake.Function
            In ``V``; its coefficients are ``sample_many(1, seed)[0]``.

        Raises
        ------
        InputError
            If seed is no non-negative integer.
        """
        return field(self.V, self.sample_many(1, seed)[0])

    def sample_many(self, n, seed):
        """Draw n samples (collective).

        Parameters
        ----------
        n : int
            Number of samples.
        seed : int
            Non-negative; the first samples do not depend on n.

        Returns
        -------
        numpy.ndarray
            Owned coefficients, shape (n, n_owned).

        Raises
        ------
        InputError
            If n is no positive or seed no non-negative integer.
        """
        # One seed for all components would give them the same white noise.
        seeds = np.random.SeedSequence(check_seed(seed)).generate_state(len(self.priors), np.uint64)
        return np.hstack([prior.sample_many(n, int(s)) for prior, s in zip(self.priors, seeds)])

    def transform_many(self, values):
        """Transform the components that are transformed (collective).

        Parameters
        ----------
        values : numpy.ndarray
            Owned coefficients in ``base.V``, shape (n, n_owned of base.V).

        Returns
        -------
        numpy.ndarray
            Owned coefficients in ``V``, shape (n, n_owned).

        Raises
        ------
        InputError
            If no component is transformed, or the coefficients have another shape.
        """
        if not hasattr(self, "base"):
            raise InputError("no component of this product is transformed: use the coefficients as they are")
        parts = _parts(self.base.V, values)
        return np.hstack([prior.transform_many(part) if hasattr(prior, "base") else part
                          for prior, part in zip(self.priors, parts)])

    @cached_property
    def mean(self):
        """Mean of all components, a Function in ``V``; InputError unless all are Gaussian."""
        return field(self.V, np.concatenate([coefficients(prior.mean) for prior in self._gaussian("mean")]))

    def apply_covariance(self, x):
        """Apply the covariance to dual coefficients (collective).

        Parameters
        ----------
        x : numpy.ndarray
            Owned dual coefficients, shape (k, n_owned).

        Returns
        -------
        numpy.ndarray
            Owned primal coefficients, shape (k, n_owned).

        Raises
        ------
        InputError
            If a component is not Gaussian, or x has another shape.
        """
        priors = self._gaussian("covariance")
        return np.hstack([prior.apply_covariance(part) for prior, part in zip(priors, _parts(self.V, x))])

    def pointwise_std(self, exact=False):
        """Standard deviation at the nodes.

        Parameters
        ----------
        exact : bool
            As for `GaussianPrior.pointwise_std`.

        Returns
        -------
        firedrake.Function
            In ``V``.

        Raises
        ------
        InputError
            Unless all components are Gaussian and `exact` is True or False.
        """
        parts = [coefficients(prior.pointwise_std(exact)) for prior in self._gaussian("standard deviation")]
        return field(self.V, np.concatenate(parts))

    @cached_property
    def bcs(self):
        """The components' Dirichlet conditions, on the components of ``V``: a tuple of DirichletBC."""
        conditions = []
        for i, prior in enumerate(self.priors):
            for bc in getattr(prior, "bcs", ()):
                space = bc.function_space()
                target = self.V.sub(i) if space.component is None else self.V.sub(i).sub(space.component)
                conditions.append(DirichletBC(target, bc.function_arg, bc.sub_domain))
        return tuple(conditions)

    def _gaussian(self, what):
        """The components, all of which have a covariance, or InputError."""
        for i, prior in enumerate(self.priors):
            if not hasattr(prior, "apply_covariance"):
                remedy = "use that of `base`" if hasattr(prior, "base") else "estimate it from sample_many"
                raise InputError(f"component {i} is a {type(prior).__name__}, whose {what} is not known: {remedy}")
        return self.priors


def _parts(V, values):
    """Owned coefficients (n, n_owned) of a mixed space, component by component."""
    return split(V, check_rows(values, V, "coefficients"))
