"""Where a correction starts: amortised samples in all modes that take part, their density, and an emulator."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from firedrake import Ensemble
from scipy.linalg import block_diag, null_space

from fem_diffusion.checks import stream
from fem_diffusion.diffusion import Conditioned, Sampler, log_density, sample_latents
from fem_diffusion.diffusion.base.layouts import decorrelated
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.sampling.sample import out_of_range
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.trust.surrogate import Base

if TYPE_CHECKING:
    from fem_diffusion.model.posterior import Posterior

__all__ = ["Start", "known_readings", "start_of"]

# Samples by which the amortised posterior is known.
_SAMPLES = 1000
# How far modes of one prior may be from each other, and beyond how many prior standard deviations nothing starts.
_SAME, _FAR = 1e-4, 6.0
# Modes that take part, at most.
_MODES = 512


@dataclass(frozen=True, eq=False)
class Start:
    """What a correction begins with.

    Parameters
    ----------
    latent : LatentProblem
        The target, in all R modes that take part.
    z : numpy.ndarray
        Amortised samples with the other modes from the prior, shape (n, R).
    more : callable
        So many further ones.
    log_density : callable or None
        Of them up to a constant, (n, R) to (n,).
    base : Base or None
        What the emulator tells of the readings.
    log_prior : callable or None
        Of latents that are not standard normal, (B, R) to (B,).
    """

    latent: LatentProblem
    z: np.ndarray
    more: Callable[[int], np.ndarray]
    log_density: Callable[[np.ndarray], np.ndarray] | None = None
    base: Base | None = None
    log_prior: Callable[[np.ndarray], np.ndarray] | None = None


def start_of(posterior: "Posterior", log_prior: Callable[[np.ndarray], np.ndarray] | None, ensemble: Ensemble | None,
             seed: int) -> Start:
    """The start of a posterior's correction (collective); InputError where there is no density to correct to."""
    basis, problem = posterior.basis, posterior.problem
    if not basis.standard_prior and log_prior is None:
        raise InputError("The latents are those of POD, whose prior density is not known: give correct a log_prior, "
                         "which maps latents (B, r) to their log densities (B,), or train with a Karhunen-Loeve basis.")
    latent = LatentProblem(problem, posterior.y, extended(basis) if basis.standard_prior else basis,
                           log_prior=log_prior, ensemble=ensemble)
    r, rest = basis.r, latent.r - basis.r
    conditioned = posterior.conditioned
    sampler = out_of_range(Sampler(), posterior.far)
    count = 0

    def more(n: int) -> np.ndarray:
        nonlocal count
        count += 1
        mine = stream(seed, f"start {count}")
        z = on_root(problem.comm, lambda: sample_latents(conditioned, n, sampler, seed=mine, progress=False)[0].numpy())
        if not np.isfinite(z).all():
            raise SolveError("The model gives samples that are not finite: train it anew.")
        others = np.random.default_rng(stream(seed, f"others {count}")).standard_normal((n, rest))
        return np.hstack([np.clip(z, -_FAR, _FAR) if log_prior is None else z, others])

    def density(z: np.ndarray) -> np.ndarray:
        found = on_root(latent.everyone, lambda: log_density(
            conditioned, torch.from_numpy(np.ascontiguousarray(z[None, :, :r])))[0].numpy())
        return found - (z[:, r:]**2).sum(axis=1) / 2
    known = conditioned.density is None and not posterior.far
    return Start(latent, more(_SAMPLES), more, density if known else None, known_readings(posterior), log_prior)


def extended(basis: ModalBasis) -> ModalBasis:
    """A Karhunen-Loève basis with further modes of its prior (collective); none where those are not the same."""
    assert basis.prior is not None
    whole, found = karhunen_loeve(basis.prior), replace(basis, turn=None)
    size = found.r
    whole = whole.leading(min(whole.r, max(_MODES, size)))
    # The modes of the model stay what they are, because other runs may choose other signs.
    across = whole.encode(found.decode(np.eye(size)))[:, :size]
    if whole.r > size and np.abs(np.abs(across) - np.eye(size)).max() <= _SAME:
        found = replace(whole, modes=np.vstack([found.modes, whole.modes[size:]]),
                        variances=np.concatenate([found.variances, whole.variances[size:]]))
    if basis.turn is None:
        return found
    return replace(found, turn=block_diag(np.hstack([basis.turn, null_space(basis.turn.T)]), np.eye(found.r - size)))


def known_readings(posterior: "Posterior") -> Base | None:
    """Readings as the emulator tells them, of the model's own latents; None where it is not kept.

    Sensors of a family are rows over coordinates of the state, in units of noise and emulator error; what whitened them
    is found from the noise.
    """
    conditioned, noise = posterior.conditioned, posterior.problem.noise
    density, scale = conditioned.density, conditioned.latents
    if density is None or noise is None:
        return None
    if scale is not None:
        return _unscaled(known_readings(replace(posterior, conditioned=replace(conditioned, latents=None))), scale)
    if density.base.law is not None or conditioned.readings is not None:
        return _by_law(conditioned, posterior.basis.r)
    emulator, learnt, r = density.base.emulator, density.base.learnt, posterior.basis.r
    rows, y = density.rows[0], torch.from_numpy(posterior.y)
    left = torch.eye(len(rows), dtype=rows.dtype) - rows @ emulator.residual @ rows.T
    offset, matrix = torch.zeros_like(y), torch.eye(len(y), dtype=rows.dtype)
    if learnt is None and float(left.diagonal().max()) > _SAME:
        covariance = noise.covariance(y[None])
        std = covariance.diagonal().sqrt()
        layout, _ = decorrelated(torch.diag(std), offset, covariance, y)
        turn = layout.rows[0] / std
        root = layout.variance[0].sqrt()[:, None] * torch.linalg.inv(torch.linalg.cholesky(left))
        back = torch.linalg.solve(turn, root)
        offset, matrix = y - back @ density.target[0], back @ rows

    def base(z: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        with torch.no_grad():
            x = torch.from_numpy(z[:, :r].copy())
            c, back = emulator.with_pull(x)
            shift, more = (None, None) if learnt is None else learnt.mean_with_pull(x)
            c = c if shift is None else c + shift

        def pull(covector: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                through = torch.from_numpy(covector) @ matrix
                pulled = (back(through) if more is None else back(through) + more(through)).numpy()
            return np.hstack([pulled, np.zeros((len(z), z.shape[1] - r))])
        return (offset + c @ matrix.T).numpy(), pull
    return base


def _unscaled(base: Base | None, scale: MonotoneMap) -> Base | None:
    """A base of latents that a scale has made, as one of the users' latents, which come first."""
    if base is None:
        return None
    r = len(scale)

    def outer(z: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        own = torch.from_numpy(z[:, :r].copy())
        found, pull = base(np.hstack([scale.forward(own).numpy(), z[:, r:]]))
        slope = np.hstack([scale.log_slope(own).exp().numpy(), np.ones((len(z), z.shape[1] - r))])
        return found, lambda covector: pull(covector) * slope
    return outer


def _by_law(conditioned: Conditioned, r: int) -> Base:
    """Readings as the emulator tells them, with the numbers of the levels behind them."""
    assert conditioned.density is not None
    emulator, law, scale = conditioned.density.base.emulator, conditioned.density.base.law, conditioned.readings

    def base(z: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        x = torch.from_numpy(z[:, :r].copy())
        with torch.no_grad():
            c, back = emulator.with_pull(x)
            k, levels = c.shape[1], c[:, :0] if law is None else x @ law.rows.mT + law.offset
            readings = c if scale is None else scale.inverse(c)
            slope = torch.ones_like(c) if scale is None else (-scale.log_slope(readings)).exp()

        def pull(covector: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                pulled = back(torch.from_numpy(covector[:, :k].copy()) * slope).numpy()
            pulled = pulled if law is None else pulled + covector[:, k:] @ law.rows.numpy()
            return np.hstack([pulled, np.zeros((len(z), z.shape[1] - r))])
        return torch.cat([readings, levels], 1).numpy(), pull
    return base
