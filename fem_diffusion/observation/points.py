"""Values at points: where points are in a mesh, and the rows that read a state there."""

import numpy as np
from finat.ufl import TensorElement
from firedrake import Function, FunctionSpace, TrialFunction, VertexOnlyMesh, assemble, dx, inner, interpolate
from firedrake.functionspaceimpl import WithGeometry
from firedrake.mesh import MeshGeometry
from firedrake.petsc import PETSc
from scipy.sparse import coo_matrix, csr_matrix

from fem_diffusion.errors import InputError
from fem_diffusion.fields.checks import refuse_variable_layers
from fem_diffusion.fields.coefficients import coefficients, field, independent_entries, is_real, owned_size

__all__ = ["locate", "sensor_rows"]

_SIMPLICES = ("vertex", "interval", "triangle", "tetrahedron")


def locate(mesh: MeshGeometry, points: np.ndarray, tolerance: float) -> tuple[MeshGeometry, np.ndarray, np.ndarray]:
    """The points as a vertex-only mesh, the user's index of each of its points here, and a mask (k,) of those found."""
    refuse_variable_layers(mesh)
    parent_tolerance = mesh.tolerance
    try:
        vom = VertexOnlyMesh(mesh, points, missing_points_behaviour="ignore", tolerance=tolerance)
    finally:
        mesh.tolerance = parent_tolerance  # VertexOnlyMesh sets the parent's
    order = Function(FunctionSpace(vom.input_ordering, "DG", 0))
    order.dat.data_wo[:] = np.arange(order.dat.data_ro.size)  # all points are on rank 0, in the user's order
    index = assemble(interpolate(order, FunctionSpace(vom, "DG", 0))).dat.data_ro.real.round().astype(int)
    return vom, index, mesh.comm.allreduce(np.bincount(index, minlength=len(points))) > 0


def _space(mesh: MeshGeometry, degree: int, shape: tuple[int, ...]) -> WithGeometry:
    """Discontinuous space of this value shape."""
    scalar = FunctionSpace(mesh, "DG" if mesh.ufl_cell().cellname in _SIMPLICES else "DQ", degree)
    return FunctionSpace(mesh, TensorElement(scalar.ufl_element(), shape=shape)) if shape else scalar


def _owned_columns(matrix: PETSc.Mat, entries: tuple, k: int) -> csr_matrix:
    """Sum over ranks of entries (rows, global columns, values) as k rows with the columns of `matrix` owned here."""
    rows, columns, values = (np.concatenate(part) for part in zip(*matrix.comm.tompi4py().allgather(entries)))
    first, last = matrix.getOwnershipRangeColumn()
    mine = (first <= columns) & (columns < last)
    return coo_matrix((values[mine], (rows[mine], columns[mine] - first)), shape=(k, last - first)).tocsr()


def point_rows(U: WithGeometry, vom: MeshGeometry, index: np.ndarray, k: int) -> csr_matrix:
    """This rank's columns of the rows that read U at k points of a vertex-only mesh, entries running fastest."""
    matrix = assemble(interpolate(TrialFunction(U), _space(vom, 0, U.value_shape)), mat_type="aij").petscmat
    indptr, columns, values = matrix.getValuesCSR()
    component_rows = (index[:, None] * U.value_size + np.arange(U.value_size)).ravel()
    # A point's cell can use coefficients of another rank: every rank sees all entries, keeps its columns.
    return _owned_columns(matrix, (np.repeat(component_rows, np.diff(indptr)), columns, values), k * U.value_size)


def sensor_rows(U: WithGeometry, vom: MeshGeometry, index: np.ndarray, k: int) -> csr_matrix:
    """As `point_rows`, of independent entries, compared with values of a discontinuous copy of a random state.

    Firedrake reads H(div) functions on immersed manifolds with the wrong sign in some cells (firedrake#3089), and
    discontinuous ones rightly; so rows go through these where they hold the state exactly. InputError if the two differ
    by more than the copy does from the state, or U holds numbers.
    """
    if is_real(U):
        raise InputError('a state of numbers (family "R") has no values at points: use functionals.')
    element, simplex = U.ufl_element(), U.mesh().ufl_cell().cellname in _SIMPLICES
    degree = element.embedded_superdegree if simplex else int(np.max(element.degree()))
    rows = point_rows(U, vom, index, k)
    state = field(U, np.random.default_rng([0, U.comm.rank]).standard_normal(owned_size(U)))
    here = U.comm.allreduce(rows @ coefficients(state))
    # Degrees that elements tell of themselves can be too small for an exact copy.
    for D in (_space(U.mesh(), degree + more, U.value_shape) for more in range(3)):
        copy, copy_rows = assemble(interpolate(state, D)), point_rows(D, vom, index, k)
        there = U.comm.allreduce(copy_rows @ coefficients(copy))
        error, size = np.abs(here - there).max(), np.abs(there).max()
        if error <= 1e-9 * size:
            break
        away = np.sqrt(assemble(inner(state - copy, state - copy) * dx) / assemble(inner(state, state) * dx))
        if away <= 1e-9:
            matrix = assemble(interpolate(TrialFunction(U), D), mat_type="aij").petscmat
            indptr, columns, values = matrix.getValuesCSR()
            shape = owned_size(D), matrix.getSize()[1]
            product = (copy_rows @ csr_matrix((values, columns, indptr), shape=shape)).tocoo()
            rows = _owned_columns(matrix, (product.row, product.col, product.data), rows.shape[0])
            break
    else:
        if error > 10 * away * size or (away > 0.1 and element.mapping() != "identity"):
            raise InputError(f"Firedrake reads {element} at points of this mesh wrongly: interpolate the state "
                             f"into VectorFunctionSpace(mesh, \"DG\", {degree}) in the solver and observe that.")
    return rows[(np.arange(k)[:, None] * U.value_size + independent_entries(U)[0]).ravel()]
