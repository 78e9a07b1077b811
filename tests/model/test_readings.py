"""Measurements as people have them: repeats, failed sensors, several instruments, against exact posteriors."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from firedrake import FunctionSpace, UnitIntervalMesh, dx

from fem_diffusion import (
    AdvectionDiffusion, Boundary, CallableNoise, GaussianNoise, GaussianPrior, InverseProblem, Physics, StudentNoise,
    TimeSteps, TrainingOptions, TransientAdvectionDiffusion, exact, fit, functionals, hmc,
    join_noise, karhunen_loeve, point_sensors, refine, simulate,
)
from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import MeasurementWarning
from fem_diffusion.diffusion.network import build
from fem_diffusion.errors import InputError
from fem_diffusion.reference.dense import linear_gaussian_posterior
from fem_diffusion.fields.coefficients import coefficients

OPTIONS = TrainingOptions(steps=60, evaluate_every=30, width=16, depth=1)
Y = np.array([0.245, 0.38, 0.235, 0.345, 0.252])
CORRELATED = 0.02**2 * (0.6 + 0.4 * np.eye(5))
NOISES = {"independent": GaussianNoise(std=[0.02, 0.05, 0.02, 0.1, 0.02]),
          "correlated": GaussianNoise(covariance=CORRELATED)}


def _problem(noise, n=24):
    """A source in one dimension, seen by probes and an average."""
    V = FunctionSpace(UnitIntervalMesh(n), "CG", 1)
    prior = GaussianPrior(V, std=1.0, correlation_length=0.3, mean=3.0)
    forward = AdvectionDiffusion(V, V, "source", Physics(diffusivity=1.0), Boundary(dirichlet={1: 0.0, 2: 0.0}))
    sensors = point_sensors(V, [[0.2], [0.5], [0.8], [0.35]]) + functionals(V, [lambda u: u * dx])
    return InverseProblem(prior, forward, sensors, noise)


def _model(problem, pairs=300):
    """All modes take part, so that pairs determine a linear problem."""
    data = simulate(problem, pairs, seed=1, progress=False)
    basis = karhunen_loeve(problem.prior, problem.V.dim())
    return fit(problem, data, basis=basis, options=OPTIONS, progress=False)


def _is_exact(posterior, truth, n=2000, count=6):
    """p-value of samples being those of an exact posterior, in its leading directions."""
    z = posterior.sample(n, seed=4, progress=False).values
    draws = truth.sample(20000, seed=5).values
    covariance = np.cov(draws.T)
    values, axes = np.linalg.eigh(covariance)
    axes = axes[:, values > 1e-8][:, -count:]
    mean = coefficients(truth.mean())
    return min(moment_p_values((z - mean) @ axes, np.zeros(axes.shape[1]), axes.T @ covariance @ axes))


def _stacked(problem, rows):
    """The problem in which every reading is one of its own, and its readings: what is to be the same."""
    rows = np.atleast_2d(rows)
    there = [np.flatnonzero(~np.isnan(row)) for row in rows]
    seen = sum(problem.observation[part] for part in there if len(part))
    noise = join_noise(*((len(part), problem.noise.select(torch.tensor(part))) for part in there if len(part)))
    return InverseProblem(problem.prior, problem.forward, seen, noise), rows[~np.isnan(rows)]


@pytest.fixture(scope="module", params=list(NOISES))
def model(request):
    return _model(_problem(NOISES[request.param]))


NAN = np.nan
MEASURED = {
    "two have failed": np.array([0.25, NAN, 0.23, NAN, 0.255]),
    "three of each": Y + 0.02 * np.random.default_rng(0).standard_normal((3, 5)),
    "of different numbers": np.array([[0.25, 0.38, 0.23, NAN, 0.25], [0.26, NAN, NAN, NAN, 0.26],
                                      [0.24, 0.4, NAN, NAN, 0.25], 5 * [NAN]]),
}


@pytest.mark.filterwarnings("ignore:This measurement is unlike")
@pytest.mark.parametrize("measured", list(MEASURED))
def test_repeats_and_failed_sensors_have_the_exact_posterior(model, measured):
    y = MEASURED[measured]
    posterior = model.condition(y)
    truth = exact(*_stacked(model.problem, y))
    assert _is_exact(posterior, truth) > 1e-4
    # The problem that goes with it is the same one to references.
    again = exact(posterior.problem, posterior.y)
    np.testing.assert_allclose(coefficients(again.mean()), coefficients(truth.mean()), rtol=1e-6)
    np.testing.assert_allclose(coefficients(again.std()), coefficients(truth.std()), rtol=1e-5, atol=1e-9)
    # One reading of what is left is another posterior.
    wrong = np.nan_to_num(y, nan=0.3)[0] if y.ndim == 2 else np.nan_to_num(y, nan=0.3)
    assert _is_exact(model.condition(wrong), truth) < 1e-6


def test_one_reading_in_a_list_is_one_reading(model):
    ones = model.condition([Y.tolist()]).sample(20, seed=1, progress=False)
    np.testing.assert_allclose(ones.values, model.condition(Y).sample(20, seed=1, progress=False).values, rtol=1e-6)


def test_a_network_for_all_sensors_is_left_out_and_that_is_told(model):
    base = model.denoiser.base
    network = build("latents", base.r, base.k, 8, 1)
    with_network = replace(model, denoiser=replace(model.denoiser, network=network))
    y = MEASURED["two have failed"]
    with pytest.warns(MeasurementWarning, match="network was trained for one reading of every sensor"):
        found = with_network.condition(y).sample(30, seed=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(found.values, model.condition(y).sample(30, seed=2, progress=False).values)
        with_network.condition(Y)


def test_relative_noise_counts_each_reading_by_itself():
    problem = _problem(GaussianNoise(std=0.01, relative=0.1))
    model, y = _model(problem), MEASURED["three of each"]
    posterior = model.condition(y)
    assert posterior.problem.k == 15 and len(posterior.y) == 15
    # Like independent noise at the level of its readings, to the difference that their spread makes.
    std = np.sqrt(0.01**2 + (0.1 * 0.28)**2)
    mean = posterior.sample(2000, seed=1, progress=False).mean().dat.data_ro
    plain = _model(_problem(GaussianNoise(std=std))).condition(y).sample(2000, seed=1, progress=False)
    assert np.abs(mean - plain.mean().dat.data_ro).max() < plain.std().dat.data_ro.max()


@pytest.mark.parametrize("noise, y, message", [
    (GaussianNoise(std=0.1), 5 * [NAN], "All sensors failed"), (None, [Y, Y], "noise of their own"),
    (GaussianNoise(std=0.1), [Y, Y[:4]], "each of the 5"),
    (GaussianNoise(std=0.1), np.array([Y]).T, r"shape \(5, 1\): give \(5,\) for one"),
    (GaussianNoise(std=0.1), [Y, [1, 2, 3, np.inf, 2]], "inf"),
    (CallableNoise(lambda y, g: y + 0.1 * torch.randn(y.shape, generator=g, dtype=y.dtype)),
     MEASURED["two have failed"], "all sensors together"),
])
def test_measurements_that_say_nothing_are_refused(noise, y, message):
    model = _model(_problem(noise), 100)
    with pytest.raises(InputError, match=message):
        model.condition(y)


@pytest.mark.filterwarnings("ignore:The residuals of the most")
def test_instruments_of_other_units_tracks_and_series_of_other_lengths_have_the_exact_posterior():
    """A probe read at five times, one read at two, a sensor that moves, and a mass in other units."""
    V = FunctionSpace(UnitIntervalMesh(24), "CG", 1)
    steps = TimeSteps([0.04, 0.08, 0.12, 0.16, 0.2], 0.02)
    forward = TransientAdvectionDiffusion(V, V, "initial", steps, Physics(velocity=None, diffusivity=0.3),
                                          Boundary(dirichlet={1: 0.0, 2: 0.0}))
    U = forward.U
    prior = GaussianPrior(V, std=1.0, correlation_length=0.3, mean=1.0)
    series, short = point_sensors(U, [[0.3]]), point_sensors(U, [[0.7]])[:2]
    # Every point of a track reads at all times, of which one is its own.
    track = point_sensors(U, [[0.2], [0.35], [0.5], [0.65], [0.8]])[::6]
    mass = functionals(U, [lambda u: 1e6 * u[4] * dx])
    noise = join_noise((series, 0.02), (short, 0.05), (track, 0.03), (mass, 1e4))
    problem = InverseProblem(prior, forward, series + short + track + mass, noise)
    y = problem.measurements(prior.sample_many(1, 7), seed=8)[0]
    model = _model(problem)
    assert _is_exact(model.condition(y), exact(problem, y)) > 1e-4
    # A track read as if it stood still says something else.
    still = series + short + point_sensors(U, [[0.2]]) + mass
    assert _is_exact(model.condition(y), exact(InverseProblem(prior, forward, still, noise), y)) < 1e-6
    # The series ends early: the rest of it has failed.
    y[3:5] = np.nan
    assert _is_exact(model.condition(y), exact(*_stacked(problem, y))) > 1e-4


def _gibbs(problem, y, n=6000, seed=3):
    """Samples of a linear problem with Student noise, which is Gaussian with random variances: exact, one by one."""
    rng, noise, prior = np.random.default_rng(seed), problem.noise, problem.prior
    mean, C = coefficients(prior.mean), prior.covariance_matrix()
    rows = problem.sensitivity(prior.mean)
    d, m, draws = y - problem.readings(mean[None])[0], np.zeros(len(mean)), []
    for _ in range(n):
        rate = (noise.df + ((d - rows @ m) / noise.std.numpy())**2) / 2
        weights = rng.gamma((noise.df + 1) / 2, 1 / rate)
        shift, covariance = linear_gaussian_posterior(rows, C, np.diag(noise.std.numpy()**2 / weights), d)
        m = rng.multivariate_normal(shift, covariance, method="cholesky")
        draws.append(mean + m)
    return np.array(draws[100:])


def test_corrections_and_references_know_outliers():
    problem = _problem(StudentNoise([0.01, 0.01, 0.01, 0.01, 0.02], df=3))
    y = np.array([0.245, 0.38, 0.235, 0.5, 0.252])     # the fourth is off by 15 standard deviations
    truth = _gibbs(problem, y)
    mean, std = truth.mean(axis=0), truth.std(axis=0)
    inner = std > 0.1 * std.max()

    def away(values):
        """Largest error of a mean in posterior standard deviations, and of a standard deviation as a factor."""
        ratio = (values.std(axis=0) / std)[inner]
        return np.abs((values.mean(axis=0) - mean) / std)[inner].max(), np.abs(np.log(ratio)).max()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)
        few = karhunen_loeve(problem.prior, 10)
        chains = hmc(problem, y, basis=few, seed=1, progress=False)
        posterior = fit(problem, simulate(problem, 300, seed=1, progress=False), basis=few, options=OPTIONS,
                        progress=False).condition(y)
        corrected = posterior.correct(500, seed=2, progress=False)
        gaussian = exact(_problem(GaussianNoise(covariance=problem.noise.covariance(torch.zeros(1, 5)))), y)
    # Some 400 effective draws each: four standard errors.
    for samples in (chains.draws, corrected):
        assert away(samples.values)[0] < 0.2 and away(samples.values)[1] < 0.2
    assert away(gaussian.sample(2000, seed=0).values)[0] > 1


@pytest.mark.parametrize("noise, y", [
    (NOISES["correlated"], MEASURED["two have failed"]), (StudentNoise(0.02, 8.0), MEASURED["of different numbers"])])
@pytest.mark.parametrize("derivatives", [False, True])
def test_refine_goes_on_with_the_sensors_that_have_read(noise, y, derivatives):
    """The posterior of a linear problem stays what it is; pairs and derivatives are those of the readings at hand."""
    problem = _problem(noise)
    data = simulate(problem, 60, seed=1, derivatives=derivatives, progress=False)
    model = fit(problem, data, options=OPTIONS, progress=False)
    refined, more = refine(model, data, y, 40, seed=2, rounds=1, options=OPTIONS, progress=False)
    k = np.isfinite(y).sum()
    assert more.readings.shape == (100, k) and more.chosen == 40
    assert more.derivatives is None if not derivatives else more.derivatives.shape[:2] == (100, k)
    mine = refined.condition(refined.near)
    assert mine.problem.k == k
    if isinstance(noise, GaussianNoise):
        assert _is_exact(mine, exact(*_stacked(problem, y))) > 1e-3
