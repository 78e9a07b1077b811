"""One model for many sensors, torch only: emulator, random layouts, base at the posterior, network under it."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fem_diffusion.comparison import moment_p_values
from fem_diffusion.reference.dense import linear_gaussian_posterior
from fem_diffusion.diffusion import (
    Denoiser, Emulator, FamilyWarning, FieldGeometry, GaussianBase, GaussianNoise, Layout, LayoutFamily, LayoutKind, Sampler,
    SensorNetwork, TrainingOptions, TrainingRange, fit_denoiser, fit_emulator, linear_base,
)
from fem_diffusion.diffusion.training.loop import Loop
from fem_diffusion.errors import InputError, FileError
from truths import draw

QUICK = TrainingOptions(steps=600, evaluate_every=100, width=32, depth=2, batch=128)
NOISE = 0.3


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _bent(z):
    """Two state coordinates of unit variance that are not affine in two latents."""
    grown = (torch.exp(0.5 * z[:, 0]) - np.exp(0.125)) / (np.exp(0.25) * (np.exp(0.25) - 1))**0.5
    return torch.stack([grown, (z[:, 1] + 0.3 * z[:, 0] * z[:, 1]) / 1.09**0.5], 1)


def _family(count=(1, 8)):
    """Sensors that look into every direction of two state coordinates."""
    turn = torch.linspace(0, torch.pi, 65, dtype=torch.float64)[:-1]
    rows = torch.stack([torch.cos(turn), torch.sin(turn)], 1)[:, None]
    std = torch.full((2, 64, 1), NOISE, dtype=torch.float64)
    return LayoutFamily((LayoutKind(rows, 0.1 * turn[:, None], std, count),))


def _quadrature(layout, y):
    """Mean and covariance of p(z | y) for the bent map, on a fine grid."""
    line = torch.linspace(-6, 6, 601, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    misfit = (y - layout.offset - _bent(z) @ layout.rows[0].T)**2 / layout.variance
    density = torch.softmax(-(z**2).sum(1) / 2 - misfit.sum(1) / 2, 0)
    mean = density @ z
    return mean.numpy(), ((z - mean).T * density @ (z - mean)).numpy()


@pytest.fixture(scope="module")
def bent():
    """A model trained on the bent map, and a layout with its measurement that training has not seen."""
    z = torch.randn(3000, 2, generator=_generator(), dtype=torch.float64)
    return fit_denoiser(z, _bent(z), _family(), standard_prior=True, options=replace(QUICK, depth=3))[0]


def _cases(seed):
    for number in range(4):
        layout = _family((2, 5)).draw(1, _generator(seed + number))
        z = torch.randn(1, 2, generator=_generator(100 + seed + number), dtype=torch.float64)
        yield layout, layout.measure(_bent(z), _generator(200 + seed + number))


def _errors(conditioned, exact, corrections=None, n=4000):
    """Errors of mean, in posterior standard deviations, and of covariance, relative, against exact moments."""
    mean, covariance = exact
    z = draw(conditioned, n, Sampler(corrections=corrections), seed=1).numpy()
    white = np.linalg.solve(np.linalg.cholesky(covariance), (z - mean).T).T
    return np.linalg.norm(white.mean(0)), np.linalg.norm(np.cov(white, rowvar=False) - np.eye(2))


def test_an_emulator_is_affine_where_the_map_is():
    z = torch.randn(200, 3, generator=_generator(), dtype=torch.float64)
    matrix, offset = torch.randn(5, 3, generator=_generator(1), dtype=torch.float64), torch.arange(5.0).double()
    emulator, _ = fit_emulator(z, z @ matrix.T + offset, torch.ones(5), options=QUICK)
    assert emulator.head is None
    torch.testing.assert_close(emulator.matrix, matrix, rtol=1e-9, atol=1e-9)
    assert float(emulator.residual.abs().max()) < 1e-18


def test_an_emulator_knows_its_error():
    z = torch.randn(3000, 2, generator=_generator(), dtype=torch.float64)
    emulator, history = fit_emulator(z, _bent(z), torch.ones(2), options=replace(QUICK, steps=1500, depth=3))
    new = torch.randn(4000, 2, generator=_generator(5), dtype=torch.float64)
    defect = (_bent(new) - emulator(new)).square().sum(1)
    assert float(defect.median()) < 1e-4 and history.base > 0.5
    # Rare latents far out carry most of the error, so the two averages agree within a factor only.
    assert 0.1 < float(emulator.residual.trace()) / float(defect.mean()) < 10


def test_layouts_follow_their_family():
    rows = torch.arange(1.0, 31.0, dtype=torch.float64).reshape(10, 3, 1)
    std = torch.stack([torch.full((10, 3), 0.1), torch.full((10, 3), 0.4)]).double()
    drawn = LayoutKind(rows, torch.zeros(10, 3, dtype=torch.float64), std, (0, 4)).draw(4000, _generator())
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
    layout = _family((4, 4)).draw(5, _generator(3))
    y = torch.randn(5, 4, generator=_generator(4), dtype=torch.float64)
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
    z = torch.randn(1000, 2, generator=_generator(), dtype=torch.float64)
    c, std = _bent(z) if bends else z @ torch.tensor([[0.8, 0.6], [0.0, 1.0]]).double(), torch.tensor([0.3, 0.2]).double()
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
    torch.testing.assert_close(one.located.misfit * one.located.std.new_tensor(1.0), one.located.misfit)
    assert (one.density is None) == (other.density is None) == (not bends)
    draws = [draw(part.select(torch.tensor([1])), 50, Sampler()) for part in (one, other)]
    torch.testing.assert_close(*draws, rtol=1e-5, atol=1e-5)
    if not bends:
        drawn = family.draw(1, _generator(8))
        order = drawn.rows[0].argmax(1)
        assert free.network is None and fixed.network is None
        for model in (free.at(y[:, order], drawn), fixed.at(y)):
            torch.testing.assert_close(model.located.mean, one.located.mean)


def test_a_linear_family_trains_nothing_and_is_exact(monkeypatch):
    monkeypatch.setattr(Loop, "run", lambda *_: pytest.fail("A network is trained."))
    matrix = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.6, 0.8]], dtype=torch.float64)
    z = torch.randn(300, 3, generator=_generator(), dtype=torch.float64)
    model, history = fit_denoiser(z, z @ matrix.T, _family(), standard_prior=True, options=QUICK)
    assert model.network is None and model.known and history.step == []
    layout = _family().draw(1, _generator(3))
    y = layout.measure(torch.ones(1, 2).double(), _generator(4))
    there = layout.present[0]
    B, noise = layout.rows[0][there], torch.diag(layout.variance[0][there])
    exact = Denoiser(linear_base(B @ matrix, noise, layout.offset[0][there])).at(y[:, there]).located
    found = draw(model.at(y, layout), 4000, Sampler(steps=1)).numpy()
    torch.testing.assert_close(model.at(y, layout).located.mean, exact.mean)
    assert min(moment_p_values(found, exact.mean[0].numpy(), exact.covariance[0].numpy())) > 1e-4


def test_order_and_padding_of_sensors_do_not_matter(bent):
    layout, y = next(_cases(0))
    k = y.shape[1]
    order = torch.randperm(k, generator=_generator())
    shuffled = Layout(layout.rows[:, order], layout.offset[:, order], layout.variance[:, order],
                      layout.present[:, order])
    padded = Layout(*(torch.cat([x, extra], 1) for x, extra in (
        (layout.rows, torch.zeros(1, 2, 2, dtype=torch.float64)), (layout.offset, torch.zeros(1, 2).double()),
        (layout.variance, torch.ones(1, 2).double()), (layout.present, torch.zeros(1, 2, dtype=torch.bool)))))
    one = bent.at(y, layout)
    for other, reading in ((shuffled, y[:, order]), (padded, torch.cat([y, y.new_zeros(1, 2)], 1))):
        found = bent.at(reading, other)
        torch.testing.assert_close(found.located.mean, one.located.mean)
        torch.testing.assert_close(found.located.factor, one.located.factor)
        for a, b in zip(found.context, one.context):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(draw(found, 20, Sampler()), draw(one, 20, Sampler()), rtol=1e-3, atol=1e-3)


def test_measurements_by_many_layouts_are_what_each_is_alone(bent):
    cases = list(_cases(7))
    # All of the cases have as many rows, with padding.
    layout = Layout(*(torch.cat([getattr(case[0], name) for case in cases]) for name in (
        "rows", "offset", "variance", "present")))
    together = bent.at(torch.cat([y for _, y in cases]), layout)
    for i, (alone, y) in enumerate(cases):
        one, part = bent.at(y, alone), together.select(torch.tensor([i]))
        torch.testing.assert_close(draw(part, 20, Sampler()), draw(one, 20, Sampler()), rtol=1e-3, atol=1e-3)
    # One layout of many measurements.
    layout, y = cases[0]
    many = bent.at(torch.cat([y + 1, y]), layout).select(torch.tensor([1]))
    torch.testing.assert_close(draw(many, 20, Sampler()), draw(bent.at(y, layout), 20, Sampler()), rtol=1e-3, atol=1e-3)


def test_no_sensors_leave_the_prior(bent):
    nothing = Layout(torch.zeros(1, 0, 2).double(), torch.zeros(1, 0).double(), torch.ones(1, 0).double(),
                     torch.ones(1, 0, dtype=torch.bool))
    conditioned = bent.at(torch.zeros(3, 0).double(), nothing)
    assert len(conditioned) == 3
    z = draw(conditioned, 4000, Sampler(), seed=1).numpy()
    assert min(moment_p_values(z, np.zeros(2), np.eye(2))) > 1e-3
    # Where latents are not known to be Gaussian the network takes part.
    free = replace(bent, known=False).at(torch.zeros(3, 0).double(), nothing)
    assert free.network is not None and draw(free, 2, Sampler()).shape == (2, 2)


def test_sensors_that_see_nothing_say_nothing(bent):
    layout, y = next(_cases(0))
    dead = Layout(torch.cat([layout.rows, torch.zeros(1, 1, 2).double()], 1),
                  torch.cat([layout.offset, torch.full((1, 1), 7.0).double()], 1),
                  torch.cat([layout.variance, torch.full((1, 1), 0.01).double()], 1),
                  torch.cat([layout.present, torch.ones(1, 1, dtype=torch.bool)], 1))
    found = bent.at(torch.cat([y, torch.full((1, 1), 7.1).double()], 1), dead).located
    torch.testing.assert_close(found.mean, bent.at(y, layout).located.mean)
    torch.testing.assert_close(found.factor, bent.at(y, layout).located.factor)


def test_posteriors_of_unseen_layouts_are_those_of_quadrature(bent):
    exact = [_quadrature(layout, y[0]) for layout, y in _cases(0)]

    def errors(model):
        return np.array([_errors(model.at(y, layout), truth) for (layout, y), truth in zip(_cases(0), exact)])
    found = errors(bent)
    # 4,000 samples miss mean and covariance by 0.02 and 0.04; the rest is the emulator's.
    assert found[:, 0].max() < 0.2 and found[:, 1].max() < 0.2
    # The base alone is another law, and the joint Gaussian of latents and measurement is further away.
    plain, joint = (errors(Denoiser(base)) for base in (bent.base, replace(bent.base, updates=1)))
    assert plain[:, 0].max() > 0.25 and joint[:, 1].max() > 2
    # Corrections alone find the emulator's posterior from the base, and broken ones do not.
    corrected = errors(Denoiser(bent.base, known=True))
    assert corrected[:, 0].max() < 0.3


def test_the_density_of_the_emulator_has_its_gradient_and_keeps_its_law(bent):
    layout, y = next(_cases(3))
    density = bent.at(y, layout).density
    w, way = (torch.randn(50, 1, 2, generator=_generator(seed), dtype=torch.float64) for seed in (0, 1))
    slope = (density.energy(w + 1e-3 * way) - density.energy(w - 1e-3 * way)) / 2e-3
    torch.testing.assert_close(slope, (density.force(w) * way).sum(2), rtol=0.02, atol=0.02)
    # Samples drawn on a grid of the emulator's own density stay what they are.
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    weights = torch.softmax(-density.energy(grid[:, None])[:, 0], 0)
    mean = weights @ grid
    covariance = (grid - mean).T * weights @ (grid - mean)
    start = grid[torch.multinomial(weights, 4000, replacement=True, generator=_generator(2))][:, None]
    moved, accepted = density.move(start, _generator(3))
    assert accepted.double().mean() > 0.5 and (moved != start).any()
    white = np.linalg.solve(np.linalg.cholesky(covariance.numpy()), (moved[:, 0] - mean).numpy().T).T
    # Five standard errors of means, and of variances of a law with tails twice as heavy as a normal's.
    assert np.abs(white.mean(0)).max() < 5 / 4000**0.5
    assert np.abs(np.cov(white, rowvar=False) - np.eye(2)).max() < 5 * (5 / 4000)**0.5


MODES, SPREAD = torch.tensor([[-1.2, 0.0], [1.2, 0.0]], dtype=torch.float64), torch.tensor([0.4, 1.0]).double()


def _two_modes(n, seed):
    """Latents of a prior with two modes."""
    which = torch.randint(2, (n,), generator=_generator(seed))
    return MODES[which] + SPREAD * torch.randn(n, 2, generator=_generator(seed + 1), dtype=torch.float64)


def _mixture(layout, y):
    """Exact moments of the posterior under the prior with two modes, for the identity as forward map."""
    B, prior = layout.rows[0], torch.diag(SPREAD**2)
    S = B @ prior @ B.T + torch.diag(layout.variance[0])
    misfit = y - layout.offset - MODES @ B.T
    solved = torch.linalg.solve(S, misfit.T).T
    share = torch.softmax(-(misfit * solved).sum(1) / 2, 0)
    means = MODES + solved @ B @ prior
    mean = share @ means
    each = prior - prior @ B.T @ torch.linalg.solve(S, B @ prior)
    return mean.numpy(), (each + (means - mean).T * share @ (means - mean)).numpy()


def test_the_network_learns_what_the_base_cannot_know():
    z = _two_modes(8000, 0)
    model, history = fit_denoiser(z, z, _family(), options=QUICK)
    layout, y = next(_cases(0))
    assert history.best_step and model.base.emulator.head is None and model.at(y, layout).density is None
    assert abs(history.spread_ratio - 1) < 0.2 and abs(history.neighbour_ratio - 1) < 0.2
    found, plain = [], []
    for number in range(8):
        layout = _family((1, 3)).draw(1, _generator(number))
        y = layout.measure(_two_modes(1, 50 + number), _generator(number))
        exact = _mixture(layout, y[0])
        found.append(_errors(model.at(y, layout), exact))
        plain.append(_errors(Denoiser(model.base).at(y, layout), exact))
    found, plain = np.array(found), np.array(plain)
    assert (found.mean(0) < 0.25).all() and found.max() < 0.6
    assert (plain.mean(0) > 0.4).all()


def test_training_of_a_family_resumes_and_refuses_foreign_checkpoints(tmp_path, monkeypatch):
    z = torch.randn(600, 2, generator=_generator(), dtype=torch.float64)
    few = replace(QUICK, steps=60, evaluate_every=20)

    def train(family=_family(), **settings):
        return fit_denoiser(z, _bent(z), family, options=few, **settings)[1]
    history = train()
    save, calls = Loop._save, []

    def interrupted(self):
        save(self)
        calls.append(self.task.name)
        # The first evaluation of the sensor network, after all of the emulator's.
        if calls[-1] == "train":
            raise KeyboardInterrupt
    monkeypatch.setattr(Loop, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=tmp_path / "state")
    monkeypatch.setattr(Loop, "_save", save)
    other = train(checkpoint=tmp_path / "state")
    np.testing.assert_allclose(history.validation, other.validation, rtol=1e-5)
    assert len(history.validation) == 3
    with pytest.raises(FileError, match="other data"):
        train(_family((1, 3)), checkpoint=tmp_path / "state")


def _in_units(unit, shift=0.0):
    """The law whose sensors read in these units (64,), from the shift on."""
    pool = _family().kinds[0]
    return LayoutFamily((LayoutKind(pool.rows * unit[:, None, None], (pool.offset + shift) * unit[:, None],
                                 pool.std * unit[:, None], pool.count),))


def _units(n=64):
    return torch.logspace(-8, 8, n, dtype=torch.float64)[torch.randperm(n, generator=_generator(9))]


def test_the_exact_posterior_of_any_sensors_knows_no_units():
    latents, matrix = torch.tensor([1e8, 1.0, 1e-8]).double(), torch.tensor([[1., 0.5, 0], [0, 1, -1]]).double()
    base = GaussianBase(torch.zeros(3).double(), torch.diag(latents), _affine(matrix / latents))
    unit = torch.tensor([1e8, 1e-8, 1e3, 1e-25]).double()
    plain = _family((4, 4)).draw(1, _generator(3))
    layout = Layout(plain.rows * unit[:, None], plain.offset * unit, plain.variance * unit**2, plain.present)
    y, B = torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=torch.float64), plain.rows[0].numpy()
    noise = np.diag(plain.variance[0]) + 0.01 * B @ B.T
    mean, covariance = linear_gaussian_posterior(B @ matrix.numpy(), np.eye(3), noise, (y - plain.offset[0]).numpy())
    found = Denoiser(base).at((y * unit)[None], layout).located
    np.testing.assert_allclose((found.mean[0] / latents).numpy(), mean, rtol=1e-8)
    np.testing.assert_allclose((found.covariance[0] / torch.outer(latents, latents)).numpy(), covariance, rtol=1e-8)


def _rooted():
    """Latents that are not Gaussian."""
    w = torch.randn(800, 2, generator=_generator(), dtype=torch.float64)
    return torch.sign(w) * w.abs()**0.5


FEW = replace(QUICK, steps=160, evaluate_every=80)


@pytest.fixture(scope="module")
def rooted():
    return fit_denoiser(_rooted(), _bent(_rooted()), _family(), options=FEW)


@pytest.mark.parametrize("unit, shift, latents", [
    (_units(), 0.0, (1.0, 1.0)), (_units()**3, 0.0, (1.0, 1.0)), (torch.ones(64).double(), 1e7, (1.0, 1.0)),
    (torch.ones(64).double(), 0.0, (1e-8, 1e8)),
], ids=["sensors", "sensors that single precision cannot hold", "readings about a large mean", "latents"])
def test_training_knows_no_units(rooted, unit, shift, latents):
    (one, history), z, scale = rooted, _rooted(), torch.tensor(latents, dtype=torch.float64)
    # Latents at a hundred standard deviations from zero, where single precision would blur them.
    move = 0.0 if latents == (1.0, 1.0) else 100.0
    other, found = fit_denoiser((z + move) * scale, _bent(z), _in_units(unit, shift), options=FEW)
    assert one.base.emulator.head is not None and one.network is not None
    np.testing.assert_allclose([found.base, *found.validation], [history.base, *history.validation], rtol=1e-4)
    layout, y = next(_cases(0))
    rows = layout.rows[0] @ _family().kinds[0].rows[:, 0].T
    own = unit[rows.argmax(1)]
    same = Layout(layout.rows * own[:, None], (layout.offset + shift) * own, layout.variance * own**2,
                   layout.present)
    readings = torch.where(layout.present, (y + shift * layout.present) * own, 0.0)
    draws = [draw(model.at(*case), 200, Sampler()) for model, case in ((one, (y, layout)), (other, (readings, same)))]
    torch.testing.assert_close(draws[1] / scale - move, draws[0], rtol=1e-3, atol=1e-3)


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
    ({"y": torch.tensor([[0.0, np.nan]])}, r"sensors \[1\]"), ({"y": torch.zeros(1, 3)}, r"give \(1, k, 2\)|give \(B, 3, 2\)"),
    ({"y": torch.tensor([[1e200, 0.0]]).double()}, "beyond"), ({"y": torch.zeros(1, 2) * 1j}, "imaginary"),
    ({"y": torch.tensor([[0.0, 1e30]])}, r"sensors \[1\] are more than 1e\+12"), ({"y": [[0.0, 0.0]]}, "torch.as_tensor"),
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
    (lambda z: fit_denoiser(z, z * torch.nan, _family()), "finite"),
    (lambda z: fit_denoiser(z[:, :1], z * torch.nan, _family()), "finite"),
    (lambda z: _family((0, 65)), "cannot be drawn"),
    (lambda z: _family((3, 2)), "cannot be drawn"), (lambda z: _family((1.0, 2)), "count is 1.0"),
    (lambda z: _family(3), "count is 3"), (lambda z: LayoutFamily(()), "at least one kind"),
    (lambda z: LayoutFamily((z,)), "kinds holds Tensor"), (lambda z: LayoutFamily(3), "kinds is 3"),
    (lambda z: LayoutKind(z, z, z, (1, 2)), r"give \(K, g, s\)"),
    (lambda z: replace(_family().kinds[0], std=-_family().kinds[0].std), "std must be positive"),
    (lambda z: fit_emulator(z, z, torch.zeros(2)), "noise .* must be positive"),
    (lambda z: fit_emulator(z, z, torch.ones(3)), r"give \(2,\)"),
    (lambda z: fit_emulator(z, z * 1j, torch.ones(2)), "imaginary"),
    (lambda z: fit_emulator(z, z, torch.ones(2), options={}), r"TrainingOptions\(\*\*options\)"),
    (lambda z: fit_emulator(z.numpy(), z, torch.ones(2)), "torch.as_tensor"),
    (lambda z: fit_denoiser(z, z[:, :1], _family()), "see 2 state coordinates"),
    (lambda z: fit_denoiser(z, z, _family(), standard_prior=None), "standard_prior is None"),
    (lambda z: fit_denoiser(z @ torch.ones(2, 2).double(), z, _family()), "depend linearly"),
    (lambda z: fit_denoiser(z, z, _family(), geometry=FieldGeometry(*6 * (z,))), "fixed sensors"),
    (lambda z: Denoiser(None), "base is of type"), (lambda z: Emulator(2.0, 2), "r is 2.0"),
    (lambda z: Denoiser(linear_base(z.T @ z, z.T @ z)).at(z, z), "layout is of type Tensor"),
    (lambda z: SensorNetwork(2, 2, tokens=63), "multiple of 4"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.randn(50, 2, generator=_generator(), dtype=torch.float64))
