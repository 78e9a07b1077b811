"""Problems in time from a residual in UFL: all samples of a block take each step together wherever that is possible."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from finat.ufl import FiniteElementBase, TensorElement, VectorElement
from firedrake import Constant, DirichletBC, Function, FunctionSpace, MixedFunctionSpace, replace
from firedrake.functionspaceimpl import WithGeometry
from numpy.typing import ArrayLike
from pyadjoint import no_annotations
from ufl import Form
from ufl.algorithms import extract_coefficients
from ufl.core.expr import Expr

from fem_diffusion.checks import check_kind, check_number
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_solver
from fem_diffusion.fields.coefficients import field
from fem_diffusion.forward.blocks import BlockForward
from fem_diffusion.forward.physics import TimeSteps
from fem_diffusion.forward.residual import of_residual
from fem_diffusion.forward.solvers import linear_options
from fem_diffusion.forward.stepper import Stepper, contains

__all__ = ["March"]


class March(BlockForward):
    """The map from m to the states at chosen times of F(uⁿ⁺¹, uⁿ; m; v) = 0 for all v, step after step.

    F is one step as a Firedrake user writes it, of any scheme with one former state: with ``u_mid = (u + u_old) / 2``,
    ``F = inner(u - u_old, v) / dt * dx + inner(grad(u_mid), grad(v)) * dx - m * v * dx`` is that of Crank-Nicolson.
    Samples march together. Where ∂F/∂u depends neither on the states nor on m, one factorisation serves all steps, and
    a step of a block is one solve with a block of right-hand sides; where it depends on the states, a block iterates
    with the Jacobian at a typical one, and what that loses goes to Newton's method; where it depends on m, each sample
    has one factorisation for all its steps.

    Parameters
    ----------
    F : ufl.Form
        Residual of one step, linear in its test function, which is in the space of u; other coefficients have to keep
        their values.
    u, u_old : Function
        States in F at the end and at the beginning of a step, in any space; neither is written to.
    m : Function
        The parameter: in F, in `initial` or both, in any space on a mesh that F may integrate over.
    dt : Constant or float
        The step, as F contains it.
    T : float
        The end, a multiple of dt; time begins at 0.
    bcs : DirichletBC, or sequence of them
        Conditions on u or its components. Values may depend on m where the space of u is scalar.
    initial : UFL expression, optional
        State at time 0, which may contain m; interpolated. Where left out, what u_old holds now.
    t : Constant, optional
        The time at the end of a step, as it appears in F and bcs: make ``t = Constant(0.0)``, write forms with it, pass
        it here. It is overwritten by every solve.
    times : sequence of float, optional
        Times whose states are saved, increasing, multiples of dt from 0 to T. Where left out, T alone.
    solver_parameters, options_prefix : "direct", "iterative" or dict, and str, optional
        PETSc options of every linear solve, and of Newton's method where there is one, and their prefix on the command
        line.

    Attributes
    ----------
    V, M, U : FunctionSpace
        Of one state, of the parameter, and of a result: V where `times` is left out, else V with one value more for
        each time, the last index of its entries, also of each component of a mixed V (of H(div) or H(curl) the first).
        ``point_sensors(problem.U, points)`` reads a time series at every point.
    m : Function
        The problem's own parameter.
    linear, operator_depends_on_parameter : bool
        Whether F is affine in u and u_old together, and whether ∂F/∂u contains m.
    steps : TimeSteps
        All steps and the saved ones.

    Raises
    ------
    InputError, InstallError
        If F is no such form, u, u_old or m is not in it, dt does not divide the times, or options are wrong; a complex
        PETSc.
    """

    @no_annotations
    def __init__(self, F: Form, u: Function, u_old: Function, m: Function, dt: Constant | float, T: float,
                 bcs: DirichletBC | Sequence[DirichletBC] = (), *, initial: Expr | None = None,
                 t: Constant | None = None, times: ArrayLike | None = None, solver_parameters: str | Mapping = "direct",
                 options_prefix: str | None = None) -> None:
        given: Any = dt
        number = float(given) if isinstance(dt, Constant) and not given.ufl_shape else given
        step, end = check_number(number, "dt", above=0), check_number(T, "T", above=0)
        # The scheme is in F: the time there is that at the end of a step.
        steps = TimeSteps([end] if times is None else times, step, theta=1.0, t=t)
        if abs(steps.times[-1] - end) > 1e-9 * end:
            raise InputError(f"times ends with {steps.times[-1]:g}, and T is {end:g}: let the last saved time be T.")
        _check(F, u, u_old, m)
        if isinstance(dt, Constant):
            if not contains(F, [dt]):
                raise InputError("F does not contain dt: write it with the Constant that is given as dt, or give the "
                                 "number that it has as its step.")
            F = replace(F, {dt: Constant(step)})   # that of the user may change
        V = u.function_space()
        if initial is not None:
            initial = check_initial(initial, V)
        e, own = of_residual(F, u, m, bcs, u_old, initial, steps)
        options = linear_options(check_solver(solver_parameters, options_prefix, V.comm), V, True)
        self._pose(Stepper(e, m.function_space(), options, options_prefix), own, steps, times is None)

    def _pose(self, stepper: Stepper, parameter: Function, steps: TimeSteps, end_alone: bool = False) -> None:
        super().__init__(stepper, parameter)
        self.steps = steps
        self.U = self.V if end_alone else series_space(self.V, len(steps.times))

    def _alone(self, m: Function) -> Function:
        return field(self.U, self.solve_many([m])[0], name="states")


def series_space(V: WithGeometry, n: int) -> WithGeometry:
    """The space of n states in V, whose coefficients are those of V, each with its n values."""
    if len(V) > 1:
        return MixedFunctionSpace([series_space(W.collapse(), n) for W in V])
    element = V.ufl_element()
    if isinstance(element, (VectorElement, TensorElement)):
        inner: FiniteElementBase = element.sub_elements[0]
        if V.block_size != np.prod(element.reference_value_shape, dtype=int) // inner.reference_value_size:
            raise InputError(f"the states are in {element}, whose symmetry a series of them cannot keep: leave `times` "
                             "out, or take a TensorFunctionSpace without symmetry.")
        shape = element.reference_value_shape[:-len(inner.reference_value_shape) or None]
        return FunctionSpace(V.mesh(), TensorElement(inner, shape=(*shape, n)))
    return FunctionSpace(V.mesh(), VectorElement(element, dim=n))


def check_initial(initial: Expr, V: WithGeometry) -> Expr:
    """The initial state as a UFL expression with the shape of states in V."""
    shape = getattr(initial, "ufl_shape", None)
    if not isinstance(initial, Expr) or shape != V.value_shape:
        raise InputError(f"initial is {initial!r}: give a UFL expression of shape {V.value_shape}, such as m itself, "
                         "or leave it out and let u_old hold it.")
    return initial


def _check(F: Form, u: Function, u_old: Function, m: Function) -> None:
    """InputError where the former state does not fit."""
    check_kind(F, "F", Form, "the residual of one step, a UFL form")
    check_kind(u, "u", Function, "the Function that F contains")
    check_kind(u_old, "u_old", Function, "the Function in F that holds the former state")
    if u_old.function_space() != u.function_space() or u_old is u or u_old is m:
        raise InputError("u_old must be another Function in the space of u: make one with Function(V).")
    if u_old not in extract_coefficients(F):
        raise InputError("F does not contain u_old: write one step with both, such as inner(u - u_old, v) / dt * dx "
                         "for ∂u/∂t, or take Steady.")
