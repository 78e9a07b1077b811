"""Readings of which many are equal: where they are spread to, and that densities of them are probabilities."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from fem_diffusion.diffusion import TrainingOptions, fit_denoiser
from fem_diffusion.diffusion.training.cells import spread_over_cells
from fem_diffusion.diffusion.training.scatter import fit_noise
from fem_diffusion.errors import InputError
from truths import random

N = 4000
QUICK = TrainingOptions(steps=1500, evaluate_every=100, width=32, depth=2, batch=128)


def test_readings_fill_their_cells_and_others_stay():
    """Counts, rounded and uneven values, yes or no, and a number that never comes again."""
    values = [torch.arange(5.0), torch.arange(-3, 4) * 0.1, torch.tensor([0.0, 1.0, 10.0]), torch.tensor([0.0, 1.0])]
    y = torch.stack([x[torch.randint(len(x), (N,), generator=random(i))] for i, x in enumerate(values)], 1).double()
    y = torch.cat([y, torch.randn(N, 1, generator=random(4)).double()], 1)
    noise = spread_over_cells(y)
    drawn = noise.sample(y, random(5))
    torch.testing.assert_close(drawn[:, 4], y[:, 4], rtol=0, atol=0)
    for i, place, low, high in [(0, 3.0, 2.5, 3.5), (0, 0.0, -0.5, 0.5), (1, 0.3, 0.25, 0.35), (2, 0.0, -0.5, 0.5),
                                (2, 1.0, 0.5, 5.5), (2, 10.0, 5.5, 14.5), (3, 1.0, 0.5, 1.5)]:
        some = drawn[(y[:, i] - place).abs() < 1e-6, i].numpy()
        assert len(some) > 300 and kstest(some, "uniform", (low, high - low)).pvalue > 1e-3
    # A larger count than all of the training.
    more = noise.sample(torch.full_like(y, 7.0), random(6))
    assert (more[:, 0] >= 3.5).all() and (more[:, 0] <= 4.5).all()
    assert spread_over_cells(y[:, 4:]) is None


def _law(z):
    return torch.distributions.Poisson(torch.exp(0.5 + 0.8 * z))


@pytest.mark.parametrize("spread", [True, False])
def test_a_learnt_density_of_counts_is_their_probability(spread):
    z, fresh = (torch.randn(N, 1, generator=random(i), dtype=torch.float64) for i in (0, 1))
    y, other = (torch.poisson(_law(x).rate, generator=random(2 + i)) for i, x in enumerate((z, fresh)))
    draw = spread_over_cells(y).sample if spread else lambda y, generator: y

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


def test_counts_are_seen_spread_in_training(monkeypatch):
    z = torch.randn(400, 1, generator=random(), dtype=torch.float64)
    y, seen = torch.poisson(_law(z).rate, generator=random(1)), []

    def stop(z, y, slopes, parts, *_):
        seen.append(parts.measure(y, random(2))[1])
        raise StopIteration
    monkeypatch.setattr("fem_diffusion.diffusion.training.fit.candidates", stop)
    with pytest.raises(StopIteration):
        fit_denoiser(z, y, standard_prior=True, scales="identity", options=QUICK, progress=False)
    # Of larger counts some are missing, and their neighbours' cells are wider.
    assert ((seen[0] - y).abs()[y < 4] <= 0.5).all() and len(seen[0].unique()) == 400


def test_a_reading_that_is_always_the_same_is_refused():
    z = torch.randn(400, 1, generator=random(), dtype=torch.float64)
    y = torch.cat([z + 0.1 * torch.randn(400, 1, generator=random(1)), torch.full_like(z, 3.0)], 1)
    with pytest.raises(InputError, match=r"sensors \[1\] read the same in all pairs"):
        fit_denoiser(z, y, standard_prior=True, options=QUICK, progress=False)
