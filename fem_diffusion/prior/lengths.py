r"""Correlation lengths of Gaussian fields: equal in all directions or not, constant or varying, of each component.

The operator ``1 - ∇·(Λ² ∇) / (2ν)`` with a symmetric positive definite tensor Λ has, where Λ is constant, the Matérn
correlation of the distance ``|Λ⁻¹ h|`` over a step h: its eigenvalues are the lengths along its eigenvectors (Lindgren,
Rue and Lindström 2011, section 3.3). Where Λ varies slowly, this holds locally.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from firedrake import (
    CellVolume, Constant, FacetNormal, Function, FunctionSpace, TensorFunctionSpace, TestFunction, TrialFunction,
    assemble, det, dot, dx, grad, inner, sqrt,
)
from firedrake.functionspaceimpl import WithGeometry
from firedrake.mesh import MeshGeometry
from mpi4py import MPI
from ufl import Form
from ufl.core.expr import Expr

from fem_diffusion.checks import LARGEST, check_array, check_number
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_expression, exterior_measures, interpolated
from fem_diffusion.fields.coefficients import assign, coefficients

__all__ = ["Length", "helmholtz", "read_lengths"]

# Share of the smallest cell below which neighbouring nodes know nothing of each other, whatever the length.
_RESOLVED = 0.5
_ROBIN = 1 / 1.42        # Daon and Stadler 2018, section 3: least boundary artefacts for a scalar coefficient


@dataclass(frozen=True, eq=False)
class Length:
    """Scale ``L = Λ / sqrt(2ν)`` of the operator, of a whole field or of one of its components.

    Parameters
    ----------
    square : Expr
        L² as UFL scalar, or as tensor of shape (gdim, gdim).
    mean : float
        d-th root of the mean of det L over the mesh.
    varying : bool
        Whether it is another one elsewhere.
    """

    square: Expr
    mean: float
    varying: bool = False

    def across(self, mesh: MeshGeometry) -> Expr:
        """L in the direction of the normal of the boundary."""
        if not self.square.ufl_shape:
            return sqrt(self.square)
        n = FacetNormal(mesh)
        return sqrt(dot(n, dot(self.square, n)))


def read_lengths(given: Any, smoothness: float, V: WithGeometry) -> tuple[Length, ...]:
    """What a user gave, checked: one length for all of a field in V, or one for each component.

    A warning where a number is too short for every cell of the mesh (collective).
    """
    name = "correlation_length"
    if not isinstance(given, Mapping):
        return _length(given, smoothness, V.mesh(), name),
    components = V.value_size if len(V.value_shape) == 1 else 0
    keys = [int(key) for key in given if isinstance(key, Integral)]
    if sorted(keys) != list(range(components)) or len(given) != components:
        raise InputError(f"{name} has the keys {list(given)!r}: give a length for each component of a vector field, "
                         "such as {0: 0.5, 1: 0.1}, or one for all.")
    return tuple(_length(given[i], smoothness, V.mesh(), f"{name}[{i}]") for i in range(components))


def _length(given: Any, smoothness: float, mesh: MeshGeometry, name: str) -> Length:
    """One length: a number, one for each axis, or a UFL scalar or tensor."""
    d, gdim, twice = mesh.topological_dimension, mesh.geometric_dimension, 2 * smoothness
    if not isinstance(given, (Expr, Sequence, np.ndarray)) or isinstance(given, str):
        number = check_number(given, name, above=0, most=LARGEST)
        _tell_unresolved(number, mesh, name)
        number = number / np.sqrt(twice)
        return Length(Constant(number**2), number)
    if not isinstance(given, Expr):
        axes = check_array(given, name, (gdim,))
        if not (axes > 0).all():
            raise InputError(f"{name} is {given!r}: give a positive length for each axis.")
        _check_flat(mesh, name)
        axes = axes / np.sqrt(twice)
        return Length(Constant(np.diag(axes**2)), float(np.prod(axes)**(1 / d)))
    # In pieces that are linear, or linear along each edge: positive at the nodes is positive between them.
    given = check_expression(given, name, (mesh,), (), (gdim, gdim))
    if given.ufl_shape:
        _check_flat(mesh, name)
        f = interpolated(TensorFunctionSpace(mesh, "DG", 1), given, name, (mesh,))
        values = coefficients(f).reshape(-1, gdim, gdim)
        even = np.abs(values - values.transpose(0, 2, 1)).max(initial=0.0) <= 1e-8 * np.abs(values).max(initial=0.0)
        right = even and bool((np.linalg.eigvalsh(values) > 0).all())
        squares = values @ values / twice
    else:
        f = interpolated(FunctionSpace(mesh, "DG", 1), given, name, (mesh,))
        squares = coefficients(f)
        right, squares = bool((squares > 0).all()), squares**2 / twice
    if not mesh.comm.allreduce(right, MPI.LAND):
        what = "symmetric and positive definite" if given.ufl_shape else "positive"
        raise InputError(f"{name} is not {what} everywhere on the mesh: give lengths in the units of the mesh.")
    square: Function = assign(Function(f.function_space()), squares.ravel())
    volume = det(square) if given.ufl_shape else square**d
    mean = assemble(sqrt(volume) * dx) / assemble(Constant(1.0) * dx(mesh))
    return Length(square, float(mean)**(1 / d), True)


def _tell_unresolved(length: float, mesh: MeshGeometry, name: str) -> None:
    """Warn where a length is shorter than half of the smallest cell."""
    volumes = coefficients(Function(FunctionSpace(mesh, "DG", 0)).interpolate(CellVolume(mesh)))
    smallest = mesh.comm.allreduce(volumes.min(initial=np.inf), MPI.MIN)**(1 / mesh.topological_dimension)
    if length < _RESOLVED * smallest:
        warnings.warn(f"{name} is {length:.3g} and the smallest cell of the mesh {smallest:.3g} wide: nodes next to "
                      "each other are independent, so the mesh decides how far the field is correlated. Take a finer "
                      "mesh or a longer length, in the units of the mesh.", stacklevel=7)


def _check_flat(mesh: MeshGeometry, name: str) -> None:
    """Refuse directions on a mesh that is curved in space."""
    if mesh.topological_dimension != mesh.geometric_dimension:
        raise InputError(f"{name} differs between axes, and the mesh is of dimension {mesh.topological_dimension} in "
                         f"{mesh.geometric_dimension} coordinates: give a number or a UFL scalar.")


def helmholtz(V: WithGeometry, lengths: Sequence[Length], boundary: bool = False) -> Form:
    """The bilinear form of ``1 - ∇·(L² ∇)`` on V, and of its Robin condition (Daon and Stadler 2018) where asked for.

    With several lengths, of each component by itself.
    """
    u, v, mesh = TrialFunction(V), TestFunction(V), V.mesh()
    form = inner(u, v) * dx
    for i, length in enumerate(lengths):
        w, z = (u, v) if len(lengths) == 1 else (u[i], v[i])
        flux = dot(grad(w), length.square) if length.square.ufl_shape else length.square * grad(w)
        form += inner(flux, grad(z)) * dx
        if boundary:
            # Λ is taken along the normal, in which the condition acts.
            form += sum(Constant(_ROBIN) * length.across(mesh) * inner(w, z) * ds
                        for ds in exterior_measures(mesh).values())
    return form
