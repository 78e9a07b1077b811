"""Steps in time for many samples at once: they march together wherever the operator does not depend on them.

A steady equation is one step without a past.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
from firedrake import (Cofunction, Constant, Function, Measure, NonlinearVariationalSolver, TestFunction, TrialFunction,
                       assemble, conditional, derivative, gt, inner, interpolate, replace)
from firedrake.assemble import OneFormAssembler, get_assembler
from firedrake.exceptions import ConvergenceError
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from ufl import Form, zero
from ufl.algorithms.analysis import extract_type
from ufl.constantvalue import Zero
from ufl.core.expr import Expr

from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import assign, coefficients, multiply, owned_size, solve
from fem_diffusion.forward.equation import Equation, boundary_value
from fem_diffusion.forward.kept import Kept
from fem_diffusion.forward.solvers import Factorised, centre, chord, norms, variational_solver
from fem_diffusion.forward.unknowns import Unknown, derivative_by, expanded, in_condition

__all__ = ["Lose", "Rows", "Stepper", "column", "refuse"]


def contains(form: Form | Expr, things: list[Function | Constant]) -> bool:
    """Whether a form or expression contains one of these."""
    return not set(things).isdisjoint(extract_type(form, (Function, Constant)))


Lose = Callable[[int, str], None]   # hears the number of a member that has no state, and why


def refuse(number: int, why: str) -> None:
    """The `Lose` of those who need every state."""
    raise SolveError(why)


class Stepper:
    """All steps of an equation, for blocks of parameters in M; `options` and `prefix` are those of PETSc."""

    def __init__(self, equation: Equation, M: WithGeometry, options: dict, prefix: str | None) -> None:
        self.e, self.M, self.options, self.prefix = equation, M, options, prefix
        e, steps = equation, equation.steps
        self.V = V = e.u.function_space()
        self.new, self.old, self.A, self.N = e.u, e.old or Function(V), e.A, e.N
        if steps is None:
            self.t, self.times, self.saved = Constant(0.0), np.zeros(2), np.ones(1, dtype=int)
            self.between = np.zeros(1)
        else:
            self.t, self.times, self.saved = steps.t, steps.all, steps.saved
            # Forms are evaluated between two steps, boundary values at the later one.
            self.between = self.times[:-1] + steps.theta * steps.time_step
        written = [self.new, self.old, self.t, *(x.value for x in e.unknowns)]
        self.kept = Kept(e, written)
        self.one = all(x.space == M for x in e.unknowns)   # not a Function for each of several unknowns
        self.linear, self.R = self.N is None, self.A if self.N is None else self.A + self.N
        self.weights = {x: x.weights(self.times if x in e.lifted else self.between) for x in e.unknowns}

        values, moving = [x.value for x in e.loads], [self.t, *(x.value for x in e.loads if x.moves)]
        self.J, self.J_old = (expanded(derivative(self.R, w)) for w in (self.new, self.old))
        direction = TrialFunction(V)
        affine = [expanded(derivative(self.A, w, direction)) for w in (self.new, self.old)]
        if not affine[0].integrals():
            affine[0] = Constant(0.0) * inner(direction, TestFunction(V)) * Measure("dx", V.mesh())
        affine = [form for form in affine if form.integrals()]   # of the former state there may be none
        self.by_member = any(contains(form, values) for form in (self.J, *affine))
        self.operator_moves = any(contains(form, moving) for form in (self.J, *affine))
        self.most = 1 if self.by_member else None   # members that `run` takes at once
        # States count in the derivative where the Jacobian or ∂R/∂m contains them.
        self.varying = self.by_member or not self.linear
        self._assemblers = [get_assembler(form, mat_type="aij") for form in affine]
        self._matrices: list[Any] = [None] * len(affine)
        self._factorised, self._stale, self.prepared = None, True, None
        self._nonlinear = self.N and get_assembler(self.N)
        self._nonlinear_by_member = self.N is not None and contains(self.N, values)
        self._out = Cofunction(V.dual())
        self.load, self.boundary, self.start = Load(self), Boundary(self), Start(self)
        # Whether the states are affine in the parameter.
        self.affine = not self.varying and self.load.affine and self.boundary.affine and self.start.affine

    def vector(self, assembler: OneFormAssembler) -> np.ndarray:
        """Owned coefficients (n_owned of V,) of a one-form at the present values."""
        return coefficients(assembler.assemble(tensor=self._out))

    # --- operators

    def prepare(self, old: np.ndarray, new: np.ndarray) -> None:
        """Forget operators that are others at these states (n_owned of V,), where the next ones are taken."""
        self.prepared = new
        if self.varying or self.operator_moves or self._factorised is None:
            self._stale = True
            assign(self.old, old)
            assign(self.new, new)

    def operators(self, k: int) -> tuple[PETSc.Mat, PETSc.Mat | None, PETSc.KSP]:
        """(A, B, ksp) of step k: ∂A/∂u_new, ∂A/∂u_old (None where there is none), the factorised Jacobian."""
        self.t.assign(self.between[k])
        factorised = self._factorised
        if factorised is None or self._stale or self.operator_moves:
            self._matrices = [x.assemble(tensor=matrix) for x, matrix in zip(self._assemblers, self._matrices)]
            if factorised is None:
                factorised = self._factorised = Factorised(self.J, self.e.zero_bcs, self.options, self.prefix)
            else:
                factorised.update()
            self._stale = False
        A, B, *_ = *(matrix.petscmat for matrix in self._matrices), None
        return A, B, factorised.ksp

    # --- marching

    def initial(self, ms: np.ndarray) -> np.ndarray:
        """Initial states (n, n_owned of V) but for their boundary values."""
        return np.broadcast_to(Rows(self.start, ms)(0), (len(ms), owned_size(self.V))).copy()

    def typical(self, states: np.ndarray) -> None:
        """Linearise for a block at its initial states (n, n_owned of V)."""
        mean = centre(states, self.V.mesh().comm)
        self.prepare(mean, mean)

    def run(self, ms: np.ndarray, lose: Lose = refuse, path: list | None = None) -> np.ndarray:
        """Saved states (n, n_owned of V, number of saved times) of a block of parameters (n, n_owned of M).

        Where the operator depends on the parameter n is one. `lose` hears of members that have no state, by their
        number in the block, unless it raises; their states are NaN. `path` takes the states (n, n_owned of V) at all
        steps.
        """
        u = self.initial(ms)
        load, boundary = Rows(self.load, ms), Rows(self.boundary, ms)
        if self.e.imposed and self.e.bcs:
            u[:, self.e.fixed] = boundary(0)[:, self.e.fixed]
        self.typical(u)
        out = np.empty((*u.shape, len(self.saved)))
        for k in range(len(self.times)):
            if k:
                u = self._step(k - 1, u, load, boundary, lose)
            if path is not None:
                path.append(u)
            out[:, :, self.saved == k] = u[:, :, None]
        return out

    def _step(self, k: int, u: np.ndarray, load: "Rows", boundary: "Rows", lose: Lose) -> np.ndarray:
        """States (n, n_owned of V) at step k + 1 from those at step k."""
        start, fixed = u, self.e.fixed
        moves = self.boundary.moves or (k == 0 and not self.e.imposed and len(self.e.bcs) > 0)
        if moves:
            start = u.copy()
            start[:, fixed] = boundary(k + 1)[:, fixed]
        b = load(k)
        A, B, ksp = self.operators(k)
        base = multiply(A, u) + b
        if B is not None:
            base += multiply(B, u)
        if self.linear:
            if moves:
                base += multiply(A, start - u)
            base[:, fixed] = 0
            return start - solve(ksp, base)

        def residuals(members: np.ndarray, states: np.ndarray) -> np.ndarray:
            rows = base[members] + multiply(A, states - u[members])
            for i, row, new, old in zip(members, rows, states, u[members]):
                if self._nonlinear_by_member:
                    load.write_rest(k, i)
                assign(self.new, new)
                if self.e.old is not None:
                    assign(self.old, old)
                row += self.vector(self._nonlinear)
            rows[:, fixed] = 0
            return rows

        comm = self.V.mesh().comm
        sound = np.flatnonzero(np.isfinite(norms(start, comm)))   # those that are lost already stay so
        new, found = start.copy(), start[sound]
        lost = chord(lambda members, states: residuals(sound[members], states), ksp, found, comm)
        new[sound] = found
        for i in sound[lost]:
            try:
                new[i] = self.newton(k, u[i], start[i], load, i)
            except SolveError as error:
                new[i] = np.nan
                lose(int(i), str(error))
        if lost and k + 2 < len(self.times):   # a Jacobian at the present states serves the next steps better
            self.typical(new)
        return new

    @cached_property
    def _newton_solver(self) -> tuple[NonlinearVariationalSolver, Function, Function]:
        """Newton's method for the change in one step, where it starts from, with boundary values, and the change."""
        start, change = Function(self.V), Function(self.V)
        return variational_solver(replace(self.R, {self.new: start + change}), change, self.e.zero_bcs, False, False,
                                  self.options, self.prefix), start, change

    def newton(self, k: int, old: np.ndarray, start: np.ndarray, load: "Rows", i: int) -> np.ndarray:
        """One step of member i by Newton's method, as owned coefficients."""
        solver, here, change = self._newton_solver
        load.write(k, i)
        self.t.assign(self.between[k])
        assign(self.old, old)
        assign(here, start)
        change.assign(0)
        try:
            solver.solve()
        except ConvergenceError as error:
            raise SolveError(f"step to t = {self.times[k + 1]:g}: {' '.join(str(error).split())}: "
                             "check the range of the parameter, or take a smaller time_step.") from error
        return start + coefficients(change)


class Rows:
    """What a block of members (n, n_owned of M) contributes at each step: k -> rows, shape (n or 1, columns)."""

    def __init__(self, part: "Part", ms: np.ndarray) -> None:
        self.part, self.ms, self._kept = part, ms, None
        self._at = {x: x.at(ms, part.stepper.weights[x]) for x in part.unknowns}

    def __call__(self, k: int) -> np.ndarray:
        part = self.part
        if self._kept is not None and not part.moves:
            return self._kept
        if part.affine:   # all members together
            for x in self._at:
                x.value.assign(0)
            result = part.value(k)[None]
            for (x, rows), matrix in zip(self._at.items(), part.columns()):
                result = result + (rows(k) * matrix if x.strength else multiply(matrix, rows(k)))
        else:
            result = np.empty((len(self.ms), owned_size(part.stepper.V)))
            for i, row in enumerate(result):
                self.write(k, i)
                row[:] = part.value(k)
        self._kept = result
        return result

    def write_rest(self, k: int, i: int) -> None:
        """Set the unknowns to what is left of those of member i: to zero where the rows hold all that is linear."""
        if not self.part.affine:
            self.write(k, i)
            return
        for x in self._at:
            x.value.assign(0)

    def write(self, k: int, i: int) -> None:
        """Set the unknowns to those of member i at step k."""
        for x, rows in self._at.items():
            x.write(rows(k)[i])


class Part:
    """A quantity (n_owned of V,) that depends on some unknowns and on time: what the three below share.

    It moves where one of the `forms` does. `derivatives` are forms, by each of the unknowns; they count as constant
    unless they contain unknowns or `states`, or an unknown decides a condition in one of the places it is in, `of`.
    """

    def __init__(self, stepper: Stepper, unknowns: list[Unknown], derivatives: list[Form | Expr],
                 of: Iterable[Form | Expr], forms: Iterable[Form | Expr] = (), states: Iterable[Function] = ()) -> None:
        self.stepper, self.unknowns, self.derivatives = stepper, unknowns, derivatives
        moving, forbidden = [x.value for x in unknowns if x.moves], [*states, *(x.value for x in unknowns)]
        self.moves = any(contains(form, [stepper.t, *moving]) for form in forms)
        bent = any(x.real or contains(form, forbidden) for x, form in zip(unknowns, derivatives))
        self.affine = not bent and not any(in_condition(place, x.value) for place in of for x in unknowns)
        self.columns_move = any(contains(form, [stepper.t]) for form in derivatives)
        self._columns = None

    def columns(self) -> list[PETSc.Mat | np.ndarray]:
        """Matrices, and for functions of time alone columns (n_owned of V,), at the present time."""
        if self._columns is None or self.columns_move:
            self._columns = [column(form) for form in self.derivatives]
        return self._columns

    def value(self, k: int) -> np.ndarray:
        """At the present values and step k."""
        raise NotImplementedError


def column(form: Form | Expr) -> PETSc.Mat | np.ndarray:
    """An assembled derivative: a matrix, or by a function of time alone owned coefficients."""
    f = assemble(form, mat_type="aij")
    return coefficients(f) if isinstance(f, (Function, Cofunction)) else f.petscmat


class Load(Part):
    """The residual of zero states."""

    derivatives: list[Form]

    def __init__(self, stepper: Stepper) -> None:
        loads, values = stepper.e.loads, [x.value for x in stepper.e.loads]
        nothing = zero(stepper.new.ufl_shape)
        form = replace(stepper.A, {stepper.new: nothing, stepper.old: nothing})
        # Integrals without unknowns are the same for all members.
        split = {True: [], False: []}
        for integral in form.integrals():
            split[contains(integral.integrand(), values)].append(integral)
        self._own, self._shared = (part and get_assembler(Form(part)) for part in split.values())
        self._kept = None
        super().__init__(stepper, loads, [derivative_by(stepper.R, x) for x in loads], [stepper.R], [form],
                         [stepper.new, stepper.old])
        # Where the operator moves with a member's parameter, that has to be put into the forms at every step.
        self.moves |= stepper.operator_moves

    def value(self, k: int) -> np.ndarray:
        """At the present values and step k."""
        stepper = self.stepper
        stepper.t.assign(stepper.between[k])
        if self._kept is None or (self.moves and self._kept[0] != k):
            self._kept = k, stepper.vector(self._shared) if self._shared else np.zeros(owned_size(stepper.V))
        return stepper.vector(self._own) + self._kept[1] if self._own else self._kept[1].copy()


class Boundary(Part):
    """The strong boundary values as a Function g that is zero at free nodes.

    The tape of firedrake.adjoint keeps the values of a DirichletBC fixed when it replays a variational solver, so
    unknown ones enter the residual through g and the solver sees homogeneous ones.
    """

    def __init__(self, stepper: Stepper) -> None:
        e, V = stepper.e, stepper.V
        self.g, self._known, self._masked = Function(V, name="boundary values"), Function(V), Zero()
        for i, value in e.raised.items():
            mask = Function(V)
            e.bcs[i].reconstruct(g=1).apply(mask)
            for later in e.zero_bcs[i + 1:]:
                later.apply(mask)
            # No product: the value may be NaN elsewhere.
            self._masked += conditional(gt(mask, 0.5), value, 0)
        super().__init__(stepper, e.lifted, [interpolate(derivative_by(self._masked, x), V) for x in e.lifted],
                         e.raised.values(), [*map(boundary_value, e.bcs), *e.raised.values()])
        self.value(0)

    def update(self) -> None:
        """Interpolate the current parameter (recorded if a tape is running)."""
        if self.stepper.e.raised:
            self.g.interpolate(self._masked + self._known)
        else:
            self.g.assign(self._known)

    def value(self, k: int) -> np.ndarray:
        """At the present values and step k."""
        self.stepper.t.assign(self.stepper.times[k])
        for bc in self.stepper.e.bcs:
            bc.apply(self._known)
        self.update()
        return coefficients(self.g)


class Start(Part):
    """The initial state but for its boundary values."""

    def __init__(self, stepper: Stepper) -> None:
        starts, self._f = stepper.e.starts, Function(stepper.V)
        super().__init__(stepper, starts, [interpolate(derivative_by(stepper.e.initial, x), stepper.V) for x in starts],
                         [stepper.e.initial])

    def value(self, k: int) -> np.ndarray:
        """At the present values."""
        initial: Any = self.stepper.e.initial
        if isinstance(initial, Function) and initial.function_space() == self.stepper.V:
            return coefficients(initial)
        self.stepper.t.assign(0.0)
        return coefficients(self._f.interpolate(initial))
