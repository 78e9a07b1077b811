"""Noise that is not Gaussian: its law, and what bases and densities know of it."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest, t

from fem_diffusion.diffusion import CallableNoise, GaussianNoise, StudentNoise, join_noise
from fem_diffusion.errors import InputError

STD = np.array([0.1, 2.0, 30.0])
CLEAN = torch.tensor([[1.0, -2.0, 100.0]], dtype=torch.float64)


@pytest.mark.parametrize("df", [2.5, 4.0, 50.0])
def test_student_noise_has_the_law_that_it_says(df):
    noise = StudentNoise(STD, df)
    y = noise.sample(CLEAN.expand(20000, 3), torch.Generator().manual_seed(1))
    white = ((y - CLEAN) / torch.tensor(STD)).numpy()
    assert min(kstest(white[:, i], t(df).cdf).pvalue for i in range(3)) > 1e-3
    assert kstest(white[:, 0], t(2 * df if df < 10 else 4).cdf).pvalue < 1e-3
    assert np.abs(np.corrcoef(np.clip(white, -4, 4).T) - np.eye(3)).max() < 5 / np.sqrt(20000)
    expected = t(df).logpdf(white[:50]) - np.log(STD)
    found = torch.stack([noise.log_density(row, CLEAN)[0] for row in y[:50]])
    np.testing.assert_allclose(found, expected.sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(noise.covariance(CLEAN), np.diag(STD**2 * t(df).var()), rtol=1e-12)


def test_a_part_of_the_noise_is_that_of_its_sensors():
    joined = join_noise((2, GaussianNoise([1.0, 2.0])), (3, StudentNoise([3.0, 4.0, 5.0], 6)))
    clean, y = torch.randn(2, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    part, some = joined.select(torch.tensor([1, 2, 4])), torch.tensor([1, 2, 4])
    # The density of independent sensors is a product.
    rest = joined.select(torch.tensor([0, 3]))
    np.testing.assert_allclose(part.log_density(y[some], clean[:, some]) + rest.log_density(
        y[[0, 3]], clean[:, [0, 3]]), joined.log_density(y, clean))
    np.testing.assert_allclose(part.covariance(clean[:, some]).diagonal(), [4, 9 * 1.5, 25 * 1.5])


def test_noise_of_joined_instruments_is_that_of_each():
    parts = (2, GaussianNoise(covariance=[[1.0, 0.5], [0.5, 2.0]])), (1, GaussianNoise(0.1, 0.2)), (2, 3.0)
    joined = join_noise(*parts)
    assert isinstance(joined, GaussianNoise) and not joined.constant
    clean = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    expected = np.zeros((5, 5))
    expected[:2, :2], expected[2, 2], expected[3, 3], expected[4, 4] = [[1, 0.5], [0.5, 2]], 0.01 + 0.36, 9, 9
    np.testing.assert_allclose(joined.covariance(clean), expected)
    # One that is not Gaussian keeps the others as they are.
    mixed = join_noise(*parts, (1, StudentNoise(1.0, 4)))
    y = mixed.sample(torch.zeros(40000, 6, dtype=torch.float64), torch.Generator().manual_seed(0))
    assert abs(float(np.corrcoef(y[:, :2].T.numpy())[0, 1]) - 0.5**0.5 / 2) < 5 / 200
    assert not mixed.constant and join_noise((2, 1.0), (1, StudentNoise(1.0))).constant
    assert join_noise((1, StudentNoise(1.0)), (1, CallableNoise(lambda y, g: y))).log_density is None


@pytest.mark.parametrize("make, message", [
    (lambda: StudentNoise(0.1, 2), "df"), (lambda: StudentNoise([0.1, 0.0]), "needs noise"),
    (lambda: StudentNoise([1.0, 2.0]).sample(CLEAN, torch.Generator()), "for 2 sensors"),
    (lambda: join_noise(), "no parts"), (lambda: join_noise((2, None)), "no noise"), (lambda: join_noise(3), "pairs"),
    (lambda: join_noise((2, [1.0, 2.0, 3.0])), "have 2"),
    (lambda: join_noise((2, StudentNoise(1.0))).sample(CLEAN, torch.Generator()), "have 3"),
    (lambda: CallableNoise(lambda y, g: y).select(torch.tensor([0])), "all sensors together"),
])
def test_noise_that_is_none_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
