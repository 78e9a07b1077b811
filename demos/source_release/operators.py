"""A live page for the operators of a town: steady emissions in its streets, eight sensors, one day at speed.

Something leaks in the streets of the town, everywhere a little and sometimes somewhere a lot; wind and turbulence carry
it, and eight sensors read the concentration every quarter of an hour. What is emitted where, how much is it, and what
does the hospital breathe, where there is no sensor?

    v·∇u - ∇·(κ∇u) = m,    u = 0 at the inflow,    κ ∂u/∂n = 0 elsewhere,    m = exp(field).

    python demos/source_release/operators.py [--output FOLDER] [--port 8050] [--pause SECONDS]

A model is trained once and exported. Then the monitor starts, and the day is played: a sensor that reads nonsense in
the morning, one that is silent at noon, a leak in the afternoon. The page needs neither Firedrake nor the mesh; its
address is printed, and the monitor stays until it is interrupted. The town itself is in town.py.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
import urllib.request
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from firedrake import dx, exp
from scipy.sparse import csr_matrix

from fem_diffusion import (
    AdvectionDiffusion, Boundary, GaussianNoise, GaussianPrior, InverseProblem, Largest, Observation, Physics,
    TrainingOptions, TransformedPrior, fit, functionals, karhunen_loeve, point_sensors, simulate,
)
from fem_diffusion.checks import read_arguments

sys.path.insert(0, str(Path(__file__).parent))
from town import HOSPITAL, INFLOW, OUTFLOW, SENSORS, TURBULENCE, V, nodes, wind  # noqa: E402

# ## The problem

NOISE = 0.2             # mg/m³
TYPICAL = 0.02          # mg/(m³ s), the median emission
NAMES = tuple(f"{place} [mg/m³]" for place in ("north gate", "mill", "school", "market", "station", "church", "bridge",
                                               "harbour"))
READINGS = 96           # of a day


def site():
    """Emissions are positive, with a correlation length of 40 m; sensors read the steady concentration."""
    prior = TransformedPrior(GaussianPrior(V, std=1.0, correlation_length=40.0), lambda f: TYPICAL * exp(f))
    forward = AdvectionDiffusion(V, V, "source", Physics(velocity=wind(), diffusivity=TURBULENCE),
                                 Boundary(dirichlet={INFLOW: 0.0}, outflow=(OUTFLOW,)))
    return InverseProblem(prior, forward, point_sensors(V, SENSORS, names=NAMES), GaussianNoise(std=NOISE))


def quantities(problem):
    """What operators ask; the concentration at the hospital is linear in the emission, by one adjoint solve."""
    hospital = point_sensors(V, [HOSPITAL])
    row = csr_matrix(problem.forward.sensitivity(problem.prior.sample(0), hospital.rows))
    return {"total emission [g/(m s)]": functionals(V, [lambda m: 1e-3 * m * dx]),
            "concentration at the hospital [mg/m³]": Observation(V, row, hospital.names, hospital.points),
            "highest emission [mg/(m³ s)]": Largest()}


# Laid down by the town; thresholds are in the units above.
RULES = """
[page]
title = "Emissions in the town"
silent_after = 600

[[rule]]
quantity = "concentration at the hospital"
above = 10
unit = "mg/m³"
probability = 0.1
readings = 2
message = "Close the windows of the hospital, and call the fire brigade."

[[rule]]
quantity = "total emission"
above = 2
unit = "g/(m s)"
probability = 0.5
readings = 4
level = "notice"
message = "Send somebody to look for the leak."
"""

# ## The day


def day(problem, seed=38):
    """True emissions (96, nodes) of a day and what the sensors read (96, 8), NaN where one is silent."""
    field = problem.prior.core.sample_many(2, seed)
    hours = 24 * np.arange(READINGS) / READINGS
    turn = 2 * np.pi * hours[:, None] / 24
    logs = np.cos(turn) * field[0] + np.sin(turn) * field[1]
    # From two to five in the afternoon it leaks upwind of the hospital.
    strength = np.interp(hours, [13.5, 14.5, 16.5, 17.5], [0, 1, 1, 0])
    away = ((nodes - np.array([205.0, 72.0]))**2).sum(axis=1)
    logs = logs + 2.8 * strength[:, None] * np.exp(-away / (2 * 30.0**2))
    emissions = TYPICAL * np.exp(logs)
    readings = problem.measurements(emissions, seed=seed)
    readings[(hours >= 9) & (hours < 9.75), NAMES.index("station [mg/m³]")] += 60.0
    readings[(hours >= 11) & (hours < 13), NAMES.index("mill [mg/m³]")] = np.nan
    return emissions, readings


def play(path, times, readings, pause):
    """Write the readings of a day to a file that grows, one row after the other."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["time", *NAMES])
        for when, row in zip(times, readings):
            rows.writerow([when.isoformat(), *("" if np.isnan(x) else f"{x:.6g}" for x in row)])
            file.flush()
            time.sleep(pause)


# ## The job


# Eight readings tell little of fine detail: few modes hold what they tell, and what is past them comes from the prior.
OPTIONS = TrainingOptions(steps=300, evaluate_every=100, width=48, depth=2)


def prepare(folder, pairs=1500, modes=24, options=OPTIONS, progress=False):
    """Train a model, or take what is there, and export it with the rules; the problem."""
    problem = site()
    if not (folder / "monitor" / "monitor.safetensors").exists():
        data = simulate(problem, pairs, seed=1, path=folder / "operators_pairs", progress=progress)
        model = fit(problem, data, basis=karhunen_loeve(problem.prior, modes), options=options, progress=progress)
        print(model, flush=True)
        model.export_monitor(folder / "monitor", quantities(problem), name="emission [mg/(m³ s)]", mesh_units="m")
    (folder / "monitor" / "rules.toml").write_text(RULES)
    return problem


def get(address):
    """JSON from the monitor."""
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.load(answer)


def run(folder, port=8050, pause=1.0, stay=False, **given):
    """From the prior to the page, and how often its bands held the truth.

    Parameters
    ----------
    folder, port : path, int
        Of all that is computed; of the page, 0 for any.
    pause : float
        Seconds between readings.
    stay : bool
        Whether the monitor stays after the day, until it is interrupted.
    given
        As for `prepare`.

    Returns
    -------
    dict
        The alarms of the day, and by quantity the share of readings whose band of 90 % held the truth.
    """
    problem = prepare(folder, **given)
    emissions, readings = day(problem)
    site_folder = folder / "monitor"
    for old in (*site_folder.glob("history.sqlite*"), site_folder / "readings.csv"):
        old.unlink(missing_ok=True)
    midnight = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)
    times = [midnight + timedelta(days=i / READINGS) for i in range(READINGS)]
    command = [sys.executable, "-m", "fem_diffusion", "monitor", str(site_folder), "--rules",
               str(site_folder / "rules.toml"), "--readings", str(site_folder / "readings.csv"), "--port", str(port)]
    found = {}
    monitor = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = monitor.stdout.readline()
        if "http" not in line:
            raise SystemExit(monitor.wait())
        address = line.split()[-1]
        print(f"The page is at {address}", flush=True)
        play(site_folder / "readings.csv", times, readings, pause)
        while True:
            state = get(f"{address}api/state")
            if state["reading"] and not state["waiting"] and state["reading"]["time"] >= times[-1].timestamp():
                break
            time.sleep(0.2)
        found = compared(problem, emissions, get(f"{address}api/series"), times)
        found["alarms"] = [(alarm["title"], alarm["raised"] - times[0].timestamp()) for alarm in state["alarms"]]
        tell(found)
        if stay:
            print(f"The day is over. The page stays at {address}; Ctrl-C ends it.", flush=True)
            monitor.wait()
    except KeyboardInterrupt:
        pass
    finally:
        monitor.terminate()
        monitor.wait()
        monitor.stdout.close()
    return found


def compared(problem, emissions, series, times):
    """Share of the trusted readings whose bands of 90 % held the truth, by quantity."""
    asked, share = quantities(problem), {}
    start = times[0].timestamp()
    places = np.rint((np.array(series["times"]) - start) / (86400 / READINGS)).astype(int)
    for (name, what), line in zip(asked.items(), series["lines"]):
        truth = emissions.max(axis=1) if isinstance(what, Largest) else what.apply(emissions)[:, 0]
        inside = [row[0] <= truth[i] <= row[4] for i, row in zip(places, line) if row is not None]
        share[name] = float(np.mean(inside))
    return {"share": share, "trusted": sum(row is not None for row in series["lines"][0])}


def tell(found):
    """What the day was like."""
    print(f"\n{found['trusted']} of {READINGS} readings were trusted; the band of 90 % held the truth in")
    for name, share in found["share"].items():
        print(f"  {share:6.1%}  {name}")
    print("alarms:")
    for title, seconds in found["alarms"]:
        print(f"  {int(seconds // 3600):02d}:{int(seconds % 3600 // 60):02d}  {title}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    parser.add_argument("--port", type=int, default=8050)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between readings")
    parser.add_argument("--once", action="store_true", help="end after the day")
    arguments = read_arguments(parser)
    run(arguments.output, arguments.port, arguments.pause, not arguments.once, progress=True)
