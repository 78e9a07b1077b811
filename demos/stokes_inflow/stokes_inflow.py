"""What flows into a narrowing channel? Twelve velocity probes, and an exact answer to compare with.

Slow, viscous flow (Stokes) enters a channel of 4 cm x 1 cm from the left with an unknown profile g, passes a narrow
part and leaves on the right:

    -∇·(μ∇u) + ∇p = 0,  ∇·u = 0,    u = (g, 0) at the inflow,  u = 0 on the walls,  μ ∂u/∂n = p n at the outflow.

The state is mixed (velocity and pressure), the unknown a field on the boundary alone, zero at both its ends, imposed by
Nitsche's method. The problem below is any Firedrake user's. The lines marked "added" are all that turns it into a
sampler of g given the probes. `Steady` solves it for many profiles at once; any function g -> (u, p) would do as well,
one solve after another. It is linear and the prior Gaussian, so `exact_posterior` computes the posterior exactly.

    python demos/stokes_inflow/stokes_inflow.py [--output FOLDER]
"""

import argparse
import time
from pathlib import Path

import numpy as np
from firedrake import (
    CellSize, DirichletBC, FacetNormal, Function, FunctionSpace, Measure, RectangleMesh, SpatialCoordinate, Submesh,
    TestFunction, TestFunctions, VectorFunctionSpace, as_vector, assemble, div, dot, dx, grad, inner, split,
)
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt

from fem_diffusion import GaussianNoise, GaussianPrior, InverseProblem, Steady, fit, point_sensors, simulate  # added
from fem_diffusion import TrainingOptions, amortised_gap, coefficients, field, tell_gaps
from fem_diffusion.checks import read_arguments
from fem_diffusion.reference.dense import linear_gaussian_posterior
from fem_diffusion.plot import plot_predictive

INFLOW, OUTFLOW, BOTTOM, TOP = 1, 2, 3, 4
VISCOSITY = 1.0  # Pa s; with velocities in cm/s the pressure is in Pa
NOISE = 0.02  # cm/s
PROBES = [(x, y) for x in (0.4, 0.8, 1.4, 2.2) for y in (0.25, 0.5, 0.75)]  # cm

# ## The problem, as in any Firedrake script


def channel(n):
    """Residual, velocity with pressure, profile, and conditions on the walls, with n cells across."""
    mesh = RectangleMesh(3 * n, n, 4.0, 1.0)
    x, y = mesh.coordinates.dat.data_ro.T
    mesh.coordinates.dat.data[:, 1] = 0.5 + (y - 0.5) * (1 - 0.4 * np.exp(-((x - 1.8) / 0.5)**2))
    inflow = Submesh(mesh, 1, INFLOW)
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    w, g, (v, q), normal = Function(W), Function(FunctionSpace(inflow, "CG", 2)), TestFunctions(W), FacetNormal(mesh)
    u, p = split(w)
    F = (VISCOSITY * inner(grad(u), grad(v)) - p * div(v) - q * div(u)) * dx
    at_inflow = Measure("ds", mesh, INFLOW, intersect_measures=(Measure("dx", inflow),))
    force, test_force = (VISCOSITY * dot(grad(a), normal) - b * normal for a, b in ((u, p), (v, q)))
    missing = u - as_vector([g, 0])
    F += 40 * VISCOSITY / CellSize(mesh) * inner(missing, v) * at_inflow
    F -= (inner(force, v) + inner(missing, test_force)) * at_inflow
    return F, w, g, DirichletBC(W.sub(0), 0, (BOTTOM, TOP))


# ## What is added


def infer(F, w, g, bcs, pairs, folder, options, progress):
    """Problem and trained model."""
    solver, M = Steady(F, w, g, bcs), g.function_space()  # added
    y = SpatialCoordinate(M.mesh())[1]  # added
    no_slip = DirichletBC(M, 0, "on_boundary")  # added
    prior = GaussianPrior(M, std=0.4, correlation_length=0.3, mean=4 * y * (1 - y), bcs=no_slip)  # added
    sensors = point_sensors(w.function_space(), PROBES, component=0)  # added
    problem = InverseProblem(prior, solver, sensors, GaussianNoise(std=NOISE))  # added
    data = simulate(problem, pairs, seed=1, path=folder / "pairs", progress=progress)  # added
    return problem, fit(problem, data, options=options, progress=progress)  # added


# ## Is it right?


def exact_posterior(problem):
    """Mean (for a measurement) and standard deviation of the finite element posterior; the solver run on every node."""
    centre, k = coefficients(problem.prior.mean), problem.k
    operator = np.stack([problem.observation(problem.forward(field(problem.M, unit)))
                         for unit in np.eye(problem.M.dim())], axis=1)

    def mean_and_std(y):
        shift, covariance = linear_gaussian_posterior(operator, problem.prior.covariance_matrix(), NOISE**2 * np.eye(k),
                                                      y - operator @ centre)
        return centre + shift, np.sqrt(np.maximum(np.diag(covariance), 0.0))
    return mean_and_std


def run(folder, n=16, pairs=3000, truths=3, samples=4000, options=TrainingOptions(), progress=True):
    """The whole job; returns a row (error of the mean, of the standard deviation) for each truth."""
    start = time.perf_counter()
    problem, model = infer(*channel(n), pairs, folder, options, progress)
    print(f"{pairs} pairs; simulated and trained after {time.perf_counter() - start:.0f} s: {model.summary}")
    exact, rows, drawn, gaps = exact_posterior(problem), [], [], []
    M = problem.M
    weights = coefficients(assemble(TestFunction(M) * dx).riesz_representation("l2"))

    def error(value, reference):
        return float(np.sqrt((weights * (value - reference)**2).sum() / (weights * reference**2).sum()))
    for number in range(truths):
        truth = problem.prior.sample(seed=22 - number)
        y, = problem.measurements(coefficients(truth)[None], seed=number)
        conditioned = model.condition(y)
        posterior = conditioned.sample(samples, seed=4 + number)  # added
        mean, std = exact(y)
        rows.append((error(coefficients(posterior.mean()), mean), error(coefficients(posterior.std()), std)))
        gaps.append(amortised_gap(posterior, field(M, mean), field(M, std)))
        drawn.append((truth, y, posterior, (mean, std)))
    print("\n| truth | error of the mean | error of the standard deviation |\n|---|---|---|")
    for number, row in enumerate(rows):
        print("| {} | {:.1%} | {:.1%} |".format(number + 1, *row))
    print(tell_gaps(gaps))
    draw(folder, drawn, problem)
    conditioned.report(
        folder / "report.html", threshold=0.4, seed=4, progress=progress, name="inflow", units="cm/s", mesh_units="cm",
        reading="velocity [cm/s]", question="What flows into the channel, and is it anywhere faster than 0.4 cm/s?")
    print(f"\nfinished after {time.perf_counter() - start:.0f} s; pictures in {folder}", flush=True)
    return rows


def draw(folder, drawn, problem):
    """Set-up, profiles against the exact posterior, and the readings that the samples predict."""
    truth, y, posterior, _ = drawn[0]
    velocity = problem.forward(truth).subfunctions[0]
    figure, axes = plt.subplots(figsize=(10, 2.9), layout="constrained")
    S = FunctionSpace(velocity.function_space().mesh(), "CG", 1)
    speed = Function(S).interpolate(inner(velocity, velocity)**0.5)
    colours = tripcolor(speed, axes=axes, cmap="viridis", shading="gouraud")
    label = f"{len(PROBES)} velocity probes"
    axes.plot(*np.transpose(PROBES), "o", color="tab:red", markeredgecolor="white", label=label)
    axes.set(xlabel="x [cm]", ylabel="y [cm]", aspect="equal", title="flow of truth 1; its inflow is unknown")
    axes.legend(loc="upper center", fontsize="small")
    figure.colorbar(colours, ax=axes, label="speed [cm/s]", shrink=0.8)
    figure.savefig(folder / "setup.png", dpi=150)

    figure, axes = plt.subplots(1, len(drawn), figsize=(5.2 * len(drawn), 4), layout="constrained", sharey=True,
                                squeeze=False)
    for number, (ax, (truth, _, samples, reference)) in enumerate(zip(axes[0], drawn)):
        samples.plot(axes=ax, truth=truth, reference=reference, xlabel="y [cm]", ylabel="inflow g [cm/s]")
        ax.set_title(f"truth {number + 1}")
        ax.label_outer()
        if number:
            ax.get_legend().remove()
    figure.savefig(folder / "inflow.png", dpi=150)

    axes = plot_predictive(y, problem.measurements(posterior.values[:200], seed=5), ylabel="velocity [cm/s]")
    axes.set(xlabel="reading (horizontal and vertical velocity of each probe)", title="the samples explain the probes")
    axes.figure.savefig(folder / "predictive.png", dpi=150)
    plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = read_arguments(parser)
    run(arguments.output)
