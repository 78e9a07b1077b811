"""The comparison protocol: every cell once, nothing lost in a crash, and conclusions that follow from the rows."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fem_diffusion import files
from fem_diffusion.comparison import (
    SAMPLERS, Plan, Training, combine, compare, convergence, plot_costs, plot_overview, run_protocol, summarise,
    write_markdown,
)
from fem_diffusion.comparison.protocol import _Counter
from fem_diffusion.diffusion import (
    Denoiser, Formulation, Sampler, ScoreNetwork, Support, TrainingOptions, linear_base, straight_line,
    variance_exploding, variance_preserving,
)
from fem_diffusion.errors import FileError, InputError

FAST = TrainingOptions(steps=60, batch=64, width=16, depth=1, evaluate_every=30)
VARIANCE = 0.04


class Narrow:
    """The exact N for w_0 ~ N(0, 0.04 I), where the base says N(0, I)."""

    dtype = torch.float64

    def see(self, base, layout, y, located):
        return (y,)

    def context(self, y):
        return (y,)

    def __call__(self, v, angle, y):
        c, s = torch.cos(angle), torch.sin(angle)
        return (VARIANCE - 1) * c * s * v / (VARIANCE * c**2 + s**2)


class Fit:
    """A training that gives the exact denoiser and counts how often it is called."""

    def __init__(self, **parts):
        self.calls, self.parts = 0, parts

    def __call__(self, checkpoint):
        self.calls += 1
        base = linear_base(torch.zeros(1, 2, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
        return Denoiser(base, Narrow(), **self.parts)


def few(*names):
    """Some of the samplers, by name."""
    return {name: SAMPLERS[name] for name in names}


def _score(z, combination):
    return {"error": float(abs(z.std() / VARIANCE**0.5 - 1)), "mean": float(z.mean())}


def _training(fit, score=_score, seed=0, budgets=(2, 8), samplers=SAMPLERS, formulations=None, problem="narrow"):
    cells = combine(formulations or (variance_exploding(), variance_preserving()), samplers, budgets)
    return Training(problem, "gaussian", seed, fit, torch.zeros(4, 1, dtype=torch.float64), 50, score, cells)


def _run(trainings, folder, settings={}):
    return run_protocol(trainings, folder, settings, progress=False)


@pytest.mark.parametrize("name", SAMPLERS)
def test_cost_is_within_the_budget_and_one_more_step_is_not(name, tmp_path):
    if name == "adaptive":
        rows = _run([_training(Fit(), samplers=few(name))], tmp_path)
        assert len(rows) == 1 and 20 < int(rows[0]["evaluations"]) < 500
        return
    # The counter in the network tells the cost, not the formula.
    for row in _run([_training(Fit(), samplers=few(name), budgets=(3, 9, 10))], tmp_path):
        assert int(row["budget"]) - 2 <= int(row["evaluations"]) <= int(row["budget"])


def test_the_counter_is_a_network_like_others():
    network = _Counter(Narrow())
    assert isinstance(network, ScoreNetwork)
    v, angle = torch.ones(3, 4, 2, dtype=torch.float64), torch.full((3, 4, 1), 0.5, dtype=torch.float64)
    assert (network(v, angle, v) == Narrow()(v, angle, v)).all() and network.rows == 12


def test_samples_come_by_measurement(tmp_path):
    seen = []
    _run([_training(Fit(), lambda z, c: seen.append(z.shape) or {"error": 1.0}, samplers=few("adaptive"))], tmp_path)
    assert seen == [(4, 50, 2)]


def test_a_hard_support_costs_nothing(tmp_path):
    # Three quarters of all samples lie outside, where sample_latents draws again.
    support = Support(torch.zeros(2).double(), torch.ones(2).double())
    row, free = (_run([_training(fit, samplers=few("whitened Heun ODE"), budgets=(8,))], tmp_path / name)[0]
                 for name, fit in (("bounded", Fit(support=support)), ("free", Fit())))
    assert int(row["evaluations"]) <= 8 and row["mean"] == free["mean"]


def test_the_emulator_corrects_nothing(tmp_path):
    def fit(checkpoint):
        # A density that cannot move anything.
        density = SimpleNamespace(base=SimpleNamespace(bent=False))
        return SimpleNamespace(at=lambda y: replace(Fit()(None).at(y), density=density))
    rows, free = (_run([_training(f, samplers=few("adaptive"))], tmp_path / name)
                  for name, f in (("known", fit), ("free", Fit())))
    assert rows[0]["mean"] == free[0]["mean"]


def test_every_cell_runs_once():
    cells = combine((variance_exploding(), straight_line()), SAMPLERS, (4, 16))
    assert len({c.key for c in cells}) == len(cells) == (8 * 2 + 3) * 2 + 1


def test_budgets_below_the_smallest_are_left_out():
    cells = combine((variance_exploding(),), few("Heun ODE"), (1, 2, 3, 8))
    assert [(c.budget, c.sampler.steps) for c in cells] == [(3, 1), (8, 3)]


def test_a_rate_that_varies_depends_on_the_formulation(tmp_path):
    varying = {"varying": Sampler(lambda t: 2 * t)}
    cells = combine((variance_exploding(), straight_line()), varying, (4,))
    assert [c.sampler.formulation.name for c in cells] == ["VE", "straight"]
    rows = _run([_training(Fit(), samplers=varying, budgets=(4,))], tmp_path)
    assert [row["alpha"] for row in rows] == ["varies"] * 2 and summarise(rows)[0]["seeds"] == 1
    with pytest.raises(InputError, match="samplers as 'varying'"):
        _run([_training(Fit(), samplers={"varying": Sampler(lambda t: 3 * t)}, budgets=(4,))], tmp_path)


def test_all_samplers_approach_the_truth(tmp_path):
    rows = _run([_training(Fit(), budgets=(128,))], tmp_path)
    # 200 numbers give a standard deviation to 5 %; the slowest two samplers still have a bias at 128 evaluations.
    errors = {(r["formulation"], r["sampler"]): float(r["error"]) for r in rows}
    assert max(errors.values()) < 0.25 and np.median(list(errors.values())) < 0.08
    assert errors["any", "whitened multistep"] == pytest.approx(errors["any", "adaptive"], abs=0.003)


def test_second_call_computes_nothing(tmp_path):
    fit = Fit()
    first = _run([_training(fit)], tmp_path)
    assert _run([_training(fit)], tmp_path) == first and fit.calls == 1


def test_rows_survive_a_crash_and_are_not_repeated(tmp_path):
    whole = _run([_training(Fit())], tmp_path / "whole")
    seen = []

    def failing(z, combination):
        seen.append(combination.key)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return _score(z, combination)
    with pytest.raises(KeyboardInterrupt):
        _run([_training(Fit(), failing)], tmp_path / "cut")
    rows = _run([_training(Fit(), failing)], tmp_path / "cut")
    assert len(seen) == len(whole) + 1 and seen.count(seen[3]) == 2
    assert [{**row, "seconds": ""} for row in rows] == [{**row, "seconds": ""} for row in whole]


def test_more_budgets_and_seeds_extend_a_folder(tmp_path):
    fit = Fit()
    few = _run([_training(fit)], tmp_path)
    more = _run([_training(fit, budgets=(2, 8, 16)), _training(fit, seed=1)], tmp_path)
    assert fit.calls == 3 and len(more) > len(few) and all(row in more for row in few)


@pytest.mark.parametrize("name", ["rows/narrow-gaussian-0.safetensors", "settings.safetensors"])
@pytest.mark.parametrize("spoil", [lambda content: content[:-7], lambda content: content.replace(b"1", b"2", 1),
                                   lambda content: b"[1]", lambda content: b"\xff\xfe"])
def test_damaged_and_foreign_files_are_refused(tmp_path, name, spoil):
    _run([_training(Fit())], tmp_path)
    broken = spoil((tmp_path / name).read_bytes())
    (tmp_path / name).write_bytes(broken)
    with pytest.raises(FileError, match="is damaged|no file that fem_diffusion reads"):
        _run([_training(Fit())], tmp_path)
    assert (tmp_path / name).read_bytes() == broken


def test_rows_of_something_else_are_refused(tmp_path):
    _run([_training(Fit())], tmp_path)
    files.write(tmp_path / "rows" / "narrow-gaussian-0.safetensors", "rows", {}, {"rows": [{"a": 1}]})
    with pytest.raises(FileError, match="no rows of this protocol.*Delete it"):
        _run([_training(Fit())], tmp_path)


def test_other_settings_are_refused(tmp_path):
    _run([_training(Fit(), budgets=(2,))], tmp_path, {"pairs": 1, "options": {"width": 3}})
    with pytest.raises(InputError, match="pairs"):
        _run([_training(Fit(), budgets=(2,))], tmp_path, {"pairs": 2, "options": {"width": 3}})


@pytest.mark.parametrize("change, words", [
    ({"formulations": (variance_exploding(sigma_max=50.0), variance_preserving())}, "formulations as 'VE'"),
    ({"formulations": (replace(variance_exploding(), scaling=lambda t: 1 + t),)}, "formulations as 'VE'"),
    ({"samplers": {"Euler-Maruyama": replace(SAMPLERS["Euler-Maruyama"], alpha=0.5)}}, "samplers as 'Euler-Maruyama'"),
    ({"samplers": {"Euler-Maruyama": SAMPLERS["Heun SDE"]}}, "samplers as 'Euler-Maruyama'"),
])
def test_another_formulation_or_sampler_of_a_known_name_is_refused(tmp_path, change, words):
    first = _run([_training(Fit(), samplers=few("Euler-Maruyama"))], tmp_path)
    kept = (tmp_path / "settings.safetensors").read_bytes()
    with pytest.raises(InputError, match=f"{words}.*name another folder"):
        _run([_training(Fit(), **{"samplers": few("Euler-Maruyama")} | change)], tmp_path)
    assert (tmp_path / "settings.safetensors").read_bytes() == kept
    assert _run([_training(Fit(), samplers=few("Euler-Maruyama"))], tmp_path) == first


def test_one_name_means_one_formulation_in_all_trainings(tmp_path):
    with pytest.raises(InputError, match="formulations as 'VE'"):
        _run([_training(Fit(), formulations=(variance_exploding(),)),
              _training(Fit(), formulations=(variance_exploding(0.02),), seed=1)], tmp_path)


def test_new_names_are_added(tmp_path):
    one = _run([_training(Fit(), samplers=few("Euler-Maruyama"))], tmp_path, {"pairs": 1})
    path = tmp_path / "settings.safetensors"
    mine = Formulation("mine", lambda t: 2500 * t**2, lambda t: 1 + 50 * t)
    more = _run([_training(Fit(), samplers=few("Euler-Maruyama", "Euler ODE"), formulations=(
        variance_exploding(), variance_preserving(), mine))], tmp_path, {"pairs": 1})
    assert all(row in more for row in one)
    signatures = files.read(path, "settings", "").values["signatures"]
    assert list(signatures["formulations"]) == ["VE", "VP", "mine"]
    assert list(signatures["samplers"]) == ["Euler-Maruyama", "Euler ODE"]
    # What is left out of a call stays known.
    _run([_training(Fit(), samplers=few("Euler-Maruyama"))], tmp_path, {"pairs": 1})
    assert files.read(path, "settings", "").values["signatures"] == signatures


@pytest.mark.parametrize("change, words", [
    ({"formulations": (variance_exploding(), variance_exploding(0.02))}, "formulations share"),
    ({"formulations": (variance_exploding(0.1),)}, "ends, in plain coordinates"), ({"budgets": (0, 4)}, "budget is 0"),
    ({"budgets": (4.0,)}, "budget is 4.0"), ({"budgets": 4}, "budgets is 4"),
    ({"samplers": {"heun": "heun"}}, "of Sampler"), ({"samplers": 3}, "give a dict of names and Samplers"),
    ({"samplers": {3: Sampler()}}, "names of samplers holds int"),
    ({"formulations": ("VE",)}, "of Formulation"), ({"seed": None}, "seed is None"), ({"seed": 1.0}, "seed is 1.0"),
    ({"problem": 3}, "problem is of type int"), ({"score": None}, "score is None"),
])
def test_senseless_combinations_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        _training(Fit(), **change)


@pytest.mark.parametrize("trainings, folder, settings, words", [
    ([None], "new", {}, "trainings holds NoneType"), ([], None, {}, "folder is None"),
    ([], "new", [], "settings cannot be written"),
    ([], "new", {"signatures": 1}, "settings cannot be written"),
    ([], "new", {"n": np.int64(3)}, "settings cannot be written"),
])
def test_what_the_protocol_cannot_run_is_refused(tmp_path, trainings, folder, settings, words):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=words):
        run_protocol(trainings, folder if folder is None else tmp_path / folder, settings)
    with pytest.raises(FileError, match="cannot be made"):
        run_protocol([], tmp_path / "file" / "new", {})


def test_trainings_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="Two trainings"):
        _run([_training(Fit()), _training(Fit())], tmp_path)


def _rows(errors, seeds=3):
    """Rows of a sampler with these errors, and of a converged one with error 1; seeds differ alike in both."""
    def row(sampler, budget, error, seed):
        return {"problem": "p", "base": "gaussian", "formulation": "VE", "sampler": sampler, "alpha": 0.0,
                "coordinates": "plain", "nodes": "time", "budget": str(budget), "evaluations": str(budget or 70),
                "seed": str(seed), "seconds": "1", "error": str(error + 0.2 * seed), "error_floor": "0.5"}
    return [row(*cell, seed) for seed in range(seeds)
            for cell in (("adaptive", 0, 1.0), *(("s", budget, error) for budget, error in errors.items()))]


@pytest.mark.parametrize("errors, budget", [
    ({2: 2.0, 4: 1.01, 8: 1.0}, 4), ({2: 1.0, 4: 3.0, 8: 1.0}, 8), ({2: 1.0, 4: 1.0, 8: 1.1}, None),
    ({2: math.inf, 8: 1.0}, 8), ({2: 1.0, 8: math.nan}, None), ({2: 0.5, 4: 0.6}, 2),
])
def test_convergence_is_the_budget_from_which_on_the_error_stays(errors, budget):
    assert convergence(_rows(errors), "error")["p", "gaussian", "VE", "s"].budget == budget


def test_convergence_grants_noise_of_the_samples_only():
    rows = _rows({8: 1.08})
    assert convergence(rows, "error")["p", "gaussian", "VE", "s"].budget is None
    for row in rows:
        if row["sampler"] == "s":
            row["error"] = str(float(row["error"]) + (0.3, -0.2, -0.1)[int(row["seed"])])
    assert convergence(rows, "error")["p", "gaussian", "VE", "s"].budget == 8


def _by_seed(errors, targets):
    """The convergence of a sampler with these errors at 8 evaluations, seed by seed, to these targets."""
    rows = _rows({8: 1.0}, seeds=len(errors))
    for row in rows:
        row["error"] = str((errors if row["sampler"] == "s" else targets)[int(row["seed"])])
    return convergence(rows, "error")["p", "gaussian", "VE", "s"]


@pytest.mark.parametrize("errors", [(1000, 1, 1, 1, 1), (1.4, 3.0), (1.3, 0.7, 1.3, 1.3, 0.7), (math.inf, 1, 1, 1, 1),
                                    (0.1, 0.1, 1.1, 1.1, 1.1)])
def test_convergence_forgives_no_instability(errors):
    assert _by_seed(errors, [1] * len(errors)).budget is None


def test_convergence_is_not_measured_against_a_reference_that_is_not_finite():
    found = _by_seed((1.0, 1.0, 5.0), (1.0, 1.0, math.inf))
    assert found.budget == 8 and found.error[8] == 1.0
    assert _by_seed((1.2, 1.2, 1.0), (1.0, 1.0, math.inf)).budget is None
    for target in (math.inf, math.nan):
        found = _by_seed((1.0, 1.0), (target, target))
        assert found.budget is None and math.isnan(found.error[8])


def test_convergence_asks_for_its_reference():
    with pytest.raises(InputError, match="adaptive"):
        convergence([row for row in _rows({2: 1.0}) if row["sampler"] == "s"], "error")


def test_summary_is_mean_and_spread_over_seeds():
    line = [x for x in summarise(_rows({2: 1.0})) if x["sampler"] == "s"][0]
    assert line["seeds"] == 3 and line["error"] == pytest.approx(1.2) and line["error_spread"] == pytest.approx(0.2)
    assert line["budget"] == 2 and "error_floor_spread" not in line


def test_summary_of_p_values_is_the_smallest_for_all_seeds():
    rows = [row | {"sbc_p": p, "sbc_p_1": q} for row, p, q in zip(_rows({}), ("0.9", "0.01", "0.8"), "111")]
    line, = summarise(rows)
    assert line["sbc_p"] == pytest.approx(0.03) and line["sbc_p_1"] == 1.0
    assert not any(name.startswith("sbc_p") and name.endswith("_spread") for name in line)


def test_a_crash_leaves_the_table_before(tmp_path, monkeypatch):
    path = tmp_path / "summary.md"
    write_markdown(_rows({8: 1.0}), path, "error")
    before = path.read_text()

    def fail(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_markdown(_rows({8: 2.0}), path, "error")
    assert path.read_text() == before and "1.2" in before


def test_pictures(tmp_path):
    score = (lambda z, c: _score(z, c) | {"error_floor": 0.02})
    trainings = [_training(Fit(), score, seed, problem=name) for seed in range(2) for name in ("one", "two")]
    rows = _run(trainings, tmp_path)
    plot_costs(rows, "error", tmp_path / "cost.png", formulation="VE", title="error against cost")
    plot_overview(rows, "error", tmp_path / "overview.png")
    assert all(5_000 < (tmp_path / name).stat().st_size < 300_000 for name in ("cost.png", "overview.png"))


def _pairs(n=600):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 2, generator=g, dtype=torch.float64)
    return z, z[:, :1] + 0.3 * torch.randn(n, 1, generator=g, dtype=torch.float64)


def test_compare_on_joint_samples(tmp_path):
    z, y = _pairs()
    plan = Plan((variance_preserving(),), few("Euler-Maruyama", "whitened multistep", "adaptive"), budgets=(2, 8),
                seeds=(0, 1), held_out=150, draws=19)
    settings = {"plan": plan, "options": FAST, "progress": False}
    lines = compare(z, y, tmp_path, **settings)
    assert len(lines) == 2 + 2 + 1 and all(line["seeds"] == 2 for line in lines)
    best = [x for x in lines if x["sampler"] == "whitened multistep" and x["budget"] == 8][0]
    worst = [x for x in lines if x["sampler"] == "Euler-Maruyama" and x["budget"] == 2][0]
    # The base is the truth: calibrated, and Euler-Maruyama in two evaluations is not.
    assert best["sbc_p"] > 1e-3 > worst["sbc_p"] and worst["energy_score"] > 1.2 * best["energy_score"]
    assert "sbc_p_spread" not in best and "energy_score_spread" in best
    assert abs(best["coverage_90"] - 0.9) < 4 * math.sqrt(0.09 / 300) and "sbc_p_2" in best
    assert "adaptive" in (tmp_path / "summary.md").read_text() and (tmp_path / "results.csv").exists()
    before = (tmp_path / "results.csv").read_text()
    # Arrays are the same data.
    np.testing.assert_equal(compare(z.numpy(), y.numpy(), tmp_path, **settings), lines)
    assert (tmp_path / "results.csv").read_text() == before
    with pytest.raises(InputError, match="data"):
        compare(z + 1, y, tmp_path, **settings)


def test_scores_of_compare_know_no_units(tmp_path):
    z, y = _pairs()
    unit = torch.tensor([1e-6, 1e6], dtype=torch.float64)
    settings = {"plan": Plan(samplers=few("whitened Heun SDE"), budgets=(2,), seeds=(0,), held_out=50, draws=19),
                "options": FAST, "progress": False}
    one, = compare(z, y, tmp_path / "one", **settings)
    other, = compare(z * unit, 1e8 * y, tmp_path / "other", **settings)
    assert other["energy_score"] == pytest.approx(one["energy_score"], rel=1e-4)


@pytest.mark.parametrize("change, words", [
    ({"draws": 1}, "draws"), ({"held_out": 1}, "held_out"), ({"seeds": ()}, "at least one seed"),
    ({"bases": ()}, "one base"), ({"samplers": {}}, "a sampler"),
    ({"budgets": (1,), "samplers": few("Heun ODE")}, "buys it a step"), ({"draws": 19.0}, "draws is 19.0"),
    ({"seeds": (-1,)}, "seed is -1"), ({"seeds": 3}, "seeds is 3"), ({"bases": "plain"}, "bases is 'plain'"),
    ({"bases": ("flat",)}, "base is 'flat'"),
])
def test_senseless_plans_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        Plan(**change)


@pytest.mark.parametrize("change, words", [
    ({"plan": Plan(held_out=600)}, "held_out"), ({"plan": {"draws": 3}}, r"Plan\(\*\*plan\)"),
    ({"noise": -1.0}, "negative"), ({"noise": [0.1, 0.2]}, r"\[2\] sensors, the observations have 1"),
    ({"options": {"steps": 3}}, r"TrainingOptions\(\*\*options\)"),
])
def test_compare_refuses_senseless_arguments(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        compare(*_pairs(), tmp_path, **change)


def test_compare_refuses_what_is_not_numbers(tmp_path):
    for z, words in ((np.array([["a"], ["b"]]), "real numbers"), (1j * np.ones((2, 1)), "imaginary"),
                     ([[1.0], [2.0, 3.0]], "no array of numbers"), ([[1e200], [0.0]], "beyond"), (None, "numbers")):
        with pytest.raises(InputError, match=words):
            compare(z, np.zeros((2, 1)), tmp_path)
