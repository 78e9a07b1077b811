"""Blocks of steady samples whose operators differ: all iterate with one factorisation, scaled to each of them.

Let J be ∂F/∂u of a member, K that of a reference, and D² the ratio of their diagonals. Then ``D K D`` stands for J in
iterations: conjugate gradients where the equation is linear and symmetric, those of `chord` else. Of diffusion, where
that ratio is κ/κ_0 up to O(h), what this leaves out is of lower order, because ``-∇·(κ∇)`` is ``κ^(1/2) (-Δ + q)
κ^(1/2)`` with ``q = κ^(-1/2) Δκ^(1/2)`` (Liouville's transform): they converge on fine meshes as on coarse ones. The
states are those of a solver for each member alone up to a tolerance of 1e-8; members that are lost are given to it.
"""

import numpy as np
from firedrake import Cofunction
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from mpi4py import MPI

from fem_diffusion.fields.coefficients import assign, coefficients, owned_size
from fem_diffusion.forward.solvers import CHORD_DEPTH, centre, chord, conjugate
from fem_diffusion.forward.stepper import Rows, Stepper

__all__ = ["Differing"]

MEMORY = 300_000_000   # bytes of the members that iterate together, on this rank
LOST = 0.2             # share of them that moves the reference into the midst of the next ones


class Differing:
    """States of members that have operators of their own, by a factorisation at a parameter in their midst."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        V = stepper.V
        held = owned_size(V) * (8 * (2 * CHORD_DEPTH + 10) + 12 * 30)   # with a matrix of 30 entries a row
        self.most: int | None = max(1, MEMORY // V.mesh().comm.allreduce(held, MPI.MAX))
        self._residual = None if stepper.linear else get_assembler(stepper.R)
        self._stiffness, self._out = get_assembler(stepper.J, mat_type="aij"), Cofunction(V.dual())
        # Firedrake has no diagonals of mixed forms, nor of integrals over interior facets.
        facets = any(integral.integral_type().startswith("interior_facet") for integral in stepper.J.integrals())
        self._diagonals = get_assembler(stepper.J, diagonal=True) if len(V) == 1 and not facets else None
        self._scratch = self._stiffness.assemble() if facets and len(V) == 1 and not stepper.linear else None
        self._matrices: list = []   # of members, kept for the next ones
        self._vectors = (V.dof_dset.layout_vec.duplicate(), V.dof_dset.layout_vec.duplicate())
        self._centre: np.ndarray | None = None   # parameter (n_owned of M,) of the factorisation

    def run(self, ms: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """States (n, n_owned of V) of parameters (n, n_owned of M), and the members that were not found."""
        stepper, comm, fixed = self.stepper, self.stepper.V.mesh().comm, self.stepper.e.fixed
        load, boundary, u = Rows(stepper.load, ms), Rows(stepper.boundary, ms), stepper.initial(ms)
        u[:, fixed] = boundary(0)[:, fixed]
        b = load(0)
        ksp = self._factorised(ms)
        middle, D = self._diagonal(None), np.ones_like(u)
        for i, row in enumerate(D):
            load.write(0, i)
            row[:] = self._diagonal(i)
        # Zeros, as of a saddle point, tell nothing of a scale.
        if comm.allreduce(bool((middle == 0).any()), MPI.LOR):
            D[:] = 1.0
        else:
            D = np.sqrt(np.abs(D / middle))
            D[~(D > 0)] = 1.0
            D[:, fixed] = 1.0
        # From here on states are D u and residuals D⁻¹ F.
        if stepper.linear:
            scale, _ = self._vectors
            for matrix, row in zip(self._matrices, D):
                scale.array[:] = 1 / row
                matrix.petscmat.diagonalScale(scale, scale)

        def products(members: np.ndarray, states: np.ndarray) -> np.ndarray:
            rows = np.empty_like(states)
            for i, row, state in zip(members, rows, states):
                row[:] = self._product(self._matrices[i].petscmat, state)
            rows[:, fixed] = 0
            return rows

        def residuals(members: np.ndarray, states: np.ndarray) -> np.ndarray:
            if self._residual is None:
                rows = products(members, states) + b[members] / D[members]
            else:
                rows = np.empty_like(states)
                for i, row, state in zip(members, rows, states):
                    load.write(0, i)
                    assign(stepper.new, state / D[i])
                    row[:] = stepper.vector(self._residual) / D[i]
            rows[:, fixed] = 0
            return rows
        u *= D
        # A member as well: at the centre, what is not symmetric may vanish.
        if stepper.linear and self._is_symmetric(ksp.getOperators()[0]) and self._is_symmetric(
                self._matrices[0].petscmat):
            change, lost = conjugate(products, ksp, -residuals(np.arange(len(u)), u), comm)
            u += change
        else:
            lost = chord(residuals, ksp, u, comm)
        if len(lost) > LOST * len(u):
            self._centre = None
        return u / D, lost

    def _factorised(self, ms: np.ndarray) -> PETSc.KSP:
        """The solver with the Jacobian at the reference state and a parameter in the midst of these or former ones."""
        stepper, at = self.stepper, self._centre
        if at is None:
            self._centre = at = centre(ms, stepper.V.mesh().comm)
            stepper.prepared = None
        Rows(stepper.load, at[None]).write(0, 0)
        stepper.typical(ms)
        ksp = stepper.operators(0)[-1]
        return ksp

    def _is_symmetric(self, matrix: PETSc.Mat) -> bool:
        """Whether two random vectors find it so."""
        comm = self.stepper.V.mesh().comm
        x, y = np.random.default_rng(comm.rank).standard_normal((2, owned_size(self.stepper.V)))
        ends = comm.allreduce(np.array([x @ self._product(matrix, y), y @ self._product(matrix, x)]))
        return bool(np.abs(ends[0] - ends[1]) <= 1e-10 * np.abs(ends).max())

    def _diagonal(self, i: int | None) -> np.ndarray:
        """Diagonal (n_owned of V,) of ∂F/∂u at the present parameter, that of member i, whose matrix is kept."""
        stepper = self.stepper
        if self._scratch is not None:
            return self._stiffness.assemble(tensor=self._scratch).petscmat.getDiagonal().array_r
        if not stepper.linear:
            return (np.zeros(owned_size(stepper.V)) if self._diagonals is None else
                    coefficients(self._diagonals.assemble(tensor=self._out)))
        if i is None:
            return stepper.operators(0)[0].getDiagonal().array_r
        while len(self._matrices) <= i:
            self._matrices.append(self._stiffness.assemble())
        return self._stiffness.assemble(tensor=self._matrices[i]).petscmat.getDiagonal().array_r

    def _product(self, matrix: PETSc.Mat, row: np.ndarray) -> np.ndarray:
        """A matrix times owned coefficients (n_owned of V,)."""
        x, y = self._vectors
        x.array[:] = row
        matrix.mult(x, y)
        return y.array_r.copy()
