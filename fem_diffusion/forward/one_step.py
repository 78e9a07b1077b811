"""Steady equations: blocks iterate with one Jacobian at a reference state, single solves are Firedrake's own."""

import numpy as np
from firedrake import Function, replace
from firedrake.adjoint import stop_annotating
from firedrake.exceptions import ConvergenceError
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc

from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import assign, coefficients
from fem_diffusion.forward.equation import Equation
from fem_diffusion.forward.stepper import Stepper, Rows
from fem_diffusion.forward.solvers import NOT_FINITE, centre, refused, variational_solver

__all__ = ["OneStep"]


class OneStep(Stepper):
    """One step without a past, from a reference state; `m` holds the parameter of single solves."""

    def __init__(self, equation: Equation, M: WithGeometry, options: dict, prefix: str | None, m: Function) -> None:
        super().__init__(equation, M, options, prefix)
        self.m, self.u, self._lift = m, self.new, self.boundary if equation.lifted else None
        self.bcs = [bc.reconstruct(g=self._lift.g) if self._lift else bc for bc in equation.bcs]
        self._w, F, bcs = self.u, self.R, self.bcs
        if self._lift is not None:   # solve for u minus the lift
            self._w, bcs = Function(self.V), equation.zero_bcs
            F = replace(F, {self.u: self._w + self._lift.g})
        self.solver = variational_solver(F, self._w, bcs, self.linear, not self.by_member, options, prefix)
        self._start = self.u.copy(deepcopy=True)   # where single solves start: fixed, so that m -> u has no memory
        self._reference = np.zeros_like(coefficients(self._start))
        self._chosen = self.linear   # then any reference will do

    def assign(self, m: Function) -> None:
        """Copy a Function of M into the parameter (recorded if a tape is running)."""
        if m is not self.m:
            self.m.assign(m)
        if not self.one:
            self._set(coefficients(m))

    def _set(self, row: np.ndarray) -> None:
        """Set the parameter from owned coefficients (n_owned of M,)."""
        assign(self.m, row)
        if not self.one:
            for x in self.e.unknowns:
                x.write(row[x.columns])

    def solve(self) -> Function:
        """Solve for the parameter held in m and return u."""
        if self._lift is not None:
            self._lift.update()
        self._w.assign(self._start)
        try:
            self.solver.solve()
        except PETSc.Error as error:
            raise refused(error) from error
        except ConvergenceError as error:
            raise SolveError(f"{' '.join(str(error).split())}: check the range of the parameter, call linearise_at(m) "
                             "with a typical one to start from its state, or pass other solver_parameters.") from error
        if self._lift is not None:
            self.u.assign(self._w + self._lift.g)
        with stop_annotating(), self.u.dat.vec_ro as x:
            if not np.isfinite(x.norm()):
                raise SolveError(NOT_FINITE)
        return self.u

    def refer(self, m: Function) -> None:
        """Start single solves and blocks from the state at m, with the Jacobian there."""
        self.assign(m)
        self._start = self.solve().copy(deepcopy=True)
        self._reference, self._chosen = coefficients(self._start), True

    def run(self, ms: np.ndarray, first: int = 0, path: list | None = None) -> np.ndarray:
        """States (n, n_owned of V, 1) of a block; single solves start where they did."""
        if self.by_member:
            return self._alone(ms[0], first)[None, :, None]
        if not self._chosen:   # linearise at the mean of parameters, at zero where that fails
            mean = centre(ms, self.V.mesh().comm)
            try:
                self._set(mean)
                self.solve()
            except SolveError:
                self._set(np.zeros_like(mean))
                self.solve()
            self._reference, self._chosen = coefficients(self.u), True
        return super().run(ms, first, path)

    def initial(self, ms: np.ndarray) -> np.ndarray:
        """The reference state (n, n_owned of V), where all of them start."""
        return np.tile(self._reference, (len(ms), 1))

    def typical(self, states: np.ndarray) -> None:
        """Linearise at the reference, unless that has been done and nothing since."""
        if self.prepared is not self._reference:
            self.prepare(self._reference, self._reference)

    def newton(self, k: int, old: np.ndarray, start: np.ndarray, load: Rows, i: int, sample: int) -> np.ndarray:
        """A full solve for member i."""
        return self._alone(load.ms[i], sample)

    def _alone(self, row: np.ndarray, sample: int) -> np.ndarray:
        """Full solve for owned coefficients of a parameter; its state's owned coefficients."""
        self._set(row)
        try:
            return coefficients(self.solve())
        except SolveError as error:
            raise SolveError(f"sample {sample}: {error}") from error
