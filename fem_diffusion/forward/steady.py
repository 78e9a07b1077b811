"""Steady problems from a residual in UFL: solved for many parameters as fast as what the Jacobian depends on allows."""

from collections.abc import Mapping, Sequence

import numpy as np
from firedrake import (
    DirichletBC, Function, LinearVariationalProblem, NonlinearVariationalProblem, replace,
)
from firedrake.adjoint import stop_annotating
from pyadjoint import no_annotations
from ufl import Form
from ufl.algorithms import extract_coefficients

from fem_diffusion.checks import check_kind
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_solver, check_space
from fem_diffusion.fields.coefficients import coefficients, require_real
from fem_diffusion.forward.blocks import BlockForward, check_parameter
from fem_diffusion.forward.equation import boundary_value, of_residual
from fem_diffusion.forward.one_step import OneStep
from fem_diffusion.forward.solvers import linear_options

__all__ = ["Steady"]


class Steady(BlockForward):
    """The map m -> u of F(u; m; v) = 0 for all v, from the residual in UFL.

    How it is solved for many parameters follows from what the form contains. Where ∂F/∂u depends neither on u nor on
    m, one factorisation serves for ever, and a block of parameters is one block of right-hand sides; where it depends
    on u alone, blocks iterate with the Jacobian at a reference state (chord Newton); where it depends on m, a loop over
    one solver is left.

    Parameters
    ----------
    F : ufl.Form
        Residual, linear in its test function, which is in the space of u; other coefficients keep their values.
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

    _march: OneStep

    @no_annotations
    def __init__(self, F: Form, u: Function, m: Function, bcs: DirichletBC | Sequence[DirichletBC] = (), *,
                 solver_parameters: str | Mapping = "direct", options_prefix: str | None = None) -> None:
        require_real()
        conditions: list[DirichletBC] = [bcs] if isinstance(bcs, DirichletBC) else list(bcs)
        _check(F, u, m, conditions)
        V, M = u.function_space(), m.function_space()
        parameters = check_solver(solver_parameters, options_prefix, V.comm)
        own, state = Function(M, name="parameter"), Function(V, name="state").assign(u)
        conditions = [bc.reconstruct(g=replace(boundary_value(bc), {m: own}))
                      if m in extract_coefficients(boundary_value(bc)) else bc for bc in conditions]
        e = of_residual(replace(F, {u: state, m: own}), state, own, conditions)
        self._pose(OneStep(e, M, linear_options(parameters, V, True), options_prefix, own))

    @classmethod
    def from_problem(cls, problem: LinearVariationalProblem | NonlinearVariationalProblem, m: Function, *,
                     solver_parameters: str | Mapping = "direct", options_prefix: str | None = None) -> "Steady":
        """From a variational problem as it is, with its conditions, and the Function in it that is the parameter."""
        check_kind(problem, "problem", NonlinearVariationalProblem, "a LinearVariationalProblem or a "
                   "NonlinearVariationalProblem")
        return cls(problem.F, problem.u, m, problem.bcs, solver_parameters=solver_parameters,
                   options_prefix=options_prefix)

    def _pose(self, step: OneStep) -> None:
        super().__init__(step, step.m)
        self.U, self.u, self.F, self.bcs = step.V, step.u, step.R, step.bcs

    def _alone(self, m: Function) -> Function:
        self._march.assign(m)
        return self._march.solve().copy(deepcopy=True)

    def linearise_at(self, m: Function) -> None:
        """Move the reference: start later solves from the state at m, and keep the Jacobian there for blocks.

        Without it single solves start from what u held (zero in an `AdvectionDiffusion`), and the first block keeps the
        Jacobian at the mean of its parameters, or at zero where that fails; blocks start from the state there. For an
        equation with several solutions this choice may decide which one is found: then call this with a typical
        parameter first, such as the prior mean. It raises what one solve raises.
        """
        check_parameter(m, self.M)
        with stop_annotating():
            self._march.refer(m)

    def _path(self, m: Function, state: Function | None) -> list[np.ndarray] | None:
        if not self._march.varying:
            return None
        self._march.assign(m)
        u = coefficients(self._march.solve() if state is None else state)
        return [u, u]


def _check(F: Form, u: Function, m: Function, bcs: list[DirichletBC]) -> None:
    """InputError where something does not fit."""
    check_kind(F, "F", Form, "the residual, a UFL form such as inner(grad(u), grad(v)) * dx - m * v * dx")
    for x, name in ((u, "u"), (m, "m")):
        check_space(check_kind(x, name, Function, "the Function that F contains").function_space(), name)
    arguments, V = tuple(F.arguments() or ()), u.function_space()
    if len(arguments) != 1 or arguments[0].function_space() != V:
        raise InputError(f"F has {len(arguments)} arguments: write the residual with one TestFunction in the space of "
                         f"u, {V}, and u itself where a TrialFunction would be.")
    for bc in bcs:
        check_kind(bc, "A condition", DirichletBC, "DirichletBC(V, value, marker)")
        space = bc.function_space()
        while space.parent is not None:
            space = space.parent
        if space != V:
            raise InputError(f"A condition is on {space}, and u in {V}: build it on the space of u.")
    inside = extract_coefficients(F)
    moved = [bc for bc in bcs if m in extract_coefficients(boundary_value(bc))]
    if moved and V.value_shape != ():
        raise InputError("The value of a condition contains m, which is possible for a scalar u alone: impose it "
                         "weakly in F (Nitsche's method).")
    if u not in inside or u is m:
        raise InputError("F does not contain u: write it with the Function u that is solved for.")
    if m not in inside and not moved:
        raise InputError("Neither F nor a condition contains m: write them with the Function m that is the parameter.")
