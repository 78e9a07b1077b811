"""A published benchmark: 64 stiffnesses of a membrane from 169 readings, checked and corrected.

The problem is that of Aristoff and Bangerth (SIAM Review 2023, arXiv 2102.07263; see forward.py): u is measured at 13 x
13 points with errors of 0.05, and g = log a of each of 8 x 8 blocks is N(4, 2²) beforehand. It is hard for a trained
model: 64 unknowns, a posterior that is far from Gaussian, with two modes in some blocks, and readings larger than those
of nearly all simulations. The forward model takes half a millisecond, so what matters is how many solves.

    python demos/membrane/membrane.py [--output FOLDER] [--reference]

compares the trained posterior and the corrected one with docs/results/membrane_reference.csv. `--reference` computes
that file anew by Hamiltonian Monte Carlo.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from arviz_stats.base import array_stats
from matplotlib import pyplot as plt

from fem_diffusion import (
    GaussianNoise, GaussianPrior, InputError, InverseProblem, SolveError, TrainingOptions, amortised_gap, field, fit,
    hmc, point_sensors, simulate,
)
from fem_diffusion.checks import read_arguments

sys.path.insert(0, str(Path(__file__).parent))
from forward import BLOCKS, POINTS, Membrane, measurements  # noqa: E402

REFERENCE = Path(__file__).parents[2] / "docs" / "results" / "membrane_reference.csv"
LEVELS = (0.025, 0.25, 0.5, 0.75, 0.975)
NOISE, MEAN, STD = 0.05, 4.0, 2.0


def benchmark():
    """The inverse problem and its measurement."""
    membrane = Membrane()
    prior = GaussianPrior(membrane.M, STD, mean=MEAN)
    return InverseProblem(prior, membrane, point_sensors(membrane.U, POINTS), GaussianNoise(std=NOISE)), measurements()


# ## The reference


def summary(chains):
    """Rows of the table for chains (c, n, 64) of g: mean, std, quantiles, effective sizes of mean and tails, R-hat."""
    columns = []
    for b in range(chains.shape[2]):
        x = chains[:, :, b]
        tail = array_stats.ess(x, method="tail", prob=(0.05, 0.95))
        columns.append([b, x.mean(), x.std(), *np.quantile(x, LEVELS), array_stats.ess(x), tail, array_stats.rhat(x)])
    return np.array(columns)


def write_reference(chains, file):
    """The table of the docs."""
    names = ["block", "mean", "std", *(f"q{100 * q:g}" for q in LEVELS), "ess_bulk", "ess_tail", "rhat"]
    np.savetxt(file, summary(chains), delimiter=",", header=",".join(names), comments="",
               fmt=["%d"] + 7 * ["%.4f"] + 2 * ["%.0f"] + ["%.4f"])


def read_reference(file=REFERENCE):
    """Mean (64,), std (64,) and quantiles (5, 64) of g."""
    table = np.loadtxt(file, delimiter=",", skiprows=1)
    return table[:, 1], table[:, 2], table[:, 3:3 + len(LEVELS)].T


def errors(values, reference):
    """Of values (n, 64) of g: distance of the mean in reference std, root mean square; smallest and largest ratio of
    std, and the root mean square of its logarithm."""
    mean, std, _ = reference
    ratio = values.std(axis=0, ddof=1) / std
    return (np.sqrt((((values.mean(axis=0) - mean) / std)**2).mean()), ratio.min(), ratio.max(),
            np.sqrt((np.log(ratio)**2).mean()))


# ## The comparison


def run(folder, pairs=10000, solves=(2000, 40000), samples=2000, options=TrainingOptions(), reference=REFERENCE,
        progress=True):
    """The whole job; returns errors by posterior."""
    start = time.perf_counter()
    problem, y = benchmark()
    data = simulate(problem, pairs, seed=1, path=folder / "pairs", progress=progress)
    model = fit(problem, data, options=options, progress=progress)
    print(f"{pairs} pairs; simulated and trained after {time.perf_counter() - start:.0f} s: {model.summary}")
    posterior = model.condition(y)
    print(posterior.check(seed=3))
    found, corrected, reference = {}, None, read_reference(reference)
    try:
        found["amortised"] = posterior.sample(samples, seed=2, progress=progress)
    except InputError as error:
        print(f"no amortised samples: {error}")
    for count in solves:
        begun, before = time.perf_counter(), problem.forward.solves
        try:
            corrected = posterior.correct(solves=count, seed=4, progress=progress)
            found[f"corrected, {count} solves"] = corrected
            print(corrected.certificate)
        except SolveError as error:
            print(f"not corrected by {count} solves: {error}")
        print(f"{problem.forward.solves - before} factorisations, {time.perf_counter() - begun:.0f} s")
    rows = {name: errors(draws.values, reference) for name, draws in found.items()}
    print("\n| posterior | distance of means, rms | ratio of std, least | most | rms of its logarithm |\n"
          "|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    if "amortised" in found:
        right = (field(problem.M, values) for values in reference[:2])
        print(amortised_gap(found["amortised"], *right))
    if found:
        draw(folder, found, reference)
    if corrected is not None:
        posterior.report(
            folder / "report.html", threshold=MEAN + STD, samples=corrected, progress=progress, name="log stiffness",
            reading="deflection", question="How stiff is the membrane, block by block, and where is it above 6, as one "
            "block in six is expected to be?")
    print(f"finished after {time.perf_counter() - start:.0f} s; pictures in {folder}", flush=True)
    return rows


def draw(folder, found, reference):
    """Maps of mean and standard deviation, and the quantiles of every block."""
    *_, (name, samples) = found.items()
    mean, std, quantiles = reference
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.6), layout="constrained")
    for row, values, other, label, colours in zip(axes, (mean, std), (samples.mean(), samples.std()),
                                                  ("mean", "standard deviation"), ("viridis", "magma")):
        both = values, other.dat.data_ro
        limits = {"vmin": np.min(both), "vmax": np.max(both), "cmap": colours, "origin": "lower"}
        for ax, part, title in zip(row, both, ("Hamiltonian Monte Carlo", name)):
            image = ax.imshow(part.reshape(BLOCKS, BLOCKS), extent=(0, 1, 0, 1), **limits)
            ax.set(title=f"{title}: {label}", xlabel="x", ylabel="y")
        figure.colorbar(image, ax=row, label=f"{label} of log a")
    figure.savefig(folder / "maps.png", dpi=150)

    figure, axes = plt.subplots(figsize=(15, 4.6), layout="constrained")
    drawn = [("Hamiltonian Monte Carlo", quantiles, "black")]
    drawn += [(name, np.quantile(draws.values, LEVELS, axis=0), colour) for (name, draws), colour in
              zip(found.items(), ("tab:orange", "tab:green", "tab:blue"))]
    for i, (name, q, colour) in enumerate(drawn):
        x = np.arange(BLOCKS**2) + 0.2 * (i - (len(drawn) - 1) / 2)
        axes.vlines(x, q[0], q[-1], color=colour, linewidth=1)
        axes.vlines(x, q[1], q[-2], color=colour, linewidth=3, label=name)
        axes.plot(x, q[2], "_", color="white", markersize=4)
    axes.axhspan(MEAN - 1.96 * STD, MEAN + 1.96 * STD, color="grey", alpha=0.15, label="95 % of the prior")
    axes.set(xlabel="block (column + 8 row)", ylabel="log a", xlim=(-1, BLOCKS**2), xticks=np.arange(0, BLOCKS**2, 4),
             ylim=(quantiles.min() - 2, 12), title="2.5, 25, 50, 75 and 97.5 %")
    axes.legend(frameon=False, ncols=3, fontsize="small")
    figure.savefig(folder / "blocks.png", dpi=150)
    plt.close("all")


def compute_reference(file, chains=16, draws=2000, progress=True):
    """The reference by Hamiltonian Monte Carlo, written to the file."""
    problem, y = benchmark()
    start = time.perf_counter()
    found = hmc(problem, y, seed=1, chains=chains, draws=draws, progress=progress)
    write_reference(found.draws.values.reshape(chains, draws, -1), file)
    print(f"{found!r}\n{problem.forward.solves} solves, {problem.forward.pulls} pulls, "
          f"{time.perf_counter() - start:.0f} s; table in {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--reference", action="store_true", help="compute the reference anew")
    arguments = read_arguments(parser)
    if arguments.reference:
        compute_reference(REFERENCE)
    run(arguments.output)
