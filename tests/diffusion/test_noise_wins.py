"""Problems whose readings hold their noise, of a spread that depends on the latents, and of no normal law."""

import numpy as np
import pytest
import torch
from scipy.stats import uniform

from fem_diffusion.comparison import c2st
from fem_diffusion.diffusion import fit_denoiser, sample_latents
from truths import random

PAIRS, SAMPLES = 10000, 2000


def _uniform(z):
    """Parameters, uniform on (-3, 3), of standard normal latents."""
    return 6 * torch.special.ndtr(z) - 3


def _scatter(theta):
    """Mean (n, 2), standard deviations (n,) each and correlation (n,) of a point in the plane."""
    return theta[:, :2], theta[:, 2]**2, theta[:, 3]**2, torch.tanh(theta[:, 4])


def four_points(z, generator):
    """Four independent points, (n, 8): of both standard deviations only a square is known, so there are four modes."""
    mean, s1, s2, rho = (x[:, None] for x in _scatter(_uniform(z)))
    e = torch.randn(len(z), 4, 2, generator=generator, dtype=z.dtype)
    second = rho * e[..., 0] + (1 - rho**2).sqrt() * e[..., 1]
    return torch.stack([mean[..., 0] + s1 * e[..., 0], mean[..., 1] + s2 * second], 2).flatten(1)


def log_likelihood(y, z):
    """Of a reading (8,) at latents (n, 5), up to a constant."""
    mean, s1, s2, rho = (x[:, None] for x in _scatter(_uniform(z)))
    a, b = (y.view(4, 2)[:, 0] - mean[..., 0]) / s1, (y.view(4, 2)[:, 1] - mean[..., 1]) / s2
    rest = 1 - rho**2
    return (-(a * a - 2 * rho * a * b + b * b) / (2 * rest) - torch.log(s1 * s2) - rest.log() / 2).sum(1)


def exact_draws(y, n, seed, grid=200):
    """Draws (n, 5) of the parameters given a reading (8,).

    The mean has a Gaussian law given the rest, cut at the bounds; with it integrated out the rest has a density of
    three numbers, of which cells of a fine grid are drawn. What is outside of the bounds is refused.
    """
    points = y.view(4, 2)
    middle = points.mean(0)
    S = (points - middle).T @ (points - middle)
    u = torch.linspace(np.log(1e-3), np.log(3.0), grid, dtype=torch.float64)
    t = torch.linspace(-3, 3, grid + 1, dtype=torch.float64)
    s1, s2, rho = torch.exp(2 * u)[:, None, None], torch.exp(2 * u)[:, None], torch.tanh(t)
    square = (S[0, 0] / s1**2 - 2 * rho * S[0, 1] / (s1 * s2) + S[1, 1] / s2**2) / (1 - rho**2)
    log = -3 * torch.log(s1 * s2) - 1.5 * torch.log(1 - rho**2) - square / 2 + u[:, None, None] + u[:, None]
    shares = torch.softmax(log.flatten(), 0).cumsum(0)
    generator, found = random(seed), []
    while sum(map(len, found)) < n:
        place = torch.searchsorted(shares, torch.rand(n, generator=generator).double() * shares[-1])
        a, b, c = place // (grid * (grid + 1)), place // (grid + 1) % grid, place % (grid + 1)
        inside = torch.rand(n, 3, generator=generator).double() - 0.5
        first, second = u[a] + (u[1] - u[0]) * inside[:, 0], u[b] + (u[1] - u[0]) * inside[:, 1]
        last = t[c] + (t[1] - t[0]) * inside[:, 2]
        e, rho = torch.randn(n, 2, generator=generator).double() / 2, torch.tanh(last)
        mean = middle + torch.stack([torch.exp(2 * first) * e[:, 0], torch.exp(2 * second) * (
            rho * e[:, 0] + (1 - rho**2).sqrt() * e[:, 1])], 1)
        signs = 2 * torch.randint(0, 2, (n, 2), generator=generator) - 1
        theta = torch.cat([mean, torch.exp(torch.stack([first, second], 1)) * signs, last[:, None]], 1)
        found.append(theta[(theta.abs() < 3).all(1)])
    return torch.cat(found)[:n]


@pytest.mark.slow
def test_the_reference_is_that_of_importance_sampling():
    generator = random(2)
    y = four_points(torch.tensor([[0.3, -0.4, 0.8, 1.0, 0.5]], dtype=torch.float64), generator)[0]
    z = torch.randn(1000000, 5, generator=generator, dtype=torch.float64)
    weights = torch.softmax(log_likelihood(y, z), 0)
    size = float(1 / weights.square().sum())
    found, theta = exact_draws(y, 4000, 0), _uniform(z)
    assert size > 400
    for function in (torch.abs, torch.square, lambda x: x[:, 2:3] * x[:, 4:], lambda x: x):
        a, b = function(found), function(theta)
        error = a.std(0) * (1 / size + 1 / 4000)**0.5
        assert ((a.mean(0) - weights @ b).abs() < 4 * error).all()


@pytest.mark.slow
def test_noise_that_tells_of_latents_takes_the_place_of_the_network():
    generator = random(1)
    z = torch.randn(PAIRS, 5, generator=generator, dtype=torch.float64)
    denoiser, _ = fit_denoiser(z, four_points(z, generator), standard_prior=True, progress=False)
    assert denoiser.known and denoiser.network is None and denoiser.base.learnt is not None
    y = four_points(torch.randn(6, 5, generator=generator, dtype=torch.float64), generator)
    drawn = _uniform(sample_latents(denoiser.at(y), SAMPLES, seed=0, progress=False))
    scores = [c2st(exact_draws(row, SAMPLES, 7).numpy(), found.numpy()) for row, found in zip(y, drawn)]
    print("C2ST", np.round(scores, 3), np.mean(scores))
    # The network alone: 0.85 in the literature; one that knew the noise exactly: 0.5.
    assert np.mean(scores) < 0.78
    # Both modes of both standard deviations.
    for axis in (2, 3):
        assert ((drawn[..., axis] > 0).double().mean(1) - 0.5).abs().max() < 0.3


def crescents(z, generator):
    """Two moons: a point on a narrow crescent, folded over the parameters, uniform on (-1, 1)."""
    theta = _uniform(z) / 3
    angle = np.pi * (torch.rand(len(z), generator=generator).double() - 0.5)
    radius = 0.1 + 0.01 * torch.randn(len(z), generator=generator).double()
    fold = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / 2**0.5
    return fold + torch.stack([radius * torch.cos(angle) + 0.25, radius * torch.sin(angle)], 1)


def on_crescents(y, n, seed):
    """Draws (n, 2) of the parameters given a point (2,): the fold taken back for points of the narrow crescent."""
    generator, found = random(seed), []
    while sum(map(len, found)) < n:
        drawn = (y - crescents(torch.zeros(n, 2).double(), generator)) * 2**0.5   # which fold nothing
        side = 2 * torch.randint(0, 2, (n,), generator=generator) - 1
        total, apart = -side * drawn[:, 0], drawn[:, 1]
        theta = torch.stack([total - apart, total + apart], 1) / 2
        found.append(theta[(drawn[:, 0] <= 0) & (theta.abs() < 1).all(1)])
    return torch.cat(found)[:n]


@pytest.mark.slow
def test_noise_of_no_normal_law_is_learnt_as_a_mixture():
    theta = 2 * torch.rand(PAIRS, 2, generator=random(1), dtype=torch.float64) - 1
    law = uniform(-1, 2)
    generator = random(2)
    denoiser, _ = fit_denoiser(theta, crescents(torch.special.ndtri((theta + 1) / 2), generator), prior=law,
                               progress=False)
    assert denoiser.known and denoiser.network is None and denoiser.base.learnt.components >= 4
    y = crescents(torch.randn(6, 2, generator=generator, dtype=torch.float64), generator)
    scores = []
    for row in y:
        found = sample_latents(denoiser.at(row[None]), SAMPLES, seed=0, progress=False)[0]
        scores.append(c2st(on_crescents(row, SAMPLES, 7).numpy(), found.numpy()))
    print("C2ST", np.round(scores, 3), np.mean(scores))
    # 0.51; at a fold of the moons 0.59, elsewhere what chance makes. One normal law has 0.79.
    assert np.mean(scores) < 0.54
