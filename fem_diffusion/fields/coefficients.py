"""Functions and their owned coefficients: how every room that knows Firedrake sees a field as numbers.

Owned coefficients are this rank's part of ``with f.dat.vec_ro as v: v.array``: float64, for scalar, vector and mixed
spaces alike, of a mixed one component by component. All arrays of coefficients (n_owned) in the package are owned
ones; what else an array holds is global, the same on all ranks. Everything that takes a space or coefficients is
collective.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from finat.ufl import TensorElement
from firedrake import (
    CellVolume, Cofunction, Constant, Function, SpatialCoordinate, TestFunction, TrialFunction, as_tensor, assemble, dx,
    exp, inner,
)
from firedrake.functionspaceimpl import WithGeometry
from firedrake.mesh import MeshGeometry
from firedrake.petsc import PETSc
from firedrake.utils import complex_mode
from mpi4py import MPI
from scipy.spatial import cKDTree
from ufl.core.expr import Expr

from fem_diffusion.checks import portable
from fem_diffusion.errors import InstallError, SolveError

__all__ = ["assign", "bounding_box", "by_component", "coefficients", "field", "generic_integrals", "geometric_key",
           "independent_entries", "is_real", "largest", "multiply", "on_root", "owned_columns", "owned_size",
           "require_real", "solve", "solve_each"]

Result = TypeVar("Result")

_SAME = 1e-8  # of the distance to the next degree of freedom: two places are one


def require_real() -> None:
    """Raise InstallError for a PETSc with complex scalars."""
    if complex_mode:
        raise InstallError("fem_diffusion works with real scalars and this PETSc is a complex build; "
                           "activate a Firedrake installation configured without --with-scalar-type=complex.")


def on_root(comm: MPI.Comm, function: Callable[[], Result]) -> Result:
    """Result of `function()` run on rank 0, broadcast; what it raises there is raised on every rank."""
    outcome: Any = None
    if comm.rank == 0:
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, portable(error)
    result, error = outcome if comm.size == 1 else comm.bcast(outcome)
    if error is not None:
        raise error
    return result


def owned_size(V: WithGeometry) -> int:
    """Number of owned coefficients of a function space on this rank; not collective, as its layout vector would be."""
    return int(sum(part.size * part.cdim for part in V.dof_dset))


def coefficients(functions: Function | Cofunction | Sequence[Function]) -> np.ndarray:
    """Owned coefficients of a (Co)Function, shape (n_owned,), or of a sequence of them, shape (n, n_owned); a copy."""
    if isinstance(functions, Sequence):
        return np.stack([coefficients(f) for f in functions])
    with functions.dat.vec_ro as vector:
        return vector.array_r.copy()


def field(V: WithGeometry, values: np.ndarray, name: str | None = None) -> Function:
    """Function in V with the owned coefficients `values`, shape (n_owned,)."""
    return assign(Function(V, name=name), values)


def assign(function: Function, values: np.ndarray) -> Function:
    """The Function, now with the owned coefficients `values`, shape (n_owned,)."""
    with function.dat.vec_wo as vector:
        vector.array[:] = values
    return function


def largest(comm: MPI.Comm, x: np.ndarray) -> float:
    """Largest absolute value of an array over all ranks."""
    return float(comm.allreduce(np.abs(x).max(initial=0.0), MPI.MAX))


def by_component(V: WithGeometry, values: np.ndarray) -> list[np.ndarray]:
    """Owned coefficients (n, n_owned) of a mixed space, component by component."""
    return np.split(values, np.cumsum([owned_size(W) for W in V])[:-1], axis=1)


def is_real(V: WithGeometry) -> bool:
    """Whether V holds a few numbers and no field: a space of family "R", scalar or not."""
    return V.ufl_element().family() == "Real"


def independent_entries(V: WithGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of the values of a space that is not mixed are no copies of others, as in symmetric tensors.

    Returns their places among the entries, last index fastest, and how often each stands in the value, and so counts
    in the mass inner product: shape (b,) each.
    """
    element = V.ufl_element()
    mapping = element.flattened_sub_element_mapping() if isinstance(element, TensorElement) else range(V.value_size)
    _, first, count = np.unique(mapping, return_index=True, return_counts=True)
    return first, count


def generic_integrals(V: WithGeometry, number: int = 0) -> np.ndarray:
    """Integral of every basis function against a fixed function without symmetry, shape (n_owned,), owned.

    As a dual vector it gives modes of either sign, or bases, one number that no numbering or partition changes; for
    each `number` there is another such function.
    """
    if len(V) > 1:
        return np.concatenate([(1 + 0.1 * i) * generic_integrals(W, number) for i, W in enumerate(V)])
    phase = _phase(V.mesh())
    weights = np.array([exp((1 + 0.7 * number) * (1 + 0.1 * i) * phase) for i in range(V.value_size)], dtype=object)
    if is_real(V):
        return np.array([assemble(weights[i] * dx) for i in independent_entries(V)[0]])[:owned_size(V)]
    weight = as_tensor(weights.reshape(V.value_shape).tolist()) if V.value_shape else weights[0]
    return coefficients(assemble(inner(weight, TestFunction(V)) * dx))


def bounding_box(mesh: MeshGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates of the nodes of a mesh, shape (gdim,) each."""
    nodes = mesh.coordinates.dat.data_ro.reshape(-1, mesh.geometric_dimension)
    low = np.min(mesh.comm.allgather(nodes.min(axis=0, initial=np.inf)), axis=0)
    return low, np.max(mesh.comm.allgather(nodes.max(axis=0, initial=-np.inf)), axis=0)


def _frame(mesh: MeshGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Lowest coordinates of a mesh and its widths, shape (gdim,) each."""
    low, high = bounding_box(mesh)
    # A surface in a plane of space has no width across it but that of rounding errors.
    return low, np.maximum(high - low, 1e-10 * (high - low).max())


def _phase(mesh: MeshGeometry) -> Expr:
    """Linear function of the place, from zero on, with factors that have no rational relation: UFL scalar."""
    low, width = _frame(mesh)
    x = SpatialCoordinate(mesh)
    parts = ((0.5 + 0.25 * i)**0.5 * (x[i] - float(low[i])) / float(width[i]) for i in range(len(x)))
    return sum(parts)  # pyright: ignore[reportReturnType]


def geometric_key(V: WithGeometry) -> np.ndarray:
    """Numbers that tell every degree of freedom by the geometry alone, whatever the numbering and the partition.

    They are moments of place under the density φ² of its basis function φ, which are local and as exact as coordinates
    however small or thin the cells: the mean place in units of the domain's widths; the mean square of a skew
    coordinate, which tells nodes of a periodic seam, where coordinates jump, and meshes with other diagonals; the share
    of the components in φ²; the normalised integral of φ against a fixed function, which tells the orientation of
    edges and faces. Two more say which component of a mixed space it is and where the domain lies. Dimensionless, for
    any elements, mixed and Real ones included: shape (n_owned, gdim + 5), with the largest gdim of a mixed space.
    """
    keys = [_component_key(W, i) for i, W in enumerate(V)]
    columns = max(key.shape[1] for key in keys)
    return np.vstack([np.pad(key, ((0, 0), (0, columns - key.shape[1]))) for key in keys])


def _component_key(V: WithGeometry, i: int) -> np.ndarray:
    """`geometric_key` of component i, shape (n_owned, gdim + 5)."""
    mesh, gdim = V.mesh(), V.mesh().geometric_dimension
    key = np.zeros((owned_size(V), gdim + 5))
    low, width = _frame(mesh)
    key[:, 0], key[:, 1] = i, (np.sqrt(2 + np.arange(gdim)) * (low / width + np.log(width))).sum()
    if is_real(V):
        key[:, 2] = np.arange(len(key))
        return key
    u, v, x, phase = TrialFunction(V), TestFunction(V), SpatialCoordinate(mesh), _phase(mesh)
    entries = list(np.ndindex(u.ufl_shape))
    # One form, compiled once, with factors that choose the moment.
    chosen, shares = Constant(np.zeros(gdim + 3)), Constant(np.zeros(len(entries)))
    moments = [*((x[j] - float(low[j])) / float(width[j]) for j in range(gdim)), phase**2, 1 / CellVolume(mesh)]
    density = sum(shares[k] * (u[c] * v[c] if c else u * v) for k, c in enumerate(entries))
    form = (chosen[0] + sum(chosen[1 + j] * moment for j, moment in enumerate(moments))) * density * dx

    def integral(j: int, weights: np.ndarray = np.ones(len(entries))) -> np.ndarray:
        chosen.assign(np.eye(gdim + 3)[j])
        shares.assign(weights)
        return coefficients(assemble(form, diagonal=True))
    squares = integral(0)
    for j in range(gdim + 1):
        key[:, 4 + j] = integral(1 + j) / squares
    key[:, 2] = integral(0, np.sqrt(1 + np.arange(len(entries)))) / squares
    weight = [(1 + 0.1 * k) * (1 + phase) for k in range(len(entries))]  # pyright: ignore[reportOperatorIssue]
    overlap = sum(w * (v[c] if c else v) for w, c in zip(weight, entries)) * dx
    # The cell's volume makes it a cosine: as large in small cells as in large ones.
    key[:, 3] = coefficients(assemble(overlap)) * np.sqrt(integral(gdim + 2)) / squares
    return key


def owned_columns(key: np.ndarray, V: WithGeometry) -> np.ndarray | None:
    """Where this rank's degrees of freedom are among stored ones.

    The nearest key must be the same up to rounding, or to a small part of its distance to the next one.

    `key` holds geometric keys in the order of the storage, shape (n_global, c). Returns indices, shape (n_owned,); None
    where the keys are those of another mesh or space, or degrees of freedom are oriented by another numbering of the
    mesh, as edges and faces of H(div) and H(curl) spaces are.
    """
    ours, comm = geometric_key(V), V.comm
    if key.shape != (V.dim(), ours.shape[1]):
        return None
    start = sum(comm.allgather(len(ours))[:comm.rank])
    if comm.allreduce(np.array_equal(key[start:start + len(ours)], ours), MPI.LAND):
        return np.arange(start, start + len(ours))
    distances, places = cKDTree(key, balanced_tree=False).query(ours, k=[1, 2])
    found = np.concatenate(comm.allgather(places[:, 0]))
    frames = [_frame(W.mesh()) for W in V]
    rounding = 1e-13 * max(1 + (np.abs(low) / width).max() for low, width in frames)
    apart = np.minimum(distances[:, 1], 1.0)
    near = (distances[:, 0] <= np.minimum(np.maximum(_SAME * apart, rounding), 0.01 * apart)).all()
    complete = np.array_equal(np.sort(found), np.arange(len(key)))
    return places[:, 0] if comm.allreduce(bool(near and complete), MPI.LAND) else None


def _dense(rows: np.ndarray, comm: MPI.Comm) -> PETSc.Mat:
    """Dense matrix whose columns are the rows of an array (k, n_owned), without a copy where they lie in a row.

    Whoever asks for it destroys it.
    """
    k, owned = rows.shape
    array = np.ascontiguousarray(rows, dtype=float).T
    matrix = PETSc.Mat().createDense(((owned, None), (None, k)), array=array, comm=comm)
    matrix.assemble()
    return matrix


def multiply(matrix: PETSc.Mat, rows: np.ndarray, transpose: bool = False) -> np.ndarray:
    """Product of a matrix, or its transpose, with every row of an array (k, n_owned of the source), as one block.

    The matrix is spread over ranks as the spaces it maps between; shape (k, n_owned of the target).
    """
    dense = _dense(rows, matrix.comm)
    product = matrix.transposeMatMult(dense) if transpose else matrix.matMult(dense)
    result = product.getDenseArray().T.copy()
    # Destroyed together on all ranks: what the garbage collector leaves at the end can hang PetscFinalize.
    dense.destroy()
    product.destroy()
    return result


def solve(ksp: PETSc.KSP, rows: np.ndarray) -> np.ndarray:
    """Solution for every row of an array (k, n_owned) as right-hand side, by a direct solver as one block.

    SolveError if the linear solver reports failure for any of them.
    """
    if ksp.getType() != "preonly":
        return solve_each(ksp, rows, ksp.solve)
    result = np.zeros(rows.shape)
    rhs, out = _dense(rows, ksp.comm), _dense(result, ksp.comm)
    ksp.matSolve(rhs, out)
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
    """Raise SolveError if the last solve has failed."""
    if ksp.getConvergedReason() < 0:
        raise SolveError(f"The linear solver failed (KSP reason {ksp.getConvergedReason()}): take a direct solver, or "
                         "look for a singular operator.")
