"""A field, two rates and the noise, all unknown at once: emission, decay and inflow of a pollutant in a bay.

Water crosses a bay of 4 km x 2 km from west to east. It brings a pollutant in with an unknown concentration g, more of
it is emitted in the bay at an unknown, positive density q, and all of it decays at an unknown rate λ:

    -∇·(κ∇u) + v·∇u - q + λ u = 0,    κ ∂u/∂n = v·n (u - g) in the west,    κ ∂u/∂n = 0 elsewhere.

Thirty buoys read u, and nobody knows how well: the standard deviation of their noise is unknown, too. The solver below
is any Firedrake user's; the lines marked "added" turn it into a sampler of (q, λ, g) and the noise given the buoys.
`hmc` samples the same posterior with the finite element problem itself, and 300 pairs that were not used in training
tell whether the truth is where the samples say it is.

    python demos/unknown_rates/unknown_rates.py [--output FOLDER]
"""

import argparse
import time
from pathlib import Path

import numpy as np
from firedrake import (
    FacetNormal, Function, FunctionSpace, LinearVariationalProblem, LinearVariationalSolver, RectangleMesh,
    SpatialCoordinate, TestFunction, TrialFunction, as_vector, dot, ds, dx, exp, grad, split,
)
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt
from scipy.stats import lognorm, loguniform, uniform

from fem_diffusion import GaussianNoise, GaussianPrior, InverseProblem, ProductPrior, ScalarPrior  # added
from fem_diffusion import Steady, TransformedPrior, fit, point_sensors, simulate  # added
from fem_diffusion import TrainingOptions, amortised_gap, coefficients, hmc
from fem_diffusion.checks import read_arguments
from fem_diffusion.trust import calibrate_model
from fem_diffusion.plot import plot_calibration

LENGTH, WIDTH = 4.0, 2.0  # km
SPREAD = 0.1  # κ in km²/day
BUOYS = [(x, y) for x in (0.3, 1.0, 1.7, 2.4, 3.1, 3.8) for y in (0.2, 0.6, 1.0, 1.4, 1.8)]  # km
DECAY, INFLOW, NOISE = lognorm(0.3, scale=0.5), uniform(0.5, 1.0), loguniform(0.03, 0.3)  # 1/day, mg/l, mg/l
NAMES = ("decay rate λ [1/day]", "inflow g [mg/l]", "noise level [mg/l]")

# ## The problem, as in any Firedrake script


def bay(n):
    """Unknowns, the variational problem that contains them, and a function that solves it."""
    mesh = RectangleMesh(2 * n, n, LENGTH, WIDTH)
    V = FunctionSpace(mesh, "CG", 1)
    M = V * FunctionSpace(mesh, "R", 0, name="decay rate") * FunctionSpace(mesh, "R", 0, name="inflow")
    m, u, v, trial = Function(M), Function(V, name="concentration"), TestFunction(V), TrialFunction(V)
    emission, decay, inflow = split(m)
    y = SpatialCoordinate(mesh)[1]
    velocity = as_vector([4 * y * (WIDTH - y) / WIDTH**2, 0 * y])  # km/day
    a = (SPREAD * dot(grad(trial), grad(v)) + dot(velocity, grad(trial)) * v + decay * trial * v) * dx
    inward = -dot(velocity, FacetNormal(mesh))
    a, L = a + inward * trial * v * ds(1), emission * v * dx + inward * inflow * v * ds(1)
    problem = LinearVariationalProblem(a, L, u)
    solver = LinearVariationalSolver(problem, solver_parameters={"ksp_type": "preonly", "pc_type": "lu"})

    def concentration(unknowns):
        m.assign(unknowns)
        solver.solve()
        return u.copy(deepcopy=True)
    return m, problem, concentration


# ## What is added


def infer(m, problem, pairs, folder, options, progress):
    """Problem and trained model."""
    V, *numbers = m.function_space().subspaces
    field = TransformedPrior(GaussianPrior(V, std=0.5, correlation_length=2.0), lambda g: 0.5 * exp(g))  # added
    rates = [ScalarPrior(R, law) for R, law in zip(numbers, (DECAY, INFLOW))]  # added
    inverse = InverseProblem(ProductPrior([field, *rates]), Steady.from_problem(problem, m),  # added
                             point_sensors(V, BUOYS), GaussianNoise(std=NOISE))  # added
    data = simulate(inverse, pairs, seed=1, path=folder / "pairs", progress=progress)  # added
    return inverse, fit(inverse, data, options=options, progress=progress)  # added


# ## Is it right?


def numbers_of(samples):
    """Decay rate, inflow and noise level, shape (n, 3)."""
    return np.hstack([samples.component(i).values for i in (1, 2, 3)])


def compare(ours, theirs, truth):
    """Errors of mean and standard deviation against the reference: of the numbers, and of the field (relative, L2)."""
    found = {}
    for name, x, y, true in zip(NAMES, numbers_of(ours).T, numbers_of(theirs).T, truth):
        found[name] = (x.mean() - y.mean()) / y.std(), x.std() / y.std() - 1
        print(f"{name}: {x.mean():.4f} ± {x.std():.4f}, reference {y.mean():.4f} ± {y.std():.4f}, truth {true:.4f}")
    x, y = (samples.component(0).values for samples in (ours, theirs))
    found["emission"] = tuple(np.linalg.norm(f(x) - f(y)) / np.linalg.norm(f(y)) for f in (
        lambda v: v.mean(axis=0), lambda v: v.std(axis=0)))
    for i, name in enumerate(("emission", *NAMES)):
        ours_i, theirs_i = ours.component(i), theirs.component(i)
        print(f"{name}: {amortised_gap(ours_i, theirs_i.mean(), theirs_i.std())}")
    print("emission: mean within {:.1%}, standard deviation within {:.1%} of the reference".format(*found["emission"]))
    return found


def covered(model, calibration):
    """Share of held-out truths in their 90 % bands: of the modes of the field on average, and of each number."""
    # Each number is a mode of its own, and the numbers are the last coefficients.
    numbers = np.abs(model.basis.scaled_modes[:, -3:]).argmax(axis=0)
    inside = np.abs((calibration.ranks + 0.5) / (calibration.draws + 1) - 0.5) <= 0.45
    shares = {"emission": np.delete(inside, numbers, axis=1).mean()}
    return shares | {name: inside[:, i].mean() for name, i in zip(NAMES, numbers)}


OPTIONS = TrainingOptions(steps=3000, width=64)


def run(folder, n=6, pairs=2000, held_out=300, samples=4000, chains=None, options=OPTIONS, progress=True):
    """The whole job; returns calibration and errors against the reference."""
    start = time.perf_counter()
    m, variational, solver = bay(n)
    problem, model = infer(m, variational, pairs, folder, options, progress)
    print(f"{pairs} pairs; simulated and trained after {time.perf_counter() - start:.0f} s: {model.summary}")
    truth = coefficients(problem.prior.sample(seed=8))
    y, = problem.measurements(truth[None], seed=8)
    posterior = model.condition(y).sample(samples, seed=4)  # added
    calibration = calibrate_model(model, simulate(problem, held_out, seed=2, progress=progress), seed=3)
    print(calibration.table())
    shares = covered(model, calibration)
    print("90 % bands that hold the truth: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    reference = hmc(problem, y, seed=5, progress=progress, **(chains or {"chains": 4, "draws": 300}))
    print(reference)
    errors = compare(posterior, reference.draws, truth[-3:])
    draw(folder, truth, posterior, reference.draws, y, calibration, solver, m.function_space())
    print(f"finished after {time.perf_counter() - start:.0f} s; pictures in {folder}", flush=True)
    return calibration, errors


def draw(folder, truth, posterior, reference, y, calibration, solver, M):
    """Set-up, fields against truth and reference, numbers against theirs, and the check."""
    whole = Function(M)
    for part, values in zip(whole.subfunctions, (truth[:-3], truth[-3:-2], truth[-2:-1])):
        part.dat.data[:] = values
    V, emission = M.subspaces[0], posterior.component(0)
    figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    colours = tripcolor(solver(whole), axes=ax, cmap="viridis", shading="gouraud")
    ax.scatter(*np.transpose(BUOYS), c=y, norm=colours.norm, cmap="viridis", edgecolors="white")
    ax.set(xlabel="x [km]", ylabel="y [km]", aspect="equal", xlim=(0, LENGTH), ylim=(0, WIDTH),
           title="concentration of the truth, and readings of 30 buoys")
    figure.colorbar(colours, ax=ax, label="concentration [mg/l]", shrink=0.8)
    figure.savefig(folder / "setup.png", dpi=150)

    def of(values):
        found = Function(V)
        found.dat.data[:] = values
        return found
    pictures = [("truth: emission q", of(truth[:-3])), ("posterior mean", emission.mean()),
                ("mean by hmc", reference.component(0).mean()), ("90 % quantile", emission.quantile(0.9)),
                ("posterior standard deviation", emission.std()),
                ("standard deviation by hmc", reference.component(0).std())]
    figure, axes = plt.subplots(2, 3, figsize=(13, 4.6), layout="constrained")
    limits = [max(f.dat.data_ro.max() for _, f in part) for part in (pictures[:4], pictures[4:])]
    for i, (ax, (title, f)) in enumerate(zip(axes.ravel(), pictures)):
        colours = tripcolor(f, axes=ax, cmap="viridis" if i < 4 else "magma", shading="gouraud", vmin=0,
                            vmax=limits[i >= 4])
        ax.plot(*np.transpose(BUOYS), "o", color="white", markersize=3, markeredgecolor="black")
        ax.set(xlabel="x [km]", ylabel="y [km]", aspect="equal", title=title, xlim=(0, LENGTH), ylim=(0, WIDTH))
        figure.colorbar(colours, ax=ax, label="q [mg/l/day]", shrink=0.6)
    figure.savefig(folder / "emission.png", dpi=150)

    figure, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    ours, theirs = numbers_of(posterior), numbers_of(reference)
    for i, (ax, name, law) in enumerate(zip(axes, NAMES, (DECAY, INFLOW, NOISE))):
        bins = np.linspace(*np.quantile(np.concatenate([ours[:, i], theirs[:, i]]), [0.001, 0.999]), 25)
        ax.hist(ours[:, i], bins, density=True, alpha=0.5, label="posterior")
        ax.hist(theirs[:, i], bins, density=True, histtype="step", color="tab:orange", lw=1.5, label="hmc")
        ax.plot(bins, law.pdf(bins), color="grey", label="prior")
        ax.axvline(truth[i - 3], color="black", label="truth")
        ax.set(xlabel=name, ylabel="density")
    axes[0].legend(fontsize="small")
    total = emission.values.mean(axis=1)
    axes[3].plot(ours[:, 0], total, ".", ms=2, alpha=0.4)
    axes[3].plot(truth[-3], truth[:-3].mean(), "k*", ms=12, label="truth")
    axes[3].set(xlabel=NAMES[0], ylabel="mean emission at the nodes [mg/l/day]")
    axes[3].legend(fontsize="small")
    figure.savefig(folder / "numbers.png", dpi=150)

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    plot_calibration(calibration, ax)
    ax.set_title("held-out truths among their samples")
    figure.savefig(folder / "check.png", dpi=150)
    plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = read_arguments(parser)
    run(arguments.output)
