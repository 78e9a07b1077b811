"""Proposals without solves: Hamiltonian moves under a surrogate of the forward problem, which learns as solves come in.

`Learner` keeps all solves of a run and the present surrogate law, prior times likelihood of the surrogate's readings to
the power 1/T. Its warm-up is a sequence of rounds: points move under the surrogate law, the forward problem is solved
there, and the surrogate is fitted anew. A temperature T > 1 keeps points where the surrogate still holds, as in
sequential Monte Carlo (Del Moral et al. 2006); it falls as fast as the surrogate's errors do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tqdm import tqdm

from fem_diffusion.progress import bar
from fem_diffusion.reference.walk import diagnosed, learnt
from fem_diffusion.trust.surrogate import Base, Solves, Surrogate, fit_surrogate
from fem_diffusion.trust.weights import Weights, mixture, resample, smoothed

__all__ = ["Learner", "Reach", "Says"]

# Length of a trajectory, a quarter of a period of a standard normal law; most steps of one, and longest step.
_QUARTER, _LEAPS, _LONGEST = np.pi / 2, 16, 1.2
# Share of trajectories with smaller steps; share of points that stay when they are multiplied, at least, and energy
# from which none does, in units of its spread.
_SMALL, _STAY, _STRAY = 0.25, 0.2, 8.0
# Trajectories of a round of the warm-up, and between two proposals.
_ROUND, _MOVES = 12, 6
# Rounds of moves at temperature 1, at most; correlation at which points have forgotten where they were, and what chance
# may make of none; draws of each chain by which mixing is told.
_REPEATS, _FORGOTTEN, _CHANCE, _DRAWS = 6, 0.1, 3.0, 40
# Points that a surrogate is fitted to, and derivatives, at most; points by which a covariance is told.
_POINTS, _PLACES, _CLOUD = 3000, 60, 400
# Points whose kernels with all others are kept in the cache of a processor.
_TOGETHER = 200
# Growth of the solves, or fall of the temperature, after which the surrogate's parameters are found anew.
_MORE = 1.3
# Beyond so many prior standard deviations nothing is proposed.
_FAR = 12.0
# Errors of the energy in units of the temperature: at which it falls, and beyond which it rises.
_AIM, _POOR = 2.0, 3.0
# What the temperature is divided by from round to round, at least and at most.
_FALL = 1.5, 4.0
_FINE = 1e-5


class Says(Protocol):
    """What a measurement says about noise-free readings: `fem_diffusion.reference.likelihood.Likelihood` is one."""

    @property
    def std(self) -> np.ndarray:
        """Standard deviation (k,) of the noise."""
        ...

    def log_density(self, readings: np.ndarray) -> np.ndarray:
        """log p(y | readings), shape (B,), of noise-free readings (B, k)."""
        ...

    def with_score(self, readings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log p(y | readings), shape (B,), and the derivative of its negative by the readings, shape (B, k)."""
        ...

    def matrix(self, readings: np.ndarray) -> np.ndarray:
        """What whitens the noise at readings (k,): a matrix (k, k)."""
        ...


@dataclass(frozen=True)
class Reach:
    """How far a proposal goes: number of trajectories, and length of each."""

    trajectories: int = _MOVES
    length: float = _QUARTER

    @property
    def shorter(self) -> "Reach":
        """A proposal whose end is nearer, and so more often accepted."""
        if self.trajectories > 1:
            return Reach(self.trajectories // 3 or 1, self.length)
        return Reach(1, self.length / 2)


class Learner:
    """Solves so far, and what they tell: it lives on one rank.

    Parameters
    ----------
    log_prior : callable or None
        Log density of latents, (B, R) to (B,); None of standard normal ones.
    says : Says
        The measurement.
    base : Base or None
        An emulator of the readings.
    seed : int
        Of all draws.
    """

    def __init__(self, log_prior: Callable[[np.ndarray], np.ndarray] | None, says: Says, base: Base | None, seed: int):
        self.log_prior, self.says, self.rng = log_prior, says, np.random.default_rng(seed)
        self.forget()
        self.base = self.given = base
        # Draws of surrogates at temperature 1, and these.
        self.drawn: list[np.ndarray] = []
        self.drew: list[Surrogate] = []
        # Number of solves, and temperature, when its parameters were found.
        self.fitted, self.last = (0, np.inf), 0
        self.temper, self.error, self.step, self.accepted = 1.0, np.inf, 0.4, 1.0
        # F (R, R) of coordinates in which the surrogate law is near standard normal, with covariance F Fᵀ.
        self.factor = np.empty((0, 0))

    def add(self, z: np.ndarray, readings: np.ndarray) -> None:
        """Keep solves, readings (B, k) at latents (B, R); rows of NaN are failures."""
        misfit = -self.says.log_density(readings)
        there = np.isfinite(misfit) & np.isfinite(readings).all(axis=1)
        z, readings, misfit = z[there], readings[there], misfit[there]
        self.last = len(z)
        if len(self.z):
            z, readings = np.vstack([self.z, z]), np.vstack([self.readings, readings])
            misfit = np.concatenate([self.misfit, misfit])
        self.z, self.readings, self.misfit = z, readings, misfit

    def forget(self) -> None:
        """Start anew without solves and emulator."""
        self.z, self.readings, self.misfit = np.empty((0, 0)), np.empty((0, 0)), np.empty(0)
        # Derivatives of readings by latents (m, k, R), where they are known, with the misfits (m,) there.
        self.places, self.slopes, self.heights = np.empty((0, 0)), np.empty((0, 0, 0)), np.empty(0)
        self.base: Base | None = None
        self.given: Base | None = None
        self.surrogate: Surrogate | None = None

    def prior_energy(self, z: np.ndarray) -> np.ndarray:
        """Negative log prior density of latents (B, R), shape (B,), up to a constant."""
        return (z**2).sum(axis=1) / 2 if self.log_prior is None else -self.log_prior(z)

    def _prior_force(self, z: np.ndarray) -> np.ndarray:
        """Gradient (B, R) of `prior_energy`."""
        if self.log_prior is None:
            return z
        steps = _FINE * np.eye(z.shape[1])
        slopes = [(self.prior_energy(z + step) - self.prior_energy(z - step)) / (2 * _FINE) for step in steps]
        return np.stack(slopes, axis=1)

    def energy(self, z: np.ndarray) -> np.ndarray:
        """Energy (B,) of the surrogate law at latents (B, R)."""
        assert self.surrogate is not None
        return self.prior_energy(z) - self.says.log_density(self.surrogate(z)) / self.temper

    def weigh(self, real: np.ndarray) -> tuple[Weights, Weights]:
        """Weights of all draws of surrogates at temperature 1, which have these energies (n,) by the solver.

        Those of the posterior, and those of the last of the surrogate laws.
        """
        self.surrogate, self.temper, z = self.drew[-1], 1.0, np.concatenate(self.drawn)
        prior = self.prior_energy(z)
        energies = np.stack([prior - self.says.log_density(surrogate(z)) for surrogate in self.drew])
        law = mixture(energies, np.array([len(part) for part in self.drawn]), former=True)
        return smoothed(real, law), smoothed(energies[-1], law)

    def cloud(self, n: int, near: np.ndarray, progress: bool) -> np.ndarray:
        """Draws (n, R) of the last of the surrogate laws whose draws have been solved, with their weights of it."""
        z = np.concatenate(self.drawn)
        with bar(_ROUND, "surrogate draws", progress) as shown:
            return self.move(z[resample(near, n, self.rng)], Reach(_ROUND), shown=shown)

    def _force(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Energy (B,) and its gradient (B, R); infinite and zero beyond reach."""
        assert self.surrogate is not None
        if len(z) > _TOGETHER:
            parts = [self._force(z[i:i + _TOGETHER]) for i in range(0, len(z), _TOGETHER)]
            energies, gradients = zip(*parts)
            return np.concatenate(energies), np.concatenate(gradients)
        inside = np.asarray((np.abs(z) < _FAR).all(axis=1))
        z = np.where(inside[:, None], z, 0.0)
        readings, pull = self.surrogate.with_pull(z)
        log, score = self.says.with_score(readings)
        energy = self.prior_energy(z) - log / self.temper
        gradient = self._prior_force(z) + pull(score) / self.temper
        there = inside & np.isfinite(energy) & np.isfinite(gradient).all(axis=1)
        return np.where(there, energy, np.inf), np.where(there[:, None], gradient, 0.0)

    def learn(self, z: np.ndarray, readings: np.ndarray, whitened: np.ndarray) -> None:
        """Keep derivatives (m, k, R) of whitened readings at latents (m, R), where the readings are (m, k)."""
        there = np.isfinite(whitened).all(axis=(1, 2)) & np.isfinite(readings).all(axis=1)
        if there.any():
            z, readings = z[there], readings[there]
            slopes = np.array([np.linalg.solve(self.says.matrix(row), x) for row, x in zip(readings, whitened[there])])
            heights = -self.says.log_density(readings)
            if len(self.places):
                z, slopes = np.vstack([self.places, z]), np.vstack([self.slopes, slopes])
                heights = np.concatenate([self.heights, heights])
            self.places, self.slopes, self.heights = z, slopes, heights

    def fit(self) -> None:
        """A surrogate of the solves so far, of those that matter most where there are too many."""
        size, temper = self.fitted
        anew = len(self.z) > _MORE * size or self.temper < temper / _MORE
        if anew:
            self.fitted = len(self.z), self.temper
        if anew and self.given is not None and self.surrogate is not None:
            # An emulator that is wrong here is worse than none: the last round tells.
            old, new = slice(0, len(self.z) - self.last), slice(len(self.z) - self.last, None)
            errors = []
            for base in (self.given, None):
                readings = self._fitted(base, old, anew)(self.z[new])
                errors.append(_spread(-self.says.log_density(readings) - self.misfit[new]))
            self.base = None if errors[1] < errors[0] else self.given
        self.surrogate = self._fitted(self.base, slice(None), anew)

    def _fitted(self, base: Base | None, which: slice, anew: bool) -> Surrogate:
        """A surrogate of some solves."""
        z, readings, misfit = self.z[which], self.readings[which], self.misfit[which]
        chosen = np.argsort(self.prior_energy(z) + misfit / self.temper, kind="stable")[:_POINTS]
        places, slopes = self.places.reshape(-1, z.shape[1]), self.slopes.reshape(-1, readings.shape[1], z.shape[1])
        if len(places):
            best = np.argsort(self.prior_energy(places) + self.heights / self.temper, kind="stable")[:_PLACES]
            places, slopes = places[best], slopes[best]
        former = self.surrogate if self.surrogate is not None and base is self.surrogate.base else None
        return fit_surrogate(Solves(z[chosen], readings[chosen], places, slopes), self.says.std, base, self.temper,
                             former, int(self.rng.integers(2**31)), anew)

    def move(self, z: np.ndarray, reach: Reach, adapt: bool = False, shown: tqdm | None = None) -> np.ndarray:
        """Latents (B, R) after Hamiltonian moves that leave the surrogate law as it is (Neal 2011, section 5.3).

        The moves are reversible, so that acceptance by the ratio of two laws makes those of the other law (surrogate
        transitions: Liu 2001, section 9.4.3). `adapt` learns the step; the trajectories are `shown` on a bar.
        """
        factor = self.factor
        energy, gradient = self._force(z)
        for _ in range(reach.trajectories):
            step = min(self.step, reach.length) * self.rng.uniform(0.8, 1.2)
            if self.rng.uniform() < _SMALL:
                # Where the law is narrower than elsewhere, points would be stuck.
                step *= 10**-self.rng.uniform(0, 2)
            leaps = min(int(np.ceil(reach.length / step)), _LEAPS)
            momentum = self.rng.standard_normal(z.shape)
            start = energy + (momentum**2).sum(axis=1) / 2
            place, slope = z, gradient
            for _ in range(leaps):
                momentum = momentum - step / 2 * slope @ factor
                place = place + step * momentum @ factor.T
                there, slope = self._force(place)
                momentum = momentum - step / 2 * slope @ factor
            gain = start - there - (momentum**2).sum(axis=1) / 2
            gain = np.where(np.isfinite(gain), gain, -np.inf)
            accept = np.log(self.rng.uniform(size=len(z))) < gain
            z, energy = np.where(accept[:, None], place, z), np.where(accept, there, energy)
            gradient = np.where(accept[:, None], slope, gradient)
            self.accepted = float(np.exp(np.minimum(gain, 0)).mean())
            if adapt and step > self.step / 2:
                self.step = min(self.step * np.exp(0.5 * (self.accepted - 0.8)), _LONGEST)
            if shown is not None:
                shown.update()
        return z

    def _along_axes(self) -> np.ndarray:
        """F (R, R) of a covariance F Fᵀ near that of the surrogate law, as far as the mean square derivative tells."""
        assert self.surrogate is not None
        return self.surrogate.axes / np.sqrt(1 + self.surrogate.importance)

    def begin(self) -> None:
        """Set the temperature of the points so far: of that law the misfit has a mean of T / 2 for each thing told."""
        rise = float(np.median(self.misfit) - self.misfit.min())
        self.temper = max(1.0, 2 * rise / min(self.readings.shape[1], self.z.shape[1]))

    def propose(self, z: np.ndarray) -> np.ndarray:
        """A round: where to solve next, from points (B, R)."""
        then = 0.0 if self.surrogate is None else self.energy(z)
        self.fit()
        now = np.nan_to_num(self.energy(z), nan=np.inf)
        low, middle, high = np.percentile(now, [16, 50, 84], method="nearest")
        # Points that were left behind would never come back: those of the new law are multiplied.
        change = np.where(now <= middle + _STRAY * (1 + high - low), then - now, -np.inf)
        z = z[resample(_even(change), len(z), self.rng)]
        # Widths and step are learnt first: moves that depend on their own past keep no law.
        for _ in range(2):
            self.factor = learnt(self._along_axes(), z[None])
            z = self.move(z, Reach(_ROUND // 2), adapt=True)
        for _ in range(_REPEATS if self.temper == 1 else 1):
            before, z = z, self.move(z, Reach(_ROUND))
            if np.abs(_correlation(before, z)).max() < _FORGOTTEN + _CHANCE / np.sqrt(len(z)):
                break
        return z

    def mixing(self, z: np.ndarray) -> tuple[float, float]:
        """Largest R-hat of chains of the surrogate law from points (B, R), and smallest share of effective draws."""
        draws = []
        for _ in range(_DRAWS):
            z = self.move(z, Reach(_ROUND))
            draws.append(z)
        rhat, bulk, _ = diagnosed(np.stack(draws, axis=1))
        return float(rhat.max()), float(min(bulk.min() / (len(z) * _DRAWS), 1.0))

    def judge(self, z: np.ndarray, readings: np.ndarray) -> bool:
        """Take in the solves of a round, and set the error of the surrogate's energy there and the next temperature.

        Returns whether these are draws at temperature 1.
        """
        assert self.surrogate is not None
        if exact := self.temper == 1:
            self.drawn.append(z)
            self.drew.append(self.surrogate)
        with np.errstate(invalid="ignore"):
            off = self.says.log_density(self.surrogate(z)) - self.says.log_density(readings)
        self.error = _spread(off)
        self.add(z, readings)
        if not np.isfinite(self.error):
            self.temper *= 2
        elif self.error > _POOR * self.temper:
            self.temper = min(2 * self.temper, self.error / _AIM)
        else:
            lowest, highest = self.temper / _FALL[1], self.temper / _FALL[0]
            self.temper = float(max(1.0, min(highest, max(lowest, self.error / _AIM))))
        return exact

    def finish(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The last surrogate, of the posterior itself; returns points (B, R) and energies (B,) of its law."""
        self.temper = 1.0
        z = self.propose(z)
        return z, self.energy(z)

    def sample(self, z: np.ndarray, reach: Reach = Reach()) -> tuple[np.ndarray, np.ndarray]:
        """Proposals (B, R) from points (B, R), and the energies (B,) of the surrogate law there."""
        z = self.move(z, reach)
        return z, self.energy(z)

    def shape(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points (B, R) of the surrogate law, its mean (R,), and a factor F of a covariance F Fᵀ near its own."""
        many = self.move(np.resize(z, (_CLOUD, z.shape[1])), Reach(_ROUND))
        return many[:len(z)], many.mean(axis=0), learnt(self._along_axes(), many[None])


def _spread(x: np.ndarray) -> float:
    """Half the distance of the 16 and 84 % quantiles; what is not finite is beyond all measure."""
    x = np.sort(np.where(np.isfinite(x), x, np.inf))
    low, high = x[int(0.16 * (len(x) - 1))], x[int(np.ceil(0.84 * (len(x) - 1)))]
    return float((high - low) / 2) if np.isfinite(high) else np.inf


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each column of two sets of points (B, R), shape (R,)."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return (x * y).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0) + 1e-300)


def _even(log: np.ndarray) -> np.ndarray:
    """Weights (n,) from their logarithms, made more even until a fifth of them is effective."""
    log = np.where(np.isfinite(log), log, -1e300) if np.isfinite(log).any() else np.zeros(len(log))
    log = log - log.max()
    while True:
        weights = np.exp(log)
        weights /= weights.sum()
        if 1 / (weights**2).sum() >= _STAY * len(log) or log.min() > -1e-3:
            return weights
        log = np.maximum(log, -1e6) / 2
