"""A bundle gives what the model gives that it was made from: transforms, tails, failed sensors, families and maps."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from firedrake import (
    FunctionSpace, SpatialCoordinate, TestFunction, UnitIntervalMesh, UnitSquareMesh, assemble,
    dx, exp, interpolate,
)
from scipy.stats import lognorm, loguniform

from fem_diffusion import (
    AdvectionDiffusion, Boundary, CallableNoise, GaussianNoise, GaussianPrior, HierarchicalPrior, InputError,
    InverseProblem, Largest, Physics, SensorFamily, SensorKind, StudentNoise, TrainingOptions, TransformedPrior, exact,
    fit, functionals, join_noise, karhunen_loeve, point_sensors, simulate,
)
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.monitor.export import _tables
from fem_diffusion.monitor.file import read_bundle

POINTS = [(0.2, 0.3), (0.5, 0.7), (0.8, 0.2), (0.6, 0.4)]
NAMES = [f"probe {i} [K]" for i in range(4)]
OPTIONS = TrainingOptions(steps=60, evaluate_every=30, width=16, depth=1)


def _problem(mesh, transform=None, noise=0.02, degree=1):
    """An unknown source seen through its concentration, on which a transform acts where there is one."""
    V = FunctionSpace(mesh, "CG", degree)
    prior = GaussianPrior(V, std=0.4, correlation_length=0.4, mean=1.0)
    forward = AdvectionDiffusion(V, V, "source", Physics(diffusivity=0.3, reaction=lambda u: u), Boundary())
    prior = prior if transform is None else TransformedPrior(prior, transform)
    return InverseProblem(prior, forward, point_sensors(V, POINTS, names=NAMES), GaussianNoise(std=noise))


def _quantities(problem):
    M = problem.M
    return {"total [W]": functionals(M, [lambda m: m * dx]), "highest [W/m²]": Largest(lambda x: x[0] > 0.5),
            "here": point_sensors(M, [(0.31, 0.62)])}


def _model(problem, n=400, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(problem, simulate(problem, n, seed=1, progress=False), options=OPTIONS, progress=False, **given)


@pytest.fixture(scope="module")
def linear():
    problem = _problem(UnitSquareMesh(6, 6))
    return _model(problem, basis=karhunen_loeve(problem.prior, 8))


def _export(model, tmp_path, **given):
    model.export_monitor(tmp_path, _quantities(model.problem), name="source [W/m²]", mesh_units="m", **given)
    return read_bundle(tmp_path)


@pytest.mark.parametrize("broken", [(), (2,)])
def test_linear_problem_with_its_tail_is_the_exact_posterior(linear, tmp_path, broken):
    """Eight modes and what is past them: quantities have the law of the finite element posterior."""
    problem = linear.problem
    bundle = _export(linear, tmp_path, draws=4000)
    assert bundle.tail is not None and bundle.tail.known is not None
    y = problem.measurements(problem.prior.sample_many(1, seed=5), seed=3)[0]
    y[list(broken)] = np.nan
    answer = bundle.answer(y, 1)
    assert not answer.doubts
    there = ~np.isnan(y)
    sensors = problem.observation[np.flatnonzero(there)]
    some = InverseProblem(problem.prior, problem.forward, sensors, problem.noise)
    truth = exact(some, y[there]).sample(4000, seed=2)
    weights = coefficients(assemble(TestFunction(problem.M) * dx).riesz_representation("l2"))
    inside = bundle.weights[1] > 0
    others = np.column_stack([truth.values @ weights, truth.values[:, inside].max(axis=1)])
    for mine, theirs in zip(answer.values.T, others.T):
        std = theirs.std()
        assert abs(mine.mean() - theirs.mean()) < 4 * std * np.sqrt(2 / 4000)
        assert abs(mine.std() / std - 1) < 4 / np.sqrt(4000)


def test_map_and_sensors_are_those_of_the_mesh(linear, tmp_path):
    bundle = _export(linear, tmp_path)
    V = linear.problem.M
    x, y = (coefficients(assemble(interpolate(c, V))) for c in SpatialCoordinate(V.mesh()))
    area = bundle.area
    shown = area.rows @ (x + 2 * y)
    np.testing.assert_allclose(shown, area.corners @ [1, 2], atol=1e-12)
    assert (area.name, area.unit, area.length, area.axes, area.where) == ("source", "W/m²", "m", ("x", "y"), "")
    assert bundle.names == tuple(f"probe {i}" for i in range(4)) and bundle.sensors[1].unit == "K"
    assert bundle.sensors[1].point == POINTS[1] and [q.unit for q in bundle.quantities] == ["W", "W/m²", ""]


def test_transform_becomes_a_table(tmp_path):
    problem = _problem(UnitSquareMesh(6, 6), exp)
    model = _model(problem)
    bundle = _export(model, tmp_path)
    z = np.random.default_rng(0).standard_normal((20, model.basis.r))
    rest = 0 if bundle.tail is None else bundle.tail.draws[:20]
    truth = problem.prior.transform_many(model.basis.decode(z) + rest)
    np.testing.assert_allclose(bundle._parameters(np.zeros(4), np.arange(4), z), truth, rtol=1e-4)
    y = problem.measurements(problem.prior.sample_many(1, seed=5), seed=3)[0]
    answer, samples = bundle.answer(y, 1), model.condition(y).sample(500, seed=2, progress=False)
    total = samples.map(lambda m: assemble(m * dx))
    assert abs(answer.values[:, 0].mean() - total.mean()) < 5 * total.std() * np.sqrt(2 / 500)
    assert 0.8 < answer.values[:, 0].std() / total.std() < 1.25


def test_family_at_its_sensors(tmp_path):
    mesh = UnitSquareMesh(6, 6)
    fixed = _problem(mesh)
    U = fixed.M
    probes = point_sensors(U, [(x, y) for x in np.linspace(0.1, 0.9, 6) for y in np.linspace(0.1, 0.9, 6)])
    family = InverseProblem(fixed.prior, fixed.forward, SensorFamily([SensorKind(probes, std=0.02, count=(1, 8))]))
    model = _model(family)
    sensors = point_sensors(U, POINTS, names=NAMES)
    with pytest.raises(InputError, match="family"):
        _export(model, tmp_path)
    bundle = _export(model, tmp_path, observation=sensors, noise=GaussianNoise(std=0.02), draws=4000)
    y = fixed.measurements(fixed.prior.sample_many(1, seed=5), seed=3)[0]
    y[1] = np.nan
    answer = bundle.answer(y, 1)
    assert not answer.doubts and answer.failed == ("probe 1",)
    total = model.condition(y, sensors, GaussianNoise(std=0.02)).sample(4000, seed=4, progress=False).map(
        lambda m: assemble(m * dx))
    assert abs(answer.values[:, 0].mean() - total.mean()) < 4 * total.std() * np.sqrt(2 / 4000)
    assert abs(answer.values[:, 0].std() / total.std() - 1) < 4 / np.sqrt(4000)


def test_what_cannot_be_carried_is_refused(linear, tmp_path):
    problem, M = linear.problem, linear.problem.M
    good = _quantities(problem)
    for quantities, words in (({}, "no quantities"), ({"a": 3}, "Largest"), ({"a": Largest(component=1)}, "has 1"),
                              ({"a": Largest(lambda x: x[0] > 9)}, "region"),
                              ({"a": point_sensors(M, POINTS)}, "one row"),
                              ({"a [K]": good["here"], "a": good["here"]}, "one name")):
        with pytest.raises(InputError, match=words):
            linear.export_monitor(tmp_path, quantities)
    with pytest.raises(InputError, match="fixed sensors"):
        linear.export_monitor(tmp_path, good, noise=0.1)
    with pytest.raises(InputError, match="leave plane out"):
        linear.export_monitor(tmp_path, good, plane=("z", 0.5))


def test_transforms_that_are_no_table_are_refused():
    V = FunctionSpace(UnitIntervalMesh(10), "CG", 1)
    x, = SpatialCoordinate(V.mesh())
    prior = GaussianPrior(V, std=0.4, correlation_length=0.4)
    for transform in (lambda f: f * (1 + x), lambda f: exp(x + f)):
        with pytest.raises(InputError, match="each node"):
            _tables(TransformedPrior(prior, transform), V.dim())
    with pytest.raises(InputError, match="each node"):
        _tables(HierarchicalPrior(V, lognorm(0.5), lognorm(0.5, scale=0.3)), V.dim())
    table, = _tables(TransformedPrior(prior, lambda f: f**2), V.dim())
    f = np.linspace(-1, 1, 44).reshape(4, 11)
    np.testing.assert_allclose(table.at(f), f**2, atol=1e-4)


def _wide(noise):
    """An emission that spans orders of magnitude, which the default call learns on scales of its own."""
    mesh = UnitSquareMesh(6, 6)
    V = FunctionSpace(mesh, "CG", 1)
    forward = AdvectionDiffusion(V, V, "source", Physics(diffusivity=0.3, reaction=lambda u: u), Boundary())
    prior = TransformedPrior(GaussianPrior(V, std=1.0, correlation_length=0.4), exp)
    return InverseProblem(prior, forward, point_sensors(V, POINTS, names=NAMES), noise)


LAWS = {"scales": GaussianNoise(std=0.02), "level": GaussianNoise(std=loguniform(0.005, 0.05)),
        "outliers": StudentNoise(0.02), "relative": GaussianNoise(std=0.005, relative=0.05),
        "joined": join_noise((2, GaussianNoise(std=loguniform(0.005, 0.05))), (2, StudentNoise(0.02))),
        "own": CallableNoise(lambda y, g: y + 0.02 * torch.randn(y.shape, generator=g, dtype=y.dtype))}


@pytest.mark.parametrize("name", LAWS)
def test_what_the_default_call_makes_is_carried_with_its_scales_and_noise(tmp_path, name):
    """The same seed gives the model's own samples, with all sensors and, where the model can, with one that failed."""
    problem = _wide(LAWS[name])
    model = _model(problem)
    if name == "scales":
        assert model.denoiser.readings is not None
    assert (model.denoiser.base.law is not None) == (name != "own")
    V = problem.forward.prior.V if problem.levels else problem.M
    asked = {"total [W]": functionals(V, [lambda m: m * dx]), "highest": Largest(lambda x: x[0] > 0.5)}
    if problem.levels:
        asked["noise of the sensors [K]"] = Largest(component=1)
    model.export_monitor(tmp_path, asked, draws=300, steps=20, moves=10)
    bundle = read_bundle(tmp_path)
    y = problem.measurements(problem.prior.sample_many(1, seed=5), seed=3)[0]
    for broken in [(), (2,)][:1 if name == "own" else 2]:
        y[list(broken)] = np.nan
        answer = bundle.answer(y, 7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = model.condition(y)
        samples = posterior.sample(300, seed=7, progress=False)
        assert not answer.doubts
        if name != "own":
            assert answer.distance.p == pytest.approx(posterior.distance.p)
        without = replace(bundle, tail=None).answer(y, 7).parameters
        truth = problem.prior.transform_many(model.basis.decode(samples.latents))
        assert np.abs(without - truth).max() <= 1e-3 * truth.std()
        total = samples.values[:, :V.dim()] @ coefficients(assemble(TestFunction(V) * dx).riesz_representation("l2"))
        assert abs(answer.values[:, 0].mean() - total.mean()) < 4 * total.std() * np.sqrt(2 / 300)
        assert abs(answer.values[:, 0].std() / total.std() - 1) < 0.25
        if problem.levels:
            np.testing.assert_allclose(answer.values[:, 2], truth[:, -1], rtol=1e-3)


def test_samples_that_do_not_explain_the_reading_fail_the_check_of_any_known_noise(tmp_path):
    problem = _wide(LAWS["level"])
    model = _model(problem)
    model.export_monitor(tmp_path, {"highest": Largest()})
    bundle = read_bundle(tmp_path)
    rng, doubted, seen = np.random.default_rng(0), 0, 40
    parameters = problem.prior.sample_many(seen, seed=11)
    for i, y in enumerate(problem.measurements(parameters, seed=12)):
        z = bundle._sample(bundle.emulated, y, i)
        doubted += bundle._explained(bundle.emulated, y, z) < 0.05
        if i < 5:
            far = y + 100 * problem.noise.levels[0].bounds[1] * rng.choice([-1, 1], 4)
            assert bundle._explained(bundle.emulated, far, z) < 1e-3
    assert doubted <= 12    # at most 4 of 40 are expected of right samples, more than 12 once in 10,000
