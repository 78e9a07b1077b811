"""Rounds for one measurement: the posterior that a quadrature gives, from a model that is visibly wrong before."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from firedrake import Ensemble, Function, FunctionSpace, UnitIntervalMesh
from mpi4py import MPI

from fem_diffusion import (
    CallableNoise, GaussianNoise, GaussianPrior, InverseProblem, SensorFamily, SensorKind, TrainingOptions, fit,
    karhunen_loeve, load_model, point_sensors, refine, simulate,
)
from fem_diffusion.diffusion import MeasurementWarning
from fem_diffusion.errors import DataError, FileError, InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.model.refine import _Ellipsoid, _inside, _walk

V = FunctionSpace(UnitIntervalMesh(8, comm=MPI.COMM_SELF), "CG", 1)
PRIOR = GaussianPrior(V, 1.0, 0.5)
BASIS = karhunen_loeve(PRIOR, 2)
STD = 0.02
OPTIONS = TrainingOptions(steps=1000, width=48, depth=2, patience=4, evaluate_every=100, batch=128)
QUICK = TrainingOptions(steps=60, evaluate_every=30, width=8, depth=1, batch=16)
SILENT = {"seed": 5, "progress": False}


def _clean(z):
    a, b = z.T
    return np.stack([a + 0.5 * a**3 + 0.3 * b**2, np.exp(0.7 * b) + 0.5 * np.sin(2 * a)], axis=1)


Y = _clean(np.array([[1.2, -0.6]]))[0] + STD * np.array([0.5, -1.0])


def _solve(m):
    u = Function(V)
    u.dat.data[:2] = _clean(BASIS.encode(coefficients(m))[None])[0]
    return u


def _hidden(c, generator):
    return c + STD * torch.randn(c.shape, generator=generator, dtype=c.dtype)


def _problem(noise, forward=_solve):
    return InverseProblem(PRIOR, forward, lambda u: u.dat.data_ro[:2], noise)


@pytest.fixture(scope="module")
def truth():
    """Mean and covariance of the latents by quadrature on a grid that a posterior standard deviation spans 4 times."""
    x = np.linspace(-4, 4, 1601)
    z = np.stack(np.meshgrid(x, x, indexing="ij"), -1).reshape(-1, 2)
    log = -((Y - _clean(z))**2).sum(axis=1) / 2 / STD**2 - (z**2).sum(axis=1) / 2
    w = np.exp(log - log.max())
    w /= w.sum()
    mean = w @ z
    return mean, (z - mean).T @ ((z - mean) * w[:, None])


def _errors(model, truth):
    """Largest error of a mean, in standard deviations, and of a standard deviation, as a share, along main axes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeasurementWarning)
        z = model.condition(Y).sample(4000, seed=3, progress=False).latents
    values, axes = np.linalg.eigh(truth[1])
    white = (z - truth[0]) @ axes / np.sqrt(values)
    return abs(white.mean(axis=0)).max(), abs(np.log(white.std(axis=0))).max()


@pytest.mark.parametrize("noise, pairs, n, mean_error, std_error", [
    (GaussianNoise(std=STD), 300, 200, 0.1, 0.1), (CallableNoise(_hidden), 300, 1200, 0.3, 0.2)])
def test_the_posterior_of_the_measurement_becomes_right(truth, noise, pairs, n, mean_error, std_error):
    problem = _problem(noise)
    data = simulate(problem, pairs, seed=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = fit(problem, data, basis=BASIS, options=OPTIONS, progress=False)
    assert _errors(model, truth)[1] > 0.6   # of a logarithm: wider by 1.8 at least
    refined, more = refine(model, data, Y, n, options=OPTIONS, **SILENT)
    assert len(more) == pairs + n and more.chosen == n
    np.testing.assert_array_equal(more.readings[:pairs], data.readings)
    found = _errors(refined, truth)
    assert found[0] < mean_error and found[1] < std_error, found


@pytest.fixture(scope="module", params=["known", "unknown"])
def quick(request):
    problem = _problem(GaussianNoise(std=STD) if request.param == "known" else CallableNoise(_hidden))
    data = simulate(problem, 100, seed=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fit(problem, data, basis=BASIS, options=QUICK, progress=False), data


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_refined_model_is_for_one_measurement_is_saved_and_refined_again(quick, tmp_path):
    model, data = quick
    refined, more = refine(model, data, Y, 60, options=QUICK, **SILENT)
    again, _ = refine(model, data, Y, 60, options=QUICK, **SILENT)
    samples = refined.condition(Y).sample(5, seed=1, progress=False).latents
    np.testing.assert_array_equal(again.condition(Y).sample(5, seed=1, progress=False).latents, samples)
    with pytest.raises(InputError, match="refined for another measurement.*: take the model"):
        refined.condition(Y + STD)
    assert "refined for one measurement" in repr(refined) and "60 chosen by refine" in repr(more)
    refined.save(tmp_path / "model")
    loaded = load_model(tmp_path / "model", model.problem)
    np.testing.assert_allclose(loaded.condition(Y).sample(5, seed=1, progress=False).latents, samples, atol=1e-6)
    with pytest.raises(InputError, match="refined for another"):
        loaded.condition(Y + STD)
    other, most = refine(refined, more, Y + STD, 40, options=QUICK, **SILENT)
    assert len(most) == 200 and most.chosen == 100
    other.condition(Y + STD)
    with pytest.raises(DataError, match="chosen by refine"):
        fit(model.problem, most, basis=BASIS, options=QUICK, progress=False)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_solves_that_fail_are_left_out_unless_they_are_many(quick):
    model, data = quick
    calls = []

    def run(every):
        def solve(m):
            calls.append(1)
            if len(calls) % every == 0:
                raise SolveError("no state.")
            return _solve(m)
        failing = replace(model, problem=_problem(model.problem.noise, solve))
        return refine(failing, data, Y, 60, options=QUICK, **SILENT)
    assert len(run(7)[1]) == 160 - 60 // 7
    with pytest.raises(SolveError, match="failed for 30 of 30 samples of the posterior; the first: SolveError: no"):
        run(1)


@pytest.mark.parametrize("change, words", [
    ({"n": 30}, "n is 30 for 2 rounds: give at least 20 simulations a round"),
    ({"rounds": 0}, "rounds is 0"), ({"model": 3}, "model is of type int"), ({"data": None}, "data is of type"),
    ({"y": [1.0]}, "y has shape"), ({"observation": 1}, "fixed sensors"),
])
def test_wrong_arguments_get_a_remedy(quick, change, words):
    model, data = quick
    given = {"model": model, "data": data, "y": Y, "n": 60} | SILENT | change
    with pytest.raises(InputError, match=words):
        refine(**given)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_emulator_that_stays_rough_is_told(quick):
    model, data = quick
    if model.denoiser.known:
        with pytest.warns(MeasurementWarning, match="still leaves up to .* raise n or rounds"):
            refine(model, data, Y, 60, options=QUICK, **SILENT)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_of_a_family_is_refined_for_the_sensors_of_the_measurement():
    sensors = point_sensors(V, [[0.2], [0.5], [0.8]])
    family = InverseProblem(PRIOR, lambda m: Function(V).interpolate(m + m**3), SensorFamily(
        SensorKind(sensors, 0.1, (1, 3))))
    data = simulate(family, 100, seed=1, progress=False)
    model = fit(family, data, basis=BASIS, options=QUICK, progress=False)
    given = {"observation": sensors, "noise": GaussianNoise(std=0.05, relative=0.02), "options": QUICK} | SILENT
    refined, more = refine(model, data, [0.5, np.nan, 1.0], 60, **given)
    assert refined.problem.k == 2 and more.readings.shape == (160, 2) and not refined.problem.family
    values = PRIOR.transform_many(more.coefficients[-1:])
    np.testing.assert_allclose(refined.problem.readings(values)[0], more.readings[-1])
    np.testing.assert_allclose(more.readings[:100], sensors[[0, 2]].apply(data.states))
    assert len(refined.condition([0.5, 1.0]).sample(3, seed=1, progress=False)) == 3
    with pytest.raises(DataError, match="with the states of its training"):
        refine(model, replace(data, states=None), [0.5, np.nan, 1.0], 60, **given)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_killed_run_goes_on_and_solves_nothing_twice(quick, tmp_path):
    model, data = quick
    calls = []

    def run(most=1000, path=tmp_path, n=60, **change):
        calls.clear()

        def solve(m):
            if len(calls) == most:
                raise KeyboardInterrupt
            calls.append(1)
            return _solve(m)
        counted = replace(model, problem=_problem(model.problem.noise, solve))
        return refine(counted, data, n=n, path=path, **{"y": Y, "options": QUICK} | SILENT | change)
    refined, more = run(path=None)
    with pytest.raises(KeyboardInterrupt):
        run(most=45)
    # One is asked again, so that a changed solver shows; of the block that was cut off five are.
    found, again = run()
    assert len(calls) == 60 - 45 + 1 + (45 - 30) % 8
    np.testing.assert_array_equal(again.readings, more.readings)
    np.testing.assert_array_equal(again.coefficients, more.coefficients)
    draws = [x.condition(Y).sample(5, seed=1, progress=False).latents for x in (found, refined)]
    np.testing.assert_allclose(*draws, rtol=1e-9)   # products round as memory is aligned
    # Training may turn out otherwise, as on another machine: what was solved is kept all the same.
    _, other = run(options=replace(QUICK, seed=3))
    assert len(calls) == 1
    np.testing.assert_array_equal(other.readings, more.readings)
    for change in ({"seed": 6}, {"n": 62}, {"y": Y + 5 * STD}):
        with pytest.raises(FileError, match="belongs to another run|computed by another"):
            run(**change)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_failure_stays_one_when_a_run_goes_on(quick, tmp_path):
    model, data = quick

    def solve(m):
        if m.dat.data_ro[3] > 1.0:
            raise SolveError("no state.")
        return _solve(m)
    failing = replace(model, problem=_problem(model.problem.noise, solve))
    first, second = (refine(failing, data, Y, 60, options=QUICK, path=tmp_path, **SILENT)[1] for _ in range(2))
    assert 100 < len(first) < 160
    np.testing.assert_array_equal(first.readings, second.readings)


@pytest.mark.parallel(2)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_members_of_an_ensemble_share_the_solves(tmp_path):
    """Each on a mesh of its own rank, they get the model and the pairs that one alone gets, for half of the solves."""
    world, counts = MPI.COMM_WORLD, []
    ensemble, folder = Ensemble(world, 1), Path(world.bcast(str(tmp_path)))
    W = FunctionSpace(UnitIntervalMesh(8, comm=ensemble.comm), "CG", 1)

    def solve(m):
        counts.append(1)
        if m.dat.data_ro[4] > 0.9:
            raise SolveError("no state.")
        return Function(W).interpolate(m + m**3)
    for noise in (GaussianNoise(std=0.1), CallableNoise(_hidden)):
        problem = InverseProblem(GaussianPrior(W, 1.0, 0.5), solve, point_sensors(W, [[0.2], [0.6]]), noise)
        data = simulate(problem, 100, seed=1, skip=0.5, progress=False)
        model = fit(problem, data, basis=karhunen_loeve(problem.prior, 2), options=QUICK, progress=False)
        given = {"options": QUICK} | SILENT
        alone, pairs = refine(model, data, [0.3, 0.4], 60, **given)
        counts.clear()
        name = type(noise).__name__
        shared, found = refine(model, data, [0.3, 0.4], 60, ensemble=ensemble, path=folder / name, **given)
        assert len(counts) in (30, 31)   # one of them again, where a folder is there
        np.testing.assert_allclose(found.readings, pairs.readings, rtol=1e-10)
        np.testing.assert_allclose(found.coefficients, pairs.coefficients, rtol=1e-10)
        z = [x.condition([0.3, 0.4]).sample(4, seed=1, progress=False).latents for x in (shared, alone)]
        np.testing.assert_allclose(*z, rtol=1e-6)
        counts.clear()
        again = refine(model, data, [0.3, 0.4], 60, ensemble=ensemble, path=folder / name, **given)[1]
        assert world.allreduce(len(counts)) == 1
        np.testing.assert_array_equal(again.readings, found.readings)
        with pytest.raises(InputError, match="seed is another one"):
            refine(model, data, [0.3, 0.4], 60, ensemble=ensemble, **given | {"seed": world.rank})


@pytest.mark.parallel(2)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ranks_refine_together():
    W = FunctionSpace(UnitIntervalMesh(8), "CG", 1)
    for noise in (GaussianNoise(std=0.1), CallableNoise(_hidden)):
        problem = InverseProblem(GaussianPrior(W, 1.0, 0.5), lambda m: Function(W).interpolate(m + m**3),
                                 point_sensors(W, [[0.2], [0.6]]), noise)
        data = simulate(problem, 100, seed=1, progress=False)
        model = fit(problem, data, basis=karhunen_loeve(problem.prior, 2), options=QUICK, progress=False)
        refined, more = refine(model, data, [0.3, 0.4], 60, options=QUICK, **SILENT)
        readings = problem.readings(more.coefficients[-3:])
        np.testing.assert_allclose(readings, more.readings[-3:])
        z = refined.condition([0.3, 0.4]).sample(4, seed=1, progress=False).latents
        np.testing.assert_array_equal(W.comm.bcast(z), z)


def test_walks_draw_from_the_prior_in_a_region():
    rng = np.random.default_rng(0)
    region = [_Ellipsoid.around(rng.standard_normal((50, 2)) * [0.6, 0.2] + [1.5, 0.5]),
              _Ellipsoid(np.array([1.0, 0.0]), np.eye(2), 1.5)]
    wanted = rng.standard_normal((400000, 2))
    wanted = wanted[_inside(region, wanted)]
    start = np.tile(wanted[:1], (4000, 1))
    found = _walk(region, start, rng)
    assert _inside(region, found * (1 - 1e-9)).mean() > 0.99
    error = wanted.std(axis=0) / np.sqrt(len(found))
    assert (abs(found.mean(axis=0) - wanted.mean(axis=0)) < 4 * error).all()
    np.testing.assert_allclose(np.cov(found.T), np.cov(wanted.T), atol=4 * np.sqrt(2 / 4000) * wanted.var(axis=0).max())
