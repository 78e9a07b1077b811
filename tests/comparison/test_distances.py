"""Distances: known values, the level of chance, and wrong samplers that every one of them must see."""

import builtins

import numpy as np
import pytest

from fem_diffusion.comparison import c2st, mmd, moment_p_values, sinkhorn, sliced_wasserstein
from fem_diffusion.errors import InputError, InstallError
from fem_diffusion.trust import energy_score

TWO_SAMPLE = [sliced_wasserstein, sinkhorn, mmd, c2st]


def _normal(n, r, seed):
    return np.random.default_rng(seed).standard_normal((n, r))


def test_shift_is_what_wasserstein_distances_measure():
    a, shift = _normal(300, 2, 0), np.array([3.0, 4.0])
    assert sinkhorn(a, a + shift) == pytest.approx(5.0, rel=1e-3)
    # The mean of (shift · direction)² over directions is |shift|² / r.
    assert sliced_wasserstein(a, a + shift, projections=4000) == pytest.approx(5.0 / np.sqrt(2), rel=0.02)


def test_sinkhorn_goes_from_the_distance_of_means_to_the_exact_cost():
    a, b = _normal(100, 1, 0), 1 + 3 * _normal(100, 1, 1)
    exact = np.sqrt(((np.sort(a, axis=0) - np.sort(b, axis=0)) ** 2).mean())
    blurred, fine = sinkhorn(a, b, regularisation=1e4), sinkhorn(a, b)
    assert blurred == pytest.approx(abs(a.mean() - b.mean()), rel=1e-2)
    assert blurred < 0.9 * exact and fine == pytest.approx(exact, rel=1e-2)


def test_sinkhorn_knows_no_unit():
    a, b = _normal(100, 2, 0), 0.5 + _normal(100, 2, 1)
    assert sinkhorn(1e6 * a, 1e6 * b) == pytest.approx(1e6 * sinkhorn(a, b), rel=1e-6)


def test_sinkhorn_survives_samples_that_are_far_away():
    a = _normal(50, 2, 0)
    assert sinkhorn(a, a + 1e4, iterations=50) == pytest.approx(1e4 * np.sqrt(2), rel=1e-3)


def test_distances_of_a_set_to_itself_vanish():
    a = _normal(100, 3, 0)
    assert max(sliced_wasserstein(a, a), sinkhorn(a, a), mmd(a, a)) < 1e-7


def test_mmd_has_its_expectation_under_equal_laws():
    n, m, repeats = 100, 50, 200
    squares = [mmd(_normal(n, 2, 2 * i), _normal(m, 2, 2 * i + 1)) ** 2 for i in range(repeats)]
    # The median squared distance of N(0, I) in 2D is 4 log 2, and E exp(-|x - x'|² / w) = 1 / (1 + 4 / w).
    expected = (1 / n + 1 / m) * (1 - 1 / (1 + 4 / (8 * np.log(2))))
    error = np.std(squares) / np.sqrt(repeats)
    assert abs(np.mean(squares) - expected) < 4 * error + 0.02 * expected


def test_mmd_of_shifted_gaussians():
    # In 1D with width w, E k = sqrt(w / (w + 4)) exp(-shift² / (w + 4)).
    n, shift = 3000, 1.5
    a, b = _normal(n, 1, 0), shift + _normal(n, 1, 1)
    w = 2 * 2 * 0.454936
    exact = np.sqrt(2 * np.sqrt(w / (w + 4)) * (1 - np.exp(-shift**2 / (w + 4))))
    assert mmd(a, b) == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("r", [1, 2])
def test_c2st_of_equal_and_of_distant_laws(r):
    a, b = _normal(250, r, 0), _normal(250, r, 1)
    # Held-out accuracy of guessing has the standard deviation 1 / (2 sqrt(500)).
    assert abs(c2st(a, b) - 0.5) < 4 / (2 * np.sqrt(500))
    assert c2st(a, b + 8) > 0.99


def test_c2st_of_a_shift_is_that_of_the_best_classifier():
    a, b = _normal(1000, 1, 0), 1 + _normal(1000, 1, 1)
    assert abs(c2st(a, b) - 0.6915) < 4 * np.sqrt(0.6915 * 0.3085 / 2000)


WRONG = {
    "shift": lambda x: x + 0.5,
    "too narrow": lambda x: 0.5 * x,
    "one mode lost": lambda x: np.abs(x),
}


@pytest.mark.parametrize("distance", TWO_SAMPLE, ids=lambda f: f.__name__)
def test_wrong_samplers_stand_out_from_chance(distance):
    a, b = _normal(300, 2, 0), _normal(300, 2, 1)
    floors = [distance(a, _normal(300, 2, seed)) for seed in range(2, 6)]
    for name, wrong in WRONG.items():
        assert distance(a, wrong(b)) > np.mean(floors) + 6 * np.std(floors), name


def test_energy_score_of_a_normal():
    # For x, z ~ N(0, 1): E|x - z| - E|x - x'| / 2 = 1 / sqrt(pi).
    draws, truth = np.random.default_rng(0).standard_normal((4000, 40, 1)), _normal(4000, 1, 1)
    score = energy_score(draws, truth)
    assert abs(score.mean() - 1 / np.sqrt(np.pi)) < 4 * score.std() / np.sqrt(len(score))


@pytest.mark.parametrize("wrong", [lambda x: x + 0.5, lambda x: 0.5 * x, lambda x: 2 * x])
def test_energy_score_prefers_the_truth(wrong):
    draws, truth = np.random.default_rng(0).standard_normal((2000, 40, 2)), _normal(2000, 2, 1)
    gain = energy_score(wrong(draws), truth) - energy_score(draws, truth)
    assert gain.mean() > 4 * gain.std() / np.sqrt(len(gain))


@pytest.mark.parametrize("distance", TWO_SAMPLE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("a, b, words", [
    (np.zeros((5, 2)), np.zeros((5, 3)), "Two sets"), (np.zeros(5), np.zeros(5), r"give \(n, r\)"),
    (np.zeros((0, 2)), np.zeros((5, 2)), "Two sets"), (np.full((9, 1), np.nan), np.zeros((9, 1)), "finite"),
])
def test_wrong_samples_are_refused(distance, a, b, words):
    with pytest.raises(InputError, match=words):
        distance(a, b)


@pytest.mark.parametrize("call, words", [
    (lambda: mmd(np.zeros((5, 2)), np.ones((5, 2))), "no spread"),
    (lambda: sinkhorn(np.zeros((1, 2)), np.ones((5, 2))), "no spread"),
    (lambda: c2st(np.zeros((9, 1)), np.ones((9, 1))), "constant"),
    (lambda: c2st(np.arange(3.0)[:, None], np.ones((9, 1))), "as many"),
    (lambda: sliced_wasserstein(np.eye(3), np.eye(3), projections=0), "projections is 0"),
    (lambda: sliced_wasserstein(np.eye(3), np.eye(3), seed=None), "seed is None"),
    (lambda: sinkhorn(np.eye(3), np.eye(3), regularisation=0.0), "regularisation is 0"),
    (lambda: sinkhorn(np.eye(3), np.eye(3), iterations=2.0), "iterations is 2.0"),
    (lambda: sinkhorn(np.eye(3), np.eye(3), tolerance=np.nan), "tolerance is nan"),
    (lambda: c2st(np.eye(3), np.eye(3), folds=1), "folds is 1"), (lambda: c2st(np.eye(3), np.eye(3), seed=-1), "seed"),
    (lambda: mmd(1j * np.eye(3), np.eye(3)), "real and imaginary"), (lambda: mmd(None, np.eye(3)), "real numbers"),
    (lambda: moment_p_values(np.eye(3)[:, :2], np.zeros(2), np.ones((2, 2))), "not positive definite"),
    (lambda: moment_p_values(np.eye(3)[:, :2], np.zeros(2), [[1, 0.5], [0.1, 1]]), "not symmetric"),
    (lambda: moment_p_values(np.eye(3)[:, :2], np.zeros(3), np.eye(2)), r"give \(2,\)"),
    (lambda: energy_score(np.full((4, 3, 2), np.nan), np.zeros((4, 2))), "not finite"),
    (lambda: energy_score(np.zeros((4, 1, 2)), np.zeros((4, 2))), "n >= 2"),
    (lambda: energy_score(np.zeros((4, 5, 2)), np.zeros((3, 2))), r"give \(4, 2\)"),
])
def test_senseless_settings_are_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize("distance", [sliced_wasserstein, sinkhorn])
def test_missing_library_names_the_remedy(distance, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "ot":
            raise ImportError(name)
        return original(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InstallError, match=r"fem_diffusion\[comparison\]"):
        distance(np.eye(9), np.eye(9))
