"""What does each part do? One changed at a time in the default call, on six problems whose posteriors are known.

    make benchmark-ablation                 # resumable; QUICK=1 tries it at small sizes, in a folder of its own
    python benchmarks/ablation.py --problems banana --changes "no corrections" --seeds 0 1

For each problem of benchmarks/problems.py 10,000 pairs that hold their noise are drawn; 5,000 samples for each of its
three measurements are compared with as many exact ones by the classifier two-sample test (C2ST, 0.5 is perfect). Every
row is kept; the same command runs what is missing.
"""

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from scipy.stats import uniform

from fem_diffusion.checks import read_arguments
from fem_diffusion.comparison import c2st, write_csv
from fem_diffusion.diffusion import Sampler, TrainingOptions, fit_denoiser, sample_latents
from fem_diffusion.diffusion.training import measured
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
    Case(PROBLEMS["spiral"], {}), Case(SCALED["decades"], {"prior": uniform(-9, 6)}),
    Case(SCALED["bounded"], {"prior": uniform(-1, 2)}),
    Case(SCALED["unknown-spread"], {"standard_prior": True}))}


@dataclass(frozen=True)
class Change:
    """What is changed: arguments of `fit_denoiser`, its options or the sampler; a function that finds nothing."""

    call: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    sampler: dict = field(default_factory=dict)
    left_out: str | None = None

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Training without the function that is left out."""
        if self.left_out is None:
            yield
        else:
            with patch.object(measured, self.left_out, lambda *arguments, **named: None):
                yield


CHANGES = {"default": Change(), "no scales": Change(call={"scales": "identity"}),
           "constant noise": Change(left_out="fit_noise"), "three networks": Change(options={"members": 3}),
           "no corrections": Change(sampler={"corrections": 0})}


@dataclass(frozen=True)
class Size:
    """Pairs, samples of each posterior, seeds, steps of training at most."""

    pairs: int = 10000
    samples: int = 5000
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = TrainingOptions.steps


FULL, QUICK = Size(), Size(1000, 1000, (0,), 500)


def rows_of(case: Case, name: str, seed: int, size: Size) -> list[dict]:
    """Train with a change, and compare samples of each measurement."""
    z, y = (torch.from_numpy(x) for x in case.problem.draw(size.pairs, seed))
    change = CHANGES[name]
    options = TrainingOptions(seed=seed, steps=size.steps, **change.options)
    start = time.process_time()
    with change.training():
        denoiser, _ = fit_denoiser(z, y, options=options, progress=False, **case.told, **change.call)
    training = time.process_time() - start
    found = []
    for number, observation in enumerate(case.problem.observations):
        conditioned = denoiser.at(torch.from_numpy(observation)[None])
        samples = sample_latents(conditioned, size.samples, Sampler(**change.sampler), seed=seed, progress=False)[0]
        exact = case.problem.conditional(observation, size.samples, seed=number)
        found.append({"problem": case.problem.name, "change": name, "seed": str(seed), "observation": str(number),
                      "c2st": f"{c2st(exact, samples.numpy()):.4f}", "training_s": f"{training:.0f}"})
    return found


def run(file: Path, problems: list[str], changes: list[str], seeds: list[int], size: Size) -> list[dict]:
    """All rows, made where they are missing."""
    for seed in seeds:
        for problem in problems:
            for change in changes:
                rows = read(file)
                if any((row["problem"], row["change"], row["seed"]) == (problem, change, str(seed)) for row in rows):
                    continue
                rows += rows_of(CASES[problem], change, seed, size)
                write_csv(rows, file)
                write_bytes(file.with_suffix(".md"), f"{table(rows)}\n".encode())
                print(f"{problem}, {change}, seed {seed}: "
                      f"C2ST {', '.join(row['c2st'] for row in rows[-3:])}", flush=True)
    return read(file)


def table(rows: list[dict]) -> str:
    """Markdown: mean C2ST over measurements and seeds, and its standard error over seeds where there are several."""
    lines = [f"| problem | seeds | {' | '.join(CHANGES)} | training, s |", "|---" * (len(CHANGES) + 3) + "|"]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        here, cells = [row for row in rows if row["problem"] == problem], []
        for change in CHANGES:
            scores: dict[str, list[float]] = {}
            for row in here:
                if row["change"] == change:
                    scores.setdefault(row["seed"], []).append(float(row["c2st"]))
            means = [np.mean(part) for part in scores.values()]
            error = f" ± {np.std(means, ddof=1) / len(means)**0.5:.3f}" if len(means) > 1 else ""
            cells.append(f"{np.mean(means):.3f}{error}" if means else "")
        seconds = [float(row["training_s"]) for row in here if row["change"] == "default"]
        lines.append(f"| {problem} | {len({row['seed'] for row in here})} | {' | '.join(cells)} | "
                     f"{f'{np.mean(seconds):.0f}' if seconds else ''} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, into a folder of its own")
    parser.add_argument("--problems", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "ablation")
    arguments = read_arguments(parser)
    torch.set_num_threads(1)
    size = QUICK if arguments.quick else FULL
    file = arguments.output / ("quick.csv" if arguments.quick else "full.csv")
    print(table(run(file, arguments.problems, arguments.changes, arguments.seeds or size.seeds, size)))


if __name__ == "__main__":
    main()
