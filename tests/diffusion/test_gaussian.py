"""The Gaussian base against Bayes' formula, and the noise models."""

import numpy as np
import pytest
import torch

from fem_diffusion.reference.dense import linear_gaussian_posterior
from fem_diffusion.diffusion import (
    CallableNoise, GaussianNoise, TrainingOptions, as_noise, fit_base, fit_denoiser, linear_base, plain_base,
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


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]], ids=str)
def test_correlated_noise_knows_no_units(order):
    unit = np.array([1e-4, 1e-4, 1e5, 1e5])[order]
    covariance = np.outer(unit, unit) * (0.5 + 0.5 * np.eye(4))
    noise, n = GaussianNoise(covariance=covariance), 40000
    error = noise.sample(torch.zeros(n, 4, dtype=torch.float64), torch.Generator().manual_seed(0)).numpy() / unit
    # Five standard errors of a sample covariance.
    assert (np.abs(np.cov(error.T) - 0.5 - 0.5 * np.eye(4)) < 5 * np.sqrt(2 / n)).all()
    np.testing.assert_allclose(noise.covariance(torch.zeros(1, 4)), covariance, rtol=1e-6)


def test_a_sensor_may_have_noise_of_its_own_beside_correlated_noise():
    unit, exact = np.array([1e-4, 1e3, 1e-4, 1e5]), 0.5 + 0.5 * np.eye(4)
    exact[1], exact[:, 1], exact[1, 1] = 0, 0, 1
    covariance = np.outer(unit, unit) * exact
    covariance[1, 1] = 0
    noise, n = GaussianNoise(std=[0, 1e3, 0, 0], covariance=covariance), 40000
    error = noise.sample(torch.zeros(n, 4, dtype=torch.float64), torch.Generator().manual_seed(0)).numpy()
    assert (np.abs(np.cov((error / unit).T) - exact) < 5 * np.sqrt(2 / n)).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_posterior_of_pairs_knows_no_units(seed):
    operator, noise, y, g = _problem()
    z = 3 + torch.randn(50, R, generator=g, dtype=torch.float64) @ torch.randn(R, R, generator=g, dtype=torch.float64)
    order = torch.Generator().manual_seed(seed)
    latents, sensors = (torch.logspace(-8, 8, n, dtype=torch.float64)[torch.randperm(n, generator=order)]
                        for n in (R, K))
    # A linear map leaves no residual, so the law is that of the pairs' own prior moments.
    prior = np.cov(z.numpy(), rowvar=False)
    model = GaussianNoise(covariance=noise * torch.outer(sensors, sensors))
    base = fit_base(z * latents, z @ operator.T * sensors, model.covariance(z[:, :K]))
    mean, covariance = linear_gaussian_posterior(operator.numpy(), prior, noise.numpy(),
                                                 (y[0] - operator @ z.mean(0)).numpy())
    np.testing.assert_allclose((base.mean(y[:1] * sensors)[0] / latents - z.mean(0)).numpy(), mean, rtol=1e-6)
    found = (base.covariance / torch.outer(latents, latents)).numpy()
    np.testing.assert_allclose(found, covariance, rtol=1e-6, atol=1e-9)


def test_noise_that_writes_into_the_data_leaves_them_as_they_are():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20000, 1, generator=g, dtype=torch.float64)
    y, buffer = z.clone(), torch.zeros(40000, 1, dtype=torch.float64)

    def rude(y, g):
        y.add_(0.5 * torch.randn(y.shape, generator=g, dtype=y.dtype))
        return buffer[:len(y)].copy_(y)
    few = TrainingOptions(steps=20, evaluate_every=20, width=4)
    base = fit_denoiser(z, y, CallableNoise(rude), standard_prior=True, options=few)[0].base
    # N(0, 1) read as 0.7 with a variance of 0.25: mean 0.56, variance 0.2, to the error of a variance of 20,000 draws.
    assert torch.equal(y, z)
    assert abs(float(base.mean(torch.full((1, 1), 0.7, dtype=torch.float64))) - 0.56) < 0.006
    assert abs(float(base.covariance) - 0.2) < 0.01


def test_numbers_stand_for_gaussian_noise():
    y = torch.ones(5, 2, dtype=torch.float64)
    for given, std in ((0.5, [0.5, 0.5]), (1, [1, 1]), (np.float32(0.5), [0.5, 0.5]), ([0.1, 0.2], [0.1, 0.2]),
                       (torch.tensor([0.1, 0.2]), [0.1, 0.2])):
        np.testing.assert_allclose(as_noise(given, 2).covariance(y).numpy(), np.diag(np.square(std)), rtol=1e-6)
    for noise in (None, GaussianNoise(std=1.0), CallableNoise(lambda y, g: y)):
        assert as_noise(noise, 2) is noise
    z = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    few = TrainingOptions(steps=20, evaluate_every=20, width=4)
    one, other = (fit_denoiser(z, z, noise, options=few)[0].base for noise in (0.5, GaussianNoise(std=0.5)))
    # Up to rounding, which depends on where tensors lie in memory.
    torch.testing.assert_close(one.gain, other.gain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise, words", [
    ({"std": 0.1}, r"GaussianNoise\(\*\*noise\)"), (lambda y, g: y, r"CallableNoise\(noise\)"), (0.0, "needs noise"),
    (-0.1, "negative"), ("0.1", "real numbers"), (True, "real numbers"), (0.1j, "imaginary"), (np.inf, "finite"),
    ([0.1] * 3, r"\[3\] sens"), (GaussianNoise(relative=[0.1] * 3), r"\[3\] sensors, the observations have 2"),
])
def test_what_is_no_noise_is_refused_before_training(noise, words):
    z = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(InputError, match=words):
        fit_denoiser(z, z, noise)


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
    (lambda: GaussianNoise(covariance=[[1.0, 2e-8], [2e-8, 1e-16]]), "negative eigenvalue"),
    (lambda: GaussianNoise(covariance=[[1e16, 1.0], [0.5, 1e-16]]), "symmetric"),
    (lambda: GaussianNoise(covariance=[[1.0, 0.5], [0.5, 0.0]]), r"\[1\] have covariances and no variance"),
    (lambda: GaussianNoise(covariance=[[-1.0, 0.0], [0.0, 1.0]]), r"negative variances at sensors \[0\]"),
    (lambda: GaussianNoise(covariance=0), r"give \(k, k\)"), (lambda: GaussianNoise(covariance=[[0.0]]), "needs noise"),
    (lambda: GaussianNoise(covariance=1j * np.eye(2)), "imaginary"), (lambda: GaussianNoise(std=None), "real numbers"),
    (lambda: GaussianNoise(std=1e-200), "below 1e-100"), (lambda: GaussianNoise(std=1e200), "beyond"),
    (lambda: GaussianNoise(std=[1.0, 2.0], covariance=np.eye(3)), r"for \[2, 3\] sensors"),
    (lambda: GaussianNoise(std=1.0).sample(torch.zeros(5, 3), 7), "manual_seed"), (lambda: CallableNoise(3), "is 3"),
    (lambda: GaussianNoise(std=1.0).covariance(np.zeros((5, 3))), "floating-point tensor"),
    (lambda: GaussianNoise(std=1.0).sample(torch.zeros(5, 3, dtype=int), torch.Generator()), "floating-point tensor"),
    (lambda: CallableNoise(lambda y, g: 1j * y).sample(torch.zeros(5, 3), None), "finite real"),
    (lambda: linear_base(torch.ones(2, 3), torch.eye(3)), r"give \(2, 2\)"),
    (lambda: linear_base(torch.ones(2, 3), torch.eye(2), torch.ones(3)), r"give \(2,\)"),
    (lambda: fit_base(torch.eye(9)[:, :2], torch.eye(9)[:, :2], torch.eye(3)), r"give \(2, 2\)"),
    (lambda: fit_base(torch.eye(9)[:, :2], torch.eye(9), torch.eye(9), "no"), "standard_prior is 'no'"),
    (lambda: fit_base(1j * torch.ones(50, 6), torch.ones(50, 2), torch.eye(2)), "imaginary"),
    (lambda: fit_base(torch.eye(9).double(), 1e200 * torch.eye(9).double(), torch.eye(9)), r"sensors \[0, 1, 2"),
    (lambda: fit_base(torch.eye(9)[:, :2], 1e-200 * torch.eye(9).double(), torch.eye(9)), "squares vanish"),
    (lambda: fit_base(torch.randn(50, 1), torch.full((50, 1), 0.3), torch.zeros(1, 1)), r"sensors \[0\] read the same"),
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
