"""What users give to the problem classes, checked once at their door: coefficients, markers, options of the solver."""

from collections.abc import Iterable, Mapping
from numbers import Integral, Number

import numpy as np
from firedrake import Constant, Function
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from petsctools import OptionsManager
from ufl.algorithms import extract_arguments
from ufl.algorithms.analysis import extract_type
from ufl.core.expr import Expr
from ufl.domain import extract_domains
from ufl.form import BaseForm

from fem_diffusion.checks import check_array, check_callable, check_flag, check_number, together
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, owned_size

__all__ = ["by_marker", "check_coefficients", "check_expression", "check_finite", "check_function", "check_marker",
           "check_rows", "check_scalar", "check_solver", "check_space", "is_callable", "petsc_reason"]

MARKERS = "an integer, a tuple of integers, 'on_boundary', or 'top' or 'bottom' of an extruded mesh"


def check_marker(marker, name):
    """A marker as an int, a tuple of int or a word; whether the mesh has it is not looked at here."""
    if isinstance(marker, str):
        return marker
    many = isinstance(marker, (tuple, list))
    parts = tuple(marker) if many else (marker,)
    if not parts or any(not isinstance(part, Integral) or isinstance(part, (bool, np.bool_)) for part in parts):
        raise InputError(f"{name} names the marker {marker!r}: give {MARKERS}.")
    return tuple(map(int, parts)) if many else int(marker)


def by_marker(table, name):
    """A table of boundary conditions, copied, its markers checked."""
    if table is not None and not isinstance(table, Mapping):
        raise InputError(f"{name} must be a dict from markers to values, such as {name}={{1: ...}}, got {table!r}.")
    return {check_marker(marker, name): value for marker, value in (table or {}).items()}


def check_solver(parameters, prefix, comm):
    """Refuse options that PETSc does not know how to read: a misspelt ``ksp_type`` would fail at the first solve only.

    Returns the parameters, a dict of them copied.
    """
    if prefix is not None and (not isinstance(prefix, str) or not prefix or prefix[0] == "-" or " " in prefix):
        raise InputError(f"options_prefix is {prefix!r}: give a word such as 'state_', or leave it out.")
    if not isinstance(parameters, Mapping):
        if not isinstance(parameters, str) or parameters not in ("direct", "iterative"):
            raise InputError("solver_parameters must be 'direct', 'iterative' or a dict of PETSc options, got "
                             f"{parameters!r}.")
        return parameters
    wrong = [key for key in parameters if not isinstance(key, str) or not key or key[0] == "-"]
    if wrong:
        raise InputError(f"solver_parameters has the key {wrong[0]!r}: give names of PETSc options without a dash, "
                         "such as 'ksp_type'.")
    snes = PETSc.SNES().create(comm=comm)
    try:
        OptionsManager(dict(parameters), prefix, default_prefix="check").set_from_options(snes)
    except PETSc.Error as error:
        raise InputError(f"PETSc refuses solver_parameters {dict(parameters)!r} ({petsc_reason(error)}): check the "
                         "spelling of each value.") from error
    finally:
        snes.destroy()
    return dict(parameters)


def petsc_reason(error):
    """What a PETSc error says, in one line."""
    lines = str(error).splitlines() or [repr(error)]
    return lines[-1].partition("] ")[2] or lines[-1]


def check_coefficients(mesh, *, velocity, diffusivity, reaction, source, dirichlet, flux, robin, outflow, supg,
                       **scalars):
    """The coefficients of a problem, checked: those of `AdvectionDiffusion` and further scalar ones by name.

    Parameters
    ----------
    mesh : MeshGeometry
        Of the state.
    velocity, diffusivity, reaction, source, dirichlet, flux, robin, outflow, supg
        As for `AdvectionDiffusion`.
    **scalars
        Further UFL scalars, such as the initial state.

    Returns
    -------
    dict
        Under the same names: numbers as floats, tables as dicts with markers of one type, and callables that check
        what they return.

    Raises
    ------
    InputError
        Where one is no finite real number or expression, lives on another mesh, or a marker is none.
    """
    def checked(value, name, check, argument="m"):
        if not is_callable(value):
            return check(value, name, (mesh,))
        check_callable(value, name, f"a function {argument} -> UFL expression", 1)

        def result(x):
            return check(value(x), f"{name}({argument})", (mesh, *extract_domains(x)))
        return result
    tables = {name: by_marker(table, name) for name, table in (("dirichlet", dirichlet), ("flux", flux))}
    for name, table in tables.items():
        for marker, value in table.items():
            table[marker] = checked(value, f"{name}[{marker!r}]", check_scalar)
    pairs = by_marker(robin, "robin")
    for marker, pair in pairs.items():
        if not isinstance(pair, (tuple, list, np.ndarray)) or len(pair) != 2:
            raise InputError(f"robin[{marker!r}] must be a pair (h, u_ext) for n·κ∇u = h (u_ext - u), got {pair!r}.")
        pairs[marker] = tuple(check_scalar(c, f"robin[{marker!r}]", (mesh,)) for c in pair)
    if reaction is not None:
        if isinstance(reaction, (Expr, BaseForm)) or not callable(reaction):
            raise InputError("reaction must be a callable u -> UFL expression, e.g. reaction=lambda u: 0.3*u**2, got "
                             f"{reaction!r}.")
        reaction = checked(reaction, "reaction", check_scalar, "u")
    if not isinstance(supg, str) or supg != "auto":
        supg = check_flag(supg, "supg, unless 'auto',")
    return {"velocity": None if velocity is None else checked(velocity, "velocity", _vector),
            "diffusivity": checked(diffusivity, "diffusivity", _diffusivity), "reaction": reaction,
            "source": checked(source, "source", check_scalar), **tables, "robin": pairs, "outflow": _outflow(outflow),
            "supg": supg, **{name: checked(value, name, check_scalar) for name, value in scalars.items()}}


def _outflow(outflow):
    """A tuple of markers; None and a single marker are understood."""
    if outflow is None:
        return ()
    if isinstance(outflow, (Integral, str)):
        outflow = (outflow,)
    if not isinstance(outflow, Iterable) or isinstance(outflow, (Mapping, Expr, bytes)):
        raise InputError(f"outflow is {outflow!r}: give a marker or a tuple of them, a marker being {MARKERS}.")
    return tuple(check_marker(marker, "outflow") for marker in outflow)


def is_callable(given):
    """Whether a coefficient is given as a callable, which UFL expressions are too."""
    return callable(given) and not isinstance(given, (Expr, BaseForm))


def check_scalar(value, name, meshes, above=-np.inf):
    """A float, or a UFL scalar on one of these meshes."""
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value[()]
    if isinstance(value, Number):
        return check_number(value, name, above=above)
    if isinstance(value, Constant) and not value.ufl_shape:
        check_number(float(value), name, above=above)
    return check_expression(value, name, meshes, ())


def _vector(value, name, meshes):
    """A tuple of scalars, or a UFL vector, of the dimension of the mesh."""
    shape = (meshes[0].geometric_dimension,)
    if isinstance(value, (str, bytes, Mapping, set, Number)) or not isinstance(value, Iterable):
        raise InputError(f"{name} must have shape {shape}: give a number for each direction or a UFL vector, not "
                         f"{value!r}.")
    if isinstance(value, Expr):
        return check_expression(value, name, meshes, shape)
    value = tuple(check_scalar(c, name, meshes) for c in value)
    if len(value) != shape[0]:
        raise InputError(f"{name} must have shape {shape}, got {len(value)} numbers.")
    return value


def _diffusivity(value, name, meshes):
    """A positive scalar, an array of numbers, rows of scalars, or a UFL scalar or tensor."""
    gdim = meshes[0].geometric_dimension
    if isinstance(value, Constant) and value.ufl_shape:
        value = value.values().reshape(value.ufl_shape)
    if isinstance(value, np.ndarray):
        return check_array(value, name, (), (gdim, gdim)) if value.ndim else check_scalar(value, name, meshes, above=0)
    if isinstance(value, (list, tuple)):
        if len(value) != gdim or any(not isinstance(row, (list, tuple, np.ndarray)) or len(row) != gdim
                                     for row in value):
            raise InputError(f"{name} must be a number, a UFL expression or of shape {(gdim, gdim)}, got {value!r}.")
        return [[check_scalar(c, name, meshes) for c in row] for row in value]
    if isinstance(value, Expr) and value.ufl_shape:
        return check_expression(value, name, meshes, (), (gdim, gdim))
    return check_scalar(value, name, meshes, above=0)


def check_expression(value, name, meshes, *shapes):
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


def check_finite(f, name):
    """Refuse a Function or Constant with values that are not finite, on all ranks together."""
    def check():
        if not np.isfinite(f.values() if isinstance(f, Constant) else coefficients(f)).all():
            raise InputError(f"{name} is not finite everywhere: look for NaN and infinite values.")
    if isinstance(f, Constant):
        check()
    else:
        together(f.function_space().comm, check)


def check_space(V, name="V"):
    """A function space; no dual one."""
    if not isinstance(V, WithGeometry):
        raise InputError(f"{name} must be a FunctionSpace, got {type(V).__name__}.")
    return V


def check_rows(values, V, name):
    """Owned coefficients in V or its dual as an array (n, n_owned) of finite real numbers, on all ranks together."""
    return together(V.comm, lambda: check_array(values, name, ("n", owned_size(V))))


def check_function(f, V, name, remedy):
    """A Function in V, finite."""
    if not isinstance(f, Function) or f.function_space() != V:
        what = f"a Function in {f.function_space()}" if isinstance(f, Function) else type(f).__name__
        raise InputError(f"{name} must be a Function in {V}, got {what}; {remedy}.")
    check_finite(f, name)
    return f
