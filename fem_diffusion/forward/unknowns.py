"""What may be unknown in a problem: names, spaces, and the Function that stands for each unknown in the forms."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Number
from typing import TypeVar

import numpy as np
from firedrake import Constant, Function, FunctionSpace, MeshGeometry, TrialFunction, derivative
from firedrake.functionspaceimpl import WithGeometry
from ufl import H1, Form
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.conditional import Condition
from ufl.core.expr import Expr
from ufl.corealg.traversal import unique_pre_traversal

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import assign, is_real, owned_size
from fem_diffusion.fields.checks import check_marker, check_scalar, check_space, is_callable
from fem_diffusion.forward.physics import Marker, Scalar, TimeSteps
from fem_diffusion.observation.linear import Observation, point_sensors

__all__ = ["Name", "Unknown", "apply_unknown", "check_spaces", "derivative_by", "expanded", "in_condition",
           "is_discontinuous", "read"]

STEADY = "'source', 'diffusivity', 'velocity', ('flux', marker) or ('dirichlet', marker)"
TRANSIENT = "'initial', ('source', shape), " + STEADY
IN_TIME = ("source", "flux", "dirichlet", "diffusivity")

Name = str | tuple[str, Marker | Scalar]   # as users write them
Integrand = TypeVar("Integrand", Form, Expr)


@dataclass(frozen=True, eq=False)
class Unknown:
    """One unknown coefficient and its place in the parameter."""

    name: Name
    kind: str
    marker: Marker | None   # of a flux or a Dirichlet value
    shape: Scalar | None    # of ("source", shape)
    space: WithGeometry     # M or its component
    columns: slice          # its owned coefficients among those of M
    value: Function         # what the forms contain: its coefficient, at one time where it depends on time
    nodes: np.ndarray | None = None        # the times of its components, where it is a field in space and time
    strength: bool = False                 # whether it is a function of time alone
    submesh: MeshGeometry | None = None    # where a flux lives, if not on the state's mesh

    @property
    def moves(self) -> bool:
        """Whether it depends on time."""
        return self.strength or self.nodes is not None

    @property
    def real(self) -> bool:
        """Whether there are numbers in it, of Real spaces, for whose dense columns Firedrake has no matrix."""
        return any(is_real(W) for W in self.space)

    def weights(self, times: np.ndarray) -> Observation | np.ndarray | None:
        """What `at` needs for each of these times: rows over the space (strength) or over the components."""
        if self.nodes is not None:
            return np.stack([np.interp(times, self.nodes, row) for row in np.eye(len(self.nodes))], axis=1)
        try:
            return point_sensors(self.space, np.asarray(times)[:, None]) if self.strength else None
        except InputError as error:
            raise InputError(f"M's interval must reach from 0 to the last time, for {self.name!r}: build it as "
                             f"IntervalMesh(n, {max(times):g}); {error}") from error

    def at(self, ms: np.ndarray, weights: Observation | np.ndarray | None) -> Callable[[int], np.ndarray]:
        """Coefficients k -> (n, n_owned of the value) at all times, for members (n, n_owned of M) and their weights."""
        part = ms[:, self.columns]
        if isinstance(weights, Observation):
            values = weights.apply(part)
            return lambda k: values[:, k:k + 1]
        if weights is not None:
            part = part.reshape(len(part), -1, weights.shape[1])
            return lambda k: part @ weights[k]
        return lambda k: part

    def pull(self, values: np.ndarray, weights: Observation | np.ndarray | None, k: int) -> np.ndarray:
        """Transpose of `at`: from rows over the value, shape (l, n_owned of it), to rows over the space."""
        if isinstance(weights, Observation):
            return values * weights.rows[[k]].toarray()
        if weights is not None:
            return (values[:, :, None] * weights[k]).reshape(len(values), -1)
        return values

    def write(self, row: np.ndarray) -> None:
        """Set the value from one row of `at`."""
        if self.strength:
            self.value.assign(float(row[0]))
        else:
            assign(self.value, row)


def expanded(F: Integrand) -> Integrand:
    """A form or expression with its derivatives worked out; what UFL itself says of the type is wrong."""
    return expand_derivatives(F)  # pyright: ignore[reportReturnType]


def in_condition(F: Form | Expr, x: Function) -> bool:
    """Whether x decides a condition in F, as of a sign: where that jumps, derivatives know nothing of it."""
    roots = [expanded(integral.integrand()) for integral in F.integrals()] if isinstance(F, Form) else [expanded(F)]
    return any(isinstance(node, Condition) and x in extract_coefficients(node)
               for root in roots for node in unique_pre_traversal(root))


def derivative_by(F: Integrand, x: Unknown) -> Integrand:
    """∂F/∂(value of x), of an argument, or for a function of time alone the only column of it."""
    W = x.value.function_space()
    direction = Constant(1.0) if x.strength else TrialFunction(W) if isinstance(F, Expr) else None
    return expanded(derivative(F, x.value, direction))


def _parse(name: Name, mesh: MeshGeometry, transient: bool) -> tuple[str, Marker | None, Scalar | None]:
    """Split the name of an unknown into its kind, marker and shape (None where it has none)."""
    if isinstance(name, str) and (name in ("source", "diffusivity", "velocity") or (transient and name == "initial")):
        return name, None, None
    if isinstance(name, tuple) and len(name) == 2 and isinstance(name[0], str):
        if name[0] in ("flux", "dirichlet"):
            return name[0], check_marker(name[1], f"the unknown {name[0]}"), None
        if transient and name[0] == "source":
            return "source", None, check_scalar(name[1], "the shape of the source", (mesh,))
    raise InputError(f"unknown is {name!r}: it must be one of {TRANSIENT if transient else STEADY}, or a list of them.")


def is_discontinuous(V: WithGeometry) -> bool:
    """Whether every coefficient belongs to one cell alone."""
    inside = V.mesh().topological_dimension
    return all((sum(dim) if isinstance(dim, tuple) else dim) == inside or not any(entities.values())
               for dim, entities in V.finat_element.entity_dofs().items())


def check_spaces(V: WithGeometry, M: WithGeometry) -> None:
    """Refuse what is no space, and a state space that is not scalar and CG or DG."""
    check_space(V, "V")
    check_space(M, "M")
    if len(V) > 1 or V.value_shape != () or is_real(V) or not (V.ufl_element() in H1 or is_discontinuous(V)):
        raise InputError(f"V is {V}: it must be scalar and either continuous or discontinuous, such as "
                         "FunctionSpace(mesh, 'CG', 1) or FunctionSpace(mesh, 'DG', 1).")


def read(unknown: Name | list[Name], V: WithGeometry, M: WithGeometry, m: Function, given: dict,
         steps: TimeSteps | None = None) -> list[Unknown]:
    """The unknowns by their names, spaces checked; m is for one alone and not in time, `given` is checked already."""
    several = isinstance(unknown, list)
    names = unknown if several else [unknown]
    parsed = [_parse(name, V.mesh(), steps is not None) for name in names]
    if not names or len({(kind, marker) for kind, marker, _ in parsed}) < len(names):
        raise InputError(f"unknown is {unknown!r}: name each coefficient once.")
    if len(M) != len(names) or several != (len(M) > 1):
        raise InputError(f"M has {len(M)} components for the unknown {unknown!r}: a list of names, two or more, takes "
                         "MixedFunctionSpace([...]) with one component for each, a single name its own space.")
    spaces = [M.sub(i).collapse() for i in range(len(names))] if several else [M]
    ends = np.cumsum([0] + [owned_size(space) for space in spaces])
    found = []
    for (kind, marker, shape), name, space, first, last in zip(parsed, names, spaces, ends, ends[1:]):
        free = is_callable(given[kind] if marker is None else given[kind].get(marker))
        x = Unknown(name, kind, marker, shape, space, slice(first, last), None if several else m)
        found.append(_placed(x, V, free, steps))
    nodes = steps and steps.parameter_times
    if nodes is not None and all(x.nodes is None for x in found):
        raise InputError(f"parameter_times has {len(nodes)} times, but no unknown has as many components: take "
                         f"VectorFunctionSpace(mesh, 'CG', 1, dim={len(nodes)}) for one that depends on space and "
                         "time, or leave parameter_times out.")
    return found


def _placed(x: Unknown, V: WithGeometry, free: bool, steps: TimeSteps | None) -> Unknown:
    """An Unknown with its value, its space checked; `free`: a callable makes the coefficient of it."""
    space, mesh = x.space, x.space.mesh()
    here, there, gdim = V.mesh().topology, mesh.topology, V.mesh().geometric_dimension
    strength = steps is not None and there is not here and mesh.geometric_dimension == 1
    interval = "" if steps is None else f"FunctionSpace(IntervalMesh(n, {steps.all[-1]:g}), 'CG', 1)."
    if x.shape is not None and not strength:
        raise InputError(f"{x.name!r} is a strength in time: take M = {interval}")
    if strength:
        if x.kind not in IN_TIME or space.value_shape or space.ufl_element() not in H1 or x.real:
            raise InputError(f"a function of time alone is scalar, continuous and one of {', '.join(IN_TIME)}, not "
                             f"{x.name!r} in {space}: take {interval}")
        return replace(x, value=Function(FunctionSpace(V.mesh(), "R", 0), name="strength"), strength=True)
    if there is not here and (x.kind != "flux" or getattr(there, "submesh_parent", None) is not here):
        raise InputError("M must live on V's mesh; only a ('flux', marker) unknown may live on "
                         "Submesh(mesh, mesh.topological_dimension - 1, marker) of that same mesh"
                         + ("." if steps is None else ", and a function of time on an IntervalMesh."))
    x, nodes = replace(x, submesh=None if there is here else mesh), steps and steps.parameter_times
    if nodes is not None and x.kind in IN_TIME and space.value_shape == (len(nodes),):
        W = FunctionSpace(mesh, space.ufl_element().sub_elements[0])
        return replace(x, value=Function(W, name=f"{x.kind} at one time"), nodes=nodes)
    shapes = {"velocity": [(gdim,)], "diffusivity": [(), (gdim, gdim)]}.get(x.kind, [()])
    if space.value_shape not in shapes and not free:
        family = "VectorFunctionSpace" if x.kind == "velocity" else "FunctionSpace"
        raise InputError(f"a {x.kind} unknown has value shape {shapes[0]}, but M has {space.value_shape}: take "
                         f"M = {family}(mesh, 'CG', 1), say, or give {x.kind} as a callable m -> UFL expression.")
    return x if x.value is not None else replace(x, value=Function(space))


def apply_unknown(name: str, given: Scalar | Callable | None, default: float | None, value: Function) -> Expr:
    """An unknown coefficient: the value, or what a callable makes of it."""
    if given is default or (isinstance(given, Number) and given == default):
        return value
    if is_callable(given):
        return given(value)
    raise InputError(f"{name} is the unknown, so its value is the parameter: leave it out, or give a callable "
                     "m -> UFL expression.")
