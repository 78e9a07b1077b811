r"""Rounds for one measurement: simulations where its posterior is, and a model that is retrained with them.

Where latents are standard normal and the law of the noise is known, the posterior needs no pairs from the prior: the
law of the latents is N(0, I) whatever is simulated, and the emulator is a regression, for which any latents will do.
New pairs at samples of the present posterior, some of them pulled away from its mean, count for half in its training,
and its error, which counts as noise, is that at held-out samples of the last round.

Otherwise pairs have to be draws of the joint law, and rounds truncate the prior (Deistler et al. 2022,
arXiv:2210.04815): with the prior restricted to a region that holds the posterior of the measurement, that posterior
stays as it is. The region is the intersection of an ellipsoid around the samples of each round; draws of the prior
inside are simulated, all pairs inside train the next model, those of former rounds and of the prior included.
"""

import contextlib
import os
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from firedrake import Ensemble
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from fem_diffusion.checks import (
    alike, check_count, check_flag, check_kind, check_options, check_path, check_seed, stream, together,
)
from fem_diffusion.diffusion import (
    NETWORKS, Conditioned, Denoiser, GaussianBase, GaussianNoise, History, MeasurementWarning, Noise, TrainingOptions,
    fit_denoiser, fit_emulator, sample_latents,
)
from fem_diffusion.diffusion.base.emulator import roots
from fem_diffusion.diffusion.base.fitted import check_base, law
from fem_diffusion.diffusion.base.gaussian import UPDATES
from fem_diffusion.diffusion.maps.noise import carried
from fem_diffusion.diffusion.network import name_of
from fem_diffusion.diffusion.training.scales import Scales
from fem_diffusion.errors import DataError, InputError, SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.checks import check_ensemble
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.fields.geometry import field_geometry
from fem_diffusion.forward.callable import CallableForward
from fem_diffusion.model.fit import known_noise, sloped
from fem_diffusion.model.model import Model
from fem_diffusion.model.readings import at_hand
from fem_diffusion.observation.linear import Observation
from fem_diffusion.problem import InverseProblem
from fem_diffusion.progress import bar, tell
from fem_diffusion.simulation.data_set import DataSet
from fem_diffusion.simulation.journal import Journal
from fem_diffusion.simulation.solves import Job, Solved

__all__ = ["refine"]

# Fewest simulations of a round; share of them that judge; how far others are pulled from the mean, at most.
_FEWEST, _HELD_OUT, _WIDER = 20, 0.25, 1.5
# Error of an emulator, in standard deviations of the noise, that widens the posterior too much.
_ROUGH = 0.5
# Samples in a region, and how much wider it is than the farthest of them.
_SAMPLES, _MARGIN = 2000, 1.2
# Solves at once, fewer of a plain function; draws of a prior of which a region may hold few; sweeps of a walk in it.
_BLOCK, _FEW, _DRAWN, _TRIES, _SWEEPS = 64, 8, 4096, 500, 50


def refine(model: Model, data: DataSet, y: ArrayLike, n: int, *, seed: int, rounds: int = 2,
           observation: Observation | None = None, noise: GaussianNoise | ArrayLike | None = None,
           options: TrainingOptions = TrainingOptions(), path: str | os.PathLike | None = None,
           ensemble: Ensemble | None = None, progress: bool = True) -> tuple[Model, DataSet]:
    """A model for one measurement, from n more simulations where its posterior is (collective).

    Parameters
    ----------
    model, data : Model, DataSet
        To begin with, and the pairs that it was trained on, or what `refine` has returned. Where they have derivatives,
        new ones get theirs, by k adjoint solves each.
    y : array_like of shape (k,)
        The measurement.
    n, rounds : int
        Simulations in all, at least 20 a round, and rounds that share them: each is where the last model puts the
        posterior.
    seed : int
        Of all draws.
    observation, noise : Observation, GaussianNoise
        Of the measurement, for a model of a family, as for `Model.condition`.
    options, progress : TrainingOptions, bool
        As for `fit`.
    path : path, optional
        A folder that keeps draws and solves: the same call goes on where it was, and trains anew.
    ensemble : firedrake.Ensemble, optional
        Shares out the solves over its members, each with a model on a mesh of its own communicator.

    Returns
    -------
    Model, DataSet
        Of fixed sensors, and for no other measurement; and the pairs with the new ones behind them. Simulations that
        have failed are left out.

    Raises
    ------
    InputError, DataError, SolveError
        If an argument is out of range, the data are of another problem, more than half of a round's simulations fail,
        too few pairs are left in a region, or training fails.
    FileError
        If the folder is of another run, or cannot be written.

    Warns
    -----
    MeasurementWarning
        If the emulator still errs by more than half a standard deviation of the noise where the posterior is.
    """
    start = time.perf_counter()
    check_kind(model, "model", Model, "what fit or refine returned")
    check_kind(data, "data", DataSet, "the pairs of its training")
    check_options(options, TrainingOptions)
    everyone = model.problem.comm if ensemble is None else check_ensemble(ensemble).global_comm
    n, rounds, seed = alike(everyone, lambda: {
        "n": check_count(n), "rounds": check_count(rounds, "rounds"), "seed": check_seed(seed)})
    progress, path = check_flag(progress, "progress"), None if path is None else check_path(path, "path")
    if n < _FEWEST * rounds:
        raise InputError(f"n is {n} for {rounds} rounds: give at least {_FEWEST} simulations a round.")
    with warnings.catch_warnings():
        # That the measurement is far from the training is why more is simulated.
        warnings.simplefilter("ignore", MeasurementWarning)
        posterior = replace(model, near=None).condition(y, observation, noise)
        model, data = (model, data) if model.problem.family else _at_hand(model, data, y)
    problem, y = posterior.problem, posterior.y
    if model.problem.family and isinstance(problem.noise, GaussianNoise) and not problem.noise.constant:
        # As the model of the family has it: the reading stands for the value without noise.
        R = problem.noise.covariance(torch.from_numpy(y)[None])
        problem = replace(problem, noise=GaussianNoise(covariance=R))
    if model.problem.family and isinstance(problem.observation, Observation):
        if data.states is None:
            raise DataError("A model of a family is refined with the states of its training: pass its data set.")
        data = replace(data, readings=problem.observation.apply(data.states), states=None)
    if problem.levels:
        raise InputError("The noise has an unknown level, which refine does not know: take posterior.correct(...).")
    pairs = _Pairs(problem, model.basis, data, len(data) - data.chosen, path, ensemble)
    show, first = progress and everyone.rank == 0, model.denoiser
    told = first.known and first.latents is None and first.base.learnt is None
    run = _emulated if told and (first.base.law is None or first.network is None) else _truncated
    denoiser, history = run(pairs, posterior.conditioned, first, y,
                            [len(part) for part in np.array_split(np.arange(n), rounds)], seed, options, show)
    seen = torch.from_numpy(pairs.data.readings[-min(len(pairs.data), n):]).double()
    fixed = model.seen is not None and not model.problem.family
    found = replace(model, problem=problem, denoiser=denoiser, history=history, states=None, range=None, near=y,
                    seen=torch.cat([model.seen, seen]) if fixed and model.seen is not None else seen)
    tell(f"refine: {pairs.solves:,} solves in {rounds} rounds, {found.summary}; {time.perf_counter() - start:.0f} s",
         show)
    return found, pairs.data


def _at_hand(model: Model, data: DataSet, y: ArrayLike) -> tuple[Model, DataSet]:
    """Model and pairs of the sensors that have read, as often as they have, for a measurement by fixed ones."""
    problem, _, index = at_hand(model.problem, np.asarray(y, dtype=float))
    if problem is model.problem:
        return model, data
    slopes = data.derivatives
    return model.of_sensors(problem, index), replace(
        data, readings=data.readings[:, index], derivatives=None if slopes is None else slopes[:, index])


class _Pairs:
    """Pairs of a problem in latents: those of the prior first, then those that are chosen.

    Draws of the posterior and solves are kept in a folder, where there is one: with them a run that goes on asks for
    the same solves, though its training may have turned out a little otherwise.
    """

    def __init__(self, problem: InverseProblem, basis: ModalBasis, data: DataSet, drawn: int, path: Path | None,
                 ensemble: Ensemble | None):
        self.problem, self.basis, self.data, self.drawn, self.solves = problem, basis, data, drawn, 0
        self.everyone = problem.comm if ensemble is None else ensemble.global_comm
        # Who else has part of the solves.
        self._beside = None if ensemble is None else ensemble.ensemble_comm
        self._draws, self._answers = (Journal(None if path is None else path / name, self.everyone)
                                      for name in ("draws", "solves"))
        # A plain function gains nothing from blocks, and the fewer there are the less is lost.
        block = _FEW if isinstance(problem.forward, CallableForward) else _BLOCK
        self._reason, self._block = "", block * (1 if self._beside is None else self._beside.size)
        self._k = data.readings.shape[1]
        self._serves = data.derivatives is not None and known_noise(problem.noise, self.c) is not None
        self._encode()

    def _encode(self) -> None:
        """Latents (n, r) of all pairs, and derivatives of their readings (n, k, r), where they are there and serve."""
        self.z = torch.from_numpy(self.basis.encode(self.data.coefficients))
        self.slopes = sloped(self.problem, self.data, self.basis) if self._serves else None

    @property
    def c(self) -> torch.Tensor:
        """Readings (n, k)."""
        return torch.from_numpy(np.asarray(self.data.readings, dtype=float))

    def simulate(self, z: np.ndarray | None, fields: np.ndarray | None, seed: int, show: bool) -> int:
        """Solve for latents z (m, r), or for fields; add the pairs; how many there are of them."""
        problem, data = self.problem, self.data
        if fields is None and z is not None:
            fields = self.basis.decode(z, stream(seed, "tail") if self.basis.standard_prior else None)
        assert fields is not None
        latents, found = self.basis.encode(fields), []
        basis = None if self.slopes is None else data.basis
        with contextlib.closing(Job(problem, seed, False, basis)) as job, bar(len(fields), "refine", show) as shown:
            for first in range(0, len(fields), self._block):
                part = latents[first:first + self._block]
                found.append(self._answers.ask(part, lambda some: self._solved(
                    job, fields[first:first + len(some)])))
                shown.update(len(part))
        found = np.concatenate(found)
        readings, slopes = found[:, :self._k], found[:, self._k:]
        self.solves += len(fields)
        rows = np.flatnonzero(np.isfinite(readings).all(axis=1))
        if len(rows) < len(fields) / 2:
            raise SolveError(f"The forward problem failed for {len(fields) - len(rows)} of {len(fields)} samples of "
                             f"the posterior; the first: {self._reason or 'in a former run'}. Mend the solver, or "
                             "simulate more pairs before the first round.")
        known = None if basis is None or data.derivatives is None else np.concatenate(
            [data.derivatives, slopes[rows].reshape(-1, *data.derivatives.shape[1:])])
        self.data = DataSet(np.concatenate([data.coefficients, fields[rows]]),
                            np.concatenate([data.readings, readings[rows]]), None, data.skipped,
                            data.chosen + len(rows), known, basis)
        self._encode()
        return len(rows)

    def _solved(self, job: Job, fields: np.ndarray) -> np.ndarray:
        """Readings (B, k) of fields (B, n_owned) before transforms, NaN where solves fail; an ensemble shares them.

        Where derivatives are kept, they come behind: (B, k + k R).
        """
        member, members = (0, 1) if self._beside is None else (self._beside.rank, self._beside.size)
        mine, found = range(member, len(fields), members), Solved()
        together(self.everyone, lambda: job.solve(fields, mine, found, lambda found: False))
        results = {i: row if slope is None else np.concatenate([row, slope.ravel()])
                   for i, (_, row, slope) in found.results.items()}
        for others, failed in [(results, found.failed)] if self._beside is None else self._beside.allgather(
                (results, found.failed)):
            results |= others
            self._reason = self._reason or next(iter(failed.values()), "")
        derivatives = None if self.slopes is None else self.data.derivatives
        nothing = np.full(self._k + (0 if derivatives is None else derivatives[0].size), np.nan)
        return np.array([results.get(i, nothing) for i in range(len(fields))])

    def posterior(self, conditioned: Conditioned, n: int, seed: int) -> np.ndarray:
        """Latents (n, r) of samples of the present posterior."""
        def draw(_: np.ndarray) -> np.ndarray:
            return on_root(self.everyone, lambda: sample_latents(
                conditioned, n, seed=seed, progress=False)[0].numpy().reshape(1, -1))
        return self._draws.ask(np.array([[n, seed % 2**32]]), draw).reshape(n, -1)


def _emulated(pairs: _Pairs, conditioned: Conditioned, first: Denoiser, y: np.ndarray, sizes: list[int], seed: int,
              options: TrainingOptions, show: bool) -> tuple[Denoiser, History]:
    """Rounds for standard normal latents and noise of a known law: an emulator that is right near the measurement."""
    denoiser, history, error, of_noise = first, History(), 0.0, first.base.law
    scales, noise = Scales(readings=first.readings), cast(Noise, carried(pairs.problem.noise, first.readings))
    for number, size in enumerate(sizes):
        rng, judges = np.random.default_rng([seed, number]), max(1, round(_HELD_OUT * size))
        z = pairs.posterior(conditioned, size, stream(seed, f"round {number}"))
        pull = np.where(np.arange(size) < size - judges, rng.uniform(1.0, _WIDER, size), 1.0)
        before, mean = len(pairs.z), z.mean(axis=0)
        added = pairs.simulate(mean + pull[:, None] * (z - mean), None, stream(seed, f"solves {number}"), show)
        apart = min(judges, added // 2)

        def train() -> GaussianBase:
            z, c, slopes = scales.pairs(pairs.z, pairs.c, pairs.slopes)
            covariance, end = noise.covariance(c[pairs.drawn:]), len(z) - apart   # of noise as it is here
            times = max(1, pairs.drawn // max(1, end - pairs.drawn))   # new ones count for half, however few they are
            index = torch.cat([torch.arange(pairs.drawn), torch.arange(pairs.drawn, end).repeat(times)])
            parts = tuple(x[end:] for x in (z, c, slopes) if x is not None)
            emulator, _ = fit_emulator(z[index], c[index], covariance, held_out=parts, progress=show,
                                       slopes=None if slopes is None else slopes[index],
                                       options=replace(options, seed=options.seed + number))
            emulator.residual = emulator.residual + (0 if of_noise else covariance)
            here = of_noise and replace(of_noise, covariance=covariance)
            base = GaussianBase(*law(z[:pairs.drawn], True), emulator, 1 if emulator.affine else UPDATES, here)
            return base if here else check_base(base)
        base = on_root(pairs.everyone, train)
        denoiser = Denoiser(base, known=True, readings=first.readings)
        error = _error(base, noise.covariance(scales.pairs(pairs.z, pairs.c)[1][pairs.drawn:]))
        tell(f"refine: round {number + 1}: {added} of {size} solves in {before + added:,} pairs, the emulator leaves "
             f"up to {error:.2g} noise standard deviations of a reading at the posterior", show)
        conditioned = denoiser.at(torch.from_numpy(y)[None])
    if error > _ROUGH:
        warnings.warn(f"After {len(sizes)} rounds the emulator still leaves up to {error:.2g} standard deviations of "
                      "the noise of a reading where it puts the posterior, which is wide for that: raise n or rounds, "
                      "take more modes, or correct the samples with the solver.", MeasurementWarning, stacklevel=3)
    if first.network is not None:
        # Where a network was worth it, samples start from one again: it learns from draws of the prior alone.
        name = name_of(first.network) or "latents"
        name = "latents" if NETWORKS[name].families else name
        geometry = field_geometry(pairs.basis) if NETWORKS[name].mesh else None
        denoiser, history = on_root(pairs.everyone, lambda: fit_denoiser(
            pairs.z[:pairs.drawn], pairs.c[:pairs.drawn], noise, network=name, base=denoiser.base, standard_prior=True,
            options=options, geometry=geometry, progress=show))
    return denoiser, history


def _error(base: GaussianBase, covariance: torch.Tensor) -> float:
    """Largest error of an emulator in any combination of readings, in standard deviations of its noise."""
    whitener = roots(covariance)[0]
    return float(torch.linalg.eigvalsh(whitener @ (base.scatter - covariance) @ whitener.T)[-1].clamp(min=0).sqrt())


@dataclass(frozen=True, eq=False)
class _Ellipsoid:
    """|W (z - centre)| <= radius."""

    centre: np.ndarray
    W: np.ndarray
    radius: float

    @classmethod
    def around(cls, z: np.ndarray) -> "_Ellipsoid":
        """One that holds samples (m, r) with a margin."""
        centre = z.mean(axis=0)
        root = np.linalg.cholesky(np.atleast_2d(np.cov(z.T)))
        W = np.linalg.inv(root)
        return cls(centre, W, _MARGIN * float(np.linalg.norm((z - centre) @ W.T, axis=1).max()))

    def holds(self, z: np.ndarray) -> np.ndarray:
        """Whether latents (m, r) are inside."""
        return np.linalg.norm((z - self.centre) @ self.W.T, axis=1) <= self.radius

    def chord(self, z: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where lines z + t direction (m, r each) enter and leave, (m,) each, for z inside."""
        a, d = (z - self.centre) @ self.W.T, direction @ self.W.T
        square, half = (d**2).sum(axis=1), (a * d).sum(axis=1)
        root = np.sqrt(np.maximum(half**2 - square * ((a**2).sum(axis=1) - self.radius**2), 0.0))
        return (-half - root) / square, (-half + root) / square


def _truncated(pairs: _Pairs, conditioned: Conditioned, first: Denoiser, y: np.ndarray, sizes: list[int], seed: int,
               options: TrainingOptions, show: bool) -> tuple[Denoiser, History]:
    """Rounds for any prior and noise: a model of the prior restricted to where the posterior is."""
    region, denoiser, history = [], first, History()
    for number, size in enumerate(sizes):
        samples = pairs.posterior(conditioned, _SAMPLES, stream(seed, f"round {number}"))
        region = [*region, _Ellipsoid.around(samples)]
        start = pairs.z.numpy()
        start = start[_inside(region, start)]
        z, fields = _from_prior(pairs, region, size, stream(seed, f"draws {number}"),
                                start if len(start) else samples[_inside(region, samples)])
        added = pairs.simulate(z, fields, stream(seed, f"solves {number}"), show)
        index = torch.from_numpy(np.flatnonzero(_inside(region, pairs.z.numpy())))
        tell(f"refine: round {number + 1}: {added} of {size} solves, {len(index):,} of {len(pairs.z):,} pairs in the "
             "region of the posterior", show)
        if len(index) <= pairs.z.shape[1] + 1:
            raise DataError(f"{len(index)} pairs are in the region of the posterior, too few for {pairs.z.shape[1]} "
                            "latents: raise n, or take fewer modes.")

        def train() -> tuple[Denoiser, History]:
            return fit_denoiser(pairs.z[index], pairs.c[index], pairs.problem.noise, progress=show,
                                slopes=None if pairs.slopes is None else pairs.slopes[index],
                                options=replace(options, seed=options.seed + number))
        denoiser, history = on_root(pairs.everyone, train)
        conditioned = denoiser.at(torch.from_numpy(y)[None])
    return denoiser, history


def _inside(region: list[_Ellipsoid], z: np.ndarray) -> np.ndarray:
    """Whether latents (m, r) are in all ellipsoids."""
    return np.all([part.holds(z) for part in region], axis=0)


def _from_prior(pairs: _Pairs, region: list[_Ellipsoid], n: int, seed: int,
                start: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Draws of the prior inside a region: latents (n, r) where they are standard normal, or fields (n, n_owned)."""
    rng = np.random.default_rng(seed)
    if pairs.basis.standard_prior:
        return on_root(pairs.everyone, lambda: _walk(region, start[rng.integers(len(start), size=n)], rng)), None
    found, core = [], pairs.problem.prior.core
    for number in range(_TRIES):
        fields = np.array(core.sample_many(_DRAWN, stream(seed, f"part {number}")))
        found.append(fields[_inside(region, pairs.basis.encode(fields))])
        if sum(map(len, found)) >= n:
            return None, np.concatenate(found)[:n]
    raise DataError(f"Of {_TRIES * _DRAWN:,} draws of the prior {sum(map(len, found))} are where the posterior is, and "
                    f"{n} are asked for: take fewer rounds or simulations, or a Karhunen-Loeve basis, in which they "
                    "are found without trying.")


def _walk(region: list[_Ellipsoid], z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws (n, r) of N(0, I) in a region, from starts inside it, by moves along random lines (hit and run)."""
    r = z.shape[1]
    for _ in range(_SWEEPS * r):
        d = rng.standard_normal(z.shape)
        d /= np.linalg.norm(d, axis=1, keepdims=True)
        ends = [part.chord(z, d) for part in region]
        low, high = np.max([end[0] for end in ends], axis=0), np.min([end[1] for end in ends], axis=0)
        # Along a line of unit direction the law is N(-z·d, 1), by the tail that is the smaller.
        shift = (z * d).sum(axis=1)
        side = np.where(low + shift > 0, -1.0, 1.0)
        a, b = ndtr(np.minimum(side * (low + shift), side * (high + shift))), ndtr(
            np.maximum(side * (low + shift), side * (high + shift)))
        t = side * ndtri(a + (b - a) * rng.random(len(z))) - shift
        z = z + np.clip(np.nan_to_num(t, posinf=0.0, neginf=0.0), low, high)[:, None] * d
    return z
