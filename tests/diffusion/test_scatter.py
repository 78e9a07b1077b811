"""Noise that pairs hold is learnt: as one law or several, not by heart, and believed where it knows more."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import uniform

from fem_diffusion import files
from fem_diffusion.diffusion import (
    Denoiser, History, Sampler, TrainingOptions, emulator_density, fit_denoiser, linear_base, log_density,
    sample_latents,
)
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.base.learnt import LearntNoise, numbers
from fem_diffusion.diffusion.packing import REMEDY, pack_denoiser, unpack_denoiser
from fem_diffusion.diffusion.training import scatter
from fem_diffusion.diffusion.training.choice import advantage
from fem_diffusion.diffusion.training.loop import Loop
from fem_diffusion.diffusion.training.scatter import fit_noise
from fem_diffusion.errors import FileError
from truths import Known, draw, errors, learnt_base, random

QUICK = TrainingOptions(steps=1500, evaluate_every=100, width=32, depth=2, batch=128)


def _grown(z, generator):
    """Readings with noise that grows with them, and one latent that is seen through the noise alone."""
    white = torch.randn(len(z), 2, generator=generator, dtype=z.dtype)
    return torch.stack([z[:, 0], z[:, 0]], 1) + _std(z)[:, None] * white


def _std(z):
    return 0.5 * torch.exp(0.8 * z[:, 1])


def _moments(y, line=torch.linspace(-5, 5, 401, dtype=torch.float64), flat=False):
    z = torch.cartesian_prod(line, line)
    std = _std(z)
    log = -((y - z[:, :1])**2).sum(1) / (2 * std**2) - 2 * torch.log(std) - (0 if flat else z.square().sum(1) / 2)
    density = torch.softmax(log, 0)
    mean = density @ z
    return mean.numpy(), ((z - mean).T * density @ (z - mean)).numpy()


@pytest.fixture(scope="module")
def grown():
    """Pairs that hold their noise, and a model that knows nothing else of it."""
    z = torch.randn(4000, 2, generator=random(), dtype=torch.float64)
    return fit_denoiser(z, _grown(z, random(1)), standard_prior=True, options=QUICK, progress=False)[0]


PLACES = torch.tensor([[1.5, 1.4], [-0.5, 1.2]], dtype=torch.float64)


def test_noise_that_pairs_hold_is_learnt(grown):
    assert grown.known and grown.base.learnt is not None and grown.network is None
    constant = Denoiser(replace(grown.base, learnt=None, updates=1))
    for y in PLACES:
        truth = _moments(y)
        mean, covariance = errors(grown.at(y[None]), truth)
        # Monte Carlo makes 0.05 and 0.1; the rest is what 4,000 pairs leave unknown of the noise.
        assert mean < 0.2 and covariance < 0.35
        wrong = errors(constant.at(y[None]), truth)
        assert wrong[0] > 0.3 or wrong[1] > 0.6


def test_its_log_density_is_that_of_the_samples(grown):
    line = torch.linspace(-5, 5, 201, dtype=torch.float64)
    z, y = torch.cartesian_prod(line, line), PLACES
    found = log_density(grown.at(y), z.expand(2, -1, -1))
    # Tempering errs by 0.06.
    assert ((found.exp().sum(1) * 0.05**2).log().abs() < 0.2).all()
    c, flat = grown.base.emulator(z), z.square().sum(1) / 2
    for row, density in zip(y, found):
        exact = grown.base.learnt.log_density(row - c, z) - flat
        torch.testing.assert_close(density - density[0], exact - exact[0], rtol=1e-6, atol=1e-6)


def test_what_is_learnt_is_saved(grown, tmp_path):
    def written(change=lambda arrays: None):
        arrays, values = pack_denoiser(grown, History())
        change(arrays)
        files.write(tmp_path / "model", "model", arrays, values)
        return unpack_denoiser(files.read(tmp_path / "model", "model", REMEDY))[0]
    again = written()
    for some in (slice(2), slice(1)):
        torch.testing.assert_close(draw(again.at(PLACES[some]), 50, Sampler()), draw(grown.at(PLACES[some]), 50,
                                                                                     Sampler()), rtol=0, atol=0)
    for name, value in (("sensors", np.array([0, 2])), ("sensors", np.array([1, 1])), ("whitener", np.eye(3)),
                        ("whitener", np.zeros((2, 2))), ("whitener", np.ones(2)), ("whitener", np.ones(0)),
                        ("whitener", np.ones(3000000)), ("whitener", np.ones((2, 3)))):
        with pytest.raises(FileError, match="noise that is none of its sensors"):
            written(lambda arrays: arrays.update({f"noise.{name}": value}))


def test_noise_of_bounded_parameters_is_learnt_on_their_own_scale(tmp_path):
    """Uniform on (-2, 2), told by its quantiles: the noise is a curve of the latents, and a line of the parameters."""
    theta = 4 * torch.rand(4000, 2, generator=random(), dtype=torch.float64) - 2
    denoiser, history = fit_denoiser(theta, _grown(theta, random(1)), prior=uniform(-2, 4), options=QUICK,
                                     progress=False)
    assert denoiser.known and denoiser.base.learnt is not None and denoiser.base.learnt.network.curve is not None
    files.write(tmp_path / "model", "model", *pack_denoiser(denoiser, history))
    again = unpack_denoiser(files.read(tmp_path / "model", "model", REMEDY))[0]
    density, w = again.at(PLACES).density, torch.randn(5, 2, 2, generator=random(4)).double().requires_grad_()
    exact, = torch.autograd.grad(density.energy(w).sum(), w)
    torch.testing.assert_close(density.force(w.detach()), exact, rtol=1e-4, atol=1e-4)
    for y in PLACES:
        mean, covariance = _moments(y, torch.linspace(-2, 2, 401, dtype=torch.float64), flat=True)
        found = sample_latents(again.at(y[None]), 4000, seed=0, progress=False)[0].numpy()
        assert np.abs(found).max() <= 2
        # As of the unbounded ones: what 4,000 pairs leave unknown.
        assert (np.abs(found.mean(0) - mean) < 0.2 * covariance.diagonal()**0.5).all()
        assert (np.abs(found.std(0) / covariance.diagonal()**0.5 - 1) < 0.15).all()


def _two_instruments(z, generator):
    """A latent that is read well half of the time, and badly else, (n, 2): in each reading by chance."""
    bad = torch.rand(len(z), 2, generator=generator) < 0.5
    return z + torch.where(bad, 1.0, 0.1) * torch.randn(len(z), 2, generator=generator, dtype=z.dtype)


def _two_instruments_posterior(y, line=torch.linspace(-5, 5, 4001, dtype=torch.float64)):
    parts = torch.stack([torch.distributions.Normal(line, std).log_prob(y[:, None]) for std in (1.0, 0.1)])
    density = torch.softmax(parts.logsumexp(0).sum(0) - line**2 / 2, 0)
    return line, density


def test_noise_of_several_laws_is_learnt_as_a_mixture(tmp_path):
    z = torch.randn(4000, 1, generator=random(), dtype=torch.float64)
    denoiser, history = fit_denoiser(z, _two_instruments(z, random(1)), standard_prior=True, options=QUICK,
                                     progress=False)
    assert denoiser.known and denoiser.network is None and denoiser.base.learnt.components >= 2
    files.write(tmp_path / "model", "model", *pack_denoiser(denoiser, history))
    again = unpack_denoiser(files.read(tmp_path / "model", "model", REMEDY))[0]
    single = Denoiser(replace(denoiser.base, learnt=None, updates=1))
    # Readings that agree, that do not, and that say different things as strongly.
    for y in torch.tensor([[0.5, 0.55], [1.0, -1.0], [2.0, 0.3]], dtype=torch.float64):
        line, density = _two_instruments_posterior(y)
        exact = density.cumsum(0)

        def off(denoiser):
            found = sample_latents(denoiser.at(y[None]), 4000, seed=0, progress=False)[0, :, 0].sort().values
            below = torch.searchsorted(found.contiguous(), line) / len(found)
            return float((below - exact).abs().max())
        # Kolmogorov's distance; 4,000 draws make 0.03 one time in a thousand, the rest is what pairs leave unknown.
        assert off(again) < 0.07
        assert off(single) > 0.12


def test_training_of_a_mixture_is_resumed(tmp_path):
    z = torch.randn(1500, 1, generator=random(), dtype=torch.float64)
    y, options = _two_instruments(z, random(1)), replace(QUICK, steps=300)

    def fitted(y=y, draw=lambda y, generator: y):
        rest = y - z
        return fit_noise(z, y, z.expand(-1, 2), rest.T @ rest / len(z), draw, options, tmp_path / "noise", False)
    first = fitted()
    assert first.components > 1 and (tmp_path / "noise.mixture").exists()
    changed = (tmp_path / "noise.mixture").stat().st_mtime_ns
    for one, other in zip(first.network.parameters(), fitted().network.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert (tmp_path / "noise.mixture").stat().st_mtime_ns == changed
    with pytest.raises(FileError, match="belongs to other data"):
        fitted(y + 0.1)
    with pytest.raises(FileError, match="belongs to other data"):   # the same pairs with noise on top
        fitted(draw=lambda y, generator: y + torch.randn(y.shape, generator=generator, dtype=y.dtype))


def test_many_readings_have_mixtures_along_their_axes(tmp_path):
    """Of one pair in four all 26 readings are five times as noisy."""
    k = 26

    def noisy(z, generator):
        bad = torch.rand(len(z), 1, generator=generator) < 0.25
        return z @ torch.ones(2, k).double() + torch.where(bad, 2.5, 0.5) * torch.randn(
            len(z), k, generator=generator, dtype=z.dtype)
    z, fresh = (torch.randn(1500, 2, generator=random(i), dtype=torch.float64) for i in (0, 1))
    f, y = fresh.sum(1, keepdim=True).expand(-1, k), noisy(fresh, random(2))
    residual = (0.75 * 0.25 + 0.25 * 6.25) * torch.eye(k).double()
    options = replace(QUICK, steps=300)
    noise = fit_noise(z, noisy(z, random(3)), z.sum(1, keepdim=True).expand(-1, k), residual,
                      lambda y, generator: y, options, None, False)
    assert noise is not None and noise.components == 2
    rest = y - f
    parts = [np.log(share) + torch.distributions.Normal(0.0, std).log_prob(rest).sum(1)
             for share, std in ((0.75, 0.5), (0.25, 2.5))]
    exact = torch.stack(parts).logsumexp(0)
    normal = torch.linalg.slogdet(noise.whitener)[1] - k / 2 * np.log(2 * np.pi)
    # One normal law is 14 nats below.
    assert abs(float((noise.log_density(rest, fresh) + normal - exact).mean())) < 1
    # Axes may be a reflection, and readings in units in which a product of their sizes underflows.
    base = learnt_base(replace(noise, whitener=noise.whitener.flip(0) * 1e-13))
    for flip in (1.0, -1.0):
        whitener = base.learnt.whitener.clone()
        whitener[0] *= flip
        denoiser = Denoiser(replace(base, learnt=replace(base.learnt, whitener=whitener)), known=True)
        files.write(tmp_path / "model", "model", *pack_denoiser(denoiser, History()))
        again = unpack_denoiser(files.read(tmp_path / "model", "model", REMEDY))[0]
        torch.testing.assert_close(again.base.learnt.whitener, whitener, rtol=0, atol=0)


def test_outliers_of_single_readings_are_learnt_reading_by_reading(tmp_path, monkeypatch):
    """Each of six readings is twenty times as far off in one pair of six, by itself."""
    k, parts = 6, ((5 / 6, 0.2), (1 / 6, 4.0))

    def noise(n, generator):
        bad = torch.rand(n, k, generator=generator) < parts[1][0]
        return torch.where(bad, 4.0, 0.2) * torch.randn(n, k, generator=generator, dtype=torch.float64)
    z, fresh = (torch.randn(3000, 1, generator=random(i), dtype=torch.float64) for i in (0, 1))
    f, rest, other = z.expand(-1, k), noise(3000, random(2)), noise(3000, random(3))
    exact = torch.stack([np.log(share) + torch.distributions.Normal(0.0, std).log_prob(other)
                         for share, std in parts]).logsumexp(0).sum(1)

    def fitted():
        return fit_noise(z, f + rest, f, rest.T @ rest / len(z), lambda y, generator: y, replace(QUICK, steps=500),
                         tmp_path / "noise", False)

    def off(found):
        volume = found.whitener.log().sum() if found.apart else torch.linalg.slogdet(found.whitener)[1]
        return float((found.log_density(other, fresh) + volume - k / 2 * np.log(2 * np.pi) - exact).mean())
    found = fitted()
    assert found.apart and found.components > 1 and (tmp_path / "noise.apart").exists()
    denoiser = Denoiser(learnt_base(found), known=True)
    files.write(tmp_path / "model", "model", *pack_denoiser(denoiser, History()))
    again = unpack_denoiser(files.read(tmp_path / "model", "model", REMEDY))[0]
    assert again.base.learnt.apart and "for each reading" in repr(again)
    torch.testing.assert_close(again.base.learnt.log_density(other, fresh), found.log_density(other, fresh), rtol=0,
                               atol=0)
    # Of laws for all readings together there would have to be 64.
    monkeypatch.setattr(scatter, "_apart", lambda *given: (None, torch.full((300,), torch.inf)))
    together = fitted()
    # Fresh pairs make 0.01; apart 0.03 nats are lost by so short a training, together 0.6.
    assert abs(off(found)) < 0.1 and not together.apart and off(together) < -0.3


@pytest.mark.parametrize("constant", [True, False])
def test_how_many_readings_go_together_is_not_learnt_by_heart(constant, monkeypatch):
    """Twelve readings, correlated the same way everywhere, of a spread that depends on a latent; 1,500 pairs."""
    k = 12
    factor, line = torch.eye(k).double() + torch.ones(k, k).double().tril(-1) / 6, torch.linspace(-1, 1, k).double()

    def noise(z, generator):
        white = torch.randn(len(z), k, generator=generator, dtype=z.dtype)
        return torch.exp(0.7 * z[:, 1:]) * white @ factor.T
    z, fresh = (torch.randn(1500, 2, generator=random(i), dtype=torch.float64) for i in (0, 1))
    rest, other = noise(z, random(3)), noise(fresh, random(2))
    if not constant:
        monkeypatch.setattr(scatter, "_trained", lambda task, *given: (None, Loop(task, *given[:2]).run(False)))
    f = z[:, :1] * line
    found = fit_noise(z, f + rest, f, rest.T @ rest / len(z), lambda y, generator: y, QUICK, None, False)
    scale = torch.exp(0.7 * fresh[:, 1:, None]) * factor
    exact = torch.distributions.MultivariateNormal(other.new_zeros(k), scale_tril=scale).log_prob(other)
    normal = torch.linalg.slogdet(found.whitener)[1] - k / 2 * np.log(2 * np.pi)
    off = float((found.log_density(other, fresh) + normal - exact).mean())
    assert (-0.13 < off < 0) == constant, off
    turns = found.network.head.weight[2 * k:numbers(k)]
    assert bool((turns == 0).all()) == constant and bool((found.network.offset[2 * k:] != 0).all()) == constant


def test_a_reading_that_another_repeats_tells_nothing_more():
    z = torch.randn(1500, 2, generator=random(), dtype=torch.float64)
    y, options = _grown(z, random(1)), replace(QUICK, steps=300)
    for more in (y[:, :1], y.sum(1, keepdim=True)):
        twice, _ = fit_denoiser(z, torch.cat([y, more], 1), standard_prior=True, options=options, progress=False)
        once, _ = fit_denoiser(z, y, standard_prior=True, options=options, progress=False)
        assert twice.base.learnt is not None
        one, other = (draw(denoiser.at(at), 4000, Sampler()).double() for denoiser, at in (
            (once, y[:1]), (twice, torch.cat([y, more], 1)[:1])))
        # Chance makes 0.02; networks that are trained for so short a time differ.
        assert ((one.mean(0) - other.mean(0)).abs() < 0.25 * one.std(0)).all()
        assert (one.std(0) / other.std(0) - 1).abs().max() < 0.25


@pytest.mark.parametrize("exact", [lambda z: z, lambda z: torch.cat([z, z], 1),
                                   lambda z: torch.cat([z**2 + z, 2 * z], 1)])
def test_pairs_without_noise_have_narrow_posteriors(exact):
    """Where none is given: no error of linear algebra, and a latent that is what was read."""
    z, options = torch.randn(1500, 1, generator=random(), dtype=torch.float64), replace(QUICK, steps=300)
    denoiser, _ = fit_denoiser(z, exact(z), standard_prior=True, options=options, progress=False)
    found = draw(denoiser.at(exact(torch.full((1, 1), 0.7).double())), 500, Sampler())
    assert abs(float(found.mean()) - 0.7) < 0.05 and float(found.std()) < 0.05


def test_noise_that_is_the_same_everywhere_stays_so():
    z = torch.randn(2000, 2, generator=random(), dtype=torch.float64)
    y = z + 0.3 * torch.randn(2000, 2, generator=random(1), dtype=torch.float64)
    residual = 0.09 * torch.eye(2).double()
    assert fit_noise(z, y, z, residual, lambda y, generator: y, QUICK, None, False) is None
    hold = fit_noise(z, z, z, residual, lambda y, generator: _grown(y, generator), QUICK, None, False)
    assert isinstance(hold, LearntNoise)


def test_a_denoiser_is_surpassed_by_the_posterior_alone():
    matrix = torch.tensor([[1.0, 0.5], [0.0, 1.0]]).double()
    z = torch.randn(400, 2, generator=random(), dtype=torch.float64)
    y = z @ matrix.T + 0.3 * torch.randn(400, 2, generator=random(1), dtype=torch.float64)
    exact, wide = (linear_base(matrix, std**2 * torch.eye(2).double()) for std in (0.3, 0.6))
    layout = Layout.readings(2, y)

    def gain(base, other):
        density = emulator_density(other, layout, y, other.locate(layout, y))
        found = advantage(Denoiser(base).at(y), density, z, 0)
        return float(found.mean()) / (float(found.std()) / 20 + 1e-9)
    # In standard errors.
    assert gain(wide, exact) > 4 and gain(exact, wide) < -4 and abs(gain(exact, exact)) < 1e-3
    # A flow that changes faster than any rule can follow loses no network.
    wild = Known(lambda v, angle: torch.sin(1001.5 * angle) * v)
    density = emulator_density(exact, layout, y, exact.locate(layout, y))
    conditioned = replace(Denoiser(exact).at(y), network=wild)
    with pytest.warns(UserWarning, match="kept without being compared"):
        assert advantage(conditioned, density, z, 0).isnan().all()
