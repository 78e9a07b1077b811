"""One model for many observation operators, on a small channel: exact posteriors of unseen layouts, and bad input."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from firedrake import (
    Function, FunctionSpace, RectangleMesh, SpatialCoordinate, Submesh, UnitSquareMesh, as_vector, ds, exp,
)
from mpi4py import MPI

from fem_diffusion import (
    AdvectionDiffusion, Boundary, CallableNoise, DataSet, FamilyWarning, GaussianNoise, GaussianPrior, InverseProblem,
    MeasurementWarning, Physics, Sampler, SensorFamily, SensorKind, TimeSteps, TrainingOptions, TransformedPrior,
    TransientAdvectionDiffusion, exact, fit, functionals, karhunen_loeve, line_averages, load_model, patch_averages,
    point_sensors, random_points, simulate,
)
from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import SensorNetwork, Spectrum, as_noise
from fem_diffusion.diffusion.base.layouts import decorrelated
from fem_diffusion.prior.protocol import GaussianCore
from fem_diffusion.errors import DataError, InputError, FileError
from fem_diffusion.fields.coefficients import coefficients, field

COMM = MPI.COMM_WORLD
NOISE = 0.05
OPTIONS = TrainingOptions(steps=100, evaluate_every=50, width=16, depth=1)


def _problem(pairs=300, transform=None):
    mesh = RectangleMesh(24, 6, 4.0, 1.0)
    V, M = FunctionSpace(mesh, "CG", 1), FunctionSpace(Submesh(mesh, 1, 3), "CG", 1)
    _, height = SpatialCoordinate(mesh)
    prior = GaussianPrior(M, std=0.3, correlation_length=1.0, mean=0.2)
    prior = prior if transform is None else TransformedPrior(prior, transform)
    forward = AdvectionDiffusion(V, M, ("flux", 3), Physics(velocity=as_vector([6 * height * (1 - height), 0 * height]),
                                                            diffusivity=0.1), Boundary(dirichlet={1: 1.0}))
    problem = InverseProblem(prior, forward, _family(V))
    return problem, simulate(problem, pairs, seed=1, progress=False)


def _family(V):
    """Probes at random places, wide averages along lines, and one mean over the outflow."""
    mesh = V.mesh()
    start = np.random.default_rng(0).uniform(0.1, 3.9, 40)
    lines = line_averages(V, np.stack([start, 0 * start], 1), np.stack([start, 0 * start + 1], 1))
    return SensorFamily([SensorKind(point_sensors(V, random_points(mesh, 200, seed=1)), (0.02, 0.1), (0, 8)),
                         SensorKind(lines, NOISE, (0, 3)),
                         SensorKind(functionals(V, [lambda u: u * ds(2)]), NOISE, (0, 1))])


@pytest.fixture(scope="module")
def job():
    problem, data = _problem()
    model = fit(problem, data, basis=karhunen_loeve(problem.prior, retained=0.99), options=OPTIONS, progress=False)
    return problem.prior, problem.forward, problem.U, data, model


def _p_values(posterior, right, basis, seed=3):
    """How well latents agree with those of the exact posterior, whose moments follow from the basis."""
    samples = posterior.sample(3000, seed=seed, progress=False)
    operator = COMM.allreduce(right.rows @ basis.scaled_modes.T)
    covariance = np.linalg.inv(np.eye(basis.r) + operator.T @ operator)
    return moment_p_values(samples.latents, basis.encode([right.mean()])[0], covariance)


@pytest.mark.parallel([1, 2])
def test_layouts_never_seen_have_the_exact_posterior():
    problem, data = _problem()
    prior, forward, V = problem.prior, problem.forward, problem.U
    assert data.readings.shape == (300, 0) and problem.family and problem.k is None
    basis = karhunen_loeve(prior, 5)
    model = fit(problem, _spanned(basis, forward, 300), basis=basis, options=OPTIONS, progress=False)
    assert model.history.best_step == 0
    points = point_sensors(V, [(0.7, 0.2), (1.9, 0.15), (3.3, 0.4)])
    line = line_averages(V, [(2.5, 0.0)], [(2.5, 1.0)])
    cases = (points, 0.05), (line, 0.05), (points + line, [0.02, 0.05, 0.1, 0.03])
    for number, (observation, std) in enumerate(cases):
        # A truth in the span of the modes, so that the posterior in latents is exact as well.
        truth = basis.functions(torch.randn(1, 5, generator=torch.Generator().manual_seed(number)))[0]
        y = observation(forward(truth)) + 0.03
        right = exact(InverseProblem(_Spanned(basis, prior), forward, observation, std), y)
        posterior = model.condition(y, observation, GaussianNoise(std=std))
        assert min(_p_values(posterior, right, basis)) > 1e-4
        # The same sampler with readings in another order is wrong, and is seen to be.
        if len(y) > 1:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MeasurementWarning)
                wrong = model.condition(y[::-1].copy(), observation, GaussianNoise(std=std))
            assert min(_p_values(wrong, right, basis)) < 1e-6


def test_a_posterior_that_is_not_gaussian_is_refused():
    problem, _ = _problem(pairs=1)
    prior, forward, V = problem.prior, problem.forward, problem.U
    curved = AdvectionDiffusion(V, prior.V, ("flux", 3), Physics(diffusivity=0.1),
                                Boundary(dirichlet={1: 1.0}, flux={3: lambda m: m**2}))
    points = point_sensors(V, [(0.7, 0.2), (1.9, 0.15)])
    assert exact(InverseProblem(prior, forward, points, 0.05), [1.0, 1.0]).std().dat.data_ro.min() > 0
    with pytest.raises(InputError, match="not affine"):
        exact(InverseProblem(prior, curved, points, 0.05), [1.0, 1.0])


def _spanned(basis, forward, n):
    """States of fields in the span of the modes: what lies outside would count as noise, unknown to the reference."""
    z = torch.randn(n, basis.r, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fields = basis.decode(z)
    return DataSet(fields, np.empty((n, 0)), forward.solve_many(fields))


class _Spanned(GaussianCore):
    """The prior without what its basis leaves out."""

    def __init__(self, basis, prior):
        self.V, self.mean, self.basis, self.bcs = prior.V, prior.mean, basis, prior.bcs

    def sample_many(self, n, seed):
        z = torch.randn(n, self.basis.r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.basis.decode(z)

    def apply_covariance(self, rows):
        return COMM.allreduce(rows @ self.basis.scaled_modes.T) @ self.basis.scaled_modes


def test_failed_sensors_are_left_out_and_none_leave_the_prior(job):
    prior, forward, V, _, model = job
    points = point_sensors(V, [(0.7, 0.2), (1.9, 0.15), (3.3, 0.4)])
    y = points(forward(prior.mean))
    noise = GaussianNoise(std=[0.05, 0.02, 0.05])
    failed = model.condition([y[0], np.nan, y[2]], points, noise).sample(50, seed=0)
    less = model.condition(y[[0, 2]], points[[0, 2]], GaussianNoise(std=0.05)).sample(50, seed=0)
    np.testing.assert_allclose(failed.values, less.values, rtol=1e-9)
    # The problem is that of the sensors that are there, whatever their noise is.
    covariance = np.array([[4.0, 0.0, 1.0], [0.0, 4.0, 0.0], [1.0, 0.0, 9.0]]) * 1e-4
    for law, same in ((noise, [0.05, 0.05]), (GaussianNoise(covariance=covariance), None),
                      (GaussianNoise(0.05, relative=[0.1, 0.2, 0.3]), GaussianNoise(0.05, relative=[0.1, 0.3]))):
        posterior = model.condition([y[0], np.nan, y[2]], points, law)
        problem, two = posterior.problem, torch.tensor(y[[0, 2]])[None]
        expected = GaussianNoise(covariance=covariance[::2, ::2]) if same is None else as_noise(same)
        np.testing.assert_array_equal(posterior.y, y[[0, 2]])
        np.testing.assert_allclose(problem.noise.covariance(two), expected.covariance(two))
        assert problem.k == 2 and problem.names == (points.names[0], points.names[2])
        np.testing.assert_allclose(problem.readings(prior.mean.dat.data_ro[None]), two)
    for nothing in (model.condition([]), model.condition(3 * [np.nan], points, noise)):
        assert nothing.problem.k == 0 and nothing.y.shape == (0,)
        latents = nothing.sample(3000, seed=1).latents
        assert min(moment_p_values(latents, np.zeros(model.basis.r), np.eye(model.basis.r))) > 1e-4


def test_repeated_sensors_and_singular_noise_are_answered(job):
    prior, forward, V, _, model = job
    twice = point_sensors(V, [(0.7, 0.2), (0.7, 0.2)])
    y = twice(forward(prior.mean))
    repeated = model.condition(y, twice, GaussianNoise(std=0.05)).sample(50, seed=0)
    once = model.condition(y[:1], twice[[0]], GaussianNoise(std=0.05 / 2**0.5)).sample(50, seed=0)
    np.testing.assert_allclose(repeated.values, once.values, rtol=1e-6, atol=1e-8)
    # Perfectly correlated noise: two sensors that err together say no more than one.
    together = model.condition(y, twice, GaussianNoise(covariance=0.05**2 * np.ones((2, 2)))).sample(50, seed=0)
    alone = model.condition(y[:1], twice[[0]], GaussianNoise(std=0.05)).sample(50, seed=0)
    np.testing.assert_allclose(together.values, alone.values, rtol=1e-3, atol=1e-3)
    assert np.isfinite(together.values).all()
    # A sensor without noise among correlated ones pins its own reading and spares the others.
    three = point_sensors(V, [(0.7, 0.2), (1.9, 0.15), (3.3, 0.4)])
    covariance = 0.05**2 * np.array([[1, 0, 0.5], [0, 0, 0], [0.5, 0, 1]])
    y = three(forward(prior.mean)) + [0.02, 0.01, -0.02]
    with pytest.warns(FamilyWarning, match="noise over prior signal"):
        pinned = model.condition(y, three, GaussianNoise(covariance=covariance)).sample(50, seed=0, refill=False)
    readings = three.apply(forward.solve_many(pinned.values))
    # What modes past the last one add to a reading is all that is left.
    assert readings[:, 1].std() < 0.2 * readings[:, 0].std() and readings[:, 0].std() < 0.06


def test_noise_far_below_the_prior_spread_counts_as_given():
    rows = torch.tensor([[100.0, 0.0], [0.0, 50.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    for covariance in (torch.diag(torch.tensor([1e-6, 4e-6])), torch.tensor([[1e-6, 1e-6], [1e-6, 4e-6]])):
        sensors, _ = decorrelated(rows, zero, covariance.double(), zero)
        information = sensors.rows[0].T / sensors.variance[0] @ sensors.rows[0]
        exact = rows.T @ torch.linalg.solve(covariance.double(), rows)
        torch.testing.assert_close(information, exact, rtol=1e-4, atol=1)


def test_a_far_operator_is_told_with_the_measure_of_distance(job):
    prior, forward, V, _, model = job
    state = forward(prior.mean)
    near = point_sensors(V, [(0.7, 0.2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.condition(near(state), near, GaussianNoise(std=0.05))
    difference = functionals(V, [lambda u: u.dx(1) * ds(2)], names=["slope"])
    with pytest.warns(FamilyWarning, match=r"slope.*1 - squared correlation"):
        model.condition(difference(state), difference, GaussianNoise(std=0.05))
    with pytest.warns(FamilyWarning, match="noise over prior signal"):
        model.condition(near(state), near, GaussianNoise(std=1e-4))
    many = point_sensors(V, random_points(V.mesh(), 40, seed=4))
    with pytest.warns(FamilyWarning, match="times the most"):
        samples = model.condition(many(state), many, GaussianNoise(std=0.05)).sample(20, seed=0)
    assert np.isfinite(samples.values).all()


def test_a_saved_model_answers_as_before(job, tmp_path):
    prior, forward, V, _, model = job
    points = point_sensors(V, [(0.7, 0.2), (1.9, 0.15)])
    y, noise = points(forward(prior.mean)), GaussianNoise(std=0.05)
    file = tmp_path / "model.safetensors"
    model.save(file)
    again = load_model(file, model.problem)
    assert again.range.std == model.range.std and again.summary == model.summary
    np.testing.assert_allclose(again.condition(y, points, noise).sample(20, seed=0).values,
                               model.condition(y, points, noise).sample(20, seed=0).values, rtol=1e-9)
    with pytest.raises(FileError, match="another prior"):
        load_model(file, replace(model.problem, prior=GaussianPrior(prior.V, 0.3, 0.5, mean=0.2)))
    finer = FunctionSpace(V.mesh(), "CG", 2)
    forward = AdvectionDiffusion(finer, prior.V, ("flux", 3), Physics(diffusivity=0.1), Boundary(dirichlet={1: 1.0}))
    with pytest.raises(FileError, match="another mesh"):
        load_model(file, InverseProblem(prior, forward, _family(finer)))
    with pytest.raises(FileError, match="other sensors"):
        load_model(file, InverseProblem(prior, model.problem.forward, points, noise))
    content = file.read_bytes()
    for broken in (content[:len(content) // 2], b"", b"no model"):
        file.write_bytes(broken)
        with pytest.raises(FileError, match="no file that fem_diffusion reads|is damaged"):
            load_model(file, model.problem)


def test_a_network_and_an_emulator_survive_the_file(tmp_path):
    problem, data = _problem(600, exp)
    V = problem.U
    family = SensorFamily(SensorKind(patch_averages(V, random_points(V.mesh(), 60, seed=2), 0.3), NOISE, (1, 6)))
    problem = replace(problem, observation=family)
    model = fit(problem, data, basis=karhunen_loeve(problem.prior, 4), progress=False,
                options=TrainingOptions(steps=60, evaluate_every=30, width=32, depth=2))
    assert model.denoiser.base.emulator.head is not None
    # So little training may keep no network; any weights will do here.
    torch.manual_seed(0)
    network = SensorNetwork(4, model.states.r, 16, 1)
    torch.nn.init.normal_(network.flow.head.weight, std=0.05)
    spectrum = Spectrum(torch.tensor([0.5]).double(), torch.tensor([0.3]).double())
    model = replace(model, denoiser=replace(model.denoiser, network=network.requires_grad_(False), spectrum=spectrum))
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model", problem)
    patch = patch_averages(V, [(1.0, 0.3), (2.0, 0.3)], 0.3)
    drawn = {}
    for corrections in (0, 2):
        one, two = (m.condition([1.5, 1.6], patch, GaussianNoise(std=NOISE)).sample(
            20, seed=0, sampler=Sampler(corrections=corrections)) for m in (model, again))
        np.testing.assert_allclose(one.values, two.values, rtol=1e-6)
        drawn[corrections] = one.values
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3


@pytest.mark.slow
def test_time_series_of_a_transient_state_are_sensors_too():
    mesh = RectangleMesh(16, 8, 2.0, 1.0)
    V, times = FunctionSpace(mesh, "CG", 1), [0.2, 0.4, 0.6]
    prior = GaussianPrior(V, std=1.0, correlation_length=0.8)
    forward = TransientAdvectionDiffusion(V, V, "initial", TimeSteps(times=times, time_step=0.1),
                                          Physics(velocity=(1.0, 0.0), diffusivity=0.05), Boundary(dirichlet={1: 0.0}))
    basis = karhunen_loeve(prior, 12)
    data = _spanned(basis, forward, 400)
    series = SensorKind(point_sensors(forward.U, random_points(mesh, 80, seed=2)), 0.1, (1, 5), series=len(times))
    problem = InverseProblem(prior, forward, SensorFamily(series))
    model = fit(problem, data, basis=basis, options=OPTIONS, progress=False)
    sensors = point_sensors(forward.U, [(0.7, 0.4), (1.5, 0.6)])
    truth = basis.functions(torch.randn(1, 12, generator=torch.Generator().manual_seed(0)))[0]
    y = sensors(forward(truth)) + 0.05
    right = exact(InverseProblem(_Spanned(basis, prior), forward, sensors, 0.1), y)
    assert len(y) == 6
    assert min(_p_values(model.condition(y, sensors, GaussianNoise(std=0.1)), right, basis)) > 1e-4
    # The second sensor fails: so do all of its readings.
    y[3:] = np.nan
    half = exact(InverseProblem(_Spanned(basis, prior), forward, sensors[:3], 0.1), y[:3])
    assert min(_p_values(model.condition(y, sensors, GaussianNoise(std=0.1)), half, basis)) > 1e-4


@pytest.mark.parametrize("call, message", [
    (lambda V, m: m.condition([1.0], point_sensors(V, [(1.0, 0.5)]), CallableNoise(lambda y, g: y)), "Gaussian one"),
    (lambda V, m: m.condition([1.0], point_sensors(V, [(9.0, 0.5)])), "outside the mesh"),
    (lambda V, m: m.condition([1.0]), "each of the 0 sensors"),
    (lambda V, m: m.condition([1.0, 2.0], point_sensors(V, [(1.0, 0.5)])), "each of the 1 sensors"),
    (lambda V, m: m.condition([np.inf], point_sensors(V, [(1.0, 0.5)])), r"sensor \(1, 0.5\) \(inf\)"),
    (lambda V, m: m.condition([1.0], point_sensors(V, [(1.0, 0.5)])), "need a noise model"),
    (lambda V, m: m.condition([1.0], lambda u: 1.0), "must be an Observation"),
    (lambda V, m: replace(m, states=None), "belong together"),
    (lambda V, m: fit(m.problem, None), "data is of type NoneType"),
    (lambda V, m: m.problem.readings(np.zeros((1, m.basis.modes.shape[1]))), "A family has no readings"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), 0.0, (1, 1)), "Every sensor needs noise"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), 0.1, (1, 2)), "candidates"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), 0.1, 3), "fewest and the most"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), 0.1, (1, 1), series=2), "split into sensors"),
    (lambda V, m: SensorKind(lambda u: 1.0, 0.1, (1, 1)), "linear sensors"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), [0.1, 0.2, 0.3], (1, 1)), "std has the shape"),
    (lambda V, m: SensorFamily([]), "at least one"),
    (lambda V, m: m.condition([1.0], point_sensors(V, [(1.0, 0.5)]), 0.1).sample(
        9, seed=0, sampler=Sampler(corrections=3)), "Corrections need"),
])
def test_bad_input_is_refused_with_a_remedy(job, call, message):
    with pytest.raises(InputError, match=message):
        call(job[2], job[4])


def test_a_data_set_without_states_is_refused(job):
    prior, forward, V, data, model = job
    points = point_sensors(V, [(1.0, 0.5)])
    with pytest.raises(DataError, match="has none"):
        fit(model.problem, simulate(InverseProblem(prior, forward, points), 50, seed=0, progress=False))
    with pytest.raises(InputError, match="leave network out"):
        fit(model.problem, data, network="field")
    for modes in (0, 1000):
        with pytest.raises(InputError, match="state_modes is"):
            fit(model.problem, data, state_modes=modes)


def test_without_sensors_the_prior_is_left_and_predicts_nothing(job):
    *_, model = job
    nothing = model.condition([])
    assert nothing.problem.k == 0 and not nothing.problem.family
    samples = nothing.sample(3, seed=0, progress=False)
    assert nothing.problem.readings(samples.values).shape == nothing.predictive(3, seed=0).shape == (3, 0)
    assert len(repr(nothing).splitlines()) <= 4 and "0 sensors" in repr(nothing) and "family" in repr(model)


def test_new_sensors_predict_their_readings(job):
    prior, forward, V, _, model = job
    points = point_sensors(V, [(0.7, 0.2), (1.9, 0.15)])
    posterior = model.condition(points(forward(prior.mean)), points, [0.02, 0.05])
    clean = points.apply(forward.solve_many(posterior.sample(400, seed=2, progress=False).values))
    missed = posterior.predictive(400, seed=2) - clean
    np.testing.assert_allclose(missed.std(axis=0), [0.02, 0.05], rtol=4 / np.sqrt(2 * 400))


def test_as_many_modes_as_the_sensors_of_a_family_can_tell(job):
    *_, data, model = job
    chosen = fit(model.problem, data, options=OPTIONS, progress=False)
    assert 1 <= chosen.basis.r <= len(data) // 4 and chosen.basis.standard_prior
    with pytest.warns(UserWarning, match="3 state modes miss.*raise state_modes"):
        few = fit(model.problem, data, state_modes=3, basis=model.basis, options=OPTIONS, progress=False)
    assert few.states.r == few.denoiser.base.k == 3


def test_state_modes_of_components_in_unlike_units():
    """A state in pascals beside one in mole fractions: sensors of the small one have their exact posterior."""
    mesh = UnitSquareMesh(6, 6, comm=MPI.COMM_SELF)
    V = FunctionSpace(mesh, "CG", 1)
    U, prior = V * V, GaussianPrior(V, 1.0, 0.5)
    x = SpatialCoordinate(mesh)

    def forward(m):
        # The first knows one number of the field, the second all of it.
        u = Function(U)
        u.sub(0).assign(1e9 * m.dat.data_ro[0])
        u.sub(1).interpolate(1e-4 * m * (1 + x[0]))
        return u
    basis = karhunen_loeve(prior, 6)
    z = torch.randn(300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fields = basis.decode(z)
    states = np.array([coefficients(forward(field(V, values))) for values in fields])
    sensors = point_sensors(U, [(0.2, 0.3), (0.7, 0.6), (0.5, 0.9)], component=1)
    problem = InverseProblem(prior, forward, SensorFamily(SensorKind(sensors, 1e-6, (1, 3))))
    data = DataSet(fields, np.empty((300, 0)), states)
    model = fit(problem, data, basis=basis, options=OPTIONS, progress=False)
    truth = basis.functions(z[:1])[0]
    operator = sensors.apply(np.array([coefficients(forward(field(V, mode))) for mode in basis.scaled_modes])).T
    found = model.condition(sensors(forward(truth)), sensors, 1e-6).conditioned.located
    covariance = np.linalg.inv(np.eye(6) + operator.T @ operator / 1e-12)
    np.testing.assert_allclose(found.covariance[0].numpy(), covariance, atol=1e-4)
    mean = covariance @ operator.T @ (operator @ z[0].numpy()) / 1e-12
    np.testing.assert_allclose(found.mean[0].numpy(), mean, atol=1e-3)
