"""Priors of transformed fields, and priors of users' own samplers."""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import ufl
from firedrake import H1, Constant, Function, TrialFunction, assemble, conditional, interpolate, lt
from firedrake.functionspaceimpl import WithGeometry
from numpy.typing import ArrayLike
from pyadjoint import no_annotations
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.algorithms.analysis import extract_type
from ufl.constantvalue import Zero
from ufl.core.expr import Expr
from ufl.differentiation import Derivative

from fem_diffusion.checks import alike, check_array, check_callable, check_count, check_seed, together
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import (
    check_expression, check_reproduced, check_rows, check_space, prepared_interpolation,
)
from fem_diffusion.fields.coefficients import assign, coefficients, field, is_real, multiply, owned_size
from fem_diffusion.prior.draws import prior_fields
from fem_diffusion.prior.protocol import Prior, check_prior

__all__ = ["CallablePrior", "TransformedPrior", "level_set"]


def level_set(values: ArrayLike, thresholds: ArrayLike) -> Callable[[Expr], Expr]:
    """Transform for `TransformedPrior` that takes one of several values, by the level of a scalar field.

    The n + 1 values hold below the first threshold, between the first and second, ..., from the last on. InputError
    unless all are finite and the n thresholds strictly increase.
    """
    values, thresholds = check_array(values, "values", ("n",)), check_array(thresholds, "thresholds", ("n",))
    if len(values) != len(thresholds) + 1 or not len(thresholds):
        raise InputError(f"got {len(values)} values and {len(thresholds)} thresholds: give one value more.")
    if not np.all(np.diff(thresholds) > 0):
        raise InputError(f"thresholds are {thresholds}: give them strictly increasing.")

    def transform(f: Expr) -> Expr:
        if not isinstance(f, Expr) or f.ufl_shape:
            raise InputError("level_set takes levels of a scalar field: give a scalar UFL expression, or a component.")
        expression = Constant(values[-1])
        for value, threshold in reversed(list(zip(values, thresholds))):
            expression = conditional(lt(f, threshold), Constant(value), expression)
        return expression
    return transform


class TransformedPrior(Prior):
    """Prior of a transformed field, ``m = transform(field)``; the prior of the field may be transformed itself.

    Parameters
    ----------
    transform : callable
        Maps the field (a Function) to a UFL expression, e.g. ``firedrake.exp`` or ``level_set(...)``; the parts of a
        mixed field are ``split(field)``.
    V : firedrake.functionspaceimpl.WithGeometry, optional
        Space of the parameter, into which the expression is interpolated; default ``prior.V``.

    Raises
    ------
    InputError
        If the transform gives no UFL expression, one of another value shape than V or one that varies where V is
        constant, or Firedrake cannot interpolate into V.
    """

    def __init__(self, prior: Prior, transform: Callable[[Function], Expr], V: WithGeometry | None = None) -> None:
        self._inner = check_prior(prior)
        self.transform = check_callable(transform, "transform", "a function that maps the field to a UFL expression", 1)
        self.V = self._inner.V if V is None else check_space(V)
        self._field, self._result = Function(self._inner.V), Function(self.V)
        try:
            expression = transform(self._field)
        except TypeError as error:
            raise InputError(f"transform fails with a Function ({error}): write it in UFL, with exp and sqrt from "
                             "firedrake and not from numpy.") from error
        if not isinstance(expression, Expr):
            raise InputError(f"transform gave {type(expression).__name__}: let it return a UFL expression.")
        if expression.ufl_shape != self.V.value_shape:
            raise InputError(f"transform gave value shape {expression.ufl_shape}, the space has "
                             f"{self.V.value_shape}: change the transform or pass another V.")
        meshes = (*(W.mesh() for W in self._inner.V), self.V.mesh())
        self._expression = check_expression(expression, "what transform gave", meshes)
        try:
            self._interpolate = prepared_interpolation(expression, self._result)
        except NotImplementedError as error:
            raise InputError(f"Firedrake cannot interpolate into {self.V.ufl_element()} ({error}): pass a V whose "
                             "coefficients are point values, such as CG or DG.") from error
        if "Real" in repr(self.V.ufl_element()):
            self.transform_many(coefficients(self.core.sample(0))[None])
            check_reproduced(expression, self._result, "the transform")

    @property
    def core(self) -> Prior:
        """Prior of the field before all transforms."""
        return self._inner.core

    def sample(self, seed: int) -> Function:
        """Draw one sample, a Function in ``V``: the transform of ``core.sample(seed)``, where all are allowed."""
        if self.allows is not None:
            return field(self.V, self.sample_many(1, seed)[0])
        return field(self.V, self.transform_many(coefficients(self.core.sample(seed))[None])[0])

    @property
    def allows(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """As `Prior.allows`, of the prior that is transformed."""
        return self._inner.allows

    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """As `Prior.sample_many`."""
        return self.transform_many(prior_fields(self, n, seed))

    def __repr__(self) -> str:
        name = getattr(self.transform, "__name__", "transform")
        return f"TransformedPrior({name} of {self._inner}, {self.V.dim()} unknowns)"

    def transform_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.transform_many`: one interpolation for each field."""
        return self._each(self._inner.transform_many(values), self._interpolate, self._result)

    @no_annotations
    def _each(self, values: np.ndarray, run: Callable[[], object], result: Function) -> np.ndarray:
        """Coefficients of a result that is interpolated anew for each of the fields that the transform sees."""
        outcome = np.empty((len(values), owned_size(result.function_space())))
        for row, source in zip(outcome, values):
            assign(self._field, source)
            run()
            row[:] = coefficients(result)
        return outcome

    def _derivative(self, direction: Expr) -> Expr:
        """UFL derivative of the transform in a direction, which may be an argument."""
        if len(self._inner.V) > 1 and set(self._field.subfunctions) & set(extract_coefficients(self._expression)):
            raise InputError("The transform has no derivative: write the parts of a mixed field as split(field).")
        # UFL's own types know derivatives of forms alone.
        return expand_derivatives(ufl.derivative(  # pyright: ignore[reportReturnType]
            self._expression, self._field, direction))

    @no_annotations
    def pull_back(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """As `Prior.pull_back`, by the UFL derivative."""
        rows = check_rows(rows, self.V, "rows")
        assign(self._field, self._inner.transform_many(np.asarray(at)[None])[0])
        return self._inner.pull_back(self._transposed(rows), at)

    def _transposed(self, rows: np.ndarray) -> np.ndarray:
        """Transposed derivative of this transform alone, at the field that is set, times rows (k, n_owned of V)."""
        V, numbers = self._inner.V, any(is_real(W) for W in (*self._inner.V, *self.V))
        direction = Function(V) if numbers else TrialFunction(V)
        slope = self._derivative(direction)
        if isinstance(slope, Zero):
            return np.zeros((len(rows), owned_size(V)))
        if not numbers:
            # Nodes that cells share would take the value of one cell in the field, and of another in the matrix.
            if self.V.ufl_element() in H1 and self.V.mesh() is V.mesh() and (
                    extract_type(slope, Derivative) or len(V) == 1 and V.ufl_element() not in H1):
                raise InputError(f"The transform has several values at the nodes of {self.V.ufl_element()}, one for "
                                 "each cell, and no derivative there: give TransformedPrior a V of DG elements.")
            matrix = assemble(interpolate(slope, self.V), mat_type="aij").petscmat
            result = multiply(matrix, rows, transpose=True)
            matrix.destroy()
            return result
        # Firedrake has no matrix to or from numbers: one direction after the other.
        change, columns = Function(self.V), np.zeros((V.dim(), len(rows)))
        run, n = prepared_interpolation(slope, change), owned_size(V)
        mine = sum(V.comm.allgather(n)[:V.comm.rank]) + np.arange(n)
        for i in range(len(columns)):
            assign(direction, mine == i)
            run()
            columns[i] = rows @ coefficients(change)
        return V.comm.allreduce(columns)[mine].T

    def slope_many(self, values: np.ndarray) -> np.ndarray:
        """As `Prior.slope_many`, by interpolation of the UFL derivative."""
        inner, run = self._inner.transform_many(values), self._slope[0]
        outer = np.zeros_like(inner) if run is None else self._each(inner, run, self._slope[1])
        return outer * self._inner.slope_many(values)

    @cached_property
    def _slope(self) -> tuple[Callable[[], object] | None, Function]:
        """Interpolation of the derivative in the direction of one, and its result; None where it is zero."""
        V = self._inner.V
        pointwise = V == self.V and len(V) == 1 and not V.value_shape and (
            is_real(V) or V.finat_element.has_pointwise_dual_basis)
        if not pointwise or extract_type(self._expression, Derivative):
            raise InputError("The transform is not pointwise between scalar fields of one space: use pull_back.")
        slope, result = self._derivative(Constant(1.0)), Function(V)
        return None if isinstance(slope, Zero) else prepared_interpolation(slope, result), result


class CallablePrior(Prior):
    """Prior in V by the user's own sampler, from an integer seed to a Function: the same seed has to give the same."""

    def __init__(self, V: WithGeometry, sample: Callable[[int], Function]) -> None:
        self.V = check_space(V)
        self._sample = check_callable(sample, "sample", "a function from seed to Function", 1)

    def sample(self, seed: int) -> Function:
        """Draw one sample, a new Function in ``V``; InputError if the sampler returns anything else."""
        seed, = alike(self.V.comm, lambda: {"seed": check_seed(seed)})
        f = together(self.V.comm, lambda: self._sample(seed), watched=True)
        got = f.function_space() if isinstance(f, Function) else type(f).__name__
        if got != self.V:
            raise InputError(f"the sampler returned {got}, expected a Function in {self.V}: interpolate it "
                             "into the prior's space.")
        return field(self.V, coefficients(f))

    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """As `Prior.sample_many`, with seeds derived from seed."""
        n, seed = alike(self.V.comm, lambda: {"n": check_count(n), "seed": check_seed(seed)})
        seeds = np.random.SeedSequence(seed).generate_state(n)
        return np.array([coefficients(self.sample(int(s))) for s in seeds])

    def __repr__(self) -> str:
        return f"CallablePrior({self.V.dim()} unknowns, {self.V.ufl_element()})"
