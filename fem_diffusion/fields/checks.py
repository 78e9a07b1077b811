"""Small checks and conversions that the files of this room share.

Coefficient arrays hold *owned* coefficients: this rank's part of ``with f.dat.vec_ro as v: v.array``.
"""

from functools import partial
from numbers import Number

import numpy as np
from finat.ufl import FiniteElement, TensorElement, TensorProductElement, VectorElement
from firedrake import H1, Constant, Function, FunctionSpace, Measure, assemble, interpolate
from firedrake.interpolation import get_interpolator
from mpi4py import MPI
from ufl.core.expr import Expr
from ufl.form import BaseForm

from fem_diffusion.checks import LARGEST, check_array, check_number
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, independent_entries, is_real
from fem_diffusion.fields.doors import check_expression

__all__ = ["check_reproduced", "exterior_measures", "interpolated", "matern_space", "prepared_interpolation",
           "refuse_variable_layers", "root_space"]


def refuse_variable_layers(mesh):
    """Raise InputError for an extruded mesh whose columns differ in their layers."""
    if mesh.extruded and mesh.variable_layers:
        raise InputError("the extruded mesh has variable layers, where Firedrake finds no points and leaves steps out "
                         "of the boundary: use constant layers with coordinates moved, or a Submesh")


def exterior_measures(mesh):
    """Measures that together integrate over the boundary of a mesh: {name: Measure}.

    The names are ``"sides"`` and, of an extruded mesh with ends, ``"bottom"`` and ``"top"``: where the extrusion is
    periodic, Firedrake's ``ds_b`` and ``ds_t`` integrate over the seam, which is no boundary (its ``dS_h`` holds it).
    """
    refuse_variable_layers(mesh)
    if not mesh.extruded:
        return {"sides": Measure("ds", mesh)}
    ends = {} if mesh.extruded_periodic else {"bottom": Measure("ds_b", mesh), "top": Measure("ds_t", mesh)}
    return {"sides": Measure("ds_v", mesh)} | ends


def matern_space(V):
    """The space in which a Gaussian field on V lives: V, or the base mesh's where V is constant along the extrusion.

    Firedrake numbers both alike.

    Raises
    ------
    InputError
        Unless this space is continuous and its coefficients are point values.
    """
    if len(V) > 1:
        raise InputError("the space is mixed: build one prior for each of its components")

    def flattened(scalar):
        factors = scalar.factor_elements if isinstance(scalar, TensorProductElement) else ()
        return factors[0] if [factor.family() == "Real" for factor in factors] == [False, True] else scalar
    element = _with_scalar(V, flattened)
    if element != V.ufl_element():
        base = V.mesh()._base_mesh
        if base is None:
            raise InputError("the base mesh of this extruded mesh is not known: build the mesh with ExtrudedMesh and "
                             "move its coordinates in place")
        V = FunctionSpace(base, element)
    if "Real" in repr(element):
        raise InputError(f"a Gaussian prior on {element} is not there: use CG, or CG with vfamily=\"R\" for a field "
                         "that is constant along the extrusion, or CallablePrior")
    if element not in H1 or not V.finat_element.has_pointwise_dual_basis:
        raise InputError(f"a Gaussian prior needs a space of CG elements, got {element}: use CG, and "
                         "TransformedPrior to map its samples into another space")
    return V


def _with_scalar(V, change):
    """The element of V's value shape with another scalar one, `change` of V's."""
    element = V.ufl_element()
    if isinstance(element, TensorElement):
        return TensorElement(change(element.sub_elements[0]), shape=V.value_shape, symmetry=element.symmetry())
    if isinstance(element, VectorElement):
        return VectorElement(change(element.sub_elements[0]), dim=element.num_sub_elements)
    return change(element)


def check_reproduced(expression, result, name):
    """Refuse what interpolation reads at one place only: an expression that varies where its space is constant.

    Parameters
    ----------
    expression : ufl.core.expr.Expr
        What was interpolated.
    result : firedrake.Function
        The outcome; in a space of any elements.
    name : str
        Of the expression, for the message.
    """
    V = result.function_space()

    def varying(scalar):
        if isinstance(scalar, TensorProductElement):
            return TensorProductElement(*map(varying, scalar.factor_elements))
        if scalar.family() != "Real":
            return scalar
        return FiniteElement("DQ" if scalar.cell.cellname in ("quadrilateral", "hexahedron") else "DG", scalar.cell, 1)
    if "Real" not in repr(V.ufl_element()):
        return
    W = FunctionSpace(V.mesh(), _with_scalar(V, varying))
    there, here = (coefficients(Function(W).interpolate(f)) for f in (expression, result))
    error, size = (V.comm.allreduce(np.abs(x).max(initial=0.0), op=MPI.MAX) for x in (there - here, there))
    if not error <= 1e-8 * size:
        raise InputError(f"{name} varies where {V.ufl_element()} is constant, and interpolation reads one place, which "
                         "is no average: use CallablePrior with a sampler that integrates, or functionals where the "
                         "average is observed")


def root_space(V):
    """The space of which V is a component, or V itself."""
    while V.parent is not None:
        V = V.parent
    return V


def interpolated(V, value, name, meshes):
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
    if not V.comm.allreduce(bool(np.isfinite(coefficients(f)).all()), op=MPI.LAND):
        raise InputError(f"{name} is not finite everywhere on the mesh: give finite values")
    return f


def prepared_interpolation(expression, target):
    """Callable without arguments that interpolates the expression into the Function target, at every call."""
    V = target.function_space()
    if is_real(V) and V.value_shape:
        return _interpolated_numbers(expression, target)
    symbolic = interpolate(expression, V)
    # assemble looks the kernel up anew on every call, which takes ten times as long as the interpolation
    prepare = getattr(get_interpolator(symbolic), "_get_callable", None)
    return prepare(tensor=target) if prepare else partial(assemble, symbolic, tensor=target)


def _interpolated_numbers(expression, target):
    """As `prepared_interpolation`, into a vector or tensor of numbers: Firedrake can do scalar ones alone."""
    V = target.function_space()
    entries = [list(np.ndindex(V.value_shape))[i] for i in independent_entries(V)[0]]
    parts = [Function(FunctionSpace(V.mesh(), "R", 0)) for _ in entries]
    calls = [prepared_interpolation(expression[entry], part) for entry, part in zip(entries, parts)]

    def run():
        for call in calls:
            call()
        with target.dat.vec_wo as vec:
            vec.array[:] = coefficients(parts).T.ravel()
    return run
