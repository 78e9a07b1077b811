"""Formulations times samplers times network evaluations on canonical conditional density problems.

    make benchmark-formulations QUICK=1                   # minutes
    make benchmark-formulations                           # everything; docs/formulations.md says what came out
    python benchmarks/formulations.py --size sharp        # few samplers, many samples: a lower floor

One network is trained for each problem, base and seed. Each way to sample it draws some hundred samples for each of
three typical measurements; they are compared with as many exact ones. The floor of a distance is its mean between two
exact sets of that size. Results, tables and pictures go to --folder, or to --results where it is given; the same
command continues what was interrupted.
"""

import argparse
import hashlib
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch

from fem_diffusion.comparison import (
    SAMPLERS, Combination, Training, c2st, combine, convergence, mmd, plot_costs, plot_overview,
    run_protocol, sinkhorn, sliced_wasserstein, summarise, write_csv, write_markdown,
)
from fem_diffusion.diffusion import (
    Denoiser, Formulation, Sampler, TrainingOptions, fit_denoiser, straight_line, sub_variance_preserving,
    variance_exploding, variance_preserving,
)
from fem_diffusion.files import write_bytes
from problems import PROBLEMS, Problem

# The noise levels of Karras et al. (2022), eq. 5, as a formulation.
EDM = Formulation("EDM", lambda t: (0.005**(1 / 7) + t * (100**(1 / 7) - 0.005**(1 / 7)))**14, torch.ones_like)
FORMULATIONS = (variance_exploding(), variance_preserving(), EDM, variance_preserving(schedule="cosine"),
                sub_variance_preserving(), straight_line())
# Formulations that are followed beyond 32 evaluations, which is most of the cost.
LONG = ("VE", "VP")
# The cost of the last two grows with the square of the number of points.
DISTANCES = {"sliced_wasserstein": partial(sliced_wasserstein, projections=50),
             "mmd": lambda reference, samples: mmd(reference[:1000], samples[:1000]),
             "sinkhorn": lambda reference, samples: sinkhorn(reference[:100], samples[:100])}
OURS, CLASSIC = "whitened multistep", "Euler-Maruyama"
# C2ST takes seconds: only for these samplers, under VP, for the first measurement and 8 evaluations.
CLASSIFIED = (OURS, CLASSIC)
SHARP_SAMPLERS = (OURS, "whitened Heun SDE", CLASSIC, "Euler ODE", "DPM-Solver++(2M)", "adaptive")
# Where the base matters most is asked with the plain base, too.
PLAIN_PROBLEMS = ("banana", "mixture-10d", "linear-gaussian")
PLAIN_SAMPLERS = (OURS, CLASSIC, "Heun ODE", "DPM-Solver++(2M)", "adaptive")


@dataclass(frozen=True)
class Size:
    """How much is run.

    Parameters
    ----------
    pairs : int
        Joint samples for a training.
    samples : int
        For each of three measurements.
    seeds : int
        Trainings of each problem and base.
    budgets : tuple of int
        Network evaluations.
    formulations : tuple of Formulation
        Of the plain samplers.
    samplers : mapping of str to Sampler
        All that are compared, by name.
    plain_problems : tuple of str
        Problems that are trained with the plain base, too.
    options : TrainingOptions
        Of every training.
    """

    pairs: int
    samples: int
    seeds: int
    budgets: tuple[int, ...]
    formulations: tuple[Formulation, ...]
    samplers: Mapping[str, Sampler]
    plain_problems: tuple[str, ...]
    options: TrainingOptions


OPTIONS = TrainingOptions(steps=2500, batch=128, width=64, depth=2)
SIZES = {
    "full": Size(10000, 150, 5, (2, 4, 8, 16, 32, 64, 128, 500), FORMULATIONS, SAMPLERS, PLAIN_PROBLEMS, OPTIONS),
    "quick": Size(4000, 100, 1, (2, 4, 8, 32, 128), FORMULATIONS[:2], SAMPLERS, (),
                  replace(OPTIONS, steps=1000, width=48)),
    "sharp": Size(10000, 2000, 2, (2, 4, 8, 16, 32, 128, 500), FORMULATIONS[:2],
                  {name: SAMPLERS[name] for name in SHARP_SAMPLERS}, (), OPTIONS),
}


def floor(problem: Problem, n: int, name: str, distance: Callable, repeats: int = 8) -> float:
    """Mean of a distance between two exact sets of n samples, over measurements and repeats."""
    observations = problem.observations[:1] if name == "c2st" else problem.observations
    return float(np.mean([distance(*(problem.conditional(y, n, _seed(problem.name, "floor", i, j, k)) for k in (0, 1)))
                          for i, y in enumerate(observations) for j in range(repeats)]))


def _seed(*parts: str | int) -> int:
    """A seed of its own for every name: one seed for all would make their chances one."""
    return zlib.crc32(repr(parts).encode())


@cache
def floors(problem: str, n: int) -> dict[str, float]:
    """Floors of all distances."""
    return {name: floor(PROBLEMS[problem], n, name, f) for name, f in DISTANCES.items()} | {
        "c2st": floor(PROBLEMS[problem], min(n, 200), "c2st", c2st, repeats=2)}


def exact_scores(problem: Problem, size: Size, seed: int) -> Callable:
    """The score of samples against exact ones: distances as means over the measurements, floors, ratios."""
    n = size.samples
    references = [problem.conditional(y, n, _seed(problem.name, seed, i))
                  for i, y in enumerate(problem.observations)]

    def score(samples: np.ndarray, combination: Combination) -> dict[str, float]:
        chance = floors(problem.name, n)
        finite = (np.abs(samples) < 1e100).all()
        result = {}
        for name, distance in DISTANCES.items():
            value = np.mean([distance(*pair) for pair in zip(references, samples)]) if finite else np.inf
            result |= {name: value, f"{name}_floor": chance[name], f"{name}_ratio": value / chance[name]}
        classified = (combination.name in CLASSIFIED and combination.budget == 8
                      and combination.key[0] in ("any", "VP"))
        result["c2st"] = (c2st(references[0][:200], samples[0][:200]) if finite else 1.0) if classified else np.nan
        return result | {"c2st_floor": chance["c2st"]}
    return score


def training(problem: Problem, base: str, seed: int, size: Size) -> Training:
    """One training of the benchmark with all its combinations."""
    samplers, formulations = size.samplers, size.formulations
    if base == "plain":
        samplers, formulations = {name: samplers[name] for name in PLAIN_SAMPLERS}, formulations[:2]
    # One step must do where the base is the answer.
    budgets = (1, *size.budgets) if problem.name == "linear-gaussian" else size.budgets
    cells = tuple(c for c in combine(formulations, samplers, budgets)
                  if c.budget <= 32 or c.sampler.formulation is None or c.sampler.formulation.name in LONG)

    def fit(checkpoint: Path) -> Denoiser:
        z, y = (torch.as_tensor(x) for x in problem.draw(size.pairs, seed))
        return fit_denoiser(z, y, None, base=base, options=replace(size.options, seed=seed), checkpoint=checkpoint,
                            progress=False)[0]
    return Training(problem.name, base, seed, fit, torch.as_tensor(problem.observations), size.samples,
                    exact_scores(problem, size, seed), cells)


def settings(size: Size) -> dict:
    """What the rows depend on: sizes, training, and the problems themselves."""
    digest = hashlib.sha256()
    for problem in PROBLEMS.values():
        for part in (*problem.draw(8, 0), problem.observations, problem.conditional(problem.observations[0], 8, 0)):
            digest.update(np.ascontiguousarray(part).tobytes())
    return {"pairs": size.pairs, "samples": size.samples, "options": asdict(size.options),
            "problems": digest.hexdigest()}


def verdict(rows: list[dict], budget: int = 8, score: str = "sliced_wasserstein") -> list[str]:
    """Whether the goal is met: converged to 5 % at `budget` evaluations, one step where the base is the answer."""
    found = convergence([row for row in rows if row["base"] == "gaussian"], score)

    def of(formulation: str, sampler: str, at: int) -> tuple[dict, float, list[str]]:
        chosen = {k[0]: v for k, v in found.items() if k[2:] == (formulation, sampler)}
        ratio = np.exp(np.mean([np.log(v.error[at]) for v in chosen.values()]))
        met = [name for name, v in chosen.items() if v.budget is not None and v.budget <= at]
        return chosen, ratio, met
    chosen, ratio, met = of("any", OURS, budget)
    missed = [f"{name} ({v.error[budget]:.2f} of the converged error)" for name, v in chosen.items() if name not in met]
    lines = [f"Goal, {budget} network evaluations to come within 5 % of the converged error: {OURS}, met on "
             f"{len(met)} of {len(chosen)} problems, geometric mean {ratio:.3f} of the converged error"
             + (f"; missed on {', '.join(missed)}" if missed else "") + "."]
    budgets = sorted({int(row["budget"]) for row in rows} - {0, 1})
    for formulation in ("VE", "VP"):
        ratio = of(formulation, CLASSIC, budget)[1]
        late = [b for b in budgets if not of(formulation, CLASSIC, b)[1] <= 1.05]
        first = next((b for b in budgets if b > max(late, default=0)), None)
        need = f"needs {first}" if first else f"does not get there with {budgets[-1]}"
        lines.append(f"Plain {CLASSIC} ({formulation}): {ratio:.3g} times the converged error at {budget} evaluations; "
                     f"{need} to come within 5 % in the geometric mean over problems.")
    linear = [line for line in summarise(rows) if (line["problem"], line["base"]) == ("linear-gaussian", "gaussian")
              and line["sampler"] == OURS and line["budget"] == 1]
    lines += [f"Linear-Gaussian, one evaluation: {line[score + '_ratio']:.3f} ± {line[score + '_ratio_spread']:.3f} "
              "times the distance of two exact sets." for line in linear]
    return lines


def report(rows: list[dict], folder: Path, size: Size) -> None:
    """Tables, pictures and the verdict."""
    folder.mkdir(parents=True, exist_ok=True)
    # Ratios to the floors follow from the two; the file is meant to be kept in a repository.
    write_csv([{k: v for k, v in line.items() if "_ratio" not in k} for line in summarise(rows)],
              folder / "summary.csv")
    write_markdown(rows, folder / "summary.md", "sliced_wasserstein")
    for formulation in size.formulations:
        plot_costs(rows, "sliced_wasserstein", folder / f"cost_{formulation.name}.png", formulation=formulation.name,
                   title=f"Error against cost, plain samplers under {formulation.name}")
    plot_overview(rows, "sliced_wasserstein", folder / "overview.png")
    if size.plain_problems:
        plot_costs(rows, "sliced_wasserstein", folder / "cost_plain_base.png", formulation="VP", base="plain",
                   title="Error against cost without the Gaussian base, plain samplers under VP")
    lines = verdict(rows)
    write_bytes(folder / "verdict.md", "".join(f"- {line}\n" for line in lines).encode())
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--folder", type=Path, help="rows and checkpoints (default: benchmarks/output/...)")
    parser.add_argument("--results", type=Path, help="tables and pictures (default: the folder)")
    options = parser.parse_args()
    size = SIZES[options.size]
    folder = options.folder or Path(__file__).parent / "output" / f"formulations-{options.size}"
    trainings = [training(PROBLEMS[name], base, seed, size) for seed in range(size.seeds) for name in options.problems
                 for base in ("gaussian", "plain") if base == "gaussian" or name in size.plain_problems]
    start = time.perf_counter()
    torch.set_num_threads(1)
    rows = run_protocol(trainings, folder, settings(size))
    report(rows, options.results or folder, size)
    print(f"{len(rows)} rows, {(time.perf_counter() - start) / 60:.1f} minutes: {options.results or folder}")


if __name__ == "__main__":
    main()
