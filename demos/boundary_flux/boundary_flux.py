"""Which flux enters a channel through its bottom wall? Sixteen noisy concentration sensors, two answers.

A solute is carried through a channel of 4 m x 1 m by a parabolic flow. Its concentration u at the inflow is known;
through the bottom wall enters an unknown diffusive flux q:

    v·∇u - ∇·(κ∇u) + c u² = 0,    u = 1 at the inflow,    κ ∂u/∂n = q at the bottom,    κ ∂u/∂n = 0 elsewhere.

Case "gaussian": q is a Gaussian field and c = 0, so the finite element posterior is known exactly.
Case "positive": q = q₀ exp(g) with a Gaussian field g, and c > 0; preconditioned Hamiltonian Monte Carlo with the
finite element model is the reference.

    python demos/boundary_flux/boundary_flux.py [--output FOLDER] [--case gaussian|positive]

Both cases are posed in the same few lines and trained by the same call. What has been computed is kept in the output
folder: an interrupted run continues, and a second run trains nothing anew.
"""

import argparse
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from firedrake import (
    COMM_WORLD, Function, FunctionSpace, RectangleMesh, SpatialCoordinate, Submesh, TestFunction, as_vector, assemble,
    dx, exp,
)
from firedrake.pyplot import tripcolor, triplot
from matplotlib import pyplot as plt

from fem_diffusion import (
    AdvectionDiffusion, Boundary, GaussianNoise, GaussianPrior, InverseProblem, Physics, Sampler, TransformedPrior,
    amortised_gap, coefficients, exact, field, fit, hmc, point_sensors, simulate, tell_gaps, variance_exploding,
    variance_preserving,
)
from fem_diffusion.checks import read_arguments
from fem_diffusion.comparison import sliced_wasserstein
from fem_diffusion.plot import plot_history, plot_predictive

INFLOW, OUTFLOW, WALL = 1, 2, 3
BASE_FLUX = 0.2  # q₀ in mol/(m² s)
REACTION = 0.02  # c in m³/(mol s)
TRUTHS, SAMPLES = 3, 4000
# The default call with two seeds, and the two ends of the family of samplers.
WAYS = [("default", Sampler(), 1), ("default, another seed", Sampler(), 2),
        ("variance exploding, SDE", Sampler(alpha=1.0, steps=40, formulation=variance_exploding()), 3),
        ("variance preserving, ODE", Sampler(steps=40, formulation=variance_preserving()), 4)]

# ## The problem, as in any Firedrake script

mesh = RectangleMesh(80, 20, 4.0, 1.0, name="channel")
wall = Submesh(mesh, 1, WALL, name="wall")
V = FunctionSpace(mesh, "CG", 1)
M = FunctionSpace(wall, "CG", 1)
x, y = SpatialCoordinate(mesh)
physics = {"velocity": as_vector([6 * y * (1 - y), 0 * y]), "diffusivity": 0.05}
bcs = Boundary(dirichlet={INFLOW: 1.0}, outflow=(OUTFLOW,))
sensors = [(position, height) for position in np.linspace(0.5, 3.75, 8) for height in (0.1, 0.3)]
observation = point_sensors(V, sensors)


# Weights of the wall's nodes, for norms over the wall.
weights = coefficients(assemble(TestFunction(M) * dx).riesz_representation("l2"))

noise_level = 0.02  # of the root mean square concentration at the sensors


def gaussian_case():
    """Prior and forward model of a Gaussian flux without reaction."""
    prior = GaussianPrior(M, std=0.15, correlation_length=0.5, mean=0.25)
    return prior, AdvectionDiffusion(V, M, ("flux", WALL), Physics(**physics), bcs)


def positive_case():
    """Prior and forward model of a positive flux with a weak quadratic reaction."""
    prior = TransformedPrior(GaussianPrior(M, std=0.8, correlation_length=0.5), lambda g: BASE_FLUX * exp(g))
    forward = AdvectionDiffusion(V, M, ("flux", WALL), Physics(reaction=lambda u: REACTION * u**2, **physics), bcs)
    forward.linearise_at(Function(M).assign(1.4 * BASE_FLUX))
    return prior, forward


# ## The references


def exact_reference(problem, y, seed):
    """Exact posterior of the linear-Gaussian case, with sets of samples and their distances."""
    posterior = exact(problem, y)
    sets = np.sqrt(weights) * posterior.sample(4 * SAMPLES, seed=1000 + seed).values.reshape(4, SAMPLES, -1)
    floor = np.mean([distance(a, b) for a, b in combinations(sets, 2)])
    return {"mean": coefficients(posterior.mean()), "std": coefficients(posterior.std()), "sets": sets, "floor": floor}


def hmc_reference(problem, y, seed, progress):
    """Posterior by Hamiltonian Monte Carlo, its Monte Carlo error below 1 %."""
    found = hmc(problem, y, seed=seed, chains=100, draws=300, progress=progress)
    mean, mean_error, std, std_error, lower, upper = map(coefficients, (
        found.mean(), found.mean_error(), found.std(), found.std_error(), found.quantile(0.025), found.quantile(0.975)))
    return {"mean": mean, "std": std, "band": (mean, lower, upper), "acceptance": found.acceptance,
            "error": (error(mean + mean_error, mean), error(std + std_error, std))}


# ## The job: simulate, fit, condition, sample; then compare and draw


def run(name, folder, progress):
    """One case from prior to pictures; returns the rows of the table and the Monte Carlo errors of the reference."""
    make, pairs = CASES[name]
    start = time.perf_counter()
    prior, forward = make()
    silent = InverseProblem(prior, forward, observation)
    data = simulate(silent, pairs, seed=1, path=folder / f"pairs_{name}", progress=progress)
    noise_std = noise_level * float(np.sqrt((data.readings**2).mean()))
    problem = replace(silent, noise=GaussianNoise(std=noise_std))
    say(f"\n{name} flux: {pairs} pairs, noise {noise_std:.3f} mol/m³, simulated after "
        f"{time.perf_counter() - start:.0f} s")
    model = fit(problem, data, checkpoint=folder / f"training_{name}.safetensors", progress=progress)
    model.save(folder / f"model_{name}.safetensors")
    say(f"trained after {time.perf_counter() - start:.0f} s: {model.summary}")

    truths = prior.sample_many(TRUTHS, seed=100)
    measurements = problem.measurements(truths, seed=100)
    rows, drawn, gaps = [], [], []
    for number, (truth, y) in enumerate(zip(truths, measurements)):
        right = (exact_reference(problem, y, number) if name == "gaussian" else
                 hmc_reference(problem, y, number, progress))
        posterior = model.condition(y)
        for words, sampler, seed in WAYS:
            samples = posterior.sample(SAMPLES, seed=10 * number + seed, sampler=sampler, progress=False)
            rows.append([number + 1, words, error(coefficients(samples.mean()), right["mean"]),
                         error(coefficients(samples.std()), right["std"]), distance_ratio(samples, right)])
            if words == "default":
                gaps.append(amortised_gap(samples, field(M, right["mean"]), field(M, right["std"])))
        if "error" in right:
            say("truth {}: HMC accepts {:.0%}, Monte Carlo error of mean {:.1%}, of standard deviation {:.1%}".format(
                number + 1, right["acceptance"], *right["error"]))
        drawn.append((samples, field(M, truth), right, y))
        if not number:
            posterior.report(
                folder / f"report_{name}.html", threshold=0.5, progress=progress, name="wall flux", units="mol/(m² s)",
                mesh_units="m", reading="concentration [mol/m³]", question="Which flux enters the channel through its "
                "bottom wall, and does it exceed 0.5 mol/(m² s) anywhere?")
    print_table(rows)
    say(tell_gaps(gaps))
    samples = drawn[0][0]
    samples.save(folder / f"samples_{name}")
    predictions = problem.measurements(samples.values[:500], seed=0)
    draw_fluxes(drawn, folder / f"flux_{name}.png")
    if M.comm.rank == 0:
        axes = plot_predictive(drawn[0][3], predictions, ylabel="concentration [mol/m³]")
        axes.figure.savefig(folder / f"predictive_{name}.png", dpi=150)
        if model.history.step:
            plot_history(model.history).figure.savefig(folder / f"training_{name}.png", dpi=150)
        plt.close("all")
    say(f"{name} case finished after {time.perf_counter() - start:.0f} s; figures in {folder}")
    return rows, [right.get("error", (0.0, 0.0)) for _, _, right, _ in drawn]


def error(value, reference):
    """Relative L2 error over the wall, on all ranks."""
    squares = [M.comm.allreduce(float((weights * v**2).sum())) for v in (value - reference, reference)]
    return np.sqrt(squares[0] / squares[1])


def distance(a, b):
    """Sliced Wasserstein distance between two sets of weighted nodal values; on one rank only, NaN on several."""
    return np.nan if M.comm.size > 1 else sliced_wasserstein(a, b, projections=100)


def distance_ratio(samples, right):
    """Mean distance to exact sample sets over the mean distance between those; NaN where there are none."""
    if "sets" not in right:
        return np.nan
    scaled = np.sqrt(weights) * samples.values
    return np.mean([distance(scaled, s) for s in right["sets"]]) / right["floor"]


def print_table(rows):
    """Errors against the reference, as a Markdown table."""
    say("\n| truth | sampler | mean error | std error | sliced W2 / floor |\n|---|---|---|---|---|")
    for number, words, mean, std, ratio in rows:
        ratio = "" if np.isnan(ratio) else f"{ratio:.2f}"
        say(f"| {number} | {words} | {mean:.1%} | {std:.1%} | {ratio} |")


def draw_setup(folder):
    """The mesh with the sensors and a concentration field."""
    if mesh.comm.size > 1:
        say("the map of the set-up is drawn on one rank only")
        return
    prior, forward = gaussian_case()
    figure, axes = plt.subplots(figsize=(9, 3), layout="constrained")
    colours = tripcolor(forward(prior.sample(seed=3)), axes=axes, cmap="viridis", shading="gouraud")
    triplot(mesh, axes=axes, interior_kw={"linewidths": 0.15, "edgecolors": "white"},
            boundary_kw={"linewidths": 0.8, "colors": "black"})
    points, = axes.plot(*np.transpose(sensors), "o", color="tab:red", markeredgecolor="white", markersize=6,
                        label=f"{len(sensors)} sensors")
    for position in np.linspace(0.25, 3.75, 8):
        axes.annotate("", (position, 0.0), (position, -0.13), arrowprops={"arrowstyle": "->", "color": "tab:orange"})
    axes.text(0.25, -0.24, "unknown flux q through the wall", color="tab:orange")
    axes.set(xlabel="x [m]", ylabel="y [m]", aspect="equal", xlim=(-0.05, 4.05), ylim=(-0.3, 1.05))
    axes.legend(handles=[points], loc="upper left", fontsize="small")
    figure.colorbar(colours, ax=axes, label="concentration [mol/m³]")
    figure.savefig(folder / "setup.png", dpi=150)
    plt.close("all")
    say(f"setup drawn in {folder}")


def draw_fluxes(drawn, file):
    """Truth, posterior and reference of each wall flux, side by side."""
    figure, axes = plt.subplots(1, len(drawn), figsize=(5.2 * len(drawn), 4), layout="constrained", sharey=True)
    for number, (ax, (samples, truth, right, _)) in enumerate(zip(axes, drawn)):
        samples.plot(axes=ax, truth=truth, reference=right.get("band", (right["mean"], right["std"])),
                     xlabel="x [m]", ylabel="wall flux q [mol/(m² s)]")
        ax.set_title(f"truth {number + 1}")
        ax.label_outer()
    if M.comm.rank == 0:
        figure.savefig(file, dpi=150)
    plt.close("all")


def say(text):
    """Print on rank 0 only."""
    if COMM_WORLD.rank == 0:
        print(text, flush=True)


CASES = {"gaussian": (gaussian_case, 4000), "positive": (positive_case, 20000)}
OUTPUT = "output" if COMM_WORLD.size == 1 else f"output/{COMM_WORLD.size}-ranks"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / OUTPUT)
    parser.add_argument("--case", choices=CASES, action="append")
    arguments = read_arguments(parser)
    draw_setup(arguments.output)
    for case in arguments.case or CASES:
        run(case, arguments.output, progress=True)
