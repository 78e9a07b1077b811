"""The discrete adjoint of the θ-scheme: rows of observations march back through the steps together."""

import numpy as np
from firedrake import Cofunction, Function, adjoint, assemble

from fem_diffusion.fields import coefficients, multiply, owned_size, solve
from fem_diffusion.problem import _blocks as blocks

__all__ = ["Backward"]


class Backward:
    """The transpose of the linearised march.

    Parameters
    ----------
    march : March
    """

    def __init__(self, march):
        self.march, self._factorised, self._matrices = march, None, None
        self._pulls = [None if x.strength else blocks.Pull(form, march.V, x.value.function_space())
                       for x, form in zip(march.loads, march.load.derivatives)]
        # States count where the Jacobian or ∂R/∂m contains them.
        self._varying = march.by_member or not march.linear

    def rows(self, ms, rows):
        """Derivative of rows of the saved states with respect to the parameter.

        Parameters
        ----------
        ms : ndarray
            One parameter, owned coefficients, shape (1, n_owned_M).
        rows : ndarray
            Shape (l, n_owned_V, number of saved times).

        Returns
        -------
        ndarray
            Shape (l, n_owned_M).
        """
        march, e = self.march, self.march.e
        path = []
        if self._varying:
            march.run(ms, path=path)
        load, boundary = march.load.start(ms), march.boundary.start(ms)
        result = np.zeros((len(rows), owned_size(march.M)))
        total = np.zeros(rows.shape[:2])   # of the multipliers, for what has the same derivative at all steps
        same = march.load.affine and not march.load.columns_move
        at_once = [same and not x.moves for x in march.loads]
        a, last = np.zeros(rows.shape[:2]), len(e.steps) - 2
        for k in range(last, -1, -1):
            for j in np.flatnonzero(e.saved == k + 1):
                a = a + rows[:, :, j]
            load.write(k, 0)
            e.t.assign(march.between[k])
            if self._varying:
                blocks.write(march.new, path[k + 1])
                blocks.write(march.old, path[k])
            ksp, J, J_old = self._operators(k == last)
            multipliers = solve(ksp, a)
            multipliers[:, march.fixed] = 0
            total += multipliers
            for i, (x, once) in enumerate(zip(march.loads, at_once)):
                if not once:
                    result[:, x.columns] -= x.pull(self._load_rows(i, x, multipliers), march.weights[x], k)
            if march.lifted:
                self._boundary_rows(k + 1, boundary, a - multiply(J, multipliers, transpose=True), result)
            a = -multiply(J_old, multipliers, transpose=True)
        for j in np.flatnonzero(e.saved == 0):
            a = a + rows[:, :, j]
        if march.lifted:
            self._boundary_rows(0, boundary, a, result)
        a[:, march.fixed] = 0
        self._start_rows(ms, a, result)
        for x, once, column in zip(march.loads, at_once, march.load.columns() if any(at_once) else at_once):
            if once:
                result[:, x.columns] -= multiply(column, total, transpose=True)
        return result

    def _operators(self, first):
        """(ksp of the transpose, ∂R/∂u_new or None, ∂R/∂u_old) at the present values."""
        march = self.march
        if self._factorised is None:
            self._factorised = blocks.Factorised(adjoint(march.J), march.zero_bcs, march.options,
                                                 march.prefix and march.prefix + "adjoint_")
        elif not march.linear or march.operator_moves or (march.by_member and first):
            self._factorised.update()
        else:
            return self._factorised.solver.snes.ksp, *self._matrices
        self._matrices = (assemble(march.J).petscmat if march.lifted else None), assemble(march.J_old).petscmat
        return self._factorised.solver.snes.ksp, *self._matrices

    def _load_rows(self, i, x, multipliers):
        """Products of the multipliers with ∂R/∂(value of x)."""
        load = self.march.load
        if load.affine:
            column = load.columns()[i]
            return self._products(column, multipliers)
        if x.strength:
            return self._products(coefficients(assemble(load.derivatives[i])), multipliers)
        return self._pulls[i](multipliers)

    def _products(self, column, rows):
        """Rows times a matrix over V, or times one column (n_owned_V,)."""
        if isinstance(column, np.ndarray):
            return self.march.V.comm.allreduce(rows @ column)[:, None]
        return multiply(column, rows, transpose=True)

    def _boundary_rows(self, k, boundary, left, result):
        """Add what the boundary values at step k contribute."""
        march = self.march
        boundary.write(k, 0)
        march.e.t.assign(march.e.steps[k])
        for x, form in zip(march.lifted, march.boundary.derivatives):
            derivative = assemble(form)
            if isinstance(derivative, (Function, Cofunction)):
                derivative = coefficients(derivative)
            else:
                derivative = derivative.petscmat
            result[:, x.columns] += x.pull(self._products(derivative, left), march.weights[x], k)

    def _start_rows(self, ms, a, result):
        """Add what the initial state contributes."""
        march = self.march
        march.e.t.assign(0.0)
        for x in march.starts:
            x.write(x.at(ms, None)(0)[0])
        for x in march.starts:
            result[:, x.columns] += multiply(assemble(march.start_derivative(x)).petscmat, a, transpose=True)
