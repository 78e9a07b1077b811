"""The coefficients that follow from the density PDE, and the angles that samplers use."""

import pytest
import torch

from fem_diffusion.diffusion import Formulation, variance_exploding, variance_preserving
from fem_diffusion.errors import InputError

T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
STRAIGHT = Formulation("straight", lambda t: t / (1 - 0.99 * t), lambda sigma: 1 + sigma)


def _slope(function, step=1e-5):
    return (function(T + step) - function(T - step)) / (2 * step)


@pytest.mark.parametrize("formulation", [variance_exploding(), variance_preserving(), STRAIGHT], ids=lambda f: f.name)
def test_coefficients_give_the_moments_of_the_density_pde(formulation):
    # The density PDE has the moment equations da/dt = -b a and d(s^2)/dt = g - 2 b s^2.
    a, s, b, g = (getattr(formulation, name)(T) for name in "asbg")
    torch.testing.assert_close(_slope(formulation.a), -b * a, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(_slope(lambda t: formulation.s(t)**2), g - 2 * b * s**2, rtol=1e-6, atol=1e-8)


def test_variance_preserving_is_the_usual_one():
    formulation = variance_preserving(0.1, 20.0)
    beta = 0.1 + 19.9 * T
    torch.testing.assert_close(formulation.a(T)**2 + formulation.s(T)**2, torch.ones_like(T))
    torch.testing.assert_close(formulation.g(T), beta)
    torch.testing.assert_close(formulation.b(T), beta / 2)


def test_variance_exploding_has_no_drift():
    formulation = variance_exploding(0.01, 50.0)
    assert not formulation.b(T).any() and (formulation.a(T) == 1).all()
    ends = formulation.sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.01, 50.0], dtype=torch.float64))


@pytest.mark.parametrize("formulation", [variance_exploding(), variance_preserving()], ids=lambda f: f.name)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_angles_fall_to_an_exact_zero(formulation, steps):
    angles = formulation.angles(steps)
    assert len(angles) == steps + 1 and angles[-1] == 0 and (angles.diff() < 0).all() and angles[0] > 1.5


@pytest.mark.parametrize("make", [lambda: variance_exploding(2.0, 1.0), lambda: variance_preserving(0.0, 1.0),
                                  lambda: variance_preserving().angles(0)])
def test_wrong_settings_are_refused(make):
    with pytest.raises(InputError):
        make()
