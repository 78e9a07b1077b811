"""Eigenpairs of a covariance in the mass inner product, matrix-free, on any number of ranks.

All coefficient arrays are owned coefficients: float64, this rank's part of ``with f.dat.vec_ro as v: v.array``.
"""

import warnings
from collections.abc import Callable

import numpy as np
from firedrake import Constant, TestFunction, TrialFunction, assemble, dx, inner
from mpi4py import MPI

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import (
    by_component, coefficients, field, generic_integrals, independent_entries, is_real, multiply, owned_size,
)

__all__ = ["free_dofs", "leading_modes", "mass_action", "sample_covariance", "without_conditions"]

_MAX_SWEEPS = 60
_TOLERANCE = 1e-9


def mass_action(V, weights=None) -> Callable[[np.ndarray], np.ndarray]:
    """The mass matrix as a map of owned coefficients (B, n_owned) to owned dual coefficients (B, n_owned).

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


def free_dofs(V, bcs) -> int:
    """Degrees of freedom of V that no condition of `bcs` fixes."""
    ones = without_conditions(V, bcs, np.ones((1, owned_size(V))))
    return int(V.comm.allreduce(float(ones.sum()), MPI.SUM))


def without_conditions(V, bcs, x: np.ndarray) -> np.ndarray:
    """Owned coefficients (B, n_owned) with zeros where `bcs` fix the field."""
    if not bcs:
        return x
    mask = field(V, np.ones(x.shape[1]))
    for bc in bcs:
        bc.zero(mask)
    return x * coefficients(mask)


def leading_modes(covariance, V, bcs, r: int, fewer: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Leading eigenpairs of C M φ = λ φ by subspace iteration with Rayleigh-Ritz (Halko, Martinsson, Tropp 2011).

    `covariance` maps owned dual coefficients (B, n_owned) to primal ones. Returns modes (r, n_owned), orthonormal in
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
        projected = comm.allreduce(modes @ mass(image).T, MPI.SUM)
        values, rotation = np.linalg.eigh((projected + projected.T) / 2)
        values, rotation = values[::-1], rotation[:, ::-1]
        modes, image = rotation.T @ modes, rotation.T @ image
        defect = image[:r] - values[:r, None] * modes[:r]
        residual = np.sqrt(comm.allreduce((defect * mass(defect)).sum(axis=1), MPI.SUM))
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
    return modes * _signs(V, modes)[:, None], values


def sample_covariance(V, centred: np.ndarray) -> tuple[Callable[[np.ndarray], np.ndarray], float]:
    """The covariance of centred samples (n, n_owned), as `leading_modes` takes it, and its total variance."""
    comm = V.comm

    def covariance(x):
        return comm.allreduce(x @ centred.T, MPI.SUM) @ centred / (len(centred) - 1)
    return covariance, comm.allreduce(float((centred * mass_action(V)(centred)).sum()), MPI.SUM) / (len(centred) - 1)


def _orthonormalise(x: np.ndarray, mass, comm) -> np.ndarray:
    """Basis of the span of the rows of `x` (B, n_owned), orthonormal in the mass inner product.

    The Gram matrix squares the condition number, so its inverse square root is applied until nothing is left to do.
    """
    for _ in range(5):
        gram = comm.allreduce(x @ mass(x).T, MPI.SUM)
        scale = 1 / np.sqrt(np.diag(gram))
        gram = gram * scale * scale[:, None]
        values, vectors = np.linalg.eigh(gram)
        x = (vectors / np.sqrt(np.maximum(values, 1e-14 * values[-1]))).T @ (x * scale[:, None])
        if np.abs(gram - np.eye(len(gram))).max() < 1e-8:
            break
    return x


def _signs(V, modes: np.ndarray) -> np.ndarray:
    """Signs that make the integral of each mode against a fixed generic function positive, shape (r,)."""
    overlap = V.comm.allreduce(modes @ generic_integrals(V), MPI.SUM)
    return np.where(overlap < 0, -1.0, 1.0)
