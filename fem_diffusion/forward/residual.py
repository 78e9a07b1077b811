"""From a residual of the user's own to an equation: what the form contains is found, and checked to fit."""

from collections.abc import Sequence
from dataclasses import replace as changed

from firedrake import DirichletBC, Function, derivative, homogenize, replace
from firedrake.functionspaceimpl import WithGeometry
from ufl import Form
from ufl.algorithms import extract_coefficients
from ufl.constantvalue import Zero
from ufl.core.expr import Expr

from fem_diffusion.checks import check_kind
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_space
from fem_diffusion.fields.coefficients import owned_size, require_real
from fem_diffusion.forward.equation import Equation, boundary_value
from fem_diffusion.forward.physics import TimeSteps
from fem_diffusion.forward.unknowns import Unknown, expanded

__all__ = ["of_residual"]


def of_residual(F: Form, u: Function, m: Function, bcs: DirichletBC | Sequence[DirichletBC],
                old: Function | None = None, initial: Expr | None = None, steps: TimeSteps | None = None
                ) -> tuple[Equation, Function]:
    """The equation F = 0, split by what is affine in the states, with Functions of its own, and the parameter in it.

    `initial` is where a march starts, by itself what `old` holds. InputError where something does not fit.
    """
    require_real()
    bcs = [bcs] if isinstance(bcs, DirichletBC) else list(bcs)
    _check(F, u, m, bcs)
    V, M = u.function_space(), m.function_space()
    own, state = Function(M, name="parameter"), Function(V, name="state").assign(u)
    ours: dict[Function, Function] = {u: state, m: own}
    if old is not None:
        ours[old] = Function(V, name="former state").assign(old)
    F, states = replace(F, ours), [ours[x] for x in (u, old) if x is not None]
    A, N = [], []
    for integral in F.integrals():
        slopes = [expanded(derivative(Form([integral]), x)) for x in states]
        bent = any(x in extract_coefficients(slope) for x in states for slope in slopes)
        (N if bent else A).append(integral)
    start = Zero(V.value_shape) if old is None else ours[old].copy(deepcopy=True) if initial is None else initial
    whole = Unknown("parameter", "parameter", None, None, M, slice(0, owned_size(M)), own)
    unknowns = [whole] if own in extract_coefficients(F) else []
    if initial is not None and m in extract_coefficients(initial):
        start = replace(initial, {m: own})
        unknowns.append(changed(whole, kind="initial"))
    raised, moved = {}, [bc for bc in bcs if m in extract_coefficients(boundary_value(bc))]
    for bc in moved:
        unknowns.append(x := changed(whole, kind="dirichlet"))
        raised[x] = replace(boundary_value(bc), {m: own})
    if not unknowns:
        places = "Neither F nor a condition" if old is None else "None of F, conditions and initial state"
        raise InputError(f"{places} contains m: write them with the Function m that is the parameter.")
    known = [bc for bc in bcs if bc not in moved]
    return Equation(state, None if old is None else ours[old], Form(A), Form(N) if N else None,
                    [*known, *homogenize(moved)], raised, start, unknowns, steps, imposed=old is None), own


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
        if _whole(bc.function_space()) != V:
            raise InputError(f"A condition is on {bc.function_space()}, and u in {V}: build it on the space of u.")
    if V.value_shape != () and any(m in extract_coefficients(boundary_value(bc)) for bc in bcs):
        raise InputError("The value of a condition contains m, which is possible for a scalar u alone: impose it "
                         "weakly in F (Nitsche's method).")
    if u not in extract_coefficients(F) or u is m:
        raise InputError("F does not contain u: write it with the Function u that is solved for.")


def _whole(space: WithGeometry) -> WithGeometry:
    """The space that a condition on a component belongs to."""
    while space.parent is not None:
        space = space.parent
    return space
