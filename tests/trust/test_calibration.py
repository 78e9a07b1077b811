"""Calibration: uniform where draws are right, and every usual fault of a sampler is seen."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mpi4py import MPI

from fem_diffusion.diffusion import CallableNoise, Denoiser, GaussianNoise, Sampler, linear_base
from fem_diffusion.errors import InputError
from fem_diffusion.trust import calibrate, calibrate_model, sbc_p_values, sbc_ranks

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


def _model(variance=0.25, noise=GaussianNoise(std=0.5), family=False):
    """z ~ N(0, I) and y = z + e: with e ~ N(0, variance I) in mind, where the problem's noise may be another one."""
    eye = torch.eye(5, dtype=torch.float64)
    problem = SimpleNamespace(noise=noise, family=family, comm=MPI.COMM_SELF, levels=())
    return SimpleNamespace(problem=problem, basis=SimpleNamespace(encode=lambda fields: 2 * fields),
                           denoiser=Denoiser(linear_base(eye, variance * eye), known=True))


def _data(n=400):
    z = np.random.default_rng(0).standard_normal((n, 5))
    return SimpleNamespace(coefficients=z / 2, readings=z)


def test_a_model_is_calibrated_on_held_out_pairs():
    right = calibrate_model(_model(), _data(), seed=1)
    assert right.p_value > 1e-3 and right.ranks.shape == (400, 5) and right.draws == 99
    for level, share in right.coverage.items():
        error = right.coverage_error(level)
        # Latents are independent here, so the error is that of 2,000 coins.
        assert error == pytest.approx(np.sqrt(level * (1 - level) / 2000), rel=0.2) and abs(share - level) < 4 * error
    # A noise of the user's own may write into what it gets.
    rude = CallableNoise(lambda y, g: y.add_(0.5 * torch.randn(y.shape, generator=g, dtype=y.dtype)))
    data = _data()
    for _ in range(2):
        np.testing.assert_array_equal(calibrate_model(_model(noise=rude), data, seed=1).ranks, right.ranks)
    wrong = calibrate_model(_model(0.1), _data(), seed=1, leading=2)
    assert wrong.ranks.shape == (400, 2) and wrong.coverage[0.9] < 0.9 - 4 * wrong.coverage_error(0.9)
    # Without the noise that the posterior expects.
    assert calibrate_model(_model(noise=None), _data(), seed=1).p_value < 1e-3


def test_a_sampler_of_the_users_choice_draws():
    ode, sde = (calibrate_model(_model(), _data(), seed=1, sampler=Sampler(alpha)) for alpha in (0.0, 1.0))
    assert sde.p_value > 1e-3 and (sde.ranks != ode.ranks).any()


@pytest.mark.parametrize("change, words", [
    ({"seed": None}, "seed"), ({"draws": 9.0}, "draws"), ({"leading": 0}, "leading"), ({"levels": 0.9}, "levels"),
    ({"sampler": 8}, "give a Sampler"), ({"model": _model(family=True)}, "chosen sensors"),
])
def test_senseless_arguments_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        calibrate_model(**{"model": _model(), "data": _data(20), "seed": 1} | change)
