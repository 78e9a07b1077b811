"""Where does a species settle from? An unknown source in a nonlinear reaction-diffusion equation, 25 noisy counters.

A species spreads over a square of 10 km x 10 km, grows logistically up to the capacity of the land (u = 1), dies out at
the boundary, and is fed by an unknown, positive immigration m:

    -∇·(κ∇u) - r u (1 - u) = m,    u = 0 on the boundary.

The problem below is any Firedrake user's. The lines marked "added" are all that turns it into a sampler of m given the
counters; `check` then asks 400 pairs that were not used in training whether the truth is where the samples say it is.
`Steady` solves it for many sources at once; any function m -> u would do as well, one solve after another.

    python demos/logistic_reaction/logistic_reaction.py [--output FOLDER]
"""

import argparse
import time
from pathlib import Path

import numpy as np
from firedrake import (
    DirichletBC, Function, FunctionSpace, NonlinearVariationalProblem, SquareMesh, TestFunction, dx, exp, grad, inner,
)
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt

from fem_diffusion import GaussianNoise, GaussianPrior, InverseProblem, TransformedPrior  # added
from fem_diffusion import Steady, fit, point_sensors, simulate  # added
from fem_diffusion import TrainingOptions, amortised_gap, coefficients
from fem_diffusion.checks import read_arguments
from fem_diffusion.trust import calibrate_model
from fem_diffusion.plot import plot_calibration, plot_predictive

SIZE = 10.0  # km
SPREAD, GROWTH = 0.5, 0.5  # κ in km²/year, r in 1/year
NOISE = 0.02  # of the capacity
COUNTERS = [(x, y) for x in (1.5, 3.25, 5.0, 6.75, 8.5) for y in (1.5, 3.25, 5.0, 6.75, 8.5)]  # km

# ## The problem, as in any Firedrake script


def habitat(n):
    """The problem on a mesh of n x n squares, and the source in it."""
    V = FunctionSpace(SquareMesh(n, n, SIZE), "CG", 1)
    m, u, v = Function(V), Function(V, name="density"), TestFunction(V)
    equation = (SPREAD * inner(grad(u), grad(v)) - GROWTH * u * (1 - u) * v - m * v) * dx
    u.assign(2.0)  # from above, Newton's method runs into the positive solution, not into u = 0
    return NonlinearVariationalProblem(equation, u, DirichletBC(V, 0, "on_boundary")), m


# ## What is added


def infer(equation, m, pairs, folder, options, progress):
    """Problem and trained model."""
    solver = Steady.from_problem(equation, m)  # added
    log_field = GaussianPrior(m.function_space(), std=0.8, correlation_length=3.0)  # added
    prior = TransformedPrior(log_field, lambda g: 0.1 * exp(g))  # added
    sensors = point_sensors(solver.U, COUNTERS)  # added
    problem = InverseProblem(prior, solver, sensors, GaussianNoise(std=NOISE))  # added
    data = simulate(problem, pairs, seed=1, path=folder / "pairs", progress=progress)  # added
    return problem, fit(problem, data, options=options, progress=progress)  # added


# ## Is it right?


def check(problem, model, held_out, progress):
    """Ranks and coverage of the 16 largest modes of held-out truths."""
    fresh = simulate(problem, held_out, seed=2, progress=progress)
    return calibrate_model(model, fresh, seed=3, leading=16)


def run(folder, n=24, pairs=4000, held_out=400, samples=2000, solves=1000, options=TrainingOptions(), progress=True):
    """The whole job; returns the calibration."""
    start = time.perf_counter()
    problem, model = infer(*habitat(n), pairs, folder, options, progress)
    print(f"{pairs} pairs; simulated and trained after {time.perf_counter() - start:.0f} s: {model.summary}")
    truth = problem.prior.sample(seed=11)
    density = problem.forward(truth)
    y, = problem.measurements(coefficients(truth)[None], seed=11)
    conditioned = model.condition(y)
    posterior = conditioned.sample(samples, seed=4)  # added
    calibration = check(problem, model, held_out, progress)
    print(calibration.table())
    corrected = conditioned.correct(solves=solves, seed=5, progress=progress)
    print(f"{corrected.certificate}\n{amortised_gap(posterior, corrected.mean(), corrected.std())}")
    draw(folder, truth, density, posterior, problem, y, calibration)
    conditioned.report(
        folder / "report.html", threshold=0.25, seed=4, progress=progress, name="immigration", units="1/year",
        mesh_units="km", reading="density [share of capacity]", question="Where does the species settle from, and "
        "where does immigration exceed a quarter of the land's capacity each year?")
    print(f"finished after {time.perf_counter() - start:.0f} s; pictures in {folder}", flush=True)
    return calibration


def draw(folder, truth, density, posterior, problem, y, calibration):
    """Set-up, truth against posterior, and the check."""
    figure, axes = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    colours = tripcolor(density, axes=axes, cmap="viridis", shading="gouraud")
    axes.plot(*np.transpose(COUNTERS), "o", color="tab:red", markeredgecolor="white", label=f"{len(COUNTERS)} counters")
    axes.set(xlabel="x [km]", ylabel="y [km]", aspect="equal", title="density of the truth")
    axes.legend(loc="upper right", fontsize="small")
    figure.colorbar(colours, ax=axes, label="density [share of capacity]")
    figure.savefig(folder / "setup.png", dpi=150)

    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    posterior.plot(axes=axes.ravel(), truth=truth, ylabel="immigration m [1/year]")
    for ax in axes.ravel():
        ax.plot(*np.transpose(COUNTERS), "o", color="white", markersize=3, markeredgecolor="black")
        ax.set(xlabel="x [km]", ylabel="y [km]")
    figure.savefig(folder / "source.png", dpi=150)

    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    plot_predictive(y, problem.measurements(posterior.values[:100], seed=5), axes[0],
                    ylabel="density [share of capacity]")
    plot_calibration(calibration, axes[1])
    axes[0].set(title="the samples explain the counters", xlabel="counter")
    axes[1].set_title("held-out truths among their samples")
    figure.savefig(folder / "check.png", dpi=150)
    plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = read_arguments(parser)
    run(arguments.output)
