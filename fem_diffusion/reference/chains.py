"""Posteriors that are the draws of Markov chains, and what these have to fulfil before they count as one."""

import os
import warnings
from dataclasses import dataclass

import numpy as np
from firedrake import Function

from fem_diffusion.checks import alike, check_count, check_seed
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import field
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.problem import InverseProblem, check_problem
from fem_diffusion.progress import tell
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.looks import conflict, unseen
from fem_diffusion.reference.walk import Chains
from fem_diffusion.samples import Samples

__all__ = ["ChainPosterior", "ConvergenceWarning", "accepted_chains", "chain_numbers", "reference_latents"]

# R-hat above which draws are no posterior, and share of accepted proposals below which nothing moves.
_REFUSED, _FEW = 1.05, 0.1
# What modes past r may add to a reading, in standard deviations of its noise, and how many draws tell.
_VISIBLE, _LOOKS = 0.2, 16
# Modes that are added at most, and samples that are made where the number of draws is open.
_MODES, _KEPT = 512, 10_000
# Batches of draws from which standard errors come.
_BATCHES = 20


class ConvergenceWarning(UserWarning):
    """Markov chains have not converged as they should, or do not see all that the readings see."""


@dataclass(frozen=True, eq=False, repr=False)
class ChainPosterior:
    """p(m | y) as the draws of Markov chains, from `hmc` and `pcn`.

    Parameters
    ----------
    problem : InverseProblem
        What was solved.
    y, basis : numpy.ndarray, ModalBasis
        The measurement (k,), and coordinates of the latents.
    draws : Samples
        Of so many chains, one chain after the other, with modes past r from the prior.
    record : Chains
        All draws in the latents, with acceptance, R-hat, effective numbers of draws, step and numbers of solves.
    method : str
        Name of what has made them.
    """

    problem: InverseProblem
    y: np.ndarray
    basis: ModalBasis
    draws: Samples
    chains: int
    record: Chains
    method: str = "hmc"

    @property
    def acceptance(self) -> float:
        """Share of accepted proposals."""
        return self.record.acceptance

    @property
    def rhat(self) -> np.ndarray:
        """Rank-normalised R-hat of each latent, shape (r,)."""
        return self.record.rhat[:-1]

    @property
    def ess(self) -> np.ndarray:
        """Effective number of draws of each latent, the smaller one of bulk and tails, shape (r,)."""
        return np.minimum(self.record.bulk, self.record.tail)[:-1]

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
        """Monte Carlo standard error of `mean`, from the spread between chains, or long parts of few chains."""
        return self._error(self.draws.values, "mean_error")

    def std_error(self) -> Function:
        """Monte Carlo standard error of `std`, from the spread between chains, or long parts of few chains."""
        std = self.draws.values.std(axis=0)
        # Where conditions fix the parameter there is no deviation, and no error of it.
        half = np.divide(0.5, std, out=np.zeros_like(std), where=std > 0)
        return self._error((self.draws.values - self.draws.values.mean(axis=0))**2 * half, "std_error")

    def _error(self, values: np.ndarray, name: str) -> Function:
        """Standard error of the mean of values (n, n_owned), of which only batches are independent."""
        n = len(values) // self.chains
        parts = min(-(-_BATCHES // self.chains), n)
        of_chains = values.reshape(self.chains, n, -1)[:, :n // parts * parts]
        means = of_chains.reshape(self.chains * parts, n // parts, -1).mean(axis=1)
        return field(self.problem.M, means.std(axis=0, ddof=1) / np.sqrt(len(means)), name=name)

    def sample(self, n: int, *, seed: int) -> Samples:
        """Some of the draws, at random and each at most once; InputError where there are not so many."""
        n, seed = alike(self.problem.comm, lambda: {"n": check_count(n), "seed": check_seed(seed)})
        if n > len(self.draws):
            raise InputError(f"n is {n} and the chains hold {len(self.draws)} draws: ask for less, or give "
                             f"{self.method} more chains or draws.")
        return self.draws[np.random.default_rng(seed).permutation(len(self.draws))[:n]]

    def predictive(self, n: int, *, seed: int) -> np.ndarray:
        """Readings of n samples with noise, shape (n, k), one solve each."""
        return self.problem.measurements(self.sample(n, seed=seed).values, seed=seed)

    def __repr__(self) -> str:
        return f"ChainPosterior: {_words(self.record, self.method)}\n{self.problem!r}"


def chain_numbers(problem: InverseProblem, seed: int, chains: int, draws: int | None,
                  most: int) -> tuple[int, int, int | None, int]:
    """Seed and numbers of a run of chains; InputError where they are out of range, or others on other ranks."""
    return alike(check_problem(problem).comm, lambda: {  # pyright: ignore[reportReturnType]
        "seed": check_seed(seed), "chains": check_count(chains, "chains", least=2),
        "draws": None if draws is None else check_count(draws, "draws"), "most": check_count(most, "most")})


def reference_latents(problem: InverseProblem, y: np.ndarray, basis: ModalBasis | None) -> LatentProblem:
    """The measurement in latents; where no basis is given, of as many modes as the readings see of the prior."""
    latent = LatentProblem(problem, y, basis)
    most, missing = min(_MODES, problem.V.dim()), 1e-3
    while basis is None and latent.r < most:
        left = unseen(latent, np.zeros((_LOOKS, latent.r)))[0]
        if not left > _VISIBLE:
            if np.isnan(left):
                _warn(_unknown(latent))
            break
        # By shares, which every component of a product has.
        missing /= 4
        more = karhunen_loeve(problem.prior, retained=1 - missing, most=most)
        latent = LatentProblem(problem, y, more.leading(min(more.r, most)))
    return latent


def accepted_chains(latent: LatentProblem, found: Chains, method: str, *, seed: int, asked: int | None,
                    path: str | os.PathLike | None, progress: bool) -> ChainPosterior:
    """The posterior of draws that have converged; `asked` is their number where the user has chosen it.

    SolveError is raised where they have not, ConvergenceWarning given where they leave doubts or were chosen too few.
    """
    rhat, effective = found.worst
    n, kept = found.draws.shape[1], f" They are kept in {path}." if path is not None else ""
    if found.acceptance < _FEW:
        raise SolveError(f"{method} accepted {found.acceptance:.1%} of its proposals: the posterior is far from what "
                         "gradients tell, or the transform has no derivative, as a level set; take pcn, which needs "
                         f"none.{kept}" if method == "hmc" else f"{method} accepted {found.acceptance:.1%} of its "
                         f"proposals: take hmc, or more chains.{kept}")
    if asked is None and not rhat <= _REFUSED:
        raise SolveError(f"The chains have not converged: after {n} draws of each the largest R-hat is {rhat:.3f} (1 "
                         f"is right), the smallest effective number of draws {effective:.0f}. Give a larger `most`, "
                         "and a path, from which a run goes on; where chains stay apart the posterior has several "
                         f"modes.{kept}")
    if np.isnan(rhat):
        _warn(f"{n} draws of each chain are too few to tell whether they have converged: take at least 4, or leave "
              "draws out.")
    elif rhat > _REFUSED or found.sticky or asked is None and not found.converged:
        _warn(f"The chains have not quite converged: the largest R-hat is {rhat:.3f} (1.01 is good), the smallest "
              f"effective number of {found.energies.size:,} draws {effective:.0f}; take more draws.{kept}")
    z = found.draws.reshape(-1, latent.r)
    looks = np.random.default_rng(seed).permutation(len(z))[:_LOOKS]
    left, readings = unseen(latent, z[looks], seed)
    conflict(latent, readings, "draws", z=z.mean(axis=0))
    if np.isnan(left):
        _warn(_unknown(latent))
    elif left > _VISIBLE:
        _warn(f"Modes past the {latent.r} of the basis add {left:.2g} standard deviations of the noise to a reading, "
              "and are drawn from the prior all the same: give a basis of more modes, karhunen_loeve(prior, r).")
    every = 1 if asked is not None else -(-len(z) // _KEPT)
    chains = len(found.draws)
    samples = latent.samples(found.draws[:, ::every].reshape(-1, latent.r), seed)
    how = "" if method == "pcn" or latent.differentiable else ", derivatives by differences in the latents"
    tell(f"{method}: {_words(found, method)}{how}", progress and latent.everyone.rank == 0)
    return ChainPosterior(latent.problem, latent.y, latent.basis, samples, chains, found, method)


def _unknown(latent: LatentProblem) -> str:
    """What to say where no solve tells of modes past r."""
    return (f"What modes past the {latent.r} of the basis add to readings is not known, because the forward problem "
            f"fails with them ({latent.failure}): mend it there, or give a basis of more modes, "
            "karhunen_loeve(prior, r).")


def _words(found: Chains, method: str) -> str:
    """What a user wants to know of a run, in a line."""
    (chains, n, _), (rhat, effective) = found.draws.shape, found.worst
    force = "" if method != "hmc" else "exact gradients, " if found.exact else "gradients of the linearised problem, "
    return (f"{chains * n:,} draws of {chains:,} chains, {found.acceptance:.0%} of the proposals accepted, R-hat at "
            f"most {rhat:.3f}, at least {effective:,.0f} effective draws, {force}{found.solves:,} solves and "
            f"{found.pulls:,} adjoint solves")


def _warn(text: str) -> None:
    warnings.warn(text, ConvergenceWarning, stacklevel=4)
