"""Tutorials run from top to bottom, and say what is right."""

import numpy as np
import pytest
from blocks import TUTORIALS, run_page
from matplotlib import pyplot as plt


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a tutorial by name in an empty folder."""
    monkeypatch.chdir(tmp_path)
    yield lambda name: run_page(TUTORIALS / f"{name}.md")
    plt.close("all")


def test_first_posterior(run):
    names = run("first_posterior")
    assert names["verdict"].light == "green"
    # Linear and Gaussian: of 1,000 samples the mean is off by 3 %, the deviation by 2 %.
    gap = names["gap"]
    assert gap.mean < 0.15 and abs(gap.std - 1) < 0.1
    np.testing.assert_allclose(names["again"].sample(50, seed=1, progress=False).values,
                               names["posterior"].sample(50, seed=1, progress=False).values, rtol=1e-6, atol=1e-6)


def test_own_solver(run):
    names = run("own_solver")
    np.testing.assert_allclose(names["same"].readings, names["pairs"].readings, rtol=1e-5, atol=1e-6)


def test_trusted(run):
    names = run("trusted")
    assert names["good"].light != "red" and names["bad"].light == "red" and names["repaired"].light != "red"
    assert any("probe 3" in str(warning.message) for warning in names["told"])


def test_from_csv(run):
    pytest.importorskip("pint")
    names = run("from_csv")
    values = names["measurements"].values
    assert values.shape == (4, 5) and np.isnan(values[1, 1]) and np.isnan(values[2, 3]) and np.isnan(values).sum() == 2
    np.testing.assert_allclose(values[0, 4], names["rows"][0, 4], atol=1e-5)     # mK to K
    # Of 18 readings the level is known to a factor of about 1.5.
    assert 0.002 < float(names["level"].mean()) < 0.009


def test_any_sensors(run):
    names = run("any_sensors")
    assert names["gap"].mean < 0.15 and abs(names["gap"].std - 1) < 0.1
    assert names["norm"](names["fewer"].std()) > 1.05 * names["norm"](names["samples"].std())


def test_several_unknowns(run):
    names = run("several_unknowns")
    assert 1 <= names["numbers"].min() and names["numbers"].max() <= 3
    # Narrower than the prior, whose deviation is 2 / sqrt(12), and within four deviations of the truth.
    truth = float(names["truth"].subfunctions[1].dat.data_ro[0])
    assert names["numbers"].std() < 0.5 and abs(names["numbers"].mean() - truth) < 4 * names["numbers"].std()


def test_paper(run):
    names = run("paper")
    for key, z in names["found"].items():
        # 4,000 draws: four errors of the mean and of the deviation; the SDE's steps add up to as much.
        std = names["covariance"].diagonal().sqrt()
        assert ((z.mean(0) - names["mean"]).abs() < 0.1 * std).all(), key
        assert ((z.std(0) / std - 1).abs() < 0.08).all(), key


def test_cluster(run):
    names = run("cluster")
    np.testing.assert_array_equal(names["more"].readings[:400], names["pairs"].readings)
    assert np.isfinite(names["fields"]).all() and names["fields"].shape == (500, 41)
    problem, y = names["problem"], names["y"]
    left = problem.readings(names["fields"][:100]) - y
    assert ((left / 0.004)**2).mean() < 3        # about one for the posterior, thousands for the prior
