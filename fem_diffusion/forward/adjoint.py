"""Discrete adjoints: products of rows of observations with the derivative of the state by the parameter."""

import numpy as np
from firedrake import assemble
from firedrake.petsc import PETSc

from fem_diffusion.fields.coefficients import assign, multiply, owned_size, solve_each
from fem_diffusion.forward.stepper import Stepper, Rows, column
from fem_diffusion.forward.solvers import Pull

__all__ = ["Backward"]


class Backward:
    """The derivative of all saved states of a march: rows go back through the steps together."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self._pulls = [None if x.strength else Pull(form, stepper.V, x.value.function_space())
                       for x, form in zip(stepper.e.loads, stepper.load.derivatives)]

    def rows(self, ms: np.ndarray, rows: np.ndarray, path: list[np.ndarray] | None = None) -> np.ndarray:
        """Derivative (l, n_owned of M) of rows (l, n_owned of V, number of saved times) at a block of one parameter.

        `path` holds the states (n_owned of V,) at all steps, where they are known and count.
        """
        stepper, fixed, loads = self.stepper, self.stepper.e.fixed, self.stepper.e.loads
        states: list[np.ndarray] = [] if path is None else path
        if stepper.varying and path is None:
            stepper.run(ms, path=states)
        load, boundary, start = (Rows(part, ms) for part in (stepper.load, stepper.boundary, stepper.start))
        result, a = np.zeros((len(rows), owned_size(stepper.M))), np.zeros(rows.shape[:2])
        total = np.zeros(rows.shape[:2])   # of the multipliers, for what has the same derivative at all steps
        same = stepper.load.affine and not stepper.load.columns_move
        at_once = [same and not x.moves for x in loads]
        for k in range(len(stepper.times) - 2, -1, -1):
            a = a + rows[:, :, stepper.saved == k + 1].sum(axis=2)
            load.write(k, 0)
            if stepper.varying:
                assign(stepper.new, states[k + 1])
                assign(stepper.old, states[k])
            if stepper.varying and (path is not None or not stepper.linear):
                stepper.prepare(states[k], states[k + 1])   # the Jacobian of this very step, no typical one
            ksp, J, J_old = self._operators(k)
            multipliers = solve_each(ksp, a, ksp.solveTranspose)
            multipliers[:, fixed] = 0
            total += multipliers
            for i, (x, once) in enumerate(zip(loads, at_once)):
                if not once:
                    result[:, x.columns] -= x.pull(self._load_rows(i, multipliers), stepper.weights[x], k)
            if stepper.e.lifted:
                self._value_rows(k + 1, boundary, a - multiply(J, multipliers, transpose=True), result)
            a = np.zeros_like(a) if J_old is None else -multiply(J_old, multipliers, transpose=True)
        if stepper.e.steps is not None:
            a = a + rows[:, :, stepper.saved == 0].sum(axis=2)
            if stepper.e.imposed:
                self._value_rows(0, boundary, a, result)
                a[:, fixed] = 0
            self._value_rows(0, start, a, result)
        for x, once, matrix in zip(loads, at_once, stepper.load.columns() if any(at_once) else at_once):
            if once:
                result[:, x.columns] -= multiply(matrix, total, transpose=True)
        return result

    def _operators(self, k: int) -> tuple[PETSc.KSP, PETSc.Mat | None, PETSc.Mat | None]:
        """(ksp, ∂R/∂u_new, ∂R/∂u_old) of step k at the present values, where they are needed."""
        stepper = self.stepper
        A, B, ksp = stepper.operators(k)
        if stepper.linear:
            return ksp, A, B
        past = stepper.J_old.integrals()
        return (ksp, assemble(stepper.J).petscmat if stepper.e.lifted else None,
                assemble(stepper.J_old).petscmat if past else None)

    def _load_rows(self, i: int, multipliers: np.ndarray) -> np.ndarray:
        """Products of the multipliers with ∂R/∂(value of unknown i)."""
        load, pull = self.stepper.load, self._pulls[i]
        if pull is not None and not load.affine:
            return pull(multipliers)
        return self._products(load.columns()[i] if load.affine else column(load.derivatives[i]), multipliers)

    def _products(self, matrix: PETSc.Mat | np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Rows times a matrix over V, or times one column (n_owned of V,)."""
        if isinstance(matrix, np.ndarray):
            return self.stepper.V.comm.allreduce(rows @ matrix)[:, None]
        return multiply(matrix, rows, transpose=True)

    def _value_rows(self, k: int, values: Rows, left: np.ndarray, result: np.ndarray) -> None:
        """Add what boundary values at step k, or the initial ones, contribute: what is left of the rows meets ∂g/∂m."""
        stepper = self.stepper
        values.write(k, 0)
        stepper.t.assign(stepper.times[k])
        for x, form in zip(values.part.unknowns, values.part.derivatives):
            result[:, x.columns] += x.pull(self._products(column(form), left), stepper.weights[x], k)
