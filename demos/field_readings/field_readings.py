"""From a logger's file to an answer that can be trusted: where does groundwater seep into a river?

A river of 10 km comes from a spring at 300 µS/cm. Where groundwater seeps in, its conductivity rises or falls,

    u c' - κ c'' = q(x),    c(0) = 300 µS/cm,    c'(L) = 0,

with an unknown inflow q: salty water counts as positive, fresh water as negative. Twelve gauges report c every half
hour for three days; the water passes in four hours, and every half hour counts as a steady state. Their file,
readings.csv, is as files are: gaps, hours without power, rows sent twice, "OVL", another unit. One gauge drifts, one is
broken, and all have outliers. (make_readings.py simulates it, with a finer scheme and another truth than the prior.)

The solver below is any Firedrake user's; the lines marked "added" turn it into an answer for every half hour. Then each
gauge is predicted from the others, without a solve and without knowing any truth: that names the two bad gauges, the
outliers, and by how much the noise of the data sheet is too small. What is left goes to a model with heavy tails.

    python demos/field_readings/field_readings.py [--output FOLDER]
"""

import argparse
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from firedrake import (
    Constant, DirichletBC, Function, FunctionSpace, IntervalMesh, TestFunction, conditional, dx, SpatialCoordinate,
    assemble,
)
from matplotlib import pyplot as plt
from scipy.stats import loguniform

from fem_diffusion import GaussianPrior, InverseProblem, MeasurementWarning, Steady, StudentNoise  # added
from fem_diffusion import GaussianNoise, fit, point_sensors, read_measurements, simulate  # added
from fem_diffusion import SolveError, TrainingOptions, amortised_gap
from fem_diffusion.checks import read_arguments

sys.path.insert(0, str(Path(__file__).parent))
from make_readings import GAUGES, inflow  # noqa: E402

LENGTH, SPEED, MIXING, SPRING = 10.0, 60.0, 3.0, 300.0  # km, km/day, km²/day, µS/cm
NAMES = [f"gauge {i + 1} [uS/cm]" for i in range(len(GAUGES))]
SHEET = 1.0  # noise of the gauges by their data sheet, µS/cm
ZONE = (4.5, 7.0)  # km: what is asked for, the water that seeps in there
FILE = Path(__file__).parent / "readings.csv"
ASKED = "inflow", "noise level"
RAW, CLEAN, TRUTH = "tab:orange", "tab:blue", "black"

# ## The problem, as in any Firedrake script


def river(n):
    """Space of inflow and conductivity, the residual of the equation, its unknowns and conditions."""
    V = FunctionSpace(IntervalMesh(n, LENGTH), "CG", 1)
    c, q, v = Function(V, name="conductivity"), Function(V, name="inflow"), TestFunction(V)
    residual = (SPEED * c.dx(0) * v + MIXING * c.dx(0) * v.dx(0) - q * v) * dx
    return V, residual, c, q, DirichletBC(V, Constant(SPRING), 1)


# ## What is added


def infer(V, residual, c, q, bcs, noise, pairs, options, progress):
    """Trained model of the gauges with some noise."""
    prior = GaussianPrior(V, std=1000.0, correlation_length=1.5)  # added
    gauges = point_sensors(V, GAUGES, NAMES)  # added
    problem = InverseProblem(prior, Steady(residual, c, q, bcs), gauges, noise)  # added
    data = simulate(problem, pairs, seed=1, progress=progress)  # added
    return fit(problem, data, options=options, progress=progress)  # added


def told(model, measurements):
    """Posteriors of all times, and what stood out."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        posteriors = measurements.condition_all(model)  # added
    for one in found:
        if issubclass(one.category, MeasurementWarning):
            print(f"warning: {one.message}")
    return posteriors


# ## What is asked, and what would have been answered without a look


def seepage(V):
    """Weights (n_nodes,) of an inflow's integral over the zone, in µS/cm km/day."""
    x, v = SpatialCoordinate(V.mesh())[0], TestFunction(V)
    inside = conditional(x > ZONE[0], 1.0, 0.0) * conditional(x < ZONE[1], 1.0, 0.0)
    return assemble(inside * v * dx(degree=8)).dat.data_ro.copy()


def days(times):
    """Days since the first of March."""
    return (times - np.datetime64("2026-03-01")) / np.timedelta64(1, "D")


def broken(t, *lines):
    """Lines that end where rows are missing."""
    ends = np.flatnonzero(np.diff(t) > 1.5 * np.median(np.diff(t))) + 1
    return [np.insert(line, ends, np.nan) for line in (t, *lines)]


def answer(posteriors, n, seed, V, progress):
    """Summaries of the samples of each time: mean and bands (3, m, n_nodes) of the inflow, and (3, m) of the zone's."""
    weights, fields, zones = seepage(V), [], []
    for samples in posteriors.sample(n, seed=seed, extrapolate=True, progress=progress):
        q = samples.component(0).values
        fields.append([q.mean(axis=0), *np.quantile(q, [0.05, 0.95], axis=0)])
        total = q @ weights
        zones.append([total.mean(), *np.quantile(total, [0.05, 0.95])])
    return np.array(fields).transpose(1, 0, 2), np.array(zones).T


def compare(name, fields, x, times):
    """Share of the truth in 90 % bands, and the error of the mean, over gauged places and all times."""
    truth = np.stack([inflow(x, t) for t in days(times)])
    some = (x > 1.0) & (x < 9.0)
    mean, low, high = (part[:, some] for part in fields)
    inside = ((low <= truth[:, some]) & (truth[:, some] <= high)).mean()
    error = np.sqrt(((mean - truth[:, some])**2).mean())
    print(f"{name}: 90 % bands hold {inside:.0%} of the truth, error of the mean {error:.0f} µS/cm/day (root mean "
          "square)")
    return inside, error


def close(posterior, solves, progress):
    """Tell how far the amortised posterior of one half hour is from its finite element posterior."""
    ours = posterior.sample(2000, seed=4, extrapolate=True, progress=progress)
    try:
        right = posterior.correct(solves, seed=5, progress=progress)
    except SolveError as error:
        print(f"nothing to compare with: {error}")
        return
    for i, name in enumerate(ASKED):
        one, other = ours.component(i), right.component(i)
        print(f"{name}: {amortised_gap(one, other.mean(), other.std())}")


OPTIONS = TrainingOptions(steps=500)


def run(folder, n=100, pairs=1000, samples=400, every=1, solves=2000, options=OPTIONS, progress=True):
    """The whole job; returns the cross-validation, and coverage and error before and after it."""
    start = time.perf_counter()
    problem = river(n)
    V = problem[0]
    gauges = point_sensors(V, GAUGES, NAMES)
    measurements = read_measurements(FILE, gauges, limits=(0, 2000))[::every]  # added
    print(measurements)

    model = infer(*problem, GaussianNoise(std=SHEET), pairs, options, progress)
    posteriors = told(model, measurements)
    found = posteriors.cross_validate()  # added
    print(found)

    cleaned = replace(measurements, values=found.cleaned)
    # Nobody knows the noise, and it has tails: its level is one more unknown.
    sound = infer(*problem, StudentNoise(loguniform(0.5, 8.0), df=4.0), pairs, options, progress)
    better = told(sound, cleaned)
    x = V.mesh().coordinates.dat.data_ro
    answers = {"as they came": answer(posteriors, samples, 2, V, progress), "with every safeguard": answer(
        better, samples, 3, V, progress)}
    scores = {name: compare(name, fields, x, posteriors.times) for name, (fields, _) in answers.items()}
    draw(folder, measurements, found, answers, x, seepage(V))
    middle = better[len(better) // 2]
    close(middle, solves, progress)
    middle.report(folder / "report.html", threshold=(0.0, None), name=ASKED, mesh_units="km",
                  units=("µS/cm/day", "µS/cm"), reading="conductivity [µS/cm]", cross=found, measurements=measurements,
                  question="Where does groundwater seep in, and is it salty?", progress=progress)
    print(f"finished after {time.perf_counter() - start:.0f} s; pictures in {folder}", flush=True)
    return found, scores


def draw(folder, measurements, found, answers, x, weights):
    """Readings, what gauges say of each other, the inflow in place and time, and the question."""
    t, values, k = days(measurements.times), measurements.values, len(NAMES)
    figure, axes = plt.subplots(3, 4, figsize=(14, 7), sharex=True, layout="constrained")
    for i, (ax, name) in enumerate(zip(axes.ravel(), NAMES)):
        bad, single = name in found.worst, found.outliers[:, i]
        at, low, high = broken(t, (found.mean - 1.96 * found.std)[:, i], (found.mean + 1.96 * found.std)[:, i])
        ax.fill_between(at, low, high, color=CLEAN, alpha=0.25, linewidth=0, label="the others let expect, 95 %")
        ax.plot(t, values[:, i], ".", color="tab:red" if bad else TRUTH, markersize=3, label="read")
        ax.plot(t[single], values[single, i], "o", color="tab:red", markerfacecolor="none", label="left out")
        ax.set_title(f"{name}, km {GAUGES[i]:g}" + ": contradicted" * bad, fontsize=10,
                     color="tab:red" if bad else TRUTH)
    figure.supxlabel("days")
    figure.supylabel("conductivity [µS/cm]")
    axes[0, 0].legend(fontsize="x-small", frameon=False)
    figure.savefig(folder / "readings.png", dpi=150)

    found.plot().savefig(folder / "sensors.png", dpi=150)

    truth = np.stack([inflow(x, one) for one in t])
    figure, axes = plt.subplots(1, 4, figsize=(16, 4.6), layout="constrained", sharey=True)
    width = np.diff(t).min(initial=1.0)
    edges = np.stack([t - width / 2, t + width / 2])
    reach = 1.1 * np.abs(truth).max()
    parts = [("truth", truth), *((f"posterior mean, {name}", fields[0]) for name, (fields, _) in answers.items())]
    fields = answers["with every safeguard"][0]
    parts.append(("half the width of its 90 % band", (fields[2] - fields[1]) / 2))
    for i, (ax, (name, q)) in enumerate(zip(axes, parts)):
        style = {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach} if i < 3 else {"cmap": "magma", "vmin": 0}
        # Hours without a row stay empty.
        grid = np.full((2 * len(t) - 1, q.shape[1]), np.nan)
        grid[::2] = q
        colours = ax.pcolormesh(np.append(x, 2 * x[-1] - x[-2]), edges.T.ravel(), grid, **style)
        ax.plot(GAUGES, np.full(k, t[-1] + 0.06), "v", color=TRUTH, markersize=4, clip_on=False)
        ax.set(xlabel="x [km]", title=name, xlim=(0, LENGTH))
        if i in (2, 3):
            figure.colorbar(colours, ax=axes[:3] if i == 2 else ax, label="inflow q [µS/cm/day]", pad=0.01)
    axes[0].set_ylabel("days")
    figure.savefig(folder / "inflow.png", dpi=150)

    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    for (name, (_, zone)), colour in zip(answers.items(), (RAW, CLEAN)):
        at, mean, low, high = broken(t, *zone)
        ax.fill_between(at, low, high, color=colour, alpha=0.25, linewidth=0)
        ax.plot(at, mean, color=colour, label=name)
    ax.plot(*broken(t, truth @ weights), color=TRUTH, label="truth")
    ax.set(xlabel="days", ylabel="inflow [µS/cm km/day]", title=f"water that seeps in between km {ZONE[0]:g} and "
           f"{ZONE[1]:g}: mean and 90 % band")
    ax.legend(frameon=False)
    figure.savefig(folder / "zone.png", dpi=150)
    plt.close("all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments = read_arguments(parser)
    run(arguments.output)
