"""Unknown numbers of any law, alone and beside fields: draws, derivatives, and the whole job against quadrature."""

import numpy as np
import pytest
from firedrake import (
    FunctionSpace, Function, SpatialCoordinate, TestFunction, UnitSquareMesh, VectorFunctionSpace, dx, exp, grad, inner,
    split,
)
from scipy import stats

from fem_diffusion import (
    GaussianPrior, InverseProblem, ProductPrior, ScalarPrior, Steady, TransformedPrior, fit, hmc,
    karhunen_loeve, laplace, point_sensors, simulate,
)
from fem_diffusion.errors import InputError
from fem_diffusion.samples import Samples

NOISE, SPREAD = 0.1, 0.8


def spaces():
    mesh = UnitSquareMesh(6, 6)
    return (FunctionSpace(mesh, "R", 0, name="strength"), FunctionSpace(mesh, "CG", 1),
            VectorFunctionSpace(mesh, "R", 0, dim=2, name="rates"))


@pytest.mark.parallel([1, 2])
def test_numbers_have_their_laws_and_fields_keep_their_modes():
    R, V, pair = spaces()
    laws = stats.uniform(1, 2), stats.gamma(3)
    numbers, field = ScalarPrior(pair, laws), GaussianPrior(V, std=0.5, correlation_length=0.5)
    prior = ProductPrior([ScalarPrior(R, stats.lognorm(SPREAD)), field, numbers])
    basis = karhunen_loeve(prior, (1, 4, 2))
    alone = karhunen_loeve(field, 4)
    assert basis.standard_prior
    comm = V.comm
    shares = np.sort([1.0, 0.5, 0.5, *alone.variances / alone.total_variance])[::-1]
    np.testing.assert_allclose(basis.variances, shares, rtol=1e-9)
    samples = Samples(prior.V, prior.sample_many(300, seed=1), np.zeros((300, 0)))
    first, last = (np.concatenate(comm.allgather(samples.component(i).values), axis=1) for i in (0, 2))
    for x, law in zip((first[:, 0], *last.T), (stats.lognorm(SPREAD), *laws)):
        assert stats.kstest(x, law.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(last.T)[0, 1]) < 4 / np.sqrt(300) and last[:, 0].min() >= 1 and last[:, 0].max() <= 3
    # Latents of draws are standard normal, as far as the bound of the uniform number.
    z = basis.encode(prior.core.sample_many(300, seed=2))
    assert np.abs(np.cov(z.T) - np.eye(7)).max() < 5 / np.sqrt(300)
    ends = numbers.transform_many(np.array([[-30.0, -30.0], [30.0, 30.0]])[:, :len(numbers._own)])
    if ends.size:
        np.testing.assert_allclose(ends[:, 0], [1, 3], rtol=1e-14)
        assert ends[0, 1] > 0 and np.isfinite(ends).all()
    told = f"\nstrength: {first.mean():.4g} ± {first.std(ddof=1):.2g}\nrates: {last[:, 0].mean():.4g} ±"
    assert comm.rank or told in repr(samples)
    axes = samples.component(0).plot()
    assert comm.rank or axes.get_xlabel() == "strength"
    # One law may be of all numbers.
    same = ScalarPrior(pair, stats.expon())
    assert repr(same) == "ScalarPrior(rates ~ expon() each)" and len(set(same.marginals)) == 1


@pytest.mark.parallel([1, 2])
def test_slopes_are_those_of_the_transform_and_go_through_products_and_transforms():
    R, V, pair = spaces()
    prior = ProductPrior([ScalarPrior(pair, [stats.uniform(1, 2), stats.gamma(3)]), ScalarPrior(R, stats.lognorm(0.5))])
    at, h = prior.core.sample_many(3, seed=0), 1e-5
    difference = (prior.transform_many(at + h) - prior.transform_many(at - h)) / (2 * h)
    np.testing.assert_allclose(prior.slope_many(at), difference, rtol=1e-7)
    np.testing.assert_allclose(prior.pull_back(np.ones((2, at.shape[1])), at[0]), [difference[0]] * 2, rtol=1e-7)
    square = TransformedPrior(ScalarPrior(R, stats.lognorm(0.5)), lambda x: x**2)
    one = square.core.sample_many(2, seed=3)
    np.testing.assert_allclose(square.transform_many(one), np.exp(one), rtol=1e-12)
    np.testing.assert_allclose(square.slope_many(one), np.exp(one), rtol=1e-12)


@pytest.mark.parallel([1, 2])
def test_ordered_numbers_have_the_law_of_independent_ones_in_that_order():
    R = VectorFunctionSpace(UnitSquareMesh(2, 2), "R", 0, dim=3, name="times")
    law = stats.gamma(2)
    prior, n = ScalarPrior(R, law, ordered=True), 4000
    x = np.concatenate(R.comm.allgather(prior.sample_many(n, seed=1)), axis=1)
    assert (np.diff(x, axis=1) > 0).all() and repr(prior) == "ScalarPrior(times ~ gamma(2) each, ordered)"
    same = np.sort(law.rvs((n, 3), random_state=2), axis=1)
    for one, other in zip(x.T, same.T):
        assert stats.ks_2samp(one, other).pvalue > 1e-3
    gaps = stats.ks_2samp(np.diff(x, axis=1).ravel(), np.diff(same, axis=1).ravel())
    assert gaps.pvalue > 1e-3
    rows, h = np.random.default_rng(3).standard_normal((2, prior.core.sample_many(1, 0).shape[1])), 1e-6
    for scale in (1.0, 4.0):
        at = scale * prior.core.sample_many(1, seed=4)[0]
        steps = h * np.eye(3)[:, :len(at)]      # one rank has all numbers
        ahead, behind = prior.transform_many(at + steps), prior.transform_many(at - steps)
        np.testing.assert_allclose(prior.pull_back(rows, at), (rows @ (ahead - behind).T)[:, :len(at)] / (2 * h),
                                   rtol=1e-4, atol=1e-7)
    far = prior.transform_many(np.array([[-30.0, 30.0, -30.0], [30.0, 30.0, 30.0]])[:, :len(at)])
    assert np.isfinite(far).all() and (np.diff(far, axis=1) >= 0).all()
    for action, words in ((lambda: prior.slope_many(at[None]), "use pull_back"),
                          (lambda: ScalarPrior(R, [law] * 3, ordered=True), "one law")):
        with pytest.raises(InputError, match=words):
            action()


def source_and_field():
    """A source of unknown strength, which is a number, beside an unknown field."""
    R, V, _ = spaces()
    prior = ProductPrior([ScalarPrior(R, stats.lognorm(SPREAD)), GaussianPrior(V, std=1.0, correlation_length=0.8)])
    m, u, v = Function(prior.V), Function(V), TestFunction(V)
    (strength, f), x = split(m), SpatialCoordinate(V.mesh())
    bump = 3 * exp(-10 * ((x[0] - 0.3)**2 + (x[1] - 0.4)**2))
    F = (inner(grad(u), grad(v)) + u * v - (strength * bump + f) * v) * dx
    sensors = point_sensors(V, [(0.2, 0.3), (0.6, 0.8), (0.9, 0.1), (0.5, 0.5)])
    problem = InverseProblem(prior, Steady(F, u, m), sensors, NOISE)
    return problem, karhunen_loeve(prior, (1, 8))


def quadrature(problem, basis, y):
    """Weights of the exact posterior of the number's latent on a grid: the field is Gaussian given the number."""
    z = np.vstack([np.zeros(basis.r), np.eye(basis.r)])
    readings = problem.readings(basis.parameters(z))
    number = int(np.argmax(basis.variances))     # all of its variance is in one mode
    per_unit = (readings[1 + number] - readings[0]) / (np.exp(SPREAD) - 1)
    others = np.delete(readings[1:] - readings[0], number, axis=0)
    grid = np.linspace(-6, 6, 4001)
    misfit = y - readings[0] - np.outer(np.exp(SPREAD * grid) - 1, per_unit)
    S = others.T @ others + NOISE**2 * np.eye(len(y))
    log = -grid**2 / 2 - np.einsum("ni,ij,nj->n", misfit, np.linalg.inv(S), misfit) / 2
    weights = np.exp(log - log.max())
    return number, grid, weights / weights.sum()


def off(z, effective, grid, weights):
    """Errors of mean and standard deviation of draws, in standard errors; of the second by its kurtosis."""
    mean = weights @ grid
    std = np.sqrt(weights @ (grid - mean)**2)
    kurtosis = weights @ (grid - mean)**4 / std**4
    return (abs(z.mean() - mean) / std * np.sqrt(effective),
            abs(z.std() / std - 1) / np.sqrt((kurtosis - 1) / 4) * np.sqrt(effective))


def test_strength_and_field_together_have_the_exact_posterior():
    problem, basis = source_and_field()
    y = problem.measurements(problem.prior.sample_many(1, seed=2), seed=2)[0]
    number, grid, weights = quadrature(problem, basis, y)
    chains = hmc(problem, y, basis=basis, seed=4, progress=False)
    draws = chains.sample(len(chains.draws), seed=0)
    assert max(off(draws.latents[:, number], chains.ess.min(), grid, weights)) < 4
    # The number is no Gaussian one of the same moments.
    law, strength = stats.lognorm(SPREAD), np.exp(SPREAD * grid)
    wrong = weights * stats.norm(law.mean(), law.std()).pdf(strength) * strength / stats.norm.pdf(grid)
    assert max(off(draws.latents[:, number], chains.ess.min(), grid, wrong / wrong.sum())) > 7
    mean, std = weights @ strength, np.sqrt(weights @ strength**2 - (weights @ strength)**2)
    at = laplace(problem, y, basis=basis).sample(500, seed=1).component(0).values[:, 0]
    assert abs(at.mean() - mean) < std and at.min() > 0


def test_references_take_as_many_modes_of_a_product_as_sharp_readings_see():
    problem, _ = source_and_field()
    sharp = InverseProblem(problem.prior, problem.forward, problem.observation, 1e-4)
    y = sharp.measurements(sharp.prior.sample_many(1, seed=2), seed=2)[0]
    assert laplace(sharp, y).basis.r > karhunen_loeve(sharp.prior).r


def test_a_bounded_rate_is_inferred_by_the_whole_job():
    R, V, _ = spaces()
    m, u, v, x = Function(R), Function(V), TestFunction(V), SpatialCoordinate(V.mesh())
    prior = ScalarPrior(R, stats.uniform(0.2, 1.0))
    sensors = point_sensors(V, [(0.0, 0.5), (0.5, 0.5), (1.0, 0.5)])
    problem = InverseProblem(prior, Steady((u - exp(-2 * m * (1 + x[0]))) * v * dx, u, m), sensors, 0.05)
    model = fit(problem, simulate(problem, 1000, seed=1, progress=False), progress=False)
    rates = np.linspace(0.2, 1.2, 401)
    readings = problem.readings(rates[:, None])
    # Slow decay, against the lower bound, and so fast that readings tell little of the upper one.
    for rate in (0.22, 1.1):
        y = readings[np.argmin(abs(rates - rate))] + 0.05 * np.random.default_rng(0).standard_normal(3)
        weights = np.exp(-((y - readings)**2).sum(axis=1) / (2 * 0.05**2))
        samples = model.condition(y).sample(4000, seed=2, progress=False)
        values = samples.values[:, 0]
        # Errors of the emulator, at most 5 % of a standard deviation, come on top of chance.
        assert max(off(values, 4000, rates, weights / weights.sum())) < 4 + 0.05 * np.sqrt(4000)
        assert values.min() >= 0.2 and values.max() <= 1.2


def test_errors_tell_the_remedy():
    R, V, pair = spaces()
    for action, words in [
        (lambda: ScalarPrior(V, stats.norm()), "of a field take TransformedPrior"),
        (lambda: ScalarPrior(R, stats.binom(3, 0.5)), "distribution is binom.3, 0.5.*CallablePrior"),
        (lambda: ScalarPrior(pair, [stats.norm(), stats.norm]) and ScalarPrior(pair, [stats.norm(), stats.beta]),
         "distribution 1 is.*with its parameters"),
        (lambda: ScalarPrior(pair, [stats.norm()]), "1 entries for 2 numbers"),
        (lambda: ScalarPrior(R, stats.norm()).transform_many(np.zeros((1, 3))), "shape"),
    ]:
        with pytest.raises(InputError, match=words):
            action()
