r"""Prior distributions of an unknown field, as random Functions on the user's own mesh.

A Gaussian prior is a Whittle-Matérn field: the solution of ``(1 - L² Δ)^(m/2) w = white noise`` has, on an
unbounded domain of dimension d, the Matérn correlation of smoothness ``ν = m - d/2`` and length
``ℓ = L sqrt(2ν)`` (Lindgren, Rue and Lindström 2011, eq. 1 to 3).  In matrices, with mass ``M``,
``K = M + L² A + Robin`` and ``b ~ N(0, M)`` (Croci et al. 2018; Weaver and Mirouze 2013; as in
``firedrake.adjoint.AutoregressiveCovariance``):

    draw        m̄ + D R b,       R = (K⁻¹ M)^(m/2-1) K⁻¹
    covariance  C = D R M Rᵀ D,   D = diag(std / sqrt(diag(R₀ M R₀ᵀ)))

``D`` makes the pointwise standard deviation the user's ``std`` everywhere; its ``R₀`` knows no Dirichlet
condition, so near Dirichlet parts the variance of ``C`` goes to zero as it should.  The Robin term
``(L/1.42) u v ds`` (Daon and Stadler 2018) keeps the correlation near a boundary close to the one inside.
The operator and its factorisation are Firedrake's; added here are many right-hand sides at once, white noise
that does not depend on the numbering of a distributed mesh, and the pointwise variance.

Every coefficient array holds *owned* coefficients: this rank's part of ``with f.dat.vec_ro as v: v.array``.
"""

import numpy as np
from firedrake import Constant, Function, conditional, lt
from pyadjoint import no_annotations
from ufl.core.expr import Expr

from fem_diffusion.checks import check_array, check_callable, check_count, check_seed
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, field, owned_size
from fem_diffusion.fields.checks import check_reproduced, prepared_interpolation
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.fields.doors import check_expression, check_prior, check_rows, check_space
from fem_diffusion.prior.matern import matern_correlation

__all__ = ["GaussianPrior", "TransformedPrior", "CallablePrior", "level_set", "matern_correlation"]


def level_set(values, thresholds):
    """Transform that takes one of several values, by the level of the field.

    Parameters
    ----------
    values : sequence of float
        The n + 1 values: below the first threshold, between the first and second, ..., from the last on.
    thresholds : sequence of float
        The n thresholds, strictly increasing.

    Returns
    -------
    callable
        Maps a scalar UFL expression to a UFL expression; for `TransformedPrior`.

    Raises
    ------
    InputError
        If they are not finite numbers, the thresholds do not increase, or there is not one value more than thresholds.
    """
    values, thresholds = check_array(values, "values", ("n",)), check_array(thresholds, "thresholds", ("n",))
    if len(values) != len(thresholds) + 1 or not len(thresholds):
        raise InputError(f"got {len(values)} values and {len(thresholds)} thresholds: give one value more")
    if not np.all(np.diff(thresholds) > 0):
        raise InputError(f"thresholds are {thresholds}: give them strictly increasing")

    def transform(f):
        if not isinstance(f, Expr) or f.ufl_shape:
            raise InputError("level_set takes levels of a scalar field: give a scalar UFL expression, or a component")
        expression = Constant(values[-1])
        for value, threshold in reversed(list(zip(values, thresholds))):
            expression = conditional(lt(f, threshold), Constant(value), expression)
        return expression

    return transform


class TransformedPrior:
    """Prior of a transformed field, ``m = transform(field)``.

    Parameters
    ----------
    base : GaussianPrior | CallablePrior | TransformedPrior | ProductPrior
        Prior of the field.
    transform : callable
        Maps the field (a Function) to a UFL expression, e.g. ``firedrake.exp`` or ``level_set(...)``.
    V : firedrake.functionspaceimpl.WithGeometry | None
        Space of the parameter, into which the expression is interpolated; default ``base.V``.

    Raises
    ------
    InputError
        If the transform gives no UFL expression, one of another value shape than V or one that varies where V is
        constant, or Firedrake cannot interpolate into V.
    """

    def __init__(self, base, transform, V=None):
        self.base = check_prior(base, "base")
        self.transform = check_callable(transform, "transform", "a function that maps the field to a UFL expression", 1)
        self.V = base.V if V is None else check_space(V)
        self._field, self._result = Function(base.V), Function(self.V)
        expression = transform(self._field)
        if not isinstance(expression, Expr):
            raise InputError(f"transform gave {type(expression).__name__}: let it return a UFL expression")
        if expression.ufl_shape != self.V.value_shape:
            raise InputError(f"transform gave value shape {expression.ufl_shape}, the space has "
                             f"{self.V.value_shape}: change the transform or pass another V")
        check_expression(expression, "what transform gave", (*(W.mesh() for W in base.V), self.V.mesh()))
        try:
            self._interpolate = prepared_interpolation(expression, self._result)
        except NotImplementedError as error:
            raise InputError(f"Firedrake cannot interpolate into {self.V.ufl_element()} ({error}): pass a V whose "
                             "coefficients are point values, such as CG or DG") from error
        if "Real" in repr(self.V.ufl_element()):
            self.transform_many(coefficients(base.sample(0))[None])
            check_reproduced(expression, self._result, "the transform")

    def sample(self, seed):
        """Draw one sample, a Function in ``V``: the transform of ``base.sample(seed)``."""
        return field(self.V, self.transform_many(coefficients(self.base.sample(seed))[None])[0])

    def sample_many(self, n, seed):
        """Draw n samples: owned coefficients in ``V``, shape (n, n_owned)."""
        return self.transform_many(self.base.sample_many(n, seed))

    @no_annotations
    def transform_many(self, values):
        """Transform fields given by their coefficients (collective).

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
            If the coefficients have another shape, or are not real and finite.
        """
        values = check_rows(values, self.base.V, "values")
        result = np.empty((len(values), owned_size(self.V)))
        for row, source in zip(result, values):
            with self._field.dat.vec_wo as vec:
                vec.array[:] = source
            self._interpolate()
            row[:] = coefficients(self._result)
        return result


class CallablePrior:
    """Prior given by the user's own sampler.

    Parameters
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Space of the parameter.
    sample : callable
        Maps an integer seed to a Function in V; the same seed must give the same Function.

    Raises
    ------
    InputError
        If V is no space, or sample no function of one argument.
    """

    def __init__(self, V, sample):
        self.V = check_space(V)
        self._sample = check_callable(sample, "sample", "a function from seed to Function", 1)

    def sample(self, seed):
        """Draw one sample, a new Function in ``V``; InputError if the sampler returns anything else."""
        f = self._sample(check_seed(seed))
        got = f.function_space() if isinstance(f, Function) else type(f).__name__
        if got != self.V:
            raise InputError(f"the sampler returned {got}, expected a Function in {self.V}: interpolate it "
                             "into the prior's space")
        return field(self.V, coefficients(f))

    def sample_many(self, n, seed):
        """Draw n samples with seeds derived from seed: owned coefficients, shape (n, n_owned)."""
        seeds = np.random.SeedSequence(check_seed(seed)).generate_state(check_count(n))
        return np.array([coefficients(self.sample(int(s))) for s in seeds])
