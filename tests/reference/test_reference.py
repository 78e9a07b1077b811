"""References: the exact posterior in matrices and of finite element problems, and chains that agree with it."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from firedrake import (
    COMM_WORLD, DirichletBC, Function, FunctionSpace, TestFunction, TrialFunction, UnitSquareMesh, conditional, dx, exp,
    grad, gt, inner, solve,
)

from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import GaussianNoise
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.product import ProductPrior
from fem_diffusion.prior.transformed import TransformedPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.chains import ConvergenceWarning
from fem_diffusion.reference.dense import linear_gaussian_posterior
from fem_diffusion.reference.exact import exact
from fem_diffusion.reference.hmc import hmc
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.point import find_point

R, K = 4, 3
CORRELATED = GaussianNoise(std=0.05, covariance=0.1**2 * np.array([[1, 0.8, 0], [0.8, 1, 0], [0, 0, 1]]))
Y = np.array([1.4, 1.3, 1.2])
# Mean and standard deviation at two places.
EXACT = 0.7283793971988572, 0.546843954856008, 0.688012726550204, 0.5984072180436194
CHAINS = 0.78, 0.68, 0.57, 0.41


def _linear():
    """Operator, prior covariance, noise covariance and innovation."""
    rng = np.random.default_rng(0)
    roots = rng.standard_normal((2, R, R))
    return (rng.standard_normal((K, R)), roots[0] @ roots[0].T, (roots[1] @ roots[1].T)[:K, :K] / 10,
            rng.standard_normal(K))


def test_the_exact_posterior_knows_no_units():
    B, C, noise, innovation = _linear()
    # The precision form of Bayes' formula.
    precision = np.linalg.inv(C) + B.T @ np.linalg.solve(noise, B)
    mean = np.linalg.solve(precision, B.T @ np.linalg.solve(noise, innovation))
    for seed in range(6):
        rng = np.random.default_rng(seed)
        latents, sensors = (10**rng.permutation(np.linspace(-8, 8, n)) for n in (R, K))
        found, covariance = linear_gaussian_posterior(
            sensors[:, None] * B / latents, C * np.outer(latents, latents), noise * np.outer(sensors, sensors),
            sensors * innovation)
        np.testing.assert_allclose(found / latents, mean, rtol=1e-8)
        np.testing.assert_allclose(covariance / np.outer(latents, latents), np.linalg.inv(precision), rtol=1e-7)


@pytest.mark.parametrize("change, words", [
    ({"noise_covariance": np.eye(R)}, r"give \(3, 3\)"), ({"noise_covariance": np.zeros((K, K))}, "positive definite"),
    ({"innovation": 1j * np.ones(K)}, "real and imaginary")])
def test_wrong_matrices_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        linear_gaussian_posterior(**{"operator": np.ones((K, R)), "prior_covariance": np.eye(R),
                                     "noise_covariance": np.eye(K), "innovation": np.ones(K)} | change)


def _problem(transform=None, noise=CORRELATED, degree=1):
    """A source on a small square, seen at three places."""
    V = FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)
    prior = GaussianPrior(V, 1.0, 0.6, mean=0.3)
    M = V if degree else FunctionSpace(V.mesh(), "DG", 0)
    prior = prior if transform is None else TransformedPrior(prior, transform, M)
    forward = AdvectionDiffusion(V, M, "source", bcs=Boundary(dirichlet={1: 1.0}))
    return InverseProblem(prior, forward, point_sensors(V, [(0.4, 0.5), (0.6, 0.5), (0.9, 0.1)]), noise)


@pytest.fixture(scope="module")
def linear():
    return _problem()


@pytest.fixture(scope="module")
def curved():
    return _problem(lambda f: 0.5 * exp(f))


def _dense(problem, y, covariance):
    """Mean and covariance with dense matrices, operator by one solve for each unknown."""
    V, mean = problem.V, coefficients(problem.prior.mean)
    offset = problem.readings(np.zeros((1, V.dim())))
    operator = (problem.readings(np.eye(V.dim())) - offset).T
    shift, found = linear_gaussian_posterior(operator, problem.prior.covariance_matrix(), covariance,
                                             y - offset[0] - operator @ mean)
    return mean + shift, found, operator, covariance


def test_the_posterior_of_a_finite_element_problem_is_that_of_dense_matrices(linear):
    noise = 0.05**2 * np.eye(3) + 0.1**2 * np.array([[1, 0.8, 0], [0.8, 1, 0], [0, 0, 1]])
    mean, covariance, operator, _ = _dense(linear, Y, noise)
    right = exact(linear, Y)
    np.testing.assert_allclose(coefficients(right.mean()), mean, rtol=1e-7)
    np.testing.assert_allclose(coefficients(right.std()), np.sqrt(np.diag(covariance)), rtol=1e-6)
    values = right.sample(3000, seed=1).values
    leading = np.linalg.eigh(covariance)[1][:, -4:]
    p = moment_p_values((values - mean) @ leading, np.zeros(4), leading.T @ covariance @ leading)
    assert min(p) > 1e-4
    # Independent noise of the same deviations gives another posterior, and this is seen.
    other = exact(replace(linear, noise=np.sqrt(np.diag(noise))), Y).sample(3000, seed=1).values
    assert min(moment_p_values((other - mean) @ leading, np.zeros(4), leading.T @ covariance @ leading)) < 1e-4
    law = operator @ mean + linear.readings(np.zeros((1, len(mean))))[0], operator @ covariance @ operator.T + noise
    assert min(moment_p_values(right.predictive(1500, seed=2), *law)) > 1e-4
    assert repr(right).startswith("ExactPosterior: Gaussian, given 3 readings\nInverseProblem: GaussianPrior of 36")


def test_a_plain_solver_has_an_exact_posterior_too_where_it_is_affine(linear):
    """Its derivative is that of the tape."""
    V, u, v = linear.V, TrialFunction(linear.V), TestFunction(linear.V)
    bcs = DirichletBC(V, 1.0, 1)

    def affine(m):
        state = Function(V)
        solve(inner(grad(u), grad(v)) * dx == m * v * dx, state, bcs)
        return state

    def bent(m):
        state = Function(V)
        solve(inner(grad(u), grad(v)) * dx == (m + 0.1 * m**2) * v * dx, state, bcs)
        return state
    right, found = exact(linear, Y), exact(replace(linear, forward=affine), Y)
    np.testing.assert_allclose(coefficients(found.mean()), coefficients(right.mean()), atol=1e-6)
    np.testing.assert_allclose(found.sample(5, seed=1).values, right.sample(5, seed=1).values, atol=1e-5)
    with pytest.raises(InputError, match="not affine"):
        exact(replace(linear, forward=bent), Y)


def test_a_product_of_priors_has_an_exact_posterior_too():
    """Its own source and a flux."""
    V = FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)
    prior = ProductPrior([GaussianPrior(V, 1.0, 0.5), GaussianPrior(V, 0.5, 0.3)])
    forward = AdvectionDiffusion(V, prior.V, ["source", ("flux", 2)], bcs=Boundary(dirichlet={1: 0}))
    right = exact(InverseProblem(prior, forward, point_sensors(V, [(0.4, 0.5), (0.9, 0.1)]), 0.1), [0.3, -0.2])
    A, C = 0.1 * right.rows, prior.apply_covariance(np.eye(2 * V.dim()))
    gain = C @ A.T @ np.linalg.inv(A @ C @ A.T + 0.01 * np.eye(2))
    np.testing.assert_allclose(coefficients(right.mean()), gain @ [0.3, -0.2], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(coefficients(right.std())**2, np.diag(C - gain @ A @ C), rtol=1e-6)


def test_chains_find_the_exact_posterior_and_know_their_error(linear):
    right, found = exact(linear, Y), hmc(linear, Y, seed=0, chains=50, draws=40, progress=False)
    assert not found.record.exact and (found.rhat < 1.1).all() and (found.ess > 400).all()
    assert found.acceptance > 0.9 and len(found.draws) == 2000
    for name in ("mean", "std"):
        ours, theirs, error = (coefficients(getattr(x, f)()) for x, f in (
            (found, name), (right, name), (found, f"{name}_error")))
        # Standard scores over the nodes: a chain that is off is seen, as is an error that is no error.
        score = (ours - theirs) / error
        assert 0.3 < np.sqrt((score**2).mean()) < 2.5
    error = coefficients(found.mean_error()) / coefficients(found.std())
    assert 0.7 / np.sqrt(2000) < error.mean() < 2 / np.sqrt(2000)
    samples = found.sample(500, seed=3)
    assert len(samples) == 500 and len(np.unique(samples.latents[:, 0])) > 450 and samples.V == linear.M
    assert found.predictive(10, seed=0).shape == (10, 3)
    assert found.quantile(0.025).dat.data_ro.max() < found.quantile(0.975).dat.data_ro.min() + 5
    assert "2,000 draws of 50 chains" in repr(found)
    with pytest.raises(InputError, match="the chains hold 2000 draws"):
        found.sample(2001, seed=0)


def test_chains_of_a_transformed_field_agree_with_weighted_prior_draws(curved):
    """Importance weights of prior draws need no derivative, no modes and no chains."""
    loose = replace(curved, noise=0.2)
    found = hmc(loose, Y, seed=0, chains=20, draws=100, progress=False)
    draws = loose.prior.sample_many(20000, 5)
    weights = np.exp(-((loose.readings(draws) - Y)**2).sum(1) / (2 * 0.2**2))
    weights /= weights.sum()
    assert 1 / (weights**2).sum() > 300
    mean = weights @ draws
    std = np.sqrt(weights @ (draws - mean)**2)
    assert np.linalg.norm(coefficients(found.mean()) - mean) < 0.1 * np.linalg.norm(mean)
    assert np.linalg.norm(coefficients(found.std()) - std) < 0.12 * np.linalg.norm(std)
    # What the prior says is far off.
    assert np.linalg.norm(draws.mean(0) - mean) > 0.3 * np.linalg.norm(mean)


def test_gradients_of_pointwise_and_of_other_transforms_are_right(curved):
    mixing = _problem(lambda f: exp(f) * (1 + f.dx(0)**2), degree=0)
    rng = np.random.default_rng(0)
    for problem in (curved, mixing):
        latent = LatentProblem(problem, Y, karhunen_loeve(problem.prior, 5))
        assert latent._back._pointwise == (problem is curved)
        z, d = rng.standard_normal((2, 5))
        jacobian = latent.linearised(z)[1]
        step = 1e-5 * d[None]
        slope = latent.whitened(latent.readings(z + step) - latent.readings(z - step) + Y)[0] / 2e-5
        np.testing.assert_allclose(jacobian @ d, slope, rtol=1e-5)


def test_the_most_probable_point_is_a_minimum_and_failure_is_told(curved, monkeypatch):
    latent = LatentProblem(curved, Y, karhunen_loeve(curved.prior, 5))
    z = find_point(latent)[0]
    gradient = latent.expanded(z)[0]
    assert np.abs(gradient).max() < 1e-5
    solve = curved.forward.solve_many

    def fails(parameters):
        # Where the field is large: the trust region goes around it.
        if parameters.max() > limit:
            raise SolveError("no solution")
        return solve(parameters)
    monkeypatch.setattr(curved.forward, "solve_many", fails)
    limit = 4 * latent.parameters(z[None]).max()
    np.testing.assert_allclose(find_point(latent)[0], z, atol=1e-6)
    limit = 0.0
    with pytest.raises(SolveError, match="no solution at the prior mean.*check it there"):
        find_point(latent)[0]


class Careless:
    """A solver of the user's own, which writes into what it gets and returns the same objects each time."""

    def __init__(self, problem):
        self.problem, self.M, self.U, self.state = problem, problem.M, problem.U, Function(problem.U)
        self.rows = np.empty((3, problem.U.dim()))

    def __call__(self, m):
        self.state.assign(self.problem(m))
        m.assign(9.0)
        return self.state

    def sensitivity(self, m, rows):
        found = self.problem.sensitivity(m, rows)
        self.rows[:len(found)] = found
        m.assign(9.0)
        return self.rows[:len(found)]

    def solve_many(self, ms):
        states = self.problem.solve_many(ms)
        ms[:] = 9.0
        return states


def test_a_careless_solver_spoils_no_reference(linear):
    careless, mean = replace(linear, forward=Careless(linear.forward)), linear.prior.mean.dat.data_ro.copy()
    for reference in (exact, lambda *given: hmc(*given, seed=0, chains=8, draws=100, progress=False)):
        np.testing.assert_allclose(coefficients(reference(careless, Y).mean()), coefficients(
            reference(linear, Y).mean()), rtol=1e-9)
    assert (linear.prior.mean.dat.data_ro == mean).all()


@pytest.mark.parallel([1, 2])
def test_any_number_of_ranks_gives_the_same_posterior(monkeypatch):
    monkeypatch.setattr("fem_diffusion.reference.hmc._WARMUP", 40)
    linear, problem, points = _problem(), _problem(lambda f: 0.5 * exp(f), 0.1), [(0.3, 0.3), (0.8, 0.7)]
    right, place = exact(linear, Y), point_sensors(linear.U, points)
    np.testing.assert_allclose(np.concatenate([place(right.mean()), place(right.std())]), EXACT, rtol=1e-6)
    place = point_sensors(problem.U, points)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = hmc(problem, Y, basis=karhunen_loeve(problem.prior, 6), seed=0, chains=20, draws=10, progress=False)
    assert len(set(COMM_WORLD.allgather(found.acceptance))) == 1
    latents = COMM_WORLD.allgather(found.draws.latents)
    np.testing.assert_array_equal(latents[0], latents[-1])
    # Modes may turn from one number of ranks to another, so the chains are others.
    np.testing.assert_allclose(np.concatenate([place(found.mean()), place(found.std())]), CHAINS, rtol=0.3)


def test_chains_that_do_not_move_are_told():
    problem = _problem(lambda f: conditional(gt(f, 0.0), 2.0, 1.0))
    with pytest.raises(SolveError, match="derivative is zero.*take pcn"):
        hmc(problem, [1.2, 1.2, 1.1], seed=2, chains=8, draws=20, progress=False)
