"""One trained model for any set of sensors: which flux enters the channel of demos/boundary_flux?

The model is trained on states, under random operators: probes at random places of the channel, from a handful to
dozens, and beams that measure the mean concentration along a line across it. Then it answers for layouts that it has
never seen, next to the reference posterior and to a model that was trained for that layout alone.

Case "gaussian": 20 layouts of 1 to 64 probes, against the exact finite element posterior.
Case "positive": five layouts, among them an array of which five sensors have failed and a mixture of probes and beams,
against Hamiltonian Monte Carlo with the finite element model.

    python demos/many_sensors/many_sensors.py [--output FOLDER] [--case gaussian|positive]

What has been computed is kept in the output folder: an interrupted run continues.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from firedrake import Function, SpatialCoordinate
from firedrake.pyplot import tripcolor
from matplotlib import pyplot as plt

from fem_diffusion import (
    DataSet, GaussianNoise, InverseProblem, SensorFamily, SensorKind, amortised_gap, coefficients, exact, field, fit,
    hmc, line_averages, point_sensors, random_points, simulate, tell_gaps,
)
from fem_diffusion.checks import read_arguments
from fem_diffusion.plot import plot_history

sys.path.insert(0, str(Path(__file__).parents[1] / "boundary_flux"))
from boundary_flux import M, V, error, gaussian_case, mesh, positive_case, say, sensors as ARRAY  # noqa: E402

PROBE, BEAM = 0.046, 0.02   # noise of a probe and of a beam, mol/m³
SAMPLES = 8000

# ## The family: what a measurement may hold


def beams(positions, tilts):
    """Lines from wall to wall that start at these positions and lean by these lengths, in m."""
    ends = np.clip(np.add(positions, tilts), 0.0, 4.0)
    return line_averages(V, [(x, 0.0) for x in positions], [(x, 1.0) for x in ends])


def probes_family(most):
    """Probes at random places, up to so many."""
    return SensorFamily(SensorKind(point_sensors(V, random_points(mesh, 3000, seed=10)), PROBE, (1, most)))


def mixed_family():
    """Probes at random places and beams, together."""
    rng = np.random.default_rng(11)
    return SensorFamily((
        SensorKind(point_sensors(V, random_points(mesh, 3000, seed=10)), PROBE, (4, 24)),
        SensorKind(beams(rng.uniform(0.2, 3.8, 500), rng.uniform(-0.5, 0.5, 500)), BEAM, (0, 4)),
    ))


# ## Layouts that training has not seen

BEAMS = (0.8, 2.0, 3.2), (0.3, -0.2, 0.1)


def layouts():
    """Name, sensors, noise and which of them have failed, for the positive case."""
    probes = [point_sensors(V, random_points(mesh, k, seed=20 + k)) for k in (6, 12, 24, 8)]
    mixture = probes[3] + beams(*BEAMS)
    array = point_sensors(V, ARRAY)
    failed = np.isin(np.arange(len(array)), [1, 4, 5, 10, 13])
    plain = [(f"{len(p)} probes", p, np.full(len(p), PROBE), np.zeros(len(p), dtype=bool)) for p in probes[:3]]
    return plain + [
        ("array of 16, 5 failed", array, np.full(16, PROBE), failed),
        ("8 probes, 3 beams", mixture, np.repeat([PROBE, BEAM], [8, 3]), np.zeros(11, dtype=bool)),
    ]


def measure(observation, std, state, seed):
    """A noisy measurement of a state."""
    return observation(state) + std * np.random.default_rng(seed).standard_normal(len(observation))


def trained_alone(problem, data, basis, checkpoint):
    """A model of this one layout, from the same states."""
    pairs = DataSet(data.coefficients, problem.observation.apply(data.states))
    return fit(problem, pairs, basis=basis, checkpoint=checkpoint, progress=False)


def reference_posterior(file, problem, y, seed, draws, progress):
    """Moments, their errors and the band by Hamiltonian Monte Carlo, which a second run finds in the file."""
    if M.comm.size == 1 and file.exists():
        kept = np.load(file)
        if kept["y"].shape == y.shape and np.allclose(kept["y"], y):
            return SimpleNamespace(**kept)
    found = hmc(problem, y, seed=seed, chains=100, draws=draws, progress=progress)
    parts = {name: coefficients(getattr(found, name)()) for name in ("mean", "std", "mean_error", "std_error")}
    parts |= {"lower": coefficients(found.quantile(0.025)), "upper": coefficients(found.quantile(0.975))}
    parts |= {"acceptance": found.acceptance}
    if M.comm.size == 1:
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, y=y, **parts)
        partial.replace(file)
    return SimpleNamespace(**parts)


def errors(samples, mean, std):
    """Relative errors of mean and standard deviation over the wall."""
    return error(coefficients(samples.mean()), mean), error(coefficients(samples.std()), std)


def gaussian(folder, progress, pairs=2000, count=20):
    """Rows (number of probes; errors of the one model, of the model of that layout alone, of as many exact samples)."""
    start = time.perf_counter()
    prior, forward = gaussian_case()
    family = InverseProblem(prior, forward, probes_family(64))
    data = simulate(family, pairs, seed=1, path=folder / "states_gaussian", progress=progress)
    model = fit(family, data, checkpoint=folder / "training_gaussian.safetensors", progress=progress)
    say(f"\nGaussian flux: one model after {time.perf_counter() - start:.0f} s, {model.states.r} modes of the state: "
        f"{model.summary}")
    rows, gaps = [], []
    for number, k in enumerate(np.geomspace(1, 64, count).round().astype(int).tolist()):
        observation = point_sensors(V, random_points(mesh, k, seed=1000 + number))
        y = measure(observation, PROBE, forward(prior.sample(seed=2000 + number)), number)
        problem = InverseProblem(prior, forward, observation, PROBE)
        right = exact(problem, y)
        mean, std = coefficients(right.mean()), coefficients(right.std())
        alone = trained_alone(problem, data, model.basis, folder / f"alone_gaussian_{number}.safetensors")
        both = [posterior.sample(2 * SAMPLES, seed=number, progress=False) for posterior in
                (model.condition(y, observation, PROBE), alone.condition(y))]
        gaps.append(amortised_gap(both[0], right.mean(), right.std()))
        both.append(right.sample(2 * SAMPLES, seed=3000 + number))
        rows.append([k, *(x for samples in both for x in errors(samples, mean, std))])
    say("\n| probes | mean error | std error | alone: mean | alone: std | exact samples: mean | std |\n"
        "|---|---|---|---|---|---|---|")
    for k, *values in rows:
        say(f"| {k} | " + " | ".join(f"{value:.2%}" for value in values) + " |")
    ratios = np.exp(np.log(np.array(rows)[:, 1:3] / np.array(rows)[:, 3:5]).mean(axis=0))
    say("one model over alone, geometric means: {:.2f} and {:.2f}".format(*ratios))
    say(tell_gaps(gaps))
    if M.comm.rank == 0:
        draw_counts(rows, folder / "gaussian.png")
    return rows


def positive(folder, progress, pairs=20000, draws=400):
    """Rows (layout, errors of the one model, errors of the model of that layout alone, errors of the reference)."""
    start = time.perf_counter()
    prior, forward = positive_case()
    family = InverseProblem(prior, forward, mixed_family())
    data = simulate(family, pairs, seed=1, path=folder / "states_positive", progress=progress)
    simulated = time.perf_counter()
    model = fit(family, data, checkpoint=folder / "training_positive.safetensors", progress=progress)
    say(f"\npositive flux: {pairs} states in {simulated - start:.0f} s, one model trained in "
        f"{time.perf_counter() - simulated:.0f} s, {model.states.r} modes of the state: {model.summary}")
    model.save(folder / "model_positive.safetensors")
    rows, drawn, gaps = [], [], []
    for number, (name, observation, std, failed) in enumerate(layouts()):
        truth = prior.sample(seed=300 + number)
        y = measure(observation, std, forward(truth), number)
        begun = time.perf_counter()
        posterior = model.condition(np.where(failed, np.nan, y), observation, GaussianNoise(std=std))
        samples = posterior.sample(SAMPLES, seed=number, progress=False)
        sampled = time.perf_counter()
        working, y, std = observation[~failed], y[~failed], std[~failed]
        problem = InverseProblem(prior, forward, working, std)
        alone = trained_alone(problem, data, model.basis, folder / f"alone_positive_{number}.safetensors")
        trained = time.perf_counter()
        reference = reference_posterior(folder / f"reference_{number}.npz", problem, y, number, draws, progress)
        other = alone.condition(y).sample(SAMPLES, seed=number, progress=False)
        gaps.append(amortised_gap(samples, field(M, reference.mean), field(M, reference.std)))
        own = (error(reference.mean + reference.mean_error, reference.mean),
               error(reference.std + reference.std_error, reference.std))
        rows.append([name, *errors(samples, reference.mean, reference.std),
                     *errors(other, reference.mean, reference.std), *own])
        say(f"{name}: sampled in {sampled - begun:.1f} s; alone trained in {trained - sampled:.0f} s: "
            f"{alone.summary}; HMC accepts {reference.acceptance:.0%}")
        if "failed" in name:
            posterior.report(
                folder / "report.html", threshold=0.5, progress=progress, name="wall flux", units="mol/(m² s)",
                mesh_units="m", reading="concentration [mol/m³]", question="Five of sixteen sensors have failed: which "
                "flux enters the channel through its bottom wall, and does it exceed 0.5 mol/(m² s) anywhere?")
        drawn.append((name, working, samples, other, field(M, coefficients(truth)), reference, forward(truth)))
    say("\n| layout | mean error | std error | alone: mean | alone: std | reference: mean | reference: std |\n"
        "|---|---|---|---|---|---|---|")
    for name, *values in rows:
        say(f"| {name} | " + " | ".join(f"{value:.1%}" for value in values) + " |")
    say(tell_gaps(gaps))
    draw_layouts(drawn, folder / "positive.png")
    if M.comm.rank == 0 and model.history.step:
        plot_history(model.history).figure.savefig(folder / "training.png", dpi=150)
        plt.close("all")
    say(f"positive case finished after {time.perf_counter() - start:.0f} s; figures in {folder}")
    return rows


# ## Pictures


def draw_counts(rows, file):
    """Errors over the number of probes."""
    k, *values = np.array(rows).T
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for i, (ax, name, limit) in enumerate(zip(axes, ("mean", "standard deviation"), (5, 8))):
        ax.loglog(k, 100 * values[i], "o", color="tab:blue", label="one model for all layouts")
        ax.loglog(k, 100 * values[2 + i], "x", color="tab:green", label="a model of that layout alone")
        ax.loglog(k, 100 * values[4 + i], ".", color="grey", label="as many exact samples")
        ax.axhline(limit, color="grey", linestyle="--", linewidth=1, label=f"{limit} %, the target")
        ax.set(xlabel="number of probes, at places never seen", ylabel="error against the exact posterior [%]",
               title=f"posterior {name}", ylim=(0.1, 20))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g}")
        ax.label_outer()
        ax.legend(fontsize="small", frameon=False, ncols=2, loc="upper left")
    figure.savefig(file, dpi=150)
    plt.close("all")


def draw_layouts(drawn, file):
    """Sensors over the concentration, and the flux through the wall below them, one column for each layout."""
    if mesh.comm.size > 1:
        say("the layouts are drawn on one rank only")
        return
    x = coefficients(Function(M).interpolate(SpatialCoordinate(M.mesh())[0]))
    order = np.argsort(x)
    figure, axes = plt.subplots(2, len(drawn), figsize=(4.2 * len(drawn), 5.6), layout="constrained", sharex=True,
                                sharey="row", height_ratios=(1, 2.2))
    for column, (name, working, samples, other, truth, reference, state) in zip(axes.T, drawn):
        colours = tripcolor(state, axes=column[0], cmap="viridis", shading="gouraud", vmin=0.9, vmax=4)
        column[0].plot(*working.points.T, "o", color="tab:red", markeredgecolor="white", markersize=5)
        if "beams" in name:
            for foot, tilt in zip(*BEAMS):
                column[0].plot([foot, foot + tilt], [0, 1], color="tab:red", linewidth=2)
        column[0].set(title=name, ylabel="y [m]", aspect="equal")
        samples.plot(axes=column[1], truth=truth, reference=(reference.mean, reference.lower, reference.upper),
                     xlabel="x [m]", ylabel="wall flux q [mol/(m² s)]")
        column[1].plot(x[order], coefficients(other.mean())[order], color="tab:green", linewidth=1.2, linestyle="-.",
                       label="model of this layout alone, mean")
        column[1].legend(fontsize="x-small", frameon=False)
        for ax in column:
            ax.label_outer()
    figure.colorbar(colours, ax=axes[0], label="concentration\n[mol/m³]")
    figure.savefig(file, dpi=150)
    plt.close("all")


CASES = {"gaussian": gaussian, "positive": positive}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--case", choices=CASES, action="append")
    arguments = read_arguments(parser)
    for case in arguments.case or CASES:
        CASES[case](arguments.output, progress=True)
