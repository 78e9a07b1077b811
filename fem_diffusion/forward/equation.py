"""From what users give to an equation in UFL: unknowns in their places, conditions that fit the mesh and each other."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from firedrake import (
    Constant, DirichletBC, Function, Measure, MeshGeometry, SpatialCoordinate, as_vector, assemble, homogenize, replace,
)
from firedrake.functionspaceimpl import WithGeometry
from ufl import Form, as_tensor, as_ufl, diff, variable
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.constantvalue import Zero
from ufl.core.expr import Expr

from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import exterior_measures
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.forward.physics import Marker, Scalar, TimeSteps
from fem_diffusion.forward.unknowns import Unknown, apply_unknown, expanded, in_condition, is_discontinuous
from fem_diffusion.forward.weak_forms import Terms, residual

__all__ = ["Equation", "boundary_value", "equation"]


@dataclass(frozen=True, eq=False)
class Equation:
    """The residual A + N of a state, and what it is solved with."""

    u: Function                # the state in A and N, in time that at the end of a step
    old: Function | None       # in time the one at its beginning
    A: Form                    # the part affine in them, a one-form
    N: Form | None             # the rest
    bcs: list[DirichletBC]     # strong conditions; of several for one node the last holds
    raised: dict[int, Expr]    # by their numbers in `bcs`, in which they are zero, values of those that are unknown
    initial: Expr              # initial state; zero in a steady equation
    unknowns: list[Unknown]
    steps: TimeSteps | None
    imposed: bool = True       # whether the initial state takes the strong boundary values

    @property
    def starts(self) -> list[Unknown]:
        """Unknowns of the initial state."""
        return [x for x in self.unknowns if x.kind == "initial"]

    @property
    def lifted(self) -> list[Unknown]:
        """Unknown boundary values where they are imposed strongly."""
        return [x for x in self.unknowns if x.kind == "dirichlet"] if self.raised else []

    @property
    def loads(self) -> list[Unknown]:
        """Unknowns that the residual contains."""
        return [x for x in self.unknowns if x not in self.starts + self.lifted]

    @property
    def jumps(self) -> bool:
        """Whether an unknown decides a condition, as in a level set, which derivatives do not see."""
        places = [self.initial, *self.raised.values(), self.A, *([] if self.N is None else [self.N])]
        return any(in_condition(place, x.value) for place in places for x in self.unknowns)

    @cached_property
    def zero_bcs(self) -> list[DirichletBC]:
        """Homogeneous conditions where values are imposed strongly."""
        return homogenize(self.bcs)

    @cached_property
    def fixed(self) -> np.ndarray:
        """Numbers of the owned coefficients with strong Dirichlet values."""
        free = Function(self.u.function_space())
        with free.dat.vec_wo as x:
            x.set(1.0)
        for bc in self.zero_bcs:
            bc.apply(free)
        return np.flatnonzero(coefficients(free) == 0)


def boundary_value(bc: DirichletBC) -> Expr:
    """What was given as a condition's value; its `function_arg` holds an expression only as it was interpolated."""
    return as_ufl(bc._original_arg)  # pyright: ignore[reportReturnType]


def mesh_markers(mesh: MeshGeometry) -> tuple[Marker, ...]:
    """Markers of the exterior facets, the same on every rank."""
    return (*(int(i) for i in mesh.exterior_facets.unique_markers), *list(exterior_measures(mesh))[1:])


def _check_markers(mesh: MeshGeometry, conditions: dict[str, Iterable[Marker]]) -> None:
    """Refuse markers that the mesh lacks, and markers named twice, in {condition: markers}."""
    known = mesh_markers(mesh)
    listing = "the markers of this mesh are " + (", ".join(map(repr, known)) or "none (use 'on_boundary')")
    if mesh.extruded and "top" not in known:
        listing += "; its extrusion is periodic, without top and bottom"
    owner = {}
    for name, keys in conditions.items():
        for key in keys:
            atoms = key if isinstance(key, tuple) else (key,)
            for atom in known or atoms if key == "on_boundary" else atoms:
                if atom not in known and atom != "on_boundary":
                    raise InputError(f"{name} names marker {atom!r}, but {listing}: take one of those.")
                if atom in owner:
                    raise InputError(f"marker {atom!r} is named by both {owner[atom]} and {name}: give each marker one "
                                     f"condition ({listing}).")
                owner[atom] = name


def _coefficient(value: Scalar | tuple, name: str) -> Expr:
    """A UFL expression from what `check_coefficients` lets through, unless it is a callable for something known."""
    if isinstance(value, Expr):
        return value
    if callable(value):
        raise InputError(f"{name} is a callable, which only an unknown may be: give a number or a UFL expression.")
    return as_vector([_coefficient(c, name) for c in value]) if isinstance(value, tuple) else Constant(value)


def _diffusivity(value: Scalar | list | np.ndarray) -> Expr:
    """The diffusivity as a UFL scalar or a UFL tensor of shape (gdim, gdim)."""
    if not isinstance(value, (list, np.ndarray)):
        return _coefficient(value, "diffusivity")
    try:
        array = np.array(value, dtype=float)
    except (TypeError, ValueError):   # rows of UFL scalars
        return as_tensor(value)  # pyright: ignore[reportReturnType]
    if not np.allclose(array, array.T) or np.linalg.eigvalsh(array).min() <= 0:
        raise InputError(f"the diffusivity is {value!r}: numbers must be positive, or symmetric positive definite.")
    return Constant(array)


def _facet_measure(mesh: MeshGeometry, marker: Marker, submesh: MeshGeometry | None = None) -> Measure:
    """Boundary measure over a marker, intersected with a codimension-one submesh where there is one."""
    parts = exterior_measures(mesh)
    if marker in parts:
        return parts[marker]
    sides = parts.pop("sides")
    if marker != "on_boundary":
        sides = sides(marker)
    if submesh is not None:
        sides = sides.reconstruct(intersect_measures=(Measure("dx", submesh),))
    return sum(parts.values(), sides) if marker == "on_boundary" else sides


def _check_submesh(mesh: MeshGeometry, marker: Marker, submesh: MeshGeometry) -> None:
    """Refuse a submesh that is not the named part of the boundary: the measure would not notice."""
    ds, dx = _facet_measure(mesh, marker), Measure("dx", submesh)
    x, s = SpatialCoordinate(mesh), SpatialCoordinate(submesh)
    size = assemble(Constant(1) * ds), assemble(Constant(1) * dx)
    place = [assemble(sum(c / (2.0 + i) for i, c in enumerate(p)) * over) for p, over in ((x, ds), (s, dx))]
    if not np.allclose((size[0], place[0]), (size[1], place[1]), rtol=1e-8, atol=1e-8 * size[0]):
        raise InputError(f"M's submesh is not the boundary with marker {marker!r}: build it as "
                         f"Submesh(mesh, mesh.topological_dimension - 1, {marker!r}).")


def equation(V: WithGeometry, unknowns: list[Unknown], given: dict, steps: TimeSteps | None = None) -> Equation:
    """Put the unknowns in their places, check what belongs together, and write the residual, in time of a θ-step.

    `given`, from `check_coefficients`: those of `Physics` and `Boundary`, ``supg`` and, if transient, ``initial``.
    """
    mesh, u, change = V.mesh(), Function(V, name="state"), None if steps is None else Function(V)
    tables = {"dirichlet": dict(given["dirichlet"]), "flux": dict(given["flux"]), "robin": given["robin"]}
    dirichlet = tables["dirichlet"]
    single: dict[str, Any] = {name: given.get(name, 0.0) for name in ("source", "diffusivity", "velocity", "initial")}
    for x in unknowns:
        if x.marker is not None:
            # Last in its table, so that it wins at corners shared with other Dirichlet conditions.
            table = tables[x.kind]
            table[x.marker] = apply_unknown(f"{x.kind}[{x.marker!r}]", table.pop(x.marker, None), None, x.value)
        else:
            default = {"diffusivity": 1, "velocity": None}.get(x.kind, 0)
            single[x.kind] = apply_unknown(x.kind, single[x.kind], default, x.value)
            if x.shape is not None:
                single[x.kind] = single[x.kind] * _coefficient(x.shape, "the shape of the source")
    _check_markers(mesh, tables | {"outflow": given["outflow"]})
    discontinuous = is_discontinuous(V)
    if mesh.extruded and not discontinuous and "on_boundary" in dirichlet:
        # Firedrake's strong condition on "on_boundary" leaves out top and bottom.
        if any(x.kind == "dirichlet" and x.marker == "on_boundary" for x in unknowns):
            raise InputError("on an extruded mesh an unknown Dirichlet value belongs to one marker, not to "
                             f"'on_boundary': name one of {', '.join(map(repr, mesh_markers(mesh)))}.")
        dirichlet |= dict.fromkeys(mesh_markers(mesh), dirichlet.pop("on_boundary"))
    for x in unknowns:
        if x.submesh is not None and x.marker is not None:
            _check_submesh(mesh, x.marker, x.submesh)

    single = {name: None if value is None else _diffusivity(value) if name == "diffusivity" else
              _coefficient(value, name) for name, value in single.items()}
    r, slope = Zero(), Zero()
    if given["reaction"] is not None:
        w = variable(u)
        r = _coefficient(given["reaction"](u), "reaction(u)")
        slope: Any = expand_derivatives(diff(as_ufl(given["reaction"](w)), w))
    if change is None and not dirichlet and not tables["robin"] and u not in extract_coefficients(r):
        raise InputError("the state is determined only up to a constant: add a Dirichlet or Robin condition, or a "
                         "reaction that depends on u.")
    if given["supg"] is True and (single["velocity"] is None or discontinuous):
        raise InputError("supg must be 'auto', False or, where V is continuous and there is a velocity, True.")
    values = {key: _coefficient(g, f"dirichlet[{key!r}]") for key, g in dirichlet.items()}
    submeshes = {x.marker: x.submesh for x in unknowns}
    natural = [(_coefficient(q, f"flux[{key!r}]"), _facet_measure(mesh, key, submeshes.get(key)))
               for key, q in tables["flux"].items()]
    for key, pair in tables["robin"].items():
        h, u_ext = (_coefficient(c, f"robin[{key!r}]") for c in pair)
        natural.append((h * (u_ext - u), _facet_measure(mesh, key)))
    weak = [(g, _facet_measure(mesh, key)) for key, g in values.items()] if discontinuous else None
    initial = single.pop("initial")
    terms = Terms(**single, reaction=r, change=change,
                  slope=None if u in extract_coefficients(slope) or in_condition(r, u) else slope)
    A, N = residual(u, terms, natural, weak, given["supg"], 2 / Constant(steps.time_step) if steps else 0)
    for x in unknowns:
        places = [initial] if x.kind == "initial" else [A, *values.values()]
        if not any(x.value in extract_coefficients(place) for place in places):
            raise InputError(f"the callable given for {x.name!r} makes no use of the parameter: let it depend on m.")
    markers = [] if discontinuous else [x.marker for x in unknowns if x.kind == "dirichlet"]
    raised = {i: g for i, (key, g) in enumerate(values.items()) if key in markers}
    bcs = [DirichletBC(V, 0 if key in markers else g, key) for key, g in ({} if discontinuous else values).items()]
    if change is None or steps is None:
        return Equation(u, None, A, N, bcs, raised, initial, unknowns, None)
    new, old, theta = Function(V, name="state"), Function(V, name="former state"), Constant(steps.theta)
    step = {u: theta * new + (1 - theta) * old, change: (new - old) / Constant(steps.time_step)}
    return Equation(new, old, expanded(replace(A, step)), N and expanded(replace(N, step)), bcs, raised, initial,
                    unknowns, steps)
