"""Steady equations: blocks iterate with one Jacobian at a reference state, single solves are Firedrake's own."""

import numpy as np
from firedrake import Function, replace
from firedrake.adjoint import stop_annotating
from firedrake.exceptions import ConvergenceError
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc

from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import assign, coefficients, field, owned_size
from fem_diffusion.forward.differing import Differing
from fem_diffusion.forward.equation import Equation
from fem_diffusion.forward.solvers import NOT_FINITE, centre, check_determined, norms, refused, variational_solver
from fem_diffusion.forward.stepper import Lose, Rows, Stepper, refuse

__all__ = ["OneStep"]

SHORTEST = 1 / 64      # step of a continuation, as a share of the way


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
        self._determined = False
        self._start = self.u.copy(deepcopy=True)   # where single solves start: fixed, so that m -> u has no memory
        self._reference, self._at = np.zeros_like(coefficients(self._start)), np.zeros(owned_size(M))
        self._chosen = self.linear and not self.by_member   # then any reference will do
        if self.by_member:
            self._differing = Differing(self)
            self.most = self._differing.most

    def assign(self, m: Function) -> None:
        """Copy a Function of M into the parameter (recorded if a tape is running)."""
        if m is not self.m:
            self.m.assign(m)
        if not self.one:
            self.write(coefficients(m))

    def write(self, row: np.ndarray) -> None:
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
        if not self._determined:
            check_determined(self.solver.snes.ksp, self.V)
            self._determined = True
        if self._lift is not None:
            self.u.assign(self._w + self._lift.g)
        with stop_annotating(), self.u.dat.vec_ro as x:
            if not np.isfinite(x.norm()):
                raise SolveError(NOT_FINITE)
        return self.u

    def state(self, row: np.ndarray) -> np.ndarray:
        """State (n_owned of V,) of one parameter (n_owned of M,) by itself, after the usual start by a continuation."""
        try:
            self.write(row)
            return coefficients(self.solve())
        except SolveError:
            if self.linear or not np.isfinite(norms(row[None], self.V.mesh().comm)[0]):
                raise
            kept = self._reference, self._at, self._chosen
            if not self._chosen:
                self._choose(np.zeros_like(row)[None])
            found = self._continued(row)
            self._reference, self._at, self._chosen = kept
            if found is None:
                raise
            return found

    def _continued(self, row: np.ndarray) -> np.ndarray | None:
        """State at a parameter, from the reference on straight to it, in steps that are halved where one fails."""
        start, way, step = self._start, 0.0, 0.5
        self._start = here = field(self.V, self._reference)
        try:
            while way < 1:
                step = min(step, 1 - way)
                try:
                    self.write(self._at + (way + step) * (row - self._at))
                    here.assign(self.solve())
                    way, step = way + step, 2 * step
                except SolveError:
                    step /= 2
                    if step < SHORTEST:
                        return None
            return coefficients(here)
        finally:
            self._start = start

    def refer(self, m: Function) -> None:
        """Start single solves and blocks from the state at m, with the Jacobian there."""
        self.assign(m)
        self._start = self.solve().copy(deepcopy=True)
        self._reference, self._at, self._chosen = coefficients(self._start), coefficients(m), True

    def _choose(self, ms: np.ndarray) -> None:
        """Linearise at the mean of parameters, at zero where that fails, and else where single solves start."""
        mean = centre(ms, self.V.mesh().comm)
        self._reference, self._chosen = coefficients(self._start), True
        for self._at in (mean, np.zeros_like(mean)):
            try:
                self.write(self._at)
                self._reference = coefficients(self.solve())
                break
            except SolveError:
                continue

    def run(self, ms: np.ndarray, lose: Lose = refuse, path: list | None = None) -> np.ndarray:
        """States (n, n_owned of V, 1) of a block; single solves start where they did."""
        if self.by_member and len(ms) == 1:   # exactly, in a block of one
            return self.state(ms[0])[None, :, None]
        if not self._chosen:
            self._choose(ms)
        if not self.by_member:
            return super().run(ms, lose, path)
        u, lost = self._differing.run(ms)
        for i in lost:
            try:
                u[i] = self.state(ms[i])
            except SolveError as error:
                u[i] = np.nan
                lose(int(i), str(error))
        return u[:, :, None]

    def initial(self, ms: np.ndarray) -> np.ndarray:
        """The reference state (n, n_owned of V), where all of them start."""
        return np.tile(self._reference, (len(ms), 1))

    def typical(self, states: np.ndarray) -> None:
        """Linearise at the reference, unless that has been done and nothing since."""
        if self.prepared is not self._reference:
            self.prepare(self._reference, self._reference)

    def newton(self, k: int, old: np.ndarray, start: np.ndarray, load: Rows, i: int) -> np.ndarray:
        """A full solve for member i."""
        return self.state(load.ms[i])
