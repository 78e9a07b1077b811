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

from functools import cached_property
from numbers import Real

import numpy as np
from firedrake import (
    Constant, DirichletBC, Function, FunctionSpace, TestFunction, TrialFunction, conditional, dx, grad, inner,
    lt, solve,
)
from mpi4py import MPI
from pyadjoint import no_annotations
from ufl.core.expr import Expr

from fem_diffusion.checks import check_count, check_seed
from fem_diffusion.errors import InputError
from fem_diffusion.fields import coefficients, field, owned_size, require_real
from fem_diffusion.problem._checks import (
    check_lagrange, interpolated, prepared_interpolation, root_space,
)
from fem_diffusion.problem._matern import (
    exact_variance, matern_correlation, matern_operator, operator_order, pointwise_variance, variance_is_exact,
)

__all__ = ["GaussianPrior", "TransformedPrior", "CallablePrior", "level_set", "matern_correlation"]


class GaussianPrior:
    """Gaussian random field with Whittle-Matérn covariance and Dirichlet conditions; see the module's text.

    Parameters
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Space of CG elements, scalar or (with independent components) vector-valued, on any mesh of dimension
        1 to 3, a codimension-one ``Submesh`` included.
    std : float | ufl.core.expr.Expr
        Pointwise standard deviation, in the units of the field; it may vary in space.
    correlation_length : float
        Matérn length ℓ, in the units of the mesh: see `matern_correlation`.
    mean : float | ufl.core.expr.Expr
        Mean away from Dirichlet parts.
    bcs : firedrake.DirichletBC | sequence of firedrake.DirichletBC
        Conditions that every sample satisfies exactly, the mean by a Helmholtz lift that decays over ℓ.
    smoothness : float | None
        Matérn smoothness ν = m - d/2 with m even: 1.5, 3.5, ... in one dimension, 1, 3 in two, 0.5, 2.5 in
        three.  Default: the smallest that is at least one.
    normalise : bool
        Whether to make the pointwise standard deviation ``std`` (default), or to leave it as the operator
        gives it: that saves the solves of the correction, and is right only inside, on a fine mesh.
    solver_parameters : dict | None
        PETSc options for the operator; default a direct solver.

    Raises
    ------
    InputError
        If the space is not CG, an argument of the wrong kind, shape or sign, or a condition on another space.
    SolveError
        If an iterative solver chosen through ``solver_parameters`` does not converge.
    """

    @no_annotations
    def __init__(self, V, std, correlation_length, *, mean=0.0, bcs=(), smoothness=None, normalise=True,
                 solver_parameters=None):
        require_real()
        check_lagrange(V)
        self.V = V
        self.bcs = (bcs,) if isinstance(bcs, DirichletBC) else tuple(bcs)
        for bc in self.bcs:
            if not isinstance(bc, DirichletBC) or root_space(bc.function_space()) != V:
                raise InputError(f"bcs holds {bc!r}: give DirichletBC objects on the prior's space or on "
                                 "components of it")
        if not isinstance(correlation_length, Real) or not 0 < correlation_length < np.inf:
            raise InputError(f"correlation_length is {correlation_length!r}: give a positive number")
        self.correlation_length = float(correlation_length)
        d = V.mesh().topological_dimension
        self._order = operator_order(smoothness, d)
        self.smoothness = self._order - d / 2
        self._L = self.correlation_length / np.sqrt(2 * self.smoothness)
        self._normalise = normalise
        direct = {"ksp_type": "preonly", "pc_type": "lu",
                  "pc_factor_mat_solver_type": "petsc" if V.comm.size == 1 else "mumps"}
        self._solver_parameters = dict(direct if solver_parameters is None else solver_parameters)
        self._std = coefficients(interpolated(V, std, "std"))
        if not V.comm.allreduce(bool((self._std >= 0).all()), op=MPI.LAND):
            raise InputError("std is negative somewhere on the mesh: give a non-negative standard deviation")
        self.mean = self._lifted(interpolated(V, mean, "mean"))
        self._mean = coefficients(self.mean)

    def _lifted(self, mean):
        """Add to the mean the Helmholtz extension of its mismatch with the bcs: it satisfies them exactly."""
        if not self.bcs:
            return mean
        V, lift = self.V, Function(self.V)
        mismatch = mean.copy(deepcopy=True)
        for bc in self.bcs:
            bc.apply(mismatch)
        mismatch.assign(mismatch - mean)
        lift_bcs = []
        for bc in self.bcs:
            W = bc.function_space()
            lift_bcs.append(DirichletBC(W, mismatch if W == V else mismatch.sub(W.component), bc.sub_domain))
        u, v = TrialFunction(V), TestFunction(V)
        K = inner(u, v) * dx + Constant(self._L**2) * inner(grad(u), grad(v)) * dx
        solve(K == inner(Constant(np.zeros(V.value_shape)), v) * dx, lift, bcs=lift_bcs,
              solver_parameters=self._solver_parameters)
        mean.assign(mean + lift)
        for bc in self.bcs:
            bc.apply(mean)  # the sum above has rounding errors
        return mean

    @cached_property
    @no_annotations
    def _operator(self):
        """The operator with the Dirichlet conditions, factorised."""
        return matern_operator(self.V, self._L, self._order, self.bcs, self._solver_parameters)

    @cached_property
    @no_annotations
    def _scale(self):
        """Diagonal of ``D``, owned, shape (n_owned,)."""
        if not self._normalise:
            return self._std
        scalar = self.V
        if self.V.value_shape:
            scalar = FunctionSpace(self.V.mesh(), self.V.ufl_element().sub_elements[0])
        op = self._operator
        if self.bcs or self.V.value_shape:
            op = matern_operator(scalar, self._L, self._order, (), self._solver_parameters)
        variance = pointwise_variance(op)
        return self._std / np.sqrt(np.repeat(variance, self.V.block_size))  # components are interleaved

    @property
    def covariance(self):
        """Firedrake's covariance operator (AutoregressiveCovariance), without the normalisation ``D``."""
        return self._operator.covariance

    def sample(self, seed):
        """Draw one sample.

        Parameters
        ----------
        seed : int
            Non-negative; the same seed gives the same sample up to rounding, on any number of ranks.

        Returns
        -------
        firedrake.Function
            The sample, in ``V``; its coefficients are ``sample_many(1, seed)[0]``.

        Raises
        ------
        InputError
            If seed is no non-negative integer.
        """
        return field(self.V, self.sample_many(1, seed)[0])

    @no_annotations
    def sample_many(self, n, seed):
        """Draw n samples, a block of right-hand sides at a time (collective).

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
        n, op = check_count(n), self._operator
        rng = np.random.default_rng(check_seed(seed))
        samples, block = np.empty((n, self._std.size)), op.block()
        for start in range(0, n, block):
            part = samples[start:start + block]
            part[:] = self._mean + self._scale * op.root(op.white_noise(rng, len(part)))
        return samples

    @no_annotations
    def apply_covariance(self, x):
        """Apply the covariance ``C`` to dual coefficients (collective).

        Parameters
        ----------
        x : numpy.ndarray
            Owned dual coefficients (of a Cofunction), shape (k, n_owned).

        Returns
        -------
        numpy.ndarray
            Owned primal coefficients of ``C x``, shape (k, n_owned).

        Raises
        ------
        InputError
            If x has another shape.
        """
        x, op = np.asarray(x, dtype=float), self._operator
        if x.ndim != 2 or x.shape[1] != self._std.size:
            raise InputError(f"x has shape {x.shape}: give (k, {self._std.size}), a row for each vector")
        block, y = op.block(), np.empty(x.shape)
        for start in range(0, len(x), block):
            rows = slice(start, start + block)
            y[rows] = self._scale * op.action(self._scale * x[rows])
        return y

    def covariance_matrix(self):
        """Dense covariance of the coefficients, for small problems on one rank.

        Returns
        -------
        numpy.ndarray
            Symmetric, shape (n, n).

        Raises
        ------
        InputError
            If the mesh is distributed.
        """
        if self.V.comm.size > 1:
            raise InputError("covariance_matrix needs the whole mesh on one rank: use apply_covariance")
        C = self.apply_covariance(np.eye(self._std.size))
        return (C + C.T) / 2

    @cached_property
    @no_annotations
    def _pointwise_std(self):
        """Owned, shape (n_owned,)."""
        if self._normalise and not self.bcs:
            return self._std
        return self._scale * np.sqrt(pointwise_variance(self._operator))

    @cached_property
    @no_annotations
    def _exact_std(self):
        """As `_pointwise_std`, without an estimate for large spaces."""
        if variance_is_exact(self._operator):
            return self._pointwise_std
        return self._scale * np.sqrt(exact_variance(self._operator))

    def pointwise_std(self, exact=False):
        """Standard deviation of the samples at the nodes: ``std``, falling to zero at Dirichlet conditions.

        Parameters
        ----------
        exact : bool
            Whether to solve once for each unknown, however many there are.

        Returns
        -------
        firedrake.Function
            In ``V``; exact up to 8,000 unknowns, beyond that with a relative error of about one per cent, unless asked
            to be `exact`.
        """
        return field(self.V, self._exact_std if exact else self._pointwise_std)


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
        If the thresholds do not increase, or there is not one value more than thresholds.
    """
    values, thresholds = [float(x) for x in values], [float(x) for x in thresholds]
    if len(values) != len(thresholds) + 1 or not thresholds:
        raise InputError(f"got {len(values)} values and {len(thresholds)} thresholds: give one value more")
    if not np.all(np.diff(thresholds) > 0):
        raise InputError(f"thresholds are {thresholds}: give them strictly increasing")

    def transform(f):
        expression = Constant(values[-1])
        for value, threshold in reversed(list(zip(values, thresholds))):
            expression = conditional(lt(f, threshold), Constant(value), expression)
        return expression

    return transform


class TransformedPrior:
    """Prior of a transformed field, ``m = transform(field)``.

    Parameters
    ----------
    base : GaussianPrior | CallablePrior | TransformedPrior
        Prior of the field.
    transform : callable
        Maps the field (a Function) to a UFL expression, e.g. ``firedrake.exp`` or ``level_set(...)``.
    V : firedrake.functionspaceimpl.WithGeometry | None
        Space of the parameter, into which the expression is interpolated; default ``base.V``.

    Raises
    ------
    InputError
        If the transform gives no UFL expression, or one of another value shape than V.
    """

    def __init__(self, base, transform, V=None):
        self.base, self.transform, self.V = base, transform, base.V if V is None else V
        self._field, self._result = Function(base.V), Function(self.V)
        expression = transform(self._field)
        if not isinstance(expression, Expr):
            raise InputError(f"transform gave {type(expression).__name__}: let it return a UFL expression")
        if expression.ufl_shape != self.V.value_shape:
            raise InputError(f"transform gave value shape {expression.ufl_shape}, the space has "
                             f"{self.V.value_shape}: change the transform or pass another V")
        self._interpolate = prepared_interpolation(expression, self._result)

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
            If the coefficients have another shape.
        """
        values = np.asarray(values, dtype=float)
        owned = owned_size(self.base.V)
        if values.ndim != 2 or values.shape[1] != owned:
            raise InputError(f"coefficients have shape {values.shape}: give (n, {owned})")
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
    """

    def __init__(self, V, sample):
        if not callable(sample):
            raise InputError(f"sample is {type(sample).__name__}: give a function from seed to Function")
        self.V, self._sample = V, sample

    def sample(self, seed):
        """Draw one sample, a Function in ``V``; InputError if the sampler returns anything else."""
        f = self._sample(check_seed(seed))
        got = f.function_space() if isinstance(f, Function) else type(f).__name__
        if got != self.V:
            raise InputError(f"the sampler returned {got}, expected a Function in {self.V}: interpolate it "
                             "into the prior's space")
        return f

    def sample_many(self, n, seed):
        """Draw n samples with seeds derived from seed: owned coefficients, shape (n, n_owned)."""
        seeds = np.random.SeedSequence(check_seed(seed)).generate_state(check_count(n))
        return np.array([coefficients(self.sample(int(s))) for s in seeds])
