"""Eigenpairs of a covariance in the mass inner product, matrix-free, on any number of ranks."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from firedrake import Constant, DirichletBC, TestFunction, TrialFunction, assemble, dx, inner
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import (
    by_component, coefficients, field, generic_integrals, independent_entries, is_real, multiply, owned_size,
)

__all__ = ["free_dofs", "leading_modes", "mass_action", "sample_covariance", "without_conditions"]

Rows = Callable[[np.ndarray], np.ndarray]

_MAX_SWEEPS = 60
_TOLERANCE = 1e-9


def mass_action(V: WithGeometry, weights: Sequence[float] | None = None) -> Rows:
    """The mass matrix as a map of coefficients (B, n_owned) to dual coefficients (B, n_owned).

    Of a mixed space one matrix for each component (they may be on different meshes), times its weight.
    """
    if len(V) > 1:
        parts = [(mass_action(W), weight) for W, weight in zip(V, weights or [1.0] * len(V))]
        return lambda x: np.hstack([weight * mass(y) for (mass, weight), y in zip(parts, by_component(V, x))])
    if is_real(V):
        # Firedrake assembles no form with an argument that is a vector of numbers.
        volumes = assemble(Constant(1.0) * dx(V.mesh())) * independent_entries(V)[1][:owned_size(V)]
        return lambda x: x * volumes
    matrix = assemble(inner(TrialFunction(V), TestFunction(V)) * dx, mat_type="aij").petscmat
    return lambda x: multiply(matrix, x)


def free_dofs(V: WithGeometry, bcs: Sequence[DirichletBC]) -> int:
    """Degrees of freedom of V that no condition of `bcs` fixes."""
    return int(V.comm.allreduce(float(without_conditions(V, bcs, np.ones((1, owned_size(V)))).sum())))


def without_conditions(V: WithGeometry, bcs: Sequence[DirichletBC], x: np.ndarray) -> np.ndarray:
    """Coefficients (B, n_owned) with zeros where `bcs` fix the field."""
    if not bcs:
        return x
    mask = field(V, np.ones(x.shape[1]))
    for bc in bcs:
        bc.zero(mask)
    return x * coefficients(mask)


def leading_modes(covariance: Rows, V: WithGeometry, bcs: Sequence[DirichletBC], r: int,
                  fewer: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Leading eigenpairs of C M φ = λ φ by subspace iteration with Rayleigh-Ritz (Halko, Martinsson, Tropp 2011).

    `covariance` maps dual coefficients (B, n_owned) to primal ones. Returns modes (r, n_owned), orthonormal in
    the mass inner product with a sign fixed by the geometry alone, and variances (r,). A covariance of lower rank is an
    error, unless `fewer` modes will do.
    """
    comm, free = V.comm, free_dofs(V, bcs)
    if not 1 <= r <= free:
        raise InputError(f"r = {r} modes were asked for; the space has {free} free degrees of freedom: ask "
                         "for one to as many.")
    mass = mass_action(V)
    block = min(free, r + max(8, r // 2))
    modes = np.random.default_rng([0, comm.rank]).standard_normal((block, owned_size(V)))
    modes = _orthonormalise(without_conditions(V, bcs, modes), mass, comm)
    for _ in range(_MAX_SWEEPS):
        image = without_conditions(V, bcs, covariance(mass(modes)))
        projected = comm.allreduce(modes @ mass(image).T)
        values, rotation = np.linalg.eigh((projected + projected.T) / 2)
        values, rotation = values[::-1], rotation[:, ::-1]
        modes, image = rotation.T @ modes, rotation.T @ image
        defect = image[:r] - values[:r, None] * modes[:r]
        residual = np.sqrt(comm.allreduce((defect * mass(defect)).sum(axis=1)))
        if (residual <= _TOLERANCE * values[0]).all():
            break
        modes = _orthonormalise(image, mass, comm)
    else:
        warnings.warn(f"The modes are converged to {residual.max() / values[0]:.1e} of the largest variance only, "
                      f"after {_MAX_SWEEPS} sweeps; a smaller r converges faster.", RuntimeWarning, stacklevel=3)
    rank = int((values[:r] > 1e-14 * values[0]).sum())
    if rank < r and not fewer:
        raise InputError(f"The covariance has {rank} modes of positive variance only; ask for at most that many.")
    modes, values = modes[:min(r, rank)], values[:min(r, rank)].copy()
    # The integral of each mode against a fixed function is positive.
    signs = np.where(comm.allreduce(modes @ generic_integrals(V)) < 0, -1.0, 1.0)
    return modes * signs[:, None], values


def sample_covariance(V: WithGeometry, centred: np.ndarray) -> tuple[Rows, float]:
    """The covariance of centred samples (n, n_owned), as `leading_modes` takes it, and its total variance."""
    comm = V.comm

    def covariance(x: np.ndarray) -> np.ndarray:
        return comm.allreduce(x @ centred.T) @ centred / (len(centred) - 1)
    return covariance, comm.allreduce(float((centred * mass_action(V)(centred)).sum())) / (len(centred) - 1)


def _orthonormalise(x: np.ndarray, mass: Rows, comm: MPI.Comm) -> np.ndarray:
    """Basis of the span of the rows of `x` (B, n_owned), orthonormal in the mass inner product.

    The Gram matrix squares the condition number, so its inverse square root is applied until nothing is left to do.
    """
    for _ in range(5):
        gram = comm.allreduce(x @ mass(x).T)
        scale = 1 / np.sqrt(np.diag(gram))
        gram = gram * scale * scale[:, None]
        values, vectors = np.linalg.eigh(gram)
        x = (vectors / np.sqrt(np.maximum(values, 1e-14 * values[-1]))).T @ (x * scale[:, None])
        if np.abs(gram - np.eye(len(gram))).max() < 1e-8:
            break
    return x
