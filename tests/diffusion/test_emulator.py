"""The emulator: affine where the map is, as good as it says, differentiable, and its posterior for fixed sensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fem_diffusion.diffusion import (
    Denoiser, Emulator, GaussianNoise, History, Layout, Sampler, TrainingOptions, fit_denoiser, fit_emulator,
)
from fem_diffusion.diffusion.base.emulator import affine_emulator
from fem_diffusion.errors import InputError
from truths import bent_map, draw, errors, quadrature, random

TILTED = lambda z: 2 + z @ torch.tensor([[1.0, 0.3], [0.0, 1.5]]).double()   # noqa: E731
STD, UNIT = torch.tensor([0.3, 0.3]).double(), torch.tensor([1e-6, 1e6]).double()
QUICK = TrainingOptions(steps=600, evaluate_every=100, width=32, depth=2, batch=128)


def test_an_emulator_is_affine_where_the_map_is():
    z = torch.randn(200, 3, generator=random(), dtype=torch.float64)
    matrix, offset = torch.randn(5, 3, generator=random(1), dtype=torch.float64), torch.arange(5.0).double()
    emulator, _ = fit_emulator(z, z @ matrix.T + offset, torch.ones(5), options=QUICK)
    assert emulator.head is None
    torch.testing.assert_close(emulator.matrix, matrix, rtol=1e-9, atol=1e-9)
    assert float(emulator.residual.abs().max()) < 1e-18


def _slopes(function, z):
    return torch.func.vmap(torch.func.jacrev(lambda x: function(x[None])[0]))(z)


def test_derivatives_take_the_place_of_pairs():
    z, new = (torch.randn(n, 2, generator=random(n), dtype=torch.float64) for n in (60, 4000))
    slopes, options = _slopes(bent_map, z), replace(QUICK, steps=1500, depth=3)

    def error(slopes):
        emulator, _ = fit_emulator(z, bent_map(z), STD, slopes=slopes, options=options)
        return float((bent_map(new) - emulator(new)).square().sum(1).median())
    with_them = error(slopes)
    assert with_them < 0.2 * error(None) and with_them < 0.2 * error(-slopes)


def test_derivatives_find_a_linear_map_from_fewer_pairs_than_latents():
    z, matrix = torch.randn(6, 20, generator=random(), dtype=torch.float64), torch.randn(3, 20, generator=random(1))
    matrix = matrix.double()
    emulator, _ = fit_emulator(z, z @ matrix.T + 2, STD[:1].expand(3), slopes=matrix.expand(6, 3, 20), options=QUICK)
    assert emulator.head is None
    torch.testing.assert_close(emulator.matrix, matrix)
    torch.testing.assert_close(emulator.offset, torch.full((3,), 2.0).double())


@pytest.mark.parametrize("change, words", [
    ({"slopes": torch.ones(100, 2, 3)}, "shape"), ({"slopes": torch.full((100, 2, 2), torch.nan)}, "not finite"),
    ({"noise": None}, "noise of a known law"), ({"base": "plain"}, "noise of a known law"),
])
def test_slopes_that_do_not_fit_are_refused(change, words):
    z = torch.randn(100, 2, generator=random(), dtype=torch.float64)
    given = {"noise": 0.3, "slopes": _slopes(bent_map, z), "standard_prior": True} | change
    with pytest.raises(InputError, match=words):
        fit_denoiser(z, bent_map(z), given.pop("noise"), options=QUICK, **given)


def test_an_emulator_knows_its_error():
    z = torch.randn(3000, 2, generator=random(), dtype=torch.float64)
    emulator, history = fit_emulator(z, bent_map(z), torch.ones(2), options=replace(QUICK, steps=1500, depth=3))
    new = torch.randn(4000, 2, generator=random(5), dtype=torch.float64)
    defect = (bent_map(new) - emulator(new)).square().sum(1)
    assert float(defect.median()) < 1e-4 and history.base > 0.5
    # Rare latents far out carry most of the error, so the two averages agree within a factor only.
    assert 0.1 < float(emulator.residual.trace()) / float(defect.mean()) < 10


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_emulator_pulls_covectors_back_by_its_derivative(depth):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        emulator = Emulator(3, 4, 16, depth)
    for name in ("matrix", "offset", "scale", "centre", "unit"):
        x = getattr(emulator, name)
        setattr(emulator, name, 1 + 0.2 * torch.randn(x.shape, generator=random(), dtype=x.dtype))
    if depth:
        torch.nn.init.normal_(emulator.head.weight, generator=random(1))
    z, way = (torch.randn(5, n, generator=random(n), dtype=torch.float64) for n in (3, 4))
    z.requires_grad_()
    values, pull = emulator.with_pull(z)
    exact, = torch.autograd.grad(emulator(z), z, way)
    torch.testing.assert_close(values, emulator(z), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pull(way), exact, rtol=1e-4, atol=1e-4)
    if depth:
        along = torch.randn(5, 3, generator=random(2), dtype=torch.float64)
        value, change = emulator.correction_along(z, along)
        torch.testing.assert_close(value, emulator.correction(z))
        # The same number from the pull-back: way · (∂f along) = along · (∂fᵀ way).
        both = (way * (change.double() @ emulator.scale + along @ emulator.matrix.T)).sum(1)
        torch.testing.assert_close(both, (along * exact).sum(1), rtol=1e-4, atol=1e-4)


def _seen_twice(z):
    """Readings of two fixed sensors, in unlike units."""
    return bent_map(z) * UNIT


@pytest.fixture(scope="module")
def fixed():
    """A model of two fixed sensors that are not affine in the latents."""
    z = torch.randn(3000, 2, generator=random(), dtype=torch.float64)
    return fit_denoiser(z, _seen_twice(z), GaussianNoise(std=STD * UNIT), standard_prior=True,
                        options=replace(QUICK, depth=3))[0]


def _exact(y):
    """Posterior moments for readings (2,) by quadrature."""
    layout = Layout(torch.eye(2).double()[None], torch.zeros(1, 2).double(), STD[None]**2, torch.ones(1, 2).bool())
    return quadrature(layout, y / UNIT)


def test_posteriors_of_fixed_sensors_are_those_of_quadrature(fixed):
    assert fixed.known and fixed.base.emulator.head is not None
    y = _seen_twice(torch.randn(4, 2, generator=random(7), dtype=torch.float64))
    exact, conditioned = [_exact(row) for row in y], fixed.at(y)
    joint = Denoiser(replace(fixed.base, updates=1)).at(y)

    def found(model):
        return np.array([errors(model.select(torch.tensor([i])), truth) for i, truth in enumerate(exact)]).max(0)
    assert (found(conditioned) < 0.2).all()
    assert found(joint)[1] > 1
    # Corrections take samples of the base alone to the emulator's posterior.
    moved = np.array([errors(Denoiser(fixed.base, known=True).at(row[None]), truth, corrections=40)
                      for row, truth in zip(y, exact)]).max(0)
    assert (moved < 0.2).all()
    broken = replace(conditioned, density=replace(conditioned.density, target=conditioned.density.target + 2))
    assert found(broken)[0] > 0.5


def test_corrections_of_many_measurements_are_those_of_each(fixed):
    y = _seen_twice(torch.randn(3, 2, generator=random(7), dtype=torch.float64))
    density = fixed.at(y).density
    w = torch.randn(5, 3, 2, generator=random(1), dtype=torch.float64)
    for i in range(3):
        alone = fixed.at(y[i:i + 1]).density
        torch.testing.assert_close(alone.energy(w[:, i:i + 1])[:, 0], density.energy(w)[:, i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone.force(w[:, i:i + 1])[:, 0], density.force(w)[:, i], rtol=1e-4, atol=1e-4)
    many = torch.randn(5000, 3, 2, generator=random(1), dtype=torch.float64)   # in parts
    for found in (density.energy, density.force):
        torch.testing.assert_close(found(many)[4990:], found(many[4990:]), rtol=1e-4, atol=1e-4)


def test_bases_of_many_measurements_are_those_of_each(fixed):
    y = _seen_twice(torch.randn(513, 2, generator=random(7), dtype=torch.float64))   # more than are located at once
    for updates in (1, 6):
        denoiser = Denoiser(replace(fixed.base, updates=updates))
        many = denoiser.at(y)
        assert len(many.located.factor) == (1 if updates == 1 else 513)
        for i in (0, 300, 512):
            one, part = denoiser.at(y[i:i + 1]).located, many.select(torch.tensor([i])).located
            for name in ("mean", "factor", "whitener", "sensitivity"):
                torch.testing.assert_close(getattr(part, name), getattr(one, name), rtol=1e-6, atol=1e-6)


def test_moves_that_miss_a_mode_call_for_a_network():
    z = torch.randn(3000, 1, generator=random(), dtype=torch.float64)
    options = TrainingOptions(steps=1000, evaluate_every=250, width=32, depth=3)
    denoiser, history = fit_denoiser(z, z**2, 0.3, standard_prior=True, options=options)
    assert denoiser.known and denoiser.network is not None and history.best_step
    grid = np.linspace(-4, 4, 4001)
    exact = np.exp(-grid**2 / 2 - (grid**2 - 2)**2 / (2 * 0.3**2))
    y, n = torch.full((1, 1), 2.0).double(), 2000

    def distance(model):
        """Kolmogorov-Smirnov distance."""
        found = draw(model.at(y), n, Sampler()).numpy()
        return np.abs((found <= grid).mean(0) - np.cumsum(exact) / exact.sum()).max()
    # Twice the bound at level 1e-4: both modes have half of the samples.
    assert distance(denoiser) < 2 * 2.23 / np.sqrt(n) < distance(replace(denoiser, network=None, known=False))


def _growing(noise, y, line=torch.linspace(-7, 7, 1401, dtype=torch.float64)):
    """Moments of two latents, one reading each, by quadrature."""
    z = torch.cartesian_prod(line, line)
    density = torch.softmax(noise.log_density(y, TILTED(z)) - z.square().sum(1) / 2, 0)
    mean = density @ z
    return mean.numpy(), ((z - mean).T * density @ (z - mean)).numpy()


def test_noise_that_grows_with_the_readings_has_its_own_density():
    noise = GaussianNoise(std=0.2, relative=0.4)
    z = torch.randn(2000, 2, generator=random(), dtype=torch.float64)
    denoiser, _ = fit_denoiser(z, TILTED(z), noise, standard_prior=True, options=QUICK, progress=False)
    assert denoiser.known and denoiser.base.emulator.head is None and denoiser.network is None
    y = TILTED(torch.tensor([[1.2, 0.4], [-0.3, 1.5]], dtype=torch.float64))
    broken = replace(denoiser, base=replace(denoiser.base, law=None, emulator=affine_emulator(
        denoiser.base.emulator.matrix, denoiser.base.emulator.offset, denoiser.base.scatter)))
    for row in y:
        truth = _growing(noise, row)
        mean, covariance = errors(denoiser.at(row[None]), truth, 20)
        # Three standard errors of 4,000 samples, of which skewness makes more in the covariance.
        assert mean < 0.07 and covariance < 0.15
        assert errors(broken.at(row[None]), truth)[0] > 0.12


def test_what_noise_shares_hides_no_curve_of_a_difference():
    drift, apart = 1.0, 1e-3
    noise = GaussianNoise(covariance=drift**2 * np.ones((2, 2)) + apart**2 * np.eye(2))
    z = torch.randn(3000, 2, generator=random(), dtype=torch.float64)

    def readings(z):
        return torch.stack([z[:, 0], z[:, 0] + 3 * apart * z[:, 1]**2], 1)
    denoiser, _ = fit_denoiser(z, readings(z), noise, standard_prior=True,
                               options=replace(QUICK, steps=1000, depth=3), progress=False)
    assert denoiser.base.emulator.head is not None and denoiser.network is not None
    y = readings(torch.tensor([[0.3, 2.0]], dtype=torch.float64))
    found = draw(denoiser.at(y), 4000, Sampler())[:, 1]
    # Modes at -2 and 2, 0.1 wide each; the base says N(0, 1), of which 0.13 is so far out.
    assert (found.abs() > 1.5).double().mean() > 0.9 and 0.3 < (found > 0).double().mean() < 0.7


def test_what_prints_is_short(fixed):
    conditioned = fixed.at(torch.zeros(3, 2).double())
    for part in (fixed, fixed.base, fixed.base.emulator, conditioned, conditioned.located, History(),
                 History([10], [1.0], [0.9], 1.0, 10)):
        text = repr(part)
        assert text.startswith(type(part).__name__) and "tensor" not in text and len(text) < 240, text


@pytest.mark.parametrize("checkpoint", [3, b"", "", 2.5])
def test_what_is_no_path_is_no_checkpoint(checkpoint, tmp_path, monkeypatch):
    """A number must not become the name of the emulator's file."""
    monkeypatch.chdir(tmp_path)
    z = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(InputError, match="checkpoint is"):
        fit_denoiser(z, torch.exp(z), 0.1, standard_prior=True, checkpoint=checkpoint, progress=False)
    assert not list(tmp_path.iterdir())
