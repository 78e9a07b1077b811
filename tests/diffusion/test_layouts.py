"""Layouts of sensors, and the base of any sensors: exact where the emulator is, in any units, for fixed ones, too."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import (
    Denoiser, Emulator, FamilyWarning, FieldGeometry, GaussianBase, GaussianNoise, Layout, LayoutFamily,
    LayoutKind, Sampler, SensorNetwork, TrainingOptions, TrainingRange, fit_denoiser, fit_emulator, linear_base,
)
from fem_diffusion.diffusion.training.loop import Loop
from fem_diffusion.errors import InputError
from fem_diffusion.reference.dense import linear_gaussian_posterior
from truths import bent_map, draw, random, turned_family

QUICK = TrainingOptions(steps=600, evaluate_every=100, width=32, depth=2, batch=128)


def test_layouts_follow_their_law():
    rows = torch.arange(1.0, 31.0, dtype=torch.float64).reshape(10, 3, 1)
    std = torch.stack([torch.full((10, 3), 0.1), torch.full((10, 3), 0.4)]).double()
    drawn = LayoutKind(rows, torch.zeros(10, 3, dtype=torch.float64), std, (0, 4)).draw(4000, random())
    number = drawn.present.sum(1) / 3
    share = torch.bincount(number.long(), minlength=5) / 4000
    law = torch.log(torch.arange(2.0, 7.0) / torch.arange(1.0, 6.0)) / np.log(6)
    assert (share - law).abs().max() < 4 * 0.5 / 4000**0.5
    # The three rows of a sensor come together and no sensor comes twice.
    seen = drawn.rows[:, :, 0].unflatten(1, (-1, 3))
    assert ((seen[..., 1] == seen[..., 0] + 1) | (seen[..., 0] == 0)).all()
    for layout in seen[:200, :, 0]:
        kept = layout[layout > 0]
        assert len(kept.unique()) == len(kept)
    there = drawn.variance[drawn.present].sqrt()
    assert 0.1 <= there.min() < 0.11 and 0.38 < there.max() <= 0.4
    assert (drawn.variance[~drawn.present] == 1).all() and (drawn.rows[~drawn.present] == 0).all()


def _affine(matrix, offset=None, residual=None):
    """An emulator of an affine map whose error has this covariance."""
    emulator = Emulator(*matrix.shape[::-1], depth=0)
    emulator.matrix = matrix
    emulator.offset = emulator.offset if offset is None else offset
    emulator.residual = 0.01 * torch.eye(len(matrix)).double() if residual is None else residual
    return emulator


def test_the_base_of_an_affine_map_is_the_exact_posterior():
    emulator = _affine(torch.tensor([[1., 0.5, 0], [0, 1, -1]]).double(), torch.ones(2).double())
    base = GaussianBase(torch.zeros(3).double(), torch.eye(3).double(), emulator)
    layout = turned_family((4, 4)).draw(5, random(3))
    y = torch.randn(5, 4, generator=random(4), dtype=torch.float64)
    together = Denoiser(base).at(y, layout).located
    for i, B in enumerate(layout.rows):
        noise = torch.diag(layout.variance[i]) + B @ emulator.residual @ B.T
        exact = linear_base(B @ emulator.matrix, noise, layout.offset[i] + B @ emulator.offset)
        exact = Denoiser(exact).at(y[i:i + 1]).located
        alone = Denoiser(base).at(y[i:i + 1], Layout(*(getattr(layout, name)[i:i + 1] for name in (
            "rows", "offset", "variance", "present")))).located
        for found in (together.mean[i], alone.mean[0]):
            torch.testing.assert_close(found, exact.mean[0])
        for found in (together.covariance[i], alone.covariance[0]):
            torch.testing.assert_close(found, exact.covariance[0])


def _readings_as_coordinates(std):
    """A family of one layout: all coordinates, each read once, with this noise."""
    k = len(std)
    std = std[None, :, None].expand(2, -1, -1)
    return LayoutFamily((LayoutKind(torch.eye(k).double()[:, None], torch.zeros(k, 1).double(), std, (k, k)),))


@pytest.mark.parametrize("bends", [False, True])
def test_fixed_sensors_are_the_family_of_one_layout(bends):
    z = torch.randn(1000, 2, generator=random(), dtype=torch.float64)
    c = bent_map(z) if bends else z @ torch.tensor([[0.8, 0.6], [0.0, 1.0]]).double()
    std = torch.tensor([0.3, 0.2]).double()
    settings = {"standard_prior": True, "options": replace(QUICK, steps=200)}
    fixed, _ = fit_denoiser(z, c, GaussianNoise(std=std), **settings)
    family = _readings_as_coordinates(std)
    free, _ = fit_denoiser(z, c, family, **settings)
    assert (fixed.base.emulator.head is not None) == (free.base.emulator.head is not None) == bends
    y = torch.tensor([[0.7, -0.4], [0.1, 1.0], [2.0, 0.0]], dtype=torch.float64)
    # One emulator for both, so that the rest can be compared to rounding: noise in it, or in the layout.
    emulator = fit_emulator(z, c, std, options=settings["options"])[0]
    apart = replace(free.base, emulator=emulator, updates=6)
    inside = replace(apart, emulator=fit_emulator(z, c, std, options=settings["options"])[0])
    inside.emulator.residual = inside.emulator.residual + torch.diag(std**2)
    layout = Layout(torch.eye(2).double()[None], torch.zeros(1, 2).double(), std[None]**2, torch.ones(1, 2).bool())
    one, other = Denoiser(inside, known=True).at(y), Denoiser(apart, known=True).at(y, layout)
    # What a reading without noise gets is the one difference: 1e-12 of its prior variance.
    torch.testing.assert_close(one.located.mean, other.located.mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one.located.factor, other.located.factor, rtol=1e-8, atol=1e-8)
    assert (one.density is None) == (other.density is None) == (not bends)
    draws = [draw(part.select(torch.tensor([1])), 50, Sampler()) for part in (one, other)]
    torch.testing.assert_close(*draws, rtol=1e-5, atol=1e-5)
    if not bends:
        drawn = family.draw(1, random(8))
        order = drawn.rows[0].argmax(1)
        assert free.network is None and fixed.network is None
        for model in (free.at(y[:, order], drawn), fixed.at(y)):
            torch.testing.assert_close(model.located.mean, one.located.mean)


def test_a_linear_family_trains_nothing_and_is_exact(monkeypatch):
    monkeypatch.setattr(Loop, "run", lambda *_: pytest.fail("A network is trained."))
    matrix = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.6, 0.8]], dtype=torch.float64)
    z = torch.randn(300, 3, generator=random(), dtype=torch.float64)
    model, history = fit_denoiser(z, z @ matrix.T, turned_family(), standard_prior=True, options=QUICK)
    assert model.network is None and model.known and history.step == []
    layout = turned_family().draw(1, random(3))
    y = layout.measure(torch.ones(1, 2).double(), random(4))
    there = layout.present[0]
    B, noise = layout.rows[0][there], torch.diag(layout.variance[0][there])
    exact = Denoiser(linear_base(B @ matrix, noise, layout.offset[0][there])).at(y[:, there]).located
    found = draw(model.at(y, layout), 4000, Sampler(steps=1)).numpy()
    torch.testing.assert_close(model.at(y, layout).located.mean, exact.mean)
    assert min(moment_p_values(found, exact.mean[0].numpy(), exact.covariance[0].numpy())) > 1e-4


def test_the_exact_posterior_of_any_sensors_knows_no_units():
    latents, matrix = torch.tensor([1e8, 1.0, 1e-8]).double(), torch.tensor([[1., 0.5, 0], [0, 1, -1]]).double()
    base = GaussianBase(torch.zeros(3).double(), torch.diag(latents), _affine(matrix / latents))
    unit = torch.tensor([1e8, 1e-8, 1e3, 1e-25]).double()
    plain = turned_family((4, 4)).draw(1, random(3))
    layout = Layout(plain.rows * unit[:, None], plain.offset * unit, plain.variance * unit**2, plain.present)
    y, B = torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=torch.float64), plain.rows[0].numpy()
    noise = np.diag(plain.variance[0]) + 0.01 * B @ B.T
    mean, covariance = linear_gaussian_posterior(B @ matrix.numpy(), np.eye(3), noise, (y - plain.offset[0]).numpy())
    found = Denoiser(base).at((y * unit)[None], layout).located
    np.testing.assert_allclose((found.mean[0] / latents).numpy(), mean, rtol=1e-8)
    np.testing.assert_allclose((found.covariance[0] / torch.outer(latents, latents)).numpy(), covariance, rtol=1e-8)


def test_a_law_of_unlike_units_is_known_in_all_of_them():
    rows = torch.tensor([[1.0, 0.0], [1e-17, 0.0]], dtype=torch.float64)[:, None]
    kinds = [LayoutKind(unit * rows, torch.zeros(2, 1).double(), torch.full((2, 2, 1), std * unit).double(), (1, 2))
             for unit, std in ((1e8, 0.1), (1e-8, 0.4))]
    seen = TrainingRange.of(LayoutFamily(tuple(kinds)))
    assert seen.std == pytest.approx((0.1, 0.4)) and seen.most == 4

    def layout(row, std):
        return Layout(torch.tensor([[row]]).double(), None, torch.tensor([[std**2]]).double(), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen.warn(layout([1e-8, 0.0], 4e-9), ["like"])
        seen.warn(layout([1e-8 * 1e-17, 1e-8 * 1e-17], 4e-9), ["blind, in the smaller unit"])
        seen.warn(layout([1e8 * 1e-17, 1e8 * 1e-17], 1e7), ["blind, in the larger unit"])
    with pytest.warns(FamilyWarning, match="sensor unlike: .* 100%"):
        seen.warn(layout([0.0, 1e-8], 4e-9), ["unlike"])
    with pytest.warns(FamilyWarning, match="noise over prior signal reaches .* 10 of the largest"):
        seen.warn(layout([1e-8, 0.0], 4e-8), ["noisy"])


@pytest.mark.parametrize("change, words", [
    ({"y": torch.tensor([[0.0, np.nan]])}, r"sensors \[1\]"), ({"y": torch.zeros(1, 3)}, r"give \(B, 3, 2\)"),
    ({"y": torch.tensor([[1e200, 0.0]]).double()}, "beyond"), ({"y": torch.zeros(1, 2) * 1j}, "imaginary"),
    ({"y": torch.tensor([[0.0, 1e30]])}, r"sensors \[1\] are more than 1e\+12"),
    ({"y": [[0.0, 0.0]]}, "torch.as_tensor"), ({"y": torch.zeros(2)}, r"give \(B, k\)"),
    ({"rows": torch.zeros(1, 2, 3)}, r"give \(B, 2, 2\)"), ({"variance": torch.zeros(1, 2)}, "must be positive"),
    ({"offset": torch.zeros(1, 3)}, r"offset .*give \(1, 2\)"), ({"present": torch.ones(1, 2)}, "true or false"),
    ({"rows": torch.zeros(2, 2, 2), "offset": torch.zeros(2, 2), "variance": torch.ones(2, 2)}, "2 layouts and 1 meas"),
])
def test_a_measurement_that_is_none_is_refused(change, words):
    base = GaussianBase(torch.zeros(2).double(), torch.eye(2).double(), Emulator(2, 2, depth=0))
    parts = {"rows": torch.eye(2)[None], "offset": torch.zeros(1, 2), "variance": torch.ones(1, 2),
             "y": torch.zeros(1, 2), "present": torch.ones(1, 2, dtype=torch.bool)}
    parts = {name: x.double() if torch.is_tensor(x) and x.dtype == torch.float32 else x
             for name, x in (parts | change).items()}
    y = parts.pop("y")
    with pytest.raises(InputError, match=words):
        Denoiser(base).at(y, Layout(**parts))


@pytest.mark.parametrize("call, message", [
    (lambda z: fit_emulator(z, z[:5], torch.ones(2)), "the same pairs"),
    (lambda z: fit_emulator(z[:4], z[:4], torch.ones(2)), "simulate more"),
    (lambda z: fit_denoiser(z, z * torch.nan, turned_family()), "finite"),
    (lambda z: fit_denoiser(z[:, :1], z * torch.nan, turned_family()), "finite"),
    (lambda z: turned_family((0, 65)), "cannot be drawn"),
    (lambda z: turned_family((3, 2)), "cannot be drawn"), (lambda z: turned_family((1.0, 2)), "count is 1.0"),
    (lambda z: turned_family(3), "count is 3"), (lambda z: LayoutFamily(()), "at least one kind"),
    (lambda z: LayoutFamily((z,)), "kinds holds Tensor"), (lambda z: LayoutFamily(3), "kinds is 3"),
    (lambda z: LayoutKind(z, z, z, (1, 2)), r"give \(K, g, s\)"),
    (lambda z: replace(turned_family().kinds[0], std=-turned_family().kinds[0].std), "std must be positive"),
    (lambda z: fit_emulator(z, z, torch.zeros(2)), "noise .* must be positive"),
    (lambda z: fit_emulator(z, z, torch.ones(3)), r"give \(2,\)"),
    (lambda z: fit_emulator(z, z * 1j, torch.ones(2)), "imaginary"),
    (lambda z: fit_emulator(z, z, torch.ones(2), options={}), r"TrainingOptions\(\*\*options\)"),
    (lambda z: fit_emulator(z.numpy(), z, torch.ones(2)), "torch.as_tensor"),
    (lambda z: fit_denoiser(z, z[:, :1], turned_family()), "see 2 state coordinates"),
    (lambda z: fit_denoiser(z, z, turned_family(), standard_prior=None), "standard_prior is None"),
    (lambda z: fit_denoiser(z @ torch.ones(2, 2).double(), z, turned_family()), "depend linearly"),
    (lambda z: fit_denoiser(z, z, turned_family(), network="field"), "for fixed sensors: leave"),
    (lambda z: fit_denoiser(z, z, turned_family(), geometry=FieldGeometry(*6 * (z,))), "leave geometry out"),
    (lambda z: Denoiser(None), "base is of type"), (lambda z: Emulator(2.0, 2), "r is 2.0"),
    (lambda z: Denoiser(linear_base(z.T @ z, z.T @ z)).at(z, z), "layout is of type Tensor"),
    (lambda z: SensorNetwork(2, 2, tokens=63), "multiple of 4"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.randn(50, 2, generator=random(), dtype=torch.float64))
