r"""Priors of fields with a constraint that every sample keeps: within bounds, or without divergence.

They are transforms of Gaussian fields, so latents are standard normal and gradients come with them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from firedrake import (
    Constant, DirichletBC, Function, FunctionSpace, SpatialCoordinate, VectorFunctionSpace, as_vector, assemble, curl,
    dx, erf, inner,
)
from firedrake.functionspaceimpl import WithGeometry
from ufl.core.expr import Expr

from fem_diffusion.checks import check_number
from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import check_space
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.matern import operator_order
from fem_diffusion.prior.transformed import TransformedPrior

__all__ = ["bounded", "divergence_free"]


def bounded(lower: float | Expr, upper: float | Expr) -> Callable[[Expr], Expr]:
    r"""Transform for `TransformedPrior` between two bounds, ``lower + (upper - lower) Φ(f)``, Φ the normal law.

    Of a field with mean 0 and standard deviation 1 it is uniform at every point; smaller deviations stay near the
    middle, means move it. For fields with one bound take ``exp``. InputError unless lower is below upper, where they
    are numbers.
    """
    if not isinstance(lower, Expr) and not isinstance(upper, Expr):
        upper = check_number(upper, "upper", above=check_number(lower, "lower"))
    low, width = (Constant(x) if not isinstance(x, Expr) else x for x in (lower, upper - lower))

    def transform(f: Expr) -> Expr:
        share = (1 + erf(f / np.sqrt(2))) / 2
        return low + width * share
    return transform


def divergence_free(V: WithGeometry, std: float, correlation_length: float, *,
                    closed: int | str | Sequence[int | str] = (), smoothness: float | None = None,
                    **given: Any) -> TransformedPrior:
    r"""Velocities without divergence in V, exactly: rotations of a Gaussian stream function ψ (2D), or potential (3D).

    With ψ of Matérn smoothness ν > 1 and standard deviation ``std ℓ sqrt((ν - 1) / ν)``, in three dimensions by
    ``sqrt(2)`` less, every component of the velocity has the standard deviation `std` away from boundaries: the
    correlation of ψ falls as ``1 - ν r² / (2 (ν - 1) ℓ²)``.

    Parameters
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Of RT, BDM, N1div or RTCF elements, or of vectors of DG elements, on a mesh of dimension 2 or 3.
    std, correlation_length : float
        Of the velocity, in its units, and of the stream function, in those of the mesh.
    closed : marker or sequence of markers
        Boundaries that nothing flows through; nothing flows between two of them, either, as ψ is zero on each.
    smoothness : float, optional
        Of ψ; the smallest above one where left out, 3 in two dimensions and 2.5 in three.
    given
        Further arguments of the `GaussianPrior` of ψ.

    Raises
    ------
    InputError
        If rotations are not in V exactly, the smoothness is at most one, or as for `GaussianPrior`.
    """
    mesh = check_space(V).mesh()
    d = mesh.geometric_dimension
    if len(V) > 1 or V.value_shape != (d,) or d not in (2, 3) or mesh.topological_dimension != d:
        raise InputError(f"V has value shape {V.value_shape}: give a space of velocities on a mesh of dimension 2 or "
                         '3, such as FunctionSpace(mesh, "RT", 1).')
    smoothness = 4 - d / 2 if smoothness is None else operator_order(smoothness, d) - d / 2
    if smoothness <= 1:
        raise InputError(f"smoothness is {smoothness:g}, and derivatives of such a field have no variance: take "
                         f"{4 - d / 2:g} or more.")
    W = _potentials(V)
    std, length = check_number(std, "std", above=0), check_number(correlation_length, "correlation_length", above=0)
    markers = (closed,) if isinstance(closed, (int, str)) else tuple(closed)
    spread = std * length * np.sqrt((smoothness - 1) / smoothness / (d - 1))
    stream = GaussianPrior(W, spread, length, smoothness=smoothness, **given,
                           bcs=[DirichletBC(W, Constant(np.zeros(W.value_shape)), marker) for marker in markers])

    return TransformedPrior(stream, _rotation, V)


def _rotation(f: Expr) -> Expr:
    """Rotation of a stream function, or curl of a potential."""
    slope: Any = f.dx(0)
    return as_vector([f.dx(1), -slope]) if not f.ufl_shape else curl(f)


def _potentials(V: WithGeometry) -> WithGeometry:
    """The continuous space of highest degree whose rotations are all in V."""
    mesh = V.mesh()
    x = SpatialCoordinate(mesh)
    wave: Any = sum((1 + i) * y for i, y in enumerate(x))**5
    for degree in range(V.ufl_element().embedded_superdegree + 1, 0, -1):
        W = (FunctionSpace if len(x) == 2 else VectorFunctionSpace)(mesh, "CG", degree)
        f = Function(W).interpolate(as_vector([wave, 2 * wave * x[0], wave * x[1]]) if W.value_shape else wave)
        lost, whole = (assemble(inner(u, u) * dx) for u in (
            Function(V).interpolate(_rotation(f)) - _rotation(f), _rotation(f)))
        if lost <= 1e-20 * whole:
            return W
    raise InputError(f"{V.ufl_element()} holds no rotations exactly: take RT, BDM, N1div or vectors of DG elements.")
