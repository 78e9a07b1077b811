"""Small checks and conversions that the files of this room share.

Coefficient arrays hold *owned* coefficients: this rank's part of ``with f.dat.vec_ro as v: v.array``.
"""

from functools import partial

import numpy as np
from firedrake import H1, Constant, Function, Measure, assemble, interpolate
from firedrake.interpolation import get_interpolator
from mpi4py import MPI
from ufl.core.expr import Expr

from fem_diffusion.errors import InputError
from fem_diffusion.fields import coefficients

__all__ = ["check_lagrange", "exterior_measures", "interpolated", "prepared_interpolation", "root_space"]


def exterior_measures(mesh):
    """Measures that together integrate over the boundary of a mesh: {name: Measure}.

    The names are ``"sides"`` and, of an extruded mesh with ends, ``"bottom"`` and ``"top"``: where the extrusion is
    periodic, Firedrake's ``ds_b`` and ``ds_t`` integrate over the seam, which is no boundary (its ``dS_h`` holds it).
    """
    if not mesh.extruded:
        return {"sides": Measure("ds", mesh)}
    ends = {} if mesh.extruded_periodic else {"bottom": Measure("ds_b", mesh), "top": Measure("ds_t", mesh)}
    return {"sides": Measure("ds_v", mesh)} | ends


def check_lagrange(V):
    """Raise InputError unless V is a continuous space whose coefficients are point values."""
    if len(V) > 1:
        raise InputError("the space is mixed: build one prior for each of its components")
    element = V.ufl_element()
    if element.family() == "Real" or element not in H1 or not V.finat_element.has_pointwise_dual_basis:
        raise InputError(f"a Gaussian prior needs a space of CG elements, got {element}: use CG, and "
                         "TransformedPrior to map its samples into another space")


def root_space(V):
    """The space of which V is a component, or V itself."""
    while V.parent is not None:
        V = V.parent
    return V


def interpolated(V, value, name):
    """Interpolate a number, an array of V's value shape or a UFL expression into V, or raise InputError."""
    if not isinstance(value, Expr):
        try:
            value = Constant(np.asarray(value, dtype=float))
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} is {value!r}: give a number, a UFL expression or a Function") from error
    if value.ufl_shape == () and V.value_shape:
        value = value * Constant(np.ones(V.value_shape))
    if value.ufl_shape != V.value_shape:
        raise InputError(f"{name} has value shape {value.ufl_shape}, the space has {V.value_shape}: give a "
                         "scalar or an expression of the space's shape")
    f = Function(V).interpolate(value)
    if not V.comm.allreduce(bool(np.isfinite(coefficients(f)).all()), op=MPI.LAND):
        raise InputError(f"{name} is not finite everywhere on the mesh: give finite values")
    return f


def prepared_interpolation(expression, target):
    """Callable without arguments that interpolates the expression into the Function target, at every call."""
    symbolic = interpolate(expression, target.function_space())
    # assemble looks the kernel up anew on every call, which takes ten times as long as the interpolation
    prepare = getattr(get_interpolator(symbolic), "_get_callable", None)
    return prepare(tensor=target) if prepare else partial(assemble, symbolic, tensor=target)
