"""Noise models: their covariance in any units, what they do to a base, and what is none."""

import numpy as np
import pytest
import torch

from fem_diffusion.diffusion import CallableNoise, Denoiser, GaussianNoise, TrainingOptions, as_noise, fit_denoiser
from fem_diffusion.errors import InputError

K = 3
FEW = TrainingOptions(steps=20, evaluate_every=20, width=4)


def _base_at(z, y, noise, reading, **settings):
    """Mean and variance that a fitted base gives for one reading of one latent."""
    base = fit_denoiser(z, y, noise, options=FEW, **settings)[0].base
    located = Denoiser(base).at(torch.full((1, 1), reading, dtype=torch.float64)).located
    return float(located.mean), float(located.covariance)


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


def test_noise_that_writes_into_the_data_leaves_them_as_they_are():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(20000, 1, generator=g, dtype=torch.float64)
    y, buffer = z.clone(), torch.zeros(40000, 1, dtype=torch.float64)

    def rude(y, g):
        y.add_(0.5 * torch.randn(y.shape, generator=g, dtype=y.dtype))
        return buffer[:len(y)].copy_(y)
    mean, variance = _base_at(z, y, CallableNoise(rude), 0.7, standard_prior=True)
    # N(0, 1) read as 0.7 with a variance of 0.25: mean 0.56, variance 0.2, to the error of a variance of 20,000 draws.
    assert torch.equal(y, z)
    assert abs(mean - 0.56) < 0.006 and abs(variance - 0.2) < 0.01


def test_noise_with_a_mean_shifts_the_base():
    # y = z + 1 + 0.1 e: the reading 1 belongs to z = 0.
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 1, generator=g, dtype=torch.float64)
    noise = CallableNoise(lambda y, g: y + 1 + 0.1 * torch.randn(y.shape, generator=g, dtype=y.dtype))
    mean, variance = _base_at(z, z.clone(), noise, 1.0)
    assert abs(mean) < 0.02 and abs(variance / 0.0099 - 1) < 0.15


def test_numbers_stand_for_gaussian_noise():
    y = torch.ones(5, 2, dtype=torch.float64)
    for given, std in ((0.5, [0.5, 0.5]), (1, [1, 1]), (np.float32(0.5), [0.5, 0.5]), ([0.1, 0.2], [0.1, 0.2]),
                       (torch.tensor([0.1, 0.2]), [0.1, 0.2])):
        np.testing.assert_allclose(as_noise(given, 2).covariance(y).numpy(), np.diag(np.square(std)), rtol=1e-6)
    for noise in (None, GaussianNoise(std=1.0), CallableNoise(lambda y, g: y)):
        assert as_noise(noise, 2) is noise
    z = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = (fit_denoiser(z, z, noise, options=FEW)[0].at(z).located for noise in (0.5, GaussianNoise(std=0.5)))
    # Up to rounding, which depends on where tensors lie in memory.
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.factor, other.factor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise, words", [
    ({"std": 0.1}, r"GaussianNoise\(\*\*noise\)"), (lambda y, g: y, r"CallableNoise\(noise\)"), (0.0, "needs noise"),
    (-0.1, "negative"), ("0.1", "real numbers"), (True, "real numbers"), (0.1j, "imaginary"), (np.inf, "finite"),
    ([0.1] * 3, r"\[3\] sens"), (GaussianNoise(relative=[0.1] * 3), r"\[3\] sensors, the observations have 2"),
])
def test_what_is_no_noise_is_refused_before_training(noise, words):
    z = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(InputError, match=words):
        fit_denoiser(z, z, noise)


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
    (lambda: GaussianNoise(std=[0.1, 0.2]).covariance(torch.zeros(5, 3)), "2.*sensors.*3"),
    (lambda: CallableNoise(lambda y, g: y[:, :1]).sample(torch.zeros(5, 3), None), "must return"),
])
def test_wrong_input_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
