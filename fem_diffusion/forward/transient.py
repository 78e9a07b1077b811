r"""Transient advection-diffusion-reaction with unknown coefficients, and fast ways to solve it many times.

Find u with  ``∂u/∂t + v·∇u - ∇·(κ∇u) + r(u) = f``  for ``0 < t <= T``, ``u = u_0`` at t = 0, and the boundary
conditions of `AdvectionDiffusion`: ``u = g`` (Dirichlet), ``n·κ∇u = q`` (flux), ``n·κ∇u = h (u_ext - u)`` (Robin)
or ``n·κ∇u = 0`` (outflow, and wherever nothing is named).

The θ-scheme takes constant steps Δt.  With ``u_θ = θ uⁿ⁺¹ + (1-θ) uⁿ`` and F the steady residual (with its upwind or
SUPG terms), one step solves

    ``∫ (uⁿ⁺¹ - uⁿ)/Δt (w + τ v·∇w) + F(u_θ; t_n + θΔt; w) = 0``  for all w,

so ∂u/∂t is part of the residual that SUPG weights, and the exact solution satisfies the scheme up to its error in
time: second order for θ = 1/2 (Crank-Nicolson), first for θ = 1 (implicit Euler).  τ has the transient term of Shakib:
``τ⁻² = (2/Δt)² + v·Gv + 9 κG:(κG)ᵀ + σ²`` (see `advection_diffusion`).  Strong Dirichlet values are those at
the new time.

Of the parameter, the initial state and the boundary values only the values on V's nodes count: the initial state is
interpolated, and takes the Dirichlet values (at t = 0) at Dirichlet nodes.

Samples march together: while ∂F/∂u contains no unknown, a step of a block is one sparse product and one solve with
a block of right-hand sides, and one factorisation serves all steps (one each where the operator depends on time).
Where the states are affine in a parameter with few coefficients, the responses to each of them are kept and added up.
With a nonlinear reaction the block iterates with the Jacobian at a typical state; what that loses goes to Newton's
method.  Where the operator contains the unknown, each sample has one factorisation for all its steps.
"""

from functools import cached_property

import numpy as np
from firedrake import Function, VectorFunctionSpace
from firedrake.adjoint import annotate_tape
from pyadjoint import no_annotations
from ufl.algorithms import extract_coefficients
from ufl.core.expr import Expr

from fem_diffusion.checks import check_count, check_options
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients, field, owned_size, require_real
from fem_diffusion.forward import blocks
from fem_diffusion.forward import forms
from fem_diffusion.forward import unknowns
from fem_diffusion.forward.adjoint import Backward
from fem_diffusion.fields.checks import check_coefficients, check_finite, check_function, check_solver
from fem_diffusion.forward.march import Equation, March
from fem_diffusion.forward.physics import Boundary, Physics, TimeSteps
from fem_diffusion.forward.taped import recorded

__all__ = ["TransientAdvectionDiffusion"]


class TransientAdvectionDiffusion:
    """The map from unknown coefficients to the states of ``∂u/∂t + v·∇u - ∇·(κ∇u) + r(u) = f`` at chosen times.

    The state is one Function in ``U``, a vector-valued space whose component j is u at ``times[j]``:
    ``point_sensors(problem.U, points)`` reads a time series at every point.

    Parameters
    ----------
    V : FunctionSpace
        Space of the state at one time, scalar, continuous or discontinuous, as for `AdvectionDiffusion`.
    M : FunctionSpace
        Parameter space.  Of an unknown in space: on V's mesh, for ``("flux", marker)`` also on
        ``Submesh(mesh, dim - 1, marker)``.  Of an unknown in time alone: CG1 on ``IntervalMesh(n, T)``, T the last
        time or more.  Of an unknown in space and time: a VectorFunctionSpace in space whose components are the
        values at the ``parameter_times`` of `steps`.
    unknown : str, tuple or list
        ``"initial"``, ``"source"``, ``("source", shape)`` (a strength in time times the UFL scalar ``shape``),
        ``"diffusivity"``, ``"velocity"``, ``("flux", marker)`` or ``("dirichlet", marker)``.  Leave that coefficient
        out, or give it as a callable ``m -> UFL expression``, m being the parameter at one time.  Several unknowns: a
        list, with ``M = MixedFunctionSpace([...])`` in the same order.
    steps : TimeSteps
    physics : Physics
    bcs : Boundary
    initial : UFL scalar or float
        u_0.
    supg, solver_parameters, options_prefix
        As for `AdvectionDiffusion`.

    Attributes
    ----------
    V, M, U : FunctionSpace
        Of one state, of the parameter and (U) of the states at all saved times.
    m : Function
        The problem's own parameter, overwritten by single solves.
    steps : TimeSteps
    linear : bool
        Whether the equation is affine in u.
    operator_depends_on_parameter : bool
        Whether the operator contains an unknown.

    Raises
    ------
    InputError
        Wrong spaces, shapes, unknown, times, markers or options.
    InstallError
        On a complex PETSc build.

    Notes
    -----
    Coefficients other than t are taken as fixed after construction, because factorisations are kept.
    """

    @no_annotations
    def __init__(self, V, M, unknown, steps, physics=Physics(), bcs=Boundary(), *, initial=0, supg="auto",
                 solver_parameters="direct", options_prefix=None):
        require_real()
        unknowns.check_spaces(V, M)
        self.steps, nodes = check_options(steps, TimeSteps, "steps"), steps.parameter_times
        self.V, self.M, self.m = V, M, Function(M, name="parameter")
        self.U = VectorFunctionSpace(V.mesh(), V.ufl_element(), dim=len(steps.times))
        given = check_coefficients(
            V.mesh(), **vars(check_options(physics, Physics, "physics")), **vars(check_options(bcs, Boundary, "bcs")),
            supg=supg, initial=initial)
        solver_parameters = check_solver(solver_parameters, options_prefix, V.comm)
        found = unknowns.read(unknown, V, M, self.m, given, steps.all, nodes)
        if nodes is not None and all(x.nodes is None for x in found):
            raise InputError(f"parameter_times has {len(nodes)} times, but no unknown has as many components: take "
                             f"VectorFunctionSpace(mesh, 'CG', 1, dim={len(nodes)}) for one that depends on space and "
                             "time, or leave parameter_times out.")
        u, change = Function(V), Function(V)
        initial = given.pop("initial")
        A, N, values = forms.equation(u, found, change=change, time_step=steps.time_step, **given)
        for x in found:
            if x.kind == "initial":
                initial = unknowns.apply_unknown("initial", initial, 0, x.value)
                if not isinstance(initial, Expr) or x.value not in extract_coefficients(initial):
                    raise InputError("the callable given for 'initial' makes no use of the parameter.")
        advective = physics.velocity is not None or any(x.kind == "velocity" for x in found)
        self._march = March(
            Equation(u, change, A, N, values, forms.coefficient(initial, "initial"), found, steps.t, steps.all,
                     steps.saved, steps.theta),
            V, M, forms.linear_options(solver_parameters, V, advective), options_prefix)
        self.linear, self.operator_depends_on_parameter = self._march.linear, self._march.by_member

    def __call__(self, m):
        """Solve for one parameter; recorded as one block if a tape of firedrake.adjoint is running.

        Parameters
        ----------
        m : Function
            Parameter in `M`.

        Returns
        -------
        Function
            The states at all saved times, a new Function in `U`.

        Raises
        ------
        InputError
            If m is not a Function in M.
        SolveError
            If the solver fails.
        """
        blocks.check_parameter(m, self.M)
        if annotate_tape():
            return recorded(self, m)
        return field(self.U, self.solve_many([m])[0], name="states")

    @no_annotations
    def solve_many(self, ms, block=64):
        """Solve for many parameters; all samples of a block march together wherever the problem allows.

        Parameters
        ----------
        ms : sequence of Function, or ndarray
            Parameters in `M`, or their owned coefficients of shape (n, n_owned_M), as in ``m.dat.vec_ro``.
        block : int
            Samples marched together.

        Returns
        -------
        ndarray
            Owned coefficients of the states, of shape (n, n_owned_U), as in ``u.dat.vec_ro``.

        Raises
        ------
        InputError
            If ms or block has the wrong kind or shape, on any rank.
        SolveError
            If a sample has no solution that Newton's method finds; the message names it.
        """
        ms = blocks.parameter_rows(ms, self.M)
        block = check_count(block, "block")
        block = 1 if self.operator_depends_on_parameter else block
        out = np.empty((len(ms), owned_size(self.U)))
        superpose = self._march.affine and (
            "_response" in vars(self) or blocks.Response.pays(len(ms), self.M, owned_size(self.U)))
        for first in range(0, len(ms), block):
            part = slice(first, first + block)
            states = self._response(ms[part]) if superpose else self._run(ms[part], first)
            bad = np.flatnonzero(~np.isfinite(blocks.norms(states, self.V.mesh().comm)))
            if len(bad):
                raise SolveError(f"sample {first + bad[0]}: the state is not finite; look for NaN in the parameter and "
                                 "coefficients, a diffusivity that is not positive, and a singular operator.")
            out[part] = states
        return out

    def _run(self, ms, first=0):
        """States (n, n_owned_U) of one block by marching."""
        return self._march.run(ms, first).reshape(len(ms), -1)

    @cached_property
    def _response(self):
        return blocks.Response(self._run, self.M)

    @no_annotations
    def sensitivity(self, m, rows, state=None):
        """Derivative of observations of the states with respect to the parameter, by one march back for all rows.

        Parameters
        ----------
        m : Function
            Parameter in `M`.
        rows : scipy sparse matrix or ndarray
            Observation rows of shape (k, n_owned_U): this rank's columns of the global rows.
        state : Function, optional
            As for `AdvectionDiffusion`; it is not used, because the march back needs the states of all steps where
            it needs any.

        Returns
        -------
        ndarray
            ``d(rows·u)/dm``, this rank's columns of it, of shape (k, n_owned_M).

        Raises
        ------
        InputError
            If m, state or rows do not fit their spaces, or hold values that are not finite.
        SolveError
            If the states are needed and cannot be solved for.
        """
        blocks.check_parameter(m, self.M)
        check_finite(m, "the parameter")
        rows = blocks.observation_rows(rows, self.U)
        if state is not None:
            check_function(state, self.U, "state", "pass problem(m)")
        rows = rows.reshape(len(rows), owned_size(self.V), len(self.steps.times))
        return self._backward.rows(coefficients(m)[None], rows)

    @cached_property
    def _backward(self):
        """The adjoint march."""
        return Backward(self._march)
