"""Blocks of owned coefficient vectors, one vector a row, and the solves that many of them share."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from firedrake import (Cofunction, Function, LinearSolver, LinearVariationalProblem, LinearVariationalSolver,
                       NonlinearVariationalProblem, NonlinearVariationalSolver, action, adjoint, derivative, replace)
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from ufl.core.expr import Expr

from fem_diffusion.checks import check_array, together
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients, owned_size, solve
from fem_diffusion.fields.checks import petsc_reason
from fem_diffusion.observation.linear import Observation

CHORD_TOLERANCE = 1e-10   # size of the last correction over that of the state
CHORD_RESIDUAL = 1e-6     # size of the last residual over that of the first
CHORD_SWEEPS = 25
NEWTON = {"snes_type": "newtonls", "snes_linesearch_type": "bt", "snes_max_it": 50,
          "snes_rtol": 1e-10, "snes_stol": 1e-10}


@dataclass(frozen=True)
class Reference:
    """What blocks are solved with: a parameter, its state, and the Jacobian J there, factorised."""

    m: np.ndarray                     # (n_owned_M,)
    u: np.ndarray                     # (n_owned_V,)
    solver: LinearVariationalSolver   # its ksp solves with J
    A: PETSc.Mat | None               # ∂F/∂u without its part from N, where it is needed
    C: list | None                    # ∂F/∂m by unknown that is no Dirichlet value, where they are constant
    D: list | None                    # ∂g/∂m by unknown Dirichlet value, where they are constant
    N: np.ndarray | None              # the nonlinear part at u, (n_owned_V,)
    P: np.ndarray | None              # the integrals with m at m, (n_owned_V,), where C is not there

    @property
    def ksp(self):
        return self.solver.snes.ksp


def write(f, values):
    """Set the owned coefficients of a Function from an array of shape (n_owned,)."""
    with f.dat.vec_wo as x:
        x.array[:] = values


def check_parameter(m, M):
    """Refuse what is no Function in M."""
    if not isinstance(m, Function) or m.function_space() != M:
        what = f"a Function in {m.function_space()}" if isinstance(m, Function) else type(m).__name__
        raise InputError(f"the parameter must be a Function in {M}, got {what}; "
                         "make one with Function(problem.M).interpolate(...).")


def parameter_rows(ms, M):
    """Owned coefficients (n, n_owned_M) of Functions or of an array, checked on all ranks together."""
    if isinstance(ms, Function):
        raise InputError("solve_many takes a sequence of parameters; put the single Function in a list.")
    if not isinstance(ms, np.ndarray):
        ms = list(ms) if isinstance(ms, Iterable) and not isinstance(ms, (Expr, Mapping)) else [None]
        if not all(isinstance(m, Function) and m.function_space() == M for m in ms):
            raise InputError(f"every parameter must be a Function in {M}; "
                             "make them with Function(problem.M).interpolate(...).")
        ms = np.array([coefficients(m) for m in ms]).reshape(len(ms), owned_size(M))
    good = ms.ndim == 2 and ms.shape[1] == owned_size(M) and ms.dtype.kind in "fiu"
    everywhere = M.comm.allgather((good, ms.shape[:1]))
    if not all(ok for ok, _ in everywhere) or len(set(n for _, n in everywhere)) > 1:
        raise InputError(f"parameters must be an array (n, {owned_size(M)}) of real numbers on this rank, with the "
                         "same n on every rank (owned coefficients, as in m.dat.vec_ro), got "
                         f"{ms.shape} of {ms.dtype}.")
    return ms


def observation_rows(rows, V):
    """Observation rows as a dense array (k, n_owned_V), checked on all ranks together."""
    def check():
        if isinstance(rows, Observation):
            raise InputError("rows is an Observation: pass its rows, observation.rows.")
        return check_array(rows.toarray() if hasattr(rows, "toarray") else rows,
                           "rows (owned coefficients of the state)", ("k", owned_size(V)))
    array = together(V.comm, check)
    if len(set(V.comm.allgather(len(array)))) > 1:
        raise InputError(f"rows must have shape (k, {owned_size(V)}) on this rank (owned coefficients of the state), "
                         f"with the same k on every rank, got {array.shape}.")
    return array


def centre(rows, comm):
    """Mean (n_owned,) of the finite rows of an array (k, n_owned), zero if there are none."""
    finite = np.isfinite(norms(rows, comm))
    return rows[finite].mean(axis=0) if finite.any() else np.zeros(rows.shape[1])


def make_solver(F, w, bcs, linear, constant, options):
    """The reused solver of F(w) = 0; ``constant`` keeps its factorisation, where it is linear."""
    if not linear:
        options = options | {"solver_parameters": NEWTON | options["solver_parameters"]}
        return NonlinearVariationalSolver(NonlinearVariationalProblem(F, w, bcs=bcs), **options)
    problem = LinearVariationalProblem(derivative(F, w), -replace(F, {w: Function(w.function_space())}), w,
                                       bcs=bcs, constant_jacobian=constant)
    return LinearVariationalSolver(problem, **options)


class Factorised:
    """A bilinear form with homogeneous Dirichlet conditions, assembled, factorised, ready for more of it.

    Parameters
    ----------
    form : ufl.Form
        Two-form; its coefficients are read at construction and at every `update`.
    bcs : list of DirichletBC
        Their rows and columns become those of the identity.
    options : dict
        PETSc options; those of SNES are left out.
    prefix : str or None
        Options prefix.
    """

    def __init__(self, form, bcs, options, prefix):
        options = {key: value for key, value in options.items() if not key.startswith("snes_")}
        self._assembler = get_assembler(form, bcs=bcs, mat_type=options.get("mat_type", "aij"))
        self._matrix = self._assembler.assemble()
        self.solver = LinearSolver(self._matrix, solver_parameters=options, options_prefix=prefix)
        self._factorise()

    def update(self):
        """Assemble again and factorise again."""
        self._assembler.assemble(tensor=self._matrix)
        self._factorise()

    def _factorise(self):
        V = self._matrix.arguments()[0].function_space()
        # A solve, because that sets up while the options are in place.
        try:
            self.solver.solve(Function(V), Cofunction(V.dual()))
        except PETSc.Error as error:
            raise SolveError(f"PETSc stops ({petsc_reason(error)}): check solver_parameters, or take "
                             "'direct'.") from error


class Pull:
    """Products ``pᵀ∂F`` of rows p over V with a two-form, at the present values of its coefficients.

    Parameters
    ----------
    form : ufl.Form
        Two-form, rows over V and columns over W.
    V, W : FunctionSpace
    """

    def __init__(self, form, V, W):
        self._p, self._out, self._zero = Function(V), Cofunction(W.dual()), not form.integrals()
        self._assembler = None if self._zero else get_assembler(action(adjoint(form), self._p))

    def __call__(self, rows):
        """Shape (k, n_owned_V) to (k, n_owned_W)."""
        result = np.zeros((len(rows), owned_size(self._out.function_space())))
        for row, line in zip(rows, result):
            if not self._zero:
                write(self._p, row)
                line[:] = coefficients(self._assembler.assemble(tensor=self._out))
        return result


class Response:
    """An affine map from parameters to states, kept as its values: for few unknown numbers, cheaper than solves.

    Parameters
    ----------
    states : callable
        The map, (n, n_owned_M) to (n, n_owned of the states).
    M : FunctionSpace
        Parameter space.
    """

    LARGEST = 256        # coefficients of the parameter, on all ranks
    MEMORY = 500_000_000   # bytes of the responses, on this rank

    def __init__(self, states, M):
        sizes = M.comm.allgather(owned_size(M))
        units = np.zeros((sum(sizes), owned_size(M)))
        first = sum(sizes[:M.comm.rank])
        units[first:first + owned_size(M)] = np.eye(owned_size(M))
        self._comm, self._base = M.comm, states(np.zeros((1, owned_size(M))))
        self._rows = states(units) - self._base

    @classmethod
    def pays(cls, n, M, size):
        """Whether n samples are enough to build it for states with so many owned coefficients."""
        fits = M.comm.allreduce(M.dim() * size * 8) / M.comm.size <= cls.MEMORY
        return M.dim() <= min(n, cls.LARGEST) and fits

    def __call__(self, ms):
        """States (n, n_owned) for parameters (n, n_owned_M)."""
        return self._base + np.concatenate(self._comm.allgather(ms), axis=1) @ self._rows


def dots(a, b, comm):
    """Euclidean products (k,) over all ranks of the rows of two arrays (k, n_owned)."""
    return comm.allreduce(np.einsum("ij,ij->i", a, b))


def norms(rows, comm):
    """Euclidean norms (k,) over all ranks of the rows of an array (k, n_owned)."""
    return np.sqrt(dots(rows, rows, comm))


def chord(residuals, ksp, u, comm):
    """Iterate ``u_j -= J⁻¹ F(u_j)`` for the rows of u, all with one factorised J, in place.

    A secant correction (Anderson acceleration of depth one, member by member) saves 10 to 30 % of the sweeps.

    Parameters
    ----------
    residuals : callable
        ``(members (l,), states (l, n_owned)) -> (l, n_owned)``, F of these members at these states.
    ksp : PETSc.KSP
        Solves with J.
    u : ndarray
        Start values, shape (k, n_owned).
    comm : MPI communicator
        Of the mesh.

    Returns
    -------
    list of int
        The members that stalled, diverged or ran out of sweeps.
    """
    left, last, lost = np.arange(len(u)), np.full(len(u), np.inf), []
    before = first = None
    for _ in range(CHORD_SWEEPS):
        here = u[left]
        F = residuals(left, here)
        now = norms(F, comm)
        first = now if first is None else first
        sound = np.isfinite(now)[:, None]
        step = np.where(sound, -solve(ksp, np.where(sound, F, 0.0)), np.nan)
        size = norms(step, comm)
        u[left] += step
        total, shrinks = norms(u[left], comm), size < 0.9 * last   # false for NaN too
        # A small step may only mean that J is too large: then the residual has not shrunk. At rounding it cannot.
        done = ((size <= CHORD_TOLERANCE * total) & (now <= CHORD_RESIDUAL * first)) | (size <= 1e-13 * total)
        keep = ~done & shrinks
        if before is not None:
            change = step - before[1]
            weight = dots(change, step, comm) / np.maximum(dots(change, change, comm), np.finfo(float).tiny)
            u[left[keep]] -= (weight[:, None] * (here - before[0] + change))[keep]
        lost.extend(left[~done & ~keep])
        left, last, first, before = left[keep], size[keep], first[keep], (here[keep], step[keep])
        if not len(left):
            break
    return lost + list(left)
