"""How stiff is it inside? An unknown stiffness field, seen only through displacements measured along the surface.

A block of soft tissue, 60 mm x 30 mm, is held at its bottom and pressed from above by 0.5 kPa; a camera follows 24
marks along its surface. Plane strain, linear elasticity, Young's modulus E(x) = E₀ exp(g(x)):

    -∇·σ = 0,   σ = λ tr(ε) I + 2 μ ε,   u = 0 at the bottom,   σ n = -p n on top,   σ n = 0 at the sides.

The equations are linear in the displacement u, but u is nonlinear in E. The problem below is any Firedrake user's. The
lines marked "added" are all that turns it into a sampler of E given the marks; `check` then asks 400 pairs that were
not used in training whether the truth is where the samples say it is. `Steady` solves it for many stiffnesses at once;
any function E -> u would do as well, one solve after another.

    python demos/elastic_stiffness/elastic_stiffness.py [--output FOLDER]
"""

import argparse
import time
from pathlib import Path

import numpy as np
from firedrake import (
    DirichletBC, FacetNormal, Function, FunctionSpace, Identity, LinearVariationalProblem, Mesh, RectangleMesh,
    TestFunction, TrialFunction, VectorFunctionSpace, div, dot, ds, dx, exp, grad, inner, sym,
)
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt

from fem_diffusion import GaussianNoise, GaussianPrior, InverseProblem, TransformedPrior  # added
from fem_diffusion import Steady, fit, point_sensors, simulate  # added
from fem_diffusion import TrainingOptions, amortised_gap, coefficients
from fem_diffusion.checks import read_arguments
from fem_diffusion.trust import calibrate_model
from fem_diffusion.plot import plot_calibration, plot_predictive

LENGTH, HEIGHT, BOTTOM, TOP = 60.0, 30.0, 3, 4  # mm
STIFFNESS, POISSON, PRESSURE = 10.0, 0.3, 0.5  # E₀ in kPa, p in kPa
NOISE = 0.05  # mm
MARKS = ([(x, HEIGHT) for x in np.linspace(2.0, 58.0, 14)]
         + [(x, y) for x in (0.0, LENGTH) for y in (5.0, 10.0, 15.0, 20.0, 25.0)])  # mm

# ## The problem, as in any Firedrake script


def block(n):
    """The problem on a mesh of 2n x n squares, and the stiffness in it."""
    mesh = RectangleMesh(2 * n, n, LENGTH, HEIGHT)
    M, U = FunctionSpace(mesh, "CG", 1), VectorFunctionSpace(mesh, "CG", 1)
    E, u, v, displacement = Function(M), TrialFunction(U), TestFunction(U), Function(U)
    lame, shear = E * POISSON / ((1 + POISSON) * (1 - 2 * POISSON)), E / (2 * (1 + POISSON))
    stress = lame * div(u) * Identity(2) + 2 * shear * sym(grad(u))
    load = -PRESSURE * dot(FacetNormal(mesh), v) * ds(TOP)
    return LinearVariationalProblem(inner(stress, grad(v)) * dx, load, displacement, DirichletBC(U, 0, BOTTOM)), E


# ## What is added


def infer(equation, E, pairs, folder, options, progress):
    """Problem and trained model."""
    solver = Steady.from_problem(equation, E)  # added
    log_field = GaussianPrior(E.function_space(), std=0.4, correlation_length=15.0)  # added
    prior = TransformedPrior(log_field, lambda g: STIFFNESS * exp(g))  # added
    sensors = point_sensors(solver.U, MARKS)  # added
    problem = InverseProblem(prior, solver, sensors, GaussianNoise(std=NOISE))  # added
    data = simulate(problem, pairs, seed=1, path=folder / "pairs", progress=progress)  # added
    return problem, fit(problem, data, options=options, progress=progress)  # added


# ## Is it right?


def check(problem, model, held_out, progress):
    """Ranks and coverage of the 16 largest modes of held-out truths."""
    fresh = simulate(problem, held_out, seed=2, progress=progress)
    return calibrate_model(model, fresh, seed=3, leading=16)


def run(folder, n=16, pairs=16000, held_out=400, samples=2000, solves=1000, options=TrainingOptions(), progress=True):
    """The whole job; returns the calibration."""
    start = time.perf_counter()
    problem, model = infer(*block(n), pairs, folder, options, progress)
    print(f"{pairs} pairs; simulated and trained after {time.perf_counter() - start:.0f} s: {model.summary}")
    truth = problem.prior.sample(seed=5)
    displacement = problem.forward(truth)
    y, = problem.measurements(coefficients(truth)[None], seed=5)
    conditioned = model.condition(y)
    posterior = conditioned.sample(samples, seed=4)  # added
    calibration = check(problem, model, held_out, progress)
    print(calibration.table())
    corrected = conditioned.correct(solves=solves, seed=5, progress=progress)
    print(f"{corrected.certificate}\n{amortised_gap(posterior, corrected.mean(), corrected.std())}")
    draw(folder, truth, displacement, posterior, problem, y, calibration)
    conditioned.report(
        folder / "report.html", threshold=15.0, seed=4, progress=progress, name="stiffness", units="kPa",
        mesh_units="mm", reading="displacement [mm]", boundaries=[TOP], question="How stiff is the tissue inside, and "
        "is there a part stiffer than 15 kPa, which a healthy one has not?")
    print(f"finished after {time.perf_counter() - start:.0f} s; pictures in {folder}", flush=True)
    return calibration


def draw(folder, truth, displacement, posterior, problem, y, calibration):
    """Set-up, truth against posterior, and the check."""
    mesh = truth.function_space().mesh()
    bent = Mesh(mesh.coordinates.copy(deepcopy=True))
    bent.coordinates.dat.data[:] += displacement.dat.data_ro
    stiffness = Function(FunctionSpace(bent, "CG", 1), val=truth.dat.data_ro.copy())
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    colours = tripcolor(stiffness, axes=axes, cmap="viridis", shading="gouraud")
    places = np.array(MARKS) + problem.observation(displacement).reshape(-1, 2)
    axes.plot(*np.transpose(MARKS), "o", color="none", markeredgecolor="grey", markersize=5, label="marks at rest")
    axes.plot(*places.T, "o", color="tab:red", markeredgecolor="white", label="marks under pressure")
    axes.set(xlabel="x [mm]", ylabel="y [mm]", aspect="equal", title="the truth, deformed")
    axes.legend(loc="lower center", fontsize="small", ncols=2)
    figure.colorbar(colours, ax=axes, label="Young's modulus E [kPa]", shrink=0.8)
    figure.savefig(folder / "setup.png", dpi=150)

    figure, axes = plt.subplots(2, 2, figsize=(12, 6.4), layout="constrained")
    posterior.plot(axes=axes.ravel(), truth=truth, ylabel="Young's modulus E [kPa]")
    for ax in axes.ravel():
        ax.plot(*np.transpose(MARKS), "o", color="tab:red", markersize=4, clip_on=False)
        ax.set(xlabel="x [mm]", ylabel="y [mm]")
    figure.savefig(folder / "stiffness.png", dpi=150)

    figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    plot_predictive(y, problem.measurements(posterior.values[:100], seed=5), axes[0], ylabel="displacement [mm]")
    plot_calibration(calibration, axes[1])
    axes[0].set(title="the samples explain the marks", xlabel="reading (horizontal and vertical for each mark)",
                xticks=np.arange(0, len(y), 6))
    axes[1].set_title("held-out truths among their samples")
    figure.savefig(folder / "check.png", dpi=150)
    plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = read_arguments(parser)
    run(arguments.output)
