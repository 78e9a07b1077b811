"""Three days of readings as a logger leaves them, simulated: readings.csv, and what is really there.

    python demos/field_readings/make_readings.py [--output FOLDER] [--seed N]

Everything that goes wrong is made here on purpose, and nothing else in the demo knows of it but the pictures.
"""

import argparse
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from fem_diffusion.checks import read_arguments

LENGTH, SPEED, MIXING, SPRING = 10.0, 60.0, 3.0, 300.0  # km, km/day, km²/day, µS/cm
GAUGES = np.array([0.6, 1.4, 2.2, 3.0, 3.8, 4.6, 5.4, 6.2, 7.0, 7.8, 8.6, 9.4])  # km
START, STEP, COUNT = datetime(2026, 3, 1), timedelta(minutes=30), 144
NOISE, TAILS = 2.0, 3.0  # scale of Student's law in µS/cm, and its degrees of freedom
DRIFTING, BROKEN = 5, 8  # gauges
SILENT = 10  # gauge that is without power for some hours


def inflow(x, t):
    """The truth, q in µS/cm/day: a salty spring, a fresh one that grows by rain, and one that comes and goes by day."""
    def zone(centre, width):
        return np.exp(-(x - centre)**2 / (2 * width**2))
    rain = 1 / (1 + np.exp(-(t - 1.4) / 0.12)) * np.exp(-np.maximum(t - 1.4, 0) / 1.5)
    return 1700 * zone(2.6, 0.7) - 2000 * rain * zone(5.8, 0.8) + 800 * (1 + np.sin(2 * np.pi * t)) / 2 * zone(8.3, 0.6)


def conductivity(t, cells=2000):
    """Of the water at the gauges, in µS/cm: finite volumes, upwind, twenty times as fine as the mesh of the demo."""
    h = LENGTH / cells
    x = (np.arange(cells) + 0.5) * h
    a, d = SPEED / h, MIXING / h**2
    matrix = np.diag(np.full(cells, a + 2 * d)) - np.diag(np.full(cells - 1, a + d), -1) - np.diag(
        np.full(cells - 1, d), 1)
    matrix[0, 0] += d
    matrix[-1, -1] -= d
    right = np.stack([inflow(x, one) for one in t], 1)
    right[0] += (a + 2 * d) * SPRING
    return np.array([np.interp(GAUGES, x, state) for state in np.linalg.solve(matrix, right).T])


def readings(seed):
    """What the gauges report, shape (COUNT, 12), NaN where nothing."""
    rng = np.random.default_rng(seed)
    t = np.arange(COUNT) * (STEP / timedelta(days=1))
    y = conductivity(t) + NOISE * rng.standard_t(TAILS, (COUNT, len(GAUGES)))
    y[:, DRIFTING - 1] += 30 * np.clip((t - 0.8) / 2.2, 0, None)  # fouling
    loose = rng.random(COUNT) < 0.7  # a contact
    y[loose, BROKEN - 1] = 310 + 25 * rng.standard_normal(loose.sum())
    y[rng.random(y.shape) < 0.015] = np.nan
    y[70:88, SILENT - 1] = np.nan
    return y


def rows(y, rng):
    """Lines of the file."""
    # Gauge 3 is of another make, which reports in other units.
    yield "time," + ",".join(f"gauge {i + 1} [{'mS/cm' if i == 2 else 'uS/cm'}]" for i in range(12)) + ",battery [V]"
    for number, values in enumerate(y):
        if 100 <= number < 106:  # the logger was off
            continue
        cells = ["" if np.isnan(x) else f"{x / 1000:.5f}" if i == 2 else f"{x:.2f}" for i, x in enumerate(values)]
        if number in (20, 21):
            cells[5] = "OVL"
        if number == 44:
            cells[1] = "9999"
        line = f"{START + number * STEP:%Y-%m-%dT%H:%M}," + ",".join(cells) + f",{12.9 - 0.004 * number:.2f}"
        yield line
        if number == 60:  # sent twice
            yield line
        if number == 61:  # and once more, otherwise
            cells[0] = f"{float(cells[0]) + 4 * rng.random() + 1:.2f}"
            yield line.split(",")[0] + "," + ",".join(cells) + ",12.66"


def write(path, seed=20260301):
    """Write the file."""
    path.write_text("\n".join(rows(readings(seed), np.random.default_rng(seed + 1))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=20260301)
    arguments = read_arguments(parser)
    write(arguments.output / "readings.csv", arguments.seed)
