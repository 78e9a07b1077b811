"""Where was the contaminant released, and who will breathe it? Eight sensors in the streets of a town, as time series.

Clouds of a contaminant have come down between the buildings of a town, one to three of them, nobody knows where. The
wind carries the concentration u through the streets and turbulence spreads it:

    ∂u/∂t + v·∇u - ∇·(κ∇u) = 0,    u(0) = m,    u = 0 at the inflow,    κ ∂u/∂n = 0 elsewhere.

The unknown m is nowhere negative and zero almost everywhere, so its prior is far from Gaussian: a Python function that
drops clouds. Diffusion takes place in f = sqrt(m), a smooth field without sharp edges, and every sample m = f² is
non-negative by construction.

    python demos/source_release/source_release.py [--output FOLDER] [--pairs N]

A ninth sensor, at the hospital, takes no part in training: the samples predict its readings. Nothing exact is known
about this posterior, so 200 cases unseen in training say whether it can be trusted: how often the bands cover the
truth, and whether the truth's ranks among the samples are uniform. What has been computed is kept in the output folder:
an interrupted run continues. One process, because the pictures are maps.
"""

import argparse
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from firedrake import (
    Constant, DirichletBC, Function, FunctionSpace, Mesh, SpatialCoordinate, TestFunction, TestFunctions,
    TrialFunctions, assemble, div, dot, dx, solve,
)
from firedrake.pyplot import tricontour, tripcolor
from matplotlib import pyplot as plt
from matplotlib.tri import LinearTriInterpolator, Triangulation
from scipy.sparse import csr_matrix
from scipy.stats import binom
from tqdm import tqdm

from fem_diffusion import (
    CallableNoise, CallablePrior, DataSet, GaussianNoise, Observation, TrainingOptions, TransformedPrior,
    TransientAdvectionDiffusion, fit, pod, point_sensors, simulate,
)
from fem_diffusion.diagnostics import Calibration, calibrate, sbc_ranks
from fem_diffusion.fields import coefficients, field
from fem_diffusion.plot import plot_history

HERE = Path(__file__).parent
INFLOW, OUTFLOW, WALLS, OBSTACLES = 1, 2, 3, 4  # markers in streets.geo
WIND = 1.0          # m/s, at the inflow
TURBULENCE = 1.0    # κ in m²/s
TIMES = np.arange(20.0, 241.0, 20.0)  # s, when sensors report
TIME_STEP = 4.0     # s
SENSORS = [(128, 42), (128, 92), (124, 170), (188, 128), (192, 40), (196, 186), (284, 74), (284, 150)]  # m
HOSPITAL = (246, 70)  # m, the sensor left out
FLOOR, RELATIVE = 0.25, 0.05  # noise of the sensors: mg/m³, and a share of the reading
METER = GaussianNoise(std=FLOOR, relative=RELATIVE)
THRESHOLD = 5.0     # mg/m³, what may not be exceeded
PUSHED = 500        # samples of the posterior that are pushed through the finite element model
MODEL, CLOUD = "tab:blue", "magma_r"

# ## The problem, as in any Firedrake script

mesh = Mesh(str(HERE / "streets.msh"), name="streets")
V = FunctionSpace(mesh, "CG", 1)
nodes = np.stack([coefficients(Function(V).interpolate(c)) for c in SpatialCoordinate(mesh)], axis=1)
# Integrals over the streets are sums over nodes with these weights.
weights = coefficients(assemble(TestFunction(V) * dx).riesz_representation("l2"))
corners = mesh.coordinates.dat.data_ro[mesh.coordinates.cell_node_map().values]  # (cells, 3, 2)
cell_share = np.abs(np.linalg.det(corners[:, 1:] - corners[:, :1]))
cell_share /= cell_share.sum()


@cache
def wind():
    """Potential flow around the buildings: the mixed method makes its divergence vanish in every cell."""
    W = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
    (v, p), (w, q) = TrialFunctions(W), TestFunctions(W)
    flow = Function(W)
    bcs = [DirichletBC(W.sub(0), Constant((WIND, 0)), INFLOW),
           DirichletBC(W.sub(0), Constant((0, 0)), (WALLS, OBSTACLES))]
    solve((dot(v, w) - p * div(w) - div(v) * q) * dx == Constant(0) * q * dx, flow, bcs=bcs,
          solver_parameters={"mat_type": "aij", "ksp_type": "preonly", "pc_type": "lu",
                             "pc_factor_mat_solver_type": "mumps",
                             "mat_mumps_icntl_14": 300})  # room for the pivots of a saddle point
    return flow.subfunctions[0]


def transport(times=TIMES):
    """The map from the released cloud to the concentration at `times`."""
    return TransientAdvectionDiffusion(V, V, "initial", times=times, time_step=TIME_STEP, velocity=wind(),
                                       diffusivity=TURBULENCE, dirichlet={INFLOW: 0.0}, outflow=(OUTFLOW,))


def clouds(seed):
    """sqrt(m) for one to three clouds, anywhere in the streets; 10 to 40 mg/m³ at the centre, 18 to 32 m wide."""
    rng = np.random.default_rng(seed)
    m = np.zeros(len(nodes))
    for _ in range(rng.integers(1, 4)):
        centre = rng.dirichlet((1, 1, 1)) @ corners[rng.choice(len(corners), p=cell_share)]
        peak, width = rng.uniform(10, 40), rng.uniform(18, 32)
        m += peak * np.exp(-((nodes - centre)**2).sum(axis=1) / (2 * width**2))
    return field(V, np.sqrt(m))


def scaled(y):
    """Readings, a tensor in mg/m³, on a scale where their noise is of size one whatever the reading.

    It also brings the readings closer to linear in f, so the Gaussian base explains more: the variance of f that it
    leaves falls from 15 % to 9 %.
    """
    return torch.asinh(y * (RELATIVE / FLOOR)) / RELATIVE


def unscaled(s):
    """Readings in mg/m³; the inverse of `scaled`."""
    return torch.sinh(s * RELATIVE) * (FLOOR / RELATIVE)


def seen_from_start(problem, observation):
    """What sensors report, as rows over the release.

    The concentration is linear in the release. So one march back in time with all readings at once gives the whole map
    from releases to readings, and a training pair costs a product instead of a march forward.
    """
    rows = problem.sensitivity(Function(V), observation.rows)
    return Observation(V, csr_matrix(rows), observation.names, observation.points)


def training_pairs(folder, n, modes=64, progress=False):
    """Everything that training needs, and nothing of the model: another network can be trained on the very same data.

    Parameters
    ----------
    folder : path
        The pairs are simulated to ``pairs`` in it, or read from there.
    n : int
        Number of pairs.
    modes : int
        Of the basis.
    progress : bool
        Show a progress bar.

    Returns
    -------
    prior, basis, data, noise, observation, problem
        Latents are ``basis.encode(data.fields)``, noise-free measurements, as `scaled`, ``data.observations``.
    """
    prior = TransformedPrior(CallablePrior(V, clouds), lambda f: f**2)
    problem = transport()
    observation = point_sensors(problem.U, SENSORS)
    data = simulate(prior, lambda m: m, seen_from_start(problem, observation), n, seed=1, path=Path(folder) / "pairs",
                    progress=progress)
    basis = pod(V, data.fields[:5000], modes, transform=prior.transform_many, parameter_space=prior.V)
    noise = CallableNoise(lambda s, generator: scaled(METER.sample(unscaled(s), generator)))
    data = DataSet(data.fields, scaled(torch.as_tensor(data.observations)).numpy())
    return prior, basis, data, noise, observation, problem


# ## What is asked about a release

QUANTITIES = ("amount released [g/m]", "centre, x [m]", "centre, y [m]", "area above 5 mg/m³ [m²]",
              "highest concentration [mg/m³]", "mean reading at the hospital [mg/m³]")


def quantities(m, readings):
    """Numbers to ask for, of releases m (n, nodes) and their readings at the hospital (n, times): shape (n, 6)."""
    mass = m @ weights
    centre = (m * weights) @ nodes / mass[:, None]
    area = (m > THRESHOLD) @ weights
    return np.column_stack([1e-3 * mass, centre, area, m.max(axis=1), readings.mean(axis=1)])


# ## The job: simulate, fit, and ask 200 cases that nobody trained on

PAIRS, LEVELS = 60000, (0.5, 0.9)
# The posterior is far from the joint Gaussian that diffusion starts from, and many times narrower: that takes the
# network with layers on the mesh, and training at lower noise levels than the default. With so many pairs few have to
# be held out.
OPTIONS = TrainingOptions(steps=6000, width=128, learning_rate=3e-3, log_sigma_mean=-1.0, log_sigma_std=1.4,
                          validation_fraction=0.04, evaluate_every=500)

# The reverse SDE mends some of the network's errors, which the ODE carries along. Chosen on 200 other cases (seed 3),
# with a fully connected network: there the 50 % bands of the quantities cover 55 % by the ODE and 52 % by the SDE.
SAMPLING = {"alpha": 1.0, "steps": 40}


def held_out(prior, problem, observation, cases, seed=7):
    """Of cases unseen in training: releases, noisy measurements as `scaled`, and noisy readings at the hospital."""
    observation += point_sensors(problem.U, [HOSPITAL])
    unseen = simulate(prior, problem, observation, cases, seed=seed, progress=False)
    readings = METER.sample(torch.as_tensor(unseen.observations), torch.Generator().manual_seed(seed))
    at_sensors = len(observation) - len(TIMES)
    measurements, at_hospital = scaled(readings[:, :at_sensors]).numpy(), readings[:, at_sensors:].numpy()
    return prior.transform_many(unseen.fields), measurements, at_hospital


@dataclass(frozen=True)
class Check:
    """What the unseen cases say: of `QUANTITIES`, of all readings at the hospital, and of the field's bands."""

    quantities: Calibration
    hospital: Calibration
    field: dict  # level to share of the truth inside, and its standard error


def check(model, releases, measurements, readings, at_hospital, draws, sampling, progress):
    """Where the truths of unseen cases are among the samples.

    Readings, of the samples as of the truth, hold noise: it is part of the question, and without it plumes that pass
    the hospital by would be told apart by errors of rounding. Bands of the field are looked at where there is
    something to cover: where the posterior mean, which knows the measurement alone, exceeds 1 mg/m³. Elsewhere m is
    zero but for rounding, and so are the samples.
    """
    asked, read, covered = [], [], []
    for case, y in enumerate(tqdm(measurements, desc="check", disable=not progress)):
        m = model.condition(y).sample(draws, seed=10_000 + case, **sampling).values
        clean = torch.as_tensor(at_hospital.apply(m))
        read.append(METER.sample(clean, torch.Generator().manual_seed(10_000 + case)).numpy())
        asked.append(quantities(m, read[-1]))
        somewhere = m.mean(axis=0) > 1
        ranks = sbc_ranks(m[None][:, :, somewhere], releases[case][None, somewhere])
        inside = np.abs((ranks + 0.5) / (draws + 1) - 0.5) <= np.array(LEVELS)[:, None] / 2
        covered.append(inside @ weights[somewhere] / weights[somewhere].sum())
    shares = zip(np.mean(covered, axis=0), np.std(covered, axis=0, ddof=1) / np.sqrt(len(covered)))
    return Check(calibrate(np.array(asked), quantities(releases, readings), LEVELS),
                 calibrate(np.array(read), readings, LEVELS), dict(zip(LEVELS, shares)))


def run(folder, pairs=PAIRS, cases=200, draws=199, samples=1000, modes=64, options=OPTIONS, sampling=SAMPLING,
        progress=False):
    """From prior to pictures.

    Parameters
    ----------
    folder : path
        Of everything that is computed; what is there is not computed again.
    pairs, modes, options
        Of the training.
    cases, draws : int
        Unseen cases and samples for each; draws + 1 is best a multiple of 20.
    samples : int
        Of the maps and of the prediction.
    sampling : dict
        How they are drawn, as for `Posterior.sample`.
    progress : bool
        Show progress bars.

    Returns
    -------
    Check
    """
    start = time.perf_counter()
    prior, basis, data, noise, observation, problem = training_pairs(folder, pairs, modes, progress)
    print(f"{pairs} pairs, {len(observation)} readings each; {basis.r} modes keep {basis.retained:.2%} of the variance "
          f"of sqrt(m); after {time.perf_counter() - start:.0f} s", flush=True)
    model = fit(data, basis, noise, options=options, network="field", checkpoint=folder / "training.pt",
                progress=progress)
    model.save(folder / "model.safetensors")
    history = model.history
    print(f"trained after {time.perf_counter() - start:.0f} s; loss on held-out pairs {min(history.validation):.3f}, "
          f"Gaussian base alone {history.base:.3f}; weights of step {history.best_step} are kept", flush=True)

    releases, measurements, readings = held_out(prior, problem, observation, cases)
    at_hospital = seen_from_start(problem, point_sensors(problem.U, [HOSPITAL]))
    found = check(model, releases, measurements, readings, at_hospital, draws, sampling, progress)
    print_table(found)

    draw_setup(problem, releases[0], folder / "setup.png")
    shown = range(min(3, cases))  # the first ones, not chosen
    posteriors = [model.condition(measurements[case]).sample(samples, seed=case, **sampling) for case in shown]
    draw_posteriors(posteriors, releases, folder / "posterior.png")
    draw_prediction(posteriors, releases, readings, folder / "hospital.png")
    draw_calibration(found, folder / "calibration.png")
    plot_history(history).figure.savefig(folder / "training.png", dpi=150)
    plt.close("all")
    print(f"finished after {time.perf_counter() - start:.0f} s; pictures in {folder}", flush=True)
    return found


def print_table(found):
    """p-values and coverage, as a Markdown table."""
    asked, hospital = found.quantities, found.hospital
    distance = np.abs((asked.ranks + 0.5) / (asked.draws + 1) - 0.5)
    print(f"\n| {len(distance)} unseen cases | p of uniform ranks | " + " | ".join(f"{x:.0%} band" for x in LEVELS)
          + " covers |\n|---|---|---|---|")
    for name, p, d in zip(QUANTITIES, asked.p_values, distance.T):
        print(f"| {name} | {p:.3f} | " + " | ".join(f"{(d <= x / 2).mean():.1%}" for x in LEVELS) + " |")
    for name, part in (("all of these", asked), ("each reading at the hospital", hospital)):
        print(f"| {name} | | " + " | ".join(f"{part.coverage[x]:.1%} ± {part.coverage_error(x):.1%}" for x in LEVELS)
              + " |")
    print("| the field | | " + " | ".join("{:.1%} ± {:.1%}".format(*found.field[x]) for x in LEVELS) + " |", flush=True)


# ## Pictures


def street_map(ax, values, title=None, sensors=True, **scale):
    """Draw nodal values on a map; the buildings are holes in the mesh, and grey."""
    ax.set_facecolor("0.55")
    colours = tripcolor(values if isinstance(values, Function) else field(V, values), axes=ax, shading="gouraud",
                        rasterized=True, **scale)
    if sensors:
        ax.plot(*np.transpose(SENSORS), "o", color="tab:cyan", markeredgecolor="black", markersize=4.5)
        ax.plot(*HOSPITAL, "P", color="tab:red", markeredgecolor="white", markersize=8)
    ax.set(title=title, aspect="equal", xlim=(0, 300), ylim=(0, 200), xticks=(0, 100, 200, 300), yticks=(0, 100, 200))
    return colours


def finish(figure, axes, file):
    """Label the outer axes, write the figure."""
    for ax in np.ravel(axes):
        ax.set(xlabel="x [m]", ylabel="y [m]")
        ax.label_outer()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_setup(problem, release, file):
    """The wind with the sensors, and a release at five times."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.2), layout="constrained", sharex=True, sharey=True)
    velocity = wind()
    parts = [coefficients(Function(V).project(velocity[i])) for i in range(2)]
    speed = street_map(axes[0, 0], np.hypot(*parts), "wind around the buildings", cmap="Blues", vmin=0, vmax=2.5)
    triangles = Triangulation(*mesh.coordinates.dat.data_ro.T, mesh.coordinates.cell_node_map().values)
    grid = np.meshgrid(np.linspace(0, 300, 151), np.linspace(0, 200, 101))
    corner = Function(mesh.coordinates.function_space().sub(0).collapse())
    flow = [LinearTriInterpolator(triangles, corner.interpolate(field(V, part)).dat.data_ro.copy())(*grid)
            for part in parts]
    axes[0, 0].streamplot(*grid, *flow, color="0.25", linewidth=0.6, arrowsize=0.7, density=1.3)
    figure.colorbar(speed, ax=axes[0, 0], label="speed [m/s]", shrink=0.85)
    moments = [0, 2, 4, 6, 9]
    states = problem.solve_many(release[None])[0].reshape(len(nodes), len(TIMES))
    for ax, number in zip(axes.flat[1:], moments):
        values = release if number == 0 else states[:, number - 1]
        seconds = 0 if number == 0 else TIMES[number - 1]
        title = f"concentration after {seconds:.0f} s"
        colours = street_map(ax, values, title, cmap=CLOUD, vmin=0, vmax=release.max())
    figure.colorbar(colours, ax=axes[:, 2], label="concentration [mg/m³]", extend="max", shrink=0.85)
    figure.legend(handles=axes[0, 0].lines[:2], labels=["sensor", "hospital: sensor left out"],
                  loc="outside lower center", ncols=2, frameon=False)
    finish(figure, axes, file)


def draw_posteriors(posteriors, releases, file):
    """Truth, mean, spread, probability of exceedance and two samples, a row for each case."""
    figure, axes = plt.subplots(len(posteriors), 6, figsize=(21, 0.5 + 2.2 * len(posteriors)), layout="constrained",
                                squeeze=False, sharex=True, sharey=True)
    for number, (row, samples, truth) in enumerate(zip(axes, posteriors, releases)):
        concentration = {"cmap": CLOUD, "vmin": 0, "vmax": truth.max()}
        panels = [("truth", truth, concentration), ("posterior mean", samples.mean(), concentration),
                  ("one sample", samples[0], concentration), ("another", samples[1], concentration),
                  ("standard deviation", samples.std(), {"cmap": "Purples", "vmin": 0}),
                  (f"probability of m > {THRESHOLD:g} mg/m³", (samples.values > THRESHOLD).mean(axis=0),
                   {"cmap": "RdYlGn_r", "vmin": 0, "vmax": 1})]
        drawn = [street_map(ax, values, None if number else title, **scale)
                 for ax, (title, values, scale) in zip(row, panels)]
        tricontour(field(V, truth), axes=row[5], levels=[THRESHOLD], colors="black", linewidths=1.0)
        figure.colorbar(drawn[3], ax=row[3], label="release [mg/m³]", extend="max")
        figure.colorbar(drawn[4], ax=row[4], label="[mg/m³]")
        figure.colorbar(drawn[5], ax=row[5])
    finish(figure, axes, file)


def draw_prediction(posteriors, releases, readings, file):
    """What the hospital will breathe: samples pushed through the finite element model, at every step in time."""
    every = TIME_STEP * np.arange(1, round(TIMES[-1] / TIME_STEP) + 1)
    problem = transport(every)
    sensor = point_sensors(problem.U, [HOSPITAL])
    generator = torch.Generator().manual_seed(3)
    figure, axes = plt.subplots(1, len(posteriors), figsize=(5.2 * len(posteriors), 3.8), layout="constrained",
                                squeeze=False)
    for number, (ax, samples, truth, reading) in enumerate(zip(axes[0], posteriors, releases, readings)):
        clean = sensor.apply(problem.solve_many(samples.values[:PUSHED]))
        noisy = METER.sample(torch.as_tensor(clean), generator).numpy()
        lower, middle, upper = np.quantile(noisy, [0.025, 0.5, 0.975], axis=0)
        ax.fill_between(every, lower, upper, color=MODEL, alpha=0.2, label="95 % band of readings")
        ax.plot(every, clean[:15].T, color=MODEL, linewidth=0.5, alpha=0.5)
        ax.plot(every, middle, color=MODEL, linewidth=2, label="posterior median")
        ax.plot([], [], color=MODEL, linewidth=0.5, label="samples")
        ax.plot(every, sensor.apply(problem.solve_many(truth[None]))[0], color="black", label="truth")
        ax.plot(TIMES, reading, "o", color="tab:red", markersize=4.5, label="readings, not used")
        ax.set(title=f"case {number + 1}", xlabel="time after the release [s]", xlim=(0, TIMES[-1] + 5))
    axes[0, 0].set_ylabel("concentration at the hospital [mg/m³]")
    axes[0, 0].legend(fontsize="small", frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_calibration(found, file):
    """Histograms of ranks with the band that chance allows, and coverage at all levels."""
    asked, bins = found.quantities, 10
    cases, draws = len(asked.ranks), asked.draws
    figure, panels = plt.subplot_mosaic("ABCX;DEFX", figsize=(15, 6.2), width_ratios=(1, 1, 1, 1.35),
                                        layout="constrained")
    low, high = binom.ppf([0.005, 0.995], cases, 1 / bins)
    for letter, name, ranks, p in zip("ABCDEF", QUANTITIES, asked.ranks.T, asked.p_values):
        ax = panels[letter]
        ax.axhspan(low, high, color="0.88")
        ax.axhline(cases / bins, color="0.4", linewidth=0.8)
        ax.hist(ranks, np.linspace(0, draws + 1, bins + 1), color=MODEL, alpha=0.75, rwidth=0.92)
        ax.set(title=f"{name}\np = {p:.2f}", xlim=(0, draws + 1), ylim=(0, 2.2 * cases / bins))
        if letter in "DEF":
            ax.set_xlabel("rank of the truth among the samples")
        if letter in "AD":
            ax.set_ylabel("cases")
    ax, levels = panels["X"], np.linspace(0, 1, 41)
    ax.fill_between([0, 1], [-0.04, 0.96], [0.04, 1.04], color="0.88", label="within 4 points")

    def shares(ranks):
        distance = np.abs((ranks + 0.5) / (draws + 1) - 0.5)
        return [(distance <= level / 2).mean() for level in levels]
    for ranks in asked.ranks.T:
        ax.plot(levels, shares(ranks), color=MODEL, linewidth=0.6, alpha=0.6)
    ax.plot(levels, shares(asked.ranks), color=MODEL, linewidth=2.2, label="quantities, each and all")
    ax.plot(levels, shares(found.hospital.ranks), color="tab:red", linewidth=1.6, label="readings at the hospital")
    ax.errorbar(LEVELS, *zip(*found.field.values()), fmt="D", color="tab:orange", markersize=7, capsize=4,
                label="bands of the field")
    ax.set(xlabel="level of the band", ylabel=f"share of {cases} truths inside", xlim=(0, 1), ylim=(0, 1),
           aspect="equal")
    ax.legend(fontsize="small", frameon=False, loc="upper left")
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "output")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    arguments, _ = parser.parse_known_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    run(arguments.output, arguments.pairs, progress=True)
