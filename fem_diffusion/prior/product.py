"""Several unknowns at once: independent priors as one prior on a mixed space."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeGuard

import numpy as np
from firedrake import DirichletBC, Function, MixedFunctionSpace
from firedrake.functionspaceimpl import WithGeometry

from fem_diffusion.checks import check_all, check_seed
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import by_component, coefficients, field
from fem_diffusion.fields.checks import check_rows
from fem_diffusion.prior.draws import prior_fields
from fem_diffusion.prior.protocol import GaussianCore, Prior, check_prior

__all__ = ["ProductPrior", "is_gaussian"]


class ProductPrior(Prior):
    """Independent priors of several unknowns.

    Its samples are mixed Functions; a solver takes them apart with ``m.subfunctions`` or ``split(m)``. Spaces may be
    on one mesh, or on a mesh and submeshes of it: a coefficient inside and a flux through the boundary, for example.

    Components may have several unknowns themselves, as a `HierarchicalPrior`; those of a product are taken as if they
    were in the list. `karhunen_loeve` expands each component by itself, in its own units; so does `pod` where it is
    given a number of modes for each. A `TransformedPrior` may be a component, or may map a whole product into another
    space.

    InputError if there are less than two `priors`, one of them is none, or they are on other communicators. `V` is the
    mixed space of their spaces, in their order.
    """

    def __init__(self, priors: Sequence[Prior]) -> None:
        given = [check_prior(prior, f"prior {i}")
                 for i, prior in enumerate(check_all(priors, "priors", object, "priors"))]
        if len(given) < 2:
            raise InputError(f"a product of {len(given)} priors was asked for: give at least two.")
        self.priors = tuple(part for prior in given for part in _flat(prior))
        if any(prior.V.comm.size != self.priors[0].V.comm.size for prior in self.priors):
            raise InputError("the priors live on different communicators: build them on one mesh and its submeshes.")
        self.V = MixedFunctionSpace([W for prior in self.priors for W in prior.V])
        self.V.dim()    # collective the first time, which no __repr__ must be
        transformed = any(prior.core is not prior for prior in self.priors)
        self._core = ProductPrior([prior.core for prior in self.priors]) if transformed else self
        # Numbers of components, of parameters and of fields before any transform.
        self._widths = [len(prior.V) for prior in self.priors]
        self._core_widths = [len(prior.core.V) for prior in self.priors]

    @property
    def core(self) -> "ProductPrior":
        """The product of the fields before the transforms; itself where no component is transformed."""
        return self._core

    @property
    def allows(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """As `Prior.allows`: what all components allow."""
        if all(prior.allows is None for prior in self.priors):
            return None
        return lambda fields: np.all([prior.allows(part) for prior, part in zip(
            self.priors, _parts(self.core.V, fields, self._core_widths)) if prior.allows is not None], axis=0)

    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """As `Prior.sample_many`; the components draw from independent streams made from the seed."""
        if self.core is not self:
            return self.transform_many(prior_fields(self, n, seed))
        # One seed for all components would give them the same white noise.
        seeds = np.random.SeedSequence(check_seed(seed)).generate_state(len(self.priors), np.uint64)
        return np.hstack([prior.sample_many(n, int(s)) for prior, s in zip(self.priors, seeds)])

    def transform_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.transform_many`."""
        parts = _parts(self.core.V, values, self._core_widths)
        return np.hstack([prior.transform_many(part) for prior, part in zip(self.priors, parts)])

    def pull_back(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """As `Prior.pull_back`."""
        parts = zip(self.priors, _parts(self.V, rows, self._widths),
                    _parts(self.core.V, np.asarray(at)[None], self._core_widths))
        return np.hstack([prior.pull_back(part, place[0]) for prior, part, place in parts])

    def slope_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.slope_many`."""
        parts = _parts(self.core.V, values, self._core_widths)
        return np.hstack([prior.slope_many(part) for prior, part in zip(self.priors, parts)])

    @cached_property
    def mean(self) -> Function:
        """Mean of all components, in ``V``; InputError unless all are Gaussian."""
        return field(self.V, np.concatenate([coefficients(prior.mean) for prior in self._gaussian("mean")]))

    def apply_covariance(self, x: np.ndarray) -> np.ndarray:
        """As `GaussianPrior.apply_covariance`; InputError, too, if a component is not Gaussian."""
        priors = self._gaussian("covariance")
        return np.hstack([prior.apply_covariance(part) for prior, part in zip(priors, _parts(self.V, x, self._widths))])

    def pointwise_std(self, exact: bool = False) -> Function:
        """As `GaussianPrior.pointwise_std`; InputError, too, if a component is not Gaussian."""
        parts = [coefficients(prior.pointwise_std(exact)) for prior in self._gaussian("standard deviation")]
        return field(self.V, np.concatenate(parts))

    @cached_property
    def bcs(self) -> tuple[DirichletBC, ...]:
        """The Gaussian components' Dirichlet conditions, on the components of ``V``."""
        conditions = []
        for i, prior in zip(np.cumsum([0, *self._widths]).tolist(), self.priors):
            for bc in prior.bcs if isinstance(prior, GaussianCore) else ():
                space = bc.function_space()
                target = self.V.sub(i) if space.component is None else self.V.sub(i).sub(space.component)
                conditions.append(DirichletBC(target, bc.function_arg, bc.sub_domain))
        return tuple(conditions)

    def _gaussian(self, what: str) -> tuple[GaussianCore, ...]:
        """The components, all of which have a covariance, or InputError."""
        for i, prior in enumerate(self.priors):
            if not isinstance(prior, GaussianCore):
                remedy = "use that of `core`" if prior.core is not prior else "estimate it from sample_many"
                raise InputError(f"component {i} is a {type(prior).__name__}, whose {what} is not known: {remedy}.")
        return tuple(prior for prior in self.priors if isinstance(prior, GaussianCore))

    def __repr__(self) -> str:
        return f"ProductPrior({list(self.priors)!r})"


def is_gaussian(prior: Prior) -> TypeGuard[GaussianCore]:
    """Whether a prior, or every component of a product, is Gaussian and known by mean and covariance."""
    return all(isinstance(part, GaussianCore) for part in _flat(prior))


def _flat(prior: Prior) -> tuple[Prior, ...]:
    """The components of a product, or a prior that is none."""
    return prior.priors if isinstance(prior, ProductPrior) else (prior,)


def _parts(V: WithGeometry, values: np.ndarray, widths: Sequence[int]) -> list[np.ndarray]:
    """Owned coefficients (n, n_owned) of a mixed space, checked, in parts of so many components."""
    components = iter(by_component(V, check_rows(values, V, "coefficients")))
    return [np.hstack([next(components) for _ in range(width)]) for width in widths]
