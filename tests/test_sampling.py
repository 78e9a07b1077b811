"""Samplers against known posteriors: moments to Monte Carlo error, and broken samplers that must fail."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fem_diffusion.diagnostics import moment_p_values
from fem_diffusion.diffusion import (
    Denoiser, linear_base, sample_latents, sampling, variance_exploding, variance_preserving,
)
from fem_diffusion.errors import InputError

FORMULATIONS = [variance_exploding(), variance_preserving()]
N = 4000


def _base(r, k):
    """A base that says little: standard normal latents and measurements without influence."""
    return linear_base(torch.zeros(k, r, dtype=torch.float64), torch.eye(k, dtype=torch.float64))


class GaussianTruth:
    """The exact N for w_0 ~ N(mean, covariance), from conditioning the joint Gaussian of w_0, noise and v."""

    def __init__(self, mean, covariance):
        self.mean, self.values, self.axes = mean, *torch.linalg.eigh(covariance)

    def __call__(self, v, angle, features):
        c, s = torch.cos(angle), torch.sin(angle)
        white = (v - c * self.mean) @ self.axes / (c**2 * self.values + s**2)
        signal = self.mean + (c * self.values * white) @ self.axes.T
        return s * signal - c * s * white @ self.axes.T


class MixtureTruth:
    """The exact N for a mixture of two normals in one dimension."""

    weights, means, stds = torch.tensor([0.3, 0.7]), torch.tensor([-2.0, 1.5]), torch.tensor([0.3, 0.5])

    def __call__(self, v, angle, features):
        c, s = torch.cos(angle), torch.sin(angle)
        variance = c**2 * self.stds**2 + s**2
        error = v - c * self.means
        share = torch.softmax(torch.log(self.weights) - error**2 / (2 * variance) - torch.log(variance) / 2, dim=1)
        signal = self.means + c * self.stds**2 * error / variance
        return (share * (s * signal - c * s * error / variance)).sum(1, keepdim=True)


def _target(r=5):
    g = np.random.default_rng(3)
    root = g.standard_normal((r, r)) * np.linspace(0.15, 1.0, r)
    return g.standard_normal(r), root @ root.T + 0.01 * np.eye(r)


def _sample(network, r, formulation, alpha, steps, n=N):
    denoiser = Denoiser(_base(r, 2), network)
    y = torch.zeros(n, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return sample_latents(denoiser, y, formulation, generator=generator, alpha=alpha, steps=steps).numpy()


@pytest.mark.parametrize("formulation", FORMULATIONS, ids=lambda f: f.name)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_one_step_is_exact_where_the_base_is_the_truth(formulation, alpha):
    g = torch.Generator().manual_seed(0)
    operator = torch.randn(3, 6, generator=g, dtype=torch.float64)
    y = torch.randn(3, generator=g, dtype=torch.float64)
    base = linear_base(operator, 0.01 * torch.eye(3, dtype=torch.float64))
    precision = np.eye(6) + 100 * operator.T.numpy() @ operator.numpy()
    covariance = np.linalg.inv(precision)
    mean = covariance @ (100 * operator.T @ y).numpy()
    z = sample_latents(Denoiser(base, None), y.expand(N, 3), formulation, generator=g, alpha=alpha, steps=1)
    assert min(moment_p_values(z.numpy(), mean, covariance)) > 1e-4


@pytest.mark.parametrize("formulation", FORMULATIONS, ids=lambda f: f.name)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
def test_gaussian_posterior_that_the_base_misses(formulation, alpha):
    mean, covariance = _target()
    network = GaussianTruth(torch.tensor(mean), torch.tensor(covariance))
    assert min(moment_p_values(_sample(network, 5, formulation, alpha, 250), mean, covariance)) > 1e-4


@pytest.mark.parametrize("formulation", FORMULATIONS, ids=lambda f: f.name)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_bimodal_posterior(formulation, alpha):
    z = _sample(MixtureTruth(), 1, formulation, alpha, 100)[:, 0]
    truth = MixtureTruth
    share = (z > -0.5).mean()
    assert abs(share - 0.7) < 4 * np.sqrt(0.7 * 0.3 / N)
    grid = np.linspace(-3.5, 3.5, 200)
    cdf = sum(float(w) * norm.cdf(grid, float(m), float(s)) for w, m, s in zip(truth.weights, truth.means, truth.stds))
    # Kolmogorov-Smirnov distance at level 1e-4.
    assert np.abs((z[:, None] <= grid).mean(0) - cdf).max() < 2.23 / np.sqrt(N)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_score_scaled_by_a_fifth_fails(alpha):
    mean, covariance = _target()
    truth = GaussianTruth(torch.tensor(mean), torch.tensor(covariance))

    def broken(v, angle, features):
        # 1.2 q = -v + cot N' with q = -v + cot N.
        return 1.2 * truth(v, angle, features) - 0.2 * torch.tan(angle) * v
    assert min(moment_p_values(_sample(broken, 5, variance_exploding(0.01, 20.0), alpha, 200), mean, covariance)) < 1e-4


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_missing_noise_fails(alpha, monkeypatch):
    mean, covariance = _target()
    true_normal = sampling._normal
    calls = []

    def silent(like, generator):
        calls.append(1)
        return true_normal(like, generator) if len(calls) == 1 else torch.zeros_like(like)
    monkeypatch.setattr(sampling, "_normal", silent)
    network = GaussianTruth(torch.tensor(mean), torch.tensor(covariance))
    assert min(moment_p_values(_sample(network, 5, variance_preserving(), alpha, 100), mean, covariance)) < 1e-4


def test_error_falls_with_the_square_of_the_step():
    mean, covariance = _target()
    network = GaussianTruth(torch.tensor(mean), torch.tensor(covariance))
    fine, *coarse = [_sample(network, 5, variance_exploding(), 0.0, steps, n=100) for steps in (1600, 50, 100)]
    errors = [np.abs(z - fine).max() for z in coarse]
    assert np.log2(errors[0] / errors[1]) > 1.8


def test_same_seed_same_samples():
    mean, covariance = _target()
    denoiser = Denoiser(_base(5, 2), GaussianTruth(torch.tensor(mean), torch.tensor(covariance)))
    y = torch.zeros(10, 2, dtype=torch.float64)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_latents(denoiser, y, variance_preserving(), alpha=1.0, generator=generator)
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("change, words", [
    ({"alpha": -1.0}, "alpha"), ({"steps": 0}, "steps"), ({"steps": 2.5}, "steps"),
])
def test_wrong_settings_are_refused(change, words):
    denoiser = Denoiser(_base(2, 2), None)
    with pytest.raises(InputError, match=words):
        sample_latents(denoiser, torch.zeros(3, 2, dtype=torch.float64), variance_preserving(),
                       generator=torch.Generator(), **change)


@pytest.mark.parametrize("y", [torch.zeros(3, 4), torch.full((3, 2), torch.nan), torch.zeros(2)])
def test_wrong_measurements_are_refused(y):
    with pytest.raises(InputError, match="finite and of shape"):
        sample_latents(Denoiser(_base(2, 2), None), y, variance_preserving(), generator=torch.Generator())
