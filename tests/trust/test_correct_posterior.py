"""Corrected samples of finite element problems: against exact posteriors, for models of any quality."""

import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from firedrake import Function, FunctionSpace, SpatialCoordinate, UnitIntervalMesh, sin
from scipy.stats import uniform

from fem_diffusion.diffusion import GaussianNoise, MeasurementWarning, TrainingOptions, fit_denoiser
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.model.fit import fit
from fem_diffusion.model.posterior import Posterior
from fem_diffusion.observation.family import SensorFamily, SensorKind
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve, pod
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.exact import exact
from fem_diffusion.samples import load_samples
from fem_diffusion.simulation.simulate import simulate
from fem_diffusion.trust import correct as module, start

POOR = TrainingOptions(steps=60, evaluate_every=20, width=16, depth=1, batch=32)
PLACES = [[0.2], [0.5], [0.85]]


@cache
def line():
    V = FunctionSpace(UnitIntervalMesh(12), "CG", 1)
    return V, GaussianPrior(V, 1.0, 0.6)


def problem(forward, places=PLACES):
    V, prior = line()
    return InverseProblem(prior, forward, point_sensors(V, places), GaussianNoise(std=0.3))


def bent(m):
    """A state that is no linear function of the field."""
    V = m.function_space()
    return Function(V).interpolate(m + m**3 / 2)


class Linear:
    """m -> m, with its derivative."""

    def __init__(self, V):
        self.M = self.U = V

    def __call__(self, m):
        return m.copy(deepcopy=True)

    def solve_many(self, parameters):
        return parameters

    def sensitivity(self, m, rows):
        return rows.toarray() if hasattr(rows, "toarray") else rows


def trained(case, pairs=300, r=4):
    """A model of few modes, few pairs and few steps."""
    data = simulate(case, pairs, seed=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(case, data, basis=karhunen_loeve(case.prior, r), options=POOR, progress=False)


def measured(case, seed):
    """A noisy measurement of a wave."""
    V, _ = line()
    wave = coefficients(Function(V).interpolate(0.8 * sin(5 * SpatialCoordinate(V.mesh())[0])))
    return case.measurements(wave[None], seed=seed)[0]


def truth(case, y, n=400_000):
    """Mean and standard deviation at the nodes by weights of prior draws in the modes that count."""
    basis = karhunen_loeve(case.prior)
    z = np.random.default_rng(0).standard_normal((n, basis.r))
    fields = basis.decode(z)
    read = case.observation.apply(fields + fields**3 / 2)
    log = -(((read - y) / case.noise.std.numpy())**2).sum(axis=1) / 2
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    assert 1 / (weights**2).sum() > 2000
    mean = weights @ fields
    return mean, np.sqrt(weights @ (fields - mean)**2)


def check(samples, mean, std, sigmas=4.5):
    """Within the error of the effective sample size, and one per cent for modes past those of the reference."""
    ess = samples.certificate.ess
    ours = coefficients(samples.mean())
    assert (np.abs(ours - mean) < (sigmas / np.sqrt(ess) + 0.02) * std).all()
    assert (np.abs(coefficients(samples.std()) / std - 1) < sigmas / np.sqrt(2 * ess) + 0.02).all()


def test_a_poor_model_of_a_bent_problem_is_repaired(tmp_path):
    case = problem(bent)
    V, _ = line()
    y = measured(case, 7)
    posterior = trained(case).condition(y)
    mean, std = truth(case, y)
    samples = posterior.correct(solves=1200, seed=2, path=tmp_path / "solves", progress=False)
    check(samples, mean, std)
    certificate = samples.certificate
    assert certificate.solves <= 1300 and certificate.ess > 300 and certificate.unseen < 0.2
    assert f"effective sample size {certificate.ess:,.0f}" in repr(samples)
    samples.save(tmp_path / "samples")
    assert load_samples(tmp_path / "samples", V).certificate == certificate
    again = posterior.correct(solves=1200, seed=2, draws=50, path=tmp_path / "solves", progress=False)
    assert len(again) == 50 and again.certificate.ess == pytest.approx(certificate.ess, rel=1e-6)


@pytest.mark.parallel([1, 2])
def test_a_linear_problem_gets_its_exact_posterior():
    V, prior = line()
    case = problem(Linear(V))
    y = measured(case, 3)
    samples = trained(case).condition(y).correct(solves=1000, seed=4, progress=False)
    right = exact(case, y)
    assert samples.certificate.ess > 300
    check(samples, coefficients(right.mean()), coefficients(right.std()))


def test_a_family_is_corrected_for_sensors_that_it_has_not_seen():
    V, prior = line()
    places = [[x] for x in np.linspace(0.03, 0.97, 40)]
    family = InverseProblem(prior, bent, SensorFamily(SensorKind(point_sensors(V, places), 0.3, (2, 5))))
    data = simulate(family, 400, seed=1, progress=False)
    model = fit(family, data, basis=karhunen_loeve(prior, 4), options=POOR, progress=False)
    case = problem(bent)
    y = measured(case, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = model.condition(y, case.observation, case.noise)
    samples = posterior.correct(solves=1200, seed=2, progress=False)
    check(samples, *truth(case, y))


def test_latents_without_a_density_need_one():
    V, prior = line()
    case = problem(bent)
    data = simulate(case, 300, seed=1, progress=False)
    model = fit(case, data, basis=pod(V, data.coefficients, 3), options=POOR, progress=False)
    y = measured(case, 7)
    posterior = model.condition(y)
    with pytest.raises(InputError, match="give correct a log_prior"):
        posterior.correct(seed=1, progress=False)
    samples = posterior.correct(solves=2500, seed=1, log_prior=lambda z: -(z**2).sum(axis=1) / 2, progress=False)
    assert np.isnan(samples.certificate.unseen) and samples.certificate.ess > 100


def test_an_emulator_of_scaled_latents_takes_those_of_the_users():
    """Uniform latents, which are mapped to normal ones, told a surrogate by their own numbers."""
    rng = np.random.default_rng(0)
    V, _ = line()
    case, z = problem(bent), 4 * rng.random((2000, 3)) - 2

    def readings(z):
        return np.stack([z[:, 0] + z[:, 1]**2 / 4, z[:, 1] - z[:, 2], z[:, 2]], 1)
    options = TrainingOptions(steps=1000, evaluate_every=100, width=32, depth=2)
    denoiser, _ = fit_denoiser(torch.from_numpy(z), torch.from_numpy(readings(z)), 0.3, prior=uniform(-2, 4),
                               options=options, progress=False)
    assert denoiser.latents is not None
    y = np.array([0.3, -0.2, 0.5])
    basis = pod(V, rng.standard_normal((20, V.dim())), 3)
    posterior = Posterior(case, basis, denoiser.at(torch.from_numpy(y)[None]), y)
    base, at, covector = start.known_readings(posterior), 1.5 * z[:50], rng.standard_normal((50, 3))
    at = np.hstack([at.clip(-1.8, 1.8), rng.standard_normal((50, 2))])   # two modes more than the model has
    found, pull = base(at)
    np.testing.assert_allclose(found, readings(at), atol=0.1)
    slope = np.zeros((50, 5))
    for i in range(5):
        step = 1e-4 * np.eye(5)[i]
        slope[:, i] = ((base(at + step)[0] - base(at - step)[0]) * covector).sum(1) / 2e-4
    np.testing.assert_allclose(pull(covector), slope, atol=1e-2)


def test_noise_that_is_three_times_what_was_said_is_told():
    case = problem(bent, [[x] for x in np.linspace(0.03, 0.97, 20)])
    model, wave = trained(case), measured(case, 7)
    assert not model.condition(wave).correct(solves=700, seed=1, progress=False).certificate.notes
    posterior = replace(model.condition(wave), y=wave + 0.9 * np.random.default_rng(2).standard_normal(20))
    with pytest.warns(MeasurementWarning, match="in conflict with the problem"):
        samples = posterior.correct(solves=700, seed=1, progress=False)
    assert "in conflict" in str(samples.certificate) and samples.certificate.light == "red"


def test_a_broken_sensor_that_the_modes_take_in_is_told():
    """Residuals of the draws are as the noise: only beside the others what the sensor reads is odd."""
    V = FunctionSpace(UnitIntervalMesh(60), "CG", 1)
    case = InverseProblem(GaussianPrior(V, 0.5, 0.2), Linear(V),
                          point_sensors(V, np.linspace(0.05, 0.95, 16)[:, None]), GaussianNoise(std=0.05))
    model, (y,) = trained(case, r=20), case.measurements(case.prior.sample_many(1, 0), seed=0)
    assert model.condition(y).correct(solves=700, seed=1, progress=False).certificate.residuals == "green"
    posterior = replace(model.condition(y), y=y + 1.0 * (np.arange(16) == 4))
    with pytest.warns(MeasurementWarning, match="contradict sensor"):
        samples = posterior.correct(solves=700, seed=1, progress=False)
    assert samples.certificate.residuals == "red"
    assert "Nothing near the corrected samples explains the measurement" in str(samples.certificate)
    assert "the others contradict sensor (0.29)" in str(samples.certificate)


class Counted:
    """m -> m + m³/2, with its derivative, counted."""

    def __init__(self, V, fails=lambda row: False):
        self.M = self.U = V
        self.fails, self.solves, self.pulls = fails, 0, 0

    def __call__(self, m):
        return Function(self.U, val=self.solve_many(m.dat.data_ro[None])[0])

    def solve_many(self, parameters):
        self.solves += len(parameters)
        rows = parameters + parameters**3 / 2
        rows[[self.fails(row) for row in parameters]] = np.nan
        return rows

    def sensitivity(self, m, rows):
        self.pulls += rows.shape[0]
        return (rows.toarray() if hasattr(rows, "toarray") else rows) * (1 + 1.5 * m.dat.data_ro**2)


@pytest.mark.filterwarnings("ignore::fem_diffusion.reference.chains.ConvergenceWarning")
@pytest.mark.parametrize("how, solves", [
    ("as it is", 200), ("as it is", 233), ("as it is", 600), ("searched", 600), ("searched", 1500),
    ("by gradients", 2500), ("by gradients at once", 9000)])
def test_no_more_solves_are_spent_than_asked(how, solves, monkeypatch):
    """Whatever leads to the samples, and what they lack of further modes is looked at."""
    V, _ = line()
    solver = Counted(V)
    case = problem(solver)
    posterior = trained(case).condition(measured(case, 7))
    if how == "searched":
        monkeypatch.setattr(module, "_FAR", -np.inf)
    elif how != "as it is":
        name, value = ("_NEVER", 1.1) if how == "by gradients" else ("_FAR", -np.inf)
        monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "_KHAT", -1.0)
        monkeypatch.setattr(module, "_HOPE", 0.0)
        monkeypatch.setattr(module, "_LEARNING", 0.9)
    solver.solves = solver.pulls = 0
    try:
        certificate = posterior.correct(solves=solves, seed=2, progress=False).certificate
    except SolveError as error:
        assert solves < 600 and "Give about solves=" in str(error)
    else:
        assert certificate.solves == solver.solves and certificate.pulls == solver.pulls
        assert certificate.method == "gradient moves" or "gradients" not in how
    assert solver.solves <= solves and solver.pulls <= solves


def test_a_look_at_further_modes_that_fails_is_counted_and_told(monkeypatch):
    """NaN is no small number."""
    V, prior = line()
    few = karhunen_loeve(prior, 4)

    def beyond(row):
        return np.abs(row - few.decode(few.encode(row[None]))[0]).max() > 1e-8
    solver = Counted(V)
    case = InverseProblem(prior, solver, point_sensors(V, PLACES), GaussianNoise(std=0.3))
    posterior = trained(case).condition(measured(case, 7))
    # The correction stays in the modes of the model, as where modes are too many.
    monkeypatch.setattr(start, "extended", lambda basis: basis)
    solver.fails, solver.solves = beyond, 0
    certificate = posterior.correct(solves=800, seed=2, progress=False).certificate
    assert np.isnan(certificate.unseen) and "is not known, because the forward problem fails" in str(certificate)
    assert certificate.solves <= 800 and solver.solves <= 800
