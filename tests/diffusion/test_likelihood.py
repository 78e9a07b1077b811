"""Log densities through the probability-flow ODE against known ones."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from fem_diffusion.diffusion import (
    Denoiser, GaussianNoise, TrainingOptions, fit_denoiser, linear_base, log_density,
)
from fem_diffusion.errors import InputError
from truths import GaussianTruth, MixtureTruth, flat_base, gaussian_target

Y = torch.zeros(40, 2, dtype=torch.float64)


def _gaussian():
    mean, covariance = gaussian_target()
    z = torch.tensor(np.random.default_rng(0).multivariate_normal(mean, covariance, len(Y)))
    return Denoiser(flat_base(5), GaussianTruth(mean, covariance)), z, multivariate_normal(mean, covariance).logpdf(z)


def test_gaussian_that_the_base_misses():
    denoiser, z, exact = _gaussian()
    np.testing.assert_allclose(log_density(denoiser, z, Y), exact, atol=1e-3)


def test_base_alone_is_its_own_density():
    g = torch.Generator().manual_seed(0)
    operator = torch.randn(2, 4, generator=g, dtype=torch.float64)
    base = linear_base(operator, 0.1 * torch.eye(2, dtype=torch.float64))
    y, z = (torch.randn(6, n, generator=g, dtype=torch.float64) for n in (2, 4))
    exact = [multivariate_normal(m, base.covariance).logpdf(x) for m, x in zip(base.mean(y), z)]
    np.testing.assert_allclose(log_density(Denoiser(base, None), z, y), exact, atol=1e-3)


def test_mixture_and_a_broken_network():
    truth = MixtureTruth()
    x = torch.linspace(-3, 3, len(Y), dtype=torch.float64)[:, None]
    parts = zip(truth.weights.tolist(), truth.means.tolist(), truth.stds.tolist())
    exact = np.log(sum(w * norm.pdf(x[:, 0].numpy(), m, s) for w, m, s in parts))
    found = log_density(Denoiser(flat_base(1), truth), x, Y)
    np.testing.assert_allclose(found, exact, atol=5e-3)
    broken = log_density(Denoiser(flat_base(1), lambda *inputs: 1.1 * truth(*inputs)), x, Y).numpy()
    assert np.abs(broken - exact).max() > 0.1


def test_a_trained_network_has_a_normalised_density():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1000, 1, generator=g, dtype=torch.float64)
    denoiser, _ = fit_denoiser(z, z**2, GaussianNoise(std=0.5), options=TrainingOptions(steps=400, width=32, depth=2))
    assert denoiser.network is not None
    grid = torch.linspace(-4, 4, 401, dtype=torch.float64)[:, None]
    density = log_density(denoiser, grid, torch.full((401, 1), 1.5, dtype=torch.float64)).exp()
    assert abs(float(density.sum()) * 0.02 - 1) < 1e-2


def test_random_probes_are_unbiased():
    denoiser, z, exact = _gaussian()
    estimates = torch.stack([log_density(denoiser, z, Y, probes=4, generator=torch.Generator().manual_seed(seed))
                             for seed in range(12)])
    error = (estimates.mean(0) - torch.tensor(exact)).numpy()
    assert np.abs(error).max() > 1e-3
    # Each error is that of a mean of 12 estimates; 40 of them stay below 4.5 standard errors.
    assert (np.abs(error) < 4.5 * estimates.std(0).numpy() / np.sqrt(12) + 1e-3).all()


@pytest.mark.parametrize("change, words", [
    ({"z": torch.zeros(40, 3)}, "Latents and measurements"), ({"y": torch.zeros(39, 2)}, "Latents and measurements"),
    ({"z": torch.full((40, 5), torch.nan)}, "finite"), ({"probes": 3}, "pass a generator"),
    ({"probes": 2.0}, "probes is 2.0"), ({"probes": 3, "generator": 7}, "manual_seed"), ({"chunk": 0}, "chunk is 0"),
    ({"z": torch.zeros(40, 5) * 1j}, "imaginary"), ({"y": 1e200 * torch.ones_like(Y)}, "beyond"),
    ({"z": None}, "torch.as_tensor"), ({"denoiser": None}, "denoiser is of type NoneType"),
])
def test_wrong_input_is_refused(change, words):
    denoiser, z, _ = _gaussian()
    with pytest.raises(InputError, match=words):
        log_density(**{"denoiser": denoiser, "z": z, "y": Y, **change})
