"""One model for many sensors, torch only: emulator, random layouts, base at the posterior, network under it."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from fem_diffusion.comparison import moment_p_values
from fem_diffusion.reference.dense import linear_gaussian_posterior
from fem_diffusion.diffusion import _loop
from fem_diffusion.diffusion import (
    Denoiser, Emulator, FamilyWarning, LayoutLaw, OperatorBase, OperatorDenoiser, Seen, SensorNetwork, SensorPool,
    Sensors, TrainingOptions, fit_emulator, fit_operators, linear_base, sample_latents,
)
from fem_diffusion.errors import InputError, FileError

QUICK = TrainingOptions(steps=600, evaluate_every=100, width=32, depth=2, batch=128)
NOISE = 0.3


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _bent(z):
    """Two state coordinates of unit variance that are not affine in two latents."""
    grown = (torch.exp(0.5 * z[:, 0]) - np.exp(0.125)) / (np.exp(0.25) * (np.exp(0.25) - 1))**0.5
    return torch.stack([grown, (z[:, 1] + 0.3 * z[:, 0] * z[:, 1]) / 1.09**0.5], 1)


def _law(count=(1, 8)):
    """Sensors that look into every direction of two state coordinates."""
    turn = torch.linspace(0, torch.pi, 65, dtype=torch.float64)[:-1]
    rows = torch.stack([torch.cos(turn), torch.sin(turn)], 1)[:, None]
    std = torch.full((2, 64, 1), NOISE, dtype=torch.float64)
    return LayoutLaw((SensorPool(rows, 0.1 * turn[:, None], std, count),))


def _quadrature(sensors, y):
    """Mean and covariance of p(z | y) for the bent map, on a fine grid."""
    line = torch.linspace(-6, 6, 601, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    misfit = (y - sensors.offset - _bent(z) @ sensors.rows[0].T)**2 / sensors.variance
    density = torch.softmax(-(z**2).sum(1) / 2 - misfit.sum(1) / 2, 0)
    mean = density @ z
    return mean.numpy(), ((z - mean).T * density @ (z - mean)).numpy()


@pytest.fixture(scope="module")
def bent():
    """A model trained on the bent map, and a layout with its measurement that training has not seen."""
    z = torch.randn(3000, 2, generator=_generator(), dtype=torch.float64)
    return fit_operators(z, _bent(z), torch.ones(2, dtype=torch.float64), _law(), standard_prior=True, options=QUICK)


def _cases(seed):
    for number in range(4):
        sensors = _law((2, 5)).draw(1, _generator(seed + number))
        z = torch.randn(1, 2, generator=_generator(100 + seed + number), dtype=torch.float64)
        yield sensors, sensors.measure(_bent(z), _generator(200 + seed + number))[0]


def _errors(denoiser, sensors, y, exact, corrections=None, n=4000):
    """Errors of mean, in posterior standard deviations, and of covariance, relative, against exact moments."""
    mean, covariance = exact
    z = sample_latents(denoiser, y.expand(n, -1), generator=_generator(1), corrections=corrections).numpy()
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
    emulator, history = fit_emulator(z, _bent(z), torch.ones(2), options=replace(QUICK, steps=1500))
    new = torch.randn(4000, 2, generator=_generator(5), dtype=torch.float64)
    defect = (_bent(new) - emulator(new)).square().sum(1)
    assert float(defect.median()) < 1e-4 and history.base > 0.5
    # Rare latents far out carry most of the error, so the two averages agree within a factor only.
    assert 0.1 < float(emulator.residual.trace()) / float(defect.mean()) < 10


def test_layouts_follow_their_law():
    rows = torch.arange(1.0, 31.0, dtype=torch.float64).reshape(10, 3, 1)
    std = torch.stack([torch.full((10, 3), 0.1), torch.full((10, 3), 0.4)]).double()
    drawn = SensorPool(rows, torch.zeros(10, 3, dtype=torch.float64), std, (0, 4)).draw(4000, _generator())
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


def test_the_base_of_an_affine_map_is_the_exact_posterior():
    emulator = Emulator(3, 2, depth=0)
    emulator.matrix, emulator.offset = torch.tensor([[1., 0.5, 0], [0, 1, -1]]).double(), torch.ones(2).double()
    emulator.residual = 0.01 * torch.eye(2, dtype=torch.float64)
    base = OperatorBase(torch.zeros(3).double(), torch.eye(3).double(), emulator)
    sensors = _law((4, 4)).draw(1, _generator(3))
    y = torch.tensor([[0.3, -0.2, 0.5, 1.0]], dtype=torch.float64)
    located = base.locate(sensors, y)
    B = sensors.rows[0]
    noise = torch.diag(sensors.variance[0]) + B @ emulator.residual @ B.T
    exact = linear_base(B @ emulator.matrix, noise, sensors.offset[0] + B @ emulator.offset)
    torch.testing.assert_close(located.mean, exact.mean(y))
    torch.testing.assert_close(located.factor[0] @ located.factor[0].T, exact.covariance)


def test_order_and_padding_of_sensors_do_not_matter(bent):
    model, _ = bent
    sensors, y = next(_cases(0))
    k = len(y)
    order = torch.randperm(k, generator=_generator())
    shuffled = Sensors(sensors.rows[:, order], sensors.offset[:, order], sensors.variance[:, order], sensors.present)
    padded = Sensors(*(torch.cat([x, extra], 1) for x, extra in (
        (sensors.rows, torch.zeros(1, 2, 2, dtype=torch.float64)), (sensors.offset, torch.zeros(1, 2).double()),
        (sensors.variance, torch.ones(1, 2).double()), (sensors.present, torch.zeros(1, 2, dtype=torch.bool)))))
    base = model.base.locate(sensors, y[None])
    network = model.network.context(sensors, base, y[None])
    for other, reading in ((shuffled, y[order]), (padded, torch.cat([y, y.new_zeros(2)]))):
        located = model.base.locate(other, reading[None])
        torch.testing.assert_close(located.mean, base.mean)
        torch.testing.assert_close(located.factor, base.factor)
        torch.testing.assert_close(model.network.context(other, located, reading[None]), network, rtol=1e-4, atol=1e-5)


def test_no_sensors_leave_the_prior(bent):
    model, _ = bent
    nothing = Sensors(torch.zeros(1, 0, 2).double(), torch.zeros(1, 0).double(), torch.ones(1, 0).double(),
                      torch.ones(1, 0, dtype=torch.bool))
    denoiser = model.at(nothing, torch.zeros(0).double())
    z = sample_latents(denoiser, torch.zeros(4000, 0).double(), generator=_generator()).numpy()
    assert min(moment_p_values(z, np.zeros(2), np.eye(2))) > 1e-3


def test_posteriors_of_unseen_layouts_are_those_of_quadrature(bent):
    model, _ = bent
    exact = [_quadrature(*case) for case in _cases(0)]
    found = np.array([_errors(model.at(*case), *case, truth) for case, truth in zip(_cases(0), exact)])
    # 4,000 samples miss mean and covariance by 0.02 and 0.04; the rest is the emulator's.
    assert found[:, 0].max() < 0.2 and found[:, 1].max() < 0.2
    # The base alone is another law, and the joint Gaussian of latents and measurement is further away.
    plain, joint = (np.array([_errors(Denoiser(OperatorDenoiser(base, None).at(*case).base, None), *case, truth)
                              for case, truth in zip(_cases(0), exact)])
                    for base in (model.base, replace(model.base, updates=1)))
    assert plain[:, 0].max() > 0.25 and joint[:, 1].max() > 2


def test_the_density_of_the_emulator_has_its_gradient_and_keeps_its_law(bent):
    model, _ = bent
    sensors, y = next(_cases(3))
    density = model.at(sensors, y).surrogate
    w, way = (torch.randn(1, 50, 2, generator=_generator(seed), dtype=torch.float64) for seed in (0, 1))
    slope = (density.energy(w + 1e-3 * way)[0] - density.energy(w - 1e-3 * way)[0]) / 2e-3
    torch.testing.assert_close(slope, (density.energy(w)[1] * way).sum(2), rtol=0.02, atol=0.02)
    # Samples drawn on a grid of the emulator's own density stay what they are.
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    weights = torch.softmax(-density.energy(grid[None])[0][0], 0)
    mean = weights @ grid
    covariance = (grid - mean).T * weights @ (grid - mean)
    start = grid[torch.multinomial(weights, 4000, replacement=True, generator=_generator(2))][None]
    moved, accepted = density.move(start, _generator(3))
    assert accepted.double().mean() > 0.5 and (moved != start).any()
    white = np.linalg.solve(np.linalg.cholesky(covariance.numpy()), (moved[0] - mean).numpy().T).T
    # Five standard errors of means, and of variances of a law with tails twice as heavy as a normal's.
    assert np.abs(white.mean(0)).max() < 5 / 4000**0.5
    assert np.abs(np.cov(white, rowvar=False) - np.eye(2)).max() < 5 * (5 / 4000)**0.5


MODES, SPREAD = torch.tensor([[-1.2, 0.0], [1.2, 0.0]], dtype=torch.float64), torch.tensor([0.4, 1.0]).double()


def _two_modes(n, seed):
    """Latents of a prior with two modes."""
    which = torch.randint(2, (n,), generator=_generator(seed))
    return MODES[which] + SPREAD * torch.randn(n, 2, generator=_generator(seed + 1), dtype=torch.float64)


def _mixture(sensors, y):
    """Exact moments of the posterior under the prior with two modes, for the identity as forward map."""
    B, prior = sensors.rows[0], torch.diag(SPREAD**2)
    S = B @ prior @ B.T + torch.diag(sensors.variance[0])
    misfit = y - sensors.offset - MODES @ B.T
    solved = torch.linalg.solve(S, misfit.T).T
    share = torch.softmax(-(misfit * solved).sum(1) / 2, 0)
    means = MODES + solved @ B @ prior
    mean = share @ means
    each = prior - prior @ B.T @ torch.linalg.solve(S, B @ prior)
    return mean.numpy(), (each + (means - mean).T * share @ (means - mean)).numpy()


def test_the_network_learns_what_the_base_cannot_know():
    z = _two_modes(8000, 0)
    model, history = fit_operators(z, z, torch.ones(2).double(), _law(), options=QUICK)
    assert history.best_step and model.base.emulator.head is None and model.at(*next(_cases(0))).surrogate is None
    found, plain = [], []
    for number in range(8):
        sensors = _law((1, 3)).draw(1, _generator(number))
        y = sensors.measure(_two_modes(1, 50 + number), _generator(number))[0]
        exact, denoiser = _mixture(sensors, y), model.at(sensors, y)
        found.append(_errors(denoiser, sensors, y, exact))
        plain.append(_errors(Denoiser(denoiser.base, None), sensors, y, exact))
    found, plain = np.array(found), np.array(plain)
    assert (found.mean(0) < 0.25).all() and found.max() < 0.6
    assert (plain.mean(0) > 0.4).all()


def test_training_of_many_operators_resumes_and_refuses_foreign_checkpoints(tmp_path, monkeypatch):
    z = torch.randn(600, 2, generator=_generator(), dtype=torch.float64)
    arguments = (z, _bent(z), torch.ones(2).double())
    few = replace(QUICK, steps=60, evaluate_every=20)
    _, history = fit_operators(*arguments, _law(), options=few)
    save, calls = _loop.Loop._save, []

    def interrupted(self):
        save(self)
        calls.append(self.task.name)
        # The first evaluation of the sensor network, after all of the emulator's.
        if calls[-1] == "train":
            raise KeyboardInterrupt
    monkeypatch.setattr(_loop.Loop, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_operators(*arguments, _law(), options=few, checkpoint=tmp_path / "state")
    monkeypatch.setattr(_loop.Loop, "_save", save)
    _, other = fit_operators(*arguments, _law(), options=few, checkpoint=tmp_path / "state")
    np.testing.assert_allclose(history.validation, other.validation, rtol=1e-5)
    assert len(history.validation) == 3
    with pytest.raises(FileError, match="other data"):
        fit_operators(*arguments, _law((1, 3)), options=few, checkpoint=tmp_path / "state")


def _in_units(unit, shift=0.0):
    """The law whose sensors read in these units (64,), from the shift on."""
    pool = _law().pools[0]
    return LayoutLaw((SensorPool(pool.rows * unit[:, None, None], (pool.offset + shift) * unit[:, None],
                                 pool.std * unit[:, None], pool.count),))


def _units(n=64):
    return torch.logspace(-8, 8, n, dtype=torch.float64)[torch.randperm(n, generator=_generator(9))]


def test_the_exact_posterior_of_any_sensors_knows_no_units():
    emulator = Emulator(3, 2, depth=0)
    latents, matrix = torch.tensor([1e8, 1.0, 1e-8]).double(), torch.tensor([[1., 0.5, 0], [0, 1, -1]]).double()
    emulator.matrix, emulator.residual = matrix / latents, 0.01 * torch.eye(2, dtype=torch.float64)
    base = OperatorBase(torch.zeros(3).double(), torch.diag(latents), emulator)
    unit = torch.tensor([1e8, 1e-8, 1e3, 1e-25]).double()
    plain = _law((4, 4)).draw(1, _generator(3))
    sensors = Sensors(plain.rows * unit[:, None], plain.offset * unit, plain.variance * unit**2, plain.present)
    y, B = torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=torch.float64), plain.rows[0].numpy()
    noise = np.diag(plain.variance[0]) + 0.01 * B @ B.T
    mean, covariance = linear_gaussian_posterior(B @ matrix.numpy(), np.eye(3), noise, (y - plain.offset[0]).numpy())
    found = OperatorDenoiser(base, None).at(sensors, y * unit).base
    np.testing.assert_allclose((found.latent_mean / latents).numpy(), mean, rtol=1e-8)
    np.testing.assert_allclose((found.covariance / torch.outer(latents, latents)).numpy(), covariance, rtol=1e-8)


@pytest.mark.parametrize("unit, shift, latents", [
    (_units(), 0.0, (1.0, 1.0)), (_units()**3, 0.0, (1.0, 1.0)), (torch.ones(64).double(), 1e7, (1.0, 1.0)),
    (torch.ones(64).double(), 0.0, (1e-8, 1e8)),
], ids=["sensors", "sensors that single precision cannot hold", "readings about a large mean", "latents"])
def test_training_knows_no_units(unit, shift, latents):
    w = torch.randn(800, 2, generator=_generator(), dtype=torch.float64)
    z, scale = torch.sign(w) * w.abs()**0.5, torch.tensor(latents, dtype=torch.float64)
    few = replace(QUICK, steps=60, evaluate_every=30)
    # Latents at a hundred standard deviations from zero, where single precision would blur them.
    move = 0.0 if latents == (1.0, 1.0) else 100.0
    one, history = fit_operators(z, _bent(z), torch.ones(2).double(), _law(), options=few)
    other, found = fit_operators((z + move) * scale, _bent(z), torch.ones(2).double(), _in_units(unit, shift),
                                 options=few)
    assert one.base.emulator.head is not None and one.network is not None
    np.testing.assert_allclose([found.base, *found.validation], [history.base, *history.validation], rtol=1e-4)
    sensors, y = next(_cases(0))
    rows = sensors.rows[0] @ _law().pools[0].rows[:, 0].T
    own = unit[rows.argmax(1)]
    same = Sensors(sensors.rows * own[:, None], (sensors.offset + shift) * own, sensors.variance * own**2,
                   sensors.present)
    readings = torch.where(sensors.present[0], (y + shift * sensors.present[0]) * own, 0.0)
    draws = [sample_latents(model.at(*case), case[1].expand(200, -1), generator=_generator(1))
             for model, case in ((one, (sensors, y)), (other, (same, readings)))]
    torch.testing.assert_close(draws[1] / scale - move, draws[0], rtol=1e-3, atol=1e-3)


def test_a_law_of_unlike_units_is_known_in_all_of_them():
    rows = torch.tensor([[1.0, 0.0], [1e-17, 0.0]], dtype=torch.float64)[:, None]
    pools = [SensorPool(unit * rows, torch.zeros(2, 1).double(), torch.full((2, 2, 1), std * unit).double(), (1, 2))
             for unit, std in ((1e8, 0.1), (1e-8, 0.4))]
    seen = Seen.of(LayoutLaw(tuple(pools)))
    assert seen.std == pytest.approx((0.1, 0.4)) and seen.most == 4

    def layout(row, std):
        return Sensors(torch.tensor([[row]]).double(), None, torch.tensor([[std**2]]).double(), None)
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
    ({"y": torch.tensor([0.0, np.nan])}, r"sensors \[1\]"), ({"y": torch.zeros(3)}, r"give \(2,\)"),
    ({"y": torch.tensor([1e200, 0.0]).double()}, "beyond"), ({"y": torch.zeros(2) * 1j}, "imaginary"),
    ({"y": torch.tensor([0.0, 1e30])}, r"sensors \[1\] are more than 1e\+12"), ({"y": [0.0, 0.0]}, "torch.as_tensor"),
    ({"rows": torch.zeros(1, 2, 3)}, r"give \(1, k, 2\)"), ({"variance": torch.zeros(1, 2)}, "must be positive"),
    ({"offset": torch.zeros(1, 3)}, r"offset .*give \(1, 2\)"), ({"present": torch.ones(1, 2)}, "true or false"),
])
def test_a_measurement_that_is_none_is_refused(change, words):
    base = OperatorBase(torch.zeros(2).double(), torch.eye(2).double(), Emulator(2, 2, depth=0))
    parts = {"rows": torch.eye(2)[None], "offset": torch.zeros(1, 2), "variance": torch.ones(1, 2), "y": torch.zeros(2),
             "present": torch.ones(1, 2, dtype=torch.bool)}
    parts = {name: x.double() if torch.is_tensor(x) and x.dtype == torch.float32 else x
             for name, x in (parts | change).items()}
    y = parts.pop("y")
    with pytest.raises(InputError, match=words):
        OperatorDenoiser(base, None).at(Sensors(**parts), y)


@pytest.mark.parametrize("call, message", [
    (lambda z: fit_emulator(z, z[:5], torch.ones(2)), "the same pairs"),
    (lambda z: fit_emulator(z[:4], z[:4], torch.ones(2)), "simulate more"),
    (lambda z: fit_operators(z, z * torch.nan, torch.ones(2), _law()), "finite"),
    (lambda z: fit_operators(z[:, :1], z * torch.nan, torch.ones(2), _law()), "finite"),
    (lambda z: _law((0, 65)), "cannot be drawn"),
    (lambda z: _law((3, 2)), "cannot be drawn"), (lambda z: _law((1.0, 2)), "count is 1.0"),
    (lambda z: _law(3), "count is 3"), (lambda z: LayoutLaw(()), "at least one pool"),
    (lambda z: LayoutLaw((z,)), "pools holds Tensor"), (lambda z: LayoutLaw(3), "pools is 3"),
    (lambda z: SensorPool(z, z, z, (1, 2)), r"give \(K, g, s\)"),
    (lambda z: replace(_law().pools[0], std=-_law().pools[0].std), "std must be positive"),
    (lambda z: fit_emulator(z, z, torch.zeros(2)), "weights .* must be positive"),
    (lambda z: fit_emulator(z, z, torch.ones(3)), r"give \(2,\)"),
    (lambda z: fit_emulator(z, z * 1j, torch.ones(2)), "imaginary"),
    (lambda z: fit_emulator(z, z, torch.ones(2), options={}), r"TrainingOptions\(\*\*options\)"),
    (lambda z: fit_emulator(z.numpy(), z, torch.ones(2)), "torch.as_tensor"),
    (lambda z: fit_operators(z, z, torch.ones(2), None), "law is of type NoneType"),
    (lambda z: fit_operators(z, z[:, :1], torch.ones(1), _law()), "see 2 state coordinates"),
    (lambda z: fit_operators(z, z, torch.ones(2), _law(), standard_prior=None), "standard_prior is None"),
    (lambda z: fit_operators(z @ torch.ones(2, 2).double(), z, torch.ones(2), _law()), "depend linearly"),
    (lambda z: OperatorDenoiser(None, None), "base is of type"), (lambda z: Emulator(2.0, 2), "r is 2.0"),
    (lambda z: SensorNetwork(2, 2, tokens=63), "multiple of 4"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.randn(50, 2, generator=_generator(), dtype=torch.float64))
