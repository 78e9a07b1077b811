"""One target for all: densities, exact gradients and differences agree for any noise, transform and solver."""

import contextlib
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from firedrake import COMM_SELF, COMM_WORLD, Ensemble, Function, FunctionSpace, UnitIntervalMesh, UnitSquareMesh, exp
from scipy.stats import multivariate_normal, norm

from fem_diffusion.diffusion import CallableNoise, GaussianNoise, MeasurementWarning
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve, pod
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import TransformedPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.laplace import laplace
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.looks import unseen
from fem_diffusion.reference.point import find_point, find_points, map_point

CORRELATED = 0.1**2 * np.array([[1, 0.8, 0], [0.8, 1, 0], [0, 0, 1]])
Y = np.array([1.4, 1.3, 1.2])
LAPLACE = CallableNoise(
    lambda y, g: y + torch.distributions.Laplace(0.0, 0.1).icdf(torch.rand(y.shape, generator=g, dtype=y.dtype)),
    lambda y, clean: -((y - clean).abs() / 0.1).sum(1) - 3 * np.log(0.2))
NOISES = {"constant": GaussianNoise(std=0.05, covariance=CORRELATED), "relative": GaussianNoise(relative=0.1),
          "both": GaussianNoise(std=0.01, relative=0.1, covariance=CORRELATED), "own": LAPLACE}


def _problem(transform=None, noise=NOISES["constant"], degree=1):
    V = FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)
    prior = GaussianPrior(V, 1.0, 0.6, mean=0.3)
    M = V if degree else FunctionSpace(V.mesh(), "DG", 0)
    prior = prior if transform is None else TransformedPrior(prior, transform, M)
    forward = AdvectionDiffusion(V, M, "source", bcs=Boundary(dirichlet={1: 1.0}))
    return InverseProblem(prior, forward, point_sensors(V, [(0.4, 0.5), (0.6, 0.5), (0.9, 0.1)]), noise)


@pytest.fixture(scope="module")
def curved():
    return _problem(lambda f: 0.5 * exp(f))


@pytest.fixture(scope="module")
def basis(curved):
    return karhunen_loeve(curved.prior, 5)


@pytest.mark.parametrize("name", NOISES)
def test_densities_of_noise_are_those_of_scipy(name):
    clean = np.random.default_rng(0).standard_normal((4, 3)) + 2
    std, relative, C = {"constant": (0.05, 0, CORRELATED), "relative": (0, 0.1, 0 * CORRELATED),
                        "both": (0.01, 0.1, CORRELATED), "own": (0, 0, 0)}[name]
    found = NOISES[name].log_density(torch.from_numpy(Y), torch.from_numpy(clean)).numpy()
    if name == "own":
        from scipy.stats import laplace
        expected = laplace.logpdf(Y, clean, 0.1).sum(axis=1)
    else:
        expected = [multivariate_normal.logpdf(Y, row, np.diag(std**2 + (relative * row)**2) + C) for row in clean]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_densities_know_no_units_and_need_noise():
    scale = np.array([1e-9, 1.0, 1e9])
    big = GaussianNoise(covariance=CORRELATED * np.outer(scale, scale) + np.diag(scale**2) * 1e-4)
    small = GaussianNoise(covariance=CORRELATED + 1e-4 * np.eye(3))
    clean = torch.ones(2, 3, dtype=torch.float64)
    found = big.log_density(torch.from_numpy(Y * scale), clean * torch.from_numpy(scale))
    np.testing.assert_allclose(found, small.log_density(torch.from_numpy(Y), clean), rtol=1e-8)
    for covariance in (np.ones((3, 3)), np.diag([1.0, 1.0, 0.0])):
        with pytest.raises(InputError, match="singular, so there is no density: add a std"):
            GaussianNoise(covariance=covariance).log_density(torch.from_numpy(Y), clean)
    for y, rows in ((Y[:2], clean), (Y, clean[0])):
        with pytest.raises(InputError, match="give \\(k,\\) and \\(B, k\\)"):
            small.log_density(torch.from_numpy(y), rows)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("transform, degree", [(None, 1), (lambda f: 0.5 * exp(f), 1),
                                               (lambda f: exp(f) * (1 + f.dx(0)**2), 0)])
def test_gradients_are_those_of_the_energy(name, transform, degree):
    latent = LatentProblem(_problem(transform, NOISES[name], degree), Y)
    assert latent.differentiable
    rng = np.random.default_rng(0)
    z, d = 0.5 * rng.standard_normal((2, 3, latent.r))
    energy, gradient = latent.energy_and_gradient(z)
    assert (latent.solves, latent.pulls) == (3, 3)
    np.testing.assert_allclose(energy, latent.energy(z), rtol=1e-12)
    slope = (latent.energy(z + 1e-5 * d) - latent.energy(z - 1e-5 * d)) / 2e-5
    np.testing.assert_allclose((gradient * d).sum(1), slope, rtol=1e-5)
    prior = norm.logpdf(z).sum(1)
    likelihood = latent.log_likelihood(latent.readings(z))
    np.testing.assert_allclose(energy, -prior - likelihood, rtol=1e-12)
    np.testing.assert_allclose(latent.log_prior(z), prior, rtol=1e-12)
    if name == "constant":
        misfit, jacobian = latent.linearised(z[0])
        np.testing.assert_allclose(gradient[0], z[0] + jacobian.T @ misfit, rtol=1e-7, atol=1e-9)
        squares = (latent.whitened(latent.readings(z))**2).sum(1) / 2
        np.testing.assert_allclose(np.diff(squares), -np.diff(likelihood), rtol=1e-9, atol=1e-9)


def test_differences_serve_where_there_is_no_derivative(curved, basis):
    solver = curved.forward
    plain = replace(curved, forward=lambda m: solver(m))
    instrument = replace(curved, observation=lambda u: curved.observation(u))
    exact, z = LatentProblem(curved, Y, basis), np.random.default_rng(1).standard_normal((2, 5))
    for problem in (plain, instrument):
        latent = LatentProblem(problem, Y, basis)
        if latent.differentiable:
            continue
        energy, gradient = latent.energy_and_gradient(z)
        assert (latent.solves, latent.pulls) == (2 + 2 * 2 * 5, 0)
        np.testing.assert_allclose(energy, exact.energy(z), rtol=1e-10)
        np.testing.assert_allclose(gradient, exact.energy_and_gradient(z)[1], rtol=1e-5)
        for ours, theirs in zip(latent.linearised(z[0]), exact.linearised(z[0])):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)
    rough = replace(curved, noise=CallableNoise(LAPLACE.function, lambda y, c: LAPLACE.log_density(y, c).detach()))
    latent, smooth = LatentProblem(rough, Y, basis), LatentProblem(replace(curved, noise=LAPLACE), Y, basis)
    assert not latent.differentiable and smooth.differentiable
    np.testing.assert_allclose(latent.energy_and_gradient(z)[1], smooth.energy_and_gradient(z)[1], rtol=1e-4)


def test_failures_have_infinite_energy_and_do_not_spoil_others(curved, basis, monkeypatch):
    latent = LatentProblem(curved, Y, basis)
    z = np.random.default_rng(2).standard_normal((4, 5))
    z[3] = 0.0
    z[3, 2] = 13.0
    right, slope = latent.energy_and_gradient(z)
    assert np.isinf(right[3]) and (slope[3] == 0).all() and latent.solves == 3
    solve, limit = curved.forward.solve_many, np.sort(latent.parameters(z[:3]).max(axis=1))[1] * 1.001

    def fails(parameters):
        if parameters.max() > limit:
            raise ValueError("no solution")
        return solve(parameters)

    def breaks(parameters):
        return np.where(parameters.max(axis=1, keepdims=True) > limit, np.nan, solve(parameters))
    for broken, words in ((fails, "ValueError: no solution"), (breaks, "not finite")):
        monkeypatch.setattr(curved.forward, "solve_many", broken)
        latent = LatentProblem(curved, Y, basis)
        energy, gradient = latent.energy_and_gradient(z)
        lost = np.isinf(energy)
        assert lost.sum() == 2 and words in latent.failure and (gradient[lost] == 0).all()
        np.testing.assert_allclose(energy[~lost], right[~lost])
        np.testing.assert_allclose(gradient[~lost], slope[~lost])
        with pytest.raises(SolveError, match="no solution where it is to be linearised"):
            latent.linearised(z[lost][0])

    def mistake(parameters):
        raise InputError("wrong space.")
    monkeypatch.setattr(curved.forward, "solve_many", mistake)
    with pytest.raises(InputError, match="wrong space"):
        LatentProblem(curved, Y, basis).energy(z)


def test_a_prior_density_of_the_users_own_serves_pod(curved, basis):
    sampled = pod(curved.V, curved.prior.core.sample_many(30, 0), 4, prior=curved.prior)
    with pytest.raises(InputError, match="no standard normal latents, so their prior density is not known"):
        LatentProblem(curved, Y, sampled)
    with pytest.raises(InputError, match="leave log_prior out"):
        LatentProblem(curved, Y, basis, log_prior=lambda z: z[:, 0])
    latent = LatentProblem(curved, Y, sampled, log_prior=lambda z: -np.cosh(z).sum(1))
    z, d = 0.5 * np.random.default_rng(0).standard_normal((2, 3, 4))
    energy, gradient = latent.energy_and_gradient(z)
    slope = (latent.energy(z + 1e-5 * d) - latent.energy(z - 1e-5 * d)) / 2e-5
    np.testing.assert_allclose((gradient * d).sum(1), slope, rtol=1e-5)
    assert np.isnan(unseen(latent, z)[0]) and len(latent.samples(z, 0)) == 3
    with pytest.raises(InputError, match="let it return a number for each of 3"):
        LatentProblem(curved, Y, sampled, log_prior=lambda z: 0.0).energy(z)


def test_modes_past_r_are_seen_where_the_readings_see_them(curved):
    """The variance that a linear problem's rows leave outside the modes, in units of the noise."""
    linear = _problem(noise=0.05)
    few = LatentProblem(linear, Y, karhunen_loeve(linear.prior, 2))
    rows = linear.sensitivity(linear.prior.mean)
    left = linear.prior.apply_covariance(rows) @ rows.T - (rows @ few.basis.scaled_modes.T) @ (
        rows @ few.basis.scaled_modes.T).T
    expected = np.sqrt(np.diag(left).max()) / 0.05
    assert unseen(few, np.zeros((400, 2)))[0] == pytest.approx(expected, rel=4 / np.sqrt(800))
    assert unseen(LatentProblem(linear, Y), np.zeros((50, karhunen_loeve(linear.prior).r)))[0] < 0.2 * expected


@pytest.mark.parametrize("change, words", [
    ({"noise": CallableNoise(lambda y, g: y)}, "without a density: give CallableNoise(function, log_density)"),
    ({"noise": CallableNoise(lambda y, g: y, lambda y, clean: torch.zeros(2, 2))}, "gives (2, 2) for 1 rows"),
    ({"noise": CallableNoise(lambda y, g: y, lambda y, clean: 0.0)}, "gives float for 1 rows"),
    ({"noise": None}, "The noise is of type NoneType"),
    ({"noise": GaussianNoise(covariance=np.ones((3, 3)))}, "singular"),
])
def test_noise_without_a_density_is_told(curved, basis, change, words):
    with pytest.raises(InputError, match=re.escape(words)):
        LatentProblem(replace(curved, **change), Y, basis)


def _cube(noise=0.1):
    """Two numbers, of which the cube of the first is read, by a plain function without derivative."""
    mesh = UnitIntervalMesh(1)
    M = FunctionSpace(mesh, "R", 0)
    V = FunctionSpace(mesh, "CG", 1)

    def solve(m):
        return Function(V).assign(float(m.dat.data_ro[0])**3)
    return InverseProblem(GaussianPrior(M, 1.0), solve, point_sensors(V, [(0.5,)]), noise)


def test_the_most_probable_point_is_found_where_simulations_never_were():
    problem = _cube()
    with pytest.warns(MeasurementWarning, match="is 5.8 times as far from the prior mean as prior and noise"):
        found = map_point(problem, [200.0])
    theta = np.linspace(5.8, 5.9, 100001)
    best = theta[np.argmin(theta**2 / 2 + (theta**3 - 200)**2 / 0.02)]
    assert abs(found.latents[0]) == pytest.approx(best, abs=2e-6)
    assert float(found.parameter.dat.data_ro[0]) == pytest.approx(best, abs=2e-6)
    assert found.solves < 200 and "MapPoint: 1 latents" in repr(found)


@pytest.mark.parametrize("power, y, right", [(3, 200.0, 5.848030), (2, 9.0, 2.999167)])
def test_a_slope_of_zero_at_the_prior_mean_hides_no_minimum(power, y, right):
    """Exact derivatives, which are zero at the prior mean: it is a stationary point and no minimum."""
    problem = _cube()
    curved = InverseProblem(problem.prior, lambda m: Function(problem.U).interpolate(m**power), problem.observation,
                            0.1)
    assert LatentProblem(curved, [y]).differentiable
    # One cube in 1e8 is so large.
    with pytest.warns(MeasurementWarning) if power == 3 else contextlib.nullcontext():
        found = laplace(curved, [y])
    assert abs(found.centre[0]) == pytest.approx(right, abs=1e-4)
    assert found.factor[0, 0] == pytest.approx(0.1 / (power * right**(power - 1)), rel=1e-2)


def test_solves_end_where_they_are_limited(curved, basis):
    latent = LatentProblem(curved, Y, basis)
    latent.limit = 5, 7
    latent.readings(np.zeros((5, 5)))
    with pytest.raises(SolveError, match="All solves that were asked for are spent"):
        latent.readings(np.zeros((1, 5)))
    # Three sensors have an adjoint solve each.
    latent.limit = 100, 7
    latent.linearised(np.zeros(5))
    latent.linearised(np.zeros(5))
    assert (latent.solves, latent.pulls) == (6, 3)
    latent.linearised(np.ones(5))
    for search in (lambda: find_point(latent), lambda: find_points(latent, np.zeros((2, 5)))):
        with pytest.raises(SolveError, match="are spent"):
            search()
    assert latent.solves < 100 and latent.pulls == 6


def test_a_transform_without_slope_has_no_most_probable_point():
    problem = _cube()
    step = InverseProblem(problem.prior, lambda m: Function(problem.U).assign(float(m.dat.data_ro[0] > 0)),
                          problem.observation, 0.1)
    for reference in (map_point, laplace):
        with pytest.raises(SolveError, match="derivative is zero.*take pcn"):
            reference(step, [1.0])


@pytest.mark.parallel([2])
@pytest.mark.parametrize("members", [1, 2])
def test_ranks_and_members_of_an_ensemble_share_the_work(members):
    """All get the same energies, gradients and numbers of solves, as one alone does."""
    z = 0.5 * np.random.default_rng(0).standard_normal((5, 4))

    def evaluated(comm, ensemble=None):
        V = FunctionSpace(UnitSquareMesh(5, 5, comm=comm), "CG", 1)
        prior = TransformedPrior(GaussianPrior(V, 1.0, 0.6, mean=0.3), lambda f: 0.5 * exp(f))
        forward = AdvectionDiffusion(V, V, "source", bcs=Boundary(dirichlet={1: 1.0}))
        sensors = point_sensors(V, [(0.4, 0.5), (0.6, 0.5), (0.9, 0.1)])
        problem, basis = InverseProblem(prior, forward, sensors, 0.1), karhunen_loeve(prior, 4)
        latent = LatentProblem(problem, Y, basis, ensemble=ensemble)
        energy, gradient = latent.energy_and_gradient(z)
        return energy, gradient, latent.energy(z), unseen(latent, z[:3])[0], latent.solves, latent.pulls
    alone = evaluated(COMM_SELF)
    ensemble = Ensemble(COMM_WORLD, 1) if members == 2 else None
    found = evaluated(COMM_WORLD if ensemble is None else ensemble.comm, ensemble)
    for ours, theirs in zip(found, alone):
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs), rtol=1e-6)
    for other in COMM_WORLD.allgather(found):
        np.testing.assert_array_equal(other[0], found[0])
        np.testing.assert_array_equal(other[1], found[1])
