"""Ways to sample a trained denoiser, and what the comparison protocol makes of them: its combinations."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from fem_diffusion.checks import check_all, check_choice, check_count, check_number
from fem_diffusion.diffusion import Formulation, evaluations
from fem_diffusion.diffusion.sampling.sample import check_method
from fem_diffusion.errors import InputError

__all__ = ["FEW_SAMPLERS", "SAMPLERS", "Combination", "Sampler", "combine"]


@dataclass(frozen=True)
class Sampler:
    """One way to integrate the reverse process; the arguments are those of `sample_latents`.

    Parameters
    ----------
    name : str
        For tables and pictures.
    method : str
        Name of the method.
    alpha : float
        0 for the ODE, 1 for the usual SDE.
    coordinates : {"whitened", "plain"}
        In which the process is integrated.
    nodes : {"spectrum", "time"}
        Where the steps lie.

    Raises
    ------
    InputError
        If a word is unknown, or alpha no number >= 0.
    """

    name: str
    method: str
    alpha: float = 0.0
    coordinates: str = "whitened"
    nodes: str = "spectrum"

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise InputError(f"The name of a sampler is {self.name!r}: give a word.")
        check_method(self.method, self.coordinates)
        check_choice(self.nodes, "nodes", ("spectrum", "time"))
        check_number(self.alpha, "alpha", least=0)

    @property
    def needs_formulation(self) -> bool:
        """Whether the formulation makes a difference."""
        return self.coordinates == "plain" or self.nodes == "time"

    def steps(self, budget: int) -> int:
        """Largest number of steps that cost at most `budget` network evaluations; 0 if there is none."""
        budget = check_count(budget, "budget", least=0)
        return bisect_right(range(1, budget + 1), budget,
                            key=lambda steps: evaluations(self.method, steps, self.coordinates))


SAMPLERS = (
    Sampler("Euler-Maruyama", "euler", 1.0, "plain", "time"),
    Sampler("Euler ODE", "euler", 0.0, "plain", "time"),
    Sampler("Heun ODE", "heun", 0.0, "plain", "time"),
    Sampler("Heun SDE", "heun", 1.0, "plain", "time"),
    Sampler("DPM-Solver++(2M)", "exponential", 0.0, "plain", "time"),
    Sampler("SDE-DPM-Solver++(2M)", "exponential", 1.0, "plain", "time"),
    Sampler("predictor-corrector", "predictor_corrector", 1.0, "plain", "time"),
    Sampler("whitened multistep in time", "multistep", 0.0, "whitened", "time"),
    Sampler("whitened multistep", "multistep"),
    Sampler("whitened Heun ODE", "heun"),
    Sampler("whitened Heun SDE", "heun", 1.0),
    Sampler("adaptive", "adaptive"),
)
# What `compare` runs where nothing is said: the usual SDE, the best plain solver, ours, and the converged ODE.
FEW_SAMPLERS = tuple(sampler for sampler in SAMPLERS if sampler.name in (
    "Euler-Maruyama", "DPM-Solver++(2M)", "whitened multistep", "whitened Heun SDE", "adaptive"))


@dataclass(frozen=True)
class Combination:
    """One cell of the comparison.

    Parameters
    ----------
    formulation : Formulation or None
        None where it makes no difference.
    sampler : Sampler
        How to integrate.
    budget : int
        Largest number of network evaluations; 0 where the method chooses it.
    """

    formulation: Formulation | None
    sampler: Sampler
    budget: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells its line of the CSV file from the others."""
        return "any" if self.formulation is None else self.formulation.name, self.sampler.name, str(self.budget)


def combine(formulations: Sequence[Formulation], samplers: Sequence[Sampler],
            budgets: Sequence[int]) -> tuple[Combination, ...]:
    """Every sampler under every formulation that makes a difference to it, at every budget that buys a step.

    Parameters
    ----------
    formulations : sequence of Formulation
        With names of their own.
    samplers : sequence of Sampler
        With names of their own; adaptive ones run once.
    budgets : sequence of int
        Network evaluations.

    Returns
    -------
    tuple of Combination

    Raises
    ------
    InputError
        If two formulations or samplers share a name or are of another type, or a budget is not a positive integer.
    """
    formulations = check_all(formulations, "formulations", Formulation)
    samplers = check_all(samplers, "samplers", Sampler)
    for what, group in (("formulations", formulations), ("samplers", samplers)):
        if len({item.name for item in group}) < len(group):
            raise InputError(f"Two {what} share a name; give each its own.")
    budgets = sorted(check_count(budget, "A budget") for budget in check_all(budgets, "budgets", Real, "numbers"))
    result = []
    for sampler in samplers:
        for formulation in formulations if sampler.needs_formulation else (None,):
            if sampler.method == "adaptive":
                result.append(Combination(formulation, sampler, 0))
            else:
                result += [Combination(formulation, sampler, b) for b in budgets if sampler.steps(b)]
    return tuple(result)
