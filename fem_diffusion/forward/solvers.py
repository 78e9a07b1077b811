"""Solvers that many right-hand sides share: PETSc options, factorised forms, and chord iterations for blocks."""

from collections.abc import Callable

import numpy as np
from firedrake import (Cofunction, DirichletBC, Function, LinearSolver, LinearVariationalProblem,
                       LinearVariationalSolver, NonlinearVariationalProblem, NonlinearVariationalSolver, action,
                       adjoint, derivative, replace)
from firedrake.assemble import get_assembler
from firedrake.exceptions import ConvergenceError
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import DEFAULT_DIRECT_SOLVER, PETSc
from mpi4py import MPI
from ufl import Form

from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import assign, coefficients, owned_size, solve
from fem_diffusion.fields.checks import solver_reason

__all__ = ["CHORD_DEPTH", "NOT_FINITE", "Factorised", "Pull", "centre", "check_determined", "chord", "conjugate",
           "linear_options", "norms", "refused", "variational_solver"]

Rowwise = Callable[[np.ndarray, np.ndarray], np.ndarray]   # of members (l,), rows (l, n_owned) to others

# Up to so many unknowns, by dimension, PETSc's own LU has less overhead than MUMPS; supernodes win above.
PETSC_LU_LIMIT = {1: 50_000, 2: 20_000, 3: 1_000}
NOT_FINITE = ("the state is not finite: look for NaN in the parameter and coefficients, a diffusivity that is not "
              "positive, and a singular operator.")
SINGULAR = ("the operator is singular to rounding, because the state is left open, as by a constant in a pressure "
            "or under Neumann conditions: add what fixes it, as a DirichletBC at one point.")
CONSTANT = 1e-14          # size of an operator times constants that is rounding, over that of the operator
LARGEST_GROWTH = 1e14     # of a random right-hand side in units of the operator
CHORD_TOLERANCE = 1e-10   # size of the last correction over that of the state
CHORD_RESIDUAL = 1e-6     # size of the last residual over that of the first
CHORD_SWEEPS = 25
CHORD_DEPTH = 8           # secants that are kept
GRADIENT_TOLERANCE = 1e-8   # of the preconditioned residual, over the first one
GRADIENT_SWEEPS = 60
NEWTON = {"snes_type": "newtonls", "snes_linesearch_type": "bt", "snes_max_it": 50,
          "snes_rtol": 1e-10, "snes_stol": 1e-10}


def linear_options(given: str | dict, V: WithGeometry, advective: bool) -> dict:
    """PETSc options from what `check_solver` returns: the words "direct" and "iterative", or a dict."""
    if isinstance(given, dict):
        return given
    if given == "direct":
        # A saddle point needs pivots.
        own = V.mesh().comm.size == 1 and len(V) == 1 and V.dim() <= PETSC_LU_LIMIT[V.mesh().topological_dimension]
        return {"mat_type": "aij", "ksp_type": "preonly", "pc_type": "lu",
                "pc_factor_mat_solver_type": "petsc" if own else DEFAULT_DIRECT_SOLVER}
    # Multigrid needs diffusion to smooth; with advection overlapping ILU is the robust choice.
    asm = {"pc_type": "asm", "sub_pc_type": "ilu", "sub_pc_factor_levels": 1}
    return {"mat_type": "aij", "ksp_type": "gmres", "ksp_gmres_restart": 100, "ksp_rtol": 1e-11,
            "ksp_max_it": 1000, **(asm if advective else {"pc_type": "gamg"})}


def refused(error: PETSc.Error) -> SolveError:
    """What is to be raised where PETSc stops."""
    return SolveError(f"PETSc stops ({solver_reason(error)}): check solver_parameters, or take 'direct'.")


def variational_solver(F: Form, w: Function, bcs: list[DirichletBC], linear: bool, constant: bool, options: dict,
                       prefix: str | None) -> LinearVariationalSolver | NonlinearVariationalSolver:
    """The reused solver of F(w) = 0; `constant` keeps its factorisation, where it is linear."""
    if not linear:
        return NonlinearVariationalSolver(NonlinearVariationalProblem(F, w, bcs=bcs), options_prefix=prefix,
                                          solver_parameters=NEWTON | options)
    problem = LinearVariationalProblem(derivative(F, w), -replace(F, {w: Function(w.function_space())}), w,
                                       bcs=bcs, constant_jacobian=constant)
    return LinearVariationalSolver(problem, solver_parameters=options, options_prefix=prefix)


class Factorised:
    """A two-form with homogeneous Dirichlet conditions, assembled and factorised: `ksp` solves with it.

    Its coefficients are read at construction and at every `update`; options of SNES are left out.
    """

    def __init__(self, form: Form, bcs: list[DirichletBC], options: dict, prefix: str | None) -> None:
        options = {key: value for key, value in options.items() if not key.startswith("snes_")}
        self._assembler = get_assembler(form, bcs=bcs, mat_type=options.get("mat_type", "aij"))
        self._matrix = self._assembler.assemble()
        self._solver = LinearSolver(self._matrix, solver_parameters=options, options_prefix=prefix)
        self.ksp = self._solver.snes.ksp
        self._factorise()

    def update(self) -> None:
        """Assemble again and factorise again."""
        self._assembler.assemble(tensor=self._matrix)
        self._factorise()

    def _factorise(self) -> None:
        V = self._matrix.arguments()[0].function_space()
        try:   # a solve, because that sets up while the options are in place
            self._solver.solve(Function(V), Cofunction(V.dual()))
        except PETSc.Error as error:
            raise refused(error) from error
        except ConvergenceError as error:   # a pivot that is zero
            raise SolveError(SINGULAR) from error
        check_determined(self.ksp, V)


def check_determined(ksp: PETSc.KSP, V: WithGeometry) -> None:
    """SolveError where an operator is singular to rounding.

    Where it is factorised one solve with a random right-hand side tells. Iterations may end all the same, at any of the
    solutions: there constants are looked at, which are what is open most often.
    """
    K = ksp.getOperators()[0]
    if ksp.getType() != "preonly" or K.getType() == "python":
        _check_constants(K, V)
        return
    x, b = K.createVecs()
    b.array[:] = np.random.default_rng(K.comm.rank).standard_normal(b.local_size)
    ksp.solve(b, x)
    growth = x.norm() * K.norm(PETSc.NormType.FROBENIUS) / b.norm()
    if not growth < LARGEST_GROWTH:
        raise SolveError(SINGULAR)


def _check_constants(K: PETSc.Mat, V: WithGeometry) -> None:
    """SolveError where an operator takes the constant of a component to zero."""
    x, y = K.createVecs()
    x.array[:] = np.random.default_rng(K.comm.rank).standard_normal(x.local_size)
    K.mult(x, y)
    size = y.norm()   # about that of all entries together
    ends = np.cumsum([0] + [owned_size(W) for W in V])
    for first, last in zip(ends, ends[1:]):
        x.array[:] = 0.0
        x.array[first:last] = 1.0
        K.mult(x, y)
        if y.norm() <= CONSTANT * size:
            raise SolveError(SINGULAR)


class Pull:
    """Products ``pᵀ∂F`` of rows p over V with a two-form, columns over W, at the present values of its coefficients."""

    def __init__(self, form: Form, V: WithGeometry, W: WithGeometry) -> None:
        self._p, self._out = Function(V), Cofunction(W.dual())
        self._assembler = get_assembler(action(adjoint(form), self._p)) if form.integrals() else None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Shape (k, n_owned of V) to (k, n_owned of W)."""
        result = np.zeros((len(rows), owned_size(self._out.function_space())))
        for row, line in zip(rows, result):
            if self._assembler is not None:
                assign(self._p, row)
                line[:] = coefficients(self._assembler.assemble(tensor=self._out))
        return result


def _dots(a: np.ndarray, b: np.ndarray, comm: MPI.Comm) -> np.ndarray:
    """Euclidean products (k,) over all ranks of the rows of two arrays (k, n_owned)."""
    return comm.allreduce(np.einsum("ij,ij->i", a, b))


def norms(rows: np.ndarray, comm: MPI.Comm) -> np.ndarray:
    """Euclidean norms (k,) over all ranks of the rows of an array (k, n_owned)."""
    return np.sqrt(_dots(rows, rows, comm))


def centre(rows: np.ndarray, comm: MPI.Comm) -> np.ndarray:
    """Mean (n_owned,) of the finite rows of an array (k, n_owned), zero if there are none."""
    finite = np.isfinite(norms(rows, comm))
    return rows[finite].mean(axis=0) if finite.any() else np.zeros(rows.shape[1])


def chord(residuals: Rowwise, ksp: PETSc.KSP, u: np.ndarray, comm: MPI.Comm) -> list[int]:
    """Iterate ``u_j -= J⁻¹ F(u_j)`` for the rows of u, shape (k, n_owned), all with one factorised J, in place.

    ``residuals(members (l,), states (l, n_owned)) -> (l, n_owned)`` is F of these members at these states. Secants of
    the last sweeps correct each step, member by member (Anderson acceleration: Walker & Ni 2011,
    doi:10.1137/10078356X). Returns the members that stalled, diverged or ran out of sweeps.
    """
    left, best, misses, lost = np.arange(len(u)), np.full(len(u), np.inf), np.zeros(len(u), dtype=int), []
    before = first = None
    secants: list[tuple[np.ndarray, np.ndarray]] = []   # orthonormal changes of the step, and of the state with them
    for _ in range(CHORD_SWEEPS):
        here = u[left]
        F = residuals(left, here)
        now = norms(F, comm)
        first = now if first is None else first
        sound = np.isfinite(now)[:, None]
        step = np.where(sound, -solve(ksp, np.where(sound, F, 0.0)), np.nan)
        size = norms(step, comm)
        u[left] = moved = here + step
        total, misses = norms(moved, comm), np.where(size < 0.9 * best, 0, misses + 1)
        # A small step may only mean that J or the state is too large: then the residual has not shrunk. At rounding it
        # cannot.
        done = ((size <= CHORD_TOLERANCE * total) & (now <= CHORD_RESIDUAL * first)
                | (size <= 1e-13 * total) & (now <= first))
        # Secants may mend one bad step, unless it goes nowhere.
        keep = ~done & (misses < 2) & (size < 10 * best)
        lost.extend(left[~done & ~keep])
        best = np.minimum(best, size)
        left, best, misses, first = left[keep], best[keep], misses[keep], first[keep]
        here, step, moved = here[keep], step[keep], moved[keep]
        if not len(left):
            break
        secants = [(q[keep], p[keep]) for q, p in secants[1 - CHORD_DEPTH:]]
        if before is not None:
            change, way = step - before[1][keep], here - before[0][keep]
            for q, p in secants:
                weight = _dots(q, change, comm)[:, None]
                change, way = change - weight * q, way - weight * p
            length = np.maximum(norms(change, comm), np.finfo(float).tiny)[:, None]
            secants.append((change / length, way / length))
        before, rest = (here, step), step
        for q, p in secants:
            weight = _dots(q, rest, comm)[:, None]
            rest = rest - weight * q
            moved -= weight * (p + q)
        u[left] = moved
    return lost + list(left)


def conjugate(products: Rowwise, ksp: PETSc.KSP, b: np.ndarray, comm: MPI.Comm) -> tuple[np.ndarray, list[int]]:
    """Solutions of ``A_j x_j = b_j`` for the rows of b, shape (k, n_owned), by conjugate gradients side by side.

    ``products(members (l,), x (l, n_owned))`` are A_j x_j; one factorised matrix preconditions all of them. Returns the
    solutions and the members for which it broke down or ran out of sweeps.
    """
    z = solve(ksp, b)
    rho = _dots(b, z, comm)
    found, left, lost = np.zeros_like(b), np.flatnonzero(rho > 0), np.flatnonzero(~(rho >= 0)).tolist()
    x, r, p, first, rho = np.zeros_like(b[left]), b[left], z[left], rho[left], rho[left]
    for _ in range(GRADIENT_SWEEPS):
        if not len(left):
            break
        q = products(left, p)
        with np.errstate(all="ignore"):
            alpha = rho / _dots(p, q, comm)
            x += alpha[:, None] * p
            q *= alpha[:, None]
            r -= q
            z = solve(ksp, r)
            new = _dots(r, z, comm)
            p *= (new / rho)[:, None]
        rho, sound = new, (alpha > 0) & (new >= 0)   # false for NaN too
        p += z
        keep = sound & (rho > GRADIENT_TOLERANCE**2 * first)
        if not keep.all():
            found[left[~keep]] = x[~keep]
            lost.extend(left[~sound].tolist())
            left = left[keep]
            x, r, p, first, rho = (part[keep] for part in (x, r, p, first, rho))
    return found, lost + left.tolist()
