"""Exact networks for laws that the base misses, shared by the tests of samplers and densities."""

import numpy as np
import torch

from fem_diffusion.diffusion import (
    Denoiser, FieldGeometry, GaussianBase, LayoutFamily, LayoutKind, Sampler, fit_spectrum, linear_base, sample_latents,
)
from fem_diffusion.diffusion.base.emulator import affine_emulator


def flat_base(r, k=2):
    """A base that says little: standard normal latents and measurements without influence."""
    return linear_base(torch.zeros(k, r, dtype=torch.float64), torch.eye(k, dtype=torch.float64))


class Known:
    """A score network of a user's own that needs no measurement: a function of states and angles.

    It answers for all measurements alike.
    """

    dtype = torch.float64

    def __init__(self, function):
        self.function = function

    def see(self, base, layout, y, located):
        return ()

    def context(self, *seen):
        return seen

    def __call__(self, v, angle):
        return self.function(v, angle)


class GaussianTruth(Known):
    """The exact N for w_0 ~ N(mean, covariance), from conditioning the joint Gaussian of w_0, noise and v."""

    def __init__(self, mean, covariance):
        self.mean, (self.values, self.axes) = torch.as_tensor(mean), torch.linalg.eigh(torch.as_tensor(covariance))

    def __call__(self, v, angle):
        c, s = torch.cos(angle), torch.sin(angle)
        white = (v - c * self.mean) @ self.axes / (c**2 * self.values + s**2)
        signal = self.mean + (c * self.values * white) @ self.axes.T
        return s * signal - c * s * white @ self.axes.T


class MixtureTruth(Known):
    """The exact N for a mixture of normals in one dimension."""

    def __init__(self, weights=(0.3, 0.7), means=(-2.0, 1.5), stds=(0.3, 0.5)):
        self.weights, self.means, self.stds = (torch.tensor(x, dtype=torch.float64) for x in (weights, means, stds))

    def __call__(self, v, angle):
        c, s = torch.cos(angle), torch.sin(angle)
        variance = c**2 * self.stds**2 + s**2
        error = v - c * self.means
        share = torch.softmax(torch.log(self.weights) - error**2 / (2 * variance) - torch.log(variance) / 2, dim=-1)
        signal = self.means + c * self.stds**2 * error / variance
        return (share * (s * signal - c * s * error / variance)).sum(-1, keepdim=True)

    def draw(self, n, seed):
        """Samples, shape (n, 1)."""
        generator = torch.Generator().manual_seed(seed)
        mode = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        white = torch.randn(n, generator=generator, dtype=torch.float64)
        return (self.means[mode] + self.stds[mode] * white)[:, None]

    def standardised(self):
        """The same mixture with mean 0 and variance 1, as a base leaves it."""
        mean = self.weights @ self.means
        std = (self.weights @ (self.stds**2 + self.means**2) - mean**2).sqrt()
        return MixtureTruth(self.weights.tolist(), ((self.means - mean) / std).tolist(), (self.stds / std).tolist())


def gaussian_target(r=5):
    """Mean and covariance of a Gaussian that a flat base misses."""
    g = np.random.default_rng(3)
    root = g.standard_normal((r, r)) * np.linspace(0.06, 0.4, r)
    return 0.5 * g.standard_normal(r), root @ root.T + 0.01 * np.eye(r)


def spectrum_of(network, w):
    """Spectrum measured on samples w (n, r) of the posterior in base coordinates."""
    angles = (torch.arange(48, dtype=torch.float64) + 0.5) / 48 * torch.pi / 2
    white = torch.randn(w.shape, generator=torch.Generator().manual_seed(5), dtype=w.dtype)
    speeds = [network((torch.cos(a) * w + torch.sin(a) * white)[None], a.expand(1, 1, 1)) for a in angles]
    return fit_spectrum(angles, torch.stack([speed.square().mean() for speed in speeds]))


def at_zero(network=None, r=1, size=1, spectrum=None, support=None):
    """A denoiser with a flat base at `size` measurements of nothing."""
    y = torch.zeros(size, 2, dtype=torch.float64)
    return Denoiser(flat_base(r), network, spectrum, support).at(y)


def draw(conditioned, n, sampler, seed=0, **settings):
    """Latents (n, r) of one measurement."""
    return sample_latents(conditioned, n, sampler, seed=seed, progress=False, **settings)[0]


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def bent_map(z):
    """Two state coordinates of unit variance that are not affine in two latents."""
    grown = (torch.exp(0.5 * z[:, 0]) - np.exp(0.125)) / (np.exp(0.25) * (np.exp(0.25) - 1))**0.5
    return torch.stack([grown, (z[:, 1] + 0.3 * z[:, 0] * z[:, 1]) / 1.09**0.5], 1)


def turned_family(count=(1, 8)):
    """Sensors that look into every direction of two state coordinates."""
    turn = torch.linspace(0, torch.pi, 65, dtype=torch.float64)[:-1]
    rows = torch.stack([torch.cos(turn), torch.sin(turn)], 1)[:, None]
    std = torch.full((2, 64, 1), 0.3, dtype=torch.float64)
    return LayoutFamily((LayoutKind(rows, 0.1 * turn[:, None], std, count),))


def quadrature(layout, y):
    """Mean and covariance of p(z | y) for the bent map, on a fine grid."""
    line = torch.linspace(-6, 6, 601, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    misfit = (y - layout.offset - bent_map(z) @ layout.rows[0].T)**2 / layout.variance
    density = torch.softmax(-(z**2).sum(1) / 2 - misfit.sum(1) / 2, 0)
    mean = density @ z
    return mean.numpy(), ((z - mean).T * density @ (z - mean)).numpy()


def errors(conditioned, exact, corrections=None, n=4000):
    """Errors of mean, in posterior standard deviations, and of covariance, relative, against exact moments."""
    mean, covariance = exact
    z = draw(conditioned, n, Sampler(corrections=corrections), seed=1).numpy()
    white = np.linalg.solve(np.linalg.cholesky(covariance), (z - mean).T).T
    return np.linalg.norm(white.mean(0)), np.linalg.norm(np.cov(white, rowvar=False) - np.eye(2))


def scattered(r):
    """Nine points of a domain in two dimensions, and modes that are orthonormal there."""
    modes = torch.linalg.qr(torch.randn(9, r, generator=random(1), dtype=torch.float64)).Q.T * 3
    return FieldGeometry(modes, modes.T / 9, torch.randn(2, r, 9, generator=random(2)).double(),
                         torch.zeros(9).double(), torch.zeros(2, 9).double(), torch.ones(r).double())


def learnt_base(learnt, updates=1):
    """A base with learnt noise under a random affine emulator."""
    r, k = learnt.network.config["r"], len(learnt.sensors)
    emulator = affine_emulator(torch.randn(k, r, generator=random(1)).double(), torch.ones(k), torch.eye(k).double())
    return GaussianBase(torch.zeros(r).double(), torch.eye(r).double(), emulator, updates, learnt=learnt)
