"""Posteriors by Hamiltonian Monte Carlo with the finite element model itself, in the latents of a Gaussian field."""

from dataclasses import dataclass

import numpy as np
import torch
from firedrake import Function

from fem_diffusion.checks import check_count, check_flag, check_number, check_seed, stream
from fem_diffusion.diffusion.sampling.hamiltonian import hamiltonian_move
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import field
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.problem import InverseProblem
from fem_diffusion.progress import bar, tell
from fem_diffusion.reference.latents import FAR, LatentProblem
from fem_diffusion.reference.point import find_point
from fem_diffusion.samples import Samples

__all__ = ["ChainPosterior", "hmc"]

_WARMUP = 10


@dataclass(frozen=True, eq=False, repr=False)
class ChainPosterior:
    """p(m | y) as the draws of independent Markov chains, from `hmc`.

    Parameters
    ----------
    problem : InverseProblem
        What was solved.
    draws : Samples
        Of so many chains, one chain after the other, with modes past r from the prior.
    acceptance : float
        Share of accepted proposals.
    """

    problem: InverseProblem
    draws: Samples
    chains: int
    acceptance: float

    def mean(self) -> Function:
        """Posterior mean."""
        return self.draws.mean()

    def std(self) -> Function:
        """Pointwise standard deviation at the nodes."""
        return self.draws.std()

    def quantile(self, q: float) -> Function:
        """Pointwise quantile at the nodes, 0 <= q <= 1."""
        return self.draws.quantile(q)

    def mean_error(self) -> Function:
        """Monte Carlo standard error of `mean`, from the spread between chains."""
        return self._error(self.draws.values, "mean_error")

    def std_error(self) -> Function:
        """Monte Carlo standard error of `std`, from the spread between chains."""
        std = self.draws.values.std(axis=0)
        # Where conditions fix the parameter there is no deviation, and no error of it.
        half = np.divide(0.5, std, out=np.zeros_like(std), where=std > 0)
        return self._error((self.draws.values - self.draws.values.mean(axis=0))**2 * half, "std_error")

    def _error(self, values: np.ndarray, name: str) -> Function:
        """Standard error of the mean of values (n, n_owned), of which only the chains are independent."""
        means = values.reshape(self.chains, -1, values.shape[1]).mean(axis=1)
        return field(self.problem.M, means.std(axis=0, ddof=1) / np.sqrt(self.chains), name=name)

    def sample(self, n: int, *, seed: int) -> Samples:
        """Some of the draws, at random and each at most once; InputError where there are not so many."""
        if check_count(n) > len(self.draws):
            raise InputError(f"n is {n} and the chains hold {len(self.draws)} draws: ask for less, or give hmc more "
                             "chains or draws.")
        return self.draws[np.random.default_rng(check_seed(seed)).permutation(len(self.draws))[:n]]

    def predictive(self, n: int, *, seed: int) -> np.ndarray:
        """Readings of n samples with noise, shape (n, k), one solve each."""
        return self.problem.measurements(self.sample(n, seed=seed).values, seed=seed)

    def __repr__(self) -> str:
        return (f"ChainPosterior: {len(self.draws)} draws of {self.chains} chains, {self.acceptance:.0%} of the "
                f"proposals accepted\n{self.problem!r}")


def hmc(problem: InverseProblem, y: np.ndarray, *, basis: ModalBasis | None = None, seed: int, chains: int = 100,
        draws: int = 100, step: float = 0.35, leaps: int = 5, progress: bool = True) -> ChainPosterior:
    """Posterior by Hamiltonian Monte Carlo, many chains at once (Neal 2011, section 5.4.1).

    Chains start around the maximum a posteriori point, in coordinates in which its Gauss-Newton Hessian is the
    identity. The acceptance test uses the forward model, one solve for each draw of a chain; the force uses its
    linearisation at that point, which costs none.

    Parameters
    ----------
    problem : InverseProblem
        With a Gaussian field, transformed or not, constant Gaussian noise, linear sensors, and a forward model that
        has a derivative.
    y : array_like of shape (k,)
        The measurement.
    basis : ModalBasis, optional
        ``karhunen_loeve(problem.prior)`` where left out.
    chains, draws : int
        Number of chains, at least two, and of draws that are kept of each; the standard error of the mean in units of
        the standard deviation is about one over the root of their product.
    step, leaps : float, int
        Mean step of a trajectory, which varies by 20 %, and steps; where the posterior is far from Gaussian, a shorter
        step frees chains in its tails.

    InputError is raised if the problem is not of that kind, or an argument out of range; SolveError if the most
    probable point is not found, or less than a tenth of the proposals is accepted.
    """
    # Standard errors come from the spread between chains.
    seed, chains = check_seed(seed), check_count(chains, "chains", least=2)
    draws, leaps = check_count(draws, "draws"), check_count(leaps, "leaps")
    step, progress = check_number(step, "step", above=0), check_flag(progress, "progress")
    latent = LatentProblem(problem, y, karhunen_loeve(problem.prior) if basis is None else basis)
    r = latent.r
    centre = find_point(latent)[0]
    _, hessian = latent.expanded(centre)
    # z = centre + x Aᵀ turns the Hessian into the identity.
    root = torch.linalg.inv(torch.linalg.cholesky(torch.from_numpy(hessian))).numpy()

    memory: list[tuple[torch.Tensor, torch.Tensor]] = []

    def energy(x: torch.Tensor) -> torch.Tensor:
        # Chains are where one of the last two evaluations was.
        value = torch.full((chains,), torch.nan, dtype=torch.float64)
        for place, known in memory:
            value = torch.where((x == place).all(1), known, value)
        if value.isnan().any():
            value = torch.from_numpy(latent.energy(centre + x.numpy() @ root))
        memory[:] = [*memory[-1:], (x, value)]
        return value

    def force(x: torch.Tensor) -> torch.Tensor:
        z = np.clip(centre + x.numpy() @ root, -FAR, FAR)
        return torch.from_numpy(latent.energy_and_gradient(z)[1] @ root.T)
    generator = torch.Generator().manual_seed(stream(seed, "chains"))
    x = torch.randn(chains, r, dtype=torch.float64, generator=generator)
    # A chain that starts where the model fails would never leave.
    x = torch.where(torch.isfinite(energy(x))[:, None], x, 0.0)
    kept, accepted = np.empty((chains, draws, r)), 0.0
    with bar(_WARMUP + draws, "hmc", progress and not problem.comm.rank) as shown:
        for i in range(-_WARMUP, draws):
            length = step * (0.8 + 0.4 * float(torch.rand((), generator=generator)))
            x, accept = hamiltonian_move(x, energy, force, length, leaps, generator)
            shown.update()
            if i >= 0:
                kept[:, i] = centre + x.numpy() @ root
                accepted += float(accept.double().mean()) / draws
    if accepted < 0.1:
        raise SolveError(f"Hamiltonian Monte Carlo accepted {accepted:.1%} of its proposals: take a smaller step, "
                         "unless the transform has no derivative, as a level set.")
    z = kept.reshape(-1, r)
    tail = stream(seed, "tail")
    values = problem.prior.transform_many(latent.basis.decode(z, tail))
    tell(f"hmc: {draws:,} draws of {chains:,} chains, {accepted:.0%} of the proposals accepted",
         progress and problem.comm.rank == 0)
    return ChainPosterior(problem, Samples(problem.M, values, z), chains, accepted)
