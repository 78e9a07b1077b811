"""Readings of which many are equal: where they are spread to, and that densities of them are probabilities."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from fem_diffusion.diffusion import TrainingOptions, fit_denoiser, sample_latents
from fem_diffusion.diffusion.training.cells import spread_over_cells
from fem_diffusion.diffusion.training.scatter import fit_noise
from fem_diffusion.errors import InputError
from truths import random

N = 4000
QUICK = TrainingOptions(steps=1500, evaluate_every=100, width=32, depth=2, batch=128)


def test_readings_fill_their_cells_and_others_stay():
    """Counts, rounded and uneven values, yes or no, and a number that never comes again."""
    values = [torch.arange(5.0), torch.arange(-3, 4) * 0.1, torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 1.0])]
    y = torch.stack([x[torch.randint(len(x), (N,), generator=random(i))] for i, x in enumerate(values)], 1).double()
    y = torch.cat([y, torch.randn(N, 1, generator=random(4)).double()], 1)
    spread = spread_over_cells(y)
    drawn = spread(y, random(5))
    torch.testing.assert_close(drawn[:, 4], y[:, 4], rtol=0, atol=0)
    for i, place, low, high in [(0, 3.0, 2.5, 3.5), (0, 0.0, -0.5, 0.5), (1, 0.3, 0.25, 0.35), (2, 0.0, -0.5, 0.5),
                                (2, 1.0, 0.5, 2.0), (2, 4.0, 3.0, 5.0), (3, 1.0, 0.5, 1.5)]:
        some = drawn[(y[:, i] - place).abs() < 1e-6, i].numpy()
        assert len(some) > 300 and kstest(some, "uniform", (low, high - low)).pvalue > 1e-3
    # A larger count than all of the training.
    more = spread(torch.full_like(y, 7.0), random(6))
    assert (more[:, 0] >= 3.5).all() and (more[:, 0] <= 4.5).all()


def test_what_is_far_or_rare_makes_no_cells():
    """A number that stands for a failed sensor, and readings of which many stop at a limit."""
    counts = torch.poisson(torch.full((N, 1), 2.0).double(), generator=random())
    counts[:4] = -999.0
    drawn = spread_over_cells(counts)(counts, random(1))
    assert (drawn - counts).abs().max() <= 1 and kstest(drawn[counts == 1].numpy(), "uniform", (0.5, 1)).pvalue > 1e-3
    clipped = torch.randn(N, 1, generator=random(2)).double().clamp(min=0.2)
    torch.testing.assert_close(spread_over_cells(clipped)(clipped, random(3)), clipped, rtol=0, atol=0)


def _law(z):
    return torch.distributions.Poisson(torch.exp(0.5 + 0.8 * z))


@pytest.mark.parametrize("spread", [True, False])
def test_a_learnt_density_of_counts_is_their_probability(spread):
    z, fresh = (torch.randn(N, 1, generator=random(i), dtype=torch.float64) for i in (0, 1))
    y, other = (torch.poisson(_law(x).rate, generator=random(2 + i)) for i, x in enumerate((z, fresh)))
    draw = spread_over_cells(y) if spread else lambda y, generator: y

    def f(z):
        return 2.5 + 2 * z
    rest = draw(y, random(4)) - f(z)
    noise = fit_noise(z, y, f(z), rest.T @ rest / N, draw, QUICK, None, False)
    normal = torch.linalg.slogdet(noise.whitener)[1] - np.log(2 * np.pi) / 2
    off = noise.log_density(other - f(fresh), fresh) + normal - _law(fresh).log_prob(other)[:, 0]
    counts, few = torch.arange(100.0)[:, None].double(), torch.full((100, 1), -1.0).double()
    total = float((noise.log_density(counts - f(few), few) + normal).exp().sum())
    good = abs(float(off.mean())) < 0.07 and abs(total - 1) < 0.1
    # One that is learnt of the counts themselves heaps up at the small ones.
    assert good == spread, (float(off.mean()), total)


@pytest.mark.parametrize("decades", [False, True])
def test_posteriors_of_rounded_readings_are_exact(decades):
    """Halves of a line with noise, rounded, or powers of ten of them: none is smoothed twice, nor seen elsewhere."""
    z, line = torch.randn(N, 1, generator=random(), dtype=torch.float64), torch.linspace(-6, 6, 4001).double()
    whole = torch.round(2 * (0.8 * z + 0.2 * torch.randn(N, 1, generator=random(1), dtype=torch.float64)))
    denoiser, _ = fit_denoiser(z, 10**(whole / 2) if decades else whole, standard_prior=True, options=QUICK,
                               progress=False)
    normal = torch.distributions.Normal(0.0, 1.0)
    for q in (-3.0, 0.0, 2.0):
        y = torch.tensor([[10**(q / 2) if decades else q]]).double()
        high, low = (((q + side) / 2 - 0.8 * line) / 0.2 for side in (0.5, -0.5))
        weights = (normal.cdf(high) - normal.cdf(low)) * torch.exp(-line**2 / 2)
        weights /= weights.sum()
        mean = weights @ line
        std = (weights @ (line - mean)**2).sqrt()
        found = sample_latents(denoiser.at(y), N, seed=0, progress=False)[0]
        # Chance makes 0.016 and 0.011; the rest is what the pairs leave unknown.
        assert abs(float(found.mean() - mean) / float(std)) < 0.1 and abs(float(found.std() / std) - 1) < 0.06


def test_a_reading_that_is_always_the_same_is_refused():
    z = torch.randn(400, 1, generator=random(), dtype=torch.float64)
    y = torch.cat([z + 0.1 * torch.randn(400, 1, generator=random(1)), torch.full_like(z, 3.0)], 1)
    with pytest.raises(InputError, match=r"sensors \[1\] read the same in all pairs"):
        fit_denoiser(z, y, standard_prior=True, options=QUICK, progress=False)
