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

from fem_diffusion.certificate import GOOD_ESS, Certificate, are_rough
from fem_diffusion.checks import alike, check_count, check_flag, check_path, check_seed, stream
from fem_diffusion.citations import cite
from fem_diffusion.errors import SolveError
from fem_diffusion.fields.checks import check_ensemble
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.fields.events import event
from fem_diffusion.progress import tell
from fem_diffusion.reference.chains import ConvergenceWarning
from fem_diffusion.reference.hmc import run_hmc
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.likelihood import Likelihood
from fem_diffusion.reference.looks import conflict, unseen
from fem_diffusion.reference.walk import diagnosed
from fem_diffusion.samples import Samples
from fem_diffusion.trust.balance import balanced, cloud_size
from fem_diffusion.trust.proposals import Learner, Reach
from fem_diffusion.trust.search import PILOT, Run, linearise, searched
from fem_diffusion.trust.start import Start, start_of
from fem_diffusion.trust.weights import resample, smoothed

if TYPE_CHECKING:
    from fem_diffusion.model.posterior import Posterior

__all__ = ["Corrected", "correct", "corrected"]

_LEAST = 200
# Solves that are kept together, and chains; fewer solutions or draws of a chain than the last are none.
_BLOCK, _CHAINS, _FEWEST = 50, 50, 4
# Amortised samples that are drawn together.
_MANY = 500
# Rounds grow with the solves so far, so that their number stays small.
_GROWTH = 0.25
# Rounds after which a temperature above that of the start, and above this, says that no surrogate holds.
_ROUNDS, _HOT = 4, 10.0
# Share of the solves after which a surrogate whose energy has a larger error than this will not serve, and number of
# them where there are gradients.
_LEARNING, _HOPE, _RIPE = 0.5, 2.5, 1500
# Weights are believed below this k-hat; those of amortised samples are worth their solves where so many are effective.
_KHAT, _AMORTISED = 0.7, 0.5
# Acceptance at which proposals go less far, and below which they are given up; steps in which that is found out, and
# solves a chain without which gradients are of no use, and with which they are the better choice.
_SELDOM, _NEVER, _TUNING, _WORTH, _AMPLE = 0.3, 0.2, 6, 200, 1000
# Misfit per reading from which samples are no start.
_FAR = 15.0
# What is refused.
_ESS, _RHAT = 30.0, 1.2
# Samples, of two solves each, that show what modes left out add to readings.
_UNSEEN = 16
# Hamiltonian chains, and standard deviation of a latent below which the measurement has told something of it.
_FEW, _TOLD = 8, 0.9
# Iterations of a warm-up, at least.
_WARM = 20


@dataclass(frozen=True, eq=False)
class Corrected:
    """Latents (n, R) of the posterior, with how they were made; figures as for `Certificate`.

    Where they have weights (n,), `near` are those of a law near the posterior, of which the cloud (N, R) is.
    """

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
    near: np.ndarray | None = None
    cloud: np.ndarray | None = None


def correct(posterior: "Posterior", solves: int = 2000, *, seed: int, draws: int | None = None,
            log_prior: Callable[[np.ndarray], np.ndarray] | None = None, path: str | os.PathLike | None = None,
            ensemble: Ensemble | None = None, progress: bool = True) -> Samples:
    """As `Posterior.correct`."""
    everyone = posterior.problem.comm if ensemble is None else check_ensemble(ensemble).global_comm
    solves, seed, draws = alike(everyone, lambda: {
        "solves": check_count(solves, "solves", least=_LEAST), "seed": check_seed(seed),
        "draws": None if draws is None else check_count(draws, "draws")})
    progress, path = check_flag(progress, "progress"), None if path is None else check_path(path, "path")
    began = time.monotonic()
    with event("correct"):
        start = start_of(posterior, log_prior, ensemble, seed)
        latent = start.latent
        spare = 2 * min(_UNSEEN, draws or _UNSEEN) + 2 * latent.differentiable if latent.basis.standard_prior else 0
        found = corrected(latent, start, Likelihood(latent.problem, latent.y), solves - spare, seed=seed, path=path,
                          progress=progress)
        if found.weights is not None:
            cite("Vehtari2024")
        if found.weights is not None and found.near is not None and found.cloud is not None:
            found = replace(found, weights=balanced(latent, found.z, found.weights, found.near, found.cloud))
        rng = np.random.default_rng(stream(seed, "draws"))
        chosen = _chosen(found, draws, rng)
        samples = latent.samples(found.z[chosen], stream(seed, "tail"))
        before = latent.solves, latent.pulls
        left, _ = unseen(latent, found.z[rng.permutation(chosen)[:_UNSEEN]])
        weights = found.weights if len(found.readings) == len(found.z) else None
        told = conflict(latent, found.readings, "corrected samples", weights,
                        np.average(found.z, axis=0, weights=found.weights))
        notes = told.notes + found.notes
        if spare and np.isnan(left):
            notes += ("What modes that are drawn from the prior add to readings is not known, because the forward "
                      f"problem fails with them ({latent.failure}).",)
        found = replace(found, solves=found.solves + latent.solves - before[0],
                        pulls=found.pulls + latent.pulls - before[1])
    shift, ratio = _moved(start.z, found)
    certificate = Certificate(found.method, found.solves, found.pulls, found.made, found.ess, found.khat, found.rhat,
                              found.acceptance, shift, ratio, left, time.monotonic() - began, notes, told.light)
    tell(str(certificate), progress and latent.everyone.rank == 0)
    return replace(samples, certificate=certificate)


def corrected(latent: LatentProblem, start: Start, says: Likelihood, solves: int, *, seed: int,
              path: Path | None = None, progress: bool = False) -> Corrected:
    """Latents of the posterior from a start, by at most so many solves; SolveError where they do not suffice."""
    run = Run(latent, solves, seed, path, progress)
    with run.shown:
        z = start.z[:min(PILOT, solves // 2 // _BLOCK * _BLOCK)]
        readings = run.solve_all(z, _BLOCK)
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


def _weighted(run: Run, start: Start, z: np.ndarray, readings: np.ndarray) -> Corrected | None:
    """By weights of amortised samples, of which the first ones are solved; None where they do not serve."""
    assert start.log_density is not None
    density = start.log_density(z)
    pilot = smoothed(_energy(run.latent, z, readings), -density)
    if pilot.khat > _KHAT or pilot.ess < _AMORTISED * len(z) or pilot.ess * run.budget < 2 * GOOD_ESS * len(z):
        return None
    while run.left:
        # As many each time, whatever is left: so a longer run asks the same first.
        more = start.more(_MANY)[:run.left]
        z, density = np.vstack([z, more]), np.concatenate([density, start.log_density(more)])
        readings = np.vstack([readings, run.solve_all(more, _BLOCK)])
    weights = smoothed(_energy(run.latent, z, readings), -density)
    many = cloud_size(len(z))
    return Corrected(z, readings, "weights", run.solves, run.pulls, weights.ess, weights.khat, made=len(z),
                     weights=weights.values, near=np.full(len(z), 1 / len(z)), cloud=start.more(many) if many else None)


def _learned(run: Run, learner: Learner, z: np.ndarray, readings: np.ndarray) -> Corrected:
    """By weights of a surrogate's samples, round by round; by chains where they fail."""
    comm, latent = run.comm, run.latent

    # What the density is at best, at the median of unknown levels of noise.
    at = np.zeros((1, readings.shape[1]))
    at[:, :len(latent.y)] = latent.y
    best = latent.log_likelihood(at)[0]

    def take() -> float:
        learner.add(z, readings)
        if len(learner.z) < _FEWEST:
            raise SolveError(f"The forward problem fails at the amortised samples ({latent.failure}): mend it, or "
                             "train on a prior for which it is solved.")
        learner.begin()
        return float(np.median(learner.misfit)) + best
    around = None
    if on_root(comm, take) > _FAR * len(latent.y):
        around = searched(run, learner, z)
    if around is not None:
        z = around[0]
        if latent.differentiable and run.left > _AMPLE * _FEW:
            return _by_gradients(run, *around)
    points, kept, worth, rounds, first = z, [], True, 0, on_root(comm, lambda: learner.temper)
    while run.left >= _BLOCK and worth:
        size = max(_BLOCK, _BLOCK * int(_GROWTH * run.solves / _BLOCK))
        start = np.resize(points, (size, z.shape[1]))
        points = on_root(comm, lambda: learner.propose(start))
        new = points[:run.left // _BLOCK * _BLOCK]
        found = run.solve_all(new, _BLOCK)
        if on_root(comm, lambda: learner.judge(new, found)):
            kept.append((new, found, _energy(latent, new, found)))
        linearise(run, learner, new, found)
        rounds += 1
        if rounds == _ROUNDS and latent.differentiable and on_root(comm, lambda: learner.temper) > max(first, _HOT):
            return _by_gradients(run, *(around or on_root(comm, lambda: learner.shape(points))))
        # With half of the solves a surrogate is on its way, or will never be; gradients need not wait so long.
        ripe = latent.differentiable and run.solves > _RIPE and run.left > _AMPLE * _FEW
        worth = on_root(comm, lambda: learner.error) < _HOPE or run.left > _LEARNING * run.budget and not ripe
    if kept and worth:
        z, readings, real = (np.concatenate(parts) for parts in zip(*kept))
        weights, near = on_root(comm, lambda: learner.weigh(real))
        rhat, share = on_root(comm, lambda: learner.mixing(points[:_CHAINS]))
        many = cloud_size(len(z))
        cloud = on_root(comm, lambda: learner.cloud(many, near.values, run.watched)) if many else None
        return Corrected(z, readings, "surrogate weights", run.solves, run.pulls, share * weights.ess, weights.khat,
                         rhat, made=len(z), weights=weights.values, near=near.values, cloud=cloud)
    return _chains(run, learner, points)


def _chains(run: Run, learner: Learner, z: np.ndarray) -> Corrected:
    """Chains with proposals by a surrogate that stays as it is, or with gradients where these are not accepted."""
    comm, latent, reach = run.comm, run.latent, Reach()
    if run.left < _CHAINS:
        raise SolveError(_refusal(run, "There were too few solves for chains", 4.0))
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
        with np.errstate(invalid="ignore"):
            gain = np.where(np.isfinite(real), real - law - ours + theirs, np.inf)
        gain = np.where(np.isfinite(ours), gain, -np.inf)
        accept = comm.bcast(np.log(rng.uniform(size=len(z))) < gain)
        z, readings = np.where(accept[:, None], new, z), np.where(accept[:, None], found, readings)
        real, law = np.where(accept, ours, real), np.where(accept, theirs, law)
        tried += 1
        if tried == 1 and accept.mean() < _NEVER and latent.differentiable and run.left > _WORTH * _FEW:
            return _by_gradients(run, *on_root(comm, lambda: learner.shape(z)))
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


def _by_gradients(run: Run, z: np.ndarray, centre: np.ndarray, factor: np.ndarray) -> Corrected:
    """Hamiltonian chains from points (n, R), with the gradient of the finite element problem."""
    latent, budget = run.latent, run.left - _CHAINS
    if budget < _WORTH * _FEW:
        raise SolveError(_refusal(run, "No surrogate holds where the posterior is, and there were too few solves for "
                                       "chains with gradients", 1 + _WORTH * _FEW * 3 / run.budget))
    # One of few lengths, so that a somewhat longer run goes on where this one ends.
    warmup = int(_WARM * 2**(round(2 * np.log2(max(budget / (_FEW * 30 * _WARM), 1))) / 2))
    name = f"gradients-{run.solves}-{warmup}.safetensors"
    chains = run_hmc(latent, z[:_FEW], centre=centre, factor=factor, seed=stream(run.seed, "gradients"),
                     warmup=warmup, most=budget, budget=budget, exact=True,
                     path=None if run.path is None else run.path / name, progress=run.watched)
    run.spend(chains.solves, chains.pulls)
    draws = chains.draws.reshape(-1, latent.r)
    looks = draws[np.random.default_rng(stream(run.seed, "looks")).permutation(len(draws))[:_CHAINS]]
    return Corrected(draws, run.solve(looks), "gradient moves", run.solves, run.pulls, float(chains.bulk.min()),
                     rhat=float(chains.rhat.max()), acceptance=chains.acceptance, made=len(draws))


def _accepted(run: Run, found: Corrected) -> Corrected:
    """What may be handed out; SolveError where it does not suffice, which says what would."""
    if np.isnan(found.ess) or found.rhat is not None and np.isnan(found.rhat):
        raise SolveError(_refusal(run, "There were too few solves for chains", 4.0))
    if found.khat is not None and not found.khat <= _KHAT:
        raise SolveError(_refusal(run, f"The weights say too little (Pareto k {found.khat:.2f}, where at most {_KHAT} "
                                       "will do)", 3.0))
    if found.rhat is not None and not found.rhat <= _RHAT:
        raise SolveError(_refusal(run, f"The chains have not converged: the largest R-hat is {found.rhat:.2f}, where "
                                       f"at most {_RHAT:g} will do", 2.0))
    if not found.ess >= _ESS:
        raise SolveError(_refusal(run, f"The effective sample size is {found.ess:.0f}, where {_ESS:.0f} are needed",
                                  1.3 * _ESS / max(found.ess, 5.0)))
    if not are_rough(found.ess, found.rhat):
        return found
    note = (f"The samples are rough: {found.ess:.0f} effective ones leave an error of {found.ess**-0.5:.0%} of a "
            "posterior standard deviation in a mean; more solves give better ones.")
    warnings.warn(note, ConvergenceWarning, stacklevel=5)
    return replace(found, notes=(*found.notes, note))


def _refusal(run: Run, why: str, factor: float) -> str:
    """Why there are no samples, and what would give some."""
    needed = int(np.ceil(factor * run.budget / 500)) * 500
    kept = "pass a path, so that a longer run goes on where this one ends" if run.path is None else (
        f"a run with the same path and seed goes on from what is kept in {run.path}")
    return (f"{why} after {run.solves:,} solves: the posterior is not corrected. Give about solves={needed:,}; {kept}. "
            "More or better pairs for the model, or a solver with a derivative, help as well.")


def _chosen(found: Corrected, draws: int | None, rng: np.random.Generator) -> np.ndarray:
    """Numbers of the latents that become samples: by weight, or any of the chains'."""
    n = len(found.z)
    if found.weights is not None:
        return resample(found.weights, n if draws is None else draws, rng)
    if draws is None:
        return np.arange(n)
    whole = np.tile(np.arange(n), draws // n)
    return np.concatenate([whole, rng.permutation(n)[:draws - len(whole)]])


def _moved(amortised: np.ndarray, found: Corrected) -> tuple[float, float]:
    """Largest shift of a mean in posterior standard deviations, and typical ratio of standard deviations."""
    weights = np.full(len(found.z), 1 / len(found.z)) if found.weights is None else found.weights
    mean = weights @ found.z
    std = np.sqrt(weights @ (found.z - mean)**2)
    before = amortised.std(axis=0)
    shift = np.abs(mean - amortised.mean(axis=0)) / std
    told = std < _TOLD
    told &= before > 0
    ratio = (std / before)[told] if told.any() else np.ones(1)
    return float(shift.max()), float(np.exp(np.log(ratio).mean()))
