"""Noise that is learnt from pairs which hold it: its density, what draws from it, and who is believed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import uniform

from fem_diffusion import files
from fem_diffusion.diffusion import (
    Denoiser, Emulator, GaussianBase, History, Sampler, TrainingOptions, emulator_density, fit_denoiser, linear_base,
    log_density, sample_latents,
)
from fem_diffusion.diffusion.base.emulator import affine_emulator
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.base.learnt import LearntNoise, numbers
from fem_diffusion.diffusion.packing import REMEDY, pack_denoiser, unpack_denoiser
from fem_diffusion.diffusion.sampling.hamiltonian import hamiltonian_move
from fem_diffusion.diffusion.sampling.mixtures import fit_mixture, standard_normal
from fem_diffusion.diffusion.sampling.tempered import tempered
from fem_diffusion.diffusion.training import scatter
from fem_diffusion.diffusion.training.choice import advantage
from fem_diffusion.diffusion.training.loop import Loop
from fem_diffusion.diffusion.training.scatter import fit_noise
from fem_diffusion.errors import FileError
from truths import Known, draw, errors, random

R, K = 3, 4
QUICK = TrainingOptions(steps=1500, evaluate_every=100, width=32, depth=2, batch=128)


def _learnt(r=R, k=K, components=1):
    """Some noise, of a network that has not learnt it."""
    size = numbers(k, components)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Emulator(r, size, 16, 2, scaled=False)
        torch.nn.init.normal_(network.head.weight, std=0.2)
    if components > 1:
        network.offset = 0.5 * torch.randn(size, generator=random(5)).double()
    whitener = torch.eye(k).double() + torch.rand(k, k, generator=random()).double().tril(-1)
    return LearntNoise(network.eval().requires_grad_(False), whitener, torch.arange(k), whitener.new_zeros(0, 0))


def _base(learnt, updates=1):
    r, k = learnt.network.config["r"], len(learnt.sensors)
    emulator = affine_emulator(torch.randn(k, r, generator=random(1)).double(), torch.ones(k), torch.eye(k).double())
    return GaussianBase(torch.zeros(r).double(), torch.eye(r).double(), emulator, updates, learnt=learnt)


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


@pytest.mark.parametrize("components", [1, 3])
def test_draws_and_selections_are_of_the_same_law(components):
    learnt, n = _learnt(components=components), 40000
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


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("some", [None, [2, 0]])
def test_forces_are_gradients_of_energies(some, components):
    denoiser, y = Denoiser(_base(_learnt(components=components), 2), known=True), Y
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
    base = replace(_base(learnt), emulator=affine_emulator(torch.eye(2), torch.zeros(2), torch.eye(2).double()))
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
                        ("whitener", np.zeros((2, 2)))):
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
    base = _base(replace(noise, whitener=noise.whitener.flip(0) * 1e-13))
    for flip in (1.0, -1.0):
        whitener = base.learnt.whitener.clone()
        whitener[0] *= flip
        denoiser = Denoiser(replace(base, learnt=replace(base.learnt, whitener=whitener)), known=True)
        files.write(tmp_path / "model", "model", *pack_denoiser(denoiser, History()))
        again = unpack_denoiser(files.read(tmp_path / "model", "model", REMEDY))[0]
        torch.testing.assert_close(again.base.learnt.whitener, whitener, rtol=0, atol=0)


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
        monkeypatch.setattr(scatter, "_trained", lambda task, *given: Loop(task, *given[:2]).run(False))
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


def test_far_from_the_training_some_readings_have_a_law():
    """There a network says anything, and spreads of no size a number has."""
    learnt = _learnt()
    learnt.network.matrix[K:2 * K] = 400.0
    z, rest = torch.tensor([[2.0, 1.0, 0.0], [-2.0, -1.0, 0.0]]).double(), torch.ones(2, K).double()
    part = learnt.select(torch.tensor([2, 0]))
    assert torch.isfinite(part.moments(z)[1]).all() and not part.log_density(rest[:, :2], z).isnan().any()


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
