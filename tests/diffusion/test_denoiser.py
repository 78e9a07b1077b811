"""A denoiser at measurements: which share what, in parts, on devices, and networks of a user's own."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion import (
    Denoiser, Emulator, GaussianBase, Layout, ResidualMLP, Sampler, ScoreNetwork, SensorNetwork, Spectrum, Support,
    linear_base, log_density, plain_base, sample_latents,
)
from fem_diffusion.diffusion.network import NETWORKS
from fem_diffusion.errors import InputError
from truths import draw, random

R, K, STD = 3, 2, 0.5
OPERATOR = torch.randn(K, R, generator=random(1), dtype=torch.float64)
Y = torch.randn(4, K, generator=random(2), dtype=torch.float64)
NOISE = STD**2 * torch.eye(K, dtype=torch.float64)
EXACT = Denoiser(linear_base(OPERATOR, NOISE)).at(Y).located


class Mine(nn.Module):
    """A user's network that knows the posterior under a base that standardises, and may write into what it gets.

    It sees the measurement alone; of that it makes mean and covariance of the posterior in base coordinates.
    """

    dtype = torch.float64

    def __init__(self, rude):
        super().__init__()
        self.rude = rude
        self.register_buffer("matrix", OPERATOR)

    def see(self, base, layout, y, located):
        return y, located.mean, located.whitener

    def context(self, y, centre, whitener):
        posterior = torch.linalg.inv(torch.eye(R).double() + self.matrix.T @ self.matrix / STD**2)
        mean = y @ self.matrix @ posterior / STD**2
        white = (mean - centre) @ whitener[0].T
        return white, (whitener[0] @ posterior @ whitener[0].T)[None]

    def forward(self, v, angle, mean, covariance):
        c, s = torch.cos(angle), torch.sin(angle)
        # All states of a call are of one angle.
        total = c[0, 0]**2 * covariance[0] + s[0, 0]**2 * torch.eye(R).double()
        white = torch.linalg.solve(total, (v - c * mean).flatten(0, 1).T).T.view_as(v)
        result = s * (mean + c * white @ covariance[0]) - c * s * white
        for x in (v, angle, mean, covariance) if self.rude else ():
            x.fill_(7.0)
        return result


def _mine(rude=True):
    z = torch.randn(500, R, generator=random(), dtype=torch.float64)
    return Denoiser(plain_base(z, z @ OPERATOR.T, NOISE), Mine(rude))


def test_a_network_of_a_users_own_is_one_and_may_write_into_what_it_gets():
    assert isinstance(Mine(True), ScoreNetwork)
    conditioned = _mine().at(Y)
    assert len(conditioned) == 4 and conditioned.r == R
    z = sample_latents(conditioned, 2000, Sampler(method="heun", steps=150), seed=0)
    for i in range(4):
        assert min(moment_p_values(z[i].numpy(), EXACT.mean[i].numpy(), EXACT.covariance[0].numpy())) > 1e-4
    exact = [torch.distributions.MultivariateNormal(mean, EXACT.covariance[0]).log_prob(part[:5])
             for mean, part in zip(EXACT.mean, z)]
    # What is differentiated cannot be written into.
    density = log_density(_mine(rude=False).at(Y), z[:, :5], chunk=7)
    torch.testing.assert_close(density, torch.stack(exact), rtol=0, atol=1e-3)
    # The base alone, and the network of another measurement, are other laws.
    mean, covariance = conditioned.context
    for broken in (Denoiser(_mine().base).at(Y), replace(conditioned, context=(-mean, covariance))):
        found = draw(broken, 2000, Sampler(method="heun", steps=150)).numpy()
        assert min(moment_p_values(found, EXACT.mean[0].numpy(), EXACT.covariance[0].numpy())) < 1e-6


def test_every_network_of_the_registry_is_one():
    for name, kind in NETWORKS.items():
        assert all(hasattr(kind, part) for part in ("dtype", "see", "context", "__call__")), name


@pytest.mark.parametrize("network", [3, "latents", nn.Linear(R, R), lambda v, angle: v])
def test_what_is_no_network_is_refused(network):
    with pytest.raises(InputError, match="network is of type .*: give a ScoreNetwork or None"):
        Denoiser(linear_base(OPERATOR, NOISE), network)
    with pytest.raises(InputError, match="network is the class ResidualMLP: give an object of it"):
        Denoiser(linear_base(OPERATOR, NOISE), ResidualMLP)


def _random(network):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def _bent_base(updates):
    """A base whose emulator is not affine: each measurement has a factor of its own."""
    emulator = Emulator(R, K, 8, 1)
    emulator.matrix, emulator.residual, emulator.scale = OPERATOR, 0.1 * torch.eye(K).double(), torch.eye(K).double()
    _random(emulator)
    return GaussianBase(torch.zeros(R).double(), torch.eye(R).double(), emulator, updates)


def _layouts(size):
    """Random layouts of three sensors."""
    g = random(size)
    return Layout(torch.randn(size, 3, K, generator=g).double(), torch.zeros(size, 3).double(),
                  0.1 + torch.rand(size, 3, generator=g).double(), torch.ones(size, 3, dtype=torch.bool))


CASES = {"shared": lambda: Denoiser(linear_base(OPERATOR, NOISE), _random(ResidualMLP(R, K, 16, 1))).at(Y),
         "own": lambda: Denoiser(_bent_base(3), _random(ResidualMLP(R, K, 16, 1)), known=True).at(Y),
         "user": lambda: _mine().at(Y),
         "layouts": lambda: Denoiser(_bent_base(3), _random(SensorNetwork(R, K, 16, 1)), known=True).at(
             torch.cat([Y, Y[:, :1]], 1), _layouts(4)),
         "layout": lambda: Denoiser(_bent_base(3), _random(SensorNetwork(R, K, 16, 1)), known=True).at(
             torch.cat([Y, Y[:, :1]], 1), _layouts(1))}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
def test_a_selection_is_what_its_measurements_are(case):
    conditioned, index = CASES[case](), torch.tensor([2, 0, 2])
    part = conditioned.select(index)
    assert len(part) == 3
    v = torch.randn(5, 4, R, generator=random(3), dtype=torch.float64)
    same = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(part.residual(v[:, index], 0.7), conditioned.residual(v, 0.7)[:, index], **same)
    torch.testing.assert_close(part.denoise(v[:, index], 0.7), conditioned.denoise(v, 0.7)[:, index], **same)
    torch.testing.assert_close(part.located.colour(v[:, index]), conditioned.located.colour(v)[:, index])
    torch.testing.assert_close(part.located.whiten(v[:, index]), conditioned.located.whiten(v)[:, index])
    if conditioned.density is not None:
        torch.testing.assert_close(part.density.energy(v[:, index]), conditioned.density.energy(v)[:, index])
        torch.testing.assert_close(part.density.force(v[:, index]), conditioned.density.force(v)[:, index], **same)
    # One measurement may be taken several times over.
    one = conditioned.select(torch.tensor([1])).select(torch.tensor([0, 0]))
    assert len(one) == 2
    torch.testing.assert_close(one.residual(v[:, [1, 1]], 0.7), conditioned.residual(v, 0.7)[:, [1, 1]], **same)
    torch.testing.assert_close(one.located.mean, conditioned.located.mean[[1, 1]])


@each_case
@pytest.mark.parametrize("rows", [1, 3, 7, 19, 20])
def test_evaluations_in_parts_are_those_at_once(case, rows):
    conditioned = CASES[case]()
    for v in (torch.randn(n, 4, R, generator=random(3), dtype=torch.float64) for n in (1, 5)):
        torch.testing.assert_close(conditioned.residual(v, 0.7, rows), conditioned.residual(v, 0.7), rtol=1e-5,
                                   atol=1e-6)
        one = conditioned.select(torch.tensor([1]))
        torch.testing.assert_close(one.residual(v[:, 1:2], 0.7, rows), conditioned.residual(v, 0.7)[:, 1:2], rtol=1e-5,
                                   atol=1e-6)


@each_case
def test_a_copy_on_a_device_is_apart(case):
    conditioned = replace(CASES[case](), spectrum=Spectrum(torch.ones(1), torch.ones(1)),
                          support=Support(torch.full((R,), -9.0), torch.full((R,), 9.0)))
    moved = conditioned.to("meta")
    located = moved.located
    for part in (*(getattr(located, f.name) for f in fields(located)), *moved.context):
        assert part.device.type == "meta"
    if moved.density is not None:
        assert {moved.density.rows.device.type, moved.density.located.factor.device.type,
                moved.density.base.emulator.matrix.device.type, moved.density.base.mean.device.type} == {"meta"}
    assert {x.device.type for x in moved.network.state_dict().values()} == {"meta"}
    assert {x.device.type for x in conditioned.network.state_dict().values()} == {"cpu"}
    assert conditioned.located.mean.device.type == "cpu"
    before = draw(conditioned, 3, Sampler(steps=2))
    again = conditioned.to("cpu")
    for parameter in again.network.state_dict().values():
        parameter.fill_(9.0)
    torch.testing.assert_close(draw(conditioned, 3, Sampler(steps=2)), before, rtol=0, atol=0)
    with pytest.raises(InputError, match="device is 'cuda:99'"):
        conditioned.to("cuda:99")


def test_a_denoiser_moves_as_a_whole():
    denoiser = Denoiser(_bent_base(3), _random(ResidualMLP(R, K, 16, 1)), known=True)
    moved = denoiser.to("meta")
    assert moved.known and moved.base.updates == 3 and moved.base.emulator.matrix.device.type == "meta"
    assert moved.network.head.weight.device.type == "meta" and denoiser.network.head.weight.device.type == "cpu"
    back = denoiser.to("cpu").at(Y)
    torch.testing.assert_close(draw(back, 3, Sampler()), draw(denoiser.at(Y), 3, Sampler()))


def test_samples_of_measurements_together_have_the_laws_that_they_have_alone():
    conditioned = replace(CASES["own"](), network=None, context=())
    together = sample_latents(conditioned, 3000, Sampler(corrections=10), seed=0)
    for i in range(4):
        alone = draw(conditioned.select(torch.tensor([i])), 3000, Sampler(corrections=10), seed=5)
        spread = alone.std(0)
        assert ((together[i].mean(0) - alone.mean(0)).abs() < 5 * spread * np.sqrt(2 / 3000)).all()
        assert ((together[i].std(0) / spread - 1).abs() < 5 * np.sqrt(1 / 3000)).all()
