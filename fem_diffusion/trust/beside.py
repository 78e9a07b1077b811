"""Samples beside the solver: in the prior's own modes, with gradients, and the most probable point near them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fem_diffusion.checks import check_kind, stream
from fem_diffusion.diffusion import GaussianNoise, Noise
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.model.posterior import Posterior
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.product import is_gaussian
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.latents import FAR, LatentProblem
from fem_diffusion.samples import Samples

__all__ = ["SEARCH", "Local", "at_levels", "gaussian", "in_modes", "unseen"]

# Sensors that have an adjoint solve each, at most, in units of the solves; solves of the search for the most probable
# point; fewest samples; steps of differences in posterior standard deviations; draws of noise of the user's own.
_ROWS, SEARCH, _FEWEST, _STEP, _DRAWS = 2, 8, 10, 0.5, 4000
# Squared length of a step, in posterior standard deviations, that ends the search, and that is small beside a misfit.
_NEAR, _SMALL = 0.1, 0.3


def gaussian(problem: InverseProblem,
             y: np.ndarray) -> tuple[InverseProblem, np.ndarray, list[str], np.ndarray | None]:
    """A problem whose noise has a density, its measurement, what there is to say of it, and draws of the noise (n, k).

    Noise of the user's own without a density counts by its mean and covariance at the readings.
    """
    noise = problem.noise
    if isinstance(noise, GaussianNoise) or problem.levels:
        return problem, y, [], None
    noise = check_kind(noise, "The noise of the problem", Noise, "an InverseProblem with the noise of the "
                       "measurement, because a check compares with it, or take calibrate_model, which needs none")
    many = torch.from_numpy(np.tile(y, (max(_DRAWS, 50 * len(y)), 1)))
    errors = on_root(problem.comm, lambda: noise.sample(many, torch.Generator().manual_seed(0)).numpy() - y)
    if noise.log_density is not None:
        return problem, y, [], (errors - errors.mean(axis=0))[:_DRAWS]
    law = GaussianNoise(covariance=np.atleast_2d(np.cov(errors.T)))
    return (replace(problem, noise=law), y - errors.mean(axis=0),
            ["The noise has no log_density: it counts by its mean and covariance."],
            (errors - errors.mean(axis=0))[:_DRAWS])


def in_modes(posterior: Any, problem: InverseProblem, y: np.ndarray, n: int,
             seed: int, notes: list[str]) -> tuple[LatentProblem, np.ndarray, ModalBasis | None]:
    """The measurement in latents, n samples in these (n, r), and the model's own modes where they are fewer.

    What is to be said of them goes to the notes.
    """
    own = getattr(posterior, "basis", None)
    fields = None
    if isinstance(posterior, Posterior):
        samples = posterior.sample(n, seed=seed, extrapolate=True, progress=False)
        fields = posterior.fields(samples.latents, seed, posterior.basis.standard_prior)
    else:
        samples = check_kind(posterior.sample(n, seed=seed), "What sample returns", Samples, "Samples")
        fields = samples.values if problem.prior.core is problem.prior else None
    if isinstance(own, ModalBasis) and not own.standard_prior or not is_gaussian(problem.prior.core):
        if not isinstance(own, ModalBasis):
            raise InputError("The prior is not Gaussian: a check takes the modes of the posterior's basis.")
        # Principal components are uncorrelated and of unit variance.
        latent = LatentProblem(problem, y, own, log_prior=lambda z: -(z**2).sum(axis=1) / 2)
        notes.append("The law of these modes under the prior is not known: it counts as Gaussian.")
        return latent, problem.comm.bcast(samples.latents), None
    basis = karhunen_loeve(problem.prior)
    r = samples.latents.shape[1]
    if fields is None:
        if not r:
            raise InputError("The samples of a transformed prior hold no latents: a check needs them.")
        basis = own if isinstance(own, ModalBasis) else basis.leading(r) if r <= basis.r else karhunen_loeve(
            problem.prior, r)
        return LatentProblem(problem, y, basis), problem.comm.bcast(samples.latents), None
    if isinstance(own, ModalBasis) and own.r > basis.r:
        basis, own = own, None
    latent = LatentProblem(problem, y, basis)
    return latent, problem.comm.bcast(basis.encode(fields)), own if isinstance(own, ModalBasis) else None


def at_levels(latent: LatentProblem, z: np.ndarray, seed: int) -> tuple[LatentProblem, np.ndarray, str]:
    """The problem with levels of noise known, at the mean of samples (n, r), these samples, and what that means."""
    problem, normal = latent.problem, latent.normal_levels(z)
    known = replace(problem, noise=problem.noise.known(torch.from_numpy(normal.mean(axis=0))))   # pyright: ignore
    # The levels are out of the comparison: their numbers are as the prior has them.
    others = np.random.default_rng(stream(seed, "levels")).standard_normal(normal.shape)
    z = z + (others - normal) @ latent.level_rows
    std = ", ".join(f"{x:.3g}" for x in np.unique(np.round(problem.noise.known(torch.from_numpy(   # pyright: ignore
        normal.mean(axis=0))).each(torch.from_numpy(latent.y[None]))[0].diagonal().sqrt().numpy(), 12)))
    return LatentProblem(known, latent.y, latent.basis), z, (
        f"The unknown noise counts as known, with a standard deviation of {std}: whether its own posterior is right is "
        "for a correction or hmc(problem, y) to tell.")


def unseen(latent: LatentProblem, own: ModalBasis, jacobian: np.ndarray) -> float:
    """What modes past the model's own add to the reading that sees most of them, in units of its noise."""
    identity = np.vstack([np.zeros(own.r), np.eye(own.r)])
    inside = latent.basis.encode(own.decode(identity))
    inside = inside[1:] - inside[0]
    inside = np.linalg.qr(inside.T)[0]
    beyond = jacobian - jacobian @ inside @ inside.T
    return float(latent.everyone.bcast(np.linalg.norm(beyond, axis=1).max()))


class Local:
    """Samples beside the solver: readings and gradients there, and the most probable point near them.

    Attributes are `samples` (n, r), those whose solves have not failed (`failed` have), `readings` (n, k), `gradient`
    (n, r) of the energy; the point `z` (r,), the readings `at` (k,) there, whitened `misfit` (k,) and its derivative
    `jacobian` (k, r); whether nearly all are `lost`, and the search has
    `settled`; and `notes`.
    """

    def __init__(self, latent: LatentProblem, z: np.ndarray, solves: int):
        self.latent, self.notes, count = latent, [], 0
        smooth = latent.differentiable
        rows = smooth and len(latent.y) <= _ROWS * solves
        if not rows:
            # Differences along the directions that samples show to matter take the place of some samples.
            count = min(latent.r, len(latent.y), solves // 3)
            z = z[:max(_FEWEST, len(z) - count)]
        found = latent.readings_and_gradient(z) if smooth else (latent.readings(z), None, None)
        # A state whose adjoint fails counts as failed.
        good = np.isfinite(found[0]).all(axis=1) & (True if found[1] is None else np.isfinite(found[1]))
        self.samples, self.readings, self.failed = z[good], found[0][good], int((~good).sum())
        self.lost = self.failed > len(z) - _FEWEST
        # Then the solves that samples have not taken are left for derivatives.
        rows = rows or (smooth and self.lost)
        if self.failed:
            self.notes.append(f"The solver has no solution for {self.failed} of {len(z)} samples, or they are more than"
                              f" {FAR:g} prior standard deviations out: they do not belong to this problem.")
        if self.lost and not rows:
            there = np.isfinite(latent.readings(np.zeros((1, latent.r)))).all()
            raise SolveError(f"The solver has no solution for {self.failed} of {len(z)} samples" + (
                f", and has one at the prior mean ({latent.failure}): the posterior is of no use here; take "
                "pcn(problem, y, seed=1), which begins at the prior." if there else
                f", and none at the prior mean ({latent.failure}): mend the solver, or choose a prior for which it "
                "solves."))
        # Samples that are lost say nothing of where the posterior is, and the prior mean does.
        start = np.zeros(latent.r) if self.lost else self.samples.mean(axis=0)
        if rows:
            self._search(start, latent.linearised)
        else:
            slope = self._secants(start, count)
            self._search(start, lambda x: (latent.whitened(latent.readings(x[None]))[0], slope))
            why = "There are many sensors" if smooth else "The solver has no derivative"
            self.notes.append(f"{why}: how the readings depend on the unknown is taken along {count} directions by "
                              "differences.")
        if self.lost:
            self.readings = self.at[None]
        self.gradient = self.samples + latent.whitened(self.readings) @ self.jacobian if found[2] is None else (
            found[2][good])

    def _secants(self, z: np.ndarray, count: int) -> np.ndarray:
        """Derivative (k, r) of the whitened misfit by differences, zero across the directions with the most to tell."""
        latent = self.latent
        scale = self.samples.std(axis=0)
        white = latent.whitened(self.readings)
        cross = ((self.samples - z) / scale).T @ (white - white.mean(axis=0))
        axes = scale[:, None] * np.linalg.svd(cross, full_matrices=False)[0][:, :count]
        readings = latent.readings(np.vstack([z, z + _STEP * axes.T]))
        W = latent.noise_matrix(readings[0])
        return latent.everyone.bcast(W @ np.nan_to_num(readings[1:] - readings[0]).T / _STEP @ np.linalg.pinv(axes))

    def _search(self, z: np.ndarray, linearise: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
        """Gauss-Newton from the mean of the samples; an affine problem takes one step."""
        latent, spent = self.latent, 2
        misfit, jacobian = linearise(z)
        size, self.settled = 1.0, False
        while spent < 2 * SEARCH:
            normal = np.eye(latent.r) + jacobian.T @ jacobian
            step = -size * np.linalg.solve(normal, z + jacobian.T @ misfit)
            # Noise that is larger than assumed makes for longer steps, and a wider posterior.
            if step @ normal @ step < _NEAR * size**2 * max(1.0, float(misfit @ misfit) / len(misfit)):
                self.settled = True
                break
            there = latent.whitened(latent.readings((z + step)[None]))[0]
            spent += 1
            before, after = (m @ m + x @ x for m, x in ((misfit, z), (there, z + step)))
            if not after < before:
                size /= 4
                continue
            affine = np.linalg.norm(there - misfit - jacobian @ step) < 0.1 and size == 1
            z, misfit, size = z + step, there, 1.0
            if affine:
                self.settled = True
                break
            misfit, jacobian = linearise(z)
            spent += 1
        normal = np.eye(latent.r) + jacobian.T @ jacobian
        step = np.linalg.solve(normal, z + jacobian.T @ misfit)
        # A large residual slows the search down; what is left of it by a further step is small beside it all the same.
        self.settled = self.settled or bool(step @ normal @ step < _SMALL * (misfit @ misfit))
        if not self.settled:
            self.notes.append("The search for the parameter that fits best near the samples has not ended after "
                              f"{spent} solves, so whether the measurement goes with model and noise is left open.")
        self.z, self.misfit, self.jacobian = latent.everyone.bcast((z, misfit, jacobian))
        self.at = latent.readings(self.z[None])[0]
