"""Trained models at one measurement: unlike ones are told, far ones refused, and check sees what the model missed."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from firedrake import (
    Function, FunctionSpace, RectangleMesh, SpatialCoordinate, Submesh, UnitIntervalMesh, as_vector, exp,
)
from mpi4py import MPI

from fem_diffusion import (
    AdvectionDiffusion, Boundary, CallablePrior, FileError, GaussianNoise, GaussianPrior, InputError, InverseProblem,
    MeasurementWarning, Physics, SensorFamily, SensorKind, TrainingOptions, TransformedPrior, check, exact, fit,
    hmc, karhunen_loeve, laplace, load_model, point_sensors, random_points, simulate,
)
from fem_diffusion import files
from fem_diffusion.diffusion import sample_latents
from fem_diffusion.trust.start import start_of

NOISE = 0.05
OPTIONS = TrainingOptions(steps=60, evaluate_every=30, width=16, depth=1)
PLACES = [(0.7, 0.1), (1.3, 0.3), (1.9, 0.1), (2.5, 0.2), (3.1, 0.1), (3.6, 0.4)]


def _problem(transform=None, family=False):
    """A channel with an unknown flux through its wall."""
    mesh = RectangleMesh(24, 6, 4.0, 1.0)
    V, M = FunctionSpace(mesh, "CG", 1), FunctionSpace(Submesh(mesh, 1, 3), "CG", 1)
    height = SpatialCoordinate(mesh)[1]
    prior = GaussianPrior(M, std=0.3, correlation_length=1.0, mean=0.2)
    prior = prior if transform is None else TransformedPrior(prior, transform)
    forward = AdvectionDiffusion(V, M, ("flux", 3), Physics(velocity=as_vector([6 * height * (1 - height), 0 * height]),
                                                            diffusivity=0.1), Boundary(dirichlet={1: 1.0}))
    if family:
        kind = SensorKind(point_sensors(V, random_points(mesh, 200, seed=1)), (0.02, 0.1), (1, 8))
        return InverseProblem(prior, forward, SensorFamily(kind))
    return InverseProblem(prior, forward, point_sensors(V, PLACES), NOISE)


def _fitted(problem, pairs=600, **settings):
    data = simulate(problem, pairs, seed=1, progress=False)
    return fit(problem, data, options=OPTIONS, progress=False, **settings), data


@pytest.fixture(scope="module")
def job():
    problem = _problem()
    return problem, *_fitted(problem), simulate(problem, 1200, seed=2, progress=False)


@pytest.fixture(scope="module")
def many():
    problem = _problem(family=True)
    return problem, *_fitted(problem), simulate(problem, 1200, seed=2, progress=False)


def _told(condition):
    """A posterior, and whether it came with a MeasurementWarning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MeasurementWarning)
        posterior = condition()
    return posterior, any(issubclass(one.category, MeasurementWarning) for one in caught)


def test_one_in_a_hundred_measurements_of_fixed_sensors_is_told_to_be_unlike(job):
    _, model, _, held = job
    y = held.readings + NOISE * np.random.default_rng(0).standard_normal(held.readings.shape)
    told = np.mean([_told(lambda: model.condition(row))[1] for row in y])
    assert abs(told - 0.01) < 4 * (0.01 * (1 / 1200 + 1 / 600))**0.5


def test_one_in_a_hundred_measurements_of_a_family_is_told_to_be_unlike(many):
    problem, model, _, held = many
    rng, told = np.random.default_rng(0), []
    sensors = [point_sensors(problem.U, random_points(problem.U.mesh(), k, seed=k)) for k in (1, 3, 7)]
    for observation in sensors:
        std = rng.uniform(0.02, 0.1, len(observation))
        readings = observation.apply(held.states[:400])
        y = readings + std * rng.standard_normal(readings.shape)
        told += [_told(lambda: model.condition(row, observation, GaussianNoise(std=std)))[1] for row in y]
    assert abs(np.mean(told) - 0.01) < 4 * (0.01 * (1 / 1200 + 3 / 1800))**0.5


def test_a_broken_sensor_is_named_for_fixed_sensors_and_families(job, many):
    problem, model, *_ = job
    truth = problem.prior.sample(5)
    y = problem.observation(problem.forward(truth))
    y[2] += 0.6
    for condition in (lambda: model.condition(y), lambda: many[1].condition(
            np.append(y, np.nan), point_sensors(many[0].U, [*PLACES, (2.0, 0.5)]), GaussianNoise(std=NOISE))):
        with pytest.warns(MeasurementWarning, match=r"sensor \(1.9, 0.1\) reads .*is expected beside the others"):
            posterior = condition()
        assert posterior.distance.worst[0] == "(1.9, 0.1)" and posterior.distance.p < 0.01
        # A linear problem is answered exactly, whatever is measured.
        assert not posterior.distance.far and np.isfinite(posterior.sample(5, seed=0, progress=False).values).all()
        found = posterior.check()
        assert found.verdict == "conflict" and found.worst == ("(1.9, 0.1)",)


def test_the_readings_of_the_training_are_saved_and_checked(job, many, tmp_path):
    for problem, model, *_ in (job, many):
        model.save(tmp_path / "model")
        again = load_model(tmp_path / "model", problem)
        torch.testing.assert_close(again.seen, model.seen, rtol=0, atol=0)
        content = files.read(tmp_path / "model", "model", "")
        seen = model.seen.numpy()
        for wrong in (seen[:, 1:], 1e200 * seen + 1e200, np.full_like(seen, np.nan)):
            files.write(tmp_path / "other", "model", content.arrays | {"seen": wrong}, content.values)
            with pytest.raises(FileError, match="seen|too large"):
                load_model(tmp_path / "other", problem)
        # A file without them is read, and nothing is compared.
        arrays = {name: x for name, x in content.arrays.items() if name != "seen"}
        files.write(tmp_path / "other", "model", arrays, content.values)
        assert load_model(tmp_path / "other", problem).seen is None
    assert replace(job[1], seen=None).condition(job[2].readings[0]).distance is None
    with pytest.raises(InputError, match="seen has the shape"):
        replace(job[1], seen=torch.zeros(4, 2))


def test_a_cube_is_not_extrapolated(monkeypatch):
    """y = θ³ + e reads up to about 50 in training, and then 200, and a million: too far on any scale."""
    V = FunctionSpace(UnitIntervalMesh(1, comm=MPI.COMM_SELF), "R", 0)
    prior = CallablePrior(V, lambda seed: Function(V).assign(np.random.default_rng(seed).normal()))
    problem = InverseProblem(prior, lambda m: Function(V).assign(float(m)**3), lambda u: [float(u)], 0.5)
    model, data = _fitted(problem, 1000)
    assert 15 < np.abs(data.readings).max() < 100
    with pytest.warns(MeasurementWarning, match="unlike the 1,000 simulated ones.*sensor 0 reads 200"):
        model.condition([200.0])
    with pytest.warns(MeasurementWarning, match="farther away than any of them"):
        posterior = model.condition([1e6])
    assert posterior.distance.far
    with pytest.raises(InputError, match=r"does not extrapolate.*laplace\(problem, y\).*posterior.correct"):
        posterior.sample(10, seed=0)
    seen = []

    def remembered(conditioned, n, sampler, **given):
        seen.append(sampler.corrections)
        return sample_latents(conditioned, n, sampler, **given)
    for room in ("model.posterior", "trust.start"):
        monkeypatch.setattr(f"fem_diffusion.{room}.sample_latents", remembered)
    near = model.condition([1.0])
    for one in (posterior, near):
        assert len(one.sample(3, seed=0, extrapolate=True, progress=False)) == 3
        assert len(start_of(one, lambda z: -z[:, 0]**2 / 2, None, 0).more(3)) == 3
    # Where the emulator means nothing its density must not move samples, for as long as it takes.
    assert set(seen[:len(seen) // 2]) == {0} and set(seen[len(seen) // 2:]) == {None}
    assert not model.condition([1.0]).distance.far


def test_what_a_model_leaves_out_is_seen_by_its_check(job):
    problem, _, data, _ = job
    few = fit(problem, data, basis=karhunen_loeve(problem.prior, 3), options=OPTIONS, progress=False)
    y = problem.observation(problem.forward(problem.prior.sample(5))) + 0.02
    # What the readings tell of the rest is drawn with them.
    good = few.condition(y).check(data=data)
    assert good.verdict == "trustworthy" and good.refill > 0.3 and good.calibration_p > 0.005
    assert "there are enough" in good.pairs and good.distance_p > 0.01
    bad = replace(few.condition(y), tail=None).check()
    assert bad.verdict == "too wide" and bad.light != "green" and "draws from the prior" in str(bad)


def test_little_training_is_seen_and_far_measurements_have_a_verdict():
    problem = _problem(exp)
    model, data = _fitted(problem, 300)
    y = problem.observation(problem.forward(problem.prior.sample(5))) + 0.02
    found = model.condition(y).check(data=data)
    assert found.verdict in ("biased", "too wide", "too narrow") and found.light == "red" and found.misfit > 1.5
    assert "posterior.correct(...) mends that" in str(found)
    with pytest.warns(MeasurementWarning):
        far = model.condition(y + [0, 0, 9, 0, 0, 0])
    assert far.distance.far
    found = far.check()
    assert found.verdict == "biased" and found.light == "red" and "mostly at sensor (1.9, 0.1)" in str(found)
    # Continuation finds a state of one or two of them.
    assert int(re.search(r"no solution for (\d+) of 42 samples", str(found))[1]) >= 40


def test_a_family_is_checked_with_the_sensors_that_are_there(many):
    problem, model, data, held = many
    sensors = point_sensors(problem.U, PLACES)
    y = sensors(problem.forward(problem.prior.sample(5))) + 0.02
    y[1] = np.nan
    covariance = NOISE**2 * (0.5 * np.eye(6) + 0.5)
    for noise in (GaussianNoise(std=NOISE), GaussianNoise(covariance=covariance), GaussianNoise(0.03, relative=0.01)):
        posterior = model.condition(y, sensors, noise)
        found = posterior.check(data=held)
        assert found.names == posterior.problem.names and len(found.y) == 5
        assert found.verdict == "trustworthy" and found.calibration_p > 1e-3
    # One that reads otherwise than the model says.
    y[3] += 0.5
    posterior, told = _told(lambda: model.condition(y, sensors, GaussianNoise(std=NOISE)))
    assert told and posterior.check().worst == (sensors.names[3],)


def test_references_are_checked_as_models_are(job):
    problem, *_ = job
    y = problem.observation(problem.forward(problem.prior.sample(5))) + 0.02
    for posterior in (exact(problem, y), laplace(problem, y)):
        found = check(posterior)
        assert found.verdict == "trustworthy" and np.isnan(found.distance)
    bent = replace(problem, prior=TransformedPrior(problem.prior, exp))
    chains = hmc(bent, problem.observation(problem.forward(bent.prior.sample(5))) + 0.02, seed=1, progress=False)
    assert check(chains).verdict == "trustworthy"
    # Samples of a transformed prior hold the chains' latents.
    assert check(replace(chains, draws=replace(chains.draws, latents=0.4 * chains.draws.latents))).light != "green"


@pytest.mark.parallel([1, 2])
def test_a_check_is_the_same_on_two_ranks():
    problem = _problem()
    model, data = _fitted(problem, 300)
    y = np.array([1.3, 1.3, 1.45, 1.4, 1.5, 1.2])
    found = model.condition(y).check(data=data)
    mine = (found.verdict, found.light, found.solves, round(found.width, 6), round(found.distance, 6))
    assert problem.comm.allgather(mine) == problem.comm.size * [mine]
    assert found.readings.shape[1] == 6
