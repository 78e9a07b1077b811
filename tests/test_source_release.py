"""The demo of a contaminant's release runs, leaves its pictures, and is calibrated."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from fem_diffusion import Sampler, TrainingOptions
from fem_diffusion.fields.coefficients import field

FILE = Path(__file__).parent.parent / "demos" / "source_release" / "source_release.py"


@pytest.fixture(scope="module")
def demo():
    specification = importlib.util.spec_from_file_location("source_release", FILE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _check_pictures(folder):
    for picture in ("setup", "posterior", "hospital", "calibration", "training"):
        assert (folder / f"{picture}.png").stat().st_size > 10000
    assert "Readings and predictions" in (folder / "report.html").read_text()


def test_source_release_runs(demo, tmp_path):
    options = TrainingOptions(steps=40, evaluate_every=20, width=32)
    found = demo.run(tmp_path, pairs=160, cases=2, draws=19, samples=40, modes=12, options=options,
                     sampler=Sampler(steps=4))
    assert found.quantities.ranks.shape == (2, len(demo.QUANTITIES)) and found.hospital.ranks.shape == (2, 12)
    assert all(0 <= share <= 1 for share, _ in found.field.values())
    _check_pictures(tmp_path)


def test_rows_over_the_release_are_the_readings(demo):
    problem = demo.transport()
    release = demo.clouds(5).dat.data_ro**2
    sensor = demo.point_sensors(problem.U, [demo.HOSPITAL])
    reading = sensor(problem(field(demo.V, release)))
    seen = demo.seen_from_start(problem, sensor)
    assert np.allclose(seen.rows @ release, reading, atol=1e-9 * reading.max())


def test_a_day_of_operators_is_played(tmp_path):
    pytest.importorskip("uvicorn", reason="the monitor's server is not installed: pip install 'fem_diffusion[monitor]'")
    specification = importlib.util.spec_from_file_location("town_operators", FILE.with_name("operators.py"))
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    options = TrainingOptions(steps=40, evaluate_every=20, width=16, depth=1)
    found = demo.run(tmp_path, port=0, pause=0.0, pairs=300, modes=8, options=options)
    assert set(found["share"]) == {"total emission [g/(m s)]", "concentration at the hospital [mg/m³]",
                                   "highest emission [mg/(m³ s)]"}
    assert found["trusted"] >= 60 and min(found["share"].values()) > 0.5
    # At the first reading of nonsense, or at the second one.
    assert any(title == "Do not trust the page" and 9 <= seconds / 3600 <= 9.25 for title, seconds in found["alarms"])


@pytest.mark.slow
def test_source_release_is_calibrated(demo, tmp_path):
    found = demo.run(tmp_path)
    _check_pictures(tmp_path)
    for level in demo.LEVELS:
        for share in (found.quantities.coverage[level], found.hospital.coverage[level], found.field[level][0]):
            assert abs(share - level) < 0.04
    assert (found.quantities.p_values > 0.01).all() and len(found.quantities.p_values) >= 5
