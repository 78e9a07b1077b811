"""The job from prior to posterior on a small channel, and what happens to bad input."""

import copy
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
from firedrake import (
    CheckpointFile, Constant, DirichletBC, Function, FunctionSpace, RectangleMesh, SpatialCoordinate, Submesh,
    TestFunction, as_vector, assemble, dx,
)
from mpi4py import MPI

from fem_diffusion import (
    AdvectionDiffusion, Boundary, CallablePrior, DataSet, GaussianNoise, GaussianPrior, InverseProblem, Physics,
    Sampler, Samples, TrainingOptions, fit, karhunen_loeve, load_model, load_samples, point_sensors, pod, simulate,
)
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.comparison import moment_p_values
from fem_diffusion.reference.dense import linear_gaussian_posterior
from fem_diffusion.errors import DataError, FileError, InputError, InstallError

COMM = MPI.COMM_WORLD
NOISE = 0.05
Y = np.array([1.4, 1.2, 1.6, 1.3])
# Exact posterior mean and standard deviation of the flux through the whole wall.
WHOLE_WALL = (0.3784534101361481, 0.08061912119067892)
OPTIONS = TrainingOptions(steps=100, evaluate_every=50, width=16, depth=1)


def _problem(pairs=400):
    """A channel whose wall flux vanishes at both ends."""
    mesh = RectangleMesh(24, 6, 4.0, 1.0)
    wall = Submesh(mesh, 1, 3)
    V, M = FunctionSpace(mesh, "CG", 1), FunctionSpace(wall, "CG", 1)
    _, height = SpatialCoordinate(mesh)
    prior = GaussianPrior(M, std=0.3, correlation_length=1.0, mean=0.2, bcs=[DirichletBC(M, 0, "on_boundary")])
    forward = AdvectionDiffusion(V, M, ("flux", 3), Physics(velocity=as_vector([6 * height * (1 - height), 0 * height]),
                                                            diffusivity=0.1), Boundary(dirichlet={1: 1.0}))
    observation = point_sensors(V, [(1.0, 0.1), (1.0, 0.3), (3.0, 0.1), (3.0, 0.3)])
    problem = InverseProblem(prior, forward, observation, GaussianNoise(std=NOISE))
    return problem, simulate(problem, pairs, seed=1, progress=False)


@pytest.fixture(scope="module")
def job():
    problem, data = _problem()
    model = fit(problem, data, basis=karhunen_loeve(problem.prior, retained=0.99), options=OPTIONS, progress=False)
    return problem.prior, problem.forward, problem.observation, model, data


def _exact(prior, forward, observation):
    operator = forward.sensitivity(prior.mean, observation.rows)
    shift, covariance = linear_gaussian_posterior(operator, prior.covariance_matrix(), NOISE**2 * np.eye(4),
                                                  Y - observation(forward(prior.mean)))
    return coefficients(prior.mean) + shift, covariance


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_samples_have_the_exact_finite_element_posterior(job, alpha):
    prior, forward, observation, model, data = job
    mean, covariance = _exact(prior, forward, observation)
    inner = np.diag(covariance) > 1e-12
    part = covariance[np.ix_(inner, inner)]
    # With two modes only, what readings tell of all others is accounted for, too.
    few = fit(model.problem, data, basis=model.basis.leading(2), options=OPTIONS, progress=False)
    for model in (model, few):
        samples = model.condition(Y).sample(2000, seed=4, sampler=Sampler(alpha=alpha), progress=False)
        variances, axes = np.linalg.eigh(part)
        leading = axes[:, -8:]
        project = (samples.values[:, inner] - mean[inner]) @ leading
        assert min(moment_p_values(project, np.zeros(8), leading.T @ part @ leading)) > 1e-4
    # Without that account they are not those of the posterior.
    samples = replace(few.condition(Y), tail=None).sample(2000, seed=4, progress=False)
    project = (samples.values[:, inner] - mean[inner]) @ leading
    assert min(moment_p_values(project, np.zeros(8), leading.T @ part @ leading)) < 1e-8


def test_every_sample_satisfies_the_boundary_conditions(job):
    prior, *_, model, _ = job
    samples = model.condition(Y).sample(50, seed=4)
    for bc in prior.bcs:
        assert np.abs(samples.values[:, bc.nodes]).max() < 1e-12
    for function in (samples.mean(), samples.std(), samples.quantile(0.1)):
        assert np.abs(function.dat.data_ro[prior.bcs[0].nodes]).max() < 1e-12


def test_summaries_are_those_of_the_samples(job):
    samples = job[3].condition(Y).sample(200, seed=4)
    values = np.stack([coefficients(f) for f in samples])
    np.testing.assert_array_equal(values, samples.values)
    np.testing.assert_allclose(coefficients(samples.mean()), values.mean(0))
    np.testing.assert_allclose(coefficients(samples.std()), values.std(0, ddof=1))
    np.testing.assert_allclose(coefficients(samples.quantile(0.25)), np.quantile(values, 0.25, axis=0))
    assert len(samples) == 200 and samples.mean().function_space() == job[0].V


def test_seeds_reproduce(job):
    posterior = job[3].condition(Y)
    first, second, other = (posterior.sample(5, seed=s, sampler=Sampler(alpha=1.0)).values for s in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parallel([1, 2])
def test_ranks_give_the_same_summary():
    problem, data = _problem()
    model = fit(problem, data, options=OPTIONS, progress=False)
    n = 2000
    samples = model.condition(Y).sample(n, seed=4, sampler=Sampler(alpha=1.0), progress=False)
    total = np.array([assemble(f * dx) for f in samples])
    mean, std = WHOLE_WALL
    assert abs(total.mean() - mean) < 4 * std / np.sqrt(n)
    assert abs(total.std() / std - 1) < 4 / np.sqrt(2 * n)


def test_whole_wall_reference(job):
    prior, forward, observation, *_ = job
    mean, covariance = _exact(prior, forward, observation)
    weights = coefficients(assemble(TestFunction(prior.V) * dx).riesz_representation("l2"))
    np.testing.assert_allclose((weights @ mean, np.sqrt(weights @ covariance @ weights)), WHOLE_WALL, rtol=1e-6)


def test_model_reads_back_and_bad_files_are_refused(job, tmp_path):
    model = job[3]
    file = tmp_path / "model.safetensors"
    for model in (model, fit(model.problem, job[4], basis=model.basis.leading(2), options=OPTIONS, progress=False)):
        model.save(file)
        again = load_model(file, model.problem)
        np.testing.assert_equal(asdict(again.history), asdict(model.history))   # NaN where nothing was trained
        assert again.summary == model.summary
        np.testing.assert_allclose(again.condition(Y).sample(3, seed=0).values,
                                   model.condition(Y).sample(3, seed=0).values, rtol=0, atol=1e-6)
    content = file.read_bytes()
    for broken in (content[:len(content) // 2], b"foreign", b""):
        file.write_bytes(broken)
        with pytest.raises(FileError, match="no file that fem_diffusion reads|is damaged"):
            load_model(file, model.problem)
    with pytest.raises(FileError, match="cannot be read|No such file"):
        load_model(tmp_path / "missing", model.problem)
    model.save(file)
    with pytest.raises(FileError, match="another prior"):
        load_model(file, replace(model.problem, prior=GaussianPrior(job[0].V, 0.3, 0.5)))
    with pytest.raises(FileError, match="other sensors"):
        load_model(file, replace(model.problem, observation=point_sensors(job[2].U, [(1.0, 0.1)])))


def test_a_problem_says_what_it_is_and_a_model_what_was_trained(job, capfd):
    *_, model, data = job
    fit(model.problem, data, options=OPTIONS)
    written = capfd.readouterr().err
    assert "fit: 400 pairs" in written and "a linear emulator, no network under the Gaussian base" in written
    for thing in (model, model.condition(Y), model.problem, data):
        assert 0 < len(repr(thing).splitlines()) <= 4 and len(repr(thing)) < 500


def test_readings_of_samples_scatter_as_the_posterior_predictive(job):
    model = job[3]
    posterior = model.condition(Y)
    samples = posterior.sample(500, seed=3, progress=False)
    predicted = posterior.predictive(500, seed=3)
    clean = model.problem.readings(samples.values)
    assert predicted.shape == (500, 4)
    assert abs((predicted - clean).std() / NOISE - 1) < 4 / np.sqrt(2 * 2000)
    assert (np.abs((predicted - clean).mean(axis=0)) < 4 * NOISE / np.sqrt(500)).all()


def test_samples_are_saved_for_restart_and_viewing(job, tmp_path):
    pytest.importorskip("vtk")
    samples = job[3].condition(Y).sample(10, seed=0)
    samples.save(tmp_path, count=2)
    with CheckpointFile(str(tmp_path / "samples.h5"), "r") as file:
        mesh = file.load_mesh(job[0].V.mesh().name)
        loaded = file.load_function(mesh, "sample_1"), file.load_function(mesh, "mean")
    for ours, theirs in zip((samples[1], samples.mean()), loaded):
        assert abs(assemble(ours**2 * dx) - assemble(theirs**2 * dx)) < 1e-12
    assert (tmp_path / "summary.pvd").exists()


@pytest.mark.parametrize("y, words", [
    (np.ones(3), "each of the 4 sensors"), (np.ones((2, 3)), "each of the 4 sensors"), (None, "each of the 4 sensors"),
    ([1.0, np.nan, 1.0, np.inf], r"sensor \(3, 0.3\) \(inf\)"), ([1, 2, [3], 4], "each of the 4"),
    ([1.0, 1.0, 1.0, 1e200], r"too large to calculate with: sensor \(3, 0.3\) \(1e\+200\).*other units"),
    (np.ones(4) * 1j, "type complex128"), (list("abcd"), "real number for each"),
])
def test_bad_measurements_are_refused(job, y, words):
    with pytest.raises(InputError, match=words):
        job[3].condition(y)


def test_density_of_the_samples_is_that_of_the_exact_posterior(job):
    model = job[3]
    posterior = model.condition(Y)
    samples = posterior.sample(300, seed=4)
    found = posterior.log_density(samples)
    # E log p is minus the entropy, which the base knows exactly here: a linear map and a Gaussian prior.
    r = model.basis.r
    entropy = r / 2 * (1 + np.log(2 * np.pi)) + float(posterior.conditioned.located.log_determinant[0])
    assert found.shape == (300,) and abs(found.mean() + entropy) < 4 * np.sqrt(r / 2 / 300)
    with pytest.raises(InputError, match="z has the shape"):
        posterior.log_density(Samples(samples.V, samples.values, samples.latents[:, :2]))


def test_progress_of_the_sampler_can_be_followed(job):
    seen = []
    job[3].condition(Y).sample(5, seed=0, sampler=Sampler(steps=7),
                               callback=lambda step, sigma, z: seen.append((step, sigma, z.shape)))
    assert [step for step, *_ in seen] == list(range(1, 8))
    assert seen[-1][1] == 0.0 and seen[0][2] == (1, 5, job[3].basis.r)


def test_bad_numbers_and_data_are_refused(job):
    posterior, data, problem = job[3].condition(Y), job[4], job[3].problem
    with pytest.raises(InputError):
        posterior.sample(0, seed=0)
    with pytest.raises(InputError, match="at least 0 and at most 1"):
        posterior.sample(5, seed=0).quantile(1.5)
    with pytest.raises(DataError, match="simulate first"):
        fit(problem, DataSet(data.coefficients[:0], data.readings[:0]))
    with pytest.raises(DataError, match="simulate first"):
        fit(problem, DataSet(data.coefficients[:5], data.readings[:4]))
    with pytest.raises(InputError, match="more"):
        fit(problem, DataSet(data.coefficients[:4], data.readings[:4]), basis=job[3].basis)


def test_a_prior_of_the_users_own_goes_through(job):
    _, forward, observation, *_ = job
    M = forward.M
    x = SpatialCoordinate(M.mesh())[0]

    def bump(seed):
        centre, height = np.random.default_rng(seed).uniform([1.0, 0.1], [3.0, 1.0])
        # Constants, not numbers: the kernel is compiled once.
        return Function(M).interpolate(Constant(height) / (1 + 4 * (x - Constant(centre))**2))
    prior = CallablePrior(M, bump)
    problem = InverseProblem(prior, forward, observation, NOISE)
    data = simulate(problem, 300, seed=0, progress=False)
    model = fit(problem, data, basis=pod(M, data.coefficients, 6), options=OPTIONS, progress=False)
    truth = bump(12345)
    y = observation(forward(truth)) + NOISE * np.random.default_rng(0).standard_normal(4)
    samples = model.condition(y).sample(500, seed=1)
    error = assemble((samples.mean() - truth)**2 * dx) / assemble(truth**2 * dx)
    assert error < 0.15 and np.isfinite(samples.latents).all()


def test_a_basis_of_another_prior_is_noticed(job):
    prior, _, _, model, data = job
    # The same law, built anew, is no other one.
    same = GaussianPrior(prior.V, std=0.3, correlation_length=1.0, mean=0.2, bcs=prior.bcs)
    fit(model.problem, data, basis=karhunen_loeve(same, 5), options=OPTIONS, progress=False)
    for std, length, mean in ((0.45, 1.0, 0.2), (0.3, 0.5, 0.2), (0.3, 1.0, 0.4)):
        other = GaussianPrior(prior.V, std=std, correlation_length=length, mean=mean, bcs=prior.bcs)
        with pytest.raises(DataError, match="no draws of the prior behind the basis.*prior of the simulation"):
            fit(model.problem, data, basis=karhunen_loeve(other, 5), options=OPTIONS, progress=False)
    # Small differences show in all latents together.
    z = 1.05 * np.random.default_rng(0).standard_normal((1000, 20))
    with pytest.raises(DataError, match="no draws of the prior"):
        karhunen_loeve(same, 20).check_draws(z)
    # 200 draws of the prior itself pass, however few and however many latents.
    for n in (2, 5, 20, 400):
        for seed in range(50):
            model.basis.check_draws(np.random.default_rng(seed).standard_normal((n, 40)))


def test_a_basis_of_another_prior_is_noticed_where_a_few_samples_are_missing(job):
    prior, _, _, model, data = job
    kept = np.arange(len(data)) >= 8
    few = DataSet(data.coefficients[kept], data.readings[kept], None, tuple((i, "no solution") for i in range(8)))
    assert fit(model.problem, few, basis=model.basis, options=OPTIONS, progress=False).denoiser.base.r == model.basis.r
    for std, mean in ((0.9, 0.2), (0.1, 0.2), (0.3, 1.0)):
        other = GaussianPrior(prior.V, std=std, correlation_length=1.0, mean=mean, bcs=prior.bcs)
        with pytest.raises(DataError, match="no draws of the prior"):
            fit(model.problem, few, basis=karhunen_loeve(other, 5), options=OPTIONS, progress=False)


def test_latents_of_a_simulation_with_holes_are_not_taken_for_standard_normal(job):
    """Where the solver fails for every second sample, the prior of the data is that of the others."""
    _, _, observation, model, data = job
    z = model.basis.encode(data.coefficients)[:, 0]
    kept = z > 0
    skipped = tuple((int(i), "") for i in np.flatnonzero(~kept))
    holes = DataSet(data.coefficients[kept], data.readings[kept], None, skipped)
    problem = replace(model.problem, noise=GaussianNoise(std=10.0))
    located = fit(problem, holes, basis=model.basis, options=OPTIONS, progress=False).condition(Y).conditioned.located
    # With next to no information the base is the law of the data: a half-normal one.
    assert abs(float(located.mean[0, 0]) - np.sqrt(2 / np.pi)) < 4 * 0.6 / np.sqrt(kept.sum())
    assert abs(float(located.covariance[0, 0, 0]) - (1 - 2 / np.pi)) < 0.1


def test_samples_are_sliced_saved_and_read(job, tmp_path):
    samples = job[3].condition(Y).sample(10, seed=0)
    part = samples[2:8:3]
    assert len(part) == 2 and part.latents.shape == (2, job[3].basis.r)
    np.testing.assert_array_equal(part.values, samples.values[[2, 5]])
    np.testing.assert_array_equal(coefficients(samples[-1]), samples.values[9])
    assert samples[np.int64(1)].name() == "sample_1" and len(list(samples)) == 10
    for call in (lambda x: x.mean(), lambda x: x.quantile(0.5), lambda x: x.save(tmp_path / "n"), lambda x: x.plot()):
        with pytest.raises(InputError, match="no samples"):
            call(samples[:0])
    assert not (tmp_path / "n").exists()
    mask = np.arange(10) % 3 == 0
    np.testing.assert_array_equal(samples[mask].values, samples.values[mask])
    np.testing.assert_array_equal(samples[[4, -1]].values, samples.values[[4, 9]])
    for index in ("a", 1.0, True, None):
        with pytest.raises(InputError, match="numbered by integers, slices"):
            samples[index]
    for index in ([99], mask[:3], [0.5], [[1]]):
        with pytest.raises(InputError, match="no such choice|in one dimension"):
            samples[index]
    for count, expected in ((None, 10), (3, 3), (99, 10)):
        try:
            samples.save(tmp_path / "s", count=count)
        except InstallError:    # without VTK
            pass
        read = load_samples(tmp_path / "s", samples.V)
        np.testing.assert_array_equal(read.values, samples.values[:expected])
        np.testing.assert_array_equal(read.latents, samples.latents[:expected])
    for count in (0, 2.5, -1):
        with pytest.raises(InputError, match="count is"):
            samples.save(tmp_path / "t", count=count)
    with pytest.raises(FileError, match="another mesh or space.*Pass the space"):
        load_samples(tmp_path / "s", FunctionSpace(job[0].V.mesh(), "CG", 2))
    with pytest.raises(InputError, match="give the folder"):
        load_samples(tmp_path / "s" / "samples.safetensors", samples.V)
    with pytest.raises(FileError, match="No such file"):
        load_samples(tmp_path / "t", samples.V)


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_holds_a_mesh_says_how_to_keep_it(job, copying):
    model = job[3]
    posterior = model.condition(Y)
    for thing, words in ((model, "load_model"), (model.basis, "load_basis"), (posterior, "save the model"),
                         (posterior.sample(2, seed=0), "load_samples")):
        with pytest.raises(InputError, match=f"cannot be copied or pickled: .*{words}"):
            copying(thing)


@pytest.mark.parametrize("change, words", [
    ({"n": 2.5}, "n is 2.5"), ({"n": None}, "n is None"), ({"n": True}, "n is True"), ({"seed": None}, "seed is None"),
    ({"seed": -1}, "seed is -1"), ({"seed": 0.5}, "seed is 0.5"), ({"refill": "no"}, "refill is 'no'"),
    ({"refill": 1}, "refill is 1"), ({"device": "cuda:99"}, "device is 'cuda:99'"),
    ({"device": "gpu"}, "device is 'gpu'"), ({"progress": "yes"}, "progress is 'yes'"), ({"sampler": 20}, "Sampler"),
])
def test_bad_arguments_of_sample_are_refused(job, change, words):
    with pytest.raises(InputError, match=words):
        job[3].condition(Y).sample(**{"n": 2, "seed": 0, **change})


@pytest.mark.parametrize("arguments, words", [
    ({"data": None}, "data is of type NoneType"), ({"basis": 5}, "basis is of type int"),
    ({"problem": "small"}, "problem is of type str"), ({"options": {"steps": 5}}, "TrainingOptions"),
    ({"state_modes": 5}, "state_modes is for families"),
    ({"network": None}, "network is None"), ({"progress": "no"}, "progress is 'no'"),
])
def test_bad_arguments_of_fit_are_refused(job, arguments, words):
    *_, model, data = job
    with pytest.raises(InputError, match=words):
        fit(**{"problem": model.problem, "data": data, "basis": model.basis, "options": OPTIONS, **arguments})
