"""From a residual of the user's own to an equation: what the form contains is found, and checked to fit."""

from collections.abc import Sequence
from dataclasses import replace as changed

from firedrake import DirichletBC, Function, derivative, homogenize, replace
from firedrake.functionspaceimpl import WithGeometry
from tsfc.ufl_utils import compute_form_data
from ufl import Form
from ufl.algorithms import extract_coefficients
from ufl.algorithms.analysis import extract_base_form_operators
from ufl.algorithms.check_arities import ArityMismatch, check_form_arity
from ufl.algorithms.remove_complex_nodes import remove_complex_nodes
from ufl.constantvalue import Zero
from ufl.core.expr import Expr

from fem_diffusion.checks import check_all, check_kind
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_space
from fem_diffusion.fields.coefficients import is_real, owned_size, require_real
from fem_diffusion.forward.equation import Equation, boundary_value
from fem_diffusion.forward.physics import TimeSteps
from fem_diffusion.forward.unknowns import Unknown, expanded, in_condition

__all__ = ["of_residual", "with_degrees"]


def of_residual(F: Form, u: Function, m: Function, bcs: DirichletBC | Sequence[DirichletBC],
                old: Function | None = None, initial: Expr | None = None, steps: TimeSteps | None = None
                ) -> tuple[Equation, Function]:
    """The equation F = 0, split by what is affine in the states, with Functions of its own, and the parameter in it.

    `initial` is where a march starts, by itself what `old` holds. InputError where something does not fit.
    """
    require_real()
    bcs = list(check_all([bcs] if isinstance(bcs, DirichletBC) else bcs, "bcs", object, "DirichletBC"))
    _check(F, u, m, bcs)
    _check_parts([F, *map(boundary_value, bcs), *([] if initial is None else [initial])],
                 {"m": m, "u": u} | ({} if old is None else {"u_old": old}))
    V, M = u.function_space(), m.function_space()
    own, state = Function(M, name="parameter"), Function(V, name="state").assign(u)
    ours: dict[Function, Function] = {u: state, m: own}
    if old is not None:
        ours[old] = Function(V, name="former state").assign(old)
    F, states = replace(with_degrees(F), ours), [ours[x] for x in (u, old) if x is not None]
    A, N, any_slope = [], [], False
    for integral in F.integrals():
        part = Form([integral])
        slopes = [expanded(derivative(part, x)) for x in states]
        bent = any(x in extract_coefficients(slope) for x in states for slope in slopes) or any(
            in_condition(part, x) for x in states)
        (N if bent else A).append(integral)
        any_slope |= not slopes[0].empty()
    if not any_slope:
        raise InputError("∂F/∂u is zero, so Newton's method finds no u: write F so that it depends on u, and not in a "
                         "condition alone.")
    start = Zero(V.value_shape) if old is None else ours[old].copy(deepcopy=True) if initial is None else initial
    whole = Unknown("parameter", "parameter", None, None, M, slice(0, owned_size(M)), own)
    unknowns = [whole] if own in extract_coefficients(F) else []
    if initial is not None and m in extract_coefficients(initial):
        start = replace(initial, {m: own})
        unknowns.append(changed(whole, kind="initial"))
    raised = {i: replace(boundary_value(bc), {m: own}) for i, bc in enumerate(bcs)
              if m in extract_coefficients(boundary_value(bc))}
    if raised:
        unknowns.append(changed(whole, kind="dirichlet"))
    if not unknowns:
        places = "Neither F nor a condition" if old is None else "None of F, conditions and initial state"
        raise InputError(f"{places} contains m: write them with the Function m that is the parameter.")
    given = [homogenize(bc) if i in raised else bc for i, bc in enumerate(bcs)]
    return Equation(state, None if old is None else ours[old], Form(A), Form(N) if N else None, given, raised, start,
                    unknowns, steps, imposed=old is None), own


def _check(F: Form, u: Function, m: Function, bcs: list[DirichletBC]) -> None:
    """InputError where something does not fit."""
    check_kind(F, "F", Form, "the residual, a UFL form such as inner(grad(u), grad(v)) * dx - m * v * dx")
    for x, name in ((u, "u"), (m, "m")):
        check_space(check_kind(x, name, Function, "the Function that F contains").function_space(), name)
    arguments, V = tuple(F.arguments() or ()), u.function_space()
    if len(arguments) != 1 or arguments[0].function_space() != V:
        raise InputError(f"F has {len(arguments)} arguments: write the residual with one TestFunction in the space of "
                         f"u, {V}, and u itself where a TrialFunction would be.")
    if extract_base_form_operators(F):
        raise InputError("F contains an interpolation or another operator that is no expression: write it out, or "
                         "interpolate what is known into a Function first; or give the solve as a plain function "
                         "m -> u.")
    try:
        check_form_arity(remove_complex_nodes(expanded(F)), arguments)
    except ArityMismatch as error:   # derived from BaseException
        raise InputError(f"F is not linear in its test function ({error}): multiply every term by the test function, "
                         "once.") from error
    if any(is_real(W) for W in V):
        raise InputError(f"u is in {V.ufl_element()}, and Firedrake has no matrices with the dense rows of numbers: "
                         "leave numbers out of u, or give the solve as a plain function m -> u.")
    for bc in bcs:
        check_kind(bc, "A condition", DirichletBC, "DirichletBC(V, value, marker), or impose it weakly in F")
        if _whole(bc.function_space()) != V:
            raise InputError(f"A condition is on {bc.function_space()}, and u in {V}: build it on the space of u.")
    if V.value_shape != () and any(m in extract_coefficients(boundary_value(bc)) for bc in bcs):
        raise InputError("The value of a condition contains m, which is possible for a scalar u alone: impose it "
                         "weakly in F (Nitsche's method).")
    if u not in extract_coefficients(F) or u is m:
        raise InputError("F does not contain u: write it with the Function u that is solved for.")


def with_degrees(F: Form) -> Form:
    """The same form with the quadrature degrees that Firedrake takes for it as a whole.

    Parts and derivatives of it would get others by themselves, and of what is no polynomial other integrals. What is
    integrated everywhere has one degree, that of places where nothing else is. Of mixed spaces, whose blocks have a
    degree each, a form stays as it is.
    """
    if any(len(argument.function_space()) > 1 for argument in F.arguments() or ()):
        return F
    degrees = {}
    for group in compute_form_data(F).integral_data:
        for integral in group.integrals:
            data = dict(integral.metadata())
            degree = data.pop("estimated_polynomial_degree")
            for number in group.subdomain_id:
                degrees[str(group.domain), group.integral_type, number, str(data)] = degree
    integrals = []
    for integral in F.integrals():
        data, number = integral.metadata(), integral.subdomain_id()
        number = "otherwise" if number == "everywhere" else number
        degree = degrees.get((str(integral.ufl_domain()), integral.integral_type(), number, str(data)))
        if degree is not None and "quadrature_degree" not in data:
            integral = integral.reconstruct(metadata={**data, "quadrature_degree": degree})
        integrals.append(integral)
    return Form(integrals)


def _check_parts(places: list[Form | Expr], functions: dict[str, Function]) -> None:
    """InputError where a part of a Function stands for it, whose values no solve would change."""
    found = [c for place in places for c in extract_coefficients(place)]
    for name, f in functions.items():
        if any(c is part for part in _parts(f) for c in found):
            raise InputError(f"A form or condition contains a part of {name} by {name}.subfunctions or {name}.sub(i), "
                             f"which is a Function of its own: take split({name}), or {name}[i].")


def _parts(f: Function) -> list[Function]:
    """What `subfunctions` and `sub` give of a Function, and of those."""
    V = f.function_space()
    own = f.subfunctions if len(V) > 1 else [f.sub(i) for i in range(V.block_size)]
    own = [part for part in own if part is not f]
    return own + [part for whole in own for part in (_parts(whole) if len(V) > 1 else [])]


def _whole(space: WithGeometry) -> WithGeometry:
    """The space that a condition on a component belongs to."""
    while space.parent is not None:
        space = space.parent
    return space
