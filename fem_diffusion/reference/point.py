"""The most probable parameter of a measurement, by a trust-region Newton method in the latents."""

import contextlib
import itertools
from dataclasses import dataclass

import numpy as np
from firedrake import Function
from scipy.optimize import OptimizeResult, minimize

from fem_diffusion.checks import alike, check_count, check_seed, stream
from fem_diffusion.errors import SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import field
from fem_diffusion.prior.draws import restricted
from fem_diffusion.problem import InverseProblem, check_problem
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.looks import point_conflict
from fem_diffusion.reference.solver import unrestricted

__all__ = ["MapPoint", "around_points", "aside", "descend", "find_point", "find_points", "map_point"]

# Squared distances to the minimum, in posterior standard deviations: what is aimed at, and what will do.
_AIM, _NEAR = 1e-14, 1e-4
_STEPS = 200
# Where searches start, in prior standard deviations from the prior mean.
_ASIDE = 0.1
# Distance in standard deviations at which probable points are two, and energy above the best that makes one improbable.
_APART, _IMPROBABLE = 6.0, 15.0
# Searches from which chains begin where readings are at most so many; where there are more, one.
_SEARCHES, _CHEAP = 3, 40
# Rounds in which levels of noise are found, and their change, in prior standard deviations, that ends them.
_ROUNDS, _CLOSE = 10, 0.01
# Prior standard deviations within which a descent stays, its memory, and the change of the energy at which it ends.
_REACH, _MEMORY, _SETTLED = 6.0, 20, 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class MapPoint:
    """The maximum a posteriori point of the latents, given levels of noise where these are unknown, from `map_point`.

    Parameters
    ----------
    parameter : firedrake.Function
        In the parameter's space.
    latents : numpy.ndarray
        Shape (r,).
    energy : float
        Negative log of prior density of the latents times likelihood there.
    solves, pulls : int
        Forward and adjoint solves that it took.
    """

    parameter: Function
    latents: np.ndarray
    energy: float
    solves: int
    pulls: int

    def __repr__(self) -> str:
        return (f"MapPoint: {len(self.latents)} latents of norm {np.linalg.norm(self.latents):.3g}, found in "
                f"{self.solves:,} solves and {self.pulls:,} adjoint solves")


def map_point(problem: InverseProblem, y: np.ndarray, *, basis: ModalBasis | None = None, starts: int = 1,
              seed: int = 0) -> MapPoint:
    """The most probable latents of a measurement, by Newton steps with the Gauss-Newton Hessian in a trust region.

    Parameters
    ----------
    problem : InverseProblem
        With a Gaussian field, transformed or not, and noise that has a density. Derivatives are the adjoint's where
        the forward problem has one, and differences in the latents otherwise.
    y : array_like of shape (k,)
        The measurement.
    basis : ModalBasis, optional
        ``karhunen_loeve(problem.prior)`` where left out.
    starts : int
        Number of searches: one from beside the prior mean, the others from prior draws of this seed; the best one
        counts.

    Unknown levels of noise are those that are most probable when the other latents are integrated out, of the problem
    linearised there: together with them they would be far too small.

    InputError is raised if the problem is not of that kind, or an argument out of range; SolveError if no search ends
    at a minimum, or the readings have no slope, as those of a level set. MeasurementWarning tells of a measurement that
    is in conflict with prior, noise or sensors, which it names: what is left of it at the point is not as prior and
    noise let expect. With several minima it may be the point that is improbable: give more starts.
    """
    starts, seed = alike(check_problem(problem).comm, lambda: {
        "starts": check_count(starts, "starts"), "seed": check_seed(seed)})
    latent = LatentProblem(problem, y, basis)
    z, energy = find_point(latent, starts, seed)
    if not np.isfinite(latent.log_prior(z[None])).all():
        raise SolveError("The most probable parameter without the constraint of the prior is not allowed by it: take "
                         "hmc, which keeps to the constraint.")
    point_conflict(latent, z)
    return MapPoint(field(problem.M, latent.parameters(z[None])[0], name="map_point"), z, energy, latent.solves,
                    latent.pulls)


def find_point(latent: LatentProblem, starts: int = 1, seed: int = 0, start: np.ndarray | None = None
               ) -> tuple[np.ndarray, float]:
    """Latents (r,) of the maximum a posteriori point and their energy, from beside the prior mean or another start.

    A constraint of the prior is left out. Arguments and errors are as for `map_point`.
    """
    draws = np.random.default_rng(stream(seed, "starts")).standard_normal((starts - 1, latent.r))
    found, errors = [], []
    for z in np.vstack([aside(latent.r, seed) if start is None else start, draws]):
        try:
            with unrestricted(latent):
                found.append(_settled(latent, z))
        except SolveError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return min(found, key=lambda pair: pair[1])


def aside(r: int, seed: int = 0) -> np.ndarray:
    """Latents (r,) beside the prior mean, from where searches start: there symmetric readings may have no slope."""
    return _ASIDE * np.random.default_rng(stream(seed, "aside")).standard_normal(r)


def _settled(latent: LatentProblem, start: np.ndarray) -> tuple[np.ndarray, float]:
    """The minimum that one search ends at, and its energy, with levels of noise as `_weighed` has them."""
    found = _search(latent, start)
    for _ in range(_ROUNDS if len(latent.level_rows) else 0):
        weighed = _weighed(latent, found[0])
        close = np.abs(latent.normal_levels(weighed - found[0])[0] - latent.normal_levels(np.zeros_like(start))[0])
        found = _search(latent, weighed)
        if close.max() < _CLOSE:
            break
    return found


def _weighed(latent: LatentProblem, z: np.ndarray) -> np.ndarray:
    """Latents z (r,) with the levels of noise that are most probable when the other latents are integrated out.

    Exact where readings are linear, and linearised at z elsewhere (MacKay 1992, Bayesian interpolation, section 4).
    Levels that are most probable together with the others are far too small: the others fit the noise as well.
    """
    k, rows = len(latent.y), latent.level_rows
    readings = latent.everyone.bcast(latent.readings(z[None])[0, :k])
    if np.isnan(readings).any():
        raise SolveError(f"The forward problem has no solution at a probable point ({latent.failure}): check it there.")
    jacobian = (latent.pull(z, np.eye(k, latent.width)) if latent.differentiable else
                latent.everyone.bcast(latent.slopes(z, np.eye(latent.r)).T[:k]))
    innovation, seen = latent.y - readings + jacobian @ z, jacobian @ jacobian.T

    def energy(normal: np.ndarray) -> float:
        W = latent.noise_matrix(np.concatenate([readings, normal]))[:k, :k]
        S, white = np.eye(k) + W @ seen @ W.T, W @ innovation
        return float(normal @ normal + white @ np.linalg.solve(S, white)
                     + np.linalg.slogdet(S)[1]) / 2 - float(np.linalg.slogdet(W)[1])
    normal = latent.normal_levels(z[None])[0]
    best = minimize(energy, np.zeros_like(normal), method="Nelder-Mead", options={"xatol": _CLOSE / 10}).x
    return z + np.linalg.pinv(rows) @ (best - normal)


def _search(latent: LatentProblem, start: np.ndarray) -> tuple[np.ndarray, float]:
    """The minimum that one search ends at, with the levels of noise of its start, and its energy."""
    seen: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
    free = np.eye(latent.r) - np.linalg.pinv(latent.level_rows) @ latent.level_rows

    def expanded(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient (r,) and Gauss-Newton Hessian (r, r) of the energy, levels held."""
        if z.tobytes() not in seen:
            seen.clear()
            gradient, hessian = latent.expanded(z)
            if len(latent.level_rows):
                gradient, hessian = free @ gradient, free @ hessian @ free + np.eye(latent.r) - free
            seen[z.tobytes()] = gradient, hessian
        return seen[z.tobytes()]

    def near(z: np.ndarray) -> float:
        """Squared distance to the minimum in posterior standard deviations, as the Hessian sees it."""
        gradient, hessian = expanded(z)
        return float(gradient @ np.linalg.solve(hessian, gradient))

    def stop(intermediate_result: OptimizeResult) -> None:
        if near(intermediate_result.x) < _AIM:
            raise StopIteration
    if not np.isfinite(latent.energy(start[None])).all():
        raise SolveError(f"The forward problem has no solution at the prior mean ({latent.failure}): check it there.")
    found = minimize(lambda z: float(latent.energy(z[None])[0]), start, jac=lambda z: expanded(z)[0],
                     hess=lambda z: expanded(z)[1], method="trust-exact", callback=stop,
                     options={"gtol": 0.0, "maxiter": _STEPS, "initial_trust_radius": 1.0, "max_trust_radius": 100.0})
    if not (left := near(found.x)) < _NEAR:
        raise SolveError(f"No maximum a posteriori point was found (after {found.nit} steps it is {np.sqrt(left):.2g} "
                         "posterior standard deviations away): check the measurement and the solver's tolerance, or "
                         "give more starts.")
    around = found.x + np.vstack([np.eye(latent.r), -np.eye(latent.r)])
    flat = np.array_equal(expanded(found.x)[1], np.eye(latent.r)) and not latent.linearised(found.x)[1].any()
    if flat and np.ptp(latent.readings(around), axis=0).any():
        raise SolveError("The readings depend on the parameter and their derivative is zero: the transform has none, "
                         "as a level set; take pcn, which needs none.")
    return found.x, float(found.fun)


def descend(latent: LatentProblem, most: int) -> tuple[np.ndarray, np.ndarray]:
    """A probable point (r,) by some `most` gradients from the prior mean, and a factor F (r, r) of a covariance.

    The limited-memory method of SciPy: where readings are many its gradients cost a small part of the linearisations of
    `find_point`, and its end is near enough for chains. F Fᵀ is the inverse Hessian as the steps have seen it.
    """
    def value(z: np.ndarray) -> tuple[float, np.ndarray]:
        energy, gradient = latent.energy_and_gradient(z[None])
        # The line search takes numbers alone.
        return float(np.minimum(energy[0], 1e30)), gradient[0]
    found = minimize(value, aside(latent.r), jac=True, method="L-BFGS-B", bounds=[(-_REACH, _REACH)] * latent.r,
                     options={"maxcor": _MEMORY, "maxfun": most, "ftol": _SETTLED})
    inverse = found.hess_inv.todense()
    return found.x, np.linalg.cholesky((inverse + inverse.T) / 2)


def find_points(latent: LatentProblem, starts: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Probable points (r,) that searches from starts (s, r) end at, the most probable first, and factors (r, r).

    F Fᵀ is the inverse of the Gauss-Newton Hessian there. Points that another one explains, or that are improbable
    beside the best, are left out. Costs and errors of `find_point`, the first
    where all searches fail.
    """
    found, failed = [], None
    for start in starts:
        try:
            found.append(find_point(latent, start=start))
        except SolveError as error:
            failed = failed or error
    if failed is not None and not found:
        raise failed
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for z, energy in sorted(found, key=lambda pair: pair[1]):
        apart = (np.linalg.norm(np.linalg.solve(factor, z - centre)) > _APART for centre, factor in kept)
        if energy < min(e for _, e in found) + _IMPROBABLE and all(apart):
            with contextlib.suppress(SolveError):   # no solves are left
                kept.append((z, np.linalg.inv(np.linalg.cholesky(latent.expanded(z)[1])).T))
    return kept


def around_points(latent: LatentProblem, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where n chains begin, (n, r): around all probable points that some searches find; the best, and a factor there.

    Chains that begin at one mode alone could not tell of another. Where the prior is constrained, only where it allows
    them. Errors of `find_point`.
    """
    rng = np.random.default_rng(stream(seed, "starts"))
    x = rng.standard_normal((n, latent.r))
    others = rng.standard_normal((_SEARCHES - 1 if len(latent.y) <= _CHEAP else 0, latent.r))
    places = find_points(latent, np.vstack([aside(latent.r), others]))
    z = np.stack([centre + factor @ row for row, (centre, factor) in zip(x, itertools.cycle(places))])
    centre, factor = places[0]

    def wider(number: int) -> tuple[np.ndarray]:
        # The posterior may be in the tails of the Gaussian there.
        return z if not number else centre + (1 + number / 10) * rng.standard_normal(z.shape) @ factor.T,
    x, = restricted(latent.allowed, n, wider, "the data put the parameter where the constraint forbids it; check both")
    return x, centre, factor
