r"""Samples of the finite element posterior itself, from amortised samples and the forward problem.

All that follows is exact in the limit of many solves, whatever the model is worth; the model makes it cheap.

1. *Weights.* Where the density of the amortised samples is known, samples z get the weight p(z | y) / q(z).
2. *Surrogate.* Otherwise a surrogate of the forward problem learns where the posterior is, round by round (`Learner`).
   Its samples get weights; where these fail, they are proposals that the forward problem accepts or refuses, with
   probability min(1, π(z') q(z) / (π(z) q(z'))), after moves that leave q as it is (surrogate transitions, Liu 2001,
   section 9.4.3; delayed acceptance, Christen and Fox 2005). The surrogate stays as it is from there on.
3. *Gradients.* Where hardly any proposal is accepted, Hamiltonian chains with the gradient of the finite element
   problem, if it has one.
"""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from firedrake import Ensemble
from scipy.stats import chi2

from fem_diffusion.certificate import Certificate
from fem_diffusion.checks import check_count, check_flag, check_path, check_seed, stream
from fem_diffusion.diffusion import MeasurementWarning
from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.fields.events import event
from fem_diffusion.progress import bar, tell
from fem_diffusion.reference.hmc import run_hmc
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.likelihood import Likelihood
from fem_diffusion.reference.point import descend
from fem_diffusion.reference.walk import diagnosed
from fem_diffusion.samples import Samples
from fem_diffusion.simulation.journal import Journal
from fem_diffusion.trust.proposals import Learner, Reach
from fem_diffusion.trust.start import Start, start_of
from fem_diffusion.trust.weights import resample, smoothed

if TYPE_CHECKING:
    from fem_diffusion.model.posterior import Posterior

__all__ = ["Corrected", "correct", "corrected"]

_LEAST = 100
# First solves, solves that are kept together, and chains; fewer solutions or draws of a chain than the last are none.
_PILOT, _BLOCK, _CHAINS, _FEWEST = 200, 50, 50, 4
# Rounds grow with the solves so far, so that their number stays small.
_GROWTH = 0.25
# Share of the solves after which a surrogate whose energy has a larger error than this will not serve, and number of
# them where there are gradients.
_LEARNING, _HOPE, _RIPE = 0.5, 2.5, 1500
# Derivatives at most, and latents for each solve that one of them costs, at least.
_SLOPES, _TELLING = 60, 2
# Weights are believed below this k-hat; those of amortised samples are worth their solves where so many are effective.
_KHAT, _AMORTISED = 0.7, 0.5
# Acceptance at which proposals go less far, and below which they are given up; steps in which that is found out, and
# solves a chain without which gradients are of no use.
_SELDOM, _NEVER, _TUNING, _WORTH = 0.3, 0.2, 6, 1000
# Misfit per reading from which samples are no start, and gradients, at least and at most, and share of the solves that
# a search may take.
_FAR, _FEWEST_STEPS, _SEARCH, _SHARE = 15.0, 30, 300, 0.2
# What is refused, and below which chance a measurement is in conflict with the problem.
_ESS, _RHAT, _CONFLICT = 100.0, 1.05, 1e-5
_UNSEEN = 16
# Hamiltonian chains, and standard deviation of a latent below which the measurement has told something of it.
_FEW, _TOLD = 8, 0.9
# Iterations of their warm-up, at least, and one in so many solves of a chain.
_SHORT, _LONG = 20, 50


@dataclass(frozen=True, eq=False)
class Corrected:
    """Latents (n, R) of the posterior, with how they were made; figures as for `Certificate`."""

    z: np.ndarray
    readings: np.ndarray
    method: str
    solves: int
    pulls: int
    ess: float
    khat: float | None = None
    rhat: float | None = None
    acceptance: float | None = None
    made: int = 0
    notes: tuple[str, ...] = ()
    weights: np.ndarray | None = None


class _Run:
    """One correction: budget, journal and progress."""

    def __init__(self, latent: LatentProblem, solves: int, seed: int, path: Path | None, progress: bool):
        self.latent, self.budget, self.seed, self.path = latent, solves, seed, path
        self.comm, self.solves, self.pulls = latent.everyone, 0, 0
        self.shown = bar(solves, "correct", progress and self.comm.rank == 0)
        self.journal = self.open("learning")

    @property
    def left(self) -> int:
        """Solves that may still be spent."""
        return self.budget - self.solves - self.pulls

    def open(self, name: str) -> Journal:
        """What keeps the solves of a phase."""
        return Journal(None if self.path is None else self.path / name, self.comm)

    def spend(self, solves: int, pulls: int = 0) -> None:
        """Count solves."""
        self.solves, self.pulls = self.solves + solves, self.pulls + pulls
        self.shown.update(solves + pulls)

    def solve(self, z: np.ndarray) -> np.ndarray:
        """Readings (B, k) at latents (B, R)."""
        readings = self.journal.ask(z, self.latent.readings)
        self.spend(len(z))
        return readings


def correct(posterior: "Posterior", solves: int = 2000, *, seed: int, draws: int | None = None,
            log_prior: Callable[[np.ndarray], np.ndarray] | None = None, path: str | os.PathLike | None = None,
            ensemble: Ensemble | None = None, progress: bool = True) -> Samples:
    """As `Posterior.correct`."""
    solves, seed = check_count(solves, "solves", least=_LEAST), check_seed(seed)
    draws = None if draws is None else check_count(draws, "draws")
    progress, path = check_flag(progress, "progress"), None if path is None else check_path(path, "path")
    began = time.monotonic()
    with event("correct"):
        start = start_of(posterior, log_prior, ensemble, seed)
        latent = start.latent
        found = corrected(latent, start, Likelihood(latent.problem, latent.y), solves, seed=seed, path=path,
                          progress=progress)
        rng = np.random.default_rng(stream(seed, "draws"))
        chosen = _chosen(found, draws, rng)
        samples = latent.samples(found.z[chosen], stream(seed, "tail"))
        looks = found.z[rng.permutation(chosen)[:_UNSEEN]]
        unseen, notes = latent.unseen(looks), found.notes + _conflict(latent, found)
        if np.isfinite(unseen):
            found = replace(found, solves=found.solves + 2 * len(looks))
    shift, ratio = _moved(start.z, found)
    certificate = Certificate(found.method, found.solves, found.pulls, found.made, found.ess, found.khat, found.rhat,
                              found.acceptance, shift, ratio, float(unseen), time.monotonic() - began, notes)
    tell(str(certificate), progress and latent.everyone.rank == 0)
    return replace(samples, certificate=certificate)


def corrected(latent: LatentProblem, start: Start, says: Likelihood, solves: int, *, seed: int,
              path: Path | None = None, progress: bool = False) -> Corrected:
    """Latents of the posterior from a start, by at most so many solves; SolveError where they do not suffice."""
    run = _Run(latent, solves, seed, path, progress)
    with run.shown:
        z = start.z[:min(_PILOT, solves // 2)]
        readings = run.solve(z)
        if start.log_density is not None:
            found = _weighted(run, start, z, readings)
            if found is not None:
                return _accepted(run, found)
        learner = Learner(start.log_prior, says, start.base, stream(seed, "proposals"))
        return _accepted(run, _learned(run, learner, z, readings))


def _energy(latent: LatentProblem, z: np.ndarray, readings: np.ndarray) -> np.ndarray:
    """Energies (B,) of solved latents (B, R); infinite where the solver fails."""
    energy = -latent.log_prior(z) - latent.log_likelihood(readings)
    return np.where(np.isfinite(energy), energy, np.inf)


def _weighted(run: _Run, start: Start, z: np.ndarray, readings: np.ndarray) -> Corrected | None:
    """By weights of amortised samples, of which the first ones are solved; None where they do not serve."""
    assert start.log_density is not None
    density = start.log_density(z)
    pilot = smoothed(_energy(run.latent, z, readings), -density)
    if pilot.khat > _KHAT or pilot.ess < _AMORTISED * len(z) or pilot.ess * run.budget < 2 * _ESS * len(z):
        return None
    more = start.more(run.left)
    z, density = np.vstack([z, more]), np.concatenate([density, start.log_density(more)])
    parts = np.split(more, np.arange(_BLOCK, len(more), _BLOCK))
    readings = np.vstack([readings, *(run.solve(part) for part in parts if len(part))])
    weights = smoothed(_energy(run.latent, z, readings), -density)
    return Corrected(z, readings, "weights", run.solves, run.pulls, weights.ess, weights.khat, made=len(z),
                     weights=weights.values)


def _learned(run: _Run, learner: Learner, z: np.ndarray, readings: np.ndarray) -> Corrected:
    """By weights of a surrogate's samples, round by round; by chains where they fail."""
    comm, latent = run.comm, run.latent

    def take() -> float:
        learner.add(z, readings)
        if len(learner.z) < _FEWEST:
            raise SolveError(f"The forward problem fails at the amortised samples ({latent.failure}): mend it, or train "
                             "on a prior for which it is solved.")
        learner.begin()
        return float(np.median(learner.misfit)) + latent.log_likelihood(latent.y[None])[0]
    if on_root(comm, take) > _FAR * len(latent.y):
        z, factor = _searched(run, learner, z)
        if factor is not None and latent.differentiable and run.left > _WORTH * _FEW:
            return _by_gradients(run, z[:_FEW], z.mean(axis=0), factor)
    points, kept, worth = z, [], True
    while run.left >= _BLOCK and worth:
        size = max(_BLOCK, _BLOCK * int(_GROWTH * run.solves / _BLOCK))
        start = np.resize(points, (size, z.shape[1]))
        points = on_root(comm, lambda: learner.propose(start))
        new = points[:run.left // _BLOCK * _BLOCK]
        found = np.concatenate([run.solve(new[i:i + _BLOCK]) for i in range(0, len(new), _BLOCK)])
        if on_root(comm, lambda: learner.judge(new, found)):
            kept.append((new, found, _energy(latent, new, found)))
        _linearise(run, learner, new, found)
        # With half of the solves a surrogate is on its way, or will never be; gradients need not wait so long.
        error = on_root(comm, lambda: learner.error)
        ripe = latent.differentiable and run.solves > _RIPE and run.left > _WORTH * _FEW
        worth = error < _HOPE or run.left > _LEARNING * run.budget and not ripe
    if kept and worth:
        z, readings, real = (np.concatenate(parts) for parts in zip(*kept))
        weights = on_root(comm, lambda: learner.weigh(real))
        rhat, share = on_root(comm, lambda: learner.mixing(points[:_CHAINS]))
        return Corrected(z, readings, "surrogate weights", run.solves, run.pulls, share * weights.ess, weights.khat, rhat,
                         made=len(z), weights=weights.values)
    return _chains(run, learner, points)


def _linearise(run: _Run, learner: Learner, z: np.ndarray, readings: np.ndarray) -> None:
    """Derivatives at some points (B, R) of a round, for as many solves, where they tell more than solves do."""
    latent, k = run.latent, readings.shape[1]
    count = min(max(1, len(z) // (1 + k)), _SLOPES - len(learner.places))
    count = run.comm.bcast(min(count, run.left // (1 + k)))
    if not latent.differentiable or _TELLING * (1 + k) > latent.r or count < 1:
        return

    def compute(places: np.ndarray) -> np.ndarray:
        rows = []
        for place in places:
            try:
                rows.append(latent.linearised(place)[1].ravel())
            except SolveError:
                rows.append(np.full(k * latent.r, np.nan))
        return np.array(rows)
    found = run.journal.ask(z[:count], compute).reshape(count, k, latent.r)
    run.spend(count, count * k)
    on_root(run.comm, lambda: learner.learn(z[:count], readings[:count], found))


def _searched(run: _Run, learner: Learner, z: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Points around the most probable one where gradients may be had for the solves; otherwise those given.

    Returns a factor (R, R) of their covariance, too.
    """
    latent = run.latent
    dear = len(latent.y) if latent.differentiable else 2 * latent.r
    cost = 2 if latent.differentiable else 1 + dear
    most = min(_SEARCH, int(_SHARE * run.left / cost))
    if most < _FEWEST_STEPS:
        return z, None

    def search(_: np.ndarray) -> np.ndarray:
        before = latent.solves, latent.pulls
        try:
            centre, factor = descend(latent, most)
            if 1 + dear <= _SHARE * run.left:
                factor = np.linalg.inv(np.linalg.cholesky(latent.expanded(centre)[1])).T
        except (SolveError, np.linalg.LinAlgError):
            centre, factor = np.full(latent.r, np.nan), np.zeros((latent.r, latent.r))
        return np.concatenate([centre, factor.ravel(), [latent.solves - before[0], latent.pulls - before[1]]])[None]
    answer = run.journal.ask(np.zeros((1, latent.r)), search)[0]
    run.spend(*(int(x) for x in answer[-2:]))
    centre, factor = answer[:latent.r], answer[latent.r:-2].reshape(latent.r, latent.r)
    if np.isnan(centre).any():
        return z, None
    rng = np.random.default_rng(stream(run.seed, "laplace"))
    z = centre + rng.standard_normal((min(_PILOT, run.left // 2), latent.r)) @ factor.T
    readings = run.solve(z)

    def take() -> None:
        # What is far from the measurement, and an emulator that led there, teach nothing of its neighbourhood.
        learner.forget()
        learner.add(z, readings)
        learner.begin()
    on_root(run.comm, take)
    return z, factor


def _chains(run: _Run, learner: Learner, z: np.ndarray) -> Corrected:
    """Chains with proposals by a surrogate that stays as it is, or with gradients where these are not accepted."""
    comm, latent, reach = run.comm, run.latent, Reach()
    run.journal = run.open(f"after-{run.solves}")
    start = np.resize(z, (_CHAINS, z.shape[1]))
    z, law = on_root(comm, lambda: learner.finish(start))
    readings = run.solve(z)
    real, rng = _energy(latent, z, readings), np.random.default_rng(stream(run.seed, "acceptance"))
    kept, read, energies, rates, tried = [], [], [], [], 0
    while run.left >= len(z):
        new, theirs = on_root(comm, lambda: learner.sample(z, reach))
        found = run.solve(new)
        ours = _energy(latent, new, found)
        # A chain that starts where the forward problem fails leaves at the first chance.
        gain = np.where(np.isfinite(ours), np.where(np.isfinite(real), real - law - ours + theirs, np.inf), -np.inf)
        accept = comm.bcast(np.log(rng.uniform(size=len(z))) < gain)
        z, readings = np.where(accept[:, None], new, z), np.where(accept[:, None], found, readings)
        real, law = np.where(accept, ours, real), np.where(accept, theirs, law)
        tried += 1
        if tried == 1 and accept.mean() < _NEVER and latent.differentiable and run.left > _WORTH * _FEW:
            return _by_gradients(run, *on_root(comm, lambda: learner.shape(z[:_FEW])))
        if tried <= _TUNING:
            reach = reach.shorter if accept.mean() < _SELDOM else reach
            continue
        for part, value in zip((kept, read, energies, rates), (z, readings, real, accept.mean())):
            part.append(value)
    if len(kept) < _FEWEST:
        raise SolveError(_refusal(run, "There were too few solves for chains", 4.0))
    chains = np.concatenate([np.stack(kept, axis=1), np.stack(energies, axis=1)[..., None]], axis=2)
    rhat, bulk, _ = diagnosed(chains)
    return Corrected(np.concatenate(kept), np.concatenate(read), "surrogate moves", run.solves, run.pulls,
                     float(bulk.min()), rhat=float(rhat.max()), acceptance=float(np.mean(rates)),
                     made=len(z) * len(kept))


def _by_gradients(run: _Run, start: np.ndarray, centre: np.ndarray, factor: np.ndarray) -> Corrected:
    """Hamiltonian chains from points (chains, R), with the gradient of the finite element problem.

    Centre (R,) and factor (R, R) are those of a law near the posterior.
    """
    latent, budget = run.latent, (run.left - _CHAINS) // 2
    before = latent.solves, latent.pulls
    chains = run_hmc(latent, start, centre=centre, factor=factor, seed=stream(run.seed, "gradients"),
                     warmup=max(_SHORT, budget // (_FEW * _LONG)), most=budget, budget=latent.solves + budget, exact=True,
                     path=None if run.path is None else run.path / f"gradients-{run.solves}.safetensors")
    run.spend(latent.solves - before[0], latent.pulls - before[1])
    draws = chains.draws.reshape(-1, latent.r)
    looks = draws[np.random.default_rng(stream(run.seed, "looks")).permutation(len(draws))[:_CHAINS]]
    return Corrected(draws, run.solve(looks), "gradient moves", run.solves, run.pulls, float(chains.bulk.min()),
                     rhat=float(chains.rhat.max()), acceptance=chains.acceptance, made=len(draws))


def _accepted(run: _Run, found: Corrected) -> Corrected:
    """What may be handed out; SolveError where it does not suffice, which says what would."""
    if found.khat is not None and not found.khat <= _KHAT:
        raise SolveError(_refusal(run, f"The weights say too little (Pareto k {found.khat:.2f}, where at most {_KHAT} "
                                       "will do)", 3.0))
    if found.rhat is not None and not found.rhat <= _RHAT:
        raise SolveError(_refusal(run, f"The chains have not converged: the largest R-hat is {found.rhat:.2f}, where "
                                       f"at most {_RHAT:g} will do", 2.0))
    if not found.ess >= _ESS:
        raise SolveError(_refusal(run, f"The effective sample size is {found.ess:.0f}, where {_ESS:.0f} are needed",
                                  1.3 * _ESS / max(found.ess, 5.0)))
    return found


def _refusal(run: _Run, why: str, factor: float) -> str:
    """Why there are no samples, and what would give some."""
    needed = int(np.ceil(factor * run.budget / 500)) * 500
    kept = "pass a path, so that a longer run goes on where this one ends" if run.path is None else (
        f"a run with the same path and seed goes on from what is kept in {run.path}")
    return (f"{why} after {run.solves:,} solves: the posterior is not corrected. Give about solves={needed:,}; {kept}. "
            "More or better pairs for the model, or a solver with a derivative, help as well.")


def _chosen(found: Corrected, draws: int | None, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the latents that become samples: by weight, or evenly spread over the chains."""
    if found.weights is not None:
        return resample(found.weights, len(found.z) if draws is None else draws, rng)
    n = len(found.z)
    return np.arange(n) if draws is None else (np.arange(draws) * n) // draws


def _conflict(latent: LatentProblem, found: Corrected) -> tuple[str, ...]:
    """What the residuals of the posterior say about problem and measurement, and a warning where they are no noise.

    Whitened residuals of a posterior draw have, over measurements, the law of the noise itself.
    """
    k = len(latent.y)
    squares = (latent.whitened(found.readings)**2).sum(axis=1)
    size = float(np.average(squares, weights=found.weights if len(squares) == len(found.z) else None))
    if min(chi2.sf(size, k), chi2.cdf(size, k)) > _CONFLICT:
        return ()
    note = (f"The residuals of the corrected samples are {np.sqrt(size / k):.2g} noise standard deviations, root mean "
            "square, which is not the law of the noise: the measurement is in conflict with the problem.")
    warnings.warn(f"{note} Check the noise, the units of the sensors and the forward problem.", MeasurementWarning,
                  stacklevel=4)
    return (note,)


def _moved(amortised: np.ndarray, found: Corrected) -> tuple[float, float]:
    """Largest shift of a mean in posterior standard deviations, and typical ratio of standard deviations."""
    weights = np.full(len(found.z), 1 / len(found.z)) if found.weights is None else found.weights
    mean = weights @ found.z
    std = np.sqrt(weights @ (found.z - mean)**2)
    before = amortised.std(axis=0)
    shift = np.abs(mean - amortised.mean(axis=0)) / std
    told = std < _TOLD
    ratio = (std / before)[told if told.any() else slice(None)]
    return float(shift.max()), float(np.exp(np.log(ratio).mean()))
