"""A small file of every kind that the package writes, with the public call that reads it, and ways to spoil files."""

import contextlib
import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from firedrake import Function, FunctionSpace, UnitIntervalMesh
from mpi4py import MPI

from fem_diffusion import files
from fem_diffusion.fields.basis import load_basis
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.diffusion import (
    Emulator, FieldNetwork, GaussianNoise, ResidualMLP, SensorNetwork, Spectrum, Support, TrainingOptions, fit_denoiser,
)
from fem_diffusion.errors import InstallError
from fem_diffusion.model.fit import fit
from fem_diffusion.model.model import load_model
from fem_diffusion.observation.family import SensorFamily, SensorKind
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.samples import Samples, load_samples
from fem_diffusion.simulation.simulate import load_pairs, simulate

KINDS = "data set", "block", "model", "field model", "family model", "basis", "samples", "checkpoint"
OPTIONS = TrainingOptions(steps=20, evaluate_every=10, width=8, depth=1, batch=16)
NOISE = GaussianNoise(std=0.1)


@dataclass(frozen=True)
class Specimen:
    """A file, a call that reads it and uses what it reads, and the content of the whole file."""

    path: Path
    use: object
    content: bytes


def weights_everywhere(network):
    """No layer at zero, where networks start: every weight counts."""
    generator = torch.Generator().manual_seed(0)
    for x in network.parameters():
        x.data = 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return network.eval().requires_grad_(False)


def specimens(folder: Path) -> dict[str, Specimen]:
    """By kind."""
    V = FunctionSpace(UnitIntervalMesh(8, comm=MPI.COMM_SELF), "CG", 1)
    prior, sensors = GaussianPrior(V, 1.0, 0.4), point_sensors(V, [[0.25], [0.6], [0.9]])
    basis = karhunen_loeve(prior, 3)
    arguments = {"seed": 1, "block": 30, "progress": False}

    def forward(m):
        return Function(V).interpolate(m + m**2 / 4)
    problem = InverseProblem(prior, forward, sensors, NOISE)
    simulate(problem, 60, path=folder / "pairs", keep_states=True, **arguments)
    data = load_pairs(folder / "pairs", problem)
    model = fit(problem, data, basis=basis, options=OPTIONS, progress=False)
    spectrum = Spectrum(torch.tensor([0.5, 0.1]).double(), torch.tensor([0.3, 0.2]).double())
    support = Support(torch.tensor([-torch.inf, -9, -9]).double(), torch.tensor([9, 9, torch.inf]).double())
    family = replace(problem, observation=SensorFamily(SensorKind(sensors, 0.1, (1, 3))), noise=None)
    many = fit(family, data, basis=basis, options=OPTIONS, progress=False)
    for name, trained, network in (
            ("model", model, ResidualMLP(3, 3, 8, 1)), ("field model", model, FieldNetwork(3, 3, 8, 1, 2, 1)),
            ("family model", many, SensorNetwork(3, many.states.r, 8, 1, 8, 2))):
        size = trained.denoiser.base.k
        emulator = weights_everywhere(Emulator(3, size, 8, 1))
        emulator.matrix, emulator.scale = torch.ones(size, 3).double(), 0.1 * torch.eye(size).double()
        emulator.residual = 0.01 * torch.eye(size).double()
        denoiser = replace(trained.denoiser, network=weights_everywhere(network), spectrum=spectrum, support=support,
                           base=replace(trained.denoiser.base, emulator=emulator, updates=2))
        replace(trained, denoiser=denoiser).save(folder / name)
    basis.save(folder / "basis")
    with contextlib.suppress(InstallError):     # without VTK
        Samples(V, data.coefficients[:5], torch.randn(5, 3).numpy()).save(folder / "samples")
    z = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def train():
        # Of unknown law, so that no emulator keeps a checkpoint of its own.
        return fit_denoiser(z, z**2, None, options=OPTIONS, checkpoint=folder / "checkpoint")[1].validation
    train()
    y, drawn = data.readings[0], {"seed": 0, "progress": False}
    uses = {
        "data set": ("pairs/data_set.safetensors", lambda: load_pairs(folder / "pairs", problem).coefficients),
        "block": ("pairs/block-00001.safetensors", lambda: load_pairs(folder / "pairs", problem).coefficients),
        **{name: (name, lambda name=name: load_model(folder / name, problem).condition(y).sample(2, **drawn).values)
           for name in ("model", "field model")},
        "family model": ("family model", lambda: load_model(folder / "family model", family).condition(
            y, sensors, NOISE).sample(2, **drawn).values),
        "basis": ("basis", lambda: load_basis(folder / "basis", V).decode(np.ones((1, 3)))),
        "samples": ("samples/samples.safetensors", lambda: load_samples(folder / "samples", V)[1:].values),
        "checkpoint": ("checkpoint", lambda: np.array(train())),
    }
    return {kind: Specimen(folder / name, use, (folder / name).read_bytes()) for kind, (name, use) in uses.items()}


def spoiled(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with a random defect of its bytes, never the file itself."""
    while True:
        data, size = bytearray(content), len(content)
        place = int(rng.integers(size)) if rng.random() < 0.5 else int(rng.integers(min(size, 2000)))
        length = int(rng.integers(1, 65))
        kind = rng.integers(7)
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data = data[:place]
        elif kind == 2:
            data[place:place + length] = bytes(length)
        elif kind == 3:
            del data[place:place + length]
        elif kind == 4:
            data[place:place] = rng.bytes(length)
        elif kind == 5:
            data[place:place + length] = rng.bytes(length)
        else:
            other = int(rng.integers(size))
            data[place:place + length] = content[other:other + length]
        if bytes(data) != content:
            return bytes(data)


ODD = [None, True, -1, 0, 1, 2, 10**9, 10**30, 0.5, float("nan"), float("inf"), "x", "", [], [[1]], {}, {"a": 1}]


def forged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file whose content someone has changed who knows how to make a checksum."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8:8 + size])["__metadata__"]["fem_diffusion"])
    arrays = {name: np.array(x) for name, x in safetensors.numpy.load(content).items()}
    for _ in range(int(rng.integers(1, 3))):
        if arrays and rng.random() < 0.5:
            _forge_array(arrays, rng)
        else:
            _forge_value(header, rng)
    if rng.random() < 0.1:
        header = ODD[rng.integers(len(ODD))]
    sealed = {"checksum": "0" * 64, **(header if isinstance(header, dict) else {"values": header})}
    sealed["checksum"] = "0" * 64
    data = safetensors.numpy.save(arrays, {"fem_diffusion": json.dumps(sealed, separators=(",", ":"))})
    if rng.random() < 0.1:      # shapes that are not those of the bytes
        size = int.from_bytes(data[:8], "little")
        grown = data[8:8 + size].replace(b'"shape":[', b'"shape":[1000000000,', 1)
        data = len(grown).to_bytes(8, "little") + grown + data[8 + size:]
    return seal(data)


def seal(data: bytes) -> bytes:
    """The file with a checksum that fits."""
    place = files._checksum_place(data)
    if place is None:
        return data
    return data[:place] + files._digest(memoryview(data), place) + data[place + 64:]


def _forge_array(arrays: dict, rng) -> None:
    name = list(arrays)[rng.integers(len(arrays))]
    x, kind = arrays[name], rng.integers(7)
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[f"{name}x"] = arrays.pop(name)
    elif kind == 2:
        with np.errstate(all="ignore"):
            arrays[name] = x.astype([np.float32, np.int64, np.bool_, np.uint8, np.float64][rng.integers(5)])
    elif kind == 3:
        arrays[name] = x.reshape(-1)[:rng.integers(x.size + 1)] if x.size else np.zeros(3)
    elif kind == 4:
        arrays[name] = np.zeros([(), (0,), (1,), (0, 3), (3, 3), (2, 2, 2)][rng.integers(6)], x.dtype)
    elif x.size and x.dtype.kind == "f":
        x = np.array(x)
        x.reshape(-1)[rng.integers(x.size)] = [np.nan, np.inf, -1.0, 0.0, 1e30][rng.integers(5)]
        arrays[name] = x
    else:
        arrays[name] = np.concatenate([x.reshape(-1), x.reshape(-1)])


def _forge_value(header: dict, rng) -> None:
    place = header
    while True:
        key = list(place)[rng.integers(len(place))]
        if isinstance(place[key], dict) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        if rng.random() < 0.2:
            del place[key]
        else:
            place[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
        return
