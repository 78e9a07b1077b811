r"""Steady advection-diffusion-reaction with unknown coefficients, and fast ways to solve it many times.

Find u with  ``v·∇u - ∇·(κ∇u) + r(u) = f``  in the mesh and, on its boundary, ``u = g`` (Dirichlet), ``n·κ∇u = q``
(flux), ``n·κ∇u = h (u_ext - u)`` (Robin) or ``n·κ∇u = 0`` (outflow, and wherever nothing is named).

One of f, κ, v, g, q is the parameter m, or several of them are.  For inversion the map m -> u is needed thousands
of times, so the ways through it are graded by what the unknown touches:

- J = ∂F/∂u depends neither on u nor on m: one factorisation for ever, u = u_ref - J⁻¹ F(u_ref; m) in blocks, and
  where F is affine in m and m has few coefficients, a dense product with the responses to each of them;
- J depends on u but not on m: the whole block iterates with J at a reference state (chord Newton);
- J depends on m: a loop over the reused solver.

SUPG adds  Σ_K ∫_K τ (v·∇w) (v·∇u - ∇·(κ∇u) + r(u) - f)  with the metric form of τ (Shakib, Hughes & Johan 1991,
doi:10.1016/0045-7825(91)90041-4), which follows stretched cells: ``τ⁻² = v·Gv + 9 κG:(κG)ᵀ + σ²``,
``G = 4 p² KᵀSK``, p the degree, K the inverse cell Jacobian, S the metric in which the reference cell is regular,
σ = r' where that does not depend on u.

A discontinuous V has upwind advection and interior penalty diffusion instead: see `_dg`.
"""

from functools import cached_property

import numpy as np
from firedrake import Cofunction, DirichletBC, Function, adjoint, assemble, derivative, replace
from firedrake.adjoint import annotate_tape, stop_annotating
from firedrake.assemble import get_assembler
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from pyadjoint import no_annotations
from ufl.algorithms import expand_derivatives

from fem_diffusion.checks import check_count, check_options
from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import coefficients, multiply, owned_size, require_real, solve
from fem_diffusion.forward import blocks
from fem_diffusion.forward import forms
from fem_diffusion.forward import unknowns
from fem_diffusion.forward.adjoint import Adjoint
from fem_diffusion.fields.checks import check_coefficients, check_finite, check_function, check_solver, petsc_reason
from fem_diffusion.forward.lift import Lift
from fem_diffusion.forward.physics import Boundary, Physics
from fem_diffusion.forward.taped import recorded

__all__ = ["AdvectionDiffusion"]


class AdvectionDiffusion:
    """The map from unknown coefficients to the state of ``v·∇u - ∇·(κ∇u) + r(u) = f``.

    Parameters
    ----------
    V : FunctionSpace
        State space, scalar, any degree, any mesh: continuous (CG, Q; Dirichlet values strongly, SUPG) or
        discontinuous (DG, DQ; Dirichlet values weakly, upwind, interior penalty; degree 0 on rectangles only,
        because its diffusion is wrong elsewhere).
    M : FunctionSpace
        Parameter space, on V's mesh; for ``("flux", marker)`` also on ``Submesh(mesh, dim - 1, marker)``.
    unknown : str, tuple or list
        The coefficient that is the parameter: ``"source"``, ``"diffusivity"``, ``"velocity"``, ``("flux", marker)`` or
        ``("dirichlet", marker)``.  Leave that coefficient out, or give it as a callable ``m -> UFL expression``, e.g.
        ``diffusivity=ufl.exp``; with a callable, M may have any value shape.  Several unknowns: a list of these, with
        ``M = MixedFunctionSpace([...])`` in the same order.
    physics : Physics
    bcs : Boundary
    supg : "auto" or bool
        Streamline-upwind Petrov-Galerkin terms; "auto" has them where V is continuous and there is a velocity.
    solver_parameters : "direct", "iterative" or dict
        PETSc options of every linear solve (and of Newton's method, where there is one).
    options_prefix : str, optional
        Prefix of those options on the command line.

    Attributes
    ----------
    V, M, U : FunctionSpace
        Of state and parameter; U is V.
    m, u : Function
        The problem's own parameter and state, overwritten by every solve.
    F : ufl.Form
        Residual, a linear form in its test function, with coefficients ``u`` and ``m`` (or, for several
        unknowns, a Function for each).
    bcs : list of DirichletBC
        The Dirichlet conditions on ``u``.
    linear : bool
        Whether F is affine in u.
    operator_depends_on_parameter : bool
        Whether ∂F/∂u contains m.

    Raises
    ------
    InputError
        Wrong spaces, shapes, unknown, markers or options, or conditions that leave u undetermined.
    InstallError
        On a complex PETSc build.

    Notes
    -----
    Coefficients are taken as fixed after construction, because factorisations are kept.
    """

    @no_annotations
    def __init__(self, V, M, unknown, physics=Physics(), bcs=Boundary(), *, supg="auto", solver_parameters="direct",
                 options_prefix=None):
        require_real()
        unknowns.check_spaces(V, M)
        self.V, self.M, self.U, self._prefix = V, M, V, options_prefix
        self.m, self.u = Function(M, name="parameter"), Function(V, name="state")
        given = check_coefficients(
            V.mesh(), **vars(check_options(physics, Physics, "physics")), **vars(check_options(bcs, Boundary, "bcs")),
            supg=supg)
        solver_parameters = check_solver(solver_parameters, options_prefix, V.comm)
        self._unknowns = unknowns.read(unknown, V, M, self.m, given)
        A, N, values = forms.equation(self.u, self._unknowns, **given)
        self.F = F = A if N is None else A + N
        # Unknown boundary values where they are imposed strongly, and the unknowns that F contains.
        self._lifted = [x for x in self._unknowns if x.kind == "dirichlet" and x.marker in values]
        self._loads = [x for x in self._unknowns if x not in self._lifted]
        self._lift = Lift(V, values, self._lifted) if self._lifted else None
        self.bcs = [DirichletBC(V, self._lift.g if self._lift else g, key) for key, g in values.items()]
        self._zero_bcs = [bc.reconstruct(g=0) for bc in self.bcs]
        nodes = np.unique(np.concatenate([bc.nodes for bc in self.bcs] or [np.empty(0)])).astype(int)
        self._fixed = nodes[nodes < owned_size(V)]

        self._J = expand_derivatives(derivative(F, self.u))
        self._dFdm = [expand_derivatives(derivative(F, x.value)) for x in self._loads]
        self._A = derivative(A, self.u)
        self.linear = N is None
        self._N = None if self.linear else get_assembler(N)
        self._with_m = get_assembler(forms.integrals_with(self._loads, F)) if self._loads else None
        self.operator_depends_on_parameter = any(x.value in self._J.coefficients() for x in self._unknowns)
        advective = physics.velocity is not None or any(x.kind == "velocity" for x in self._unknowns)
        self._parameters = forms.linear_options(solver_parameters, V, advective)
        self._out = Cofunction(V.dual())
        self._w, bcs, equation = self.u, self.bcs, F
        if self._lift is not None:   # solve for u minus the lift
            self._w, bcs = Function(V), self._zero_bcs
            equation = replace(F, {self.u: self._w + self._lift.g})
        options = {"solver_parameters": self._parameters, "options_prefix": options_prefix}
        self._solver = blocks.make_solver(equation, self._w, bcs, self.linear, not self.operator_depends_on_parameter,
                                          options)
        self._start = Function(V)   # where every solve starts: fixed, so that m -> u has no memory
        self._reference = None

    def __call__(self, m):
        """Solve for one parameter; recorded if a tape of firedrake.adjoint is running.

        Parameters
        ----------
        m : Function
            Parameter in `M`.

        Returns
        -------
        Function
            The state, a new Function in `V`.

        Raises
        ------
        InputError
            If m is not a Function in M.
        SolveError
            If the solver fails.
        """
        if len(self.M) > 1 and annotate_tape():
            blocks.check_parameter(m, self.M)
            return recorded(self, m)
        self._assign(m)
        return self._solve().copy(deepcopy=True)

    def _assign(self, m):
        """Copy a Function of M into the problem's parameter."""
        blocks.check_parameter(m, self.M)
        if m is not self.m:
            self.m.assign(m)
        if len(self.M) > 1:
            self._set(coefficients(m))

    def _set(self, row):
        """Set the parameter from owned coefficients (n_owned_M,)."""
        blocks.write(self.m, row)
        if len(self.M) > 1:
            for x in self._unknowns:
                x.write(row[x.columns])

    def _solve(self):
        """Solve for the parameter held in self.m and return self.u."""
        if self._lift is not None:
            self._lift.update()
        self._w.assign(self._start)
        try:
            self._solver.solve()
        except PETSc.Error as error:
            raise SolveError(f"PETSc stops ({petsc_reason(error)}): check solver_parameters, or take "
                             "'direct'.") from error
        except ConvergenceError as error:
            raise SolveError(f"{' '.join(str(error).split())}; check the range of the parameter, call linearise_at(m) "
                             "with a typical one to start from its state, or pass other solver_parameters.") from error
        if self._lift is not None:
            self.u.assign(self._w + self._lift.g)
        with stop_annotating(), self.u.dat.vec_ro as x:
            if not np.isfinite(x.norm()):
                raise SolveError("the state is not finite; look for NaN in the parameter and coefficients, "
                                 "a diffusivity that is not positive, and a singular operator.")
        return self.u

    def linearise_at(self, m):
        """Move the reference: start later solves from the state at m, and keep the Jacobian there for blocks.

        Without it single solves start from zero, and the first `solve_many` keeps the Jacobian at the mean of its
        parameters, or at zero where that fails; its blocks start from the state there. For a reaction with several
        solutions this choice may decide which one is found: then call this with a typical parameter first.

        Parameters
        ----------
        m : Function
            A typical parameter in `M`, such as the prior mean.

        Raises
        ------
        InputError, SolveError
            As for one solve.
        """
        with stop_annotating():
            self._assign(m)
            self._start = self._solve().copy(deepcopy=True)
            if not self.operator_depends_on_parameter:
                self._reference = self._make_reference()

    def _choose_reference(self, mean):
        """Linearise at owned coefficients of a parameter, at zero where that fails; solves start where they did."""
        try:
            self._set(mean)
            self._solve()
        except SolveError:
            self._assign(Function(self.M))
            self._solve()
        self._reference = self._make_reference()

    def _make_reference(self):
        """Factorise at the parameter and state held in self.m and self.u."""
        # A linear problem's solver already holds the one factorisation there is.
        solver = self._solver if self.linear else self._factorise(self._J, "block_").solver
        A = C = D = P = None
        if self._lift is not None or not self.linear:
            A = assemble(self._A).petscmat
        # A parameter in the Real space has dense columns that PETSc's products do not take: one by one then.
        sparse = all(x.space.ufl_element().family() != "Real" for x in self._unknowns)
        varying = {self.u, *(x.value for x in self._unknowns)}
        lift = [self._lift.derivative(x) for x in self._lifted]
        if lift and sparse and not any(varying & set(form.coefficients()) for form in lift):
            D = [assemble(form).petscmat for form in lift]
        if self._loads and sparse and not any(varying & set(form.coefficients()) for form in self._dFdm):
            C = [assemble(form).petscmat for form in self._dFdm]
        elif self._loads:
            P = self._vector(self._with_m).copy()
        N = None if self.linear else self._vector(self._N).copy()
        return blocks.Reference(coefficients(self.m), coefficients(self.u), solver, A, C, D, N, P)

    def _vector(self, assembler):
        """Coefficients (n_owned_V,) of a one-form at the present m and u, to be used before the next call."""
        return assembler.assemble(tensor=self._out).dat.data_ro

    def _factorise(self, form, suffix):
        prefix = self._prefix and self._prefix + suffix
        return blocks.Factorised(form, self._zero_bcs, self._parameters, prefix)

    def solve_many(self, ms, block=64):
        """Solve for many parameters, in blocks that share one factorisation wherever the problem allows.

        Parameters
        ----------
        ms : sequence of Function, or ndarray
            Parameters in `M`, or their owned coefficients of shape (n, n_owned_M), as in ``m.dat.vec_ro``.
        block : int
            Right-hand sides solved together.

        Returns
        -------
        ndarray
            Owned coefficients of the states, of shape (n, n_owned_V), as in ``u.dat.vec_ro``.

        Raises
        ------
        InputError
            If ms or block has the wrong kind or shape, on any rank.
        SolveError
            If a sample has no solution that Newton's method finds; the message names it.
        """
        ms = blocks.parameter_rows(ms, self.M)
        block = check_count(block, "block")
        out = np.empty((len(ms), owned_size(self.V)))
        with stop_annotating():
            if not self.operator_depends_on_parameter and self._reference is None:
                self._choose_reference(blocks.centre(ms, self.V.mesh().comm))
            for first in range(0, len(ms), block):
                part = slice(first, first + block)
                if self._superposes(len(ms)):
                    out[part] = self._finite(self._response(ms[part]), ms[part], first)
                elif self.operator_depends_on_parameter:
                    out[part] = [self._solve_one(m, first + i) for i, m in enumerate(ms[part])]
                else:
                    out[part] = self._solve_block(ms[part], first)
        return out

    def _superposes(self, n):
        """Whether the state is affine in the parameter, and n samples are enough to add up responses."""
        ref = self._reference
        if ref is None or not self.linear or (self._loads and ref.C is None) or (self._lifted and ref.D is None):
            return False
        return "_response" in vars(self) or blocks.Response.pays(n, self.M, owned_size(self.V))

    @cached_property
    def _response(self):
        return blocks.Response(lambda ms: self._solve_block(ms, 0), self.M)

    def _finite(self, u, ms, first):
        """The states u; those that are not finite are solved for one by one, which names the sample."""
        for j in np.flatnonzero(~np.isfinite(blocks.norms(u, self.V.mesh().comm))):
            u[j] = self._solve_one(ms[j], first + j)
        return u

    def _solve_one(self, m, index):
        """Full solve for owned coefficients m; its state's owned coefficients."""
        self._set(m)
        try:
            return coefficients(self._solve())
        except SolveError as error:
            raise SolveError(f"sample {index}: {error}") from error

    def _solve_block(self, ms, first):
        """States (k, n_owned_V) of one block by chord iterations with the reference Jacobian.

        J does not contain m, so F(u; m) = b(m) + A (u - u_ref) + N(u) - N(u_ref) with b(m) = F(u_ref; m).
        """
        ref, comm = self._reference, self.V.mesh().comm
        b, u = np.zeros((len(ms), len(ref.u))), np.tile(ref.u, (len(ms), 1))
        for x, C in zip(self._loads, ref.C or []):
            b += multiply(C, (ms - ref.m)[:, x.columns])
        for x, D in zip(self._lifted, ref.D or []):
            u += multiply(D, (ms - ref.m)[:, x.columns])
        if (self._loads and ref.C is None) or (self._lifted and ref.D is None):
            blocks.write(self.u, ref.u)
            for m, row, state in zip(ms, b, u):
                self._set(m)
                if self._loads and ref.C is None:
                    row[:] = self._vector(self._with_m) - ref.P
                if self._lifted and ref.D is None:
                    self._lift.update()
                    state[self._fixed] = self._lift.g.dat.data_ro[self._fixed]

        def residuals(members, states):
            rows = b[members] + multiply(ref.A, states - ref.u)
            if not self.linear:
                for row, state in zip(rows, states):
                    self.u.dat.data_wo[:] = state
                    row += self._vector(self._N) - ref.N
            rows[:, self._fixed] = 0   # there u is exact
            return rows

        b[:, self._fixed] = 0
        start = b if self._lift is None else residuals(slice(None), u)
        u -= solve(ref.ksp, start)
        if self.linear:
            return self._finite(u, ms, first)
        for j in blocks.chord(residuals, ref.ksp, u, comm):
            u[j] = self._solve_one(ms[j], first + j)
        return u

    def sensitivity(self, m, rows, state=None):
        """Derivative of observations of the state with respect to the parameter, by one adjoint solve a row.

        Parameters
        ----------
        m : Function
            Parameter in `M`.
        rows : scipy sparse matrix or ndarray
            Observation rows of shape (k, n_owned_V): this rank's columns of the global rows.
        state : Function, optional
            ``problem(m)`` where it is known already; saves a solve.

        Returns
        -------
        ndarray
            ``d(rows·u)/dm``, this rank's columns of it, of shape (k, n_owned_M).

        Raises
        ------
        InputError
            If m, state or rows do not fit their spaces.
        SolveError
            If the state is not given and cannot be solved for.
        """
        blocks.check_parameter(m, self.M)
        check_finite(m, "the parameter")
        rows = blocks.observation_rows(rows, self.V)
        if state is not None:
            check_function(state, self.V, "state", "pass problem(m)")
        with stop_annotating():
            self._assign(m)
            self._solve() if state is None else self.u.assign(state)
            return self._adjoint(rows)

    @cached_property
    def _adjoint(self):
        """Products of rows with the derivative at the parameter and state held in self.m and self.u."""
        transpose = self._factorise(adjoint(self._J), "adjoint_")
        constant = self.linear and not self.operator_depends_on_parameter
        return Adjoint(transpose, constant, self._J, list(zip(self._loads, self._dFdm)),
                       [(x, self._lift.derivative(x)) for x in self._lifted], self._fixed, self.V, self.M)
