"""How many modes measurements can tell: all of a linear problem, the leading ones of others, a few from few pairs."""

import math

import pytest
import torch

from fem_diffusion.diffusion.base.visible import informed_turn, learning_gain, visible_modes
from fem_diffusion.errors import InputError
from truths import random


def _latents(n, r):
    return torch.randn(n, r, generator=random(), dtype=torch.float64)


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_modes_that_cost_nothing_are_kept(curved, known):
    z, operator = _latents(600, 20), torch.randn(20, 4, generator=random(1), dtype=torch.float64)
    operator[3:] = 0
    y = z @ operator
    found = visible_modes(z, y + y**2 if curved else y, 0.01 * torch.eye(4), known)
    assert found == 20 if known and not curved else 3 <= found <= 6


@pytest.mark.parametrize("n", [2, 3, 10, 19, 20, 40])
def test_few_pairs_leave_few_modes(n):
    z = _latents(n, 12)
    for noise in (None, torch.eye(3)):
        assert 1 <= visible_modes(z, z[:, :3]**2, noise, known=False) <= max(1, n // 2)


def test_readings_that_do_not_vary_tell_nothing():
    z = _latents(100, 5)
    for y in (torch.full((100, 2), 3.7).double(), torch.stack([z[:, 0], torch.ones(100).double()], 1)):
        for noise in (None, torch.eye(2)):
            assert 1 <= visible_modes(z, y, noise) <= 5


@pytest.mark.parametrize("change, words", [
    (lambda z: (z[:1], z[:1]), "simulate more"), (lambda z: (z[:0], z[:0]), "simulate more"),
    (lambda z: (z, z.log()), "finite"), (lambda z: (z, z[:9]), "same pairs"), (lambda z: (0 * z, z), "same value"),
])
def test_wrong_pairs_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        visible_modes(*change(_latents(30, 3)), None)


def test_more_pairs_help_where_a_curve_is_not_learned_yet():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2000, 8, generator=generator, dtype=torch.float64)
    bent = torch.stack([torch.sin(2 * z[:, 0]) * z[:, 1] + z[:, 2]**2, z[:, 3] * torch.cos(2 * z[:, 4])], 1)
    noise = 1e-4 * torch.eye(2, dtype=torch.float64)
    found = [learning_gain(z[:n], bent[:n], noise) for n in (200, 600, 2000)]
    assert all(gain > 0.1 or missed > 10 for gain, missed in found) and found[2][0] > 0.1
    # A linear problem is learned from few pairs, and noise is never.
    gain, missed = learning_gain(z, z[:, :2], noise)
    assert gain < 1e-3 and missed < 1e-3
    white = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    gain, missed = learning_gain(z, white, None)
    assert gain < 0.05 and math.isnan(missed)
    assert learning_gain(z[:50], bent[:50], noise) is None


def test_directions_that_readings_tell_of_come_first():
    ways = torch.linalg.qr(torch.randn(20, 3, generator=random(), dtype=torch.float64))[0]
    slopes = torch.tensor([10.0, 5.0, 1.0]).double()[:, None] * ways.T
    turn = informed_turn(slopes.expand(7, 3, 20), torch.eye(3))
    torch.testing.assert_close((turn.T @ ways).abs(), torch.eye(3).double())
    # Noise makes the third say next to nothing; of nothing one direction is left.
    assert informed_turn(slopes.expand(7, 3, 20), torch.diag(torch.tensor([1.0, 1.0, 100.0]))).shape == (20, 2)
    assert informed_turn(0 * slopes.expand(7, 3, 20), torch.eye(3)).shape == (20, 1)
