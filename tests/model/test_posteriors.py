"""Measurements at many times: posteriors are those of one by one, and sensors judge each other through any model."""

import warnings

import numpy as np
import pytest
from firedrake import COMM_WORLD, FunctionSpace, UnitIntervalMesh

from fem_diffusion import (
    AdvectionDiffusion, Boundary, GaussianNoise, GaussianPrior, InputError, InverseProblem, MeasurementWarning, Physics,
    SensorFamily, SensorKind, TrainingOptions, fit, karhunen_loeve, point_sensors, simulate,
)

OPTIONS = TrainingOptions(steps=60, evaluate_every=30, width=16, depth=1)
POINTS = [[0.1], [0.22], [0.35], [0.5], [0.63], [0.77], [0.9]]
STD = 0.01
NAMES = [f"probe {i} [K]" for i in range(len(POINTS))]


def _problem(family=False, noise=None):
    V = FunctionSpace(UnitIntervalMesh(24), "CG", 1)
    prior = GaussianPrior(V, std=1.0, correlation_length=0.3, mean=3.0)
    forward = AdvectionDiffusion(V, V, "source", Physics(diffusivity=1.0), Boundary(dirichlet={1: 0.0, 2: 0.0}))
    sensors = point_sensors(V, POINTS, NAMES)
    if family:
        return InverseProblem(prior, forward, SensorFamily(SensorKind(sensors, STD, (1, len(POINTS))))), sensors
    return InverseProblem(prior, forward, sensors, noise or GaussianNoise(std=STD)), sensors


def _model(problem):
    data = simulate(problem, 300, seed=1, progress=False)
    return fit(problem, data, basis=karhunen_loeve(problem.prior, problem.V.dim()), options=OPTIONS, progress=False)


def _values(n=4):
    """Readings of the prior's own states, with gaps."""
    problem = _problem()[0]
    values = problem.measurements(problem.prior.sample_many(n, 5), seed=6)
    values[1, 2] = values[2, 2] = values[3, 0] = np.nan
    return values


@pytest.fixture(scope="module", params=["fixed", "family"])
def model(request):
    return _model(_problem(request.param == "family")[0])


def _given(model):
    """What a model of a family is told of its sensors."""
    return (model.problem.observation.kinds[0].observation, STD) if model.problem.family else ()


def test_posteriors_are_those_of_each_time_alone(model):
    values, given = _values(), _given(model)
    found = model.condition_all(values, *given, times=[0.0, 0.5, 1.0, 1.5])
    assert len(found) == 4 and found.names == tuple(NAMES)
    for posterior, y in zip(found, values):
        alone = model.condition(y, *given)
        np.testing.assert_allclose(posterior.y, alone.y)
        for name in ("mean", "covariance"):
            np.testing.assert_allclose(getattr(posterior.conditioned.located, name).numpy(),
                                       getattr(alone.conditioned.located, name).numpy(), rtol=1e-9, atol=1e-12)
        assert posterior.problem.names == alone.problem.names
        assert posterior.distance.p == alone.distance.p
    n = 3000
    for samples, posterior in zip(found.sample(n, seed=3, progress=False), found):
        z, located = samples.latents, posterior.conditioned.located
        # Independent of each other, and of each posterior's own law where the base is the answer.
        if posterior.conditioned.network is None:
            away = (z.mean(axis=0) - located.mean[0].numpy()) / located.std[0].numpy() * np.sqrt(n)
            assert np.abs(away).max() < 5
    some = found[[0, 2]]
    np.testing.assert_array_equal(some.values, values[[0, 2]])
    assert some.times.tolist() == [0.0, 1.0]


def test_what_stands_out_is_said_once_for_all(model):
    values, given = np.vstack([_values(), _values()]), _given(model)
    values[4] = np.nan
    values[5:, 3] += 1.0
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = model.condition_all(values, *given)
    messages = [str(one.message) for one in told if issubclass(one.category, MeasurementWarning)]
    assert len(found) == 7 and len(messages) == 2
    assert "at 1 of 8 times" in messages[0] and "3 of 7 measurements" in messages[1]
    assert "probe 3 [K] (3 times)" in messages[1]
    assert found.unlike.tolist() == 4 * [False] + 3 * [True]


def test_sensors_judge_each_other_through_a_model(model):
    values, given = _values(), _given(model)
    many = model.condition_all(values, *given).cross_validate(draws=200)
    # The law of all readings under the prior is known: each given the others.
    problem = _problem()[0]
    m = problem.readings(np.asarray(problem.prior.mean.dat.data_ro)[None])[0]
    rows = problem.sensitivity(problem.prior.mean)
    S = rows @ problem.prior.covariance_matrix() @ rows.T + STD**2 * np.eye(len(m))
    for y, mean, std in zip(values, many.mean, many.std):
        for i in np.flatnonzero(~np.isnan(y)):
            kept = [j for j in np.flatnonzero(~np.isnan(y)) if j != i]
            gain = np.linalg.solve(S[np.ix_(kept, kept)], S[kept, i])
            expected, spread = m[i] + gain @ (y[kept] - m[kept]), np.sqrt(S[i, i] - gain @ S[kept, i])
            # 300 pairs and 200 samples, whose own errors are some five per cent of a standard deviation.
            assert abs(mean[i] - expected) < 0.35 * spread and abs(std[i] / spread - 1) < 0.25
    assert not many.worst
    one = model.condition(values[0], *given).cross_validate(draws=200)
    np.testing.assert_allclose(one.mean[0], many.mean[0], atol=0.3 * STD)


@pytest.mark.filterwarnings("ignore:This measurement is unlike")
def test_a_broken_sensor_is_named_and_its_picture_drawn(model, tmp_path):
    y, given = _values()[0], _given(model)
    y[3] += 30 * STD
    found = model.condition(y, *given).cross_validate(draws=200)
    assert found.worst == ("probe 3 [K]",) and "probe 3 [K]" in str(found)
    found.plot().savefig(tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10000


@pytest.mark.parametrize("values", [np.zeros(7), np.zeros((2, 6)), np.full((2, 7), np.nan), np.full((2, 7), np.inf)])
def test_other_shapes_are_refused(model, values):
    with pytest.raises(InputError):
        model.condition_all(values, *_given(model))


def test_wrong_times_and_choices_are_refused(model):
    values, given = _values(), _given(model)
    with pytest.raises(InputError, match="times has the shape"):
        model.condition_all(values, *given, times=[1.0])
    found = model.condition_all(values, *given)
    for index in ([9], [], np.zeros((2, 2), dtype=int), "first"):
        with pytest.raises(InputError):
            found[index]
    with pytest.raises(InputError):
        found.sample(0, seed=1)


@pytest.mark.parallel(2)
def test_ranks_give_the_same_predictions():
    model = _model(_problem()[0])
    values = COMM_WORLD.bcast(_values())
    found = model.condition_all(values)
    crossed = found.cross_validate()
    for x in (crossed.mean, crossed.std, found.sample(5, seed=1, progress=False)[1].latents):
        for other in COMM_WORLD.allgather(x):
            np.testing.assert_array_equal(x, other)
    with pytest.raises(InputError, match="other ranks"):
        model.condition_all(values + COMM_WORLD.rank)
    with pytest.raises(InputError, match="draws"):
        found.cross_validate(draws=1)
