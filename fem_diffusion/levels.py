"""Unknown levels of noise: numbers beside the parameter, on which the forward problem does not depend."""

from typing import Any

import numpy as np
from firedrake import Function, FunctionSpace
from firedrake.functionspaceimpl import WithGeometry
from scipy.sparse import spmatrix

from fem_diffusion.fields.coefficients import coefficients, field, owned_size
from fem_diffusion.forward.protocol import Differentiable, Forward
from fem_diffusion.marginal import Marginal
from fem_diffusion.prior.product import ProductPrior
from fem_diffusion.prior.protocol import Prior
from fem_diffusion.prior.scalar import ScalarPrior

__all__ = ["Beside", "beside", "with_levels"]


class Beside:
    """A forward problem whose parameter in M has further components, the last ones, that it does not see.

    `prior` is that of its own parameter, `levels` the laws of the numbers beside it.
    """

    def __init__(self, inner: Forward, M: WithGeometry, prior: Prior, levels: tuple[Marginal, ...]):
        self.inner, self.M, self.prior, self.levels, self._owned = inner, M, prior, levels, owned_size(prior.V)

    @property
    def U(self) -> WithGeometry | None:
        """Space of the state."""
        return self.inner.U

    def own(self, m: Function) -> Function:
        """The forward problem's own parameter."""
        return field(self.prior.V, coefficients(m)[:self._owned])

    def __call__(self, m: Function) -> Function:
        """As `Forward`."""
        return self.inner(self.own(m))

    def solve_many(self, parameters: np.ndarray) -> np.ndarray:
        """As `Forward.solve_many`."""
        return self.inner.solve_many(np.ascontiguousarray(parameters[:, :self._owned]))

    def __repr__(self) -> str:
        return repr(self.inner)


class _BesideDerivative(Beside):
    """The same, with the derivative that the inner one has."""

    inner: Differentiable

    def sensitivity(self, m: Function, rows: spmatrix | np.ndarray) -> np.ndarray:
        """As `Differentiable.sensitivity`."""
        found: Any = self.inner.sensitivity(self.own(m), rows)
        dense = np.asarray(found.toarray() if hasattr(found, "toarray") else found)
        return np.hstack([dense, np.zeros((len(dense), owned_size(self.M) - self._owned))])


def beside(inner: Forward, like: Beside) -> Beside:
    """Another forward problem beside the same numbers, with a derivative where it has one."""
    kind = _BesideDerivative if isinstance(inner, Differentiable) else Beside
    return kind(inner, like.M, like.prior, like.levels)   # pyright: ignore[reportArgumentType]


def with_levels(prior: Prior, forward: Forward, levels: tuple[Marginal, ...]) -> tuple[Prior, Beside]:
    """Prior and forward problem with one more number for each level of noise, in spaces named "noise level"."""
    mesh = next(iter(prior.V)).mesh()
    names = ["noise level"] if len(levels) == 1 else [f"noise level {i}" for i in range(len(levels))]
    numbers = [ScalarPrior(FunctionSpace(mesh, "R", 0, name=name), level.distribution)
               for name, level in zip(names, levels)]
    whole = ProductPrior([prior, *numbers])
    return whole, beside(forward, Beside(forward, whole.V, prior, levels))
