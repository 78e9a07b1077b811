"""A model of readings over many decades: on a scale of its own, from the problem's noise to corrections and files."""

import warnings

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, UnitIntervalMesh
from scipy import stats

from fem_diffusion import (
    CallablePrior, GaussianNoise, InputError, InverseProblem, ScalarPrior, TrainingOptions, fit, load_model,
    refine, simulate,
)
from fem_diffusion.diffusion import MeasurementWarning

FACTORS = np.array([1.0, 3.0, 0.2])
NORMAL, UNIFORM = stats.norm(-6, 1.5), stats.uniform(-9, 6)


def _space():
    return FunctionSpace(UnitIntervalMesh(1), "R", 0)


def _model(prior, factors, pairs):
    """A problem of log10 of a concentration, its pairs, and a model by the default call, without a warning."""
    problem = InverseProblem(prior, lambda m: m, lambda m: 10.0**m.dat.data_ro[0] * factors,
                             GaussianNoise(relative=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = simulate(problem, pairs, seed=1, progress=False)
        return problem, data, fit(problem, data, progress=False)


@pytest.fixture(scope="module")
def normal():
    return _model(ScalarPrior(_space(), NORMAL), FACTORS, 1000)


@pytest.fixture(scope="module")
def trained(normal):
    """log10 of a concentration is normal, three sensors read it over six decades, with a tenth of noise."""
    return normal[0], normal[2]


def _uniform(known):
    if known:
        return ScalarPrior(_space(), UNIFORM)
    V = _space()
    return CallablePrior(V, lambda seed: Function(V).assign(float(UNIFORM.rvs(random_state=seed))))


@pytest.mark.parametrize("known", [True, False], ids=["ScalarPrior", "CallablePrior"])
def test_one_reading_under_a_uniform_prior_is_exact_up_to_the_bounds(known):
    """The bounds of a prior of which nothing is known are found in the pairs."""
    problem, _, model = _model(_uniform(known), np.ones(1), 1000 if known else 4000)
    assert model.denoiser.known and (model.denoiser.latents is None) == known
    for i, place in enumerate([-8.9, -8.0, -6.0, -3.3, -3.1]):
        y = np.array([10**place * (1 + 0.1 * np.random.default_rng(i).standard_normal())])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            samples = model.condition(y).sample(4000, seed=i, progress=False)
        # Of 4,000 nearly independent samples a standard deviation is known to 1.1 %.
        _close(samples, _exact(y, np.ones(1), UNIFORM))


def test_a_model_of_estimated_bounds_is_kept_by_a_file(tmp_path):
    problem, _, model = _model(_uniform(False), np.ones(1), 1500)
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model", problem)
    one, other = (x.condition([1.2e-9]).sample(200, seed=3, progress=False).values for x in (model, again))
    np.testing.assert_allclose(one, other, rtol=1e-9)
    assert one.min() > -9.02 and one.max() < -8.6


def _exact(y, factors, law=NORMAL):
    """Mean and standard deviation of log10 c, by quadrature."""
    x = np.linspace(*((-9, -3) if law is UNIFORM else (-13, 1)), 400_001)
    c = 10**x[:, None] * factors
    log = -((y - c)**2 / (2 * (0.1 * c)**2) + np.log(c)).sum(axis=1) + law.logpdf(x)
    p = np.exp(log - log.max())
    p /= p.sum()
    mean = (p * x).sum()
    return mean, np.sqrt((p * (x - mean)**2).sum())


def _close(samples, exact):
    x = samples.values[:, 0]
    assert abs(x.mean() - exact[0]) < 0.1 * exact[1] and abs(x.std() / exact[1] - 1) < 0.05


@pytest.mark.parametrize("place", [-8.5, -6, -3.5])
def test_six_decades_are_exact_everywhere(trained, place):
    problem, model = trained
    assert model.denoiser.readings is not None and model.denoiser.known and "readings on another scale" in model.summary
    y = 10**place * FACTORS * np.array([1.05, 0.9, 1.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = model.condition(y)
        _close(posterior.sample(4000, seed=1, progress=False), _exact(y, FACTORS))


def test_a_failed_sensor_and_repeats_are_those_of_the_same_scale(trained):
    problem, model = trained
    y = 1e-5 * FACTORS * np.array([1.05, 0.9, 1.1])
    _close(model.condition([y[0], np.nan, y[2]]).sample(4000, seed=1, progress=False),
           _exact(y[[0, 2]], FACTORS[[0, 2]]))
    twice = np.stack([y, 1.1 * y])
    _close(model.condition(twice).sample(4000, seed=1, progress=False), _exact(twice.ravel(), np.tile(FACTORS, 2)))


def test_a_file_keeps_the_scale(trained, tmp_path):
    problem, model = trained
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model", problem)
    y = 1e-7 * FACTORS
    one, other = (x.condition(y).sample(50, seed=3, progress=False).values for x in (model, again))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_a_reading_that_is_wrong_by_a_factor_is_told(trained):
    problem, model = trained
    with pytest.warns(MeasurementWarning, match=" to .* is expected beside the others"):
        model.condition(1e-8 * FACTORS * np.array([1, 8, 1]))


def test_check_and_correction_know_the_scale(trained):
    problem, model = trained
    y = 1e-7 * FACTORS * np.array([1.05, 0.9, 1.1])
    posterior = model.condition(y)
    assert posterior.check(40).verdict == "trustworthy"
    corrected = posterior.correct(400, seed=1, progress=False)
    _close_enough(corrected, _exact(y, FACTORS))
    assert posterior.cross_validate(draws=200, seed=1).verdict == "consistent"


@pytest.mark.parametrize("place", [-8, -4])
def test_a_refined_model_keeps_scale_and_noise(normal, place):
    problem, data, model = normal
    y = 10**place * FACTORS * np.array([1.05, 0.9, 1.1])
    refined, _ = refine(model, data, y, 40, seed=2, rounds=1, progress=False)
    assert refined.denoiser.known and refined.denoiser.readings is not None
    _close(refined.condition(y).sample(4000, seed=1, progress=False), _exact(y, FACTORS))


def test_a_refined_model_of_relative_noise_is_exact_without_a_scale():
    problem, data, model = _model(ScalarPrior(_space(), stats.norm(0, 0.2)), FACTORS, 1000)
    assert model.denoiser.base.law is not None
    y = 10**0.3 * FACTORS * np.array([1.05, 0.9, 1.1])
    refined, _ = refine(model, data, y, 40, seed=2, rounds=1, options=TrainingOptions(steps=1000), progress=False)
    _close(refined.condition(y).sample(4000, seed=1, progress=False), _exact(y, FACTORS, stats.norm(0, 0.2)))


def _close_enough(samples, exact):
    x = samples.values[:, 0]
    assert abs(x.mean() - exact[0]) < 0.2 * exact[1] and abs(x.std() / exact[1] - 1) < 0.12


def test_no_scale_is_chosen_where_none_is_wanted(trained, monkeypatch):
    problem, data = trained[0], simulate(trained[0], 300, seed=2, progress=False)
    for room in ("model", "diffusion.training"):   # modes, and what is trained in them
        monkeypatch.setattr(f"fem_diffusion.{room}.fit.choose_scales", lambda *_: pytest.fail("a scale is chosen"))
    few = TrainingOptions(steps=10, evaluate_every=10, width=8, depth=1)
    assert fit(problem, data, scales="identity", options=few, progress=False).denoiser.readings is None
    with pytest.raises(InputError, match="scales"):
        fit(problem, data, scales="mine", options=few, progress=False)
