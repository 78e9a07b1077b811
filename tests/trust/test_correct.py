"""Corrections of wrong starts, against exact laws; variants that leave the law out must fail."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI
from scipy.stats import norm

from fem_diffusion.errors import SolveError
from fem_diffusion.reference.chains import ConvergenceWarning
from fem_diffusion.trust import correct as module
from fem_diffusion.trust.correct import corrected
from fem_diffusion.trust.proposals import Learner
from fem_diffusion.trust.start import Start
from fem_diffusion.trust.weights import mixture, resample, smoothed


class Target:
    """A problem in latents with standard normal prior and Gaussian noise, without a mesh."""

    everyone, differentiable, unrestricted = MPI.COMM_SELF, False, False
    failure, pulls, solves = "no solution", 0, 0

    def __init__(self, f, y, std):
        self.f, self.y, self.std = f, np.array(y, dtype=float), np.broadcast_to(np.array(std, float), np.shape(y))

    def readings(self, z):
        self.solves += len(z)
        return self.f(z)

    def allowed(self, z):
        return np.ones(len(z), dtype=bool)

    def log_prior(self, z):
        return -(z**2).sum(axis=1) / 2

    def log_likelihood(self, readings):
        return norm.logpdf(readings, self.y, self.std).sum(axis=1)

    log_density = log_likelihood

    def with_score(self, readings):
        return self.log_density(readings), (readings - self.y) / self.std**2

    def energy(self, z):
        return -self.log_prior(z) - self.log_likelihood(self.readings(z))

    def linearised(self, z):
        """By differences."""
        steps = 1e-5 * np.eye(self.r)
        jacobian = np.stack([(self.f((z + e)[None]) - self.f((z - e)[None]))[0] / 2e-5 for e in steps], axis=1)
        self.solves += 1 + 2 * self.r
        return (self.f(z[None])[0] - self.y) / self.std, jacobian / self.std[:, None]

    def expanded(self, z):
        misfit, jacobian = self.linearised(z)
        return z + jacobian.T @ misfit, np.eye(self.r) + jacobian.T @ jacobian

    def energy_and_gradient(self, z):
        return self.energy(z), np.array([self.expanded(row)[0] for row in z])

    def start(self, z, log_density=None, base=None):
        """From samples (n, R), of which any number may be had."""
        self.r, self.level_rows = z.shape[1], np.empty((0, z.shape[1]))
        return Start(self, z, lambda n: z[-n:], log_density, base)


def run(target, z, solves=1500, seed=1, progress=False, **kwargs):
    found = corrected(target, target.start(z, **kwargs), target, solves, seed=seed, progress=progress)
    weights = np.full(len(found.z), 1 / len(found.z)) if found.weights is None else found.weights
    assert found.solves <= solves and target.solves <= solves
    return found, weights


def check_moments(found, weights, mean, std, sigmas=4.5):
    """Mean and standard deviation within their Monte Carlo error, by the effective sample size that is claimed."""
    ours = weights @ found.z
    spread = np.sqrt(weights @ (found.z - ours)**2)
    assert (np.abs(ours - mean) < sigmas * std / np.sqrt(found.ess)).all(), (ours, mean, found.ess)
    assert (np.abs(spread / std - 1) < sigmas / np.sqrt(2 * found.ess)).all(), (spread, std, found.ess)


def linear(r, k, seed=0):
    """A linear problem with its exact posterior mean and covariance."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((k, r))
    target = Target(lambda z: z @ A.T, A @ rng.standard_normal(r) + 0.5 * rng.standard_normal(k), 0.5)
    covariance = np.linalg.inv(np.eye(r) + A.T @ A / 0.25)
    return target, covariance @ A.T @ target.y / 0.25, covariance


def curved():
    """Two latents on a bent ridge, and one more that is not seen."""
    return Target(lambda z: np.stack([z[:, 0] + z[:, 1]**2, z[:, 0] / 2], axis=1), [0.3, 0.1], [0.3, 0.4])


def moments_on_a_grid(target, r=2, reach=6.0, n=400):
    """Mean and standard deviation of the first r latents by the trapezium rule."""
    axes = np.meshgrid(*[np.linspace(-reach, reach, n)] * r, indexing="ij")
    z = np.stack([axis.ravel() for axis in axes], axis=1)
    log = target.log_prior(z) + target.log_likelihood(target.f(z))
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    mean = weights @ z
    return mean, np.sqrt(weights @ (z - mean)**2)


@pytest.mark.parametrize("width, shift", [(2.5, 0.0), (0.4, 0.0), (1.0, 5.0)])
def test_a_wrong_gaussian_start_is_repaired(width, shift):
    target, mean, covariance = linear(5, 4)
    std = np.sqrt(covariance.diagonal())
    normal = np.random.default_rng(3).standard_normal((1500, 5))
    z = mean + shift * std + width * normal @ np.linalg.cholesky(covariance).T
    found, weights = run(target, z)
    assert found.ess > 500
    check_moments(found, weights, mean, std)


def test_work_beside_the_solves_is_shown(capsys):
    """Draws of the surrogate take long after the last solve, and chains with gradients have steps of their own."""
    target = linear(2, 2)[0]
    corrected(target, target.start(2 * np.random.default_rng(0).standard_normal((400, 2))), target, 800, seed=1,
              progress=True)
    told = capsys.readouterr().err
    assert "correct: 100%" in told and "surrogate draws: 100%" in told and "\x1b" not in told


def test_a_cubic_far_from_its_start_is_repaired():
    target = Target(lambda z: z**3, [20.0], 1.0)
    mean, std = moments_on_a_grid(target, 1, n=20001)
    found, weights = run(target, 1.5 + 0.3 * np.random.default_rng(0).standard_normal((1000, 1)))
    check_moments(found, weights, mean, std)


@pytest.mark.filterwarnings("ignore:The samples are rough")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_bent_ridge_is_sampled(seed):
    target = curved()
    mean, std = moments_on_a_grid(target)
    found, weights = run(target, 2 * np.random.default_rng(seed).standard_normal((1000, 3)), seed=seed)
    check_moments(found, weights, np.append(mean, 0.0), np.append(std, 1.0))


def test_two_modes_that_no_move_joins_are_refused():
    target = Target(lambda z: z**2, [4.0], 0.05)
    with pytest.raises(SolveError, match="not converged|weights say too little"):
        run(target, np.random.default_rng(0).standard_normal((1000, 1)))


def biased(z):
    """The linear problem's readings with an error that an emulator may have."""
    return 0.7 * z


def test_an_emulator_that_is_wrong_does_not_matter():
    target = Target(lambda z: z, [1.0, -2.0], 0.5)
    start = 2 * np.random.default_rng(1).standard_normal((1000, 2))
    found, weights = run(target, start, base=lambda z: (biased(z), lambda v: 0.7 * v))
    check_moments(found, weights, target.y / 1.25, np.sqrt(0.2))


def independent(r=3):
    """A problem whose posterior has independent latents, and samples that are wider and off, with their density."""
    target = Target(lambda z: z, [1.0, -1.0, 0.5], 0.5)
    mean, std, rng = target.y / 1.25, np.sqrt(0.2) * np.ones(3), np.random.default_rng(5)
    z = mean + 0.5 * std + 1.3 * std * rng.standard_normal((1500, r))
    return target, z, mean, std, lambda z: norm.logpdf(z, mean + 0.5 * std, 1.3 * std).sum(axis=1)


def test_samples_of_known_density_get_weights():
    target, z, mean, std, density = independent()
    found, weights = run(target, z, solves=1000, log_density=density)
    assert found.method == "weights" and found.solves == 1000 and found.khat < 0.5
    check_moments(found, weights, mean, std)


def test_weights_without_the_density_of_the_samples_fail(monkeypatch):
    target, z, mean, std, _ = independent()
    monkeypatch.setattr(module, "_AMORTISED", 0.0)
    found, weights = run(target, z, solves=1000, log_density=lambda z: np.zeros(len(z)))
    assert found.method == "weights"
    with pytest.raises(AssertionError):
        check_moments(found, weights, mean, std)


def moves(monkeypatch, target, z, **kwargs):
    """A run whose surrogate never gets weights, so that chains with proposals are left."""
    monkeypatch.setattr(module, "_HOPE", 0.0)
    monkeypatch.setattr(module, "_LEARNING", 0.8)
    return run(target, z, **kwargs)


class Wrong:
    """A surrogate that stays wrong: the law's centre is off by half its width."""

    importance, axes, parameters = np.zeros(2), np.eye(2), None

    def with_pull(self, z):
        return 0.8 * z, lambda v: 0.8 * v

    def __call__(self, z):
        return 0.8 * z


def test_chains_accept_with_the_forward_problem(monkeypatch):
    target, again = (Target(lambda z: z, [1.0, -1.0], 0.7) for _ in range(2))
    start, std = np.random.default_rng(1).standard_normal((1000, 2)), np.sqrt(0.49 / 1.49)
    monkeypatch.setattr(Learner, "fit", lambda self: setattr(self, "surrogate", Wrong()))
    found, weights = moves(monkeypatch, target, start, solves=4000)
    assert found.method == "surrogate moves" and 0.3 < found.acceptance < 0.99 and found.rhat < 1.05
    check_moments(found, weights, target.y / 1.49, std)
    # An acceptance that believes the surrogate leaves its law.
    monkeypatch.setattr(module, "_energy", lambda latent, z, readings: latent.log_prior(z) * -1
                        - latent.log_likelihood(0.8 * z))
    found, weights = moves(monkeypatch, again, start, solves=4000)
    with pytest.raises(AssertionError):
        check_moments(found, weights, target.y / 1.49, std)


class Smooth(Target):
    """A problem with adjoints."""

    differentiable = True

    def energy_and_gradient(self, z):
        self.pulls += len(z)
        steps = 1e-5 * np.eye(self.r)
        pulls = np.stack([(self.f(z + e) - self.f(z - e)) / 2e-5 for e in steps], axis=2)
        return self.energy(z), z + np.einsum("nkr,nk->nr", pulls, self.with_score(self.f(z))[1])


@pytest.mark.parametrize("moment", ["no round is cold enough", "no proposal is accepted"])
def test_gradients_are_left_where_no_surrogate_holds(monkeypatch, capsys, moment):
    target = Smooth(lambda z: z + z**3 / 4, [1.0, -1.0], 0.7)
    mean, std = moments_on_a_grid(target)
    start = np.random.default_rng(1).standard_normal((1000, 2))
    if moment == "no round is cold enough":
        judge = Learner.judge
        monkeypatch.setattr(Learner, "judge", lambda self, *args: (judge(self, *args), setattr(self, "temper", 99))[0])
        found, weights = run(target, start, solves=20000, progress=True)
        assert "hmc:" in capsys.readouterr().err
    else:
        monkeypatch.setattr(module, "_NEVER", 1.1)
        monkeypatch.setattr(module, "_RIPE", 20000)
        found, weights = moves(monkeypatch, target, start, solves=8000)
    assert found.method == "gradient moves" and found.pulls == target.pulls and found.ess > 400
    check_moments(found, weights, mean, std)


def test_too_few_solves_are_refused_with_what_would_do():
    rng = np.random.default_rng(0)
    A = rng.standard_normal((20, 20))
    target = Target(lambda z: np.sin(2 * z @ A) + z @ A, A.sum(axis=0), 0.05)
    with pytest.raises(SolveError, match=r"not corrected. Give about solves=\d.* pass a path"):
        run(target, rng.standard_normal((300, 20)), solves=300)


def test_a_run_goes_on_where_it_was_with_more_solves(tmp_path):
    def correct(target, solves, path):
        start = target.start(2 * np.random.default_rng(4).standard_normal((1000, 3)))
        return corrected(target, start, target, solves, seed=3, path=path)
    whole = correct(curved(), 900, None)
    first, second = curved(), curved()
    with pytest.warns(ConvergenceWarning, match="rough"):
        correct(first, 450, tmp_path)
    again = correct(second, 900, tmp_path)
    assert second.solves == again.solves - first.solves + 1
    np.testing.assert_allclose(again.z, whole.z, rtol=1e-8)
    np.testing.assert_allclose(again.weights, whole.weights, rtol=1e-6)


def test_a_mixture_knows_its_constants():
    """Draws of two normal laws, of which one was missed in the tail of the other: weights for a third."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.standard_normal(4000), 3 + 2 * rng.standard_normal(1000)])
    energies = np.stack([z**2 / 2 + 7.0, (z - 3)**2 / 8])
    law = mixture(energies, np.array([4000, 1000]))
    exact = -np.log(0.8 * norm.pdf(z) + 0.2 * norm.pdf(z, 3, 2))
    assert np.std(law - exact) < 0.05
    weights = smoothed((z - 1)**2 / 2, law)
    assert weights.khat < 0.5 and abs(weights.values @ z - 1) < 4 / np.sqrt(weights.ess)
    chosen = resample(weights.values, 1000, rng)
    assert abs(z[chosen].mean() - weights.values @ z) < 0.05
    assert len(np.unique(chosen)) == 1000 or np.bincount(chosen).max() <= np.ceil(1000 * weights.values.max())


def test_weights_of_draws_that_are_all_far_say_so():
    """The law of one draw among thousands that are ever farther: no tail can be fitted."""
    for energy in (np.geomspace(1, 1e6, 200), np.append(np.zeros(1), np.full(199, 1e5)), np.arange(200.0)**3):
        weights = smoothed(energy, np.zeros(200))
        assert np.isfinite(weights.values).all() and weights.ess < 10 and weights.khat > 0.7


def test_chains_too_short_to_tell_are_refused():
    """Below four draws neither R-hat nor effective sample size is a number."""
    z, told = np.zeros((2, 1)), SimpleNamespace(budget=500, path=None, solves=400)
    found = module.Corrected(z, z, "gradient moves", 400, 100, np.nan, rhat=np.nan, acceptance=0.5, made=2)
    for one in (found, replace(found, rhat=None)):
        with pytest.raises(SolveError, match="too few solves for chains after 400.*about solves=2,000"):
            module._accepted(told, one)
