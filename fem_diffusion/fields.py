"""Functions and their owned coefficients: how every room that knows Firedrake sees a field as numbers.

Owned coefficients are this rank's part of ``with f.dat.vec_ro as v: v.array``: float64, for scalar, vector and mixed
spaces alike.
"""

from collections.abc import Sequence

import numpy as np
from firedrake import Function, SpatialCoordinate, TestFunction, as_tensor, assemble, dx, exp, inner

__all__ = ["coefficients", "field", "geometric_key", "owned_size"]


def owned_size(V) -> int:
    """Number of owned coefficients of a function space on this rank."""
    return V.dof_dset.layout_vec.getLocalSize()


def coefficients(functions: Function | Sequence[Function]) -> np.ndarray:
    """Owned coefficients of a Function, shape (n_owned,), or of a sequence of them, shape (n, n_owned); a copy."""
    if isinstance(functions, Function):
        with functions.dat.vec_ro as vector:
            return vector.array_r.copy()
    return np.stack([coefficients(f) for f in functions])


def field(V, values: np.ndarray, name: str | None = None) -> Function:
    """Function in V with the owned coefficients `values`, shape (n_owned,)."""
    function = Function(V, name=name)
    with function.dat.vec_wo as vector:
        vector.array[:] = values
    return function


def geometric_key(V) -> np.ndarray:
    """A number for every owned degree of freedom that depends on the geometry alone, shape (n_owned,).

    It is the integral of the basis function against a fixed function without symmetry. Numbering and partition of a
    mesh change from run to run; the key tells which degree of freedom is which.
    """
    mesh = V.mesh()
    x = SpatialCoordinate(mesh)
    nodes = mesh.coordinates.dat.data_ro.reshape(-1, len(x))
    low = np.min(mesh.comm.allgather(nodes.min(axis=0, initial=np.inf)), axis=0)
    high = np.max(mesh.comm.allgather(nodes.max(axis=0, initial=-np.inf)), axis=0)
    width = np.where(high > low, high - low, 1.0)
    # Factors without a rational relation, so that no two nodes of a regular mesh share a value.
    phase = sum((0.5 + 0.25 * i)**0.5 * (x[i] - float(low[i])) / float(width[i]) for i in range(len(x)))
    test = TestFunction(V)
    weight = np.array([exp((1 + 0.1 * i) * phase) for i in range(max(1, int(np.prod(test.ufl_shape))))], dtype=object)
    weight = as_tensor(weight.reshape(test.ufl_shape).tolist()) if test.ufl_shape else weight[0]
    with assemble(inner(weight, test) * dx).dat.vec_ro as vector:
        return vector.array_r.copy()
