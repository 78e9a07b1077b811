"""Steady problems from a residual in UFL: solved for many parameters as fast as what the Jacobian depends on allows."""

from collections.abc import Mapping, Sequence

import numpy as np
from firedrake import DirichletBC, Function, LinearVariationalProblem, NonlinearVariationalProblem, action, replace
from firedrake.adjoint import annotate_tape, stop_annotating
from pyadjoint import no_annotations
from ufl import Form, zero

from fem_diffusion.checks import check_kind
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_solver
from fem_diffusion.fields.coefficients import coefficients, field
from fem_diffusion.forward.blocks import BlockForward, check_parameter
from fem_diffusion.forward.one_step import OneStep
from fem_diffusion.forward.residual import of_residual, with_degrees
from fem_diffusion.forward.solvers import linear_options

__all__ = ["Steady"]


class Steady(BlockForward):
    """The map m -> u of F(u; m; v) = 0 for all v, from the residual in UFL.

    How it is solved for many parameters follows from what the form contains. Where ∂F/∂u depends neither on u nor on
    m, one factorisation serves for ever, and a block of parameters is one block of right-hand sides; where it depends
    on u alone, blocks iterate with the Jacobian at a reference state (chord Newton); where it depends on m, they do so
    with a factorisation in the midst of their parameters, scaled to each member.

    Parameters
    ----------
    F : ufl.Form
        Residual, linear in its test function, which is in the space of u; other coefficients have to keep their
        values.
    u : Function
        The state in F, in any space: scalar, vector-valued, mixed, H(div), discontinuous. Newton's method starts from
        what it holds now; it is not written to.
    m : Function
        The parameter in F, in any space on a mesh that F may integrate over. It is not written to.
    bcs : DirichletBC, or sequence of them
        Conditions on u or its components. Values may depend on m where the space of u is scalar.
    solver_parameters, options_prefix : "direct", "iterative" or dict, and str, optional
        PETSc options of every linear solve, and of Newton's method where there is one, and their prefix on the command
        line.

    Attributes
    ----------
    V, M, U : FunctionSpace
        Of state and parameter; U is V.
    m, u : Function
        The problem's own parameter and state, overwritten by every solve.
    F : ufl.Form
        Residual, a linear form in its test function, with coefficients `u` and `m` (or, for several unknowns of
        `AdvectionDiffusion`, a Function for each); `bcs` are the Dirichlet conditions on `u`.
    linear, operator_depends_on_parameter : bool
        Whether F is affine in u, and whether ∂F/∂u contains m.

    Raises
    ------
    InputError, InstallError
        If F is no such form, u or m is not in it, or options are wrong; a complex PETSc.
    """

    _stepper: OneStep

    @no_annotations
    def __init__(self, F: Form, u: Function, m: Function, bcs: DirichletBC | Sequence[DirichletBC] = (), *,
                 solver_parameters: str | Mapping = "direct", options_prefix: str | None = None) -> None:
        e, own = of_residual(F, u, m, bcs)
        options = linear_options(check_solver(solver_parameters, options_prefix, u.comm), u.function_space(), True)
        self._pose(OneStep(e, m.function_space(), options, options_prefix, own))

    @classmethod
    def from_problem(cls, problem: LinearVariationalProblem | NonlinearVariationalProblem, m: Function, *,
                     solver_parameters: str | Mapping = "direct", options_prefix: str | None = None) -> "Steady":
        """From a variational problem as it is, with its conditions, and the Function in it that is the parameter."""
        check_kind(problem, "problem", NonlinearVariationalProblem, "a LinearVariationalProblem or a "
                   "NonlinearVariationalProblem")
        if problem.u_restrict is not problem.u:
            raise InputError("The problem is restricted to unconstrained values: make it with restrict=False.")
        given = problem.form_compiler_parameters or {}   # of its forms alone, such as a quadrature degree
        F, J = (Form([x.reconstruct(metadata={**given, **x.metadata()}) for x in form.integrals()])
                for form in (problem.F, problem.J))
        if isinstance(problem, LinearVariationalProblem):   # its two sides have quadratures of their own
            F = action(with_degrees(J), problem.u) + replace(with_degrees(F), {problem.u: zero(problem.u.ufl_shape)})
        return cls(F, problem.u, m, problem.bcs, solver_parameters=solver_parameters,
                   options_prefix=options_prefix)

    def _pose(self, step: OneStep) -> None:
        super().__init__(step, step.m)
        self.U, self.u, self.F, self.bcs = step.V, step.u, step.R, step.bcs

    def _alone(self, m: Function) -> Function:
        if not annotate_tape():
            return field(self.V, self._stepper.state(coefficients(m)), name="state")
        self._stepper.assign(m)
        return self._stepper.solve().copy(deepcopy=True)

    def linearise_at(self, m: Function) -> None:
        """Move the reference: start later solves from the state at m, and keep the Jacobian there for blocks.

        Without it single solves start from what u held (zero in an `AdvectionDiffusion`), and the first block keeps the
        Jacobian at the mean of its parameters, or at zero where that fails; blocks start from the state there. For an
        equation with several solutions this choice may decide which one is found: then call this with a typical
        parameter first, such as the prior mean. It raises what one solve raises.
        """
        check_parameter(m, self.M)
        with stop_annotating():
            self._stepper.refer(m)

    def _path(self, m: Function, state: Function | None) -> list[np.ndarray] | None:
        if not self._stepper.varying:
            return None
        if state is not None:
            self._stepper.assign(m)
        u = self._stepper.state(coefficients(m)) if state is None else coefficients(state)
        return [u, u]
