"""Ways to sample a trained denoiser, and what the comparison protocol makes of them: its combinations."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

from fem_diffusion.checks import check_all, check_choice, check_count, check_kind, check_seed
from fem_diffusion.diffusion import Formulation, Sampler, straight_line, variance_exploding, variance_preserving
from fem_diffusion.errors import InputError

__all__ = ["FEW_SAMPLERS", "SAMPLERS", "Combination", "Plan", "combine"]


def _plain(method: str, alpha: float = 0.0) -> Sampler:
    return Sampler(alpha, method=method, coordinates="plain", nodes="time")


# By their names in tables and pictures.
SAMPLERS: Mapping[str, Sampler] = {
    "Euler-Maruyama": _plain("euler", 1.0),
    "Euler ODE": _plain("euler"),
    "Heun ODE": _plain("heun"),
    "Heun SDE": _plain("heun", 1.0),
    "DPM-Solver++(2M)": _plain("dpm_solver"),
    "SDE-DPM-Solver++(2M)": _plain("dpm_solver", 1.0),
    "predictor-corrector": _plain("predictor_corrector", 1.0),
    "whitened multistep in time": Sampler(nodes="time"),
    "whitened multistep": Sampler(),
    "whitened Heun ODE": Sampler(method="heun"),
    "whitened Heun SDE": Sampler(1.0),
    "adaptive": Sampler(method="adaptive"),
}
# What `compare` runs where nothing is said: the usual SDE, the best plain solver, ours, and the converged ODE.
FEW_SAMPLERS: Mapping[str, Sampler] = {name: SAMPLERS[name] for name in (
    "Euler-Maruyama", "DPM-Solver++(2M)", "whitened multistep", "whitened Heun SDE", "adaptive")}


@dataclass(frozen=True)
class Combination:
    """One cell of the comparison.

    Parameters
    ----------
    name : str
        Of the sampler, for tables and pictures.
    sampler : Sampler
        With its steps, and its formulation where that makes a difference.
    budget : int
        Largest number of network evaluations; 0 where the method chooses it.
    """

    name: str
    sampler: Sampler
    budget: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells its row from the others of a training."""
        formulation = self.sampler.formulation
        return "any" if formulation is None else formulation.name, self.name, str(self.budget)


def combine(formulations: Sequence[Formulation], samplers: Mapping[str, Sampler],
            budgets: Sequence[int]) -> tuple[Combination, ...]:
    """Every sampler under every formulation that makes a difference to it, at every budget that buys a step.

    Parameters
    ----------
    formulations : sequence of Formulation
        With names of their own.
    samplers : mapping of str to Sampler
        By their names; adaptive ones run once. Their steps and formulations are replaced.
    budgets : sequence of int
        Network evaluations.

    InputError is raised if two formulations share a name, something is of another type, a budget is not a positive
    integer, or a formulation does not reach as far as a sampler needs.
    """
    formulations = check_all(formulations, "formulations", Formulation)
    if len({item.name for item in formulations}) < len(formulations):
        raise InputError("Two formulations share a name; give each its own.")
    check_kind(samplers, "samplers", Mapping, "a dict of names and Samplers, such as SAMPLERS")
    check_all(tuple(samplers), "The names of samplers", str, "strings")
    check_all(samplers.values(), "samplers", Sampler)
    budgets = sorted(check_count(budget, "A budget") for budget in check_all(budgets, "budgets", Real, "numbers"))
    result = []
    for name, sampler in samplers.items():
        matters = sampler.coordinates == "plain" or sampler.nodes == "time" or callable(sampler.alpha)
        for formulation in formulations if matters else (None,):
            sampler = replace(sampler, formulation=formulation)
            if sampler.method == "adaptive":
                result.append(Combination(name, sampler, 0))
                continue
            result += [Combination(name, replace(sampler, steps=steps), budget) for budget in budgets
                       if (steps := bisect_right(range(1, budget + 1), budget, key=sampler.scheme.evaluations))]
    return tuple(result)


@dataclass(frozen=True)
class Plan:
    """What `compare` compares.

    Parameters
    ----------
    formulations, samplers, budgets
        As for `combine`; five telling ones of `SAMPLERS` where left out.
    seeds : sequence of int
        Of trainings and samples; results over them show reproducibility.
    bases : sequence of {"gaussian", "plain"}
        Bases to train on.
    held_out : int
        Pairs that are kept from training for the scores.
    draws : int
        Samples for each of them, at least 2; levels of coverage are exact where draws + 1 is a multiple of 20.

    InputError is raised if there is nothing to run, or an argument is of the wrong kind.
    """

    formulations: Sequence[Formulation] = (variance_exploding(), variance_preserving(), straight_line())
    samplers: Mapping[str, Sampler] = field(default_factory=lambda: FEW_SAMPLERS)
    budgets: Sequence[int] = (4, 8, 16, 32, 128)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    bases: Sequence[str] = ("gaussian",)
    held_out: int = 200
    draws: int = 39

    def __post_init__(self):
        check_count(self.held_out, "held_out", least=2)
        check_count(self.draws, "draws", least=2)
        for seed in (seeds := check_all(self.seeds, "seeds", Integral, "integers")):
            check_seed(seed, "A seed")
        for base in (bases := check_all(self.bases, "bases", str, "words")):
            check_choice(base, "A base", ("gaussian", "plain"))
        if not seeds or not bases or not self.combinations:
            raise InputError("There is nothing to compare: give at least one seed, one base, and a sampler with a "
                             "budget that buys it a step.")

    @property
    def combinations(self) -> tuple[Combination, ...]:
        """What is run for each base and seed."""
        return combine(self.formulations, self.samplers, self.budgets)
