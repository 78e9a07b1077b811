"""What does each part of the default call do? Each switched off in turn, on six problems whose posteriors are known.

    make benchmark-ablation                 # resumable; QUICK=1 tries it at small sizes, in a folder of its own
    python benchmarks/ablation.py --problems banana --without corrections --seeds 0 1

For each problem of benchmarks/problems.py 10,000 pairs that hold their noise are drawn; 5,000 samples for each of its
three measurements are compared with as many exact ones by the classifier two-sample test (C2ST, 0.5 is perfect). Every
row is kept; the same command runs what is missing.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fem_diffusion.checks import read_arguments
from fem_diffusion.comparison import c2st, write_csv
from fem_diffusion.diffusion import Sampler, TrainingOptions, fit_denoiser, sample_latents
from fem_diffusion.files import write_bytes
from peers import read
from problems import PROBLEMS, SCALED, Problem


@dataclass(frozen=True)
class Case:
    """A problem, and what a user tells `fit_denoiser` about it."""

    problem: Problem
    told: dict


# Standard normal priors, an unknown one, readings over decades, bounds, and noise that depends on the latents.
CASES = {case.problem.name: case for case in (
    Case(PROBLEMS["bimodal"], {"standard_prior": True}), Case(PROBLEMS["banana"], {"standard_prior": True}),
    Case(PROBLEMS["spiral"], {}), Case(SCALED["decades"], {}), Case(SCALED["bounded"], {}),
    Case(SCALED["unknown-spread"], {"standard_prior": True}))}
# What changes in the arguments of `fit_denoiser` and of `Sampler` where a part is left out.
PARTS: dict[str, tuple[Callable[[dict], dict], dict]] = {
    "corrections": (lambda arguments: arguments, {"corrections": 0}),
}
DEFAULT = "nothing"


@dataclass(frozen=True)
class Size:
    """Pairs, samples of each posterior, seeds, steps of training at most."""

    pairs: int = 10000
    samples: int = 5000
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = TrainingOptions.steps


FULL, QUICK = Size(), Size(1000, 1000, (0,), 500)


def rows_of(case: Case, part: str, seed: int, size: Size) -> list[dict]:
    """Train without a part, and compare samples of each measurement."""
    z, y = (torch.from_numpy(x) for x in case.problem.draw(size.pairs, seed))
    change, sampler = PARTS.get(part, (lambda arguments: arguments, {}))
    arguments = change({**case.told, "options": TrainingOptions(seed=seed, steps=size.steps)})
    start = time.process_time()
    denoiser, _ = fit_denoiser(z, y, progress=False, **arguments)
    training = time.process_time() - start
    found = []
    for number, observation in enumerate(case.problem.observations):
        samples = sample_latents(denoiser.at(torch.from_numpy(observation)[None]), size.samples, Sampler(**sampler),
                                 seed=seed, progress=False)[0]
        exact = case.problem.conditional(observation, size.samples, seed=number)
        found.append({"problem": case.problem.name, "without": part, "seed": str(seed), "observation": str(number),
                      "c2st": f"{c2st(exact, samples.numpy()):.4f}", "training_s": f"{training:.0f}"})
    return found


def run(file: Path, problems: list[str], parts: list[str], seeds: list[int], size: Size) -> list[dict]:
    """All rows, made where they are missing."""
    for seed in seeds:
        for name in problems:
            for part in parts:
                rows = read(file)
                if any((row["problem"], row["without"], row["seed"]) == (name, part, str(seed)) for row in rows):
                    continue
                rows += rows_of(CASES[name], part, seed, size)
                write_csv(rows, file)
                print(f"{name} without {part}, seed {seed}: "
                      f"C2ST {np.mean([float(row['c2st']) for row in rows[-3:]]):.3f}", flush=True)
                write_bytes(file.with_suffix(".md"), f"{table(rows)}\n".encode())
    return read(file)


def table(rows: list[dict]) -> str:
    """Markdown: mean C2ST over measurements and seeds, and its standard error over seeds where there are several."""
    parts = [DEFAULT, *PARTS]
    lines = [f"| problem | seeds | default | {' | '.join(f'without {part}' for part in PARTS)} | training, s |",
             "|---" * (len(parts) + 3) + "|"]
    for name in CASES:
        here = [row for row in rows if row["problem"] == name]
        cells = []
        for part in parts:
            seeds = {row["seed"] for row in here if row["without"] == part}
            means = [np.mean([float(row["c2st"]) for row in here if (row["without"], row["seed"]) == (part, seed)])
                     for seed in sorted(seeds)]
            error = f" ± {np.std(means, ddof=1) / len(means)**0.5:.3f}" if len(means) > 1 else ""
            cells.append(f"{np.mean(means):.3f}{error}" if means else "")
        if here:
            seconds = [float(row["training_s"]) for row in here if row["without"] == DEFAULT]
            lines.append(f"| {name} | {len({row['seed'] for row in here})} | {' | '.join(cells)} | "
                         f"{np.mean(seconds) if seconds else np.nan:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, into a folder of its own")
    parser.add_argument("--problems", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--without", nargs="+", choices=[DEFAULT, *PARTS], default=[DEFAULT, *PARTS])
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "ablation")
    arguments = read_arguments(parser)
    torch.set_num_threads(1)
    size = QUICK if arguments.quick else FULL
    file = arguments.output / ("quick.csv" if arguments.quick else "full.csv")
    print(table(run(file, arguments.problems, arguments.without, arguments.seeds or size.seeds, size)))


if __name__ == "__main__":
    main()
