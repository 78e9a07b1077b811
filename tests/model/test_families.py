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
    SensorFamily, SensorKind, TrainingOptions, TransformedPrior, TransientAdvectionDiffusion, fit_family, functionals,
    karhunen_loeve, line_averages, load_family, load_model, patch_averages, point_sensors, random_points, simulate,
)
from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import OperatorDenoiser, SensorNetwork, Spectrum
from fem_diffusion.prior.protocol import Prior
from fem_diffusion.reference.exact import exact
from fem_diffusion.errors import DataError, InputError, FileError
from fem_diffusion.fields.coefficients import coefficients, field
from fem_diffusion.many_operators import _decorrelated

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
    data = simulate(InverseProblem(prior, forward, _family(V)), pairs, seed=1, progress=False)
    return prior, forward, V, data


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
    prior, forward, V, data = _problem()
    return prior, forward, V, data, fit_family(data, karhunen_loeve(prior, retained=0.99), _family(V), options=OPTIONS,
                                               progress=False)


def _p_values(posterior, right, basis, seed=3):
    """How well latents agree with those of the exact posterior, whose moments follow from the basis."""
    samples = posterior.sample(3000, seed=seed)
    operator = COMM.allreduce(right.rows @ basis.scaled_modes.T)
    covariance = np.linalg.inv(np.eye(basis.r) + operator.T @ operator)
    return moment_p_values(samples.latents, np.asarray(basis.encode([right.mean()]))[0], covariance)


@pytest.mark.parallel([1, 2])
def test_layouts_never_seen_have_the_exact_posterior():
    prior, forward, V, data = _problem()
    assert data.readings.shape == (300, 0)
    basis = karhunen_loeve(prior, 5)
    model = fit_family(_spanned(basis, forward, 300), basis, _family(V), options=OPTIONS, progress=False)
    assert model.history.best_step == 0
    points = point_sensors(V, [(0.7, 0.2), (1.9, 0.15), (3.3, 0.4)])
    line = line_averages(V, [(2.5, 0.0)], [(2.5, 1.0)])
    cases = (points, 0.05), (line, 0.05), (points + line, [0.02, 0.05, 0.1, 0.03])
    for number, (observation, std) in enumerate(cases):
        # A truth in the span of the modes, so that the posterior in latents is exact as well.
        truth = basis.functions(torch.randn(1, 5, generator=torch.Generator().manual_seed(number)))[0]
        y = observation(forward(truth)) + 0.03
        right = exact(InverseProblem(_Spanned(basis, prior), forward, observation, std), y)
        posterior = model.condition(observation, y, GaussianNoise(std=std))
        assert min(_p_values(posterior, right, basis)) > 1e-4
        # The same sampler with readings in another order is wrong, and is seen to be.
        if len(y) > 1:
            wrong = model.condition(observation, y[::-1].copy(), GaussianNoise(std=std))
            assert min(_p_values(wrong, right, basis)) < 1e-6


def test_a_posterior_that_is_not_gaussian_is_refused():
    prior, forward, V, _ = _problem(pairs=1)
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


class _Spanned(Prior):
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
    failed = model.condition(points, [y[0], np.nan, y[2]], noise).sample(50, seed=0)
    less = model.condition(points[[0, 2]], y[[0, 2]], GaussianNoise(std=0.05)).sample(50, seed=0)
    np.testing.assert_allclose(failed.values, less.values, rtol=1e-9)
    for nothing in (model.condition(None, []), model.condition(points, 3 * [np.nan], noise)):
        latents = nothing.sample(3000, seed=1).latents
        assert min(moment_p_values(latents, np.zeros(model.basis.r), np.eye(model.basis.r))) > 1e-4


def test_repeated_sensors_and_singular_noise_are_answered(job):
    prior, forward, V, _, model = job
    twice = point_sensors(V, [(0.7, 0.2), (0.7, 0.2)])
    y = twice(forward(prior.mean))
    repeated = model.condition(twice, y, GaussianNoise(std=0.05)).sample(50, seed=0)
    once = model.condition(twice[[0]], y[:1], GaussianNoise(std=0.05 / 2**0.5)).sample(50, seed=0)
    np.testing.assert_allclose(repeated.values, once.values, rtol=1e-6, atol=1e-8)
    # Perfectly correlated noise: two sensors that err together say no more than one.
    together = model.condition(twice, y, GaussianNoise(covariance=0.05**2 * np.ones((2, 2)))).sample(50, seed=0)
    alone = model.condition(twice[[0]], y[:1], GaussianNoise(std=0.05)).sample(50, seed=0)
    np.testing.assert_allclose(together.values, alone.values, rtol=1e-3, atol=1e-3)
    assert np.isfinite(together.values).all()
    # A sensor without noise among correlated ones pins its own reading and spares the others.
    three = point_sensors(V, [(0.7, 0.2), (1.9, 0.15), (3.3, 0.4)])
    covariance = 0.05**2 * np.array([[1, 0, 0.5], [0, 0, 0], [0.5, 0, 1]])
    y = three(forward(prior.mean)) + [0.02, 0.01, -0.02]
    with pytest.warns(FamilyWarning, match="noise over prior signal"):
        pinned = model.condition(three, y, GaussianNoise(covariance=covariance)).sample(50, seed=0, refill=False)
    readings = three.apply(forward.solve_many(pinned.values))
    # What modes past the last one add to a reading is all that is left.
    assert readings[:, 1].std() < 0.2 * readings[:, 0].std() and readings[:, 0].std() < 0.06


def test_noise_far_below_the_prior_spread_counts_as_given():
    rows = torch.tensor([[100.0, 0.0], [0.0, 50.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    for covariance in (torch.diag(torch.tensor([1e-6, 4e-6])), torch.tensor([[1e-6, 1e-6], [1e-6, 4e-6]])):
        sensors, _ = _decorrelated(rows, zero, covariance.double(), zero)
        information = sensors.rows[0].T / sensors.variance[0] @ sensors.rows[0]
        exact = rows.T @ torch.linalg.solve(covariance.double(), rows)
        torch.testing.assert_close(information, exact, rtol=1e-4, atol=1)


def test_a_far_operator_is_told_with_the_measure_of_distance(job):
    prior, forward, V, _, model = job
    state = forward(prior.mean)
    near = point_sensors(V, [(0.7, 0.2)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.condition(near, near(state), GaussianNoise(std=0.05))
    difference = functionals(V, [lambda u: u.dx(1) * ds(2)], names=["slope"])
    with pytest.warns(FamilyWarning, match=r"slope.*1 - squared correlation"):
        model.condition(difference, difference(state), GaussianNoise(std=0.05))
    with pytest.warns(FamilyWarning, match="noise over prior signal"):
        model.condition(near, near(state), GaussianNoise(std=1e-4))
    many = point_sensors(V, random_points(V.mesh(), 40, seed=4))
    with pytest.warns(FamilyWarning, match="times the most"):
        samples = model.condition(many, many(state), GaussianNoise(std=0.05)).sample(20, seed=0)
    assert np.isfinite(samples.values).all()


def test_a_saved_model_answers_as_before(job, tmp_path):
    prior, forward, V, _, model = job
    points = point_sensors(V, [(0.7, 0.2), (1.9, 0.15)])
    y, noise = points(forward(prior.mean)), GaussianNoise(std=0.05)
    file = tmp_path / "model.safetensors"
    model.save(file)
    again = load_family(file, model.basis, V)
    np.testing.assert_allclose(again.condition(points, y, noise).sample(20, seed=0).values,
                               model.condition(points, y, noise).sample(20, seed=0).values, rtol=1e-9)
    with pytest.raises(FileError, match="another basis"):
        load_family(file, karhunen_loeve(prior, 3), V)
    with pytest.raises(FileError, match="another mesh"):
        load_family(file, model.basis, FunctionSpace(V.mesh(), "CG", 2))
    with pytest.raises(FileError, match="holds a family model, where a model is expected"):
        load_model(file, model.basis)
    content = file.read_bytes()
    for broken in (content[:len(content) // 2], b"", b"no model"):
        file.write_bytes(broken)
        with pytest.raises(FileError, match="no file that fem_diffusion reads|is damaged"):
            load_family(file, model.basis, V)


def test_a_network_and_an_emulator_survive_the_file(tmp_path):
    prior, forward, V, data = _problem(600, exp)
    basis = karhunen_loeve(prior, 4)
    family = SensorFamily(SensorKind(patch_averages(V, random_points(V.mesh(), 60, seed=2), 0.3), NOISE, (1, 6)))
    model = fit_family(data, basis, family, options=TrainingOptions(steps=60, evaluate_every=30, width=32, depth=2),
                       progress=False)
    assert model.denoiser.base.emulator.head is not None
    # So little training may keep no network; any weights will do here.
    torch.manual_seed(0)
    network = SensorNetwork(4, model.states.r, 16, 1)
    torch.nn.init.normal_(network.flow.head.weight, std=0.05)
    spectrum = Spectrum(torch.tensor([0.5]).double(), torch.tensor([0.3]).double())
    denoiser = OperatorDenoiser(model.denoiser.base, network.requires_grad_(False), spectrum, None, True)
    model = replace(model, denoiser=denoiser)
    model.save(tmp_path / "model")
    again = load_family(tmp_path / "model", basis, V)
    patch = patch_averages(V, [(1.0, 0.3), (2.0, 0.3)], 0.3)
    drawn = {}
    for corrections in (0, 2):
        one, two = (m.condition(patch, [1.5, 1.6], GaussianNoise(std=NOISE)).sample(20, seed=0, corrections=corrections)
                    for m in (model, again))
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
    model = fit_family(data, basis, SensorFamily(series), options=OPTIONS, progress=False)
    sensors = point_sensors(forward.U, [(0.7, 0.4), (1.5, 0.6)])
    truth = basis.functions(torch.randn(1, 12, generator=torch.Generator().manual_seed(0)))[0]
    y = sensors(forward(truth)) + 0.05
    right = exact(InverseProblem(_Spanned(basis, prior), forward, sensors, 0.1), y)
    assert len(y) == 6
    assert min(_p_values(model.condition(sensors, y, GaussianNoise(std=0.1)), right, basis)) > 1e-4
    # The second sensor fails: so do all of its readings.
    y[3:] = np.nan
    half = exact(InverseProblem(_Spanned(basis, prior), forward, sensors[:3], 0.1), y[:3])
    assert min(_p_values(model.condition(sensors, y, GaussianNoise(std=0.1)), half, basis)) > 1e-4


@pytest.mark.parametrize("call, message", [
    (lambda V, m: m.condition(point_sensors(V, [(1.0, 0.5)]), [1.0], CallableNoise(lambda y, g: y)), "Gaussian one"),
    (lambda V, m: m.condition(None, []).model.condition([1.0]), "measurement built in"),
    (lambda V, m: m.condition(None, []).model.save("file"), "measurement built in"),
    (lambda V, m: m.condition(point_sensors(V, [(9.0, 0.5)]), [1.0]), "outside the mesh"),
    (lambda V, m: m.condition(point_sensors(V, [(1.0, 0.5)]), [1.0, 2.0]), "each of the 1 sensors"),
    (lambda V, m: m.condition(point_sensors(V, [(1.0, 0.5)]), [np.inf]), r"sensor \(1, 0.5\) \(inf\)"),
    (lambda V, m: m.condition(point_sensors(V, [(1.0, 0.5)]), [1.0]), "need a noise model"),
    (lambda V, m: m.condition(lambda u: 1.0, [1.0]), "must be an Observation"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), 0.0, (1, 1)), "Every sensor needs noise"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), 0.1, (1, 2)), "candidates"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), 0.1, 3), "fewest and the most"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), 0.1, (1, 1), series=2), "split into sensors"),
    (lambda V, m: SensorKind(lambda u: 1.0, 0.1, (1, 1)), "linear sensors"),
    (lambda V, m: SensorKind(point_sensors(V, [(1.0, 0.5)]), [0.1, 0.2, 0.3], (1, 1)), "std has the shape"),
    (lambda V, m: SensorFamily([]), "at least one"),
    (lambda V, m: m.condition(point_sensors(V, [(1.0, 0.5)]), [1.0], GaussianNoise(std=0.1)).sample(
        9, seed=0, corrections=3), "Corrections need"),
])
def test_bad_input_is_refused_with_a_remedy(job, call, message):
    with pytest.raises(InputError, match=message):
        call(job[2], job[4])


def test_a_data_set_without_states_is_refused(job):
    prior, forward, V, _, model = job
    points = point_sensors(V, [(1.0, 0.5)])
    with pytest.raises(DataError, match="has none"):
        fit_family(simulate(InverseProblem(prior, forward, points), 50, seed=0, progress=False), model.basis,
                   _family(V))


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
    family = SensorFamily(SensorKind(sensors, 1e-6, (1, 3)))
    model = fit_family(DataSet(fields, sensors.apply(states), states), basis, family, options=OPTIONS, progress=False)
    truth = basis.functions(z[:1])[0]
    operator = sensors.apply(np.array([coefficients(forward(field(V, mode))) for mode in basis.scaled_modes])).T
    found = model.condition(sensors, sensors(forward(truth)), 1e-6).model.denoiser.base
    covariance = np.linalg.inv(np.eye(6) + operator.T @ operator / 1e-12)
    np.testing.assert_allclose(found.covariance.numpy(), covariance, atol=1e-4)
    mean = covariance @ operator.T @ (operator @ z[0].numpy()) / 1e-12
    np.testing.assert_allclose(found.latent_mean.numpy(), mean, atol=1e-3)
