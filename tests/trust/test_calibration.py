"""Calibration: uniform where draws are right, and every usual fault of a sampler is seen."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fem_diffusion.trust import calibrate, calibrate_model, sbc_p_values, sbc_ranks
from fem_diffusion.diffusion import CallableNoise, GaussianNoise
from fem_diffusion.errors import InputError

M, N, R = 600, 99, 3


def _pairs(seed=0):
    rng = np.random.default_rng(seed)
    place = rng.standard_normal((M, 1, R))
    return place + rng.standard_normal((M, N, R)), place[:, 0] + rng.standard_normal((M, R)), place


def test_right_draws_are_calibrated():
    draws, truth, _ = _pairs()
    result = calibrate(draws, truth)
    assert result.p_value > 1e-3 and result.ranks.shape == (M, R) and result.energy_score.shape == (M,)
    for level, share in result.coverage.items():
        assert abs(share - level) < 4 * np.sqrt(level * (1 - level) / (M * R))


def test_p_values_are_uniform_where_ranks_are():
    ranks = np.random.default_rng(0).integers(0, N + 1, (M, 1000))
    p = sbc_p_values(ranks, N)
    assert abs((p < 0.1).mean() - 0.1) < 4 * np.sqrt(0.09 / 1000)


@pytest.mark.parametrize("n, bins", [(99, 20), (50, 7)])
def test_bins_of_unequal_size_keep_the_level(n, bins):
    p = sbc_p_values(np.random.default_rng(1).integers(0, n + 1, (M, 1000)), n, bins)
    assert abs((p < 0.1).mean() - 0.1) < 4 * np.sqrt(0.09 / 1000)


FAULTS = {
    "biased": lambda draws, place: draws + 0.3,
    "overconfident": lambda draws, place: place + 0.8 * (draws - place),
    "timid": lambda draws, place: place + 1.25 * (draws - place),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault):
    draws, truth, place = _pairs()
    wrong = FAULTS[fault](draws, place)
    result, right = calibrate(wrong, truth), calibrate(draws, truth)
    assert result.p_value < 1e-4
    gap = result.energy_score - right.energy_score
    assert gap.mean() > 4 * gap.std() / np.sqrt(M)
    sign = {"biased": 0, "overconfident": -1, "timid": 1}[fault]
    assert sign * (result.coverage[0.9] - right.coverage[0.9]) >= 0.02 * abs(sign)


def test_a_fault_in_one_coordinate_is_not_averaged_away():
    draws, truth, _ = _pairs()
    draws[:, :, 1] += 0.4
    result = calibrate(draws, truth)
    assert result.p_values[1] < 1e-4 < min(result.p_values[0], result.p_values[2]) and result.p_value < 1e-3


def test_ranks_count_the_draws_below():
    assert sbc_ranks(np.array([[[0.0], [1.0], [2.0]]]), np.array([[1.5]])).tolist() == [[2]]


@pytest.mark.parametrize("draws, truth, words", [
    (np.zeros((4, 9, 2)), np.zeros((4, 3)), r"truth .*give \(4, 2\)"),
    (np.zeros((4, 2)), np.zeros((4, 2)), r"draws .*give \(m, n, r\)"), (np.zeros((0, 9, 1)), np.zeros((0, 1)), "Draws"),
    (np.full((4, 9, 1), 1j), np.zeros((4, 1)), "real and imaginary"),
    (np.full((4, 9, 1), np.nan), np.zeros((4, 1)), "finite"),
])
def test_wrong_shapes_are_refused(draws, truth, words):
    with pytest.raises(InputError, match=words):
        calibrate(draws, truth)


@pytest.mark.parametrize("ranks, n, bins, words", [
    (0, N, 1, "bins"), (0, N, 101, "bins"), (0, N, 2.0, "bins is 2.0"), (0, 0, None, "n is 0"), (0.5, N, None, "ranks"),
    (-1, N, None, "ranks"), (N + 1, N, None, "ranks"), (1j, N, None, "ranks"),
])
def test_wrong_ranks_and_bins_are_refused(ranks, n, bins, words):
    with pytest.raises(InputError, match=words):
        sbc_p_values(np.full((40, 1), ranks), n, bins)


@pytest.mark.parametrize("levels", [0.9, (0.5, 1.5), ("0.9",), (None,), (90,)])
def test_wrong_levels_are_refused(levels):
    with pytest.raises(InputError, match="level"):
        calibrate(*_pairs()[:2], levels)


class _ExactModel:
    """z ~ N(0, I) and y = z + e with e ~ N(0, I / 4): the posterior is N(0.8 y, 0.2 I)."""

    basis = SimpleNamespace(encode=torch.as_tensor)

    def __init__(self, std=np.sqrt(0.2)):
        self.std = std

    def condition(self, y):
        def sample(n, *, seed, refill):
            assert refill is False
            noise = np.random.default_rng(seed).standard_normal((n, len(y)))
            return SimpleNamespace(latents=torch.as_tensor(0.8 * y + self.std * noise))
        return SimpleNamespace(sample=sample)


def test_a_model_is_calibrated_on_held_out_pairs():
    z = np.random.default_rng(0).standard_normal((400, 5))
    data, noise = SimpleNamespace(fields=z, observations=z), GaussianNoise(std=0.5)
    right = calibrate_model(_ExactModel(), data, noise, seed=1)
    assert right.p_value > 1e-3 and right.ranks.shape == (400, 5) and right.draws == 99
    for level, share in right.coverage.items():
        error = right.coverage_error(level)
        # Latents are independent here, so the error is that of 2,000 coins.
        assert error == pytest.approx(np.sqrt(level * (1 - level) / 2000), rel=0.2) and abs(share - level) < 4 * error
    # A number is the standard deviation; a noise of the user's own may write into what it gets.
    rude = CallableNoise(lambda y, g: y.add_(0.5 * torch.randn(y.shape, generator=g, dtype=y.dtype)))
    for same in (0.5, rude):
        np.testing.assert_array_equal(calibrate_model(_ExactModel(), data, same, seed=1).ranks, right.ranks)
    for change, words in (({"seed": None}, "seed"), ({"draws": 9.0}, "draws"), ({"leading": 0}, "leading"),
                          ({"noise": [0.5, 0.5]}, r"\[2\] sensors"), ({"levels": 0.9}, "levels")):
        with pytest.raises(InputError, match=words):
            calibrate_model(_ExactModel(), data, **{"noise": noise, "seed": 1, **change})
    wrong = calibrate_model(_ExactModel(0.3), data, noise, seed=1, leading=2)
    assert wrong.ranks.shape == (400, 2) and wrong.coverage[0.9] < 0.9 - 4 * wrong.coverage_error(0.9)
    blind = calibrate_model(_ExactModel(), SimpleNamespace(fields=z, observations=z), None, seed=1)
    assert blind.p_value < 1e-3  # without the noise that the posterior expects
