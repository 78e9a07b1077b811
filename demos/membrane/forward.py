"""The membrane of the benchmark: 64 stiffnesses to its deflection, fast enough for chains.

    -∇·(a ∇u) = 10 in the unit square,   u = 0 on its boundary,

with bilinear elements on 32 x 32 squares and a constant in each of 8 x 8 blocks (Aristoff and Bangerth, SIAM Review
2023, section 2). The unknowns are g = log a. The stiffness matrix K(g) = Σ exp(g_b) K_b is a sum over blocks whose
matrices Firedrake assembles once; numbered row by row it has a band of 32, which LAPACK factorises in a fraction of a
millisecond. By u = K⁻¹ f the derivative of rows L of the state is L du/dg_b = -(K⁻¹ Lᵀ)ᵀ exp(g_b) K_b u.
"""

from pathlib import Path

import numpy as np
from firedrake import (
    COMM_SELF, Constant, Function, FunctionSpace, SpatialCoordinate, TestFunction, TrialFunction, UnitSquareMesh,
    VectorFunctionSpace, assemble, dx, grad, inner,
)
from scipy.linalg import cho_solve_banded, cholesky_banded
from scipy.sparse import csr_matrix, vstack

from fem_diffusion import SolveError, coefficients, field

DATA = Path(__file__).parent / "data"
SQUARES, BLOCKS = 32, 8
LOAD = 10.0
KEPT = 64  # factorisations, of 250 kB each: chains ask for all readings, then for all gradients
POINTS = [(i / 14, j / 14) for i in range(1, 14) for j in range(1, 14)]


def measurements():
    """The readings that the benchmark gives, shape (169,)."""
    return np.loadtxt(DATA / "measurements.csv", delimiter=",", skiprows=1, usecols=2)


def forward_tests():
    """Stiffnesses (10, 64) and the readings that the published program has for them (10, 169)."""
    table = np.loadtxt(DATA / "forward_tests.csv", delimiter=",", skiprows=1)
    return table[:, 1:65], table[:, 65:]


class Membrane:
    """The map from 64 numbers g = log a to the deflection; it has a derivative.

    Attributes
    ----------
    M, U : FunctionSpace
        Of the numbers, block number = column + 8 * row, and of the deflection. Every MPI rank has a copy of its own.
    solves, pulls : int
        Factorisations and back-substitutions for derivatives so far.
    """

    def __init__(self):
        mesh = UnitSquareMesh(SQUARES, SQUARES, quadrilateral=True, comm=COMM_SELF)
        self.M, self.U = VectorFunctionSpace(mesh, "R", 0, dim=BLOCKS**2), FunctionSpace(mesh, "Q", 1)
        self.solves = self.pulls = 0
        inside, stiffness, self._load = self._assembled(mesh)
        # Degrees of freedom inside, row by row.
        self._inside, n = inside, len(inside)
        self._width = SQUARES - 1
        parts = [matrix.tocoo() for matrix in stiffness]
        lower = [part.row >= part.col for part in parts]
        places = [(part.row - part.col) * n + part.col for part in parts]
        self._bands = csr_matrix((np.concatenate([part.data[low] for part, low in zip(parts, lower)]),
                                  (np.concatenate([place[low] for place, low in zip(places, lower)]),
                                   np.repeat(np.arange(BLOCKS**2), [low.sum() for low in lower]))),
                                 shape=((self._width + 2) * n, BLOCKS**2))
        self._stacked = vstack(stiffness, format="csr")
        self._kept = {}

    def _assembled(self, mesh):
        """Nodes inside, stiffness matrix of each block and load, all in the order row by row."""
        x, y = (np.rint(SQUARES * coefficients(Function(self.U).interpolate(c))).astype(int)
                for c in SpatialCoordinate(mesh))
        row_by_row = np.lexsort((x, y))
        inside = row_by_row[((x > 0) & (x < SQUARES) & (y > 0) & (y < SQUARES))[row_by_row]]
        centres = FunctionSpace(mesh, "DG", 0)
        column, row = (np.floor(BLOCKS * coefficients(Function(centres).interpolate(c))).astype(int)
                       for c in SpatialCoordinate(mesh))
        chosen, u, v = Function(centres), TrialFunction(self.U), TestFunction(self.U)
        stiffness = []
        for b in range(BLOCKS**2):
            chosen.dat.data[:] = column + BLOCKS * row == b
            matrix = assemble(chosen * inner(grad(u), grad(v)) * dx).petscmat
            indptr, indices, values = matrix.getValuesCSR()
            block = csr_matrix((values, indices, indptr), shape=matrix.size)[inside][:, inside]
            block.eliminate_zeros()
            stiffness.append(block)
        return inside, stiffness, coefficients(assemble(Constant(LOAD) * v * dx))[inside]

    def _solved(self, g):
        """Factor of K(g) and the deflection inside, of the last places kept for derivatives there."""
        key = g.tobytes()
        if key not in self._kept:
            bands = (self._bands @ np.exp(g)).reshape(self._width + 2, -1)
            try:
                factor = cholesky_banded(bands, overwrite_ab=True, lower=True, check_finite=False)
            except np.linalg.LinAlgError as error:
                raise SolveError(f"The stiffness matrix has no factor ({error}): log a is too far from its prior.")
            if len(self._kept) == KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = factor, cho_solve_banded((factor, True), self._load, check_finite=False)
            self.solves += 1
        return self._kept[key]

    def __call__(self, m):
        """The deflection for a Function in M."""
        return field(self.U, self.solve_many(coefficients(m)[None])[0])

    def solve_many(self, parameters):
        """As `Forward.solve_many`: deflections (B, 1089) for log stiffnesses (B, 64)."""
        states = np.zeros((len(parameters), self.U.dim()))
        for g, state in zip(parameters, states):
            state[self._inside] = self._solved(g)[1]
        return states

    def sensitivity(self, m, rows):
        """As `Differentiable.sensitivity`: (k, 64) for rows (k, 1089), by back-substitutions with a factor."""
        g = coefficients(m)
        factor, u = self._solved(g)
        inside = rows[:, self._inside]
        right = inside.toarray() if hasattr(inside, "toarray") else np.asarray(inside)
        adjoint = cho_solve_banded((factor, True), right.T, check_finite=False)
        self.pulls += len(right)
        return -adjoint.T @ (self._stacked @ u).reshape(BLOCKS**2, -1).T * np.exp(g)
