"""Noise that depends on the latents: its law, the posterior that goes with it, and what draws from that."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fem_diffusion.diffusion import Denoiser, Emulator
from fem_diffusion.diffusion.base.emulator import affine_emulator
from fem_diffusion.diffusion.base.learnt import LearntNoise, numbers
from fem_diffusion.diffusion.sampling.hamiltonian import hamiltonian_move
from fem_diffusion.diffusion.sampling.mixtures import fit_mixture, standard_normal
from fem_diffusion.diffusion.sampling.tempered import tempered
from truths import learnt_base, random

R, K = 3, 4


def _learnt(r=R, k=K, components=1, apart=False):
    """Some noise, of a network that has not learnt it."""
    size = k * numbers(1, components) if apart else numbers(k, components)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Emulator(r, size, 16, 2, scaled=False)
        torch.nn.init.normal_(network.head.weight, std=0.2)
    if components > 1:
        network.offset = 0.5 * torch.randn(size, generator=random(5)).double()
    whitener = torch.eye(k).double() + torch.rand(k, k, generator=random()).double().tril(-1)
    if apart:
        whitener = 0.5 + torch.rand(k, generator=random()).double()
    return LearntNoise(network.eval().requires_grad_(False), whitener, torch.arange(k), whitener.new_zeros(0, 0))


Y = torch.randn(2, K, generator=random(2)).double()


def test_its_density_is_that_of_its_moments():
    learnt = _learnt()
    assert learnt.components == 1
    z, rest = (torch.randn(6, n, generator=random(n)).double() for n in (R, K))
    mean, covariance = learnt.moments(z)
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(rest)
    found = learnt.log_density(rest, z)
    torch.testing.assert_close(found - found[0], exact - exact[0])
    some = torch.tensor([2, 0])
    part = learnt.select(some).log_density(rest[:, some], z)
    exact = torch.distributions.MultivariateNormal(mean[:, some], covariance[:, some][:, :, some]).log_prob(
        rest[:, some])
    torch.testing.assert_close(part - part[0], exact - exact[0])
    shift, pull = learnt.mean_with_pull(z)
    torch.testing.assert_close(shift, mean)
    at = z.clone().requires_grad_()
    exact, = torch.autograd.grad(learnt.moments(at)[0], at, rest)
    torch.testing.assert_close(pull(rest), exact, rtol=1e-4, atol=1e-4)
    # Many readings have few columns, and are whitened by their axes.
    assert numbers(40) < 40 * 15


def _exact(learnt, z):
    """The same law as torch has it: a mixture of normal laws of the entries of factors, one point at a time."""
    k, found = len(learnt.whitener), learnt.network(z)
    one, count = numbers(k), learnt.components
    identity, laws = torch.eye(k).double(), []

    def root(entries):
        low = torch.zeros(k, k).double()
        low[tuple(torch.tril_indices(k, k, -1))] = entries[2 * k:]
        return torch.diag(entries[k:2 * k].exp()) @ (identity + low)
    for row in found:
        T, parts = root(row[:one]), row[one + count:].view(count, one)
        back = torch.linalg.inv(T @ learnt.whitener)
        means = torch.stack([torch.linalg.inv(learnt.whitener) @ row[:k] + back @ part[:k] for part in parts])
        factors = torch.stack([back @ torch.linalg.inv(root(part)) for part in parts])
        laws.append((torch.softmax(row[one:one + count], 0), means, factors @ factors.mT))
    return [torch.stack(x) for x in zip(*laws)]


def _mixture(shares, means, covariances):
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(shares), torch.distributions.MultivariateNormal(means, covariances))


def test_a_mixture_is_that_of_its_laws():
    learnt = _learnt(components=3)
    assert learnt.components == 3
    z, rest = (torch.randn(6, n, generator=random(n)).double() for n in (R, K))
    shares, means, covariances = _exact(learnt, z)
    exact, found = _mixture(shares, means, covariances).log_prob(rest), learnt.log_density(rest, z)
    torch.testing.assert_close(found - found[0], exact - exact[0])
    some = torch.tensor([2, 0])
    exact = _mixture(shares, means[..., some], covariances[..., some, :][..., some]).log_prob(rest[:, some])
    part = learnt.select(some).log_density(rest[:, some], z)
    torch.testing.assert_close(part - part[0], exact - exact[0])
    mean, covariance = learnt.moments(z)
    torch.testing.assert_close(mean, (shares[..., None] * means).sum(1))
    second = (shares[..., None, None] * (covariances + means[..., None] * means[..., None, :])).sum(1)
    torch.testing.assert_close(covariance, second - mean[..., None] * mean[:, None])
    shift, pull = learnt.mean_with_pull(z)
    torch.testing.assert_close(shift, mean)
    at = z.clone().requires_grad_()
    exact, = torch.autograd.grad(learnt.moments(at)[0], at, rest)
    torch.testing.assert_close(pull(rest), exact, rtol=1e-4, atol=1e-4)


def test_readings_apart_have_mixtures_of_their_own():
    learnt = _learnt(components=3, apart=True)
    assert learnt.apart and learnt.components == 3 and learnt.words == "a mixture of 3 normal laws for each reading"
    z, rest = (torch.randn(6, n, generator=random(n)).double() for n in (R, K))
    # Rows: m, D, three shares, then mean and D of each law; columns: readings.
    found = learnt.network(z).view(6, 11, K)
    unit = (-found[:, 1]).exp() / learnt.whitener
    shares, means, spreads = found[:, 2:5], found[:, 5::2], (-found[:, 6::2]).exp()
    normal = torch.distributions.Normal(
        (found[:, 0] / learnt.whitener + unit * means.transpose(0, 1)).permute(1, 2, 0), (unit[:, None] * spreads).mT)
    law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=shares.mT), normal)
    exact, density = law.log_prob(rest), learnt.log_density(rest, z)
    torch.testing.assert_close(density - density[0], exact.sum(1) - exact[0].sum())
    some = torch.tensor([2, 0])
    part = learnt.select(some).log_density(rest[:, some], z)
    torch.testing.assert_close(part - part[0], exact[:, some].sum(1) - exact[0, some].sum())
    mean, covariance = learnt.moments(z)
    torch.testing.assert_close(mean, law.mean)
    torch.testing.assert_close(covariance, torch.diag_embed(law.variance))
    at = z.clone().requires_grad_()
    gradient, = torch.autograd.grad(learnt.moments(at)[0], at, rest)
    torch.testing.assert_close(learnt.mean_with_pull(z)[1](rest), gradient, rtol=1e-4, atol=1e-4)
    # Of what is left those kept tell nothing: a law of each is drawn.
    n, kept, left = 40000, torch.tensor([1, 3]), torch.tensor([0, 2])
    mean, covariance = learnt.others(rest[:1, kept].expand(n, -1), z[:1].expand(n, -1), kept, left, random(8))
    drawn = mean + (covariance.diagonal(dim1=1, dim2=2).sqrt() * torch.randn(n, 2, generator=random(9)).double())
    spread = law.variance[0, left].sqrt()
    assert ((drawn.mean(0) - law.mean[0, left]).abs() < 5 * spread / n**0.5).all()
    assert (drawn.std(0) / spread - 1).abs().max() < 0.05
    # Readings that say nothing stand beside them.
    order, inner = torch.tensor([4, 2, 0, 5, 1, 3]), 2 * torch.eye(2).double()
    wide = replace(learnt, sensors=order, aside=inner)
    mean, covariance = wide.moments(z)
    torch.testing.assert_close(mean[:, [1, 2, 4, 5]], law.mean[:, [2, 0, 1, 3]])
    torch.testing.assert_close(covariance[:, [0, 3]][..., [0, 3]], (4 * torch.eye(2).double()).expand(6, 2, 2))
    drawn = wide.sample(z[:1].expand(n, -1), random(3))
    assert (drawn.std(0) / covariance[0].diagonal().sqrt() - 1).abs().max() < 0.05


@pytest.mark.parametrize("components, apart", [(1, False), (3, False), (1, True), (3, True)])
@pytest.mark.parametrize("some", [[0, 3], [3], []])
def test_readings_that_say_nothing_leave_the_prior(components, apart, some):
    learnt = replace(_learnt(components=components, apart=apart), sensors=torch.tensor([4, 2, 0, 5, 1, 3]),
                     aside=2 * torch.eye(2).double()).select(torch.tensor(some, dtype=torch.int64))
    j, z = len(some), torch.randn(6, R, generator=random(1)).double()
    rest, none = torch.randn(6, j, generator=random(2)).double(), torch.tensor([], dtype=torch.int64)
    mean, covariance = learnt.moments(z)
    assert mean.shape == (6, j) and (mean == 0).all() and (covariance == 4 * torch.eye(j)).all()
    assert learnt.sample(z, random()).shape == (6, j)
    shift, pull = learnt.mean_with_pull(z)
    assert shift.shape == (6, j) and (pull(rest) == 0).all()
    assert learnt.log_density(rest, z).unique().numel() == 1
    assert all((part.abs() < 1e-12).all() for part in learnt.with_pull(rest, z))
    mean, covariance = learnt.others(rest[:, :0], z, none, torch.arange(j), random())
    assert mean.shape == (6, j) and (covariance == 4 * torch.eye(j)).all()


def test_readings_that_are_left_follow_those_kept():
    learnt, n = _learnt(components=3), 40000
    kept, left = torch.tensor([1, 3]), torch.tensor([0, 2])
    z, rest = torch.randn(1, R, generator=random(7)).double(), torch.tensor([0.7, -0.4]).double()
    mean, covariance = learnt.others(rest.expand(n, -1), z.expand(n, -1), kept, left, random(8))
    drawn = mean + (torch.linalg.cholesky(covariance) @ torch.randn(n, 2, 1, generator=random(9)).double())[..., 0]
    # By quadrature of the joint density on a grid.
    line = torch.linspace(-12, 12, 481).double()
    grid = torch.cartesian_prod(line, line)
    joint = torch.zeros(len(grid), K).double()
    joint[:, kept], joint[:, left] = rest, grid
    law = _mixture(*(x.expand(len(grid), *x.shape[1:]) for x in _exact(learnt, z)))
    weights = torch.softmax(law.log_prob(joint), 0)
    exact = weights @ grid
    spread = (weights @ (grid - exact)**2).sqrt()
    assert ((drawn.mean(0) - exact).abs() < 5 * spread / n**0.5).all()
    fourth = (weights @ (grid - exact)**4 / spread**4 - 1).sqrt()
    assert ((drawn.var(0) / spread**2 - 1).abs() < 5 * fourth / n**0.5).all()
    # With one normal law of the same moments in the place of the mixture it would fail.
    S = learnt.moments(z)
    gain = torch.linalg.solve(S[1][0][kept][:, kept], S[1][0][kept][:, left]).mT
    wrong = S[0][0, left] + gain @ (rest - S[0][0, kept])
    assert ((wrong - exact).abs() > 10 * spread / n**0.5).any()


@pytest.mark.parametrize("components, apart", [(1, False), (3, False), (3, True)])
def test_draws_and_selections_are_of_the_same_law(components, apart):
    learnt, n = _learnt(components=components, apart=apart), 40000
    z = torch.randn(1, R, generator=random(7)).double()
    drawn = learnt.sample(z.expand(n, -1), random(8))
    mean, covariance = learnt.moments(z)
    std = covariance[0].diagonal().sqrt()
    assert ((drawn.mean(0) - mean[0]).abs() < 5 * std / n**0.5).all()
    assert ((drawn.T.cov() - covariance[0]).abs() < 0.06 * std * std[:, None]).all()
    # Sensors in another order have densities of the same differences.
    z, rest = (torch.randn(6, size, generator=random(size)).double() for size in (R, K))
    order = torch.tensor([2, 0, 3, 1])
    found, other = learnt.log_density(rest, z), learnt.select(order).log_density(rest[:, order], z)
    torch.testing.assert_close(found - found[0], other - other[0])


@pytest.mark.parametrize("components, apart", [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("some", [None, [2, 0]])
def test_forces_are_gradients_of_energies(some, components, apart):
    denoiser, y = Denoiser(learnt_base(_learnt(components=components, apart=apart), 2), known=True), Y
    if some is not None:
        denoiser, y = denoiser.select(torch.tensor(some), torch.zeros(K, K), torch.zeros(2, 2), None), Y[:, some]
    density = denoiser.at(y).density
    w = torch.randn(5, 2, R, generator=random(4)).double().requires_grad_()
    exact, = torch.autograd.grad(density.energy(w).sum(), w)
    torch.testing.assert_close(density.force(w.detach()), exact, rtol=1e-4, atol=1e-4)


def test_a_base_follows_the_noise():
    """The first of two readings tells the first latent, and that how noisy the other reading of the other latent is."""
    learnt = _learnt(2, 2)
    for parameter in learnt.network.parameters():
        torch.nn.init.zeros_(parameter)
    # m, logarithms of the precision's root, and what they have in common.
    learnt.network.offset = torch.tensor([0.0, 0, 4, 0, 0]).double()
    learnt.network.matrix[3, 0] = -0.8
    learnt = replace(learnt, whitener=torch.eye(2).double())
    base = replace(learnt_base(learnt), emulator=affine_emulator(torch.eye(2), torch.zeros(2), torch.eye(2).double()))
    y = torch.tensor([[-1.5, 1.0], [1.5, 1.0]]).double()
    variance = torch.exp(1.6 * y[:, 0])
    joint, followed = (Denoiser(replace(base, updates=n), known=True).at(y).located for n in (1, 6))
    torch.testing.assert_close(followed.mean[:, 1], 1 / (1 + variance), rtol=0.05, atol=0)
    torch.testing.assert_close(followed.std[:, 1]**2, variance / (1 + variance), rtol=0.05, atol=0)
    assert ((joint.mean[:, 1] * (1 + variance) - 1).abs() > 0.3).all()


def _two_modes(w):
    """Normal laws around -2 and 2 of width 0.2, with shares of 0.2 and 0.8, and a standard normal coordinate."""
    parts = torch.stack([-(w[..., 0] + 2)**2 / 0.08 + np.log(0.2), -(w[..., 0] - 2)**2 / 0.08 + np.log(0.8)])
    return w[..., 1]**2 / 2 - torch.logsumexp(parts, 0)


def test_a_mixture_is_fitted_to_points():
    """Two lanes: two modes with shares of 0.2 and 0.8, and one normal law with a correlation."""
    generator = random(3)
    white = torch.randn(2000, 2, 2, generator=generator).double()
    left = torch.rand(2000, generator=generator) < 0.2
    points = torch.stack([0.1 * white[:, 0] + torch.where(left, -3.0, 3.0)[:, None],
                          white[:, 1] @ torch.tensor([[1.0, 0.9], [0.0, 0.4]]).double()], 1)
    law = fit_mixture(points, 0)
    drawn = law.draw(20000, generator)
    # Nine tenths are the law of the points, one is standard normal.
    near = (drawn[:, 0, 0] + 3).abs() < 0.5
    far = (drawn[:, 0, 0] - 3).abs() < 0.5
    assert abs(float(near.double().mean()) - 0.9 * 0.2) < 0.03 and abs(float(far.double().mean()) - 0.9 * 0.8) < 0.03
    covariance = drawn[:, 1].T @ drawn[:, 1] / 20000
    exact = torch.tensor([[0.9 + 0.1, 0.9 * 0.9], [0.9 * 0.9, 0.9 * (0.81 + 0.16) + 0.1]])
    assert (covariance - exact).abs().max() < 0.15
    at = drawn[:50].clone().requires_grad_()
    energy = law.energy(at)
    exact = _mixture(law.shares.exp(), law.means, torch.linalg.inv(law.roots @ law.roots.mT)).log_prob(at)
    torch.testing.assert_close(energy, -exact)
    gradient, = torch.autograd.grad(energy.sum(), at)
    torch.testing.assert_close(law.force(at.detach()), gradient)


def test_tempering_gives_modes_what_is_due_to_them():
    def force(w):
        with torch.enable_grad():
            at = w.detach().requires_grad_()
            return torch.autograd.grad(_two_modes(at).sum(), at)[0]
    like = torch.zeros(2, 2).double()
    w, integral, _ = tempered(standard_normal(like), 4000, _two_modes, force, 5, random(1))
    # Both laws have as much under them as a normal one of width 0.2; 4,000 points err by 0.03.
    torch.testing.assert_close(integral, torch.full((2,), np.log(2 * np.pi * 0.2)).double(), rtol=0, atol=0.15)
    share = (w[..., 0] > 0).double().mean(0)
    assert ((share - 0.8).abs() < 0.05).all()
    away = (w[..., 0].abs() - 2) / 0.2
    assert away.mean(0).abs().max() < 0.1 and (away.std(0) - 1).abs().max() < 0.1
    assert w[..., 1].mean(0).abs().max() < 0.1 and (w[..., 1].std(0) - 1).abs().max() < 0.1
    # Moves alone leave half of the points on each side.
    start = torch.randn(4000, 2, 2, generator=random()).double()
    for _ in range(50):
        start, _ = hamiltonian_move(start, _two_modes, force, 0.1, 5, random(2))
    assert ((start[..., 0] > 0).double().mean(0) - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("apart", [False, True])
def test_far_from_the_training_some_readings_have_a_law(apart):
    """There a network says anything, and spreads of no size a number has."""
    learnt = _learnt(components=1 + apart, apart=apart)
    learnt.network.matrix[K:2 * K] = 400.0
    z, rest = torch.tensor([[2.0, 1.0, 0.0], [-2.0, -1.0, 0.0]]).double(), torch.ones(2, K).double()
    part = learnt.select(torch.tensor([2, 0]))
    assert torch.isfinite(part.moments(z)[1]).all() and not part.log_density(rest[:, :2], z).isnan().any()
