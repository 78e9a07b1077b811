"""Pictures of the demo: maps of the town, readings at the hospital, ranks."""

import numpy as np
import torch
from firedrake import Function
from firedrake.pyplot import tricontour, tripcolor
from matplotlib import pyplot as plt
from matplotlib.tri import LinearTriInterpolator, Triangulation
from scipy.stats import binom
from town import HOSPITAL, METER, SENSORS, THRESHOLD, TIMES, TIME_STEP, V, mesh, nodes, transport, wind

from fem_diffusion import coefficients, field, point_sensors

PUSHED = 500  # samples of the posterior that are pushed through the finite element model
MODEL, CLOUD = "tab:blue", "magma_r"


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


def draw_calibration(found, names, levels, file):
    """Histograms of ranks with the band that chance allows, and coverage at all levels."""
    asked, bins = found.quantities, 10
    cases, draws = len(asked.ranks), asked.draws
    figure, panels = plt.subplot_mosaic("ABCX;DEFX", figsize=(15, 6.2), width_ratios=(1, 1, 1, 1.35),
                                        layout="constrained")
    low, high = binom.ppf([0.005, 0.995], cases, 1 / bins)
    for letter, name, ranks, p in zip("ABCDEF", names, asked.ranks.T, asked.p_values):
        ax = panels[letter]
        ax.axhspan(low, high, color="0.88")
        ax.axhline(cases / bins, color="0.4", linewidth=0.8)
        ax.hist(ranks, np.linspace(0, draws + 1, bins + 1), color=MODEL, alpha=0.75, rwidth=0.92)
        ax.set(title=f"{name}\np = {p:.2f}", xlim=(0, draws + 1), ylim=(0, 2.2 * cases / bins))
        if letter in "DEF":
            ax.set_xlabel("rank of the truth among the samples")
        if letter in "AD":
            ax.set_ylabel("cases")
    ax, line = panels["X"], np.linspace(0, 1, 41)
    ax.fill_between([0, 1], [-0.04, 0.96], [0.04, 1.04], color="0.88", label="within 4 points")

    def shares(ranks):
        distance = np.abs((ranks + 0.5) / (draws + 1) - 0.5)
        return [(distance <= level / 2).mean() for level in line]
    for ranks in asked.ranks.T:
        ax.plot(line, shares(ranks), color=MODEL, linewidth=0.6, alpha=0.6)
    ax.plot(line, shares(asked.ranks), color=MODEL, linewidth=2.2, label="quantities, each and all")
    ax.plot(line, shares(found.hospital.ranks), color="tab:red", linewidth=1.6, label="readings at the hospital")
    ax.errorbar(levels, *zip(*found.field.values()), fmt="D", color="tab:orange", markersize=7, capsize=4,
                label="bands of the field")
    ax.set(xlabel="level of the band", ylabel=f"share of {cases} truths inside", xlim=(0, 1), ylim=(0, 1),
           aspect="equal")
    ax.legend(fontsize="small", frameon=False, loc="upper left")
    figure.savefig(file, dpi=150)
    plt.close(figure)
