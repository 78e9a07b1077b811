"""Posteriors by random walks that no gradient guides: preconditioned Crank-Nicolson in the informed directions."""

import os
from collections.abc import Callable

import numpy as np

from fem_diffusion.checks import check_flag, stream
from fem_diffusion.citations import cite
from fem_diffusion.errors import SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.prior.draws import restricted
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.chains import ChainPosterior, accepted_chains, chain_numbers, reference_latents
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.point import around_points
from fem_diffusion.reference.walk import Begin, State, learnt, settle, walk

__all__ = ["pcn"]

_TARGET, _WARMUP, _CHAINS = 0.27, 1000, 8
# A longest step: without any memory of where it is a chain in the tails of another law waits for ever.
_LONGEST = 0.9
# Standard deviations of the Gaussian, as factors of those that are learnt: wider ones reach tails that it lacks.
_WIDER, _WIDEST = 1.1, 3.0
_LEARN = (0.15, 0.3, 0.5, 0.75)


class _CrankNicolson:
    """Proposals x' = √(1 - β²) x + β ξ in coordinates x, z = centre + F x: reversible for N(centre, F Fᵀ).

    So the acceptance has the ratio of the posterior to that Gaussian (Rudolf and Sprungk 2018, section 3), which is
    nearly one where the Gaussian is near the posterior, in any number of latents.
    """

    def __init__(self, latent: LatentProblem, begin: Callable[[], Begin]):
        self.latent, self._begin = latent, begin

    def start(self) -> State:
        """As `Kernel.start`."""
        z, centre, factor = self._begin()
        z = settle(self.latent, z, centre)
        return {"z": z, "centre": centre, "factor": factor, "wider": np.array([_WIDER]), "pool": z[:, None][:, :0],
                "energy": self.latent.energy(z), "step": np.array([0.5]), "leaps": np.ones(1, dtype=int),
                "whole": np.ones(1, dtype=bool), "exact": np.zeros(1, dtype=bool)}

    def _against(self, state: State, z: np.ndarray) -> np.ndarray:
        """Coordinates x (chains, r) of latents."""
        return np.linalg.solve(state["wider"] * state["factor"], (z - state["centre"]).T).T

    def move(self, state: State, rng: np.random.Generator) -> np.ndarray:
        """As `Kernel.move`."""
        # Every other move is shorter, by up to a factor of thirty: it frees chains in tails that the Gaussian lacks.
        state["whole"] = np.array([rng.uniform() < 0.5])
        x, beta = self._against(state, state["z"]), state["step"][0] * (state["whole"][0] or 10**-rng.uniform(0.0, 1.5))
        there = np.sqrt(1 - beta**2) * x + beta * rng.standard_normal(x.shape)
        chance = np.log(rng.uniform(size=len(x)))
        z = state["centre"] + there @ (state["wider"] * state["factor"]).T
        energy = self.latent.energy(z)
        gain = state["energy"] - (x**2).sum(axis=1) / 2 - energy + (there**2).sum(axis=1) / 2
        gain = self.latent.everyone.bcast(np.where(np.isfinite(energy), gain, -np.inf))
        accept = chance < gain
        state["z"] = np.where(accept[:, None], z, state["z"])
        state["energy"] = np.where(accept, energy, state["energy"])
        return np.exp(np.minimum(gain, 0.0))

    def cost(self, state: State) -> int:
        """As `Kernel.cost`."""
        return len(state["z"])

    def adapt(self, state: State, acceptance: np.ndarray, i: int, warmup: int) -> None:
        """As `Kernel.adapt`: step and width by acceptance (Robbins and Monro), Gaussian by draws."""
        state["pool"] = np.concatenate([state["pool"], state["z"][:, None]], axis=1)
        change = state["whole"][0] * (acceptance.mean() - _TARGET) / np.sqrt(1 + i / 20)
        # What acceptance is to spare at the longest step goes into a wider Gaussian.
        if state["step"][0] == _LONGEST and change > 0 or state["wider"][0] > _WIDER:
            state["wider"] = np.clip(state["wider"] * np.exp(0.3 * change), _WIDER, _WIDEST)
        else:
            logit = np.log(state["step"] / (1 - state["step"])) + change
            state["step"] = np.clip(1 / (1 + np.exp(-logit)), 1e-4, _LONGEST)
        if i + 1 in [int(share * warmup) for share in _LEARN]:
            state["factor"] = learnt(state["factor"], state["pool"])
            state["centre"] = state["pool"].mean(axis=(0, 1))
            state["pool"] = state["pool"][:, :0]
        if i + 1 == warmup:
            state["pool"] = state["pool"][:, :0]


def pcn(problem: InverseProblem, y: np.ndarray, *, basis: ModalBasis | None = None, seed: int, chains: int = _CHAINS,
        draws: int | None = None, most: int = 50_000, path: str | os.PathLike | None = None, progress: bool = True
        ) -> ChainPosterior:
    """Posterior by Metropolis moves that need no gradient, several chains at once: one solve for each draw.

    Generalised preconditioned Crank-Nicolson moves: they keep a Gaussian, which is that of the most probable point with
    its curvature where these are found, the prior otherwise, and is learnt from the chains in the warm-up, and adapt
    their size to an acceptance of 27 %. They take some ten to hundred times as many solves as `hmc`, and go where
    that cannot: level sets, solvers and noise without derivative.

    Parameters, errors and warnings are those of `hmc`.
    """
    seed, chains, draws, most = chain_numbers(problem, seed, chains, draws, most)
    progress = check_flag(progress, "progress")
    latent = reference_latents(problem, y, basis)
    cite("RudolfSprungk2018", "Vehtari2021")

    def begin() -> Begin:
        try:
            return around_points(latent, chains, seed)
        except SolveError:
            rng = np.random.default_rng(stream(seed, "starts"))
            x, = restricted(latent.allowed, chains, lambda number: (rng.standard_normal((chains, latent.r)),),
                            "mend the constraint")
            return x, np.zeros(latent.r), np.eye(latent.r)
    found = walk(latent, _CrankNicolson(latent, begin), chains, seed=seed, warmup=_WARMUP, draws=draws, most=most,
                 budget=None, path=path, progress=progress, name="pcn")
    return accepted_chains(latent, found, "pcn", seed=seed, asked=draws, path=path, progress=progress)
