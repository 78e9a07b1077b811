r"""Gaussian priors: Whittle-Matérn fields, fields that are constant along an extrusion, and numbers.

A Gaussian prior is a Whittle-Matérn field: the solution of ``(1 - L² Δ)^(m/2) w = white noise`` has, on an
unbounded domain of dimension d, the Matérn correlation of smoothness ``ν = m - d/2`` and length
``ℓ = L sqrt(2ν)`` (Lindgren, Rue and Lindström 2011, eq. 1 to 3).  In matrices, with mass ``M``,
``K = M + L² A + Robin`` and ``b ~ N(0, M)`` (Croci et al. 2018; Weaver and Mirouze 2013; as in
``firedrake.adjoint.AutoregressiveCovariance``):

    draw        m̄ + D R b,       R = (K⁻¹ M)^(m/2-1) K⁻¹     (other lengths: `lengths`)
    covariance  C = D R M Rᵀ D,   D = diag(std / sqrt(diag(R₀ M R₀ᵀ)))

``D`` makes the pointwise standard deviation the user's ``std`` everywhere; its ``R₀`` knows no Dirichlet condition, so
near Dirichlet parts the variance of ``C`` goes to zero as it should.  The Robin term ``(L/1.42) u v ds`` (Daon and
Stadler 2018) keeps the correlation near a boundary close to the one inside.  The operator and its factorisation are
Firedrake's; added here are many right-hand sides at once, white noise that does not depend on the numbering of a
distributed mesh, and the pointwise variance.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from firedrake import Constant, DirichletBC, Function, FunctionSpace, TestFunction, dx, inner, solve
from firedrake.adjoint import AutoregressiveCovariance
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from pyadjoint import no_annotations
from ufl.core.expr import Expr
from ufl.domain import extract_domains

from fem_diffusion.checks import alike, check_all, check_count, check_flag, check_seed
from fem_diffusion.citations import cite
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import (
    coefficients, field, independent_entries, is_real, largest, owned_size, require_real,
)
from fem_diffusion.fields.checks import (
    check_finite, check_reproduced, check_rows, check_solver, check_space, exterior_measures, interpolated,
    matern_space,
)
from fem_diffusion.forward.solvers import linear_options
from fem_diffusion.prior.lengths import helmholtz, read_lengths
from fem_diffusion.prior.matern import (
    MaternOperator, NumberOperator, matern_operator, operator_order, pointwise_variance, variance_is_exact,
)
from fem_diffusion.prior.protocol import GaussianCore

__all__ = ["GaussianPrior"]


class GaussianPrior(GaussianCore):
    """Gaussian random field with Whittle-Matérn covariance and Dirichlet conditions, or Gaussian numbers.

    Parameters
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Space of CG elements, scalar or (with independent components) vector- or tensor-valued, symmetric tensors
        included, on any mesh of dimension 1 to 3, a codimension-one ``Submesh`` included.  Where it is constant along
        an extrusion (``vfamily="R"``), the prior is that of the base mesh.  On a space of family ``"R"``, scalar or
        vector, the unknowns are independent numbers.
    std, mean : float | ufl.core.expr.Expr
        Pointwise standard deviation, in the units of the field, and mean away from Dirichlet parts; they may vary.
    correlation_length : float | sequence of float | ufl.core.expr.Expr | dict
        Matérn length ℓ, in the units of the mesh: see `matern_correlation`; left out for numbers.  A sequence holds one
        for each axis; a UFL scalar may vary, and a symmetric tensor has the lengths as eigenvalues, along its
        eigenvectors (fields along a flow or a slope); a dict gives each component of a vector field its own,
        ``{0: 0.5, 1: (0.5, 0.01)}``.  Where ℓ varies, the standard deviation is still ``std`` everywhere.  Across the
        cells of a mesh, CG1 makes short lengths longer: take CG2, and two cells for the shortest.
    bcs : firedrake.DirichletBC | sequence of firedrake.DirichletBC | None
        Conditions that every sample satisfies exactly, the mean by a Helmholtz lift that decays over ℓ.
    smoothness : float | None
        Matérn smoothness ν = m - d/2 with m even: 1.5, 3.5, ... in one dimension, 1, 3 in two, 0.5, 2.5 in
        three.  Default: the smallest that is at least one.
    normalise : bool
        Whether to make the pointwise standard deviation ``std``, or to leave it as the operator gives it: that saves
        the solves of the correction, and is right only inside, on a fine mesh.
    solver_parameters : "direct" | "iterative" | dict
        PETSc options for the operator.

    Raises
    ------
    InputError
        If the space is not CG or Real, an argument is of the wrong kind, shape or sign, on another mesh, not finite or
        varies where the space is constant, or a condition is on another space or a marker that the mesh lacks.
    SolveError
        If an iterative solver chosen through ``solver_parameters`` does not converge.
    """

    @no_annotations
    def __init__(self, V: WithGeometry, std: float | Expr, correlation_length: Any = None, *,
                 mean: float | Expr = 0.0, bcs: DirichletBC | Sequence[DirichletBC] | None = (),
                 smoothness: float | None = None, normalise: bool = True,
                 solver_parameters: str | dict = "direct") -> None:
        require_real()
        self.V, self._normalise = check_space(V), check_flag(normalise, "normalise")
        solver_parameters = check_solver(solver_parameters, None, V.comm)
        bcs = (bcs,) if isinstance(bcs, DirichletBC) else () if bcs is None else bcs
        self.bcs = check_all(bcs, "bcs", DirichletBC, "DirichletBC objects")
        self._space = V if len(V) == 1 and is_real(V) else matern_space(V)
        for bc in self.bcs:
            space = bc.function_space()
            while space.parent is not None:
                space = space.parent
            if space != V:
                raise InputError(f"bcs holds {bc!r}: give DirichletBC objects on the prior's space or on "
                                 "components of it.")
        self._std = self._given(std, "std")
        # Collective, which __repr__ must not be.
        self._range = V.comm.allreduce(self._std.min(initial=np.inf), MPI.MIN), largest(V.comm, self._std)
        if not self._range[0] >= 0:
            raise InputError("std is negative somewhere on the mesh: give a non-negative standard deviation.")
        values = self._given(mean, "mean")
        if is_real(V):
            if self.bcs or correlation_length is not None or smoothness is not None or solver_parameters != "direct":
                raise InputError('numbers (family "R") have a mean and a standard deviation alone: leave out '
                                 "correlation_length, smoothness, bcs and solver_parameters.")
            self.correlation_length = self.smoothness = None
        else:
            cite("Lindgren2011")
            self._set_operator(correlation_length, smoothness, solver_parameters)
            values = self._lifted(values)
        self.mean, self._mean, self._variances = field(V, values), values, {}

    def _given(self, value: float | Expr, name: str) -> np.ndarray:
        """Coefficients of std or mean, which may be on the base mesh of a field that lives there: (n_owned,)."""
        on_base = isinstance(value, Expr) and self._space.mesh() in extract_domains(value)
        space = self._space if on_base else self.V
        return coefficients(interpolated(space, value, name, (space.mesh(),)))

    def _set_operator(self, correlation_length: Any, smoothness: float | None,
                      solver_parameters: str | dict) -> None:
        """Check and keep what the operator of a field needs."""
        ends = set(exterior_measures(self.V.mesh()))
        for bc in self.bcs:
            words = [part for part in bc.sub_domain if part in ("bottom", "top")]
            try:
                # The seam of a periodic extrusion has nodes and is no boundary.
                known = ends.issuperset(words) and bc.nodes is not None
            except (LookupError, ValueError):
                known = False
            if not known:
                raise InputError(f"bcs holds a condition on {bc.sub_domain!r}, no part of the mesh's boundary: "
                                 "name its markers.")
        d = self._space.mesh().topological_dimension
        self._order = operator_order(smoothness, d)
        self.correlation_length, self.smoothness = correlation_length, self._order - d / 2
        self._lengths = read_lengths(correlation_length, self.smoothness, self._space)
        if not self._normalise and any(length.varying for length in self._lengths):
            raise InputError("correlation_length varies, so the operator alone does not tell the standard deviation: "
                             "leave normalise out.")
        self._solver_parameters = linear_options(solver_parameters, self._space, advective=False)

    def _conditions(self, f: np.ndarray) -> list[DirichletBC]:
        """The bcs on the operator's space, with the values of f (n_owned,)."""
        values, conditions = field(self._space, f), []
        for bc in self.bcs:
            if self._space != self.V and {"top", "bottom"} & set(np.atleast_1d(bc.sub_domain)):
                raise InputError("a condition at the top or bottom fixes a field that is constant along the extrusion "
                                 "everywhere: name markers of the sides.")
            component = bc.function_space().component
            target, g, W = (x if component is None else x.sub(component) for x in (self._space, values, self.V))
            value = getattr(bc, "_original_arg", None)
            if self._space != self.V and isinstance(value, Expr):
                check_reproduced(value, Function(W.collapse()).interpolate(value), "the value of a condition")
            conditions.append(DirichletBC(target, g, bc.sub_domain))
        return conditions

    def _lifted(self, mean: np.ndarray) -> np.ndarray:
        """The mean (n_owned,) plus the Helmholtz extension of its mismatch with the bcs: it satisfies them exactly."""
        if not self.bcs:
            return mean
        fixed = self._applied(mean)
        check_finite(field(self.V, fixed), "the mean with the values of bcs")
        space, lift = self._space, Function(self._space)
        zero = inner(Constant(np.zeros(space.value_shape)), TestFunction(space)) * dx
        solve(helmholtz(space, self._lengths) == zero, lift, bcs=self._conditions(fixed - mean),
              solver_parameters=self._solver_parameters)
        return self._applied(mean + coefficients(lift))    # the sum has rounding errors

    def _applied(self, values: np.ndarray) -> np.ndarray:
        """Values (n_owned,) with those of the bcs where they hold."""
        f = field(self.V, values)
        for bc in self.bcs:
            bc.apply(f)
        return coefficients(f)

    @cached_property
    @no_annotations
    def _matern(self) -> MaternOperator:
        """The operator of a field with the Dirichlet conditions, factorised."""
        conditions = self._conditions(np.zeros_like(self._std))
        return matern_operator(self._space, self._lengths, self._order, conditions, self._solver_parameters)

    @cached_property
    def _operator(self) -> MaternOperator | NumberOperator:
        """What draws samples."""
        return NumberOperator(self.V) if is_real(self.V) else self._matern

    @cached_property
    @no_annotations
    def _scale(self) -> np.ndarray:
        """Diagonal of ``D``, shape (n_owned,)."""
        if is_real(self.V):
            return self._std
        # An entry that stands twice in a tensor has twice the mass, and half the variance under the same operator.
        counts = np.sqrt(independent_entries(self.V)[1])
        scale = (self._std.reshape(-1, len(counts)) * counts).ravel()  # components are interleaved
        scalar, own = self._space, not self.bcs and not self.V.value_shape
        if scalar.value_shape:
            scalar = FunctionSpace(scalar.mesh(), scalar.ufl_element().sub_elements[0])
        columns = []
        for length in self._lengths:
            variance = np.ones(owned_size(scalar))
            if self._normalise:
                variance = pointwise_variance(self._matern if own else matern_operator(
                    scalar, [length], self._order, (), self._solver_parameters))
            # All components share the weight of the first.
            ratio = (self._lengths[0].mean / length.mean)**scalar.mesh().topological_dimension
            columns.append(variance * ratio)
        blocks = self.V.block_size // len(columns)
        return scale / np.sqrt(np.repeat(np.stack(columns, axis=1), blocks, axis=1).ravel())

    @property
    def covariance(self) -> AutoregressiveCovariance | None:
        """Firedrake's operator, without the normalisation ``D``; None for numbers."""
        return None if is_real(self.V) else self._matern.covariance

    @no_annotations
    def sample_many(self, n: int, seed: int) -> np.ndarray:
        """As `Prior.sample_many`: up to rounding on any number of ranks; the first samples do not depend on n."""
        n, seed = alike(self.V.comm, lambda: {"n": check_count(n), "seed": check_seed(seed)})
        rng, op = np.random.default_rng(seed), self._operator
        samples, block = np.empty((n, self._std.size)), op.block()
        for start in range(0, n, block):
            part = samples[start:start + block]
            part[:] = self._mean + self._scale * op.root(op.white_noise(rng, len(part)))
        return samples

    @no_annotations
    def apply_covariance(self, x: np.ndarray) -> np.ndarray:
        """As `GaussianCore.apply_covariance`."""
        x, op = check_rows(x, self.V, "x"), self._operator
        block, y = op.block(), np.empty(x.shape)
        for start in range(0, len(x), block):
            y[start:start + block] = self._scale * op.action(self._scale * x[start:start + block])
        return y

    def covariance_matrix(self) -> np.ndarray:
        """Dense covariance of the coefficients, shape (n, n), for small problems; InputError on a distributed mesh."""
        if self.V.comm.size > 1:
            raise InputError("covariance_matrix needs the whole mesh on one rank: use apply_covariance.")
        C = self.apply_covariance(np.eye(self._std.size))
        return (C + C.T) / 2

    @no_annotations
    def pointwise_std(self, exact: bool = False) -> Function:
        """Standard deviation of the samples at the nodes, in ``V``: ``std``, falling to zero at Dirichlet conditions.

        It is exact up to 8,000 unknowns, beyond that with a relative error of about one per cent, unless asked to be
        `exact`: that takes one solve for each unknown.
        """
        # What is exact in any case is kept once.
        exact = check_flag(exact, "exact") and not is_real(self.V) and not variance_is_exact(self._matern)
        if is_real(self.V) or self._normalise and not self.bcs and not exact:
            return field(self.V, self._std)
        if exact not in self._variances:
            self._variances[exact] = pointwise_variance(self._matern, exact)
        return field(self.V, self._scale * np.sqrt(self._variances[exact]))

    @property
    def _told(self) -> str:
        """The correlation length in a word or a few."""
        return "varying" if any(x.varying for x in self._lengths) else f"{self.correlation_length}"

    def __repr__(self) -> str:
        low, high = self._range
        std = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        length = "" if is_real(self.V) else f", correlation_length={self._told}, ν={self.smoothness:g}"
        return f"GaussianPrior({self.V.dim()} unknowns, {self.V.ufl_element()}, std={std}{length}, bcs={len(self.bcs)})"
