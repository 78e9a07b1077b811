"""Unknown levels of noise: their posterior and the field's, against quadrature over the level."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from firedrake import FunctionSpace, UnitIntervalMesh
from scipy.optimize import minimize
from scipy.stats import loguniform, multivariate_normal, norm

from fem_diffusion import (
    AdvectionDiffusion, Boundary, GaussianNoise, GaussianPrior, InverseProblem, Physics, Sampler, StudentNoise,
    TrainingOptions, check, exact, fit, hmc, join_noise, laplace, load_model, map_point, point_sensors, refine,
    simulate,
)
from fem_diffusion.errors import FileError, InputError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.trust import calibrate_model

OPTIONS = TrainingOptions(steps=100, evaluate_every=50, width=16, depth=1)
LAW, OTHER = loguniform(0.002, 0.05), loguniform(0.001, 0.1)
SPLIT = 12


def _problem(noise, n=24):
    V = FunctionSpace(UnitIntervalMesh(n), "CG", 1)
    prior = GaussianPrior(V, std=1.0, correlation_length=0.3, mean=3.0)
    forward = AdvectionDiffusion(V, V, "source", Physics(diffusivity=1.0), Boundary(dirichlet={1: 0.0, 2: 0.0}))
    return InverseProblem(prior, forward, point_sensors(V, np.linspace(0.05, 0.95, 19)[:, None]), noise)


NOISES = {"one": GaussianNoise(std=LAW), "one for each instrument": join_noise(
    (SPLIT, GaussianNoise(std=LAW)), (19 - SPLIT, GaussianNoise(std=OTHER)))}


def _quadrature(y, levels):
    """Posterior of the logarithms of the levels, and of the field, by a grid over their normal numbers."""
    fixed = _problem(GaussianNoise(std=1.0))
    prior = fixed.prior
    mean, C, rows = coefficients(prior.mean), prior.covariance_matrix(), fixed.sensitivity(prior.mean)
    d, seen = y - fixed.readings(mean[None])[0], rows @ C @ rows.T
    z = np.linspace(-4, 4, 401 if len(levels) == 1 else 61)
    stds = [law.ppf(norm.cdf(z)) for law in levels]
    sizes = [19] if len(levels) == 1 else [SPLIT, 19 - SPLIT]
    logs, weights, means, variances = [], [], [], []
    for places in product(range(len(z)), repeat=len(levels)):
        s = [std[i] for std, i in zip(stds, places)]
        S = seen + np.diag(np.repeat(s, sizes)**2)
        gain = np.linalg.solve(S, rows @ C).T
        weights.append(-sum(z[i]**2 for i in places) / 2 - d @ np.linalg.solve(S, d) / 2 - np.linalg.slogdet(S)[1] / 2)
        logs.append(np.log(s))
        means.append(mean + gain @ d)
        variances.append(np.diag(C) - (gain * (rows @ C).T).sum(axis=1))
    w = np.exp(np.array(weights) - max(weights))
    w, found = w / w.sum(), np.hstack([means, logs])
    average = w @ found
    spread = w @ (found - average)**2
    spread[:len(mean)] += w @ np.array(variances)
    return average, np.sqrt(spread)


def _away(values, count, truth):
    """Largest error of a mean in posterior standard deviations, and of a standard deviation as a factor."""
    mean, std = truth
    x = np.hstack([values[:, :-count], np.log(values[:, -count:])])
    inner = std > 0.05 * std[:-count].max()
    inner[-count:] = True
    return (np.abs((x.mean(axis=0) - mean) / std)[inner].max(),
            np.abs(np.log(x.std(axis=0) / std))[inner].max())


@pytest.fixture(scope="module", params=list(NOISES))
def job(request):
    noise = NOISES[request.param]
    problem = _problem(noise)
    count = len(problem.levels)
    m = problem.prior.sample_many(1, 5)
    y = problem.measurements(m, seed=3)[0]
    model = fit(problem, simulate(problem, 1000, seed=1, progress=False), options=OPTIONS, progress=False)
    return problem, y, model, count, _quadrature(y, (LAW, OTHER)[:count])


def test_the_posterior_of_level_and_field_is_that_of_quadrature(job):
    problem, y, model, count, truth = job
    # Standard errors of 4,000 samples are 1.6 and 1.1 %; those of a fit of 1,000 pairs are not counted.
    samples = model.condition(y).sample(4000, seed=1, progress=False)
    assert _away(samples.values, count, truth)[0] < 0.12 and _away(samples.values, count, truth)[1] < 0.1
    # Before the moves they are near, and not there.
    base = model.condition(y).sample(4000, seed=1, sampler=Sampler(corrections=0), progress=False)
    assert _away(base.values, count, truth)[0] > 0.2
    # A joint Gaussian of latents and readings knows nothing of a level.
    assert "noise level" in repr(samples)


def test_thirty_pairs_with_derivatives_tell_the_level_as_well(job):
    """No reading depends on a level, and yet its number is among the directions that are kept."""
    problem, y, _, count, truth = job
    data = simulate(problem, 30, seed=2, derivatives=True, progress=False)
    model = fit(problem, data, options=OPTIONS, progress=False)
    samples = model.condition(y).sample(4000, seed=1, progress=False)
    assert _away(samples.values, count, truth)[0] < 0.12 and _away(samples.values, count, truth)[1] < 0.1


def test_the_level_at_the_most_probable_point_is_that_with_the_field_integrated_out(job):
    problem, y, _, count, _ = job
    fixed = _problem(GaussianNoise(std=1.0))
    mean, rows = fixed.prior.mean, fixed.sensitivity(fixed.prior.mean)
    d, seen = y - fixed.readings(coefficients(mean)[None])[0], rows @ fixed.prior.covariance_matrix() @ rows.T
    sizes = [19] if count == 1 else [SPLIT, 19 - SPLIT]

    def stds(normal):
        return [law.ppf(norm.cdf(z)) for law, z in zip((LAW, OTHER), normal)]
    best = minimize(lambda normal: normal @ normal / 2 - multivariate_normal(
        cov=seen + np.diag(np.repeat(stds(normal), sizes)**2)).logpdf(d), np.zeros(count)).x
    # The point of field and level together is 4 % and more below.
    np.testing.assert_allclose(coefficients(map_point(problem, y).parameter)[-count:], stds(best), rtol=0.01)


def test_references_and_corrections_know_the_level(job):
    problem, y, model, count, truth = job
    chains = hmc(problem, y, seed=1, progress=False)
    # Some 400 effective draws.
    assert _away(chains.draws.values, count, truth)[0] < 0.2 and _away(chains.draws.values, count, truth)[1] < 0.2
    assert _away(laplace(problem, y).sample(2000, seed=1).values, count, truth)[0] < 0.5
    if count == 1:
        corrected = model.condition(y).correct(600, seed=2, progress=False)
        assert corrected.certificate.ess > 200 and corrected.certificate.light == "green"
        found = _away(corrected.values, count, truth)
        assert found[0] < 0.2 and found[1] < 0.2
    with pytest.raises(InputError, match="of unknown size"):
        exact(problem, y)


def test_a_check_takes_the_level_as_known(job):
    problem, y, model, count, truth = job
    found = model.condition(y).check(60, seed=3)
    assert found.verdict == "trustworthy" and "unknown noise counts as known" in str(found)
    assert "too wide" in str(check(Wider(model.condition(y)), 60, seed=1))


class Wider:
    """Samples that spread three times as far as those of a posterior."""

    def __init__(self, posterior):
        self.posterior, self.problem, self.y, self.basis = posterior, posterior.problem, posterior.y, posterior.basis

    def sample(self, n, *, seed):
        samples = self.posterior.sample(n, seed=seed, progress=False)
        mean = samples.latents.mean(axis=0)
        return replace(samples, latents=mean + 3 * (samples.latents - mean))


def test_the_model_is_calibrated_in_level_and_field(job):
    problem, _, model, count, _ = job
    found = calibrate_model(model, simulate(problem, 300, seed=8, progress=False), seed=1)
    assert found.p_value > 1e-3
    inside = found.coverage[0.9]
    assert abs(inside - 0.9) < 5 * found.coverage_error(0.9)


def test_a_file_keeps_the_level(job, tmp_path):
    problem, y, model, count, _ = job
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model", problem).condition(y).sample(20, seed=1, progress=False)
    np.testing.assert_array_equal(again.values, model.condition(y).sample(20, seed=1, progress=False).values)
    other = GaussianNoise(std=loguniform(0.002, 0.06))
    for noise in (other, GaussianNoise(std=0.01), StudentNoise(std=LAW)):
        with pytest.raises(FileError):
            load_model(tmp_path / "model", _problem(noise))


def test_repeats_and_failed_sensors_share_the_level(job):
    problem, y, model, count, _ = job
    rng = np.random.default_rng(1)
    std = 0.02 if count == 1 else np.repeat([0.02, 0.01], [SPLIT, 19 - SPLIT])
    clean = problem.readings(problem.prior.sample_many(1, 5))
    many = clean + std * rng.standard_normal((30, 19))
    many[3, 4] = np.nan
    posterior = model.condition(many)
    levels = np.log(posterior.sample(1000, seed=2, progress=False).values[:, -count:])
    # 500 readings tell a level to 3 %.
    assert np.abs(levels.mean(axis=0) - np.log(np.unique(std)[::-1])).max() < 0.25
    assert (levels.std(axis=0) < 0.08).all()
    assert len(posterior.problem.levels) == count and posterior.problem.prior is problem.prior


def test_sensors_are_predicted_from_the_others_with_the_level_unknown(job):
    """By quadrature: a mixture over the level, of which the others tell."""
    problem, y, model, *_ = job
    levels = problem.levels
    found = model.condition(y).cross_validate(draws=1000, seed=3)
    fixed = _problem(GaussianNoise(std=1.0))
    mean, C, rows = coefficients(fixed.prior.mean), fixed.prior.covariance_matrix(), fixed.sensitivity(fixed.prior.mean)
    d, seen, z = y - fixed.readings(mean[None])[0], rows @ C @ rows.T, np.linspace(-4, 4, 41)
    sizes = [19] if len(levels) == 1 else [SPLIT, 19 - SPLIT]
    stds = [law.of_normal(z) for law in levels]
    for i in (0, 9, 15):
        kept, weights, means, squares = np.delete(np.arange(19), i), [], [], []
        for places in product(range(len(z)), repeat=len(levels)):
            S = seen + np.diag(np.repeat([std[j] for std, j in zip(stds, places)], sizes)**2)
            inner = S[np.ix_(kept, kept)]
            gain = np.linalg.solve(inner, S[kept, i])
            weights.append(-sum(z[j]**2 for j in places) / 2 - np.linalg.slogdet(inner)[1] / 2
                           - d[kept] @ np.linalg.solve(inner, d[kept]) / 2)
            means.append(gain @ d[kept])
            squares.append(S[i, i] - gain @ S[kept, i] + means[-1]**2)
        w = np.exp(np.array(weights) - max(weights))
        w /= w.sum()
        average = w @ means
        std = np.sqrt(w @ squares - average**2)
        assert abs(found.mean[0, i] - (y[i] - d[i]) - average) < 0.2 * std
        assert abs(np.log(found.std[0, i] / std)) < 0.15
    assert found.noise is None and not found.worst


def test_a_report_knows_the_level(job, tmp_path):
    page = job[2].condition(job[1]).report(tmp_path / "page.html", draws=200, progress=False, check=False)
    text = page.read_text()
    assert "noise level" in text and "Readings and predictions" in text


@pytest.mark.parametrize("make, message", [
    (lambda: GaussianNoise(std=norm(0.1, 0.05)), "may be negative"),
    (lambda: StudentNoise(std=norm(0.1, 0.05)), "may be negative"),
])
def test_levels_that_are_none_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_refine_says_that_it_does_not_know_levels(job):
    problem, y, model, *_ = job
    with pytest.raises(InputError, match="unknown level"):
        refine(model, simulate(problem, 100, seed=1, progress=False), y, 50, seed=1)
