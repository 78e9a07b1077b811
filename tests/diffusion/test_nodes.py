"""The spectrum of the posterior is found, and steps lie where it asks for them."""

import math

import numpy as np
import pytest
import torch

from fem_diffusion.diffusion import Spectrum, fit_spectrum, place_angles
from fem_diffusion.errors import InputError
from truths import GaussianTruth, spectrum_of


@pytest.mark.parametrize("variances", [[0.01], [0.001, 0.3], [0.05, 4.0]], ids=str)
def test_spectrum_of_a_gaussian_is_found(variances):
    variances = np.array(variances)
    truth = GaussianTruth(np.zeros(len(variances)), np.diag(variances))
    w = torch.tensor(np.random.default_rng(0).standard_normal((20000, len(variances))) * np.sqrt(variances))
    found = spectrum_of(truth, w)
    for variance in variances:
        near = (found.variances > variance / 2) & (found.variances < 2 * variance)
        assert abs(float(found.weights[near].sum()) - 1 / len(variances)) < 0.1 / len(variances)


def test_nothing_to_add_gives_an_empty_spectrum_and_even_steps():
    angles = torch.linspace(0.1, 1.5, 10, dtype=torch.float64)
    empty = fit_spectrum(angles, torch.zeros(10))
    assert len(empty.weights) == 0
    for spectrum in (None, empty):
        torch.testing.assert_close(place_angles(spectrum, 4),
                                   torch.linspace(math.pi / 2, 0, 5, dtype=torch.float64))


def test_narrow_posteriors_draw_steps_to_small_noise():
    for variance in (0.1, 0.01, 0.0001):
        angles = place_angles(Spectrum(torch.tensor([variance]), torch.ones(1)), 40)
        assert angles[0] == math.pi / 2 and angles[-1] == 0 and (angles.diff() < 0).all()
        # The turn of sqrt(variance cos² + sin²) lies at sigma = sqrt(variance); the derivative falls slowly above it.
        share = float((torch.tan(angles) < 3 * math.sqrt(variance)).double().mean())
        even = math.atan(3 * math.sqrt(variance)) / (math.pi / 2)
        assert share > 1.2 * even and share - even > 0.1


@pytest.mark.parametrize("call, words", [
    (lambda angles: fit_spectrum(angles, torch.ones(3)), r"give \(2,\)"),
    (lambda angles: fit_spectrum(angles, torch.tensor([1.0, -1.0])), "finite mean square"),
    (lambda angles: fit_spectrum(angles, torch.tensor([1.0, torch.nan])), "not finite"),
    (lambda angles: fit_spectrum(angles + 3, torch.ones(2)), "between 0 and pi/2"),
    (lambda angles: fit_spectrum([0.1, 0.2], torch.ones(2)), "torch.as_tensor"),
    (lambda angles: place_angles(None, 2.0), "steps is 2.0"), (lambda angles: place_angles(None, 2, 0), "order is 0"),
    (lambda angles: place_angles(angles, 2), "what fit_spectrum returns"),
])
def test_wrong_input_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call(torch.tensor([0.1, 0.2]))
