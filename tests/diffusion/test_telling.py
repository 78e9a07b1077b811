"""Readings that say nothing: which they are, and that posteriors, files and selections are those of the others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fem_diffusion import files
from fem_diffusion.diffusion import Sampler, TrainingOptions, fit_denoiser, log_density
from fem_diffusion.diffusion.network import NETWORKS, ScoreModule
from fem_diffusion.diffusion.packing import REMEDY, pack_denoiser, unpack_denoiser
from fem_diffusion.diffusion.training.telling import telling, widened
from fem_diffusion.errors import FileError, InputError
from truths import draw, errors, random

N, NOTHING = 4000, 30
QUICK = TrainingOptions(steps=1500, evaluate_every=100, width=32, depth=2, batch=128)


def _normal(n, m, seed):
    return torch.randn(n, m, generator=random(seed), dtype=torch.float64)


def _nothing(n, seed=9):
    """Readings of any scale and tails, each second one tied to the one before."""
    white = _normal(n, NOTHING, seed)
    white[:, 1::2] += 0.8 * white[:, ::2]
    return torch.sinh(2 * white) * torch.logspace(-3, 3, NOTHING).double() + 7


def _phases(z):
    """The difference of two angles, of which none alone tells anything."""
    return torch.cos(2 * torch.pi * (torch.special.ndtr(z[:, :1]) - torch.special.ndtr(z[:, 1:2])))


CASES = {
    "a line": lambda z, e: z[:, :1] + e,
    "an even function": lambda z, e: z[:, 1:2]**2 + 0.3 * e,
    "a product": lambda z, e: z[:, :1] * z[:, 1:2] + 0.3 * e,
    "an angle between": lambda z, e: _phases(z) + 0.3 * e,
    "noise that depends": lambda z, e: e * torch.exp(0.5 * z[:, :1]),
    "yes or no": lambda z, e: (z[:, :1] + e > 1.5).double(),
}


def _told(z, y):
    found = telling(z, y, QUICK)
    return None if found is None else found.tolist()


@pytest.mark.parametrize("kind", CASES)
def test_what_tells_is_found(kind):
    z = _normal(N, 3, 0)
    assert _told(z, torch.cat([_nothing(N), CASES[kind](z, _normal(N, 1, 1))], 1)) == [NOTHING]


def test_pairs_may_be_in_order():
    z = _normal(12000, 2, 0)
    z = z[z[:, 0].argsort()]
    leak = 0.3 * _normal(12000, 1, 1) + 10 * torch.relu(z[:, :1] - 2)   # at one in forty-four
    assert _told(z, torch.cat([_nothing(12000), leak], 1)) == [NOTHING]


def test_noise_that_two_readings_share_tells():
    z, e = _normal(N, 2, 0), _normal(N, 1, 1)
    assert _told(z, torch.cat([e, _nothing(N), z[:, :1] + e + 0.1 * _normal(N, 1, 2)], 1)) == [0, NOTHING + 1]


def test_readings_that_tell_together_stay():
    """A hundred, none of which tells anything for sure."""
    z = _normal(N, 2, 0)
    weak = z[:, 1:] + 25 * _normal(N, 100, 1)
    y = torch.cat([z[:, :1] + 0.1 * _normal(N, 1, 2), weak], 1)
    assert _told(z, y) is None
    assert _told(z, torch.cat([y[:, :1], weak[torch.randperm(N, generator=random(3))]], 1)) == [0]


def _tied(z):
    """Two standard normal readings, tied by a latent."""
    share, white = torch.tanh(z[:, 1:2]), _normal(N, 2, 5)
    return torch.cat([white[:, :1], share * white[:, :1] + (1 - share**2).sqrt() * white[:, 1:]], 1)


def _carried(z):
    """A product of latents, as the small difference of two large readings."""
    large = 100 * _normal(N, 1, 5)
    return torch.cat([large, large + z[:, :1] * z[:, 1:2] + 0.1 * _normal(N, 1, 6)], 1)


@pytest.mark.parametrize("two", [_tied, _carried])
def test_readings_that_tell_by_how_they_go_together_stay(two):
    z = _normal(N, 2, 0)
    clear, nothing = z[:, :1] + 0.3 * _normal(N, 1, 2), _nothing(N)[:, :10]
    assert _told(z, torch.cat([clear, two(z), nothing], 1)) is None
    assert _told(z, torch.cat([clear, two(_normal(N, 2, 8)), nothing], 1)) == [0]   # tied by what nobody wants to know


def test_where_most_or_none_tell_or_pairs_are_few_all_stay():
    z = _normal(N, 3, 0)
    y = torch.cat([z, z**2, _nothing(N)[:, :3]], 1) + 0.1 * _normal(N, 9, 1)
    assert _told(z, y) is None
    few = torch.cat([z[:, :1], _nothing(N)], 1)
    assert _told(z, few) == [0]
    assert _told(z[:500], few[:500]) is None and _told(z, _nothing(N)) is None
    few[:, 5] = 3.0
    with pytest.raises(InputError, match=r"sensors \[5\] read the same in all pairs"):
        fit_denoiser(z, few, options=QUICK, progress=False)


def _std(z):
    return 0.5 * torch.exp(0.8 * z[:, 1])


def _grown(z):
    """Noise that grows with a latent, which is seen through it alone."""
    return z[:, :1] + _std(z)[:, None] * _normal(len(z), 2, 1)


@pytest.fixture(scope="module")
def pairs():
    z = _normal(N, 2, 0)
    return z, torch.cat([_nothing(N)[:, :20], _grown(z), _nothing(N)[:, 20:]], 1)


@pytest.fixture(scope="module")
def found(pairs):
    return fit_denoiser(*pairs, standard_prior=True, options=QUICK, progress=False)


def _at(y):
    """Measurements of the two that tell, among others."""
    return torch.cat([_nothing(len(y), 5)[:, :20], y, _nothing(len(y), 5)[:, 20:]], 1)


def _bent(z):
    return torch.stack([z[:, 0] + 0.5 * z[:, 1]**2, z[:, 0] * z[:, 1]], 1)


def _errors(denoiser):
    """Of means and covariances, in units of the posterior's, against quadrature; the larger of two measurements."""
    line, found = torch.linspace(-5, 5, 401, dtype=torch.float64), []
    z = torch.cartesian_prod(line, line)
    for y in torch.tensor([[1.0, 0.6], [0.3, -1.0]], dtype=torch.float64):
        density = torch.softmax(-((y - _bent(z))**2).sum(1) / (2 * 0.2**2) - z.square().sum(1) / 2, 0)
        mean = density @ z
        found.append(errors(denoiser.at(_at(y[None])), (mean.numpy(), ((z - mean).T * density @ (z - mean)).numpy())))
    return np.max(found, axis=0)


def _trained():
    z = _normal(2000, 2, 0)
    y = _bent(z) + 0.2 * _normal(2000, 2, 1)
    y = torch.cat([_nothing(2000)[:, :20], y, _nothing(2000)[:, 20:]], 1)
    return fit_denoiser(z, y, standard_prior=True, options=QUICK, progress=False)[0]


def test_the_posterior_is_right_among_many_that_say_nothing():
    denoiser = _trained()
    assert denoiser.base.told.tolist() == [20, 21]
    assert "all from the 2 of 32 readings that say anything" in repr(denoiser)
    mean, covariance = _errors(denoiser)
    assert mean < 0.25 and covariance < 0.25   # what 2,000 pairs leave unknown, and what draws leave to chance


@pytest.mark.slow
def test_it_is_wrong_where_they_are_learnt_by_heart(monkeypatch):
    monkeypatch.setattr("fem_diffusion.diffusion.training.fit.telling", lambda *_: None)
    mean, covariance = _errors(_trained())
    assert mean > 0.5 and covariance > 1


@pytest.mark.parametrize("known", [True, False])
def test_it_is_the_denoiser_of_those_that_tell(pairs, known):
    """Under learnt noise, and under a network, where readings have a scale of their own."""
    z, y = pairs
    told = torch.tensor([20, 21])
    if not known:
        y = torch.cat([y[:, :20], torch.exp(y[:, told]), y[:, 22:]], 1)
    alone, _ = fit_denoiser(z, y[:, told], standard_prior=known, options=QUICK, progress=False)
    assert (alone.network is None) == known and (alone.readings is None) == known
    wide, other = widened(alone, y, told), y[7:9].clone()
    torch.testing.assert_close(draw(wide.at(y[7:9]), 50, Sampler()), draw(alone.at(y[7:9, told]), 50, Sampler()))
    other[:, [3, 30]] = 1e6   # whatever the others read
    torch.testing.assert_close(log_density(wide.at(other), z[None, :20].expand(2, -1, -1)),
                               log_density(alone.at(y[7:9, told]), z[None, :20].expand(2, -1, -1)), rtol=1e-6,
                               atol=1e-6)


def test_a_network_of_the_users_sees_those_that_tell(pairs, monkeypatch):
    class Mine(NETWORKS["latents"]):
        def see(self, base, layout, y, located):
            assert located.misfit.shape[1] == located.sensitivity.shape[1] == base.k == layout.rows.shape[1] == 2
            return torch.asinh(y).to(self.dtype),
    assert issubclass(Mine, ScoreModule)
    monkeypatch.setitem(NETWORKS, "mine", Mine)
    denoiser, _ = fit_denoiser(*pairs, network="mine", options=replace(QUICK, steps=200), progress=False)
    assert isinstance(denoiser.network, Mine)
    first, y = denoiser.at(pairs[1][:1]), pairs[1][:1].clone()
    y[:, 3] = 1e9
    torch.testing.assert_close(draw(denoiser.at(y), 50, Sampler()), draw(first, 50, Sampler()), rtol=0, atol=0)
    y[:, 21] = 1e30
    with pytest.raises(InputError, match=r"sensors \[20, 21\] are more than"):   # whitened together
        denoiser.at(y)


def test_files_hold_which_tell(found, tmp_path):
    def written(change=lambda arrays: None):
        arrays, values = pack_denoiser(*found)
        change(arrays)
        files.write(tmp_path / "model", "model", arrays, values)
        return unpack_denoiser(files.read(tmp_path / "model", "model", REMEDY))[0]
    y = _at(torch.tensor([[1.5, 1.4]], dtype=torch.float64))
    torch.testing.assert_close(draw(written().at(y), 50, Sampler()), draw(found[0].at(y), 50, Sampler()), rtol=0,
                               atol=0)
    for name, value in [("base.told", np.array([20, 20])), ("base.told", np.array([20, 40])),
                        ("noise.aside", np.zeros((30, 30)))]:
        with pytest.raises(FileError, match="readings that are none|noise that is none"):
            written(lambda arrays: arrays.update({name: value}))


def test_some_of_the_sensors_may_be_left(found):
    denoiser, k = found[0], NOTHING + 2
    y = _at(torch.tensor([[1.5, 1.4]], dtype=torch.float64))

    def only(*sensors):
        index = torch.tensor(sensors)
        part = denoiser.select(index, torch.zeros(k, k), torch.zeros(len(index), len(index)), None)
        return draw(part.at(y[:, index]), 4000, Sampler()).double()
    one, among = only(20), only(3, 20, 31)
    assert ((one.mean(0) - among.mean(0)).abs() < 5 * one.std(0) * (2 / 4000)**0.5).all()
    # Those that say nothing leave the prior.
    prior = only(3, 31)
    assert prior.mean(0).abs().max() < 5 / 4000**0.5 and (prior.std(0) - 1).abs().max() < 5 / 8000**0.5


def test_scatter_of_all_readings(pairs, found):
    learnt, z = found[0].base.learnt, torch.zeros(40000, 2).double()
    mean, covariance = learnt.moments(z[:1])
    std = covariance[0].diagonal().sqrt()
    drawn = learnt.sample(z, random(3))
    assert ((drawn.mean(0) - mean[0]).abs() < 5 * std / 200).all()
    assert ((drawn.T.cov() - covariance[0]).abs() < 0.06 * std * std[:, None]).all()
    others = [i for i in range(NOTHING + 2) if i not in (20, 21)]
    torch.testing.assert_close(covariance[0][others][:, others], pairs[1][:, others].T.cov(), rtol=1e-5, atol=1e-5)
    assert not mean[0, others].any() and not covariance[0][20, others].any()
    # What is left aside follows what is kept there, and nothing else.
    rest = learnt.sample(z[:2], random(4))
    kept = torch.tensor([i for i in range(NOTHING + 2) if i != 5])
    where, spread = learnt.others(rest[:, kept], z[:2], kept, torch.tensor([5]), random(5))
    S = covariance[0]
    gain = torch.linalg.solve(S[kept][:, kept], S[kept, 5])
    torch.testing.assert_close(where[:, 0], rest[:, kept[kept != 20]] @ gain[kept != 20], rtol=1e-3, atol=1e-3)
    assert (spread > 0).all() and (spread[0, 0, 0] < S[5, 5])
