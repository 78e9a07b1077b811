"""What a model is: as many modes as its readings can tell, at home on other meshes, seen in PETSc's log."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from firedrake import (
    Constant, DirichletBC, Function, FunctionSpace, RectangleMesh, SpatialCoordinate, Submesh, as_vector, assemble, dx,
    exp,
)
from firedrake.petsc import PETSc

from fem_diffusion import (
    AdvectionDiffusion, Boundary, CallablePrior, DataSet, GaussianNoise, GaussianPrior, InverseProblem, Physics,
    ProductPrior, SensorFamily, SensorKind, TrainingOptions, TransformedPrior, exact, fit, karhunen_loeve, load_model,
    point_sensors, pod, simulate,
)
from fem_diffusion.diffusion import History, MeanNetwork, ResidualMLP
from fem_diffusion.errors import DataError, FileError, InputError

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
    if gaussian:
        other = replace(problem, prior=TransformedPrior(problem.prior, lambda f: 2 * f))
        with pytest.raises(FileError, match="another transform"):
            load_model(tmp_path / "model", other)


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


def test_what_does_not_belong_together_is_refused(job, tmp_path):
    problem, data, model = job
    there, fewer = _problem(4), problem.observation[[0, 1, 2]]
    other = GaussianPrior(problem.M, std=0.5, correlation_length=1.0, mean=0.2, bcs=problem.prior.bcs)
    # The same law, built anew, is no other one.
    replace(model, problem=replace(problem, prior=_gaussian(problem.M)))
    for change, words in (({"problem": there}, "The basis is on"),
                          ({"basis": karhunen_loeve(there.prior, 3)}, "The basis is on"),
                          ({"basis": karhunen_loeve(problem.prior, 2)}, "2 modes and the model 3 latents"),
                          ({"basis": karhunen_loeve(other, 3)}, "another prior"),
                          ({"problem": replace(problem, prior=other)}, "another prior"),
                          ({"problem": replace(problem, observation=fewer)}, "has 3 sensors and the model 4")):
        with pytest.raises(InputError, match=words):
            replace(model, **change)
    with pytest.raises(InputError, match="leave observation and noise out"):
        model.condition(Y, problem.observation)
    with pytest.raises(InputError, match="leave observation and noise out"):
        model.condition(Y, noise=0.1)
    with pytest.raises(InputError, match="problem is of type ModalBasis"):
        load_model("model", model.basis)
    with pytest.raises(InputError, match="samples is of type ndarray"):
        model.condition(Y).log_density(np.zeros((2, 3)))
    with pytest.raises(DataError, match="readings of 4 sensors and the problem has 3"):
        fit(replace(problem, observation=fewer), data)
    with pytest.raises(DataError, match="fields of another space"):
        fit(there, data)
    with pytest.raises(InputError, match="The basis is on"):
        fit(problem, data, basis=karhunen_loeve(there.prior, 3))
    model.save(tmp_path / "model")
    reverse = problem.observation[[3, 2, 1, 0]]
    for change, words in (({"observation": reverse}, "sensors"), ({"noise": 5.0}, "noise"), ({"noise": None}, "noise")):
        with pytest.raises(FileError, match=f"trained for other {words}"):
            load_model(tmp_path / "model", replace(problem, **change))


def test_there_is_a_tail_only_where_the_readings_see_one(job):
    problem, data, model = job
    assert model.tail is not None
    few = {"data": data, "options": OPTIONS, "progress": False}
    # All modes, or modes without a prior behind them, leave nothing to tell.
    assert fit(problem, basis=karhunen_loeve(problem.prior, 23), **few).tail is None
    assert fit(problem, basis=pod(problem.V, data.coefficients, 3), **few).tail is None
    # Relative noise counts by its mean.
    noise = GaussianNoise(std=NOISE, relative=0.01)
    assert fit(replace(problem, noise=noise), basis=model.basis, **few).tail is not None
    # Behind a transform the law of the rest is not Gaussian.
    prior = TransformedPrior(problem.prior, lambda m: 1 * m)
    with pytest.warns(UserWarning, match="3 modes leave up to .* unexplained.*take more modes"):
        assert fit(replace(problem, prior=prior), basis=karhunen_loeve(prior, 3), **few).tail is None


def test_pairs_tell_of_the_rest_where_the_solver_has_no_derivative(job, tmp_path):
    problem, data, model = job
    plain = replace(problem, forward=lambda m: problem.forward(m))
    found = fit(plain, data, basis=model.basis, options=OPTIONS, progress=False)
    ours, right = (one.tail.rows @ model.basis.scaled_modes.T for one in (found, model))
    np.testing.assert_allclose(ours, right, atol=1e-5)
    found.save(tmp_path / "model")
    mean, std = exact(problem, Y).mean(), exact(problem, Y).std()
    for one in (found, load_model(tmp_path / "model", plain)):
        draws = one.condition(Y).sample(2000, seed=0, progress=False)
        for ours, right in ((draws.mean(), mean), (draws.std(), std)):
            assert (assemble((ours - right)**2 * dx) / assemble(right**2 * dx))**0.5 < 0.1
    there = _problem(4)
    with pytest.raises(InputError, match="belongs to the mesh of the training: give rows=None"):
        replace(found, problem=there, basis=karhunen_loeve(there.prior, 3))


def test_a_solver_may_write_into_the_rows_that_it_gets(job):
    problem, _, model = job
    before = problem.observation.rows.toarray()

    class Careless:
        M, U = problem.forward.M, problem.forward.U

        def __call__(self, m):
            return problem.forward(m)

        def solve_many(self, parameters):
            return problem.forward.solve_many(parameters)

        def sensitivity(self, m, rows):
            found = problem.forward.sensitivity(m, rows)
            rows.data[:] = 0
            return found
    np.testing.assert_allclose(replace(model, problem=replace(problem, forward=Careless())).tail.rows, model.tail.rows)
    np.testing.assert_array_equal(problem.observation.rows.toarray(), before)


def test_a_product_with_a_prior_of_no_known_law_has_pod_modes(job):
    problem, *_ = job
    V, M = problem.U, problem.M
    prior = ProductPrior([problem.prior, CallablePrior(
        M, lambda seed: Function(M).assign(np.random.default_rng(seed).uniform()))])

    def forward(m):
        first, second = m.subfunctions
        return problem.forward(Function(M).assign(first + second))
    both = InverseProblem(prior, forward, point_sensors(V, [(1.0, 0.1), (3.0, 0.1)]), NOISE)
    data = simulate(both, 100, seed=1, progress=False)
    assert not fit(both, data, options=OPTIONS, progress=False).basis.standard_prior


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
        assert repr(problem) in repr(thing) and len(repr(thing).splitlines()) == 2


def test_a_model_of_several_networks_tells_so_and_is_saved_whole(job, tmp_path):
    problem, _, model = job
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = [ResidualMLP(3, 4, 8, 1) for _ in range(2)]
    for x in (parameter for network in networks for parameter in network.parameters()):
        x.data += 0.1
    several = replace(model, denoiser=replace(model.denoiser, network=MeanNetwork(networks).requires_grad_(False)),
                      history=History([10], [1.0], [0.9], 1.0, 10))
    assert "the mean of 2 networks, which takes 10.0% off the loss" in several.summary
    several.save(tmp_path / "model")
    loaded = load_model(tmp_path / "model", problem)
    draws = [m.condition(Y).sample(20, seed=1, progress=False).latents for m in (several, loaded, model)]
    np.testing.assert_allclose(draws[1], draws[0], rtol=0, atol=1e-10)
    assert np.abs(draws[2] - draws[0]).max() > 0.01


def test_what_was_done_is_in_the_log_of_petsc(job):
    problem, data, _ = job
    PETSc.Log.begin()
    names = [f"fem_diffusion.{name}" for name in ("encode", "train", "sample")]
    before = [PETSc.Log.Event(name).getPerfInfo()["count"] for name in names]
    fit(problem, data, options=OPTIONS, progress=False).condition(Y).sample(2, seed=0, progress=False)
    after = [PETSc.Log.Event(name).getPerfInfo()["count"] for name in names]
    assert [b - a for a, b in zip(before, after)] == [1, 1, 1]
