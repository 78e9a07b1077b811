"""Canonical problems: their conditionals are those of their joint laws; what the benchmarks' commands promise."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fem_diffusion import TrainingOptions, coefficients, files, fit, laplace
from fem_diffusion.comparison import mmd
from fem_diffusion.trust import sbc_p_values, sbc_ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import collapse  # noqa: E402  (benchmarks is a folder of scripts, not a package)
import defaults  # noqa: E402
import formulations  # noqa: E402
import solves  # noqa: E402
from problems import PROBLEMS, SCALED  # noqa: E402

M, N = 1000, 99


@pytest.fixture(scope="module", params=[*PROBLEMS, *SCALED])
def problem(request):
    return (PROBLEMS | SCALED)[request.param]


def _redrawn(problem, y, change=lambda x: x):
    return np.stack([change(problem.conditional(row, N, seed)) for seed, row in enumerate(y)])


def test_shapes_and_seeds(problem):
    z, y = problem.draw(7, seed=1)
    assert z.shape == (7, problem.r) and y.shape == (7, problem.k) and problem.observations.shape == (3, problem.k)
    assert np.array_equal(z, problem.draw(7, seed=1)[0]) and not np.array_equal(z, problem.draw(7, seed=2)[0])
    draws = problem.conditional(y[0], 5, seed=3)
    assert draws.shape == (5, problem.r) and np.array_equal(draws, problem.conditional(y[0], 5, seed=3))


def test_truths_rank_uniformly_among_conditional_draws(problem):
    z, y = problem.draw(M, seed=0)
    draws = _redrawn(problem, y)
    # Products and sums of coordinates see what the marginals do not.
    mixed, truth = draws.sum(axis=2, keepdims=True), z.sum(axis=1, keepdims=True)
    square, truth_square = (draws**2).sum(axis=2, keepdims=True), (z**2).sum(axis=1, keepdims=True)
    ranks = np.concatenate([sbc_ranks(a, b) for a, b in ((draws, z), (mixed, truth), (square, truth_square))], axis=1)
    assert sbc_p_values(ranks, N).min() > 1e-4


def test_wrong_conditionals_fail(problem):
    z, y = problem.draw(M, seed=0)
    centre = z.mean(axis=0)
    draws = _redrawn(problem, y, lambda x: x.mean(axis=0) + 1.3 * (x - x.mean(axis=0)) + 0.1 * (centre + 1))
    assert sbc_p_values(sbc_ranks(draws, z), N).min() < 1e-4


def test_joint_law_is_kept(problem):
    z, y = problem.draw(M, seed=5)
    again = np.stack([problem.conditional(row, 1, seed)[0] for seed, row in enumerate(y[:500])])
    scale = np.concatenate([z, y], axis=1).std(axis=0)
    first, second = np.concatenate([z, y], axis=1)[500:] / scale, np.concatenate([again, y[:500]], axis=1) / scale
    pooled, rng = np.concatenate([first, second]), np.random.default_rng(0)
    chance = []
    for _ in range(30):
        order = rng.permutation(len(pooled))
        chance.append(mmd(pooled[order[:500]], pooled[order[500:]]))
    assert mmd(first, second) < np.mean(chance) + 5 * np.std(chance)


def test_observations_are_typical(problem):
    _, y = problem.draw(20000, seed=1)
    low, high = np.quantile(y, [0.001, 0.999], axis=0)
    assert ((problem.observations > low) & (problem.observations < high)).all()


def _command(problem, folder, monkeypatch, capsys, **options):
    """What the command prints for one problem in a tiny size."""
    size = formulations.SIZES["quick"]
    few = {name: size.samplers[name] for name in ("Euler-Maruyama", "whitened multistep", "adaptive")}
    tiny = replace(size, pairs=800, samples=60, budgets=(2, 8), samplers=few,
                   options=replace(size.options, batch=64, width=24, depth=1, **options))
    monkeypatch.setitem(formulations.SIZES, "quick", tiny)
    monkeypatch.setattr(formulations, "c2st", lambda reference, samples: 0.5)  # slow, and tested elsewhere
    monkeypatch.setattr(sys, "argv", ["formulations.py", "--size", "quick", "--problems", problem,
                                      "--folder", str(folder / "rows"), "--results", str(folder / "results")])
    formulations.main()
    return capsys.readouterr().out


def test_command_reaches_its_verdict(tmp_path, monkeypatch, capsys):
    printed = _command("linear-gaussian", tmp_path, monkeypatch, capsys, steps=40, evaluate_every=20)
    assert "met on 1 of 1 problems, geometric mean 1.000" in printed and "Linear-Gaussian, one evaluation" in printed
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "cost_VE.png", "cost_VP.png", "overview.png", "summary.csv", "summary.md", "verdict.md"}


def test_command_judges_a_network(tmp_path, monkeypatch, capsys):
    printed = _command("banana", tmp_path, monkeypatch, capsys, steps=400, evaluate_every=100)
    rows = files.read(tmp_path / "rows" / "rows" / "banana-gaussian-0.safetensors", "rows", "").values["rows"]
    assert int(next(row for row in rows if row["sampler"] == "adaptive")["evaluations"]) > 20
    ratio = float(re.search("met on 1 of 1 problems, geometric mean ([0-9.]+) of", printed)[1])
    assert 0.9 < ratio < 1.05
    plain = float(re.search(r"Euler-Maruyama \(VE\): ([0-9.e+]+) times", printed)[1])
    assert plain > 100 and "does not get there with 8" in printed


@pytest.mark.parametrize("errors, words", [
    ({8: 1.0, 16: 3.0, 32: 1.0}, "needs 32"), ({8: 9.0, 16: 1.0, 32: 1.0}, "needs 16"),
    ({8: 1.0, 16: 1.0, 32: 1.2}, "does not get there with 32"),
])
def test_verdict_counts_from_where_on_the_error_stays(errors, words):
    cells = [("any", "adaptive", 0, 1.0)] + [("any", formulations.OURS, budget, 1.0) for budget in errors]
    cells += [(name, formulations.CLASSIC, budget, error) for name in ("VE", "VP") for budget, error in errors.items()]
    rows = [{"problem": "p", "base": "gaussian", "formulation": name, "sampler": sampler, "budget": str(budget),
             "alpha": "0.0", "coordinates": "plain", "nodes": "time", "evaluations": str(budget), "seed": "0",
             "seconds": "1", "sliced_wasserstein": str(error)}
            for name, sampler, budget, error in cells]
    assert all(words in line for line in formulations.verdict(rows)[1:3])


def test_a_changed_problem_is_noticed(monkeypatch):
    before = formulations.settings(formulations.SIZES["full"])
    changed = replace(PROBLEMS["bimodal"], observations=PROBLEMS["bimodal"].observations + 1e-6)
    monkeypatch.setitem(PROBLEMS, "bimodal", changed)
    assert formulations.settings(formulations.SIZES["full"]) != before


def _runs(losses):
    """Rows of runs with these losses, by setting and problem; the base's loss is 1."""
    return [{"problem": problem, "setting": setting, "seed": seed, "loss": loss, "base": 1.0, "time": 1.0}
            for setting, values in losses.items() for problem, pair in zip("abc", values)
            for seed, loss in enumerate(pair)]


def test_regret_is_a_share_of_what_can_be_gained_and_others_choose():
    rows = _runs({"default": [(0.5, 0.5), (0.6, 0.6), (0.9, 0.9)], "rate / 2": [(0.4, 0.6), (0.5, 0.5), (0.93, 0.93)],
                  "width 64": [(0.7, 0.7), (0.8, 0.8), (0.8, 0.8)]})
    found = defaults.regrets(rows)
    assert found["default", "a"] == found["rate / 2", "b"] == found["width 64", "c"] == 0
    assert found["default", "b"] == pytest.approx(0.2) and found["width 64", "a"] == pytest.approx(0.4)
    lines = defaults.table(rows).splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:6]]
    assert names == ["default", "rate / 2", "width 64", "best on the others"]
    # Over all problems half the rate is best; of two each, what the third one likes least.
    assert "a: width 64, b: width 64, c: rate / 2" in lines[-1]
    assert lines[5] == "| best on the others | 40.0% | 60.0% | 65.0% | 55.0% | 65.0% |  |"


def test_settings_run_in_the_same_time_and_a_second_command_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    tiny = replace(defaults.DEFAULT, steps=60, evaluate_every=20, batch=64, width=32, depth=1)
    monkeypatch.setitem(defaults.SIZES, "quick", (["banana"], tiny))
    monkeypatch.setattr(defaults, "TESTED", 400)
    ratios = iter([2.0])
    monkeypatch.setattr(defaults, "cost", lambda *_: next(ratios))
    arguments = ["defaults.py", "--quick", "--output", str(tmp_path), "--settings", "default", "half the steps"]
    monkeypatch.setattr(sys, "argv", arguments)
    defaults.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "3 members"])
    capsys.readouterr()
    defaults.main()
    printed = capsys.readouterr().out
    assert "3 members, seed 0" in printed and "default, seed 0" not in printed and "| 3 members |" in printed
    rows = {path.name: files.read(path, "run", "").values["row"] for path in (tmp_path / "quick").glob("*.safetensors")}
    assert {name: row["steps"] for name, row in rows.items()} == {
        "banana-default-0.safetensors": 60, "banana-half_the_steps-0.safetensors": 30,
        "banana-3_members-0.safetensors": 30}
    assert rows["banana-3_members-0.safetensors"]["time"] == 1.0


def test_solves_makes_its_table_once_and_corrects_what_it_has_trained(tmp_path, monkeypatch, capsys):
    """Tiny, with Laplace as reference: that corrections help is measured elsewhere."""
    for name, value in {"LEVEL": 40, "SAMPLES": 200, "SOLVES": 1000, "SLOPES": 40}.items():
        monkeypatch.setattr(solves, name, value)
    monkeypatch.setattr(solves.demo, "hmc_reference", lambda problem, y, seed, progress: {
        name: coefficients(f) for name, f in zip(("mean", "std"), _moments(problem, y))})
    monkeypatch.setattr(solves, "cost", lambda problem: 4.0)
    few = TrainingOptions(steps=400, evaluate_every=100, width=32, depth=2)
    monkeypatch.setattr(solves, "fit", lambda problem, data, progress: fit(problem, data, options=few, progress=False))
    monkeypatch.setattr(sys, "argv", ["solves.py", "--sizes", "40", "--truths", "1", "--output", str(tmp_path),
                                      "--ways", "gaussian", "derivatives", "corrected"])
    solves.main()
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([0-9.]+)% / ([0-9.]+)%", capsys.readouterr().out, re.MULTILINE)
    assert [row[:2] for row in rows] == [("laplace", "0"), *((way, "40") for way in (
        "gaussian", "derivatives", "corrected"))]
    mean = {row[0]: float(row[2]) for row in rows}
    assert 2 * max(mean["derivatives"], mean["corrected"]) < mean["gaussian"]
    monkeypatch.setattr(solves, "train", None)   # nothing is trained twice
    solves.main()
    assert len({path.name for path in tmp_path.glob("model_*")}) == 4


def _moments(problem, y):
    found = laplace(problem, y)
    return found.mean(), found.std()


@pytest.mark.slow
def test_long_training_does_not_shrink_the_posterior_where_the_naive_loop_collapses():
    rows = {(row["loop"], row["steps"]): row for row in collapse.run(progress=False)}
    short, long = sorted({steps for _, steps in rows})
    assert long == 10 * short
    for loop in {loop for loop, _ in rows}:
        change = rows[loop, long]["training"] / rows[loop, short]["training"] - 1
        if loop == "naive":
            assert change < -0.3 and rows[loop, long]["spread_ratio"] < 0.75
        else:
            assert change > -0.05 and rows[loop, long]["spread_ratio"] > 0.9
            # The base alone, without a network, is off by more.
            assert abs(rows[loop, long]["training"] - 1) < 0.1
