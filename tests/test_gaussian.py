"""The Gaussian base against Bayes' formula, and the noise models."""

import numpy as np
import pytest
import torch

from fem_diffusion.diagnostics import linear_gaussian_posterior
from fem_diffusion.diffusion import (
    CallableNoise, GaussianNoise, TrainingOptions, fit_base, fit_denoiser, linear_base, plain_base,
)
from fem_diffusion.errors import InputError

R, K = 6, 3


def _problem():
    g = torch.Generator().manual_seed(1)
    operator = torch.randn(K, R, generator=g, dtype=torch.float64)
    root = torch.randn(K, K, generator=g, dtype=torch.float64)
    return operator, root @ root.T / 50 + 0.01 * torch.eye(K), torch.randn(4, K, generator=g, dtype=torch.float64), g


def test_linear_base_is_the_posterior():
    operator, noise, y, _ = _problem()
    base = linear_base(operator, noise, offset=torch.ones(K, dtype=torch.float64))
    for row, mean in zip(y, base.mean(y)):
        exact, covariance = linear_gaussian_posterior(operator.numpy(), np.eye(R), noise.numpy(), row.numpy() - 1)
        np.testing.assert_allclose(mean, exact, atol=1e-10)
        np.testing.assert_allclose(base.covariance, covariance, atol=1e-10)


def test_fitted_base_is_exact_for_a_linear_map():
    operator, noise, y, g = _problem()
    z = torch.randn(50, R, generator=g, dtype=torch.float64)
    base = fit_base(z, 2 + z @ operator.T, noise, standard_prior=True)
    exact = linear_base(operator, noise, torch.full((K,), 2.0))
    torch.testing.assert_close(base.mean(y), exact.mean(y))
    torch.testing.assert_close(base.covariance, exact.covariance)


def test_rounding_does_not_turn_the_base():
    operator, _, _, g = _problem()
    z = torch.randn(50, R, generator=g, dtype=torch.float64)
    y = z @ torch.cat([operator, operator]).T  # equal sensors, and directions that no sensor sees
    order = torch.randperm(50, generator=g)
    one, other = (fit_base(z[i], y[i], 0.01 * torch.eye(2 * K), standard_prior=True) for i in (slice(None), order))
    for name in ("factor", "factor_inverse", "whitener"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=1e-8)


def test_fitted_base_matches_sample_moments():
    operator, noise, _, g = _problem()
    n = 20000
    z = 1 + 2 * torch.randn(n, R, generator=g, dtype=torch.float64)
    y = (z @ operator.T)**2 / 10
    base = fit_base(z, y, noise)
    residual = base.whiten(z, y + torch.randn(n, K, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(noise).T)
    # Base coordinates are centred and white over the joint law. Their entries' products have a standard deviation of at
    # most sqrt(kurtosis), so a sample covariance errs by that over sqrt(n).
    products = residual[:, :, None] * residual[:, None]
    assert residual.mean(0).abs().max() < 5 / np.sqrt(n)
    assert ((products.mean(0) - torch.eye(R)).abs() < 6 * products.std(0) / np.sqrt(n)).all()


def test_noise_with_a_mean_shifts_the_base():
    # y = z + 1 + 0.1 e: the reading 1 belongs to z = 0.
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 1, generator=g, dtype=torch.float64)
    noise = CallableNoise(lambda y, g: y + 1 + 0.1 * torch.randn(y.shape, generator=g, dtype=y.dtype))
    base = fit_denoiser(z, z.clone(), noise, options=TrainingOptions(steps=20, evaluate_every=20, width=4))[0].base
    assert abs(float(base.mean(torch.ones(1, 1, dtype=torch.float64)))) < 0.02
    assert abs(float(base.covariance) / 0.0099 - 1) < 0.15


def test_plain_base_standardises_and_no_more():
    _, noise, _, g = _problem()
    z = torch.tensor([1.0, 10.0, -3.0]) + torch.tensor([1e-3, 1.0, 1e3]) * torch.randn(500, 3, generator=g)
    y = z[:, :1].expand(500, K).double() ** 2
    base = plain_base(z, y, noise)
    assert not base.gain.any()
    torch.testing.assert_close(torch.diagonal(base.covariance), z.double().var(0))
    assert (torch.cov(base.whiten(z.double(), y).T) - torch.eye(3)).abs().max() < 0.2


def test_latents_of_unlike_units_are_all_resolved():
    operator, noise, y, g = _problem()
    z, units = torch.randn(400, R, generator=g, dtype=torch.float64), torch.logspace(-6, 6, R, dtype=torch.float64)
    one, other = (fit_base(z * unit, z @ operator.T, noise) for unit in (torch.ones(R), units))
    torch.testing.assert_close(other.covariance, one.covariance * units * units[:, None])
    torch.testing.assert_close(other.mean(y), one.mean(y) * units)


def test_whiten_and_colour_are_inverse():
    operator, noise, y, g = _problem()
    base = linear_base(operator, noise)
    z = torch.randn(4, R, generator=g, dtype=torch.float64)
    torch.testing.assert_close(base.colour(base.whiten(z, y), y), z)


@pytest.mark.parametrize("noise, expected", [
    (GaussianNoise(std=0.3), lambda y: 0.09 * np.eye(K)),
    (GaussianNoise(relative=0.1), lambda y: np.diag(0.01 * y**2)),
    (GaussianNoise(std=[0.1, 0.2, 0.3], covariance=0.04 * np.ones((K, K))),
     lambda y: np.diag([0.01, 0.04, 0.09]) + 0.04),
    (CallableNoise(lambda y, g: y + 0.2 * torch.randn(y.shape, generator=g, dtype=y.dtype)),
     lambda y: 0.04 * np.eye(K)),
], ids=["absolute", "relative", "correlated", "callable"])
def test_noise_has_its_covariance(noise, expected):
    n, y = 40000, np.array([1.0, -2.0, 3.0])
    clean = torch.tensor(y).expand(n, K)
    error = noise.sample(clean, torch.Generator().manual_seed(0)) - clean
    scale = np.sqrt(np.outer(np.diag(expected(y)), np.diag(expected(y))))
    # Five standard errors of a sample covariance.
    assert (np.abs(np.cov(error.T) - expected(y)) < 5 * scale * np.sqrt(2 / n)).all()
    assert (np.abs(noise.covariance(clean).numpy() - expected(y)) < 5 * scale * np.sqrt(2 / n)).all()
    assert (np.abs(error.mean(0).numpy()) < 5 * np.sqrt(np.diag(expected(y)) / n)).all()


@pytest.mark.parametrize("make, words", [
    (lambda: GaussianNoise(std=-1.0), "std"), (lambda: GaussianNoise(std=float("nan")), "std"),
    (lambda: GaussianNoise(), "needs noise"), (lambda: GaussianNoise(std=[0.1, 0.0]), "needs noise"),
    (lambda: GaussianNoise(covariance=[[1.0, 2.0], [0.0, 1.0]]), "symmetric"),
    (lambda: GaussianNoise(covariance=[[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
    (lambda: GaussianNoise(std=[0.1, 0.2]).covariance(torch.zeros(5, 3)), "2.*sensors.*3"),
    (lambda: CallableNoise(lambda y, g: y[:, :1]).sample(torch.zeros(5, 3), None), "must return"),
    (lambda: fit_base(torch.zeros(5, 6), torch.zeros(5, 2), torch.eye(2)), "simulate more"),
    (lambda: fit_base(torch.zeros(50, 6), torch.zeros(50, 2), torch.eye(2)), "same value in all pairs"),
    (lambda: plain_base(torch.zeros(50, 6), torch.zeros(50, 2), torch.eye(2)), "same value in all pairs"),
    (lambda: fit_base(torch.zeros(50, 6), torch.zeros(40, 2), torch.eye(2)), r"\(n, r\)"),
    (lambda: linear_base(torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.zeros(2, 2)), r"not positive: sensors \[1\]"),
])
def test_wrong_input_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
