"""What a model is: as many modes as its readings can tell, at home on other meshes, seen in PETSc's log."""

from dataclasses import replace

import numpy as np
import pytest
from firedrake import (
    Constant, DirichletBC, Function, FunctionSpace, RectangleMesh, SpatialCoordinate, Submesh, as_vector, assemble, dx,
    exp,
)
from firedrake.petsc import PETSc

from fem_diffusion import (
    AdvectionDiffusion, Boundary, CallablePrior, DataSet, GaussianPrior, InverseProblem, Physics, SensorFamily,
    SensorKind, TrainingOptions, TransformedPrior, exact, fit, karhunen_loeve, load_model, point_sensors, pod, simulate,
)
from fem_diffusion.errors import InputError

NOISE = 0.05
Y = np.array([1.4, 1.2, 1.6, 1.3])
OPTIONS = TrainingOptions(steps=60, evaluate_every=30, width=16, depth=1)


def _gaussian(M):
    return GaussianPrior(M, std=0.3, correlation_length=1.0, mean=0.2, bcs=[DirichletBC(M, 0, "on_boundary")])


def _problem(n=6, prior=_gaussian):
    """A channel of 4 n by n cells with an unknown flux through its wall."""
    mesh = RectangleMesh(4 * n, n, 4.0, 1.0)
    V, M = FunctionSpace(mesh, "CG", 1), FunctionSpace(Submesh(mesh, 1, 3), "CG", 1)
    height = SpatialCoordinate(mesh)[1]
    physics = Physics(velocity=as_vector([6 * height * (1 - height), 0 * height]), diffusivity=0.1)
    forward = AdvectionDiffusion(V, M, ("flux", 3), physics, Boundary(dirichlet={1: 1.0}))
    sensors = point_sensors(V, [(1.0, 0.1), (1.0, 0.3), (3.0, 0.1), (3.0, 0.3)])
    return InverseProblem(prior(M), forward, sensors, NOISE)


@pytest.fixture(scope="module")
def job():
    problem = _problem()
    data = simulate(problem, 400, seed=1, progress=False)
    return problem, data, fit(problem, data, basis=karhunen_loeve(problem.prior, 3), options=OPTIONS, progress=False)


def _bump(M):
    """A prior that is no Gaussian, nor a transform of one."""
    x = SpatialCoordinate(M.mesh())[0]

    def draw(seed):
        centre, height = np.random.default_rng(seed).uniform([1.0, 0.1], [3.0, 1.0])
        return Function(M).interpolate(Constant(height) / (1 + 4 * (x - Constant(centre))**2))
    return CallablePrior(M, draw)


@pytest.mark.parametrize("prior, gaussian", [
    (_gaussian, True), (lambda M: TransformedPrior(_gaussian(M), exp), True), (_bump, False),
], ids=["Gaussian", "transformed", "callable"])
def test_a_model_chooses_its_modes(prior, gaussian, tmp_path):
    problem = _problem(prior=prior)
    data = simulate(problem, 200, seed=1, progress=False)
    model = fit(problem, data, options=OPTIONS, progress=False)
    assert 1 <= model.basis.r <= 50 and model.basis.standard_prior == gaussian
    truth = problem.prior.sample(12345)
    y = problem.observation(problem.forward(truth))
    samples = model.condition(y).sample(300, seed=0, progress=False)
    assert samples.V == problem.M and np.isfinite(samples.values).all()
    # Readings of the samples come near the measurement, as near as few pairs can teach.
    missed = problem.readings(samples.values) - y
    assert (missed**2).mean() < 0.2 * ((data.readings - y)**2).mean()
    # What modes leave out is drawn from a Gaussian prior only.
    cut = model.condition(y).sample(300, seed=0, refill=False, progress=False)
    np.testing.assert_array_equal(cut.latents, samples.latents)
    assert (np.abs(cut.values - samples.values).max() > 1e-6) == gaussian
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model", problem).condition(y).sample(3, seed=0, progress=False)
    np.testing.assert_allclose(again.values, model.condition(y).sample(3, seed=0, progress=False).values, atol=1e-6)


@pytest.mark.parametrize("n", [4, 12])
def test_a_model_moves_to_another_mesh_with_all_that_it_leaves_out(job, n):
    _, _, model = job
    there = _problem(n)
    moved = replace(model, problem=there, basis=karhunen_loeve(there.prior, model.basis.r))
    assert moved.tail is not None and moved.tail.rows.shape[1] != model.tail.rows.shape[1]
    assert moved.condition(Y).sample(1, seed=0, progress=False).V == there.M
    mean, std = exact(there, Y).mean(), exact(there, Y).std()
    errors = []
    for posterior in (moved.condition(Y), replace(moved.condition(Y), tail=None)):
        draws = posterior.sample(2000, seed=0, progress=False)
        errors.append([(assemble((found - right)**2 * dx) / assemble(right**2 * dx))**0.5
                       for found, right in ((draws.mean(), mean), (draws.std(), std))])
    # With the tail, the discretisation error of the mesh of the training and that of 2000 draws are left.
    assert max(errors[0]) < 0.1 < max(errors[1])


def test_what_does_not_belong_together_is_refused(job):
    problem, data, model = job
    there = _problem(4)
    for change, words in (({"problem": there}, "The basis is on"),
                          ({"basis": karhunen_loeve(there.prior, 3)}, "The basis is on"),
                          ({"basis": karhunen_loeve(problem.prior, 2)}, "2 modes and the model 3 latents")):
        with pytest.raises(InputError, match=words):
            replace(model, **change)
    with pytest.raises(InputError, match="leave observation and noise out"):
        model.condition(Y, problem.observation)
    with pytest.raises(InputError, match="leave observation and noise out"):
        model.condition(Y, noise=0.1)
    with pytest.raises(InputError, match="problem is of type ModalBasis"):
        load_model("model", model.basis)


def test_there_is_a_tail_only_where_the_readings_see_one(job):
    problem, data, model = job
    assert model.tail is not None
    y, few = data.readings[0], {"data": data, "options": OPTIONS, "progress": False}
    # All modes, or modes without a prior behind them, leave nothing to tell.
    assert fit(problem, basis=karhunen_loeve(problem.prior, 23), **few).tail is None
    assert fit(problem, basis=pod(problem.V, data.coefficients, 3), **few).tail is None
    # A plain function has no derivative: what is left out counts as noise.
    plain = fit(replace(problem, forward=lambda m: problem.forward(m)), basis=model.basis, **few)
    assert plain.tail is None and plain.condition(y).sample(2, seed=0, progress=False).latents.shape == (2, 3)


def test_readings_with_noise_of_the_data_need_no_law(job):
    problem, data, model = job
    problem = replace(problem, noise=None)
    noisy = DataSet(data.coefficients, data.readings + NOISE * np.random.default_rng(0).standard_normal((len(data), 4)))
    samples = fit(problem, noisy, basis=model.basis, options=OPTIONS, progress=False).condition(Y).sample(
        500, seed=0, progress=False)
    expected = model.condition(Y).sample(500, seed=0, refill=False, progress=False)
    for found, right in ((samples.latents.mean(axis=0), expected.latents.mean(axis=0)),
                         (samples.latents.std(axis=0), expected.latents.std(axis=0))):
        np.testing.assert_allclose(found, right, atol=0.25)


def test_a_family_has_readings_only_once_sensors_are_chosen(job):
    problem, *_ = job
    family = replace(problem, observation=SensorFamily(SensorKind(problem.observation, NOISE, (0, 4))), noise=None)
    assert family.family and family.k is None and family.names == () and "any sensors of a family" in repr(family)
    with pytest.raises(InputError, match="leave noise out"):
        replace(family, noise=NOISE)
    data = simulate(family, 60, seed=1, progress=False)
    assert data.readings.shape == (60, 0) and len(data.states) == 60
    # A measurement may hold none of them.
    none = fit(family, data, options=OPTIONS, progress=False).condition([]).problem
    assert none.k == 0 and none.readings(data.coefficients[:2]).shape == (2, 0)


def test_repr_is_short_and_tells_what_was_trained(job):
    problem, _, model = job
    assert repr(model).startswith("Model: 3 modes with ") and "4 fixed sensors" in repr(model)
    assert repr(model.condition(Y)).startswith("Posterior: Gaussian over 3 modes")
    for thing in (model, model.condition(Y)):
        assert repr(problem) in repr(thing) and len(repr(thing).splitlines()) == 3


def test_what_was_done_is_in_the_log_of_petsc(job):
    problem, data, _ = job
    PETSc.Log.begin()
    names = [f"fem_diffusion.{name}" for name in ("encode", "train", "sample")]
    before = [PETSc.Log.Event(name).getPerfInfo()["count"] for name in names]
    fit(problem, data, options=OPTIONS, progress=False).condition(Y).sample(2, seed=0, progress=False)
    after = [PETSc.Log.Event(name).getPerfInfo()["count"] for name in names]
    assert [b - a for a, b in zip(before, after)] == [1, 1, 1]
