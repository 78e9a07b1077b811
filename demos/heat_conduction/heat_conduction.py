"""Can I trust it? The conductivity of a heated block: a posterior that is checked, and mended by the user's own solver.

A block of refractory concrete, 1 m x 1 m, is heated by a pipe through its middle, 500 W per square metre of the pipe's
wall, and held at T = 0 (above the air) outside. It conducts better where it is hotter, and unevenly where it is wet or
cracked: k = exp(m(x)) (1 + β T) with an unknown field,

    -∇·(k ∇T) = 0,   k ∂T/∂n = 500 W/m² on the pipe,   T = 0 outside.

20 thermometers read T, with an error of 1 % of a typical reading. The solver below is any Firedrake user's. The lines
marked "added" are all that turns it into a sampler of the conductivity at T = 0. With 4,000 pairs the trained posterior
is right on average and far too wide at this measurement: `check` says so, `correct` mends it by 2,000 solves, and
Hamiltonian Monte Carlo, by many times as many, confirms that.

    python demos/heat_conduction/heat_conduction.py [--output FOLDER]
"""

import argparse
import time
from pathlib import Path

import numpy as np
from firedrake import (
    COMM_WORLD, Constant, DirichletBC, Function, FunctionSpace, Mesh, NonlinearVariationalProblem,
    NonlinearVariationalSolver, RelabeledMesh, SpatialCoordinate, TestFunction, assemble, conditional, ds, dx, exp,
    grad, inner, max_value,
)
from firedrake.mesh import plex_from_cell_list
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt
from scipy.stats import chi2

from fem_diffusion import GaussianNoise, GaussianPrior, InverseProblem, TransformedPrior  # added
from fem_diffusion import fit, point_sensors, simulate  # added
from fem_diffusion import TrainingOptions, amortised_gap, coefficients, hmc
from fem_diffusion.checks import read_arguments

PIPE, OUTSIDE = 1, 2
RADIUS, HEATING = 0.2, 500.0  # m, W/m²
GROWTH = 0.005  # β in 1/K
NOISE = 0.3  # K
THERMOMETERS = [(0.5 + r * np.cos(a), 0.5 + r * np.sin(a)) for r, count in ((0.27, 8), (0.42, 12))
                for a in 2 * np.pi * (np.arange(count) + 0.5) / count]  # m
REGION = (0.6, 0.9)  # m, of x and of y: what the conductivity is asked for
TRUTH = 12  # seed of truth and noise
COLOURS = ("tab:orange", "tab:blue", "tab:green")

# ## The problem, as in any Firedrake script


def block(n):
    """Square with a hole: 8n rays from the pipe to the outside, 2n rings of cells around it."""
    angle = 2 * np.pi * np.arange(8 * n) / (8 * n)
    ray, step = np.stack([np.cos(angle), np.sin(angle)], axis=1), np.linspace(0, 1, 2 * n + 1)[:, None, None]
    outside = 0.5 * ray / np.abs(ray).max(axis=1, keepdims=True)
    nodes = 0.5 + RADIUS * ray + step**1.2 * (outside - RADIUS * ray)
    number = np.arange(8 * n * (2 * n + 1)).reshape(2 * n + 1, 8 * n)
    a, b, c, d = (x.ravel() for ring in (number, np.roll(number, -1, axis=1)) for x in (ring[:-1], ring[1:]))
    cells = np.concatenate([np.stack([a, b, d], axis=1), np.stack([a, d, c], axis=1)])
    plain = Mesh(plex_from_cell_list(2, cells, nodes.reshape(-1, 2), COMM_WORLD))
    x, y = SpatialCoordinate(plain)
    on_pipe = conditional((x - 0.5)**2 + (y - 0.5)**2 < (RADIUS + 1e-8)**2, 1, 0)
    on_edge = conditional(max_value(abs(x - 0.5), abs(y - 0.5)) > 0.5 - 1e-8, 1, 0)
    facets = FunctionSpace(plain, "HDiv Trace", 0)
    return RelabeledMesh(plain, [Function(facets).interpolate(part) for part in (on_pipe, on_edge)], [PIPE, OUTSIDE])


def conduction(n):
    """Space of conductivity and temperature, and the solver: conductivity at T = 0 to temperature."""
    V = FunctionSpace(block(n), "CG", 1)
    k, T, v = Function(V), Function(V, name="temperature"), TestFunction(V)
    equation = k * (1 + GROWTH * T) * inner(grad(T), grad(v)) * dx - HEATING * v * ds(PIPE)
    problem = NonlinearVariationalProblem(equation, T, DirichletBC(V, 0, OUTSIDE))
    solver = NonlinearVariationalSolver(problem, solver_parameters={
        "snes_rtol": 1e-10, "ksp_type": "preonly", "pc_type": "lu"})

    def heat(conductivity):
        k.assign(conductivity)
        T.assign(Constant(0.0))
        solver.solve()
        return T.copy(deepcopy=True)
    return V, heat


# ## What is added


def infer(V, solver, pairs, folder, options, progress):
    """Problem and trained model."""
    prior = TransformedPrior(GaussianPrior(V, std=0.8, correlation_length=0.5), exp)  # added
    sensors = point_sensors(V, THERMOMETERS)  # added
    problem = InverseProblem(prior, solver, sensors, GaussianNoise(std=NOISE))  # added
    data = simulate(problem, pairs, seed=1, path=folder / "pairs", progress=progress)  # added
    return problem, fit(problem, data, options=options, progress=progress)  # added


# ## Is it right?


def mean_in_region(V):
    """The question: a function that gives the mean conductivity in the region, in W/(m K)."""
    low, high = REGION
    x, y = SpatialCoordinate(V.mesh())
    middle, half = (low + high) / 2, (high - low) / 2
    inside = Function(FunctionSpace(V.mesh(), "DG", 0))
    inside.interpolate(conditional(max_value(abs(x - middle), abs(y - middle)) < half, 1, 0))
    area = assemble(inside * dx)
    return lambda k: assemble(k * inside * dx) / area


def residuals(problem, y, samples, count=200):
    """Mean square of the residuals of some samples in units of the noise; for the right posterior a mean of 1."""
    readings = problem.readings(samples.values[:count])
    return (((readings - y) / NOISE)**2).mean()


def run(folder, n=6, pairs=4000, solves=2000, samples=2000, options=TrainingOptions(), chains=None, progress=True):
    """The whole job; returns mean and standard deviation in the region and residuals of the three posteriors."""
    start = time.perf_counter()
    V, heat = conduction(n)
    problem, model = infer(V, heat, pairs, folder, options, progress)
    print(f"{pairs} pairs; simulated and trained after {time.perf_counter() - start:.0f} s: {model.summary}")
    truth = problem.prior.sample(seed=TRUTH)
    y, = problem.measurements(coefficients(truth)[None], seed=TRUTH)
    posterior = model.condition(y)  # added
    print(posterior.check(seed=3))  # added
    corrected = posterior.correct(solves=solves, seed=4, progress=progress)  # added
    print(corrected.certificate)
    amortised = posterior.sample(samples, seed=5, progress=progress)
    begun = time.perf_counter()
    reference = hmc(problem, y, seed=6, progress=progress, **(chains or {}))
    print(f"{reference!r}\nafter {time.perf_counter() - begun:.0f} s")
    found = {"amortised": amortised, "corrected": corrected, "hmc": reference.draws}
    question, law = mean_in_region(V), chi2(len(y)).ppf([0.025, 0.975]) / len(y)
    rows = {name: (values.mean(), values.std(ddof=1), residuals(problem, y, draws))
            for name, draws in found.items() for values in [draws.map(question)]}
    print(f"\nmean conductivity in the region; truth {question(truth):.3f} W/(m K)\n"
          "| posterior | mean | std | mean square of residuals in units of the noise |\n|---|---|---|---|")
    for name, (mean, std, square) in rows.items():
        print(f"| {name} | {mean:.3f} | {std:.3f} | {square:.1f} |")
    print("residuals of the right posterior: {:.1f} to {:.1f} in 95 % of all cases".format(*law))
    print(amortised_gap(amortised, reference.mean(), reference.std()))
    draw(folder, truth, heat(truth), found, problem, y)
    posterior.report(
        folder / "report.html", threshold=5.0, samples=corrected, seed=7, progress=progress, units="W/(m K)",
        name="conductivity at T = 0", mesh_units="m", reading="temperature [K]", boundaries=[PIPE],
        question="How well does the concrete conduct around the pipe, and is there a part above 5 W/(m K), which "
        "would be wet?")
    print(f"finished after {time.perf_counter() - start:.0f} s; pictures in {folder}", flush=True)
    return rows


def draw(folder, truth, temperature, found, problem, y):
    """Set-up, truth against the posteriors, the question, and the readings."""
    figure, axes = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    colours = tripcolor(temperature, axes=axes, cmap="inferno", shading="gouraud")
    axes.plot(*np.transpose(THERMOMETERS), "o", color="tab:blue", markeredgecolor="white",
              label=f"{len(THERMOMETERS)} thermometers")
    low, high = REGION
    axes.plot([low, high, high, low, low], [low, low, high, high, low], "--", color="white", label="region asked for")
    axes.set(xlabel="x [m]", ylabel="y [m]", aspect="equal", title="temperature of the truth")
    axes.legend(loc="lower left", fontsize="small", facecolor="grey", labelcolor="white")
    figure.colorbar(colours, ax=axes, label="T [K]")
    figure.savefig(folder / "setup.png", dpi=150)

    figure, axes = plt.subplots(2, 4, figsize=(17, 7), layout="constrained")
    fields = [[truth, *(samples.mean() for samples in found.values())], [samples.std() for samples in found.values()]]
    axes[1, 0].set_axis_off()
    for line, row, label in zip((axes[0], axes[1, 1:]), fields, ("mean", "standard deviation")):
        values = [f.dat.data_ro for f in row]
        limits = {"vmin": min(v.min() for v in values), "vmax": max(v.max() for v in values)}
        names = ["truth", *found] if len(row) == 4 else list(found)
        for ax, f, name in zip(line, row, names):
            colours = tripcolor(f, axes=ax, cmap="viridis" if len(row) == 4 else "magma", shading="gouraud", **limits)
            ax.plot(*np.transpose(THERMOMETERS), "o", color="white", markersize=3, markeredgecolor="black")
            ax.set(xlabel="x [m]", ylabel="y [m]", aspect="equal",
                   title=name if name == "truth" else f"{name}: {label}")
        figure.colorbar(colours, ax=line, label="conductivity at T = 0 [W/(m K)]", shrink=0.8)
    figure.savefig(folder / "conductivity.png", dpi=150)

    figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    question = mean_in_region(truth.function_space())
    for (name, samples), colour in zip(found.items(), COLOURS):
        axes[0].hist(samples.map(question), bins=40, density=True, histtype="step", linewidth=2, color=colour,
                     label=name)
        axes[0].axvline(question(truth), color="black", linestyle="--", label="truth" if name == "hmc" else None)
    axes[0].set(xlabel="mean conductivity in the region [W/(m K)]", ylabel="density", title="the question")
    axes[0].legend(frameon=False)
    for (name, samples), colour, shift in zip(found.items(), COLOURS, (-0.25, 0.0, 0.25)):
        low, high = np.quantile((problem.readings(samples.values[:200]) - y) / NOISE, [0.025, 0.975], axis=0)
        axes[1].vlines(np.arange(len(y)) + shift, low, high, color=colour, linewidth=3, label=name)
    axes[1].axhspan(-1.96, 1.96, color="grey", alpha=0.3, label="95 % of the noise")
    axes[1].set(xlabel="thermometer", ylabel="sample - reading [noise std]", title="do the samples explain the data?",
                xticks=np.arange(0, len(y), 2))
    axes[1].legend(frameon=False, ncols=2, fontsize="small")
    figure.savefig(folder / "check.png", dpi=150)
    plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = read_arguments(parser)
    run(arguments.output)
