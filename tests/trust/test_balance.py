"""Weights that know the moments of a cloud: nearer to the truth than those they came from, or as these are."""

from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI
from scipy.stats import norm

from fem_diffusion.trust.balance import balanced, cloud_size


def latent(factor):
    """Fields that are exponentials of latents."""
    return SimpleNamespace(everyone=MPI.COMM_SELF, problem=SimpleNamespace(comm=MPI.COMM_SELF),
                           parameters=lambda z: np.exp(z @ factor))


def case(rng, n=600, r=4, shift=0.05, width=1.03):
    """Draws of a law near the standard normal one, weights of both, and a cloud of that law."""
    z = shift + width * rng.standard_normal((n, r))
    weights = np.exp((norm.logpdf(z) - norm.logpdf(z, shift, width)).sum(axis=1))
    cloud = shift + width * rng.standard_normal((cloud_size(n), r))
    return z, weights / weights.sum(), np.full(n, 1 / n), cloud


@pytest.mark.parametrize("shift, width, gain", [(0.05, 1.03, (0.85, 0.75)), (0.3, 1.1, (0.95, 0.95))])
def test_moments_are_those_of_many_more_draws(shift, width, gain):
    """Errors of mean and standard deviation of a lognormal field, over 60 cases, with and without a cloud."""
    rng = np.random.default_rng(0)
    factor = 0.5 * rng.standard_normal((4, 10))
    variance = (factor**2).sum(axis=0)
    mean, std = np.exp(variance / 2), np.exp(variance / 2) * np.sqrt(np.expm1(variance))
    errors = {"plain": [], "balanced": []}
    for _ in range(60):
        z, weights, near, cloud = case(rng, shift=shift, width=width)
        for name, values in (("plain", weights), ("balanced", balanced(latent(factor), z, weights, near, cloud))):
            assert (values >= 0).all() and abs(values.sum() - 1) < 1e-12
            fields = np.exp(z @ factor)
            ours = values @ fields
            errors[name].append([(ours - mean) / std, np.sqrt(values @ (fields - ours)**2) / std - 1])
    plain, ours = (np.array(errors[name]) for name in ("plain", "balanced"))
    size, before = np.sqrt((ours**2).mean(axis=(0, 2))), np.sqrt((plain**2).mean(axis=(0, 2)))
    assert (size / before < gain).all()
    # No bias of the mean beyond chance.
    middle = ours[:, 0].mean(axis=1)
    assert abs(middle.mean()) < 4 * middle.std() / np.sqrt(len(middle))


def test_many_solves_have_no_cloud():
    assert [cloud_size(n) for n in (100, 625, 626)] == [800, 5000, 0]


def test_a_cloud_of_another_law_is_not_believed(monkeypatch):
    rng = np.random.default_rng(1)
    z, weights, near, cloud = case(rng)
    assert balanced(latent(np.eye(4)), z, weights, near, cloud) is not weights
    assert balanced(latent(np.eye(4)), z, weights, near, 0.3 + cloud) is weights
    # It would be wrong: its mean would go into the result.
    monkeypatch.setattr("fem_diffusion.trust.balance._CHANCE", 0.0)
    bad = balanced(latent(np.eye(4)), z, weights, near, 0.3 + cloud)
    assert np.abs(bad @ z).mean() > 3 / np.sqrt(len(z))


def test_few_or_uneven_weights_and_fields_that_are_constant_stay_as_they_are():
    rng = np.random.default_rng(2)
    z, weights, near, cloud = case(rng, 20)
    assert balanced(latent(np.eye(4)), z, weights, near, cloud) is weights
    z, weights, near, cloud = case(rng, 300)
    np.testing.assert_allclose(balanced(latent(np.zeros((4, 3))), z, weights, near, cloud), weights, rtol=1e-9)
    np.testing.assert_array_equal(balanced(latent(0.1 * np.eye(4)), z, weights, near, cloud + 10.0), weights)
    # Laws that are no longer near, and a transform without a value.
    uneven = np.where(np.arange(300) < 50, 1 / 50, 0.0)
    assert balanced(latent(np.eye(4)), z, weights, uneven, cloud) is weights
    lost = SimpleNamespace(**vars(latent(np.eye(4))) | {"parameters": lambda z: np.where(z > 2, np.nan, z)})
    assert balanced(lost, z, weights, near, cloud) is weights
