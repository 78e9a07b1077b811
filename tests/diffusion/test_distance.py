"""Measurements beside those of the training: false alarms at their level, power, the sensors that are named."""

import numpy as np
import pytest
import torch

from fem_diffusion.diffusion import CallableNoise, GaussianNoise, measure_distance
from truths import random

MATRIX = torch.randn(16, 8, generator=random(1), dtype=torch.float64) / 3
NOISE = GaussianNoise(std=0.05)
NAMES = [f"s{i}" for i in range(16)]


def _linear(z):
    return z @ MATRIX.T


def _lognormal(z):
    return torch.exp(z @ MATRIX.T)


def _skew(y, generator):
    white = torch.rand(y.shape, generator=generator, dtype=y.dtype)
    return y - 0.05 * (torch.log(white) + 1)


def _distances(read, noise, pairs, number, spoil=lambda y: None, seed=2):
    generator = random(seed)
    clean = read(torch.randn(pairs + number, 8, generator=generator, dtype=torch.float64))
    y = noise.sample(clean, generator)[pairs:]
    spoil(y)
    return [measure_distance(clean[:pairs], noise, row, NAMES) for row in y]


@pytest.mark.parametrize("read, noise", [
    (_linear, NOISE), (_lognormal, NOISE), (_lognormal, GaussianNoise(relative=0.05)), (_linear, CallableNoise(_skew)),
    (lambda z: z[:, :1]**3, NOISE), (_linear, GaussianNoise(covariance=0.05**2 * (0.5 * np.eye(16) + 0.5))),
], ids=["Gaussian", "lognormal", "relative", "skew noise", "one sensor", "correlated"])
def test_false_alarms_are_as_rare_as_they_are_said_to_be(read, noise):
    # Four sets of training readings: one set alone has luck of its own.
    p = np.array([[x.p for x in _distances(read, noise, 1000, 300, seed=seed)] for seed in range(4)])
    for level in (0.01, 0.1, 0.5):
        shares = (p <= level).mean(axis=1)
        error = (level * (1 - level) * (1 / 1200 + 1 / 4000))**0.5
        assert abs(shares.mean() - level) < 4 * error, (level, shares)


@pytest.mark.parametrize("read, noise", [(_linear, NOISE), (_lognormal, NOISE), (_lognormal, GaussianNoise(
    relative=0.05))], ids=["Gaussian", "lognormal", "relative"])
@pytest.mark.parametrize("pairs", [5, 20, 60])
def test_few_pairs_give_no_more_false_alarms(read, noise, pairs):
    p = np.array([[x.p for x in _distances(read, noise, pairs, 100, seed=seed)] for seed in range(10)])
    assert (p <= 0.01).mean() < 0.02


def _add(*changes):
    def spoil(y):
        for sensor, by in changes:
            y[:, sensor] += by
    return spoil


@pytest.mark.parametrize("pairs", [1000, 60])
def test_a_broken_sensor_is_found_and_named(pairs):
    found = _distances(_linear, NOISE, pairs, 200, _add((3, 0.5)))
    assert np.mean([x.p <= 0.01 for x in found]) > 0.99
    assert np.mean([x.worst == ("s3",) for x in found if x.worst]) > 0.9
    # By itself it is within one standard deviation of the prior.
    assert _linear(torch.randn(1000, 8, generator=random(), dtype=torch.float64)).std(0)[3] > 0.5


def test_two_broken_sensors_are_named():
    found = _distances(_linear, NOISE, 1000, 200, _add((3, 0.8), (10, -0.8)))
    assert np.mean([set(x.worst) == {"s3", "s10"} for x in found]) > 0.8


def test_the_message_tells_what_is_read_what_is_expected_and_what_to_do():
    found = _distances(_linear, NOISE, 1000, 1, _add((3, 3.0)))[0]
    assert found.far and found.value > 2 * found.largest
    for words in ("unlike the 1,000 simulated ones", "by a factor of", "sensor s3 reads", "is expected beside the "
                  "others", "laplace(problem, y)", "widen it"):
        assert words in found.message
    quiet = _distances(_linear, NOISE, 1000, 1)[0]
    assert not quiet.far and quiet.message == "" and quiet.worst == () and quiet.seen == 1000


@pytest.mark.parametrize("pairs", [60, 1000])
def test_a_reading_outside_all_of_the_training_is_far(pairs):
    clean = torch.randn(pairs, 1, generator=random(), dtype=torch.float64)**3
    found = measure_distance(clean, GaussianNoise(std=0.5), torch.tensor([200.0]).double(), ["y"])
    assert found.far and found.p < 0.01 and found.worst == ("y",)


def test_more_sensors_than_pairs_and_units_of_any_size_are_no_obstacle():
    generator = random(3)
    matrix = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    units = torch.logspace(-30, 30, 100, dtype=torch.float64)
    clean = torch.randn(40, 8, generator=generator, dtype=torch.float64) @ matrix.T * units
    noise = GaussianNoise(std=0.1 * units)
    good, bad = clean[-1].clone(), clean[-1].clone()
    bad[7] += 5 * units[7]
    found = [measure_distance(clean[:39], noise, y, range(100)) for y in (good, bad)]
    assert found[0].p > 0.01 and found[1].worst == ("7",)
