"""Firedrake's Whittle-Matérn covariance operator, opened for blocks of vectors; mathematics in gaussian.py."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from firedrake import (
    BrokenElement, Constant, DirichletBC, Function, SpatialCoordinate, TestFunction, TrialFunction, VectorFunctionSpace,
    assemble, dx, homogenize, inner, interpolate,
)
from firedrake.adjoint import AutoregressiveCovariance
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from mpi4py import MPI
from numpy.typing import ArrayLike
from scipy.sparse import bsr_matrix, csr_matrix
from scipy.special import gamma, kv

from fem_diffusion.checks import check_array, check_number
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import largest, multiply, owned_size, solve
from fem_diffusion.fields.modes import without_conditions
from fem_diffusion.prior.lengths import Length, helmholtz

__all__ = ["MaternOperator", "NumberOperator", "matern_correlation", "matern_operator", "operator_order",
           "pointwise_variance", "variance_is_exact"]

_EXACT_LIMIT = 8000      # up to so many unknowns the pointwise variance is exact: one solve for each
_VARIANCE_ERROR = 0.02   # relative standard error of the estimated pointwise variance of larger problems, at most
_BLOCK_BYTES = 2**28     # memory for one block of right-hand sides, of all ranks together
_NOISE_BYTES = 2**27     # memory for the numbers of white noise that are drawn at once
# Of an estimated variance: half the rank of the part that is known, its stress on the boundary, draws between looks.
_WIDTH, _STRESS, _DRAWS = 80, 6.0, 32


def matern_correlation(r: ArrayLike, correlation_length: float, smoothness: float) -> np.ndarray:
    """Matérn correlation at distances r of any shape (Lindgren et al. 2011, eq. 1, with ``κ = sqrt(2ν)/ℓ``).

    At ``r = ℓ`` it is 0.42 (ν = 1/2: 0.37) to 0.61 (ν to infinity). InputError if an argument is out of range.
    """
    r, smoothness = check_array(r, "r"), check_number(smoothness, "smoothness", above=0, most=100)
    if (r < 0).any():
        raise InputError("r holds negative numbers: give distances.")
    x = np.sqrt(2 * smoothness) * r / check_number(correlation_length, "correlation_length", above=0)
    safe = np.where(x > 0, x, 1.0)  # the Bessel function is infinite at zero
    values = 2**(1 - smoothness) / gamma(smoothness) * safe**smoothness * kv(smoothness, safe)
    return np.where(x > 0, values, 1.0)


def operator_order(smoothness: float | None, d: int) -> int:
    """Even order m of the operator with smoothness ν = m - d/2; for None the smallest with ν of at least one."""
    m = 2 if d < 3 else 4
    if smoothness is not None:
        # Weights of higher orders leave the range of double precision.
        m = check_number(smoothness, "smoothness", above=0, most=100) + d / 2
    if m < 2 or m % 2:
        choices = ", ".join(str(order - d / 2) for order in (2, 4, 6))
        raise InputError(f"smoothness is {smoothness!r}: on a mesh of dimension {d} choose one of {choices}, ...")
    return int(m)


@dataclass(frozen=True, eq=False)
class MaternOperator:
    """A Firedrake covariance operator, opened for blocks of vectors."""

    covariance: AutoregressiveCovariance
    mass: PETSc.Mat         # M (n, n)
    noise: PETSc.Mat        # S (n, n_broken) with S z ~ N(0, M) for z ~ N(0, I)
    places: np.ndarray      # of each owned cell, ascending, in an order that no partition changes, shape (n_cells,)
    free: np.ndarray        # one at free coefficients, zero at those a Dirichlet condition fixes, shape (n_owned,)
    weight: float           # makes the variance one on an unbounded domain

    @property
    def comm(self) -> MPI.Comm:
        """The communicator of the function space."""
        return self.covariance.function_space().comm

    def solve(self, x: np.ndarray) -> np.ndarray:
        """``K⁻¹`` applied to every row of x (k, n_owned), with zero at the fixed coefficients."""
        return solve(self.covariance.solver.snes.ksp, x * self.free) * self.free

    def root(self, x: np.ndarray) -> np.ndarray:
        """``R = (K⁻¹ M)^(m/2-1) K⁻¹`` applied to every row of the dual coefficients x (k, n_owned)."""
        y = self.weight * self.solve(x)
        for _ in range(self.covariance.iterations // 2 - 1):
            y = self.solve(multiply(self.mass, y))
        return y

    def action(self, x: np.ndarray) -> np.ndarray:
        """``R M Rᵀ`` applied to every row of the dual coefficients x (k, n_owned)."""
        return self.root(multiply(self.mass, self.root(x)))

    def white_noise(self, rng: np.random.Generator, k: int, signs: bool = False) -> np.ndarray:
        """k draws of ``b ~ N(0, M)``, dual coefficients of shape (k, n_owned).

        Of random `signs` they are cheaper, not Gaussian, and have the same mean and covariance. Every rank draws the
        numbers of all cells and keeps its own: a sample does not depend on the ranks.
        """
        owned, total = self.noise.getSizes()[1]
        per_cell = total // self.comm.allreduce(len(self.places))
        step, result = max(1, _NOISE_BYTES // (8 * total)), np.empty((k, len(self.free)))
        for start in range(0, k, step):
            shape = min(step, k - start), total // per_cell, per_cell
            z = 2.0 * rng.integers(0, 2, shape, dtype=bool) - 1 if signs else rng.standard_normal(shape)
            # Alone, this rank owns all cells, and they are in order.
            z = (z if owned == total else z[:, self.places]).reshape(len(z), owned)
            result[start:start + step] = multiply(self.noise, z)
        return result

    def block(self) -> int:
        """Number of vectors to treat at once."""
        return int(np.clip(_BLOCK_BYTES / (8 * self.mass.getSizes()[1][1]), 1, 256))


class NumberOperator:
    """Independent standard normals for a space of family "R", with the methods of `MaternOperator` that draws need."""

    def __init__(self, V: WithGeometry) -> None:
        start = sum(V.comm.allgather(owned_size(V))[:V.comm.rank])
        self._total, self._owned = V.dim(), slice(start, start + owned_size(V))

    def root(self, x: np.ndarray) -> np.ndarray:
        """The numbers x (k, n_owned) themselves."""
        return x

    action = root

    def white_noise(self, rng: np.random.Generator, k: int) -> np.ndarray:
        """k draws, shape (k, n_owned); every rank draws all numbers and keeps its own."""
        return rng.standard_normal((k, self._total))[:, self._owned]

    def block(self) -> int:
        """As `MaternOperator.block`."""
        return 256


def _white_noise_matrix(V: WithGeometry) -> tuple[PETSc.Mat, np.ndarray]:
    """White noise on V from independent numbers that belong to cells: `noise` and `places` of `MaternOperator`.

    Cholesky factors of the cells' mass matrices, gathered from the broken space into V, as Firedrake's
    ``WhiteNoiseGenerator`` does it (Croci et al. 2018).  Firedrake's numbering of a distributed mesh changes from run
    to run, so here cells, and the nodes of a cell, are ordered by their place instead.
    """
    Vb, mesh = V.broken_space(), V.mesh()
    scalar = V.ufl_element().sub_elements[0] if V.value_shape else V.ufl_element()
    dim, nodes = mesh.geometric_dimension, Vb.cell_node_map().arity
    nodes_of_cells = VectorFunctionSpace(mesh, BrokenElement(scalar), dim=dim)
    x = Function(nodes_of_cells).interpolate(SpatialCoordinate(mesh)).dat.data_ro.reshape(-1, nodes, dim)

    gather = assemble(interpolate(TrialFunction(V), Vb), mat_type="aij").petscmat
    mass = assemble(inner(TrialFunction(Vb), TestFunction(Vb)) * dx, mat_type="aij").petscmat
    local = mass if V.comm.size == 1 else mass.getDiagonalBlock()
    indptr, indices, values = local.getValuesCSR()
    size = nodes * V.block_size
    cells = csr_matrix((values, indices, indptr), shape=local.getSize()).tobsr((size, size))

    # In each direction by itself, as cells may be thin; a direction without extent has rounding errors alone.
    lowest = x.min(axis=1, keepdims=True)
    extent = np.maximum(np.ptp(x, axis=1, keepdims=True), 1e-11 * largest(V.comm, x))
    keys = np.rint((x - lowest) / extent * 1e3)
    order = np.array([np.lexsort(cell.T) for cell in keys], dtype=int).reshape(-1, nodes)  # a rank may have no cell
    order = (order[:, :, None] * V.block_size + np.arange(V.block_size)).reshape(-1, size)
    each = np.arange(len(order))[:, None, None]
    factor = np.empty_like(cells.data)
    factor[each[:, :, 0], order] = np.linalg.cholesky(cells.data[each, order[:, :, None], order[:, None, :]])
    factor = bsr_matrix((factor, cells.indices, cells.indptr), shape=cells.shape).tocsr()
    offset = mass.getOwnershipRange()[0]
    centres = np.concatenate(V.comm.allgather(x.mean(axis=1)))
    place = np.argsort(np.lexsort([_levels(c) for c in centres.T]))[offset // size:offset // size + len(x)]
    # The numbers of a cell come at its place.
    cell, within = np.divmod(factor.indices, size)
    factor.indices = np.argsort(np.argsort(place))[cell] * size + within
    factor.sort_indices()
    pattern = (factor.indptr.astype(PETSc.IntType), (factor.indices + offset).astype(PETSc.IntType))
    block_diagonal = PETSc.Mat().createAIJ(mass.getSizes(), csr=(*pattern, factor.data), comm=mass.comm)

    noise = gather.transposeMatMult(block_diagonal)
    block_diagonal.destroy()
    return noise, np.sort(place)


def _levels(x: np.ndarray) -> np.ndarray:
    """Integers in the order of numbers (n,), the same for those that differ by rounding errors, as of cells in line."""
    order = np.argsort(x)
    levels = np.zeros(len(x), dtype=int)
    levels[order[1:]] = np.cumsum(np.diff(x[order]) > 1e-13 * np.abs(x).max(initial=0.0))
    return levels


def matern_operator(V: WithGeometry, lengths: Sequence[Length], m: int, bcs: Sequence[DirichletBC],
                    solver_parameters: dict) -> MaternOperator:
    """Build the operator on V with one scale, or one of each component, order m and homogeneous bcs.

    The weight is that of the first scale.
    """
    u, v, K, L = TrialFunction(V), TestFunction(V), helmholtz(V, lengths, boundary=True), lengths[0].mean
    d = V.mesh().topological_dimension
    weight = np.sqrt(gamma(m) * (4 * np.pi)**(d / 2) * L**d / gamma(m - d / 2))
    covariance = AutoregressiveCovariance(V, L, m=m, form=K, weight=Constant(weight), bcs=homogenize(list(bcs)),
                                          solver_parameters=solver_parameters)
    covariance.solver.solve()  # assembles and factorises
    mass = assemble(inner(u, v) * dx, mat_type="aij").petscmat
    free = without_conditions(V, bcs, np.ones((1, owned_size(V))))[0]
    return MaternOperator(covariance, mass, *_white_noise_matrix(V), free, float(weight))


def variance_is_exact(op: MaternOperator) -> bool:
    """Whether the space is small enough for `pointwise_variance` to be exact in any case."""
    return op.mass.getSizes()[0][1] <= _EXACT_LIMIT


def pointwise_variance(op: MaternOperator, exact: bool = False) -> np.ndarray:
    """Diagonal of ``R M Rᵀ``, shape (n_owned,), from one solve per unknown, ``diag_i = |Rᵀ e_i|²_M``.

    Of large spaces it is estimated, unless asked to be `exact`.
    """
    if not (exact or variance_is_exact(op)):
        return _estimated_variance(op)
    total, (first, last) = op.mass.getSizes()[0][1], op.mass.getOwnershipRange()
    result, block = np.zeros(last - first), op.block()
    for start in range(0, total, block):
        stop = min(start + block, total)
        unit = np.zeros((stop - start, last - first))
        mine = np.arange(max(start, first), min(stop, last))
        unit[mine - start, mine - first] = 1.0
        y = op.root(unit)
        squares = op.comm.allreduce(np.einsum("ki,ki->k", y, multiply(op.mass, y)))
        result[mine - first] = squares[mine - start]
    return result


def _estimated_variance(op: MaternOperator) -> np.ndarray:
    """Diagonal of ``C = R M Rᵀ``: exact for a low-rank part, plus the spread of draws given that part.

    With a matrix ``Ω``, a draw x splits into its regression on ``Ωᵀ x``, whose variance
    ``diag(C Ω (Ωᵀ C Ω)⁻¹ Ωᵀ C)`` is known, and a remainder without correlation to it.  Only the remainder is estimated
    by Monte Carlo: the error is the usual one times the remainder's share of the variance, which is small because
    ``Ω = [b, M C b]`` of white noise b spans nearly the leading modes (Musco and Musco 2015).  Where the boundary damps
    these, the share is largest: there b is stressed, by what ``R M 1``, one inside, falls short of one.
    """
    rng = np.random.default_rng(0)
    omega, image = np.empty((2, 2 * _WIDTH, len(op.free)))
    inside = op.root(multiply(op.mass, np.ones((1, len(op.free)))))[0] / op.weight
    omega[:_WIDTH] = op.white_noise(rng, _WIDTH, signs=True) * (1 + _STRESS * np.abs(1 - inside))
    image[:_WIDTH] = op.action(omega[:_WIDTH])
    omega[_WIDTH:] = multiply(op.mass, image[:_WIDTH])
    image[_WIDTH:] = op.action(omega[_WIDTH:])
    gram = op.comm.allreduce(image @ omega.T)
    unit = 1 / np.sqrt(gram.diagonal())
    values, vectors = np.linalg.eigh(gram * unit * unit[:, None])
    keep = values > 1e-10 * values[-1]
    turn = unit[:, None] * vectors[:, keep] / np.sqrt(values[keep])
    image = turn.T @ image   # Ωᵀ x, turned, is N(0, I), and this its covariance with x
    known, rest, count, error = np.einsum("ij,ij->j", image, image), 0.0, 0, np.inf
    while error > _VARIANCE_ERROR:
        x = op.root(op.white_noise(rng, _DRAWS, signs=True))
        x -= op.comm.allreduce(x @ omega.T) @ turn @ image
        rest, count = rest + np.einsum("ij,ij->j", x, x), count + _DRAWS
        estimate = known + rest / count
        error = np.sqrt(2 / count) * largest(op.comm, rest / count / np.where(estimate > 0, estimate, 1.0))
    return estimate
