"""The Gaussian base of fixed sensors against Bayes' formula, whatever the units and however many measurements."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fem_diffusion.diffusion import (
    Denoiser, GaussianNoise, Sampler, TrainingOptions, fit_base, fit_denoiser, linear_base, log_density, plain_base,
    sample_latents,
)
from fem_diffusion.diffusion.base.fitted import standard_error
from fem_diffusion.errors import InputError
from fem_diffusion.reference.dense import linear_gaussian_posterior

R, K = 6, 3


def _problem():
    g = torch.Generator().manual_seed(1)
    operator = torch.randn(K, R, generator=g, dtype=torch.float64)
    root = torch.randn(K, K, generator=g, dtype=torch.float64)
    return operator, root @ root.T / 50 + 0.01 * torch.eye(K), torch.randn(4, K, generator=g, dtype=torch.float64), g


def _at(base, y):
    return Denoiser(base).at(y).located


def _assert_same(one, other, **tolerance):
    """Two located bases are one law."""
    torch.testing.assert_close(one.mean, other.mean, **tolerance)
    torch.testing.assert_close(one.covariance, other.covariance, **tolerance)


def test_linear_base_is_the_posterior():
    operator, noise, y, _ = _problem()
    located = _at(linear_base(operator, noise, offset=torch.ones(K, dtype=torch.float64)), y)
    for row, mean in zip(y, located.mean):
        exact, covariance = linear_gaussian_posterior(operator.numpy(), np.eye(R), noise.numpy(), row.numpy() - 1)
        np.testing.assert_allclose(mean, exact, atol=1e-10)
        np.testing.assert_allclose(located.covariance[0], covariance, atol=1e-10)
    np.testing.assert_allclose(located.std[0], np.sqrt(np.diag(covariance)), atol=1e-10)
    assert float(located.log_determinant) == pytest.approx(np.linalg.slogdet(covariance)[1] / 2)


def test_fitted_base_is_exact_for_a_linear_map():
    operator, noise, y, g = _problem()
    z = torch.randn(50, R, generator=g, dtype=torch.float64)
    base = fit_base(z, 2 + z @ operator.T, noise, standard_prior=True)
    _assert_same(_at(base, y), _at(linear_base(operator, noise, torch.full((K,), 2.0)), y))


def test_rounding_does_not_turn_the_base():
    operator, _, _, g = _problem()
    z = torch.randn(50, R, generator=g, dtype=torch.float64)
    y = z @ torch.cat([operator, operator]).T  # equal sensors, and directions that no sensor sees
    order = torch.randperm(50, generator=g)
    one, other = (fit_base(z[i], y[i], 0.01 * torch.eye(2 * K), standard_prior=True) for i in (slice(None), order))
    for name in ("mean", "factor", "whitener", "sensitivity", "misfit"):
        torch.testing.assert_close(getattr(_at(one, y), name), getattr(_at(other, y), name), rtol=0, atol=1e-8)
    torch.testing.assert_close(one.features(y), other.features(y), rtol=0, atol=1e-8)


def test_fitted_base_matches_sample_moments():
    operator, noise, _, g = _problem()
    n = 20000
    z = 1 + 2 * torch.randn(n, R, generator=g, dtype=torch.float64)
    unit = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)
    noise, y = noise * torch.outer(unit, unit), (z @ operator.T)**2 / 10 * unit
    noisy = y + torch.randn(n, K, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(noise).T
    base = fit_base(z, y, noise)
    # Base coordinates are centred and white over the joint law, and so is what a network sees. Their entries' products
    # have a standard deviation of at most sqrt(kurtosis), so a sample covariance errs by that over sqrt(n).
    for white in (_at(base, noisy).whiten(z), base.features(noisy)):
        products = white[:, :, None] * white[:, None]
        assert white.mean(0).abs().max() < 5 / np.sqrt(n)
        assert ((products.mean(0) - torch.eye(white.shape[1])).abs() < 6 * products.std(0) / np.sqrt(n)).all()


def test_plain_base_standardises_and_no_more():
    _, noise, _, g = _problem()
    z = torch.tensor([1.0, 10.0, -3.0]) + torch.tensor([1e-3, 1.0, 1e3]) * torch.randn(500, 3, generator=g)
    y = z[:, :1].expand(500, K).double() ** 2
    located = _at(plain_base(z, y, noise), y)
    torch.testing.assert_close(located.mean, z.double().mean(0).expand(500, 3))
    torch.testing.assert_close(torch.diagonal(located.covariance[0]), z.double().var(0))
    assert (torch.cov(located.whiten(z.double()).T) - torch.eye(3)).abs().max() < 0.2


def test_latents_of_unlike_units_are_all_resolved():
    operator, noise, y, g = _problem()
    z, units = torch.randn(400, R, generator=g, dtype=torch.float64), torch.logspace(-6, 6, R, dtype=torch.float64)
    one, other = (_at(fit_base(z * unit, z @ operator.T, noise), y) for unit in (torch.ones(R), units))
    torch.testing.assert_close(other.covariance, one.covariance * units * units[:, None])
    torch.testing.assert_close(other.mean, one.mean * units)


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
    located = _at(fit_base(z * latents, z @ operator.T * sensors, model.covariance(z[:, :K])), y[:1] * sensors)
    mean, covariance = linear_gaussian_posterior(operator.numpy(), prior, noise.numpy(),
                                                 (y[0] - operator @ z.mean(0)).numpy())
    np.testing.assert_allclose((located.mean[0] / latents - z.mean(0)).numpy(), mean, rtol=1e-6)
    found = (located.covariance[0] / torch.outer(latents, latents)).numpy()
    np.testing.assert_allclose(found, covariance, rtol=1e-6, atol=1e-9)


def test_whiten_and_colour_are_inverse():
    operator, noise, y, g = _problem()
    located = _at(linear_base(operator, noise), y)
    z = torch.randn(7, 4, R, generator=g, dtype=torch.float64)
    torch.testing.assert_close(located.colour(located.whiten(z)), z)


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_readings_without_noise_are_kept(unit):
    operator, _, _, g = _problem()
    z = torch.randn(50, R, generator=g, dtype=torch.float64)
    y = z @ operator.T * unit
    zero = torch.zeros(K, K, dtype=torch.float64)
    # What is not read keeps its prior: the projection on the null space of the operator.
    exact = torch.eye(R, dtype=torch.float64) - torch.linalg.pinv(operator) @ operator
    for base in (linear_base(operator * unit, zero), fit_base(z, y, zero, standard_prior=True)):
        located = _at(base, y)
        torch.testing.assert_close(located.mean @ operator.T * unit, y, rtol=0, atol=1e-8 * unit)
        torch.testing.assert_close(located.covariance[0], exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("std", [0.0, 0.2])
def test_a_sensor_twice_counts_as_one_with_half_the_variance(std):
    operator, _, y, _ = _problem()
    twice = torch.cat([operator, operator])
    two = _at(linear_base(twice, std**2 * torch.eye(2 * K).double()), torch.cat([y, y], 1))
    one = _at(linear_base(operator, std**2 / 2 * torch.eye(K).double()), y)
    _assert_same(two, one, rtol=0, atol=1e-8)


def test_a_sensor_that_sees_nothing_says_nothing():
    operator, noise, y, g = _problem()
    z = torch.randn(50, R, generator=g, dtype=torch.float64)
    readings = torch.cat([z @ operator.T, torch.full((50, 1), 7.0)], 1)
    base = fit_base(z, readings, torch.block_diag(noise, 0.01 * torch.eye(1)), standard_prior=True)
    dead = torch.full((4, 1), 7.3, dtype=torch.float64)
    _assert_same(_at(base, torch.cat([y, dead], 1)), _at(linear_base(operator, noise), y))


class Largest(TorchDispatchMode):
    """The largest number of entries of any tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            # Views that repeat themselves take no memory.
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // 8)
        return result


def test_many_measurements_share_one_factor():
    g, r, k, size = torch.Generator().manual_seed(0), 40, 5, 500
    base = linear_base(torch.randn(k, r, generator=g, dtype=torch.float64), torch.eye(k, dtype=torch.float64))
    y = torch.randn(size, k, generator=g, dtype=torch.float64)
    with Largest() as found:
        conditioned = Denoiser(base, known=True).at(y)
        z = sample_latents(conditioned, 2, Sampler(steps=2), seed=0)
        density = log_density(conditioned, z, chunk=size)
    assert conditioned.located.mean.shape == (size, r) and density.shape == (size, 2)
    for name, shape in (("factor", (1, r, r)), ("whitener", (1, r, r)), ("sensitivity", (1, k, r))):
        assert getattr(conditioned.located, name).shape == shape
    assert found.numel <= 2 * size * (r + 1) < size * r * r
    with Largest() as broken:
        base.factor.expand(size, -1, -1).contiguous()
    assert broken.numel == size * r * r


@pytest.mark.parametrize("make, words", [
    (lambda: linear_base(torch.ones(2, 3), torch.eye(3)), r"give \(2, 2\)"),
    (lambda: linear_base(torch.ones(2, 3), torch.eye(2), torch.ones(3)), r"give \(2,\)"),
    (lambda: fit_base(torch.eye(9)[:, :2], torch.eye(9)[:, :2], torch.eye(3)), r"give \(2, 2\)"),
    (lambda: fit_base(torch.eye(9)[:, :2], torch.eye(9), torch.eye(9), "no"), "standard_prior is 'no'"),
    (lambda: fit_base(1j * torch.ones(50, 6), torch.ones(50, 2), torch.eye(2)), "imaginary"),
    (lambda: fit_base(torch.eye(9).double(), 1e200 * torch.eye(9).double(), torch.eye(9)), r"sensors \[0, 1, 2"),
    (lambda: fit_base(torch.eye(9)[:, :2], 1e-200 * torch.eye(9).double(), torch.eye(9)), "squares vanish"),
    (lambda: fit_base(torch.randn(50, 1), torch.full((50, 1), 0.3), torch.zeros(1, 1)), r"sensors \[0\] read the same"),
    (lambda: fit_base(torch.zeros(5, 6), torch.zeros(5, 2), torch.eye(2)), "simulate more"),
    (lambda: fit_base(torch.zeros(50, 6), torch.zeros(50, 2), torch.eye(2)), "same value in all pairs"),
    (lambda: plain_base(torch.zeros(50, 6), torch.zeros(50, 2), torch.eye(2)), "same value in all pairs"),
    (lambda: fit_base(torch.zeros(50, 6), torch.zeros(40, 2), torch.eye(2)), r"\(n, r\)"),
    (lambda: linear_base(torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.zeros(2, 2)), r"not positive: sensors \[1\]"),
])
def test_wrong_input_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def _noisy_pairs(n, r, seed):
    """Latents and readings that hold their noise, of one linear map."""
    operator = torch.randn(3, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    z, white = (torch.randn(n, m, generator=g, dtype=torch.float64) for m in (r, 3))
    return operator, z, z @ operator.T + 0.5 * white


@pytest.mark.parametrize("n", [30, 60, 200])
def test_a_base_knows_how_uncertain_it_is(n):
    r, told, missed = 20, [], []
    for seed in range(1, 60):
        operator, z, y = _noisy_pairs(n, r, seed)
        exact = linear_base(operator, 0.25 * torch.eye(3))
        base = fit_base(z, y, torch.zeros(3, 3), True)
        told.append(standard_error(base, n, torch.zeros(3, 3).double()))
        y = _noisy_pairs(50, r, 1000 + seed)[2]
        one, other = _at(base, y), _at(exact, y)
        missed.append(other.whiten(one.mean).square())
    # In posterior standard deviations, along the directions of which readings tell.
    right = float(torch.cat(missed).sum(1).mean() / 3)**0.5
    assert 0.5 < np.median(told) / right < 2


def test_pairs_that_are_too_few_for_the_latents_are_told(recwarn):
    def fit(n, r=20, noise=None, power=1):
        operator, z, y = _noisy_pairs(n, r, 1)
        y = y if noise is None else (z @ operator.T)**power
        fit_denoiser(z, y, noise, standard_prior=True, progress=False,
                     options=TrainingOptions(steps=1, evaluate_every=1, width=4, depth=1))
    with pytest.warns(UserWarning, match="30 pairs leave the Gaussian base of 20 latents uncertain.*derivatives=True"):
        fit(30)
    with pytest.warns(UserWarning, match="30 pairs leave the Gaussian base of 20 latents uncertain"):
        fit(30, noise=GaussianNoise(std=0.1, relative=0.1), power=3)
    recwarn.clear()
    fit(300)
    fit(30, r=3)
    fit(30, noise=0.5)   # of a linear map the noise of which is known any number above r tells all
    assert not recwarn
