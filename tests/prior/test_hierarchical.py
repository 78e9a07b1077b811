"""Standard deviation and correlation length as unknowns: draws, derivatives, and posteriors against quadrature."""

import numpy as np
import pytest
from firedrake import (
    DirichletBC, Function, FunctionSpace, IntervalMesh, TestFunction, UnitSquareMesh, VectorFunctionSpace, dx, split,
)
from scipy import stats

from fem_diffusion import (
    HierarchicalPrior, InverseProblem, Steady, hmc, karhunen_loeve, point_sensors,
)
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import by_component, coefficients
from fem_diffusion.prior.matern import matern_correlation

STD, LENGTH, NOISE = stats.lognorm(0.4), stats.lognorm(0.4, scale=0.4), 0.3


@pytest.mark.parallel([1, 2])
def test_draws_have_the_covariance_of_their_std_and_length():
    V = FunctionSpace(IntervalMesh(60, 3.0), "CG", 1)
    prior = HierarchicalPrior(V, STD, LENGTH, mean=2.0)
    comm, n = V.comm, 3000
    # Whatever the numbers are, the rest is independent of them; here they are held.
    core = prior.core.sample_many(n, seed=1)
    z = np.array([0.5, -0.8])
    parts = by_component(prior.core.V, core)
    for part, value in zip(parts, z):
        part[:] = value
    std, length, field = by_component(prior.V, prior.transform_many(np.hstack(parts)))
    s, ell = STD.ppf(stats.norm.cdf(0.5)), LENGTH.ppf(stats.norm.cdf(-0.8))
    assert np.allclose(std, s) and np.allclose(length, ell) and (comm.rank or std.shape == (n, 1))
    np.testing.assert_allclose(field.mean(axis=0), 2.0, atol=5 * s / np.sqrt(n))
    np.testing.assert_allclose(field.std(axis=0), s, rtol=5 / np.sqrt(2 * n))
    rows = point_sensors(V, [[1.5], [1.7], [2.0]]).rows
    seen = comm.allreduce((field - 2) @ rows.T)
    correlation = np.corrcoef(seen.T)[0, 1:]
    np.testing.assert_allclose(correlation, matern_correlation([0.2, 0.5], ell, 1.5), atol=4 / np.sqrt(n) + 0.01)
    # Latents are standard normal, in the basis of the core.
    basis = karhunen_loeve(prior)
    latents = basis.encode(prior.core.sample_many(1000, seed=2))[:, :8]
    assert basis.standard_prior and np.abs(np.cov(latents.T) - np.eye(8)).max() < 5 / np.sqrt(1000)


@pytest.mark.parallel([1, 2])
def test_derivatives_are_those_of_differences():
    V = FunctionSpace(UnitSquareMesh(6, 6), "CG", 1)
    for prior in (HierarchicalPrior(V, STD, LENGTH), HierarchicalPrior(V, 2.0, LENGTH, smoothness=3.0),
                  HierarchicalPrior(V, STD, 0.4, modes=20),
                  HierarchicalPrior(V, STD, LENGTH, bcs=DirichletBC(V, 1.0, (1, 3)))):
        at, comm, h = coefficients(prior.core.sample(1)), V.comm, 1e-5
        rng = np.random.default_rng(comm.rank)
        rows, step = rng.standard_normal((2, len(coefficients(Function(prior.V))))), rng.standard_normal(len(at))
        ahead, behind = (prior.transform_many((at + sign * h * step)[None])[0] for sign in (1, -1))
        change = comm.allreduce(rows @ (ahead - behind)) / (2 * h)
        np.testing.assert_allclose(comm.allreduce(prior.pull_back(rows, at) @ step), change, rtol=1e-6)


@pytest.mark.parallel([1, 2])
def test_conditions_hold_in_every_field_and_leave_std_and_length_what_they_are():
    """On a half-line a Matérn field that vanishes at the end is a difference of mirror images."""
    V = FunctionSpace(IntervalMesh(120, 3.0), "CG", 1)
    prior, comm, n = HierarchicalPrior(V, STD, LENGTH, mean=2.0, bcs=DirichletBC(V, 5.0, 1)), V.comm, 3000
    parts = by_component(prior.core.V, prior.core.sample_many(n, seed=1))
    for part, value in zip(parts, (0.5, -0.8)):
        part[:] = value
    field = by_component(prior.V, prior.transform_many(np.hstack(parts)))[2]
    s, ell = STD.ppf(stats.norm.cdf(0.5)), LENGTH.ppf(stats.norm.cdf(-0.8))
    places = np.array([0.0, 0.1, 0.2, 0.4, 1.5])
    seen = comm.allreduce(field @ point_sensors(V, places[:, None]).rows.T)
    mirror = matern_correlation(2 * places[1:], ell, 1.5)
    np.testing.assert_allclose(seen[:, 0], 5.0, rtol=1e-12)
    np.testing.assert_allclose(seen[:, 1:].std(axis=0), s * np.sqrt((1 - mirror) / (1 + mirror)),
                               rtol=4 / np.sqrt(2 * n) + 0.01)
    assert abs(seen[:, -1].mean() - 2.0) < 0.02 + 4 * s / np.sqrt(n)
    basis = karhunen_loeve(prior)
    modes = by_component(prior.core.V, basis.modes)[-1]
    assert np.abs(comm.allreduce(modes @ point_sensors(V, [[0.0]]).rows.T)).max() < 1e-12


@pytest.fixture(scope="module")
def problem():
    V = FunctionSpace(IntervalMesh(16, 3.0), "CG", 1)
    prior = HierarchicalPrior(V, STD, LENGTH)
    m, u, v = Function(prior.V), Function(V), TestFunction(V)
    sensors = point_sensors(V, np.linspace(0.1, 2.9, 9)[:, None])
    return InverseProblem(prior, Steady((u - split(m)[2]) * v * dx, u, m), sensors, NOISE)


def quadrature(problem, y):
    """Moments of the normal scores of std and length under the exact posterior: the field is Gaussian given both."""
    prior, rows = problem.prior, problem.observation.rows.toarray()
    grid = np.linspace(-3.5, 3.5, 71)
    sizes = LENGTH.ppf(stats.norm.cdf(grid))
    log = np.empty((len(grid), len(grid)))
    for j, length in enumerate(sizes):
        variances = prior._variances(np.array([length]), prior._rates)[0][0]
        C = (prior._modes.T * variances) @ prior._modes
        scale = 1 / np.sqrt(C.diagonal())
        S = rows @ (C * scale * scale[:, None]) @ rows.T
        values, axes = np.linalg.eigh(S)
        for i, std in enumerate(STD.ppf(stats.norm.cdf(grid))):
            total = std**2 * values + NOISE**2
            log[i, j] = -((axes.T @ y)**2 / total).sum() / 2 - np.log(total).sum() / 2 - (grid[i]**2 + grid[j]**2) / 2
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    means = [weights.sum(axis=1) @ grid, weights.sum(axis=0) @ grid]
    stds = [np.sqrt(w @ (grid - m)**2) for w, m in zip((weights.sum(axis=1), weights.sum(axis=0)), means)]
    return np.array(means), np.array(stds)


def test_std_and_length_have_the_exact_posterior(problem):
    core = problem.prior.core.sample_many(1, seed=7)
    core[0, :2] = 1.0, -1.2      # large and rough
    y = problem.measurements(problem.prior.transform_many(core), seed=1)[0]
    means, stds = quadrature(problem, y)
    assert (stds < 0.9).all() and np.abs(means).max() > 0.2      # data tell of both
    chains = hmc(problem, y, basis=karhunen_loeve(problem.prior, (1, 1, 17)), seed=3, progress=False)
    draws = chains.sample(len(chains.draws), seed=0)
    found = np.stack([stats.norm.ppf(law.cdf(draws.component(i).values[:, 0])) for i, law in enumerate((STD, LENGTH))])
    effective = chains.ess.min()
    assert (np.abs(found.mean(axis=1) - means) < 4 * stds / np.sqrt(effective)).all()
    np.testing.assert_allclose(found.std(axis=1), stds, rtol=5 / np.sqrt(2 * effective))
    # The prior's law of the two is another one.
    assert np.abs(means / np.sqrt(1 / effective)).max() > 6
    assert "std: " in repr(draws) and "correlation_length: " in repr(draws)


def test_errors_tell_the_remedy():
    V = FunctionSpace(UnitSquareMesh(20, 20), "CG", 1)
    for action, words in [
        (lambda: HierarchicalPrior(V, 1.0, 0.3), "take GaussianPrior"),
        (lambda: HierarchicalPrior(V, stats.norm(1, 0.1), 0.3), "may be negative"),
        (lambda: HierarchicalPrior(V, 1.0, stats.lognorm(0.5, scale=0.3), modes=10), "give more modes"),
        (lambda: HierarchicalPrior(V, STD, 0.3, modes=9999), "at most as many"),
        (lambda: HierarchicalPrior(VectorFunctionSpace(V.mesh(), "CG", 1), STD, 0.3), "a scalar space"),
        (lambda: HierarchicalPrior(V, STD, 0.3).slope_many(np.zeros((1, V.dim() + 1))), "use pull_back"),
    ]:
        with pytest.raises(InputError, match=words):
            action()
