"""One model for many sensors: posteriors of layouts that training has not seen, whatever their order and units."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import Denoiser, Layout, LayoutFamily, LayoutKind, Sampler, TrainingOptions, fit_denoiser
from fem_diffusion.diffusion.training.loop import Loop
from fem_diffusion.errors import FileError
from truths import bent_map, draw, errors, quadrature, random, turned_family

QUICK = TrainingOptions(steps=600, evaluate_every=100, width=32, depth=2, batch=128)


@pytest.fixture(scope="module")
def bent():
    """A model trained on the bent map, and a layout with its measurement that training has not seen."""
    z = torch.randn(3000, 2, generator=random(), dtype=torch.float64)
    return fit_denoiser(z, bent_map(z), turned_family(), standard_prior=True, options=replace(QUICK, depth=3))[0]


def _rooted():
    """Latents that are not Gaussian."""
    w = torch.randn(800, 2, generator=random(), dtype=torch.float64)
    return torch.sign(w) * w.abs()**0.5


FEW = replace(QUICK, steps=160, evaluate_every=80)


@pytest.fixture(scope="module")
def rooted():
    return fit_denoiser(_rooted(), bent_map(_rooted()), turned_family(), options=FEW)


@pytest.fixture(params=["bent", "rooted"])
def model(request):
    """A model under whose base there is no network, and one with a network."""
    found = request.getfixturevalue(request.param)
    return found if request.param == "bent" else found[0]


def _cases(seed):
    for number in range(4):
        layout = turned_family((2, 5)).draw(1, random(seed + number))
        z = torch.randn(1, 2, generator=random(100 + seed + number), dtype=torch.float64)
        yield layout, layout.measure(bent_map(z), random(200 + seed + number))


def test_order_and_padding_of_sensors_do_not_matter(model):
    layout, y = next(_cases(0))
    k = y.shape[1]
    order = torch.randperm(k, generator=random())
    shuffled = Layout(layout.rows[:, order], layout.offset[:, order], layout.variance[:, order],
                      layout.present[:, order])
    padded = Layout(*(torch.cat([x, extra], 1) for x, extra in (
        (layout.rows, torch.zeros(1, 2, 2, dtype=torch.float64)), (layout.offset, torch.zeros(1, 2).double()),
        (layout.variance, torch.ones(1, 2).double()), (layout.present, torch.zeros(1, 2, dtype=torch.bool)))))
    one = model.at(y, layout)
    for other, reading in ((shuffled, y[:, order]), (padded, torch.cat([y, y.new_zeros(1, 2)], 1))):
        found = model.at(reading, other)
        torch.testing.assert_close(found.located.mean, one.located.mean)
        torch.testing.assert_close(found.located.factor, one.located.factor)
        for a, b in zip(found.context, one.context):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(draw(found, 20, Sampler()), draw(one, 20, Sampler()), rtol=1e-3, atol=1e-3)


def test_measurements_by_many_layouts_are_what_each_is_alone(model):
    cases = list(_cases(7))
    # All of the cases have as many rows, with padding.
    layout = Layout(*(torch.cat([getattr(case[0], name) for case in cases]) for name in (
        "rows", "offset", "variance", "present")))
    together = model.at(torch.cat([y for _, y in cases]), layout)
    for i, (alone, y) in enumerate(cases):
        one, part = model.at(y, alone), together.select(torch.tensor([i]))
        torch.testing.assert_close(draw(part, 20, Sampler()), draw(one, 20, Sampler()), rtol=1e-3, atol=1e-3)
    # One layout of many measurements.
    layout, y = cases[0]
    many = model.at(torch.cat([y + 1, y]), layout).select(torch.tensor([1]))
    one = model.at(y, layout)
    torch.testing.assert_close(draw(many, 20, Sampler()), draw(one, 20, Sampler()), rtol=1e-3, atol=1e-3)


def test_no_sensors_leave_the_prior(bent, rooted):
    nothing = Layout(torch.zeros(1, 0, 2).double(), torch.zeros(1, 0).double(), torch.ones(1, 0).double(),
                     torch.ones(1, 0, dtype=torch.bool))
    conditioned = bent.at(torch.zeros(3, 0).double(), nothing)
    assert len(conditioned) == 3
    z = draw(conditioned, 4000, Sampler(), seed=1).numpy()
    assert min(moment_p_values(z, np.zeros(2), np.eye(2))) > 1e-3
    # Where latents are not known to be Gaussian the network takes part.
    free = rooted[0].at(torch.zeros(3, 0).double(), nothing)
    assert free.network is not None and torch.isfinite(draw(free, 20, Sampler())).all()


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
    exact = [quadrature(layout, y[0]) for layout, y in _cases(0)]

    def all_errors(model):
        return np.array([errors(model.at(y, layout), truth) for (layout, y), truth in zip(_cases(0), exact)])
    assert bent.network is None   # moves from the base find these posteriors
    found = all_errors(bent)
    # 4,000 samples miss mean and covariance by 0.02 and 0.04; the rest is the emulator's.
    assert found[:, 0].max() < 0.2 and found[:, 1].max() < 0.2
    # The base alone is another law, and the joint Gaussian of latents and measurement is further away.
    plain, joint = (all_errors(Denoiser(base)) for base in (bent.base, replace(bent.base, updates=1)))
    assert plain[:, 0].max() > 0.25 and joint[:, 1].max() > 2


def test_the_density_of_the_emulator_has_its_gradient_and_keeps_its_law(bent):
    layout, y = next(_cases(3))
    density = bent.at(y, layout).density
    w, way = (torch.randn(50, 1, 2, generator=random(seed), dtype=torch.float64) for seed in (0, 1))
    slope = (density.energy(w + 1e-3 * way) - density.energy(w - 1e-3 * way)) / 2e-3
    torch.testing.assert_close(slope, (density.force(w) * way).sum(2), rtol=0.02, atol=0.02)
    # Samples drawn on a grid of the emulator's own density stay what they are.
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    weights = torch.softmax(-density.energy(grid[:, None])[:, 0], 0)
    mean = weights @ grid
    covariance = (grid - mean).T * weights @ (grid - mean)
    start = grid[torch.multinomial(weights, 4000, replacement=True, generator=random(2))][:, None]
    moved, accepted = density.move(start, random(3))
    assert accepted.double().mean() > 0.5 and (moved != start).any()
    white = np.linalg.solve(np.linalg.cholesky(covariance.numpy()), (moved[:, 0] - mean).numpy().T).T
    # Five standard errors of means, and of variances of a law with tails twice as heavy as a normal's.
    assert np.abs(white.mean(0)).max() < 5 / 4000**0.5
    assert np.abs(np.cov(white, rowvar=False) - np.eye(2)).max() < 5 * (5 / 4000)**0.5


MODES, SPREAD = torch.tensor([[-1.2, 0.0], [1.2, 0.0]], dtype=torch.float64), torch.tensor([0.4, 1.0]).double()


def _two_modes(n, seed):
    """Latents of a prior with two modes."""
    which = torch.randint(2, (n,), generator=random(seed))
    return MODES[which] + SPREAD * torch.randn(n, 2, generator=random(seed + 1), dtype=torch.float64)


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
    model, history = fit_denoiser(z, z, turned_family(), options=QUICK)
    layout, y = next(_cases(0))
    assert history.best_step and model.base.emulator.head is None and model.at(y, layout).density is None
    assert abs(history.spread_ratio - 1) < 0.2 and abs(history.neighbour_ratio - 1) < 0.2
    found, plain = [], []
    for number in range(8):
        layout = turned_family((1, 3)).draw(1, random(number))
        y = layout.measure(_two_modes(1, 50 + number), random(number))
        exact = _mixture(layout, y[0])
        found.append(errors(model.at(y, layout), exact))
        plain.append(errors(Denoiser(model.base).at(y, layout), exact))
    found, plain = np.array(found), np.array(plain)
    assert (found.mean(0) < 0.25).all() and found.max() < 0.6
    assert (plain.mean(0) > 0.4).all()


def test_training_of_a_family_resumes_and_refuses_foreign_checkpoints(tmp_path, monkeypatch):
    z = torch.randn(600, 2, generator=random(), dtype=torch.float64)
    few = replace(QUICK, steps=60, evaluate_every=20)

    def train(family=turned_family(), **settings):
        return fit_denoiser(z, bent_map(z), family, options=few, **settings)[1]
    history = train()
    save, calls = Loop._save, []

    def interrupted(self, path):
        save(self, path)
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
        train(turned_family((1, 3)), checkpoint=tmp_path / "state")


def _in_units(unit, shift=0.0):
    """The law whose sensors read in these units (64,), from the shift on."""
    kind = turned_family().kinds[0]
    return LayoutFamily((LayoutKind(kind.rows * unit[:, None, None], (kind.offset + shift) * unit[:, None],
                                    kind.std * unit[:, None], kind.count),))


def _units(n=64):
    return torch.logspace(-8, 8, n, dtype=torch.float64)[torch.randperm(n, generator=random(9))]


@pytest.mark.parametrize("unit, shift, latents", [
    (_units(), 0.0, (1.0, 1.0)), (_units()**3, 0.0, (1.0, 1.0)), (torch.ones(64).double(), 1e7, (1.0, 1.0)),
    (torch.ones(64).double(), 0.0, (1e-8, 1e8)),
], ids=["sensors", "sensors that single precision cannot hold", "readings about a large mean", "latents"])
def test_training_knows_no_units(rooted, unit, shift, latents):
    (one, history), z, scale = rooted, _rooted(), torch.tensor(latents, dtype=torch.float64)
    # Latents at a hundred standard deviations from zero, where single precision would blur them.
    move = 0.0 if latents == (1.0, 1.0) else 100.0
    other, found = fit_denoiser((z + move) * scale, bent_map(z), _in_units(unit, shift), options=FEW)
    assert one.base.emulator.head is not None and one.network is not None
    np.testing.assert_allclose([found.base, *found.validation], [history.base, *history.validation], rtol=1e-4)
    layout, y = next(_cases(0))
    rows = layout.rows[0] @ turned_family().kinds[0].rows[:, 0].T
    own = unit[rows.argmax(1)]
    same = Layout(layout.rows * own[:, None], (layout.offset + shift) * own, layout.variance * own**2, layout.present)
    readings = torch.where(layout.present, (y + shift * layout.present) * own, 0.0)
    draws = [draw(model.at(*case), 200, Sampler()) for model, case in ((one, (y, layout)), (other, (readings, same)))]
    torch.testing.assert_close(draws[1] / scale - move, draws[0], rtol=1e-3, atol=1e-3)
