"""Discrete adjoints: products of rows of observations with the derivative of the state by the parameter."""

import numpy as np
from firedrake import Cofunction, Function, assemble

from fem_diffusion.fields.coefficients import coefficients, multiply, owned_size, solve, solve_each
from fem_diffusion.forward import blocks

__all__ = ["Adjoint", "Backward"]


class Adjoint:
    """The derivative of a steady state, at the present values of state and parameter.

    Parameters
    ----------
    transpose : Factorised
        (∂F/∂u)ᵀ.
    constant : bool
        Whether it is the same for all states and parameters.
    J : ufl.Form
        ∂F/∂u.
    loads, lifted : list
        Pairs of an Unknown and a form: ∂F/∂m, and ∂g/∂m of strong Dirichlet values g.
    fixed : ndarray
        Numbers of the owned nodes with strong Dirichlet values.
    V, M : FunctionSpace
        Spaces of state and parameter.
    """

    def __init__(self, transpose, constant, J, loads, lifted, fixed, V, M):
        self._transpose, self._fresh, self._constant = transpose, True, constant
        self._loads = [(x, blocks.Pull(form, V, x.space)) for x, form in loads]
        self._lifted, self._fixed, self._M = lifted, fixed, M
        self._pull_state = blocks.Pull(J, V, V) if lifted else None

    def __call__(self, rows):
        """d(rows·u)/dm, from shape (k, n_owned_V) to (k, n_owned_M)."""
        if not (self._constant or self._fresh):
            self._transpose.update()
        self._fresh = False
        multipliers = solve(self._transpose.solver.snes.ksp, rows)
        multipliers[:, self._fixed] = 0
        result = np.empty((len(rows), owned_size(self._M)))
        for x, pull in self._loads:
            result[:, x.columns] = -pull(multipliers)
        if self._lifted:
            # u = (free part) + g(m): what the equation leaves of the rows meets ∂g/∂m.
            left = rows - self._pull_state(multipliers)
            for x, form in self._lifted:
                result[:, x.columns] = multiply(assemble(form).petscmat, left, transpose=True)
        return result


class Backward:
    """The derivative of all saved states of a θ-scheme: rows march back through the steps together.

    Parameters
    ----------
    march : March
    """

    def __init__(self, march):
        self.march = march
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
        a = np.zeros(rows.shape[:2])
        for k in range(len(e.steps) - 2, -1, -1):
            for j in np.flatnonzero(e.saved == k + 1):
                a = a + rows[:, :, j]
            load.write(k, 0)
            if self._varying:
                blocks.write(march.new, path[k + 1])
                blocks.write(march.old, path[k])
            if not march.linear:
                march.prepare(path[k], path[k + 1])   # the Jacobian of this very step, no typical one
            ksp, J, J_old = self._operators(k)
            multipliers = solve_each(ksp, a, ksp.solveTranspose)
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

    def _operators(self, k):
        """(ksp, ∂R/∂u_new, ∂R/∂u_old) of step k at the present values; the second where there is a lift."""
        march = self.march
        _, A, B, ksp = march.operators(k)
        if march.linear:
            return ksp, A, B
        return ksp, assemble(march.J).petscmat if march.lifted else None, assemble(march.J_old).petscmat

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
