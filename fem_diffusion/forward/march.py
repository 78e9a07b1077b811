"""The θ-scheme for many samples at once: they march together wherever the operator does not depend on them."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from firedrake import (Cofunction, Constant, DirichletBC, Function, NonlinearVariationalProblem,
                       NonlinearVariationalSolver, TrialFunction, assemble, derivative, interpolate, replace)
from firedrake.assemble import get_assembler
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from ufl import as_ufl
from ufl.algorithms import expand_derivatives
from ufl.algorithms.analysis import extract_type

from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import coefficients, multiply, owned_size, solve
from fem_diffusion.forward import blocks
from fem_diffusion.forward.lift import Lift

__all__ = ["Equation", "March"]


@dataclass(frozen=True, eq=False)
class Equation:
    """A transient problem in UFL: the residual of one step is A + N with the scheme's state and rate put in."""

    u: Function          # stands for the state in A and N
    change: Function     # stands for ∂u/∂t
    A: object            # the part affine in both, a one-form
    N: object            # the rest, or None
    values: dict         # strong Dirichlet values by marker
    initial: object      # initial state, a UFL scalar
    unknowns: list
    t: Constant
    steps: np.ndarray    # times of all steps, from 0
    saved: np.ndarray    # indices into steps of the saved states
    theta: float


def contains(form, things):
    """Whether a form or expression contains one of these Functions or Constants."""
    return not set(things).isdisjoint(extract_type(form, (Function, Constant)))


def _is_real(x):
    return x.space.ufl_element().family() == "Real"


class March:
    """All steps of a transient problem, for blocks of parameters.

    Parameters
    ----------
    equation : Equation
    V, M : FunctionSpace
        Of the state at one time, and of the parameter.
    options : dict
        PETSc options.
    prefix : str or None
        Options prefix.
    """

    def __init__(self, equation, V, M, options, prefix):
        self.e, self.V, self.M, self.options, self.prefix = equation, V, M, options, prefix
        e = equation
        self.new, self.old = Function(V, name="state"), Function(V, name="former state")
        dt = float(e.steps[1])
        theta = Constant(e.theta)
        step = {e.u: theta * self.new + (1 - theta) * self.old, e.change: (self.new - self.old) / Constant(dt)}
        self.A, self.N = expand_derivatives(replace(e.A, step)), e.N and expand_derivatives(replace(e.N, step))
        self.R = self.A if self.N is None else self.A + self.N
        self.linear = self.N is None
        # Forms are evaluated between two steps, boundary values at the later one.
        self.between = e.steps[:-1] + e.theta * dt

        # Unknowns of the initial state, of strong boundary values, and those that the residual contains.
        self.starts = [x for x in e.unknowns if x.kind == "initial"]
        self.lifted = [x for x in e.unknowns if x.kind == "dirichlet" and x.marker in e.values]
        self.loads = [x for x in e.unknowns if x not in self.starts + self.lifted]
        self.weights = {x: x.weights(e.steps if x in self.lifted else self.between) for x in e.unknowns}

        values, moving = [x.value for x in self.loads], [e.t, *(x.value for x in self.loads if x.moves)]
        self.J, self.J_old = (expand_derivatives(derivative(self.R, w)) for w in (self.new, self.old))
        direction = TrialFunction(V)
        affine = [expand_derivatives(derivative(self.A, w, direction)) for w in (self.new, self.old)]
        self.by_member = any(contains(form, values) for form in (self.J, *affine))
        self.operator_moves = any(contains(form, moving) for form in (self.J, *affine))
        self.zero_bcs = [DirichletBC(V, 0, key) for key in e.values]
        nodes = np.unique(np.concatenate([bc.nodes for bc in self.zero_bcs] or [np.empty(0)])).astype(int)
        self.fixed = nodes[nodes < owned_size(V)]
        self._assemblers = [get_assembler(form) for form in affine]
        self._matrices = self._factorised = None
        self._stale = True
        self._nonlinear = self.N and get_assembler(self.N)
        self._out = Cofunction(V.dual())
        self.load = Load(self)
        self.boundary = Boundary(self)
        # Whether the states are affine in the parameter.
        self.affine = (self.linear and not self.by_member and self.load.affine and self.boundary.affine
                       and self._start_matrices is not None)

    def vector(self, assembler):
        """Coefficients (n_owned_V,) of a one-form at the present values, to be used before the next call."""
        return assembler.assemble(tensor=self._out).dat.data_ro

    # --- operators

    def prepare(self, old, new):
        """Forget the operators where they depend on the block; old, new: typical states (n_owned_V,)."""
        if self.by_member or self.operator_moves or not self.linear or self._factorised is None:
            self._stale = True
            blocks.write(self.old, old)
            blocks.write(self.new, new)

    def operators(self, k):
        """(K, A, B, ksp) of step k: A + B, ∂A/∂u_new, ∂A/∂u_old, and the factorised Jacobian."""
        self.e.t.assign(self.between[k])
        if self._stale or self.operator_moves:
            if self._matrices is None:
                self._matrices = [assembler.assemble() for assembler in self._assemblers]
                self._K = self._matrices[0].petscmat.duplicate()
                self._factorised = blocks.Factorised(self.J, self.zero_bcs, self.options, self.prefix)
            else:
                for assembler, matrix in zip(self._assemblers, self._matrices):
                    assembler.assemble(tensor=matrix)
                self._factorised.update()
            A, B = (matrix.petscmat for matrix in self._matrices)
            A.copy(self._K, PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
            self._K.axpy(1.0, B, PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
            self._stale = False
        return self._K, *(matrix.petscmat for matrix in self._matrices), self._factorised.solver.snes.ksp

    # --- marching

    def initial(self, ms):
        """Initial states (n, n_owned_V), with the boundary values at time 0."""
        self.e.t.assign(0.0)
        f = Function(self.V)
        at = {x: x.at(ms, None) for x in self.starts}
        if self._start_matrices is None:
            u = np.empty((len(ms), owned_size(self.V)))
            for i, row in enumerate(u):
                for x, rows in at.items():
                    x.write(rows(0)[i])
                row[:] = coefficients(f.interpolate(self.e.initial))
        else:
            for x in self.starts:
                x.value.assign(0)
            u = np.tile(coefficients(f.interpolate(self.e.initial)), (len(ms), 1))
            for x, E in zip(self.starts, self._start_matrices):
                u += multiply(E, at[x](0))
        return u

    @cached_property
    def _start_matrices(self):
        """∂(initial state)/∂m by unknown, or None where they are not constant."""
        self.e.t.assign(0.0)
        forms = [self.start_derivative(x) for x in self.starts]
        if any(contains(form, [x.value for x in self.starts]) for form in forms) or any(map(_is_real, self.starts)):
            return None
        return [assemble(form).petscmat for form in forms]

    def start_derivative(self, x):
        """∂(initial state)/∂m, a two-form."""
        direction = TrialFunction(x.value.function_space())
        return interpolate(expand_derivatives(derivative(self.e.initial, x.value, direction)), self.V)

    def run(self, ms, first=0, path=None):
        """March a block of parameters that share the operator.

        Parameters
        ----------
        ms : ndarray
            Owned coefficients, shape (n, n_owned_M); a single one where the operator depends on the parameter.
        first : int
            Number of the first of them, for messages.
        path : list, optional
            Takes the states (n, n_owned_V) at all steps.

        Returns
        -------
        ndarray
            The saved states, shape (n, n_owned_V, number of saved times).
        """
        e = self.e
        u = self.initial(ms)
        load, boundary = self.load.start(ms), self.boundary.start(ms)
        if e.values:
            u[:, self.fixed] = boundary(0)[:, self.fixed]
        mean = blocks.centre(u, self.V.mesh().comm)
        self.prepare(mean, mean)
        out = np.empty((*u.shape, len(e.saved)))
        for k in range(len(e.steps)):
            if k:
                u = self._step(k - 1, u, load, boundary, first)
            if path is not None:
                path.append(u)
            for j in np.flatnonzero(e.saved == k):
                out[:, :, j] = u
        return out

    def _step(self, k, u, load, boundary, first):
        """States (n, n_owned_V) at step k + 1 from those at step k."""
        start = u
        if self.boundary.moves:
            start = u.copy()
            start[:, self.fixed] = boundary(k + 1)[:, self.fixed]
        b = load(k)
        K, A, _, ksp = self.operators(k)
        base = multiply(K, u) + b
        if self.linear:
            if self.boundary.moves:
                base += multiply(A, start - u)
            base[:, self.fixed] = 0
            return start - solve(ksp, base)

        def residuals(members, states):
            rows = base[members] + multiply(A, states - u[members])
            for row, new, old in zip(rows, states, u[members]):
                blocks.write(self.new, new)
                blocks.write(self.old, old)
                row += self.vector(self._nonlinear)
            rows[:, self.fixed] = 0
            return rows

        new = start.copy()
        lost = blocks.chord(residuals, ksp, new, self.V.mesh().comm)
        for i in lost:
            new[i] = self._newton(k, u[i], start[i], load, i, first + i)
        if lost:   # a Jacobian at the present states serves the next steps better
            mean = blocks.centre(new, self.V.mesh().comm)
            self.prepare(mean, mean)
        return new

    @cached_property
    def _newton_solver(self):
        """Newton's method for one step, its boundary values, and the Function that holds them."""
        g = Function(self.V)
        bcs = [DirichletBC(self.V, g, key) for key in self.e.values]
        options = {"solver_parameters": blocks.NEWTON | self.options, "options_prefix": self.prefix}
        return NonlinearVariationalSolver(NonlinearVariationalProblem(self.R, self.new, bcs=bcs), **options), g

    def _newton(self, k, old, start, load, i, sample):
        """One step of member i by Newton's method, as owned coefficients."""
        solver, g = self._newton_solver
        load.write(k, i)
        self.e.t.assign(self.between[k])
        for f, values in ((self.old, old), (self.new, start), (g, start)):
            blocks.write(f, values)
        try:
            solver.solve()
        except ConvergenceError as error:
            raise SolveError(f"sample {sample}, step to t = {self.e.steps[k + 1]:g}: {' '.join(str(error).split())}; "
                             "check the range of the parameter, or take a smaller time_step.") from error
        return coefficients(self.new)


class _Rows:
    """What a block of members contributes at each step: callable k -> rows, shape (n or 1, columns)."""

    def __init__(self, make, write, moves):
        self._make, self.write, self._moves, self._kept = make, write, moves, None

    def __call__(self, k):
        if self._kept is None or self._moves:
            self._kept = self._make(k)
        return self._kept


class _Part:
    """A quantity that depends on some unknowns and on time: what `Load` and `Boundary` share.

    Parameters
    ----------
    march : March
    unknowns : list of Unknown
    derivatives : list
        The derivative of the quantity with respect to each, a form.
    moves : bool
        Whether it depends on time.
    forbidden : list
        Coefficients that a derivative must not contain to count as constant.
    """

    def __init__(self, march, unknowns, derivatives, moves, forbidden):
        self.march, self.unknowns, self.derivatives, self.moves = march, unknowns, derivatives, moves
        # PETSc's products do not take the dense columns of the Real space.
        self.affine = not any(map(_is_real, unknowns)) and not any(contains(form, forbidden) for form in derivatives)
        self.columns_move = any(contains(form, [march.e.t]) for form in derivatives)
        self._columns = None

    def columns(self):
        """Matrices, and for functions of time alone columns (n_owned_V,), at the present time."""
        if self._columns is None or self.columns_move:
            forms = (assemble(form) for form in self.derivatives)
            self._columns = [coefficients(f) if isinstance(f, (Function, Cofunction)) else f.petscmat for f in forms]
        return self._columns

    def start(self, ms):
        """`_Rows` for a block of parameters, shape (n, n_owned_M)."""
        at = {x: x.at(ms, self.march.weights[x]) for x in self.unknowns}

        def write(k, i):
            for x, rows in at.items():
                x.write(rows(k)[i])

        def one_by_one(k):
            result = []
            for i in range(len(ms)):
                write(k, i)
                result.append(self.value(k))
            return np.array(result)

        def together(k):
            for x in self.unknowns:
                x.value.assign(0)
            rows = self.value(k)[None]
            for x, column in zip(self.unknowns, self.columns()):
                p = at[x](k)
                rows = rows + (p * column if x.strength else multiply(column, p))
            return rows

        return _Rows(together if self.affine else one_by_one, write, self.moves)


class Load(_Part):
    """The residual of zero states, (n, n_owned_V)."""

    def __init__(self, march):
        zero = {march.new: as_ufl(0), march.old: as_ufl(0)}
        values = [x.value for x in march.loads]
        form = replace(march.A, zero)
        self._assembler = get_assembler(form) if form.integrals() else None
        moving = [march.e.t, *(x.value for x in march.loads if x.moves)]
        # Where the operator moves with a member's parameter, that has to be put into the forms at every step.
        super().__init__(march, march.loads, [derivative_by(march.R, x) for x in march.loads],
                         march.operator_moves or contains(form, moving), [march.new, march.old, *values])

    def value(self, k):
        """At the present values and step k, (n_owned_V,)."""
        self.march.e.t.assign(self.march.between[k])
        if self._assembler is None:
            return np.zeros(owned_size(self.march.V))
        return self.march.vector(self._assembler).copy()   # it outlives the next call


class Boundary(_Part):
    """The strong boundary values, (n, number of fixed nodes)."""

    def __init__(self, march):
        e, lifted = march.e, march.lifted
        self.lift = Lift(march.V, e.values, lifted) if e.values else None
        moving = [e.t, *(x.value for x in lifted if x.moves)]
        super().__init__(march, lifted, [self.lift.derivative(x) for x in lifted],
                         any(contains(g, moving) for g in e.values.values()), [x.value for x in lifted])

    def value(self, k):
        """At the present values and step k, (n_owned_V,)."""
        self.march.e.t.assign(self.march.e.steps[k])
        self.lift.refresh()
        if not self.unknowns:
            return coefficients(self.lift.known)
        self.lift.update()
        return coefficients(self.lift.g)


def derivative_by(F, x):
    """∂F/∂(value of x): a two-form, or for a function of time alone the one-form that is its only column."""
    return expand_derivatives(derivative(F, x.value, Constant(1.0) if x.strength else None))
