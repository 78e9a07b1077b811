"""The coefficients that follow from the density PDE, and the wider class of scalings with bounded second moment."""

import pytest
import torch

from fem_diffusion.diffusion import (
    Formulation, constant_moment, straight_line, sub_variance_preserving, variance_exploding, variance_preserving,
)
from fem_diffusion.errors import InputError

T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
MINE = Formulation("mine", lambda t: 2500 * t**2, lambda t: (1 + (50 * t)**3)**(1 / 3))
ALL = [variance_exploding(), variance_exploding(schedule="linear"), variance_preserving(),
       variance_preserving(schedule="cosine"), sub_variance_preserving(), straight_line(), constant_moment(0.3), MINE]
every_formulation = pytest.mark.parametrize("formulation", ALL, ids=lambda f: f.name)


def _slope(function, step=1e-5):
    return (function(T + step) - function(T - step)) / (2 * step)


@every_formulation
def test_coefficients_give_the_moments_of_the_density_pde(formulation):
    # The density PDE has the moment equations da/dt = -b a and d(s^2)/dt = g - 2 b s^2.
    a, s, b, g = (getattr(formulation, name)(T) for name in "asbg")
    torch.testing.assert_close(_slope(formulation.a), -b * a, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(_slope(lambda t: formulation.s(t)**2), g - 2 * b * s**2, rtol=1e-5, atol=1e-8)


@every_formulation
def test_coefficients_are_finite_to_both_ends(formulation):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for name in ("sigma", "a", "s", "b", "g", "spread"):
        assert torch.isfinite(getattr(formulation, name)(ends)).all(), name


@every_formulation
def test_noise_carries_almost_all_of_the_terminal_law(formulation):
    end = torch.ones(1, dtype=torch.float64)
    assert formulation.a(end) / formulation.s(end) < 0.04


@every_formulation
def test_score_and_loss_weight_belong_together(formulation):
    # For one data point the score is -eps / s, and s^2 times its square has mean 1.
    g = torch.Generator().manual_seed(0)
    t = torch.rand(2000, 1, generator=g, dtype=torch.float64).clamp(min=0.01)
    eps = torch.randn(2000, 1, generator=g, dtype=torch.float64)
    xi = 2 * formulation.a(t) + formulation.s(t) * eps
    score = formulation.score(xi, torch.full_like(xi, 2.0), t)
    torch.testing.assert_close(score * formulation.s(t), -eps)
    torch.testing.assert_close(formulation.loss_weight(t) * score**2, eps**2)


@every_formulation
def test_time_inverts_the_noise_level(formulation):
    torch.testing.assert_close(formulation.time(formulation.sigma(T)), T)


def test_variance_preserving_is_the_usual_one():
    formulation = variance_preserving(0.1, 20.0)
    beta = 0.1 + 19.9 * T
    torch.testing.assert_close(formulation.a(T)**2 + formulation.s(T)**2, torch.ones_like(T))
    torch.testing.assert_close(formulation.g(T), beta)
    torch.testing.assert_close(formulation.b(T), beta / 2)


def test_sub_variance_preserving_is_that_of_song_et_al():
    formulation = sub_variance_preserving(0.1, 20.0)
    beta, integral = 0.1 + 19.9 * T, 0.1 * T + 9.95 * T**2
    torch.testing.assert_close(formulation.s(T), 1 - torch.exp(-integral))
    torch.testing.assert_close(formulation.b(T), beta / 2)
    torch.testing.assert_close(formulation.g(T), beta * (1 - torch.exp(-2 * integral)))


def test_cosine_turns_the_angle_evenly():
    angle = torch.arctan(variance_preserving(schedule="cosine").sigma(T))
    torch.testing.assert_close(angle / T, (angle / T)[:1].expand(len(T)))


def test_straight_line_is_straight():
    formulation = straight_line()
    torch.testing.assert_close(formulation.a(T) + formulation.s(T), torch.ones_like(T))
    torch.testing.assert_close(formulation.s(T) / T, torch.full_like(T, 100 / 101))


@pytest.mark.parametrize("variance", [0.01, 1.0, 30.0])
def test_constant_moment_keeps_the_second_moment(variance):
    formulation = constant_moment(variance)
    torch.testing.assert_close(formulation.spread(T, variance)**2, torch.full_like(T, variance))


def test_variance_exploding_has_no_drift():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for schedule in ("geometric", "linear"):
        formulation = variance_exploding(0.01, 50.0, schedule)
        assert not formulation.b(T).any() and (formulation.a(T) == 1).all()
        torch.testing.assert_close(formulation.sigma(ends), torch.tensor([0.01, 50.0], dtype=torch.float64))


@pytest.mark.parametrize("make, words", [
    (lambda: variance_exploding(2.0, 1.0), "sigma_max is 1.0: give a number that is above 2"),
    (lambda: variance_exploding(schedule="quadratic"), "schedule is 'quadratic'"),
    (lambda: variance_preserving(0.0, 1.0), "beta_min"), (lambda: sub_variance_preserving(2.0, 1.0), "beta_max"),
    (lambda: variance_preserving(schedule="cosine", sigma_max=-1.0), "sigma_max"),
    (lambda: straight_line(float("inf")), "sigma_max"), (lambda: constant_moment(0.0), "variance"),
    (lambda: Formulation("falls", lambda t: 1 - t, torch.ones_like), "increase"),
    (lambda: Formulation("blows up", lambda t: t / (1 - t), torch.ones_like), "finite"),
    (lambda: Formulation("scalar", lambda t: t, lambda t: torch.ones(1)), "elementwise"),
    (lambda: Formulation("negative", lambda t: t, lambda t: t - 2), "positive"),
    (lambda: Formulation("complex", lambda t: 1j * t, torch.ones_like), "real tensor"),
    (lambda: Formulation("number", 2.0, torch.ones_like), "variance is 2.0"),
    (lambda: Formulation(3, lambda t: t, torch.ones_like), "name of a formulation is 3"),
    (lambda: variance_exploding(sigma_min=None), "sigma_min is None"),
    (lambda: constant_moment("1"), "variance is '1'"),
    (lambda: variance_preserving(beta_max=float("nan")), "beta_max is nan"),
    (lambda: straight_line(sigma_max=True), "sigma_max is True"),
])
def test_wrong_settings_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
