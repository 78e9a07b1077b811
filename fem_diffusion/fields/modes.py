"""Eigenpairs of a covariance in the mass inner product, matrix-free, on any number of ranks."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from firedrake import Constant, DirichletBC, TestFunction, TrialFunction, assemble, dx, inner
from firedrake.functionspaceimpl import WithGeometry

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import (
    by_component, coefficients, field, generic_integrals, independent_entries, is_real, multiply, owned_size,
)
from fem_diffusion.fields.lanczos import Lanczos

__all__ = ["Covariance", "free_dofs", "leading_modes", "mass_action", "sample_covariance", "without_conditions"]

Rows = Callable[[np.ndarray], np.ndarray]

# Correlation of a latent with anything that the modes leave out; rounding, of the largest variance.
_TOLERANCE, _ROUNDING = 1e-6, 1e-13
# Draws for the variance outside; vectors and steps of another start, as a proof; share of a draw that is rounding.
_TAIL_DRAWS, _PROOF, _PARALLEL = 64, 3, 1e-9
# Difference of variances, in units of themselves, that is none; functions that tell directions.
_EQUAL, _FUNCTIONS = 1e-8, 8


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


@dataclass(frozen=True)
class Covariance:
    """A covariance C as its expansion sees it: `apply` maps dual coefficients (B, n_owned) to primal ones.

    `draws` maps a number and a seed to draws of N(0, C), shape (number, n_owned), the same on any number of ranks;
    `total`, the integral of the pointwise variance, is estimated from draws where it is None.
    """

    apply: Rows
    draws: Callable[[int, int], np.ndarray]
    total: float | None = None


def sample_covariance(V: WithGeometry, centred: np.ndarray) -> Covariance:
    """The covariance of centred samples (n, n_owned)."""
    comm, spread = V.comm, np.sqrt(len(centred) - 1)

    def draws(n: int, seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((n, len(centred))) @ centred / spread

    def apply(x: np.ndarray) -> np.ndarray:
        return comm.allreduce(x @ centred.T) @ centred / spread**2
    return Covariance(apply, draws, comm.allreduce(float((centred * mass_action(V)(centred)).sum())) / spread**2)


def leading_modes(covariance: Covariance, V: WithGeometry, bcs: Sequence[DirichletBC], r: int | None = None, *,
                  retained: float = 1.0, most: int | None = None,
                  fewer: bool = False) -> tuple[np.ndarray, np.ndarray, float]:
    """Leading eigenpairs of C M φ = λ φ.

    `r` modes, or where that is None the fewest that keep the share `retained` of the variance, at most `most`. A
    covariance of lower rank is an error, unless `fewer` modes will do. Returns modes (r, n_owned), orthonormal in the
    mass inner product with signs and, where variances are equal, directions fixed by the geometry alone, variances
    (r,) and the total variance.
    """
    comm, free, seeds = V.comm, free_dofs(V, bcs), count()
    if r is not None and not 1 <= r <= free:
        raise InputError(f"r = {r} modes were asked for; the space has {free} free degrees of freedom: ask "
                         "for one to as many.")
    space = Lanczos(lambda x: without_conditions(V, bcs, covariance.apply(x)), mass_action(V), comm, owned_size(V))

    def draws(n: int) -> np.ndarray:
        return without_conditions(V, bcs, covariance.draws(n, next(seeds)))

    def squares(x: np.ndarray) -> float:
        return float(np.diag(space.inner(x, x)).sum())

    def fresh(n: int) -> np.ndarray:
        x = draws(n)
        return space.beside(x, _PARALLEL * np.sqrt(squares(x)))[:free - len(space.basis)]
    outside, told = draws(_TAIL_DRAWS), 0

    def variance(values: np.ndarray) -> float:
        nonlocal told, outside
        new, told = space.basis[told:], len(space.basis)
        outside -= space.inner(outside, new) @ new
        return covariance.total or float(values.sum()) + squares(outside) / _TAIL_DRAWS
    # So many modes of equal variance are found from one start: components may be alike, and so may directions.
    width, former, steps = max(16, 8 * V.value_size, (r or 0) // 8), None, 0
    new = fresh(width)
    if not len(new):
        raise InputError("The covariance is zero: give the prior a standard deviation.")
    while True:
        image = space.extend(new)
        values, vectors, residual = space.ritz()
        wanted, steps, whole = r or most or free, steps + 1, values
        if r is None:
            enough = np.flatnonzero(np.cumsum(values) >= retained * variance(values))
            wanted = min(wanted, int(enough[0]) + 1 if len(enough) else free)
        kept, values, vectors = values[:wanted].sum(), values[:wanted], vectors[:, :wanted]
        # Latents are uncorrelated with what is left out, up to the tolerance.
        off = residual[:wanted] / np.maximum(np.sqrt(values * values[-1]), _ROUNDING / _TOLERANCE * values[0])
        if len(values) == wanted and off.max() <= _TOLERANCE:
            if former is not None and steps >= _PROOF:
                if kept <= (1 + _TOLERANCE) * former:
                    break
                former = None
            if former is None:   # modes that the start has missed would show from another one
                new, former, steps = fresh(_PROOF), kept, 0
        elif len(space.basis) >= 4 * wanted + 256:
            warnings.warn(f"The modes are converged to {off.max():.1e} of their variances only, in a space of "
                          f"{len(space.basis)} vectors: the variances fall too slowly to tell modes apart.",
                          RuntimeWarning, stacklevel=3)
            break
        if steps:
            new = space.beside(image, _ROUNDING * values[0])[:free - len(space.basis)]
        if not len(new):
            new = fresh(width)
        if not len(new):
            break
    rank = int((values > 1e-14 * values[0]).sum())
    if rank < wanted and not fewer:
        raise InputError(f"The covariance has {rank} modes of positive variance only; ask for at most that many.")
    modes = vectors[:, :rank].T @ space.basis
    return _fixed(modes, values[:rank], V), values[:rank], max(variance(whole), float(values.sum()))


def _fixed(modes: np.ndarray, values: np.ndarray, V: WithGeometry) -> np.ndarray:
    """The same modes (r, n_owned) with a sign, and among those of equal variance directions, that geometry alone tells.

    The integral of each mode against a fixed function is positive, of the next one of equal variance that against a
    second function, which the first one does not see, and so on.
    """
    alike = np.split(np.arange(len(values)), np.flatnonzero(np.diff(values) < -_EQUAL * values[:-1]) + 1)
    functions = [generic_integrals(V, i) for i in range(min(max(map(len, alike)), _FUNCTIONS))]
    seen = V.comm.allreduce(modes @ np.transpose(functions))
    for group in alike:
        turn, upper = np.linalg.qr(seen[group], mode="complete")
        signs = np.ones(len(group))
        signs[:min(upper.shape)] = np.where(np.diag(upper) < 0, -1.0, 1.0)
        modes[group] = (turn * signs).T @ modes[group]
    return modes
