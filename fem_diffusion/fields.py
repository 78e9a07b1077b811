"""Functions and their owned coefficients: how every room that knows Firedrake sees a field as numbers.

Owned coefficients are this rank's part of ``with f.dat.vec_ro as v: v.array``: float64, for scalar, vector and mixed
spaces alike.
"""

from collections.abc import Callable, Sequence

import numpy as np
from firedrake import Cofunction, Function, SpatialCoordinate, TestFunction, as_tensor, assemble, dx, exp, inner
from firedrake.petsc import PETSc
from firedrake.utils import complex_mode
from mpi4py import MPI

from fem_diffusion.errors import InstallError, SolveError

__all__ = ["coefficients", "field", "geometric_key", "multiply", "on_root", "owned_columns", "owned_size",
           "require_real", "solve", "solve_each"]


def require_real() -> None:
    """Refuse a complex PETSc build.

    Raises
    ------
    InstallError
        If PETSc was configured with complex scalars.
    """
    if complex_mode:
        raise InstallError("fem_diffusion works with real scalars and this PETSc is a complex build; "
                           "activate a Firedrake installation configured without --with-scalar-type=complex.")


def on_root(comm, function):
    """Result of `function()` run on rank 0, broadcast; what it raises there is raised on every rank."""
    outcome = None
    if comm.rank == 0:
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
    result, error = comm.bcast(outcome)
    if error is not None:
        raise error
    return result


def owned_size(V) -> int:
    """Number of owned coefficients of a function space on this rank."""
    return V.dof_dset.layout_vec.getLocalSize()


def coefficients(functions: Function | Cofunction | Sequence[Function]) -> np.ndarray:
    """Owned coefficients of a (Co)Function, shape (n_owned,), or of a sequence of them, shape (n, n_owned); a copy."""
    if isinstance(functions, (Function, Cofunction)):
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
    if len(V) > 1:
        return np.concatenate([(1 + 0.1 * i) * geometric_key(W) for i, W in enumerate(V)])
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


def owned_columns(key: np.ndarray, V) -> np.ndarray | None:
    """Where this rank's degrees of freedom are among stored ones.

    Parameters
    ----------
    key : numpy.ndarray
        Geometric keys in the order of the storage, shape (n_global,).
    V : firedrake.functionspaceimpl.WithGeometry
        The space on any number of ranks.

    Returns
    -------
    numpy.ndarray or None
        Indices, shape (n_owned,); None on all ranks where the keys are those of another mesh or space.
    """
    ours = geometric_key(V)
    tolerance = 1e-12 * np.abs(key).max(initial=0.0)
    if V.dim() != len(key):
        return None
    start = sum(V.comm.allgather(len(ours))[:V.comm.rank])
    same = np.abs(key[start:start + len(ours)] - ours) <= tolerance
    if V.comm.allreduce(bool(same.all()), MPI.LAND):
        return np.arange(start, start + len(ours))
    order = np.argsort(key)
    place = np.searchsorted(key[order], ours)
    candidates = order[np.stack([place - 1, place]).clip(0, len(key) - 1)]
    columns = np.take_along_axis(candidates, np.abs(key[candidates] - ours).argmin(axis=0)[None], axis=0)[0]
    found = np.concatenate(V.comm.allgather(columns))
    near = (np.abs(key[columns] - ours) <= tolerance).all()
    apart = np.diff(key[order]).min(initial=np.inf) > 2 * tolerance
    complete = np.array_equal(np.sort(found), np.arange(len(key)))
    return columns if V.comm.allreduce(bool(near and apart and complete), MPI.LAND) else None


def _dense(rows: np.ndarray, comm) -> PETSc.Mat:
    """Dense matrix whose columns are the rows of an array (k, n_owned); whoever asks for it destroys it."""
    k, owned = rows.shape
    matrix = PETSc.Mat().createDense(((owned, None), (None, k)), comm=comm)
    matrix.setUp()
    matrix.getDenseArray()[:] = rows.T
    matrix.assemble()
    return matrix


def multiply(matrix: PETSc.Mat, rows: np.ndarray, transpose: bool = False) -> np.ndarray:
    """Product of a matrix, or its transpose, with every row of an array (k, n_owned), as one block.

    Parameters
    ----------
    matrix : petsc4py.PETSc.Mat
        Matrix with rows and columns spread over ranks as the spaces it maps between.
    rows : numpy.ndarray
        Owned coefficients, shape (k, n_owned of the source).
    transpose : bool
        Multiply by the transpose.

    Returns
    -------
    numpy.ndarray
        Shape (k, n_owned of the target).
    """
    dense = _dense(rows, matrix.comm)
    product = matrix.transposeMatMult(dense) if transpose else matrix.matMult(dense)
    result = product.getDenseArray().T.copy()
    # Destroyed together on all ranks: what the garbage collector leaves at the end can hang PetscFinalize.
    dense.destroy()
    product.destroy()
    return result


def solve(ksp: PETSc.KSP, rows: np.ndarray) -> np.ndarray:
    """Solution for every row of an array (k, n_owned) as right-hand side; an array of the same shape.

    A direct solver takes them as one block.

    Raises
    ------
    SolveError
        If the linear solver reports failure for any of them.
    """
    if ksp.getType() != "preonly":
        return solve_each(ksp, rows, ksp.solve)
    rhs, out = _dense(rows, ksp.comm), _dense(np.zeros_like(rows), ksp.comm)
    ksp.matSolve(rhs, out)
    result = out.getDenseArray().T.copy()
    rhs.destroy()
    out.destroy()
    _check_solved(ksp)
    return result


def solve_each(ksp: PETSc.KSP, rows: np.ndarray, method: Callable[[PETSc.Vec, PETSc.Vec], None]) -> np.ndarray:
    """As `solve`, one after the other by a method of the solver: ``ksp.solve`` or ``ksp.solveTranspose``."""
    result = np.empty_like(rows)
    b, x = ksp.getOperators()[0].createVecs()
    for row, line in zip(rows, result):
        b.array[:] = row
        x.set(0.0)
        method(b, x)
        # PETSc keeps the reason of the last solve alone.
        _check_solved(ksp)
        line[:] = x.array_r
    b.destroy()
    x.destroy()
    return result


def _check_solved(ksp: PETSc.KSP) -> None:
    reason = ksp.getConvergedReason()
    if reason < 0:
        raise SolveError(f"The linear solver failed (KSP reason {reason}): take a direct solver, or look for a "
                         "singular operator.")
