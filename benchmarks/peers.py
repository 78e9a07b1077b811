"""Side by side with sbi: the same simulations, one thread, default settings, reference samples of sbibm.

    make benchmark-peers                                        # in an environment of its own, without Firedrake
    python benchmarks/peers.py --tasks two_moons slcp --seeds 0 1

For each task and seed, 10,000 simulations are drawn once; `fit_denoiser`, sbi's NPE and sbi's NPSE train on them with
their defaults and draw 10,000 samples for each of the observations 1 to 3 of sbibm, which are compared with its
reference samples by the classifier two-sample test (0.5: not to be told apart, 1: nothing in common). sbi is told the
prior and discards samples outside its support; `fit_denoiser` sees the pairs alone. Every finished row is kept; the
same command runs what is missing.
"""

import argparse
import csv
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path

import torch
from torch import Tensor

from fem_diffusion import files
from fem_diffusion.comparison import c2st
from fem_diffusion.diffusion import fit_denoiser, sample_latents

SIMULATIONS, SAMPLES, OBSERVATIONS = 10000, 10000, (1, 2, 3)
FIELDS = ("task", "method", "seed", "observation", "c2st", "training_s", "sampling_s")


def ours(task, theta: Tensor, x: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """The default call; returns a function from a measurement (1, k) to samples."""
    denoiser, _ = fit_denoiser(theta, x, progress=False)
    return lambda y: sample_latents(denoiser.at(y), SAMPLES, seed=seed, progress=False)[0]


def peer(name: str) -> Callable:
    """The sbi trainer of this name with its defaults, as `ours`."""
    def fit(task, theta: Tensor, x: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
        from sbi import inference

        # sbi keeps a training log below the current directory.
        with tempfile.TemporaryDirectory() as scratch, chdir(scratch):
            trainer = getattr(inference, name)(task.get_prior_dist())
            trainer.append_simulations(theta, x).train()
        posterior = trainer.build_posterior()
        return lambda y: posterior.sample((SAMPLES,), x=y, show_progress_bars=False)
    return fit


METHODS = {"fem_diffusion": ours, "sbi NPE": peer("NPE"), "sbi NPSE": peer("NPSE")}


def simulate(task, folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Parameters (n, r) and measurements (n, k) of a task, drawn once and kept."""
    file = folder / f"{task.name}-{seed}.safetensors"
    if not file.exists():
        torch.manual_seed(1000 + seed)
        theta = task.get_prior()(num_samples=SIMULATIONS)
        files.write(file, "simulations", {"theta": theta.numpy(), "x": task.get_simulator()(theta).numpy()}, {})
    arrays = files.read(file, "simulations", "Delete it and run again.").arrays
    return torch.from_numpy(arrays["theta"]), torch.from_numpy(arrays["x"])


def rows_of(task, method: str, seed: int, folder: Path) -> Iterator[dict]:
    """Train one method on one set of simulations; a row for each observation."""
    theta, x = simulate(task, folder, seed)
    torch.manual_seed(seed)
    start = time.perf_counter()
    sample = METHODS[method](task, theta, x, seed)
    training = time.perf_counter() - start
    for number in OBSERVATIONS:
        start = time.perf_counter()
        samples = sample(task.get_observation(num_observation=number))
        sampling = time.perf_counter() - start
        reference = task.get_reference_posterior_samples(num_observation=number)
        score = c2st(reference.double().numpy(), samples.double().numpy())
        yield dict(zip(FIELDS, (task.name, method, seed, number, round(score, 4), round(training), round(sampling, 1))))


def read(file: Path) -> list[dict]:
    """Rows that are there already."""
    if not file.exists():
        return []
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def table(rows: list[dict]) -> str:
    """Markdown: mean C2ST over seeds for each observation, its mean, and the time of training."""
    lines = ["| task | method | observation 1 | 2 | 3 | mean | training, s | sampling, s |",
             "|---|---|---|---|---|---|---|---|"]
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows):
        chosen = [row for row in rows if (row["task"], row["method"]) == (task, method)]

        def mean(name, selected=chosen):
            return sum(float(row[name]) for row in selected) / len(selected)
        each = [mean("c2st", [row for row in chosen if int(row["observation"]) == n]) for n in OBSERVATIONS]
        lines.append(f"| {task} | {method} | " + " | ".join(f"{value:.3f}" for value in each)
                     + f" | **{mean('c2st'):.3f}** | {mean('training_s'):.0f} | {mean('sampling_s'):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["two_moons", "gaussian_mixture"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "peers")
    arguments = parser.parse_args()
    import sbibm

    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "peers.csv"
    for task in map(sbibm.get_task, arguments.tasks):
        for seed in arguments.seeds:
            for method in arguments.methods:
                rows = read(file)
                if any((r["task"], r["method"], int(r["seed"])) == (task.name, method, seed) for r in rows):
                    continue
                print(f"{task.name}, seed {seed}: {method}", flush=True)
                rows += rows_of(task, method, seed, arguments.output)
                text = io.StringIO()
                writer = csv.DictWriter(text, FIELDS)
                writer.writeheader()
                writer.writerows(rows)
                files.write_bytes(file, text.getvalue().encode())
    rows = [row for row in read(file) if row["task"] in arguments.tasks]
    print(table(rows))
    files.write_bytes(arguments.output / "peers.md", f"{table(rows)}\n".encode())


if __name__ == "__main__":
    main()
