"""Side by side with sbi: the same simulations, one thread, reference samples of sbibm, beside published figures.

    make benchmark-peers                            # overnight, in an environment of its own, without Firedrake
    make benchmark-peers QUICK=1                    # minutes: tries it, small and cut short, in a folder of its own
    python benchmarks/peers.py --tasks two_moons --methods fem_diffusion "sbi NPE-NSF" --seeds 0 --observations 1 2 3

For each task and seed 10,000 simulations are drawn once. Each method trains on them with its defaults and draws 10,000
samples for each of sbibm's observations, which are compared with as many reference samples: by the classifier
two-sample test (C2ST, 0.5: not to be told apart, 1: nothing in common) and by the sliced Wasserstein distance, in units
of the reference's standard deviations. The log density is the mean over 100 pairs that no method has seen. Times are
those of the processor.

Draws and rows are files of their own, so that a killed run goes on where it was. Delete output/peers/full/draws/METHOD,
and the same command makes and scores that method's draws anew.
"""

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fem_diffusion import files
from fem_diffusion.checks import read_arguments
from fem_diffusion.comparison import c2st, sliced_wasserstein, write_csv
from fem_diffusion.diffusion import TrainingOptions, fit_denoiser, log_density, sample_latents

TASKS = ("two_moons", "gaussian_mixture", "slcp", "gaussian_linear")
# Mean C2ST over sbibm's 10 observations at 10,000 simulations, the best of the methods that are compared there.
SOURCE = "10,000 simulations; summary in the repository of arXiv 2504.17660"
PUBLISHED = (("two_moons", "published, best", 0.543), ("gaussian_mixture", "published, best", 0.529),
             ("slcp", "published, likelihood estimation", 0.761), ("slcp", "published, posterior estimation", 0.851),
             ("gaussian_linear", "published, best", 0.522))
FIELDS = ("task", "method", "seed", "observation", "c2st", "sliced_wasserstein", "log_density", "training_s",
          "sampling_s", "draws")
MEMBERS, REMEDY = 5, "Delete it and run again."


@dataclass(frozen=True)
class Size:
    """How much is run: simulations, samples of each posterior, held-out pairs; epochs at most of sbi's training."""

    simulations: int = 10000
    samples: int = 10000
    held_out: int = 100
    observations: tuple[int, ...] = tuple(range(1, 11))
    seeds: tuple[int, ...] = tuple(range(5))
    epochs: int = 2**31 - 1


FULL = Size()
QUICK = Size(1000, 1000, 100, (1, 2), (0,), 20)


@dataclass(frozen=True)
class Trained:
    """What training returns: samples (n, r) for a measurement (1, k), log densities (B,) of pairs (B, r) and (B, k)."""

    sample: Callable[[Tensor, int], Tensor]
    log_density: Callable[[Tensor, Tensor], Tensor]


def ours(prior, theta: Tensor, x: Tensor, seed: int, size: Size) -> Trained:
    """The default call, told the prior as sbi is."""
    denoiser, _ = fit_denoiser(theta, x, prior=prior, options=TrainingOptions(seed=seed), progress=False)
    return Trained(lambda y, n: sample_latents(denoiser.at(y), n, seed=seed, progress=False)[0],
                   lambda z, y: log_density(denoiser.at(y), z[:, None])[:, 0])


def peer(name: str, **defaults: str) -> Callable[..., Trained]:
    """The sbi trainer of this name, with its defaults but for these, as `ours`."""
    def fit(prior, theta: Tensor, x: Tensor, seed: int, size: Size) -> Trained:
        from sbi import inference

        # sbi keeps a training log below the current directory.
        with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
            trainer = getattr(inference, name)(prior, show_progress_bars=False, **defaults)
            trainer.append_simulations(theta, x).train(max_num_epochs=size.epochs)
        posterior = trainer.build_posterior()

        def density(z: Tensor, y: Tensor) -> Tensor:
            if name == "NPE":
                # What lies outside the prior is rejected, so the density is divided by the share that is inside.
                return posterior.log_prob_batched(
                    z[None], y, leakage_correction_params={"num_rejection_samples": 1000})[0]
            with torch.no_grad():
                return posterior.potential_fn.neural_ode(y).log_prob(z)
        return Trained(lambda y, n: posterior.sample((n,), x=y, show_progress_bars=False), density)
    return fit


FLOW = "sbi NPE-NSF"
ENSEMBLE = f"{FLOW}, {MEMBERS} averaged"
TRAINERS = {"fem_diffusion": ours, FLOW: peer("NPE", density_estimator="nsf"), "sbi FMPE": peer("FMPE"),
            "sbi NPSE": peer("NPSE")}
METHODS = (*TRAINERS, ENSEMBLE)


@dataclass(frozen=True)
class Study:
    """Where results are kept, and how much is run."""

    folder: Path
    size: Size

    def pairs(self, task, kind: str, seed: int, n: int) -> tuple[Tensor, Tensor]:
        """Parameters (n, r) and measurements (n, k) of a task, drawn once and kept."""
        file = self.folder / f"{kind}-{task.name}-{seed}.safetensors"
        if not file.exists():
            torch.manual_seed((1000 if kind == "training" else 2000) + seed)
            theta = task.get_prior()(num_samples=n)
            files.write(file, "simulations", {"theta": theta.numpy(), "x": task.get_simulator()(theta).numpy()}, {})
        arrays = files.read(file, "simulations", REMEDY).arrays
        return torch.from_numpy(arrays["theta"]), torch.from_numpy(arrays["x"])

    def draws(self, task, method: str, seed: int, numbers: Sequence[int], member: int = 0) -> list[files.Content]:
        """Samples for observations of a task, drawn once and kept; trained only where some are missing."""
        folder = self.folder / "draws" / (f"{method} {member}" if member else method)
        files.make_folder(folder)
        places = {number: folder / f"{task.name}-{seed}-{number}.safetensors" for number in numbers}
        if missing := [number for number, file in places.items() if not file.exists()]:
            made = (self.averaged(task, seed, missing) if method == ENSEMBLE else
                    self.drawn(task, method, seed, missing, member))
            for number, (arrays, values) in zip(missing, made):
                files.write(places[number], "draws", arrays, values)
        return [files.read(file, "draws", REMEDY) for file in places.values()]

    def drawn(self, task, method: str, seed: int, numbers: Sequence[int], member: int) -> Iterator[tuple[dict, dict]]:
        """Train a method; for each observation samples and log densities of held-out pairs, and what they took."""
        pairs = self.pairs(task, "training", seed, self.size.simulations)
        torch.manual_seed(seed + 1000 * member)
        start = time.process_time()
        trained = TRAINERS[method](task.get_prior_dist(), *pairs, seed, self.size)
        training = time.process_time() - start
        densities = trained.log_density(*self.pairs(task, "held-out", seed, self.size.held_out)).double().numpy()
        for number in numbers:
            start = time.process_time()
            samples = trained.sample(task.get_observation(num_observation=number), self.size.samples)
            yield ({"samples": samples.double().numpy(), "log_density": densities},
                   {"training_s": training, "sampling_s": time.process_time() - start})

    def averaged(self, task, seed: int, numbers: Sequence[int]) -> Iterator[tuple[dict, dict]]:
        """The same of the even mixture of several flows, as many samples of each, and what they took together."""
        share = -(-self.size.samples // MEMBERS)
        for members in zip(*(self.draws(task, FLOW, seed, numbers, member) for member in range(MEMBERS))):
            samples = np.concatenate([one.array("samples", None, None)[:share] for one in members])
            densities = np.stack([one.array("log_density", None, finite=False) for one in members])
            yield ({"samples": samples[:self.size.samples],
                    "log_density": np.logaddexp.reduce(densities) - math.log(MEMBERS)},
                   {"training_s": sum(one.value("training_s", float) for one in members),
                    "sampling_s": sum(one.value("sampling_s", float) for one in members) / MEMBERS})

    def row(self, task, method: str, seed: int, number: int, draws: files.Content) -> dict:
        """Distances of the samples of one posterior to as many reference samples."""
        samples = draws.array("samples", self.size.samples, None)
        reference = task.get_reference_posterior_samples(num_observation=number).double().numpy()[:len(samples)]
        scale = reference.std(axis=0)
        found = (c2st(reference, samples), sliced_wasserstein(reference / scale, samples / scale),
                 float(draws.array("log_density", None, finite=False).mean()))
        return dict(zip(FIELDS, (task.name, method, str(seed), str(number), *(f"{value:.4f}" for value in found),
                                 f"{draws.value('training_s', float):.0f}", f"{draws.value('sampling_s', float):.2f}",
                                 draws.checksum[:16])))


def read(file: Path) -> list[dict]:
    """Rows that are there already."""
    if not file.exists():
        return []
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def run(study: Study, tasks: list, methods: list[str], seeds: list[int], numbers: list[int]) -> list[dict]:
    """All rows, made where they are missing or their draws are others."""
    file = study.folder / "peers.csv"
    for seed in seeds:
        for method in methods:
            for task in tasks:
                for number, draws in zip(numbers, study.draws(task, method, seed, numbers)):
                    rows, key = read(file), (task.name, method, str(seed), str(number))
                    others = [row for row in rows if tuple(row[name] for name in FIELDS[:4]) != key]
                    if any(row["draws"] == draws.checksum[:16] for row in rows if row not in others):
                        continue
                    row = study.row(task, method, seed, number, draws)
                    print(f"{task.name}, {method}, seed {seed}, observation {number}: C2ST {row['c2st']}", flush=True)
                    write_csv([*others, row], file)
                    files.write_bytes(study.folder / "peers.md", f"{table(read(file))}\n".encode())
    return read(file)


def table(rows: list[dict]) -> str:
    """Markdown: means over seeds and observations, and how many of them there are; the best C2ST of a task is bold."""
    lines = ["| task | method | seeds | observations | C2ST | worst | sliced Wasserstein | log density | training, s "
             "| sampling, s |", "|---|---|---|---|---|---|---|---|---|---|"]
    for task in TASKS:
        parts = {method: [row for row in rows if (row["task"], row["method"]) == (task, method)] for method in METHODS}
        means = {method: np.mean([[float(row[name]) for name in FIELDS[4:9]] for row in part], axis=0)
                 for method, part in parts.items() if part}
        best = min((mean[0] for mean in means.values()), default=0)
        for method, (score, distance, density, training, sampling) in means.items():
            part, mark = parts[method], "**" if score == best else ""
            worst = max(float(row["c2st"]) for row in part)
            counts = (len({row[name] for row in part}) for name in ("seed", "observation"))
            lines.append(f"| {task} | {method} | {' | '.join(map(str, counts))} | {mark}{score:.3f}{mark} "
                         f"| {worst:.3f} | {distance:.3f} | {density:.2f} | {training:.0f} | {sampling:.1f} |")
        lines += [f"| {task} | {method} ({SOURCE}) | | 10 | {score:.3f} | | | | | |"
                  for name, method, score in PUBLISHED if name == task and means]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, into a folder of its own")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--observations", nargs="+", type=int, choices=FULL.observations)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "peers")
    arguments = read_arguments(parser)
    import sbibm

    torch.set_num_threads(1)
    size = QUICK if arguments.quick else FULL
    study = Study(arguments.output / ("quick" if arguments.quick else "full"), size)
    files.make_folder(study.folder)
    with files.locked(study.folder / "lock", str(study.folder)):
        print(table(run(study, [sbibm.get_task(name) for name in arguments.tasks], arguments.methods,
                        arguments.seeds or size.seeds, arguments.observations or size.observations)))


if __name__ == "__main__":
    main()
