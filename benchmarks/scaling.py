"""How time and memory grow with the number of unknowns: prior, modes, pairs, training, posterior mean and deviation.

An unknown source of a diffusion problem on a square, 20 sensors, in 64 modes from 200 pairs. Every size runs in a
process of its own, whose largest resident memory is told. CPU seconds, and those of the clock for all together on a
machine with other work; the slope is that of a straight line through the logarithms of the last three sizes. With
``--details``, for one size: modes and pointwise deviation, encoding and decoding beside the bare matrix product, which
bounds them, and the memory of a thousand samples.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--cells 31 99 316 999] [--details 316]
"""

import argparse
import resource
import subprocess
import sys
import time
import tracemalloc

import numpy as np
from firedrake import DirichletBC, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, grad, inner

MODES, PAIRS, DRAWS = 64, 200, 200
PARTS = ("mesh", "prior", "modes", "pairs", "fit", "samples", "mean and std")


def peak():
    """Largest resident memory so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def timed(function, times):
    """What a function gives; its CPU seconds are appended."""
    begun = time.process_time()
    result = function()
    times.append(time.process_time() - begun)
    return result


def smallest(function, repeats=3):
    """Least CPU seconds of several calls."""
    times = []
    for _ in range(repeats):
        timed(function, times)
    return min(times)


def one(cells):
    """One size, from mesh to posterior."""
    from fem_diffusion import (
        GaussianNoise, GaussianPrior, InverseProblem, Steady, TrainingOptions, fit, karhunen_loeve, point_sensors,
        simulate,
    )

    times, begun = [], time.perf_counter()
    mesh = timed(lambda: UnitSquareMesh(cells, cells), times)
    V = FunctionSpace(mesh, "CG", 1)

    def draw():
        prior = GaussianPrior(V, 1.0, 0.2)
        prior.sample(0)
        return prior
    prior = timed(draw, times)
    basis = timed(lambda: karhunen_loeve(prior, MODES), times)
    u, m, v = Function(V), Function(V), TestFunction(V)
    forward = Steady(inner(grad(u), grad(v)) * dx - m * v * dx, u, m, DirichletBC(V, 0, "on_boundary"))
    sensors = point_sensors(V, np.random.default_rng(0).uniform(0.1, 0.9, (20, 2)))
    problem = InverseProblem(prior, forward, sensors, GaussianNoise(std=1e-3))
    pairs = timed(lambda: simulate(problem, PAIRS, seed=1, progress=False), times)
    model = timed(lambda: fit(problem, pairs, basis=basis, progress=False, options=TrainingOptions(steps=2000)), times)
    y = problem.measurements(prior.sample_many(1, seed=2), seed=3)[0]
    samples = timed(lambda: model.condition(y).sample(DRAWS, seed=4, progress=False), times)
    timed(lambda: (samples.mean(), samples.std()), times)
    wall = time.perf_counter() - begun
    print("row", V.dim(), *(f"{x:.3f}" for x in times), f"{wall:.0f}", f"{peak():.2f}")


def details(cells, modes=256, samples=1000):
    """Modes, deviation, encoding, decoding, and the memory of samples."""
    from fem_diffusion import GaussianPrior, karhunen_loeve
    from fem_diffusion.samples import Samples

    V = FunctionSpace(UnitSquareMesh(cells, cells), "CG", 1)
    times = []
    prior = GaussianPrior(V, 1.0, 0.1)
    timed(lambda: prior.sample(0), times)
    basis = timed(lambda: karhunen_loeve(prior, modes), times)
    print(f"{V.dim()} unknowns: prior with its deviation {times[0]:.1f} s, {modes} modes {times[1]:.1f} s "
          f"(they keep {basis.retained:.1%})", flush=True)
    for n in (1, 16, 256):
        z = np.random.default_rng(0).standard_normal((n, modes))
        fields = basis.decode(z)
        bare = smallest(lambda: fields @ basis.scaled_modes.T), smallest(lambda: z @ basis.scaled_modes)
        ratios = smallest(lambda: basis.encode(fields)) / bare[0], smallest(lambda: basis.decode(z)) / bare[1]
        print(f"{n} fields: encode {ratios[0]:.2f} and decode {ratios[1]:.2f} times the bare product, a copy "
              f"{smallest(fields.copy) / bare[0]:.2f}", flush=True)
    z = np.random.default_rng(0).standard_normal((samples, modes))
    tracemalloc.start()
    drawn = Samples.later(V, lambda: basis.decode(z), z)
    held = tracemalloc.get_traced_memory()[1]
    drawn.mean(), drawn.std(), drawn.quantile(0.05)
    print(f"{samples} samples: {1e-9 * held:.2f} GB until a field is asked for, at most "
          f"{1e-9 * tracemalloc.get_traced_memory()[1]:.2f} GB with mean, deviation and quantile; the fields alone are "
          f"{8e-9 * samples * V.dim():.2f} GB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[31, 99, 316, 999])
    parser.add_argument("--details", type=int)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--words", action="store_true", help="what the columns are, and no more")
    options, _ = parser.parse_known_args()   # PETSc reads the rest
    if options.one:
        return one(options.one)
    if options.details:
        return details(options.details)
    if options.words:
        return print(" ".join(__doc__.split("\n\n")[1].split()).split(" With ``--details``")[0])
    print(f"| unknowns | {' | '.join(PARTS)} | sum, s | by the clock, s | memory, GB |\n|{'---|' * (len(PARTS) + 4)}",
          flush=True)
    rows = []
    for cells in options.cells:
        found = subprocess.run([sys.executable, __file__, "--one", str(cells)], check=True, capture_output=True,
                               text=True).stdout
        size, *times, wall, memory = next(line for line in found.splitlines() if line.startswith("row")).split()[1:]
        rows.append([float(x) for x in (size, *times)])
        print(f"| {size} | {' | '.join(f'{float(x):.1f}' for x in times)} | {sum(rows[-1][1:]):.0f} | {wall} | "
              f"{memory} |", flush=True)
    logs = np.log(np.maximum(rows[-3:], 1e-3))
    if len(rows) > 2:
        slopes = [np.polyfit(logs[:, 0], column, 1)[0] for column in logs.T[1:]]
        print(f"| slope | {' | '.join(f'{slope:.2f}' for slope in slopes)} | | | |")


if __name__ == "__main__":
    main()
