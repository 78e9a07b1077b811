"""Scales of latents and readings are chosen where they gain, and posteriors on them are exact where these are known."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

from fem_diffusion.comparison import c2st
from fem_diffusion.diffusion import (
    CallableNoise, GaussianNoise, LayoutFamily, LayoutKind, Sampler, TrainingOptions, fit_denoiser, measure_distance,
    sample_latents,
)
from fem_diffusion.diffusion.maps.noise import even_noise
from fem_diffusion.diffusion.training.independent import are_independent, bounded_laws
from fem_diffusion.diffusion.training.loop import hold_out
from fem_diffusion.diffusion.training.scales import choose_scales
from fem_diffusion.errors import InputError
from truths import random

QUICK = TrainingOptions(steps=300, evaluate_every=100, width=16, depth=1)


def _decades(k, n=4000):
    """log10 of a concentration between 1e-9 and 1e-3, and k readings of it."""
    z = -9 + 6 * torch.rand(n, 1, generator=random(0), dtype=torch.float64)
    return z, 10**z * torch.linspace(1, 2, k, dtype=torch.float64)


def _moments(y, k):
    """Exact mean and standard deviation of log10 c for relative noise of a tenth, by quadrature."""
    x = np.linspace(-9, -3, 400_001)
    c = 10**x[:, None] * np.linspace(1, 2, k)
    log = -((y - c)**2 / (2 * (0.1 * c)**2) + np.log(c)).sum(axis=1)
    p = np.exp(log - log.max())
    p /= p.sum()
    mean = (p * x).sum()
    return mean, np.sqrt((p * (x - mean)**2).sum())


def _errors(denoiser, k, places, n=4000):
    """Errors of mean, in posterior standard deviations, and of standard deviation, as a ratio, at some truths."""
    found = []
    for i, place in enumerate(places):
        y = 10**place * np.linspace(1, 2, k) * (1 + 0.1 * np.random.default_rng(i).standard_normal(k))
        z = sample_latents(denoiser.at(torch.tensor(y)[None]), n, seed=i, progress=False)[0, :, 0].numpy()
        mean, std = _moments(y, k)
        found.append(((z.mean() - mean) / std, z.std() / std))
    return np.array(found).T


@pytest.mark.parametrize("k, known", [(1, True), (4, True), (1, False)])
def test_six_decades_are_exact_whether_the_prior_is_given_or_not(k, known):
    """Its bounds are found in the pairs, to a mean spacing of these: 0.0015, or a thirtieth of a standard deviation."""
    z, y = _decades(k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoiser, history = fit_denoiser(z, y, GaussianNoise(relative=0.1), progress=False,
                                         prior=stats.uniform(-9, 6) if known else None)
        off, ratio = _errors(denoiser, k, [-8.98, -8.9, -8, -7, -6, -5, -4, -3.3, -3.1, -3.02])
        drawn = sample_latents(denoiser.at(y[:200]), 20, seed=0, progress=False)
    assert denoiser.known and not history.step and denoiser.readings.kinds == ("asinh",) * k
    beyond = 0.0 if known else 0.01
    assert ((drawn > -9 - beyond) & (drawn < -3 + beyond)).all()
    # Of 4,000 nearly independent samples a mean is known to 0.016, a standard deviation to 1.1 %.
    assert np.abs(off).max() < 0.07 and np.abs(ratio - 1).max() < 0.05


def test_without_scales_six_decades_are_far_off():
    z, y = _decades(1)
    denoiser, _ = fit_denoiser(z, y, GaussianNoise(relative=0.1), options=QUICK, scales="identity", progress=False)
    _, ratio = _errors(denoiser, 1, [-8, -7, -6])
    assert denoiser.readings is None and ratio.min() > 3


def _truncated(known, held=False, r=10, n=10_000):
    """A denoiser of uniform latents, each read with noise; their c2st to the exact posterior, and samples outside.

    Pairs without noise, which is known, or pairs that hold it.
    """
    z = 2 * torch.rand(n, r, generator=random(0), dtype=torch.float64) - 1
    std = 0.1**0.5
    y = z + std * torch.randn(z.shape, generator=random(1), dtype=z.dtype) if held else z.clone()
    denoiser, _ = fit_denoiser(z, y, None if held else GaussianNoise(std=std), progress=False,
                               prior=stats.uniform(-1, 2) if known else None, options=QUICK)
    rng, found, outside = np.random.default_rng(5), [], 0
    for i in range(3):
        y = rng.uniform(-1, 1, r) + std * rng.standard_normal(r)
        x = sample_latents(denoiser.at(torch.tensor(y)[None]), 1000, seed=i, progress=False)[0].numpy()
        exact = stats.truncnorm((-1 - y) / std, (1 - y) / std, loc=y, scale=std).rvs((1000, r), random_state=rng)
        found.append(c2st(exact, x))
        outside += int((np.abs(x) > 1).any(axis=1).sum())
    return denoiser, np.mean(found), outside


@pytest.mark.slow
@pytest.mark.parametrize("held", [False, True])
def test_a_linear_problem_under_a_uniform_prior_is_at_the_floor(held):
    denoiser, found, outside = _truncated(True, held)
    assert denoiser.known and denoiser.readings is None and denoiser.base.emulator.curve is not None
    assert denoiser.base.emulator.head is None and found < 0.53 and not outside


def test_bounded_laws_are_told_by_pairs_and_dependent_latents_are_none():
    rng, n = np.random.default_rng(0), 4000
    laws = [stats.uniform(2, 3), stats.expon(-1, 2), stats.beta(1, 2), stats.norm(5, 2), stats.weibull_max(1.0, 3, 2)]
    z = torch.from_numpy(np.stack([law.rvs(n, random_state=rng) for law in laws], 1))
    found = bounded_laws(z)
    fresh = torch.from_numpy(np.stack([law.rvs(n, random_state=rng) for law in laws], 1))
    u = found.forward(fresh)
    inside = torch.isfinite(u).all(1)   # a fresh draw may be outside the outermost of those before
    assert inside.float().mean() > 0.995 and are_independent(u[inside])
    # A density is told to some percent: of 4,000 values the outermost knots have 25 beyond them.
    exact = torch.from_numpy(np.stack([law.logpdf(x) for law, x in zip(laws, fresh.numpy().T)], 1))
    log = found.log_slope(fresh) - u.square() / 2 - math.log(2 * math.pi) / 2
    assert ((log - exact)[inside].abs().mean(0) < 0.05).all()
    moved = found.inverse(torch.randn(20_000, 5, generator=random(3), dtype=torch.float64)).numpy()
    assert moved[:, 0].min() > 1.99 and moved[:, 0].max() < 5.01
    assert moved[:, 1].min() > -1.01 and moved[:, 4].max() < 3.01
    # Uniform on a disc, on a triangle, and on the square above a parity of signs.
    a, b, c = 2 * torch.rand(3, n, generator=random(4), dtype=torch.float64) - 1
    for dependent in (torch.stack([a, b * (1 - a**2).sqrt()], 1), torch.stack([torch.minimum(a, b), torch.maximum(
            a, b)], 1), torch.stack([a, b, c.abs() * (a * b).sign()], 1)):
        assert bounded_laws(dependent) is None
    assert bounded_laws(torch.randn(n, 2, generator=random(5), dtype=torch.float64)) is None


def test_the_order_of_pairs_tells_nothing():
    """Sorted by their parameter, as a table may be: those held out are not the smallest."""
    law = stats.beta(1, 3)
    z = torch.from_numpy(np.sort(law.rvs((4000, 1), random_state=0), axis=0))
    denoiser, _ = fit_denoiser(z, z.clone(), 0.3, options=QUICK, progress=False)
    x = np.linspace(0, 1, 20_001)
    for y in (0.1, 0.9):
        p = law.pdf(x) * np.exp(-(y - x)**2 / (2 * 0.3**2))
        mean = (p * x).sum() / p.sum()
        std = np.sqrt((p * (x - mean)**2).sum() / p.sum())
        drawn = sample_latents(denoiser.at(torch.tensor([[y]]).double()), 4000, seed=0, progress=False).numpy()
        assert abs(drawn.mean() - mean) < 0.07 * std and abs(drawn.std() / std - 1) < 0.07


def test_one_number_with_a_heap_has_no_law_of_a_scale():
    z = torch.rand(4000, 1, generator=random(0), dtype=torch.float64)
    assert bounded_laws(z) is not None
    z[::3] = 0.5
    assert bounded_laws(z) is None


def test_latents_that_are_read_several_times_are_held_out_as_one():
    z = torch.randn(400, 2, generator=random(0), dtype=torch.float64).repeat_interleave(10, 0)
    training, held_out = hold_out(z, TrainingOptions())
    assert len(training) + len(held_out) == 4000 and len(held_out) == 400
    assert not set(z[training, 0].tolist()) & set(z[held_out, 0].tolist())
    y = z[:, :1] + 0.5 * torch.randn(4000, 1, generator=random(1), dtype=torch.float64)
    fit_denoiser(z, y, prior=stats.norm(), options=QUICK, progress=False)    # draws of it, each ten times
    with pytest.warns(UserWarning, match="3,600 of 4,000 pairs are copies"):
        fit_denoiser(z, z[:, :1], 0.5, standard_prior=True, options=QUICK, progress=False)
    # Numbers of which all are one of ten are held out as others are.
    z = torch.randint(10, (1000, 1), generator=random(2)).double()
    training, held_out = hold_out(z, TrainingOptions())
    assert len(held_out) == 100 and len(z[training].unique()) == 10


def test_independent_latents_are_taken_for_dependent_ones_rarely():
    wrong = sum(not are_independent(torch.randn(1000, 6, generator=random(seed), dtype=torch.float64))
                for seed in range(60))
    assert wrong <= 2    # of an expected 0.06


@pytest.mark.parametrize("noise", [GaussianNoise(std=0.2, relative=[0.05] * 3), CallableNoise(
    lambda y, g: y + (0.2**2 + (0.05 * y)**2).sqrt() * torch.randn(y.shape, generator=g, dtype=y.dtype))],
    ids=["known", "callable"])
def test_noise_is_of_one_size_on_a_scale_of_its_own(noise):
    y = torch.tensor([1.0, 30, 0.001]).double() * torch.randn(4000, 3, generator=random(0), dtype=torch.float64).exp()
    scale = even_noise(noise, y, random(1))
    # Readings that stay below the unit have none; that of drawn noise is known to a tenth or two.
    assert scale.kinds == ("asinh", "asinh", "identity") and ((scale.unit[:2] / 4).log().abs() < 0.25).all()
    places = torch.tensor([[0.1, 0.1, 0.1], [4, 4, 0.1], [50, 1000, 0.1]]).double().repeat_interleave(5000, 0)
    std = scale.forward(noise.sample(places, random(2))).view(3, 5000, 3).std(1)
    assert ((std[:, :2] / 0.05).log().abs() < 0.3).all()
    assert even_noise(GaussianNoise(std=0.3), y, random(1)) is None
    relative = even_noise(CallableNoise(lambda y, g: y * (1 + 0.1 * torch.randn(y.shape, generator=g, dtype=y.dtype))),
                          y, random(1))
    assert (relative.unit < y.quantile(0.01, dim=0)).all()


def test_that_scale_is_chosen_where_readings_are_near_nought_or_large():
    """Amounts f² that some sensors see and others do not: neither their likeliest scale nor a spline says as much."""
    f = torch.randn(3000, 6, generator=random(0), dtype=torch.float64).abs() * (
        torch.rand(3000, 6, generator=random(1)) < 0.3)
    f = f + 0.02 * torch.randn(f.shape, generator=random(3), dtype=f.dtype)
    y = f.square() @ torch.rand(6, 30, generator=random(2), dtype=torch.float64).pow(4) * 50
    for stay in (True, False):
        found = choose_scales(f, y, GaussianNoise(std=0.25, relative=0.05), None, False, stay=stay)
        assert set(found.readings.kinds) == {"asinh"} and ((found.readings.unit / 5).log().abs() < 0.2).all()
        assert (found.latents is None) == stay


def test_latents_that_a_network_takes_for_amplitudes_stay():
    z, y = _gaussian()
    y = y + 0.1 * torch.randn(y.shape, generator=random(2), dtype=y.dtype)
    assert choose_scales(z.exp(), y.exp(), None, None, False).latents is not None
    found = choose_scales(z.exp(), y.exp(), None, None, False, stay=True)
    assert found.latents is None


def _gaussian(n=3000):
    z = torch.randn(n, 3, generator=random(0), dtype=torch.float64)
    return z, z @ torch.randn(3, 5, generator=random(1), dtype=torch.float64)


@pytest.mark.parametrize("noise", [None, GaussianNoise(std=0.3), CallableNoise(
    lambda y, g: y + 0.3 * torch.randn(y.shape, generator=g, dtype=y.dtype))], ids=["held", "known", "callable"])
@pytest.mark.parametrize("standard", [True, False])
def test_where_nothing_is_gained_nothing_is_changed(noise, standard):
    z, y = _gaussian()
    y = y if noise is not None else y + 0.3 * torch.randn(y.shape, generator=random(2), dtype=y.dtype)
    for seed in range(5):
        found = choose_scales(z, y, noise, None, standard, seed)
        assert found.latents is None and found.readings is None


@pytest.mark.parametrize("kind", ["latents", "readings", "both"])
def test_logarithms_are_found_where_they_are(kind):
    z, y = _gaussian()
    y = y + 0.1 * torch.randn(y.shape, generator=random(2), dtype=y.dtype)
    found = choose_scales(z if kind == "readings" else z.exp(), y if kind == "latents" else (2 * y).exp(), None, None,
                          False)
    assert (found.latents is None) == (kind == "readings") and (found.readings is None) == (kind == "latents")
    if found.latents is not None:
        assert set(found.latents.kinds) == {"log"}


@pytest.mark.parametrize("place", ["own", "logarithm"])
def test_noise_that_depends_on_latents_is_not_taken_for_a_scale(place):
    """Each latent is read three times, with a spread that the next one tells: heavy tails that are none."""
    z = torch.randn(3000, 3, generator=random(0), dtype=torch.float64)
    e = torch.randn(3000, 9, generator=random(1), dtype=torch.float64)
    y = z.repeat(1, 3) + torch.exp((1.5 if place == "own" else 0.3) * z.roll(1, 1)).repeat(1, 3) * e
    if place == "own":
        assert choose_scales(z, y, None, None, True).readings is None
    for seed in range(3) if place == "logarithm" else ():
        # One held-out pair, impossible on the wrong scale, does not hide what the others tell.
        found = choose_scales(z, y.exp(), None, None, True, seed).readings
        assert found is not None and set(found.kinds) <= {"log", "asinh"} and not found.knots.numel()


def test_a_family_has_a_scale_of_its_latents_alone():
    z = torch.randn(3000, 2, generator=random(0), dtype=torch.float64)
    kind = LayoutKind(torch.randn(6, 1, 2, generator=random(1), dtype=torch.float64), torch.zeros(6, 1).double(),
                      torch.full((2, 6, 1), 0.2).double(), (1, 3))
    denoiser, _ = fit_denoiser(z.exp(), z, LayoutFamily((kind,)), options=QUICK, progress=False)
    assert denoiser.latents.kinds == ("log", "log") and denoiser.readings is None
    layout = LayoutFamily((kind,)).draw(4, random(3))
    drawn = sample_latents(denoiser.at(layout.measure(z[:4], random(4)), layout), 50, seed=0, progress=False)
    assert (drawn > 0).all()


def test_slopes_follow_the_scale():
    """With derivatives a handful of pairs serves, on a scale that many pairs have chosen."""
    z = torch.randn(400, 2, generator=random(0), dtype=torch.float64)
    operator = torch.tensor([[2.0, 1], [0, 2], [1, -1]], dtype=torch.float64)
    y = (z @ operator.T).exp()
    slopes = y[:, :, None] * operator
    denoiser, _ = fit_denoiser(z, y, GaussianNoise(relative=0.1), slopes=slopes, standard_prior=True, progress=False)
    assert denoiser.readings is not None and denoiser.known
    truth = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    drawn = sample_latents(denoiser.at((truth @ operator.T).exp()), 4000, seed=0, progress=False)[0]
    precision = torch.eye(2, dtype=torch.float64) + operator.T @ operator / 0.1**2
    exact = torch.linalg.inv(precision).diagonal().sqrt()
    assert ((drawn.std(0) / exact - 1).abs() < 0.06).all() and ((drawn.mean(0) - truth[0]).abs() < 0.25 * exact).all()


def test_priors_that_are_not_those_of_the_pairs_are_refused():
    z, y = _decades(1, 500)
    for prior, message in ((stats.uniform(-8, 5), "beyond the bounds"),
                           (stats.uniform(-20, 30), "no draw of its prior"),
                           (stats.norm(-6, 1), "no draw of its prior")):
        with pytest.raises(InputError, match=message):
            fit_denoiser(z, y, GaussianNoise(relative=0.1), prior=prior)
    z = torch.randn(2000, 2, generator=random(0), dtype=torch.float64)
    turned = torch.stack([z[:, 0], 0.9 * z[:, 0] + 0.19**0.5 * z[:, 1]], 1)
    for wrong in (turned, torch.stack([z[:, 0], z[:, 1].abs() * z[:, 0].sign()], 1)):
        for given in ({"prior": stats.norm()}, {"standard_prior": True}):
            with pytest.raises(InputError, match="depend on each other"):
                fit_denoiser(wrong, wrong[:, :1], 0.5, **given)
    for wrong in (1.2 * z, z + 0.2, (z**2 - 1) / 2**0.5):
        with pytest.raises(InputError, match=r"no draw of its prior N\(0, 1\)"):
            fit_denoiser(wrong, wrong, 0.5, standard_prior=True)
    with pytest.raises(InputError, match="leave standard_prior"):
        z, y = _decades(1, 500)
        fit_denoiser(z, y, GaussianNoise(relative=0.1), prior=stats.uniform(-9, 6), standard_prior=True)
    with pytest.raises(InputError, match="scales"):
        fit_denoiser(z, y, GaussianNoise(relative=0.1), scales="log")


def test_distances_of_readings_over_decades_are_told_on_their_scale():
    z, y = _decades(2, 1000)
    noise = GaussianNoise(relative=0.1)
    scale = choose_scales(z, y, noise, None, False).readings
    for place in (1e-9, 1e-6, 1e-3):
        assert not measure_distance(y, noise, place * torch.tensor([1.0, 2.0]).double(), "ab", scale).worst
    wrong = 1e-8 * torch.tensor([1.0, 8.0]).double()
    assert not measure_distance(y, noise, wrong, "ab").worst
    found = measure_distance(y, noise, wrong, "ab", scale)
    assert found.worst
    assert " to " in found.message and "is expected beside" in found.message


def test_moves_are_what_the_edges_need():
    """The base alone is no posterior next to a bound: the density is, to which samples are moved."""
    z, y = _decades(1)
    denoiser, _ = fit_denoiser(z, y, GaussianNoise(relative=0.1), prior=stats.uniform(-9, 6), progress=False)
    at = denoiser.at(torch.tensor([[1.05e-9]]).double())
    std = _moments(np.array([1.05e-9]), 1)[1]
    base, moved = (float(sample_latents(at, 4000, Sampler(corrections=n), seed=0, progress=False).std())
                   for n in (0, None))
    assert abs(moved / std - 1) < 0.05 < abs(base / std - 1)
