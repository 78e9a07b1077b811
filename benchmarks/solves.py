"""How many solves does a posterior take? Errors against the number of pairs, with derivatives and without.

The positive flux through the wall of a channel (demos/boundary_flux): sixteen sensors, three truths, Hamiltonian Monte
Carlo as reference. For each number of pairs: the Gaussian base alone, models from values alone and from values and
derivatives, and the latter corrected by 2,000 more solves; beside them Laplace's approximation, which learns from no
pairs. What is done is kept in the output folder, and an interrupted run goes on there.

    python benchmarks/solves.py [--quick] [--sizes 50 100 ...] [--ways derivatives ...] [--output FOLDER]
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "demos" / "boundary_flux"))
import boundary_flux as demo  # noqa: E402  (demos is a folder of scripts, not a package)
import torch  # noqa: E402  (after Firedrake)

from fem_diffusion import (  # noqa: E402
    Denoiser, GaussianNoise, History, InverseProblem, Model, coefficients, fit, karhunen_loeve,
    laplace, load_model, simulate,
)
from fem_diffusion.checks import read_arguments  # noqa: E402
from fem_diffusion.diffusion import fit_base  # noqa: E402

SIZES, QUICK = (50, 100, 200, 500, 1000, 4000, 10000), (50, 100)
WAYS = ("gaussian", "values", "derivatives", "corrected")
# Pairs with derivatives, at most; those whose readings make the level of the noise.
SLOPES, LEVEL = 1000, 2000
SAMPLES, SOLVES = 4000, 2000


def kept(file, make):
    """What a JSON file holds, made and written where it is missing."""
    if not file.exists():
        text = json.dumps(make())
        file.with_suffix(".partial").write_text(text)
        file.with_suffix(".partial").rename(file)
    return json.loads(file.read_text())


def cost(problem, n=128):
    """CPU time of `simulate` with derivatives over that without, each after a run that compiles."""
    seconds = []
    for derivatives in (False, True, False, True):
        start = time.process_time()
        simulate(problem, n, seed=5, derivatives=derivatives, progress=False)
        seconds.append(time.process_time() - start)
    return seconds[3] / seconds[2]


def train(way, problem, data):
    """A model of one kind."""
    if way != "gaussian":
        return fit(problem, data, progress=False)
    basis = data.basis.leading(min(data.basis.r, len(data) // 4))
    z, c = torch.from_numpy(basis.encode(data.coefficients)), torch.from_numpy(data.readings)
    return Model(problem, basis, Denoiser(fit_base(z, c, problem.noise.covariance(c), True), known=True), History())


def errors(samples, reference):
    """Errors of mean and standard deviation over the wall, against a reference."""
    return [float(demo.error(coefficients(found), np.array(reference[name])))
            for found, name in ((samples.mean(), "mean"), (samples.std(), "std"))]


def cell(samples, reference):
    """Errors of what `samples` draws, and CPU seconds of drawing it."""
    start = time.process_time()
    found = errors(samples(), reference)
    return {"errors": found, "seconds": time.process_time() - start}


def run(folder, sizes=SIZES, ways=WAYS, truths=demo.TRUTHS, progress=True):
    """All cells by way, number of pairs and truth, made where they are missing."""
    prior, forward = demo.positive_case()
    silent = InverseProblem(prior, forward, demo.observation)
    level = kept(folder / "noise.json", lambda: demo.noise_level * float(np.sqrt((simulate(
        silent, LEVEL, seed=1, path=folder / "pairs", progress=progress).readings**2).mean())))
    problem = replace(silent, noise=GaussianNoise(std=level))
    measurements = problem.measurements(prior.sample_many(demo.TRUTHS, seed=100), seed=100)
    print(f"derivatives: {kept(folder / 'cost.json', lambda: cost(problem)):.1f} times the CPU time of simulate")

    def reference(i):
        found = demo.hmc_reference(problem, measurements[i], i, progress)
        return {name: found[name].tolist() for name in ("mean", "std")}

    def model(way, n):
        sloped = way in ("derivatives", "corrected") and n <= SLOPES
        kind = way if way == "gaussian" else "derivatives" if sloped else "values"
        file = folder / f"model_{kind}_{n}"

        def make():
            data = simulate(silent, n, seed=1, derivatives=sloped, progress=progress,
                            path=folder / ("pairs_slopes" if sloped else "pairs"))
            if way == "gaussian":
                data = replace(data, basis=karhunen_loeve(prior))
            start = time.process_time()
            train(way, problem, data).save(file)
            return time.process_time() - start
        return kept(file.with_suffix(".json"), make), load_model(file, problem)

    def made(way, n, i, right):
        if way == "laplace":
            return {"training": 0.0} | cell(lambda: laplace(problem, measurements[i]).sample(SAMPLES, seed=i), right)
        with warnings.catch_warnings():
            # How few pairs are is what the table is about.
            warnings.simplefilter("ignore", UserWarning)
            seconds, trained = model(way, n)
            posterior = trained.condition(measurements[i])
            return {"training": seconds} | cell(
                (lambda: posterior.correct(SOLVES, seed=i, draws=SAMPLES, progress=False)) if way == "corrected" else
                (lambda: posterior.sample(SAMPLES, seed=i, progress=False)), right)
    rows = {}
    for i in range(truths):
        right = kept(folder / f"reference_{i}.json", lambda: reference(i))
        for way, n in [("laplace", 0)] + [(way, n) for n in sizes for way in ways]:
            if way != "derivatives" or n <= SLOPES:
                found = kept(folder / f"{way}_{n}_{i}.json", lambda: made(way, n, i, right))
                rows.setdefault((way, n), []).append(found)
                print(f"truth {i + 1}: {line(way, n, [found])}", flush=True)
    return rows


def line(way, n, row):
    """A row of the table."""
    found = ", ".join("{:.1%} / {:.1%}".format(*cell["errors"]) for cell in row)
    return f"| {way} | {n} | {found} | {row[0]['training']:.0f} s | {row[0]['seconds']:.0f} s |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest numbers of pairs alone")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS)
    parser.add_argument("--truths", type=int, default=demo.TRUTHS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "solves")
    arguments = read_arguments(parser)
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = run(arguments.output, arguments.sizes or (QUICK if arguments.quick else SIZES), arguments.ways,
               arguments.truths)
    print("\n| way | pairs | mean / std error of each truth | training | samples |\n|---|---|---|---|---|")
    for (way, n), row in rows.items():
        print(line(way, n, row))


if __name__ == "__main__":
    main()
