"""Hard bounds of latents are found where there are any, and samplers keep them."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm, truncnorm

from fem_diffusion.diffusion import (
    Sampler, Support, TrainingOptions, find_support, fit_denoiser, log_density, sample_latents,
)
from fem_diffusion.errors import InputError
from truths import Known, at_zero, draw


@pytest.mark.parametrize("n", [1200, 10000])
def test_bounds_are_found_and_not_invented(n):
    g = np.random.default_rng(0)
    z = torch.tensor(np.stack([g.uniform(-1, 3, n), g.exponential(2.0, n), g.standard_normal(n), g.standard_t(3, n),
                               g.gamma(3.0, size=n)], axis=1))
    support = find_support(z)
    np.testing.assert_allclose(support.lower[:2], [-1, 0], atol=20 / n)
    assert abs(float(support.upper[0]) - 3) < 20 / n
    assert (support.upper[1:] == math.inf).all() and (support.lower[2:] == -math.inf).all()
    assert support.contains(z).all() and find_support(z[:, 2:]) is None


@pytest.mark.parametrize("n", [300, 20000])
def test_soft_tails_have_no_bounds_whatever_the_rest_of_the_law(n):
    for seed in range(20):
        g = np.random.default_rng(seed)
        far = np.where(g.random(n) < 0.03, 50 + 5 * g.standard_normal(n), g.standard_normal(n))
        z = np.stack([far, g.lognormal(0.0, 1.0, n), g.standard_t(1.5, n), *g.standard_normal((5, n))], axis=1)
        assert find_support(torch.tensor(z)) is None, seed


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_samples_have_the_restricted_law(alpha):
    support = Support(torch.tensor([-0.5], dtype=torch.float64), torch.tensor([math.inf], dtype=torch.float64))
    for size in (1, 3):
        z = sample_latents(at_zero(support=support, size=size), 3000, Sampler(alpha), seed=0)
        assert z.shape == (size, 3000, 1)
        assert min(kstest(part[:, 0].numpy(), truncnorm(-0.5, math.inf).cdf).pvalue for part in z) > 1e-4


@pytest.mark.parametrize("n", [1, 2000])
def test_a_measurement_at_a_bound_leaves_no_sample_outside(n):
    """Where a twentieth of the network's law is inside, as with a reading beyond the parameters' bounds."""
    support = Support(torch.tensor([1.645], dtype=torch.float64), torch.tensor([math.inf], dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seeds = range(20 if n == 1 else 1)
        z = torch.cat([sample_latents(at_zero(support=support), n, seed=seed)[0] for seed in seeds])
    assert (z >= 1.645).all() and kstest(z[:, 0].numpy(), truncnorm(1.645, math.inf).cdf).pvalue > 1e-3


def test_rows_without_a_chance_are_warned_of():
    support = Support(torch.tensor([50.0], dtype=torch.float64), torch.tensor([60.0], dtype=torch.float64))
    with pytest.warns(UserWarning, match="3 of 3 samples lie outside"):
        z = draw(at_zero(support=support), 3, Sampler())
    assert (z < 10).all()


def test_diverged_rows_are_not_hidden():
    support = Support(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    diverged = Known(lambda v, angle: torch.full_like(v, torch.nan))
    assert torch.isnan(draw(at_zero(diverged, support=support), 3, Sampler())).all()


def test_density_is_zero_outside():
    support = Support(torch.zeros(1, dtype=torch.float64), torch.full((1,), math.inf, dtype=torch.float64))
    z = torch.tensor([[[-0.1], [0.1]]], dtype=torch.float64)
    found = log_density(at_zero(support=support), z)[0]
    assert found[0] == -math.inf and abs(float(found[1]) - norm.logpdf(0.1)) < 1e-3


@pytest.mark.parametrize("z", [None, torch.zeros(5), torch.zeros(5, 2) * 1j, torch.full((5, 2), torch.nan)], ids=str)
def test_latents_that_are_none_are_refused(z):
    with pytest.raises(InputError, match="^z "):
        find_support(z)


def test_one_call_finds_the_bounds_of_a_uniform_prior():
    g = torch.Generator().manual_seed(0)
    z = 2 * torch.rand(1500, 1, generator=g, dtype=torch.float64) - 1
    y = z + 0.3 * torch.randn(1500, 1, generator=g, dtype=torch.float64)
    denoiser, _ = fit_denoiser(z, y, options=TrainingOptions(steps=300, width=32, depth=2, evaluate_every=100))
    samples = draw(denoiser.at(torch.full((1, 1), 1.1, dtype=torch.float64)), 1000, Sampler())
    assert samples.max() < 1.01 and samples.min() > -1.01
    z = torch.special.ndtri((z + 1) / 2)
    free, _ = fit_denoiser(z, y, standard_prior=True, options=TrainingOptions(steps=100, width=8, depth=1))
    assert free.support is None
