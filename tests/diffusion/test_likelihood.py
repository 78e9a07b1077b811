"""Log densities through the probability-flow ODE against known ones."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from fem_diffusion.diffusion import (
    CallableNoise, Denoiser, TrainingOptions, fit_denoiser, linear_base, log_density,
)
from fem_diffusion.errors import InputError
from truths import GaussianTruth, Known, MixtureTruth, at_zero, gaussian_target

N = 40


def _gaussian():
    """A conditioned denoiser, latents (1, N, r), and their exact density."""
    mean, covariance = gaussian_target()
    z = torch.tensor(np.random.default_rng(0).multivariate_normal(mean, covariance, N))[None]
    return at_zero(GaussianTruth(mean, covariance), 5), z, multivariate_normal(mean, covariance).logpdf(z)


def test_gaussian_that_the_base_misses():
    conditioned, z, exact = _gaussian()
    np.testing.assert_allclose(log_density(conditioned, z)[0], exact, atol=1e-3)
    # Rows that are integrated together, and measurements that are all alike, change nothing.
    alike = log_density(at_zero(conditioned.network, 5, N), z.transpose(0, 1), chunk=7)
    np.testing.assert_allclose(alike[:, 0], exact, atol=1e-3)


@pytest.mark.parametrize("std", [0.03, 0.002])
def test_posteriors_far_narrower_than_the_base(std):
    """The divergence changes within angles of that width, so that it needs more than a few dozen nodes."""
    truth = GaussianTruth(np.full(2, 0.4), std**2 * np.eye(2))
    z = 0.4 + std * torch.randn(1, N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = norm.logpdf(z[0].numpy(), 0.4, std).sum(1)
    np.testing.assert_allclose(log_density(at_zero(truth, 2), z)[0], exact, atol=5e-3)


def test_base_alone_is_its_own_density():
    g = torch.Generator().manual_seed(0)
    operator = torch.randn(2, 4, generator=g, dtype=torch.float64)
    base = linear_base(operator, 0.1 * torch.eye(2, dtype=torch.float64))
    y, z = torch.randn(6, 2, generator=g, dtype=torch.float64), torch.randn(6, 3, 4, generator=g, dtype=torch.float64)
    conditioned = Denoiser(base).at(y)
    exact = [multivariate_normal(mean, conditioned.located.covariance[0]).logpdf(x)
             for mean, x in zip(conditioned.located.mean, z)]
    np.testing.assert_allclose(log_density(conditioned, z, chunk=5), exact, atol=1e-3)


def test_mixture_and_a_broken_network():
    truth = MixtureTruth()
    x = torch.linspace(-3, 3, N, dtype=torch.float64)[None, :, None]
    parts = zip(truth.weights.tolist(), truth.means.tolist(), truth.stds.tolist())
    exact = np.log(sum(w * norm.pdf(x[0, :, 0].numpy(), m, s) for w, m, s in parts))
    np.testing.assert_allclose(log_density(at_zero(truth), x)[0], exact, atol=5e-3)
    broken = log_density(at_zero(Known(lambda *inputs: 1.1 * truth(*inputs))), x)[0].numpy()
    assert np.abs(broken - exact).max() > 0.1


def test_a_trained_network_has_a_normalised_density():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1000, 1, generator=g, dtype=torch.float64)
    noise = CallableNoise(lambda y, g: y + 0.5 * torch.randn(y.shape, generator=g, dtype=y.dtype))
    denoiser, _ = fit_denoiser(z, z**2, noise, options=TrainingOptions(steps=400, width=32, depth=2))
    assert denoiser.network is not None
    grid = torch.linspace(-4, 4, 401, dtype=torch.float64).expand(2, -1)[..., None]
    density = log_density(denoiser.at(torch.tensor([[1.5], [0.5]], dtype=torch.float64)), grid).exp()
    assert (density.sum(1) * 0.02 - 1).abs().max() < 1e-2 and (density[0] - density[1]).abs().max() > 0.05


def test_random_probes_are_unbiased():
    conditioned, z, exact = _gaussian()
    estimates = torch.stack([log_density(conditioned, z, probes=4, seed=seed)[0] for seed in range(12)])
    error = (estimates.mean(0) - torch.tensor(exact)).numpy()
    assert np.abs(error).max() > 1e-3
    # Each error is that of a mean of 12 estimates; 40 of them stay below 4.5 standard errors.
    assert (np.abs(error) < 4.5 * estimates.std(0).numpy() / np.sqrt(12) + 1e-3).all()


@pytest.mark.parametrize("change, words", [
    ({"z": torch.zeros(1, 40, 3)}, r"give \(1, n, 5\)"), ({"z": torch.zeros(2, 40, 5)}, r"give \(1, n, 5\)"),
    ({"z": torch.full((1, 40, 5), torch.nan)}, "finite"), ({"seed": None}, "seed is None"),
    ({"probes": 2.0}, "probes is 2.0"), ({"probes": -1}, "probes is -1"), ({"chunk": 0}, "chunk is 0"),
    ({"z": torch.zeros(1, 40, 5) * 1j}, "imaginary"), ({"z": 1e200 * torch.ones(1, 40, 5).double()}, "beyond"),
    ({"z": None}, "torch.as_tensor"), ({"conditioned": None}, "conditioned is of type NoneType"),
])
def test_wrong_input_is_refused(change, words):
    conditioned, z, _ = _gaussian()
    with pytest.raises(InputError, match=words):
        log_density(**{"conditioned": conditioned, "z": z, **change})
