"""Posteriors by Hamiltonian Monte Carlo with the finite element model itself, in the latents of a Gaussian field."""

import os
from collections.abc import Callable

import numpy as np

from fem_diffusion.checks import check_flag
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.chains import ChainPosterior, accepted_chains, chain_numbers, reference_latents
from fem_diffusion.reference.latents import FAR, LatentProblem
from fem_diffusion.reference.point import around_points
from fem_diffusion.reference.solver import unrestricted
from fem_diffusion.reference.walk import Begin, Chains, State, learnt, settle, walk

__all__ = ["hmc", "run_hmc"]

# Length of a trajectory: a quarter of a period of a standard normal law, which forgets where it began. A longer one
# than so many steps is cut; steps are stable below two.
_TRAJECTORY, _MOST_LEAPS, _LONGEST = np.pi / 2, 64, 1.6
# Acceptance that the step aims at (Hoffman and Gelman 2014, section 4.2), higher where steps cost no solve; and that
# below which the linearised force is left.
_TARGET, _FREE, _POOR, _STUCK = 0.8, 0.95, 0.6, 0.1
_SHORTEST = 0.05           # step with the linearised force, whose acceptance no shorter one mends
_WILD = 1000.0             # energy error from which a trajectory is given up
# Shares of the warm-up: when the force is chosen, and when the mass is learnt anew.
_CHOICE, _LEARN = 0.15, (0.3, 0.5, 0.75)
_CHAINS, _WARMUP = 8, 150


class _Hamiltonian:
    """Leapfrog trajectories in coordinates x, z = centre + F x, in which the posterior is near standard normal.

    The trajectory is reversible and keeps volume for any force that depends on the position alone (Neal 2011, section
    5.3): one of the linearised forward problem costs acceptance where it is off, and never changes the law.
    """

    def __init__(self, latent: LatentProblem, begin: Callable[[], Begin], exact: bool | None):
        self.latent, self._begin, self._given, self._force = latent, begin, exact, None
        self._smooth = np.ones(1)   # acceptance of the last move, whatever a prior allows

    def start(self) -> State:
        """As `Kernel.start`."""
        z, centre, factor = self._begin()
        z = settle(self.latent, z, centre)
        state = {"z": z, "centre": centre, "factor": factor, "exact": np.array([self._given is True])}
        _restart(state, 1.2 * len(centre)**-0.25)
        self._evaluate(state)
        return state

    def _evaluate(self, state: State) -> None:
        """Set energies (chains,) of the chains, and forces (chains, r) there."""
        if state["exact"][0]:
            state["energy"], state["gradient"] = self.latent.energy_and_gradient(state["z"])
        else:
            state["energy"], state["gradient"] = self.latent.energy(state["z"]), self._linear(state)(state["z"])

    def _linear(self, state: State) -> Callable[[np.ndarray], np.ndarray]:
        """Force of the problem that is linearised at the centre; the same far out, where transforms overflow."""
        if self._force is None:
            self._force = self.latent.linear_force(state["centre"])
        force = self._force
        return lambda z: force(np.clip(z, -FAR, FAR))

    def move(self, state: State, rng: np.random.Generator) -> np.ndarray:
        """As `Kernel.move`: one trajectory of each chain, which may cross what a prior does not allow."""
        with unrestricted(self.latent):
            z, energy, gradient, gain, chance = self._trajectory(state, rng)
        allowed = self.latent.allowed(z)
        accept = (chance < gain) & allowed
        state["z"] = np.where(accept[:, None], z, state["z"])
        state["energy"] = np.where(accept, energy, state["energy"])
        state["gradient"] = np.where(accept[:, None], gradient, state["gradient"])
        # The step is right or wrong whatever is allowed.
        self._smooth = np.exp(np.minimum(gain, 0.0))
        return self._smooth * allowed

    def _trajectory(self, state: State, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Ends (chains, r), energies (chains,) and forces there, what is gained, and logarithms of chances."""
        chains, r = state["z"].shape
        momentum = rng.standard_normal((chains, r))
        jitter, chance = rng.uniform(0.8, 1.2), np.log(rng.uniform(size=chains))
        step, exact, factor = state["step"][0] * jitter, bool(state["exact"][0]), state["factor"]
        z, gradient, energy = state["z"].copy(), state["gradient"].copy(), state["energy"].copy()
        kinetic = (momentum**2).sum(axis=1) / 2
        alive = np.ones(chains, dtype=bool)
        for leap in range(int(state["leaps"][0])):
            momentum -= step / 2 * gradient @ factor
            z += step * momentum @ factor.T
            if exact:
                # Chains that have met a failure, or gained energy without bound, are refused in any case.
                energy[~alive], gradient[~alive] = np.inf, 0.0
                if alive.any():
                    energy[alive], gradient[alive] = self.latent.energy_and_gradient(z[alive])
                alive &= energy - state["energy"] < _WILD
            else:
                gradient = self._linear(state)(z)
            momentum -= step / 2 * gradient @ factor
        if not exact:
            energy = self.latent.energy(z)
        gain = state["energy"] + kinetic - energy - (momentum**2).sum(axis=1) / 2
        return z, energy, gradient, self.latent.everyone.bcast(np.where(np.isfinite(gain), gain, -np.inf)), chance

    def cost(self, state: State) -> int:
        """As `Kernel.cost`: the energy at each step, or at the end, and once more where the force changes."""
        return len(state["z"]) * (int(state["leaps"][0]) if state["exact"][0] else 2)

    def adapt(self, state: State, acceptance: np.ndarray, i: int, warmup: int) -> None:
        """As `Kernel.adapt`: step by dual averaging, force by its acceptance, mass by the draws."""
        acceptance = self._smooth
        state["pool"] = np.concatenate([state["pool"], state["z"][:, None]], axis=1)
        state["rates"] = np.concatenate([state["rates"], acceptance[:, None]], axis=1)
        target, shortest = (_TARGET, 1e-6) if state["exact"][0] else (_FREE, _SHORTEST)
        _average(state, float(acceptance.mean()), target, shortest)
        late = state["rates"][:, state["rates"].shape[1] // 2:]
        open_force = self._given is None and not state["exact"][0] and self.latent.differentiable
        if i + 1 in _moments(warmup, _CHOICE, *_LEARN) and open_force and (
                late.mean() < _POOR or late.mean(axis=1).min() < _STUCK):
            state["exact"] = np.array([True])
            self._evaluate(state)
            _restart(state, 1.2 * len(state["centre"])**-0.25)
        elif i + 1 in _moments(warmup, *_LEARN):
            state["factor"] = learnt(state["factor"], state["pool"])
            _restart(state, float(state["step"][0]))
        if i + 1 == warmup:
            _set_step(state, float(np.exp(state["averaging"][2])))
            state["pool"], state["rates"] = state["pool"][:, :0], state["rates"][:, :0]


def _moments(warmup: int, *shares: float) -> list[int]:
    return [int(share * warmup) for share in shares]


def _restart(state: State, step: float) -> None:
    """Begin to learn the step anew, near one that is known, and the mass from new draws."""
    state["averaging"] = np.array([np.log(2 * step), 0.0, np.log(step), 0.0])
    chains, r = state["z"].shape
    state["pool"], state["rates"] = np.empty((chains, 0, r)), np.empty((chains, 0))
    _set_step(state, step)


def _average(state: State, acceptance: float, target: float, shortest: float) -> None:
    """Dual averaging of the logarithm of the step (Hoffman and Gelman 2014, section 3.2 with its constants)."""
    towards, error, mean, count = state["averaging"]
    count += 1
    error += (target - acceptance - error) / (count + 10)
    log = np.clip(towards - np.sqrt(count) / 0.05 * error, np.log(shortest), np.log(_LONGEST))
    mean += count**-0.75 * (log - mean)
    state["averaging"] = np.array([towards, error, mean, count])
    _set_step(state, float(np.exp(log)))


def _set_step(state: State, step: float) -> None:
    # By so much a step of the leapfrog turns a standard normal law.
    leaps = round(_TRAJECTORY / np.arccos(1 - step**2 / 2))
    state["step"], state["leaps"] = np.array([step]), np.array([min(max(leaps, 1), _MOST_LEAPS)])


def run_hmc(latent: LatentProblem, start: np.ndarray, *, centre: np.ndarray, factor: np.ndarray, seed: int,
            warmup: int = 150, draws: int | None = None, most: int = 5000, budget: int | None = None,
            exact: bool | None = None, path: str | os.PathLike | None = None, progress: bool = False) -> Chains:
    """Hamiltonian Monte Carlo from starts (chains, r), all chains at once (Neal 2011, section 5; Hoffman and Gelman).

    Parameters
    ----------
    centre, factor : numpy.ndarray
        Where the forward problem is linearised (r,), and a factor F (r, r) of a covariance F Fᵀ near that of the
        posterior, which the mass inverts. The warm-up learns a better one.
    warmup, draws, most : int
        Iterations of the warm-up, which finds step, number of steps, mass and force, and draws of each chain that are
        kept; None for as many as R-hat of 1.01 and 400 effective draws take, at most `most`.
    budget : int, optional
        Number of forward solves within which the run ends, whatever it has.
    exact : bool, optional
        Whether the force is the gradient of the finite element problem, one forward and one adjoint solve for each
        step, or of its linearisation, which costs one solve for each trajectory; chosen by the acceptance where left
        out.
    path : path, optional
        A file that keeps the run, from which the same call goes on.

    FileError is raised if the file is of another run; SolveError if there is no solution at the centre.
    """
    kernel = _Hamiltonian(latent, lambda: (start, centre, factor), exact)
    return walk(latent, kernel, len(start), seed=seed, warmup=warmup, draws=draws, most=most, budget=budget, path=path,
                progress=progress, name="hmc")


def hmc(problem: InverseProblem, y: np.ndarray, *, basis: ModalBasis | None = None, seed: int, chains: int = _CHAINS,
        draws: int | None = None, most: int = 5000, path: str | os.PathLike | None = None, progress: bool = True
        ) -> ChainPosterior:
    """Posterior by Hamiltonian Monte Carlo with the finite element model itself, several chains at once.

    Chains start around the most probable point, in coordinates in which its Gauss-Newton Hessian is the identity. A
    warm-up finds step and number of steps, and learns the covariance. The force is that of the linearised forward
    problem where this is accepted, one solve for each draw, and otherwise the exact gradient, by forward and adjoint
    solves at each step; which one is told.

    Parameters
    ----------
    problem : InverseProblem
        With a Gaussian field, transformed or not, noise that has a density, and any forward problem; one without
        derivative serves where it is near linear, and `pcn` elsewhere.
    y : array_like of shape (k,)
        The measurement.
    basis : ModalBasis, optional
        Where left out, ``karhunen_loeve(problem.prior)``, and more modes where the readings see those past it.
    chains, draws : int
        Number of chains, at least two, and of draws that are kept of each; where the latter is left out, as many as it
        takes for R-hat of at most 1.01 and 400 effective draws of each latent, up to `most`.
    path : path, optional
        A file that keeps the run: the same call goes on where it was, and gives what it would have given.

    Raises
    ------
    InputError
        If the problem is not of that kind, or an argument out of range.
    SolveError
        If the most probable point is not found, less than a tenth of the proposals is accepted, or, where `draws` is
        left out, R-hat stays above 1.05.
    FileError
        If the file belongs to another run.

    ConvergenceWarning tells where R-hat is above 1.01 or there are less than 400 effective draws, or, where `draws` is
    given, both and only a tenth of them is effective, or R-hat is above 1.05; and where modes past r are seen.
    MeasurementWarning tells where residuals of the draws are not those of the noise, and at which sensors.
    """
    seed, chains, draws, most = chain_numbers(problem, seed, chains, draws, most)
    progress = check_flag(progress, "progress")
    latent = reference_latents(problem, y, basis)
    kernel = _Hamiltonian(latent, lambda: around_points(latent, chains, seed), None)
    found = walk(latent, kernel, chains, seed=seed, warmup=_WARMUP, draws=draws, most=most, budget=None, path=path,
                 progress=progress, name="hmc")
    return accepted_chains(latent, found, "hmc", seed=seed, asked=draws, path=path, progress=progress)
