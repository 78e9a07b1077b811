"""Checks at the door that take Firedrake to look, and interpolation that tells its limits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral, Number
from typing import Any, TypeGuard

import numpy as np
from finat.ufl import FiniteElement, TensorElement, TensorProductElement, VectorElement
from finat.ufl.finiteelementbase import FiniteElementBase
from firedrake import H1, Constant, Ensemble, Function, FunctionSpace, Measure, assemble, interpolate
from firedrake.functionspaceimpl import WithGeometry
from firedrake.interpolation import get_interpolator
from firedrake.mesh import MeshGeometry
from firedrake.petsc import PETSc
from mpi4py import MPI
from petsctools import OptionsManager
from ufl.algorithms import extract_arguments
from ufl.algorithms.analysis import extract_type
from ufl.core.expr import Expr
from ufl.domain import extract_domains
from ufl.form import BaseForm

from fem_diffusion.checks import LARGEST, check_array, check_callable, check_flag, check_kind, check_number, together
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import assign, coefficients, independent_entries, is_real, largest, owned_size

__all__ = ["check_coefficients", "check_ensemble", "check_expression", "check_finite", "check_function", "check_marker",
           "check_reproduced", "check_rows", "check_scalar", "check_solver", "check_space", "exterior_measures",
           "interpolated", "is_callable", "matern_space", "prepared_interpolation", "refuse_variable_layers",
           "solver_reason"]

Meshes = Sequence[MeshGeometry]

_NO_HYPRE = ("this PETSc was built without hypre; take its own algebraic multigrid, 'pc_type': 'gamg', or, for what is "
             "no Laplacian, 'lu'")
_MARKERS = "an integer, a tuple of integers, 'on_boundary', or 'top' or 'bottom' of an extruded mesh"


def check_marker(marker: Any, name: str) -> int | str | tuple[int, ...]:
    """A marker as an int, a tuple of int or a word; whether the mesh has it is not looked at here."""
    if isinstance(marker, str):
        return marker
    many = isinstance(marker, (tuple, list))
    parts = tuple(marker) if many else (marker,)
    if not parts or any(not isinstance(part, Integral) or isinstance(part, (bool, np.bool_)) for part in parts):
        raise InputError(f"{name} names the marker {marker!r}: give {_MARKERS}.")
    return tuple(map(int, parts)) if many else int(marker)


def check_solver(parameters: str | Mapping, prefix: str | None, comm: MPI.Comm) -> str | dict:
    """The parameters, a dict of them copied; options that PETSc cannot read are refused before the first solve."""
    if prefix is not None and (not isinstance(prefix, str) or not prefix or prefix[0] == "-" or " " in prefix):
        raise InputError(f"options_prefix is {prefix!r}: give a word such as 'state_', or leave it out.")
    if isinstance(parameters, str) and parameters in ("direct", "iterative"):
        return parameters
    if not isinstance(parameters, Mapping):
        raise InputError(f"solver_parameters must be 'direct', 'iterative' or a dict of PETSc options, got "
                         f"{parameters!r}.")
    wrong = [key for key in parameters if not isinstance(key, str) or not key or key[0] == "-"]
    if wrong:
        raise InputError(f"solver_parameters has the key {wrong[0]!r}: give names of PETSc options without a dash, "
                         "such as 'ksp_type'.")
    snes = PETSc.SNES().create(comm=comm)
    try:
        OptionsManager(dict(parameters), prefix, default_prefix="check").set_from_options(snes)
    except PETSc.Error as error:
        raise InputError(f"PETSc refuses solver_parameters {dict(parameters)!r} ({solver_reason(error)}): check the "
                         "spelling of each value.") from error
    finally:
        snes.destroy()
    return dict(parameters)


def solver_reason(error: Exception) -> str:
    """What a solver's error says, in one line; of PETSc's traceback the last, with the remedy where it lacks hypre."""
    reason = " ".join(str(error).split()) or repr(error)
    if isinstance(error, PETSc.Error):
        last = str(error).splitlines()[-1:] or [reason]
        reason = last[0].partition("] ")[2] or last[0]
    return f"{reason}: {_NO_HYPRE}" if "hypre" in reason else reason


def check_coefficients(mesh: MeshGeometry, *, velocity: Any, diffusivity: Any, reaction: Any, source: Any,
                       dirichlet: Any, flux: Any, robin: Any, outflow: Any, supg: Any,
                       **scalars: Any) -> dict[str, Any]:
    """The coefficients of a problem, checked: those of `AdvectionDiffusion` and further UFL scalars by name.

    Returns them under the same names: numbers as floats, tables as dicts with markers of one type, and callables that
    check what they return. InputError where one is no finite real number or expression on this mesh, or no marker.
    """
    def checked(value: Any, name: str, check: Callable, argument: str = "m") -> Any:
        if not is_callable(value):
            return check(value, name, (mesh,))
        check_callable(value, name, f"a function {argument} -> UFL expression", 1)

        def result(x: Expr) -> Any:
            return check(value(x), f"{name}({argument})", (mesh, *extract_domains(x)))
        return result
    scalar = partial(checked, check=check_scalar)

    def pair(value: object, name: str) -> tuple[float | Expr, ...]:
        if not isinstance(value, (tuple, list, np.ndarray)) or len(value) != 2:
            raise InputError(f"{name} must be a pair (h, u_ext) for n·κ∇u = h (u_ext - u), got {value!r}.")
        return tuple(check_scalar(c, name, (mesh,)) for c in value)

    def by_marker(table: Mapping | None, name: str, check: Callable) -> dict:
        if table is not None and not isinstance(table, Mapping):
            raise InputError(f"{name} must be a dict from markers to values, such as {name}={{1: ...}}, got {table!r}.")
        return {(key := check_marker(at, name)): check(x, f"{name}[{key!r}]") for at, x in (table or {}).items()}
    if reaction is not None:
        if not is_callable(reaction):
            raise InputError("reaction must be a callable u -> UFL expression, e.g. reaction=lambda u: 0.3*u**2, got "
                             f"{reaction!r}.")
        reaction = checked(reaction, "reaction", check_scalar, "u")
    if not isinstance(supg, str) or supg != "auto":
        supg = check_flag(supg, "supg, unless 'auto',")
    outflow = () if outflow is None else (outflow,) if isinstance(outflow, (Integral, str)) else outflow
    if not isinstance(outflow, Iterable) or isinstance(outflow, (Mapping, Expr, bytes)):
        raise InputError(f"outflow is {outflow!r}: give a marker or a tuple of them, a marker being {_MARKERS}.")
    return {"velocity": None if velocity is None else checked(velocity, "velocity", _vector),
            "diffusivity": checked(diffusivity, "diffusivity", _diffusivity), "reaction": reaction, "supg": supg,
            "dirichlet": by_marker(dirichlet, "dirichlet", scalar), "flux": by_marker(flux, "flux", scalar),
            "robin": by_marker(robin, "robin", pair), "outflow": tuple(check_marker(x, "outflow") for x in outflow),
            **{name: scalar(value, name) for name, value in {"source": source, **scalars}.items()}}


def is_callable(given: object) -> TypeGuard[Callable]:
    """Whether a coefficient is given as a callable, which UFL expressions are too."""
    return callable(given) and not isinstance(given, (Expr, BaseForm))


def check_scalar(value: Any, name: str, meshes: Meshes, above: float = -np.inf) -> float | Expr:
    """A float, or a UFL scalar on one of these meshes."""
    if isinstance(value, Constant) and not value.ufl_shape:
        check_number(float(value), name, above=above)
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value[()]
    if isinstance(value, Number):
        return check_number(value, name, above=above)
    return check_expression(value, name, meshes, ())


def _vector(value: Any, name: str, meshes: Meshes) -> tuple | Expr:
    """A tuple of scalars, or a UFL vector, of the dimension of the mesh."""
    shape = (meshes[0].geometric_dimension,)
    if isinstance(value, Expr):
        return check_expression(value, name, meshes, shape)
    listed = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, set))
    numbers = tuple(check_scalar(c, name, meshes) for c in value) if listed else ()
    if len(numbers) != shape[0]:
        raise InputError(f"{name} must have shape {shape}: give a number for each direction or a UFL vector, not "
                         f"{value!r}.")
    return numbers


def _diffusivity(value: Any, name: str, meshes: Meshes) -> float | np.ndarray | list | Expr:
    """A positive scalar, an array of numbers, rows of scalars, or a UFL scalar or tensor."""
    gdim = meshes[0].geometric_dimension
    if isinstance(value, Constant) and value.ufl_shape:
        value = value.values().reshape(value.ufl_shape)
    if isinstance(value, np.ndarray):
        return check_array(value, name, (), (gdim, gdim)) if value.ndim else check_scalar(value, name, meshes, above=0)
    if isinstance(value, (list, tuple)):
        if any(not isinstance(row, (list, tuple, np.ndarray)) or len(row) != gdim for row in (value, *value)):
            raise InputError(f"{name} must be a number, a UFL expression or of shape {(gdim, gdim)}, got {value!r}.")
        return [[check_scalar(c, name, meshes) for c in row] for row in value]
    if isinstance(value, Expr) and value.ufl_shape:
        return check_expression(value, name, meshes, (), (gdim, gdim))
    return check_scalar(value, name, meshes, above=0)


def check_expression(value: Any, name: str, meshes: Meshes, *shapes: tuple[int, ...]) -> Expr:
    """A UFL expression of one of these shapes, on these meshes, without test functions and values that are not finite.

    Any shape will do where none is given.
    """
    if not isinstance(value, Expr) or isinstance(value, BaseForm):
        remedy = "; assemble or interpolate it first" if isinstance(value, BaseForm) else ""
        raise InputError(f"{name} must be a number or a UFL expression, got {type(value).__name__}{remedy}.")
    if shapes and value.ufl_shape not in shapes:
        raise InputError(f"{name} must have shape {' or '.join(map(str, dict.fromkeys(shapes)))}, got "
                         f"{value.ufl_shape}.")
    if extract_arguments(value):
        raise InputError(f"{name} holds test or trial functions: give a coefficient, such as a Function.")
    if not set(extract_domains(value)) <= set(meshes):
        raise InputError(f"{name} lives on another mesh: interpolate it into a space on this one.")
    for part in extract_type(value, (Function, Constant)):
        check_finite(part, f"{name} holds {part}, which")
    return value


def check_finite(f: Function | Constant, name: str) -> None:
    """Refuse a Function or Constant with values that are not finite, on all ranks together."""
    finite = bool(np.isfinite(f.values() if isinstance(f, Constant) else coefficients(f)).all())
    if not (finite if isinstance(f, Constant) else f.function_space().comm.allreduce(finite, MPI.LAND)):
        raise InputError(f"{name} is not finite everywhere: look for NaN and infinite values.")


def check_space(V: object, name: str = "V") -> WithGeometry:
    """A function space; no dual one."""
    if not isinstance(V, WithGeometry):
        raise InputError(f"{name} must be a FunctionSpace, got {type(V).__name__}.")
    return V


def check_ensemble(ensemble: Any) -> Ensemble:
    """A firedrake.Ensemble."""
    return check_kind(ensemble, "ensemble", Ensemble, "a firedrake.Ensemble")


def check_rows(values: Any, V: WithGeometry, name: str) -> np.ndarray:
    """Owned coefficients in V or its dual as an array (n, n_owned) of finite real numbers, on all ranks together."""
    return together(V.comm, lambda: check_array(values, name, ("n", owned_size(V))))


def check_function(f: Any, V: WithGeometry, name: str, remedy: str) -> Function:
    """A Function in V, finite."""
    if not isinstance(f, Function) or f.function_space() != V:
        what = f"a Function in {f.function_space()}" if isinstance(f, Function) else type(f).__name__
        raise InputError(f"{name} must be a Function in {V}, got {what}; {remedy}.")
    check_finite(f, name)
    return f


def refuse_variable_layers(mesh: MeshGeometry) -> None:
    """Raise InputError for an extruded mesh whose columns differ in their layers."""
    if mesh.extruded and mesh.variable_layers:
        raise InputError("the extruded mesh has variable layers, where Firedrake finds no points and leaves steps out "
                         "of the boundary: use constant layers with coordinates moved, or a Submesh.")


def exterior_measures(mesh: MeshGeometry) -> dict[str, Measure]:
    """Measures that together integrate over the boundary of a mesh: its "sides", and "bottom" and "top" if it has them.

    Where an extrusion is periodic, Firedrake's ``ds_b`` and ``ds_t`` integrate over the seam, which is no boundary.
    """
    refuse_variable_layers(mesh)
    if not mesh.extruded:
        return {"sides": Measure("ds", mesh)}
    ends = {} if mesh.extruded_periodic else {"bottom": Measure("ds_b", mesh), "top": Measure("ds_t", mesh)}
    return {"sides": Measure("ds_v", mesh)} | ends


def matern_space(V: WithGeometry) -> WithGeometry:
    """The space in which a Gaussian field on V lives: V, or the base mesh's where V is constant along the extrusion.

    Firedrake numbers both alike. InputError unless this space is continuous and its coefficients are point values.
    """
    if len(V) > 1:
        raise InputError("the space is mixed: build one prior for each of its components.")

    def flattened(scalar: FiniteElementBase) -> FiniteElementBase:
        factors = list(scalar.factor_elements) if isinstance(scalar, TensorProductElement) else []
        return factors[0] if [factor.family() == "Real" for factor in factors] == [False, True] else scalar
    element = _with_scalar(V, flattened)
    if element != V.ufl_element():
        base = V.mesh()._base_mesh
        if base is None:
            raise InputError("the base mesh of this extruded mesh is not known: build the mesh with ExtrudedMesh and "
                             "move its coordinates in place.")
        V = FunctionSpace(base, element)
    if "Real" in repr(element):
        raise InputError(f"a Gaussian prior on {element} is not there: use CG, or CG with vfamily=\"R\" for a field "
                         "that is constant along the extrusion, or CallablePrior.")
    if element not in H1 or not V.finat_element.has_pointwise_dual_basis:
        raise InputError(f"a Gaussian prior needs a space of CG elements, got {element}: take one, and "
                         "TransformedPrior(GaussianPrior(...), lambda g: g, V) brings its samples into this space.")
    return V


def _with_scalar(V: WithGeometry, change: Callable[[FiniteElementBase], FiniteElementBase]) -> FiniteElementBase:
    """The element of V's value shape with another scalar one, `change` of V's."""
    element = V.ufl_element()
    if isinstance(element, TensorElement):
        return TensorElement(change(element.sub_elements[0]), shape=V.value_shape, symmetry=element.symmetry())
    if isinstance(element, VectorElement):
        return VectorElement(change(element.sub_elements[0]), dim=element.num_sub_elements)
    return change(element)


def check_reproduced(expression: Expr, result: Function, name: str) -> None:
    """Refuse what interpolation to a result reads at one place only: what varies where the space is constant."""
    V = result.function_space()
    if "Real" not in repr(V.ufl_element()):
        return

    def varying(scalar: FiniteElementBase) -> FiniteElementBase:
        if isinstance(scalar, TensorProductElement):
            return TensorProductElement(*map(varying, scalar.factor_elements))
        if scalar.family() != "Real":
            return scalar
        return FiniteElement("DQ" if scalar.cell.cellname in ("quadrilateral", "hexahedron") else "DG", scalar.cell, 1)
    W = FunctionSpace(V.mesh(), _with_scalar(V, varying))
    there, here = (coefficients(Function(W).interpolate(f)) for f in (expression, result))
    if not largest(V.comm, there - here) <= 1e-8 * largest(V.comm, there):
        raise InputError(f"{name} varies where {V.ufl_element()} is constant, and interpolation reads one place, which "
                         "is no average: use CallablePrior with a sampler that integrates, or functionals where the "
                         "average is observed.")


def interpolated(V: WithGeometry, value: Any, name: str, meshes: Meshes) -> Function:
    """Interpolate a number, an array of V's value shape or a UFL expression on these meshes into V."""
    if isinstance(value, (Expr, BaseForm)):
        value = check_expression(value, name, meshes, (), V.value_shape)
    elif isinstance(value, Number):
        value = Constant(check_number(value, name, least=-LARGEST, most=LARGEST))
    else:
        value = Constant(check_array(value, name, (), V.value_shape))
    if value.ufl_shape == () and V.value_shape:
        value = value * Constant(np.ones(V.value_shape))
    f = Function(V)
    prepared_interpolation(value, f)()
    check_reproduced(value, f, name)
    check_finite(f, name)
    return f


def prepared_interpolation(expression: Expr, target: Function) -> Callable[[], object]:
    """Callable without arguments that interpolates the expression into the Function target, at every call."""
    V = target.function_space()
    if not is_real(V) or not V.value_shape:
        symbolic = interpolate(expression, V)
        # assemble looks the kernel up anew on every call, which takes ten times as long as the interpolation.
        prepare = getattr(get_interpolator(symbolic), "_get_callable", None)
        return prepare(tensor=target) if prepare else partial(assemble, symbolic, tensor=target)
    # Of a vector or tensor of numbers, Firedrake can do scalar ones alone.
    entries = [list(np.ndindex(V.value_shape))[i] for i in independent_entries(V)[0]]
    parts = [Function(FunctionSpace(V.mesh(), "R", 0)) for _ in entries]
    calls = [prepared_interpolation(expression[entry], part)  # pyright: ignore[reportArgumentType]
             for entry, part in zip(entries, parts)]

    def run() -> None:
        for call in calls:
            call()
        assign(target, coefficients(parts).T.ravel())
    return run
