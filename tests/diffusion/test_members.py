"""Networks trained side by side: each as if it were alone, their mean as one network, better than they are."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fem_diffusion.diffusion import (
    NETWORKS, CallableNoise, Denoiser, MeanNetwork, Layout, Sampler, ScoreModule, TrainingOptions, fit_denoiser,
)
from fem_diffusion.diffusion.network import build
from fem_diffusion.diffusion.training.batched import Batched, flat
from fem_diffusion.diffusion.training.denoising import Denoising
from fem_diffusion.diffusion.training.loop import Loop
from fem_diffusion.errors import InputError
from truths import bent_map, draw, flat_base, random, scattered, turned_family

R, K = 3, 2
QUICK = TrainingOptions(steps=300, evaluate_every=100, width=32, depth=2, batch=64, members=3)
NOISE = CallableNoise(lambda y, g: y + 0.1 * torch.randn(y.shape, generator=g, dtype=y.dtype))


def _pairs(n=600):
    z = torch.randn(n, R, generator=random(), dtype=torch.float64)
    return z, z[:, :K]**2


def _train(options=QUICK, noise=NOISE, **settings):
    return fit_denoiser(*_pairs(), noise, options=options, progress=False, **settings)


def _weights(network):
    return torch.cat([x.flatten() for x in network.parameters()])


def _networks(name, members):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = [build(name, R, K, 8, 1, scattered(R) if name == "field" else None) for _ in range(members)]
        for parameter in (x for network in networks for x in network.parameters()):
            nn.init.normal_(parameter, std=0.3)
    return networks


def _conditioned(name, network, size=4):
    layout = None
    if name == "sensors":
        layout = Layout(torch.randn(size, 5, K, generator=random(1)).double(), torch.zeros(size, 5).double(),
                        torch.ones(size, 5).double(), torch.arange(5) < torch.arange(1, 5)[:, None])
    y = torch.randn(size, K if layout is None else 5, generator=random(2), dtype=torch.float64)
    return Denoiser(flat_base(R, K), network.eval().requires_grad_(False)).at(y, layout)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_mean_network_answers_with_the_mean(name):
    networks = _networks(name, 3)
    v, parts = torch.randn(5, 4, R, generator=random(3)).double(), torch.tensor([2, 0])
    each = torch.stack([_conditioned(name, network).residual(v, 0.7) for network in networks])
    together = _conditioned(name, MeanNetwork(networks))
    torch.testing.assert_close(together.residual(v, 0.7), each.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.select(parts).residual(v[:, parts], 0.7), each.mean(0)[:, parts],
                               rtol=1e-4, atol=1e-5)
    assert (each[0] - each[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_gradients_of_several_are_those_of_each_alone(name):
    networks, batches = _networks(name, 3), []
    base, g = flat_base(R, K), random(4)
    for _ in networks:
        v = torch.randn(1, 6, R, generator=g)
        layout = turned_family((3, 4)).draw(6, g) if name == "sensors" else Layout.readings(K, torch.ones(1).double())
        y = torch.randn(6, layout.rows.shape[1], generator=g, dtype=torch.float64)
        seen = networks[0].see(base, layout, y, base.locate(layout, y))
        batches.append((v, torch.rand(1, 6, 1, generator=g), torch.randn(1, 6, R, generator=g), *seen))

    def loss(network, v, angle, target, *seen):
        return (network(v, angle, *network.context(*seen)) - target).square().mean()
    weights = torch.stack([flat(network) for network in networks]).requires_grad_()
    found = Batched(networks[0], loss)(weights, batches)
    slopes, = torch.autograd.grad(found.sum(), weights)
    for network, batch, value, slope in zip(networks, batches, found, slopes):
        alone = loss(network, *batch)
        alone.backward()
        torch.testing.assert_close(value, alone)
        torch.testing.assert_close(slope, torch.cat([x.grad.flatten() for x in network.parameters()]),
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("members", [1, 2])
def test_a_step_is_that_of_torch_for_each_member(members, monkeypatch):
    """Clipping, AdamW, learning rate and average, written down once more with what torch has for one network."""
    batches, drawn = [], Denoising.draw

    def remember(self, *arguments):
        batches.append(drawn(self, *arguments))
        return batches[-1]
    monkeypatch.setattr(Denoising, "draw", remember)
    monkeypatch.setattr(Loop, "run", lambda self, progress: loops.append(self))
    loops, steps = [], 12
    # Targets this large have gradients that are clipped; the head is zero, and so are they at first.
    _train(replace(QUICK, members=members, learning_rate=0.02))
    loop, = loops
    networks = [copy.deepcopy(network) for network in loop.networks]
    averages = [copy.deepcopy(network) for network in loop.networks]
    loop.task.prepare(loop.generator)
    for _ in range(steps):
        loop._train_step()
        loop.step += 1
    norms = []
    for member, (network, average) in enumerate(zip(networks, averages)):
        optimiser = torch.optim.AdamW(network.parameters(), lr=0.02, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1, (n + 1) / 6) * (
            1 + math.cos(math.pi * n / 300)) / 2)
        for n in range(steps):
            optimiser.zero_grad()
            (8 * loop.task.loss(network, *batches[n * members + member])).backward()
            for x in network.parameters():
                x.grad /= 8
            norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)))
            optimiser.step()
            schedule.step()
            for x, mean in zip(network.parameters(), average.parameters()):
                share = (1 + n) / (10 + n) if n else 0.0
                mean.data = share * mean.data + (1 - share) * x.data
        torch.testing.assert_close(loop.weights[member].detach(), flat(network), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loop.average[member], flat(average), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(flat(loop.networks[member]), loop.average[member], rtol=0, atol=0)
    assert max(norms) > 1 > min(norms)


def test_the_mean_is_better_than_its_members_and_resumes(tmp_path, monkeypatch):
    whole, history = _train()
    assert isinstance(whole.network, MeanNetwork) and history.best_step > 0
    members = list(whole.network.members)
    assert len({round(float(_weights(member).sum()), 3) for member in members}) == 3
    z, y = _pairs(3000)
    y = NOISE.sample(y, random(9))
    w = whole.at(y).located.whiten(z)
    white = torch.randn(w.shape, generator=random(8), dtype=w.dtype)
    v, target = math.cos(0.6) * w + math.sin(0.6) * white, math.sin(0.6) * w - math.cos(0.6) * white

    def loss(network):
        return float((Denoiser(whole.base, network).at(y).residual(v[None], 0.6)[0] - target).square().mean())
    assert loss(whole.network) < min(loss(member) for member in members)
    save = Loop._save

    def interrupt(self, path):
        save(self, path)
        raise KeyboardInterrupt
    monkeypatch.setattr(Loop, "_save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _train(checkpoint=tmp_path / "state")
    monkeypatch.setattr(Loop, "_save", save)
    again, other = _train(checkpoint=tmp_path / "state")
    assert other.step == history.step and other.best_step == history.best_step
    np.testing.assert_allclose(other.validation, history.validation, rtol=1e-5)
    torch.testing.assert_close(_weights(again.network), _weights(whole.network), rtol=0, atol=1e-5)


def test_families_and_networks_on_a_mesh_have_members():
    few = replace(QUICK, steps=120, evaluate_every=60, members=2)
    root = torch.randn(800, 2, generator=random(), dtype=torch.float64)
    z = torch.sign(root) * root.abs()**0.5
    family = turned_family()
    denoiser, history = fit_denoiser(z, bent_map(z), family, options=few, progress=False)
    layout = family.draw(1, random(5))
    samples = draw(denoiser.at(layout.measure(bent_map(z[:1]), random(6)), layout), 50, Sampler(steps=4))
    assert isinstance(denoiser.network, MeanNetwork) and torch.isfinite(samples).all() and history.spread_ratio != 1
    field, _ = _train(few, network="field", geometry=scattered(R))
    assert isinstance(field.network, MeanNetwork) and field.network.mesh
    assert field.network.row_size == field.network.members[0].row_size > 0
    assert torch.isfinite(draw(field.at(torch.ones(1, K).double()), 50, Sampler(steps=4))).all()


class Branching(ScoreModule):
    """A network of a user's own whose work depends on the numbers."""

    def __init__(self, r, k, width, depth):
        super().__init__(r=r, k=k, width=width, depth=depth)
        self.layer, self.norm = nn.Linear(r, r), nn.BatchNorm1d(r) if depth == 1 else nn.Identity()

    def forward(self, v, angle, features):
        x = self.layer(v)
        if self.config["depth"] == 1:
            return self.norm(x.flatten(0, 1)).view(x.shape)
        return -x if bool(x.sum() > 0) else x


def test_networks_that_cannot_be_trained_so_are_refused(monkeypatch):
    monkeypatch.setitem(NETWORKS, "branching", Branching)
    with pytest.raises(InputError, match="Branching cannot be trained side by side.*members=1"):
        _train(network="branching")
    with pytest.raises(InputError, match="changes its buffers in training"):
        _train(replace(QUICK, depth=1, members=1), network="branching")
