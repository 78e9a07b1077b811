"""The demos of any solver: ten added lines, tiny in the default run, full and checked in the slow one."""

import importlib.util
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from firedrake import COMM_WORLD, Ensemble

from fem_diffusion.diffusion import TrainingOptions
from fem_diffusion.simulation.simulate import simulate

matplotlib.use("Agg")
DEMOS = Path(__file__).parent.parent / "demos"
PICTURES = {"logistic_reaction": ("setup", "source", "check"), "stokes_inflow": ("setup", "inflow", "predictive"),
            "elastic_stiffness": ("setup", "stiffness", "check"),
            "heat_conduction": ("setup", "conductivity", "check"),
            "unknown_rates": ("setup", "emission", "numbers", "check"),
            "field_readings": ("readings", "sensors", "inflow", "zone")}

# Standard deviations at which few solves correct what a model of the tiny run knows.
NOISY = {"logistic_reaction": 0.1, "heat_conduction": 5.0, "elastic_stiffness": 0.5}


def _load(name):
    specification = importlib.util.spec_from_file_location(name, DEMOS / name / f"{name}.py")
    demo = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(demo)
    return demo


@pytest.mark.parametrize("name", PICTURES)
def test_ten_added_lines_embed_the_plugin(name):
    source = (DEMOS / name / f"{name}.py").read_text()
    added = [line for line in source.splitlines() if line.endswith("# added")]
    assert 1 <= len(added) <= 10
    # The solver knows nothing of the plugin: its part of the script uses no name that the added imports bring.
    imported = {word.strip() for line in added if line.startswith("from") for word in
                line.split("import")[1].split("#")[0].split(",")}
    solver = source.split("# ## The problem")[1].split("# ## What is added")[0]
    assert not [name for name in imported if f"{name}(" in solver]


@pytest.mark.filterwarnings("ignore:The chains have not quite converged")   # after ten draws
@pytest.mark.parametrize("name", PICTURES)
def test_tiny(name, tmp_path):
    sizes = {"stokes_inflow": {"truths": 1},
             "unknown_rates": {"held_out": 20, "chains": {"chains": 2, "draws": 10}},
             "field_readings": {"n": 40, "pairs": 200, "every": 12, "solves": 600},
             "heat_conduction": {"n": 3, "solves": 600, "chains": {"chains": 2, "draws": 10}}}
    given = {"n": 6, "pairs": 100, "samples": 30, "progress": False} | sizes.get(name, {"held_out": 20})
    if name == "field_readings":
        pytest.importorskip("pint")
    demo = _load(name)
    if name in NOISY:
        demo.NOISE = NOISY[name]
    demo.run(tmp_path, options=TrainingOptions(steps=50), **given)
    for picture in PICTURES[name]:
        assert (tmp_path / f"{picture}.png").stat().st_size > 10000
    assert name == "unknown_rates" or "Readings and predictions" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logistic_reaction", "elastic_stiffness"])
def test_held_out_truths_are_covered(name, tmp_path):
    calibration = _load(name).run(tmp_path, progress=False)
    assert len(calibration.ranks) == 400
    for level, share in calibration.coverage.items():
        assert abs(share - level) < 4 * calibration.coverage_error(level) + 0.01  # and 1 % for an approximate law
    assert calibration.p_value > 1e-4


def test_the_committed_readings_are_those_of_the_script(tmp_path):
    _load("field_readings")
    sys.modules["make_readings"].write(tmp_path / "readings.csv")
    assert (tmp_path / "readings.csv").read_text() == (DEMOS / "field_readings" / "readings.csv").read_text()


@pytest.mark.slow
def test_safeguards_find_what_is_wrong_with_the_readings(tmp_path):
    pytest.importorskip("pint")
    found, scores = _load("field_readings").run(tmp_path, progress=False)
    assert set(found.worst) == {"gauge 8 [uS/cm]", "gauge 5 [uS/cm]"} and "drifts" in str(found)
    assert found.noise.interval()[0] > 1.2 and 3 <= found.outliers.sum() <= 15
    (raw, raw_error), (clean, error) = scores.values()
    assert raw < 0.7 and 0.85 < clean and error < raw_error / 3


@pytest.mark.slow
def test_stokes_is_the_exact_posterior(tmp_path):
    samples = 4000
    # Fitted to 3,000 pairs with 24 readings and about 16 latents: the base adds about (k + r) / pairs to its variance.
    tolerance = 4 * (np.sqrt(1 / (2 * samples)) + 40 / 3000)
    for mean_error, std_error in _load("stokes_inflow").run(tmp_path, samples=samples, progress=False):
        assert mean_error < tolerance and std_error < tolerance


@pytest.mark.parallel(2)
def test_an_ensemble_shares_the_runs_of_a_plain_solver(tmp_path_factory):
    specification = importlib.util.spec_from_file_location("ensemble", DEMOS.parent / "benchmarks" / "ensemble.py")
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
    ensemble = Ensemble(COMM_WORLD, 1)
    folder = COMM_WORLD.bcast(str(tmp_path_factory.mktemp("pairs")))
    problem = benchmark.problem(4, ensemble.comm)
    shared = simulate(problem, 12, seed=1, block=3, path=folder, ensemble=ensemble, progress=False)
    alone = simulate(problem, 12, seed=1, block=3, progress=False)
    np.testing.assert_array_equal(shared.readings, alone.readings)
    np.testing.assert_array_equal(shared.coefficients, alone.coefficients)
