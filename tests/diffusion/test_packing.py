"""Denoisers in files: what comes back is what went in, and what does not make up a denoiser is refused."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.stats import lognorm, loguniform
from torch import nn

from fem_diffusion import files
from fem_diffusion.diffusion import (
    NETWORKS, CallableNoise, Denoiser, Emulator, MeanNetwork, GaussianBase, GaussianNoise, History, Layout, Sampler,
    ScoreModule, Spectrum, StudentNoise, Support, TrainingOptions, fit_denoiser, join_noise, linear_base,
)
from fem_diffusion.diffusion.network import build, name_of
from fem_diffusion.diffusion.packing import (
    REMEDY, pack_denoiser, pack_noise, unpack_denoiser, unpack_law, unpack_noise,
)
from fem_diffusion.errors import FileError, InputError
from fem_diffusion.marginal import Marginal
from truths import GaussianTruth, draw, random, scattered

R, K = 3, 2
HISTORY = History([10], [1.0], [0.9], 1.0, 10, 0.9, 1.1)
Y = torch.randn(2, K, generator=random(), dtype=torch.float64)


def _denoiser(name, emulated=True, members=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = [None if name is None else build(name, R, K, 8, 1, scattered(R) if name == "field" else None)
                    for _ in range(members)]
        network = networks[0] if members == 1 else MeanNetwork(networks)
        emulator = Emulator(R, K, 8, 1 if emulated else 0)
        for module in (network, emulator):
            for parameter in () if module is None else module.parameters():
                nn.init.normal_(parameter, std=0.3)
    emulator.matrix, emulator.residual = torch.ones(K, R).double() * 0.5, 0.1 * torch.eye(K).double()
    emulator.scale = torch.eye(K).double()
    base = GaussianBase(torch.ones(R).double(), 2 * torch.eye(R).double(), emulator.requires_grad_(False), 3)
    spectrum = Spectrum(torch.ones(2).double(), torch.ones(2).double())
    support = Support(torch.full((R,), -torch.inf).double(), torch.full((R,), 50.0).double())
    return Denoiser(base, network and network.requires_grad_(False), spectrum, support, known=emulated)


def _written(path, denoiser, change=lambda arrays, values: None):
    arrays, values = pack_denoiser(denoiser, HISTORY)
    change(arrays, values)
    files.write(path, "model", arrays, values)
    return files.read(path, "model", REMEDY)


def _draws(denoiser, name):
    layout = None
    if name == "sensors":
        layout = Layout(torch.eye(K).double()[None], torch.zeros(1, K).double(), torch.ones(1, K).double(),
                        torch.ones(1, K, dtype=torch.bool))
    return draw(denoiser.at(Y, layout), 20, Sampler(steps=4))


@pytest.mark.parametrize("name", [None, *NETWORKS])
@pytest.mark.parametrize("emulated, members", [(False, 1), (True, 1), (True, 3)])
def test_what_comes_back_is_what_went_in(tmp_path, name, emulated, members):
    denoiser = _denoiser(name, emulated, members if name else 1)
    again, history = unpack_denoiser(_written(tmp_path / "model", denoiser))
    assert history == HISTORY and again.known == denoiser.known and again.base.updates == 3
    if name == "field":
        one = again.network.members[0] if members > 1 else again.network
        assert one.modes is None and not any("modes" in key for key in pack_denoiser(denoiser, HISTORY)[0])
        again = Denoiser(again.base, again.network.on(scattered(R)), again.spectrum, again.support, again.known)
    if name is not None:
        assert type(again.network) is (NETWORKS[name] if members == 1 else MeanNetwork) and not again.network.training
        assert name_of(again.network) == name
        assert not any(parameter.requires_grad for parameter in again.network.parameters())
    torch.testing.assert_close(_draws(again, name), _draws(denoiser, name), rtol=0, atol=0)
    assert torch.equal(again.spectrum.weights, denoiser.spectrum.weights)
    assert torch.equal(again.support.upper, denoiser.support.upper)


def test_a_base_alone_is_a_denoiser(tmp_path):
    denoiser = Denoiser(linear_base(torch.ones(K, R).double(), torch.eye(K).double()))
    again, history = unpack_denoiser(_written(tmp_path / "model", denoiser))
    assert (again.network, again.spectrum, again.support) == (None, None, None) and not again.known
    torch.testing.assert_close(again.at(Y).located.mean, denoiser.at(Y).located.mean, rtol=0, atol=0)


class Small(ScoreModule):
    """A linear network of a user's own."""

    def __init__(self, r, k, width, depth):
        super().__init__(r=r, k=k, width=width, depth=depth)
        self.layer = nn.Linear(r + k, r)

    def forward(self, v, angle, features):
        return self.layer(torch.cat([v, features.expand(*v.shape[:2], -1)], 2))


def test_a_registered_network_is_trained_saved_and_loaded_by_its_name(tmp_path, monkeypatch):
    z = torch.randn(400, R, generator=random(), dtype=torch.float64)
    options = TrainingOptions(steps=300, evaluate_every=100, batch=64)
    y, noise = z[:, :K] * 2, CallableNoise(lambda y, g: y + 0.1 * torch.randn(y.shape, generator=g, dtype=y.dtype))
    with pytest.raises(InputError, match="network is 'small'"):
        fit_denoiser(z, y, noise, network="small", options=options)
    monkeypatch.setitem(NETWORKS, "small", Small)
    denoiser, history = fit_denoiser(z, y, noise, network="small", base="plain", options=options, progress=False)
    assert isinstance(denoiser.network, Small) and min(history.validation) < history.base
    content = _written(tmp_path / "model", denoiser)
    again, _ = unpack_denoiser(content)
    assert content.values["network"]["class"] == "small" and type(again.network) is Small
    torch.testing.assert_close(_draws(again, "small"), _draws(denoiser, "small"), rtol=0, atol=0)
    del denoiser.network.config
    with pytest.raises(InputError, match="derive from ScoreModule"):
        pack_denoiser(denoiser, history)
    monkeypatch.delitem(NETWORKS, "small")
    with pytest.raises(FileError, match="known class and sizes"):
        unpack_denoiser(content)
    for network in (again.network, GaussianTruth([0.0], [[1.0]])):
        with pytest.raises(InputError, match=r"register it, NETWORKS\['mine'\] = "):
            pack_denoiser(Denoiser(again.base, network), history)


def _set(name, value):
    def change(arrays, values):
        (arrays if name in arrays else values)[name] = value
    return change


def _without(name):
    def change(arrays, values):
        (arrays if name in arrays else values).pop(name)
    return change


def _sizes(**sizes):
    def change(arrays, values):
        values["network"]["sizes"] = values["network"]["sizes"] | sizes
    return change


def _kind(name):
    def change(arrays, values):
        values["network"]["class"] = name
    return change


def _members(number, part="network"):
    def change(arrays, values):
        values[part]["members"] = number
    return change


@pytest.mark.parametrize("change, words", [
    (_without("base.mean"), "no 'base.mean'"), (_set("base.factor", np.zeros((R, R))), "no base"),
    (_set("base.factor", np.ones((R, R))), "no base"), (_set("base.factor", np.full((R, R), np.nan)), "not finite"),
    (_set("base.mean", np.zeros(R + 1)), "of shape"), (_set("updates", 0), "no base"),
    (_set("updates", 10**6), "no base"), (_set("updates", 1.5), "'updates'"), (_set("known", 1), "'known'"),
    (_without("known"), "'known'"),
    (_set("emulator", None), "no emulator"), (_without("emulator"), "'emulator'"),
    (_without("emulator.matrix"), "'emulator.matrix'"),
    (_set("emulator.matrix", np.ones((K, R + 1))), "of shape|do not fit"),
    (_set("emulator.residual", np.full((K, K), np.nan)), "not finite"),
    (_members(0), "and sizes"), (_members(2), "not those of its network"), (_members(10**9), "and sizes"),
    (_members(True), "and sizes"), (_members(2, "emulator"), "and sizes"),
    (_kind("Linear"), "known class and sizes"), (_kind("Emulator"), "known class and sizes"),
    (_sizes(r=R + 1), "do not fit"), (_sizes(width=7), "not those of its network"), (_sizes(width=10**15), "and sizes"),
    (_sizes(width=-1), "and sizes"), (_sizes(width=True), "and sizes"), (_sizes(depth=10**6), "and sizes"),
    (_sizes(more=1), "cannot be made"), (_without("network.head.weight"), "not those of its network"),
    (_set("network.head.weight", np.full((R, 8), np.nan, dtype=np.float32)), "not finite"),
    (_set("network.head.weight", np.zeros((R, 8))), "not those of its network"),
    (_set("spectrum.weights", -np.ones(2)), "no spectrum"), (_set("spectrum.weights", np.ones(3)), "no spectrum"),
    (_set("support.upper", np.full(R, -np.inf)), "without room"), (_set("history", {"step": []}), "no training curve"),
    (_set("history", asdict(HISTORY) | {"train": []}), "no training curve"),
])
def test_what_does_not_make_up_a_denoiser_is_refused(tmp_path, change, words):
    content = _written(tmp_path / "model", _denoiser("latents"), change)
    with pytest.raises(FileError, match=f"({words})") as error:
        unpack_denoiser(content)
    assert str(error.value).endswith(REMEDY)


def _laws():
    level, other = Marginal(loguniform(0.01, 0.1)), Marginal(lognorm(0.5, scale=0.1))
    one, outliers = GaussianNoise(std=level), StudentNoise([0.1, 0.2], df=5)
    covariance = np.array([[0.2, 0.1], [0.1, 0.3]])
    return {"none": (None, 3), "one": (GaussianNoise(std=0.1), 3), "each": (GaussianNoise([0.1, 0.2], 0.05), 2),
            "together": (GaussianNoise(covariance=covariance), 2), "level": (one, 2), "outliers": (outliers, 2),
            "heavy level": (StudentNoise(other), 3),
            "joined": (join_noise((2, one), (2, outliers), (1, StudentNoise(other)), (1, one)), 6),
            "twice": (join_noise((4, join_noise((2, one), (2, outliers))), (1, 0.3)), 5)}


@pytest.mark.parametrize("name", _laws())
def test_noise_that_comes_back_draws_the_same(tmp_path, name):
    noise, k = _laws()[name]
    files.write(tmp_path / "noise", "model", *pack_noise(noise, k))
    again = unpack_noise(files.read(tmp_path / "noise", "model", REMEDY), k)
    if noise is None:
        assert again is None
        return
    assert [x.settings for x in again.levels] == [x.settings for x in noise.levels]
    assert (again.told, again.constant, again.heavy) == (noise.told, noise.constant, noise.heavy)
    clean = torch.randn(7, k + len(noise.levels), generator=random(), dtype=torch.float64)
    y = noise.sample(clean, random())
    assert torch.equal(again.sample(clean, random()), y)
    torch.testing.assert_close(again.log_density(y, clean), noise.log_density(y, clean))


@pytest.mark.parametrize("change", [
    {"parts": []}, {"parts": 3}, {"levels": [{"name": "os"}]}, {"levels": [{"name": "norm", "args": [], "kwds": {}}]},
    {"parts": [{"sensors": 3, "level": None, "df": None}]}, {"parts": [{"sensors": 2, "level": 1, "df": None}]},
    {"parts": [{"sensors": 2, "level": None, "df": 1.0}]}, {"parts": [{"sensors": 2, "level": 0, "df": "4"}]},
    {"parts": [{"sensors": 10**9, "level": 0, "df": None}]}, {"parts": [{"sensors": 2, "level": None, "df": None}]}])
def test_noise_that_is_none_is_refused(tmp_path, change):
    arrays, values = pack_noise(GaussianNoise(std=Marginal(loguniform(0.01, 0.1))), 2)
    files.write(tmp_path / "noise", "model", arrays, {"noise": values["noise"] | change})
    with pytest.raises(FileError, match="holds"):
        unpack_noise(files.read(tmp_path / "noise", "model", REMEDY), 2)


def test_noise_of_the_users_own_is_no_file():
    with pytest.raises(InputError, match="join_noise of these"):
        pack_noise(CallableNoise(lambda y, generator: y), 2)


def test_the_law_of_the_noise_comes_back_with_the_noise(tmp_path):
    """A level of the noise is one of the latents, and readings are learned on a scale of their own."""
    noise = GaussianNoise(std=Marginal(loguniform(0.01, 0.1)))
    z = torch.randn(400, R, generator=random(), dtype=torch.float64)
    y = torch.cat([(2 * z[:, :2]).exp(), z[:, 2:]], 1)
    denoiser, _ = fit_denoiser(z, y, noise, standard_prior=True, progress=False,
                               options=TrainingOptions(steps=20, evaluate_every=10, width=8, depth=1))
    assert denoiser.readings is not None and denoiser.base.law is not None
    content = _written(tmp_path / "model", denoiser)
    again = unpack_law(content, unpack_denoiser(content)[0], noise)
    reading = y[:1, :2] + 0.01
    assert torch.equal(draw(again.at(reading), 20, Sampler()), draw(denoiser.at(reading), 20, Sampler()))
    with pytest.raises(FileError, match="other noise"):
        unpack_law(content, denoiser, GaussianNoise(std=0.1))
