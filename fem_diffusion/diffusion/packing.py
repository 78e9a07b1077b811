"""Trained models in files: tensors and settings, and checks at the door that they make up a model."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fem_diffusion.diffusion.base.emulator import Emulator
from fem_diffusion.diffusion.base.gaussian import UPDATES, GaussianBase
from fem_diffusion.diffusion.base.law import NoiseLaw
from fem_diffusion.diffusion.base.learnt import LearntNoise, mixed, numbers
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.maps.monotone import pack_map, unpack_map
from fem_diffusion.diffusion.maps.noise import carried
from fem_diffusion.diffusion.network import NETWORKS, MeanNetwork, name_of
from fem_diffusion.diffusion.noise import GaussianNoise, Noise
from fem_diffusion.diffusion.noise_laws import JoinedNoise, StudentNoise
from fem_diffusion.diffusion.sampling.placement import Spectrum
from fem_diffusion.diffusion.sampling.support import Support
from fem_diffusion.diffusion.training.loop import History, unpack_history
from fem_diffusion.errors import FileError, InputError
from fem_diffusion.files import Content
from fem_diffusion.marginal import Marginal

__all__ = ["REMEDY", "pack", "pack_denoiser", "pack_noise", "unpack", "unpack_denoiser", "unpack_law", "unpack_noise"]

REMEDY = "Copy it again, or train anew."
# A network of a user's own may make no use of a size, which its tensors do not bound then.
_UNUSED = 1024


def pack(parts: dict) -> tuple[dict, dict]:
    """Arrays and values of a file, for `files.write`, by the names of its parts.

    A part is a dataclass of tensors and numbers, an emulator, a network of the registry or several, or None.
    """
    arrays, values = {}, {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            like = part.members[0] if isinstance(part, MeanNetwork) else part
            values[name] = {"class": "emulator" if isinstance(part, Emulator) else name_of(part), "sizes": like.config,
                            "members": len(part.members) if isinstance(part, MeanNetwork) else 1}
            content = part.state_dict()
        else:
            content = {} if part is None else {f.name: getattr(part, f.name) for f in fields(part)}
            values[name] = None if part is None else {k: x for k, x in content.items() if not isinstance(x, Tensor)}
        arrays |= {f"{name}.{key}": x.detach().cpu().numpy() for key, x in content.items() if isinstance(x, Tensor)}
    return arrays, values


def unpack(content: Content, name: str, kind: type, shapes: dict, dtype: torch.dtype = torch.float64,
           finite: bool = True) -> Any:
    """A part of a file as a dataclass of tensors and numbers, or None; FileError unless all are there and fit.

    `shapes` gives the shape of each tensor, by field, with None in place of a size that may be any.
    """
    found = content.value(name, dict, type(None))
    if found is None:
        return None
    numpy = torch.empty(0, dtype=dtype).numpy().dtype
    tensors = {key: torch.from_numpy(content.array(f"{name}.{key}", *shape, dtype=numpy, finite=finite))
               for key, shape in shapes.items()}
    wanted = {f.name for f in fields(kind)}
    if set(found) | set(tensors) != wanted:
        raise content.error(f"does not hold the parts of {name!r} ({', '.join(sorted(wanted))})")
    return kind(**found, **tensors)


def _unpack_network(content: Content, name: str, kinds: Mapping[str, Any], sizes: dict) -> Any:
    """A network of a file, or the mean of several, of one of these classes and sizes and in evaluation mode, or None.

    Nothing is allocated before the sizes in the settings have been compared with the tensors that are there. FileError
    if class, sizes and tensors do not fit each other.
    """
    settings = content.value(name, dict, type(None))
    if settings is None:
        return None
    start = f"{name}."
    tensors = {key[len(start):]: torch.from_numpy(x) for key, x in content.arrays.items() if key.startswith(start)}
    numbers, config = sum(x.numel() for x in tensors.values()), settings.get("sizes")
    kind, members = kinds.get(str(settings.get("class"))), settings.get("members")
    if kind is None or type(members) is not int or not 1 <= members <= (1 if kind is Emulator else len(tensors)) or (
            not isinstance(config, dict)) or not all(
            type(x) is int and 0 <= x <= max(numbers, _UNUSED) for x in config.values()) or (
            members * config.get("depth", 0) > max(len(tensors), _UNUSED)):
        raise content.error(f"holds no network {name!r} of known class and sizes ({settings!r:.200})")
    if any(config.get(key) != size for key, size in sizes.items()):
        raise content.error(f"holds a network {name!r} of sizes {config!r:.200}, which do not fit {sizes}")
    try:
        with torch.device("meta"):
            each: list[Any] = [kind(**config) for _ in range(members)]
            network = each[0] if members == 1 else MeanNetwork(each)
    except Exception as error:
        raise content.error(f"holds a network {name!r} that cannot be made ({error!r:.200})") from error
    expected = network.state_dict()
    if expected.keys() != tensors.keys() or any(
            (x.shape, x.dtype) != (tensors[key].shape, tensors[key].dtype) for key, x in expected.items()):
        raise content.error(f"holds tensors that are not those of its network {name!r}")
    if not all(bool(torch.isfinite(x).all()) for x in tensors.values()):
        raise content.error(f"holds values in the network {name!r} that are not finite")
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


def pack_denoiser(denoiser: Denoiser, history: History) -> tuple[dict, dict]:
    """Arrays and values of a file that holds a denoiser, of a network on fields the weights without the mesh, of a law
    of noise where the latents have its levels.

    InputError unless its network is of the registry and has its sizes in `config`.
    """
    base, network = denoiser.base, denoiser.network
    like = network.members[0] if isinstance(network, MeanNetwork) else network
    if network is not None and not (name_of(network) and isinstance(getattr(like, "config", None), dict)):
        name = type(like).__name__
        raise InputError(f"A network of type {name} cannot be made again from a file: let {name} derive from "
                         f"ScoreModule, which keeps sizes in `config`, and register it, NETWORKS['mine'] = {name}.")
    arrays, values = pack({"emulator": base.emulator, "network": network, "spectrum": denoiser.spectrum,
                           "support": denoiser.support, "learnt": base.learnt and base.learnt.network})
    for name, part in (("latents", denoiser.latents), ("readings", denoiser.readings), ("curve", base.emulator.curve)):
        more = pack_map(name, part)
        arrays, values = arrays | more[0], values | more[1]
    if base.law is not None:
        arrays |= {f"law.{name}": getattr(base.law, name).numpy() for name in ("rows", "offset", "covariance")}
    if base.learnt is not None:
        arrays |= {f"noise.{name}": getattr(base.learnt, name).numpy() for name in ("whitener", "sensors", "aside")}
    if base.told is not None:
        arrays["base.told"] = base.told.numpy()
    return (arrays | {"base.mean": base.mean.numpy(), "base.factor": base.factor.numpy()},
            values | {"updates": base.updates, "known": denoiser.known, "history": asdict(history)})


def unpack_denoiser(content: Content) -> tuple[Denoiser, History]:
    """What `pack_denoiser` put into a file, but for the mesh and the law, which `unpack_law` puts in.

    FileError if the parts do not make up a denoiser.
    """
    k, r = content.array("emulator.matrix", None, None).shape
    mean, factor = (torch.from_numpy(content.array(f"base.{name}", *shape)) for name, shape in (
        ("mean", (r,)), ("factor", (r, r))))
    updates = content.value("updates", int)
    if not r or (factor.diagonal() == 0).any() or bool(factor.tril(-1).any()) or not 1 <= updates <= UPDATES:
        raise content.error("holds no base")
    emulator = _unpack_network(content, "emulator", {"emulator": Emulator}, {"r": r, "s": k, "scaled": 1})
    told = _unpack_told(content, k)
    network = _unpack_network(content, "network", NETWORKS, {"r": r, "k": k if told is None else len(told)})
    if emulator is None:
        raise content.error("holds no emulator")
    spectrum = unpack(content, "spectrum", Spectrum, {"variances": (None,), "weights": (None,)})
    support = unpack(content, "support", Support, {"lower": (r,), "upper": (r,)}, finite=False)
    if spectrum is not None and not (len(spectrum.variances) == len(spectrum.weights) and (spectrum.variances > 0).all()
                                     and (spectrum.weights >= 0).all()):
        raise content.error("holds no spectrum of variances")
    if support is not None and not (support.lower < support.upper).all():
        raise content.error("holds bounds of the latents without room between them")
    emulator.curve = unpack_map(content, "curve", r)
    latents, readings = unpack_map(content, "latents", r), unpack_map(content, "readings", k)
    base = GaussianBase(mean, factor, emulator, updates, learnt=_unpack_learnt(content, emulator, k), told=told)
    known = content.value("known", bool)
    return Denoiser(base, network, spectrum, support, known, latents, readings), unpack_history(content)


def _unpack_told(content: Content, k: int) -> Tensor | None:
    """Numbers of the readings of k that say anything, or None; FileError where they are none."""
    if "base.told" not in content.arrays:
        return None
    told = torch.from_numpy(content.array("base.told", None, dtype=np.dtype(np.int64)))
    if not (len(told) and (told >= 0).all() and (told < k).all() and len(told.unique()) == len(told)):
        raise content.error("holds numbers of readings that are none")
    return told


def _unpack_learnt(content: Content, emulator: Emulator, k: int) -> LearntNoise | None:
    """Noise that is learnt on the emulator's scale, or None; FileError if its parts do not fit k readings."""
    sizes = {"r": emulator.config["r"], "scaled": 0}
    network = _unpack_network(content, "learnt", {"emulator": Emulator}, sizes)
    if network is None:
        return None
    network.curve = emulator.curve
    sensors = torch.from_numpy(content.array("noise.sensors", k, dtype=np.dtype(np.int64)))
    apart = "noise.whitener" in content.arrays and content.arrays["noise.whitener"].ndim == 1
    aside = torch.from_numpy(content.array("noise.aside", None, None))
    whitener = torch.from_numpy(content.array("noise.whitener", None, *(() if apart else (None,))))
    own, size = len(whitener), network.config["s"]
    if not own or own + len(aside) != k or sensors.sort().values.tolist() != list(range(k)) or (
            size != _numbers(size, own, apart)) or not (
            bool((whitener != 0).all()) if apart else _regular(whitener)) or not _regular(aside):
        raise content.error("holds noise that is none of its sensors")
    return LearntNoise(network, whitener, sensors, aside)


def _numbers(size: int, k: int, apart: bool) -> int:
    """How many a network of this many, or fewer, emulates for k readings."""
    return k * _numbers(size // k, 1, False) if apart else numbers(k, mixed(size, k))


def _regular(matrix: Tensor) -> bool:
    """Whether a matrix is square and has an inverse, whatever the units of its rows."""
    if matrix.shape != (len(matrix), len(matrix)):
        return False
    size = matrix.norm(dim=1, keepdim=True)
    return not len(matrix) or bool((size > 0).all()) and bool(torch.linalg.svdvals(matrix / size)[-1] > 0)


def unpack_law(content: Content, denoiser: Denoiser, noise: Noise | None) -> Denoiser:
    """The denoiser of a file with the law of the noise, of sensors in the users' units, where the file holds one.

    FileError if it is of other noise.
    """
    if "law.rows" not in content.arrays:
        return denoiser
    base, noise = denoiser.base, carried(noise, denoiser.readings)
    if noise is None or not noise.law or len(noise.levels) != len(content.arrays["law.rows"]):
        raise FileError(f"{content.path} was trained for other noise: pass the problem of its training.")
    count = len(noise.levels)
    parts = (torch.from_numpy(content.array(f"law.{name}", *shape)) for name, shape in (
        ("rows", (count, base.r)), ("offset", (count,)), ("covariance", (base.k, base.k))))
    return replace(denoiser, base=replace(base, law=NoiseLaw(noise, *parts)))


def pack_noise(noise: Noise | None, k: int) -> tuple[dict, dict]:
    """Arrays and values of a file that holds noise of k sensors, or none.

    InputError of noise of the user's own, or a level of a law without a name in SciPy.
    """
    if noise is None:
        return {}, {"noise": None}
    levels, arrays, parts = list(noise.levels), {}, []
    for i, (size, part) in enumerate(_flat(noise, k)):
        if not isinstance(part, (GaussianNoise, StudentNoise)):
            raise InputError(f"Noise of type {type(part).__name__} cannot be made again from a file: take "
                             "GaussianNoise, StudentNoise, or a join_noise of these.")
        arrays[f"noise.{i}.std"] = part.std.expand(size).numpy().copy()
        level = next((j for j, one in enumerate(levels) if part.levels and one is part.levels[0]), None)
        found: dict[str, Any] = {"sensors": size, "level": level, "df": getattr(part, "df", None)}
        if isinstance(part, GaussianNoise):
            arrays[f"noise.{i}.relative"] = part.relative.expand(size).numpy().copy()
            if part.correlated is not None:
                arrays[f"noise.{i}.covariance"] = part.correlated.numpy()
        parts.append(found)
    return arrays, {"noise": {"levels": [level.settings for level in levels], "parts": parts}}


def _flat(noise: Noise, k: int) -> list[tuple[int, Noise]]:
    """The parts of joined noise, however they were joined."""
    return [one for size, part in noise.parts for one in _flat(part, size)] if isinstance(noise, JoinedNoise) else [
        (k, noise)]


def unpack_noise(content: Content, k: int) -> Noise | None:
    """What `pack_noise` put into a file, of k sensors; FileError if it is none."""
    found = content.value("noise", dict, type(None))
    if found is None:
        return None
    levels, parts = found.get("levels"), found.get("parts")
    if not isinstance(levels, list) or not isinstance(parts, list) or not parts or not all(
            isinstance(x, dict) for x in parts):
        raise content.error("holds no noise")
    try:
        laws = [Marginal.named(level) for level in levels]
        made = [_unpack_part(content, i, part, laws) for i, part in enumerate(parts)]
    except InputError as error:
        raise content.error(f"holds noise that cannot be made ({error})") from error
    noise = made[0][1] if len(made) == 1 else JoinedNoise(made)
    if sum(size for size, _ in made) != k or [id(x) for x in noise.levels] != [id(x) for x in laws]:
        raise content.error("holds noise of other sensors or levels")
    return noise


def _unpack_part(content: Content, i: int, part: dict, laws: list[Marginal]) -> tuple[int, Noise]:
    size: Any = part.get("sensors")
    level, df = part.get("level"), part.get("df")
    known = type(size) is int and size > 0 and (
        level is None or type(level) is int and 0 <= level < len(laws)) and type(df) in (float, type(None))
    if not known or set(part) != {"sensors", "level", "df"}:
        raise content.error(f"holds noise of unknown settings ({part!r:.200})")
    std = content.array(f"noise.{i}.std", size)
    std = std if level is None else laws[level]
    if df is not None:
        return size, StudentNoise(std, df)
    name = f"noise.{i}.covariance"
    correlated = content.array(name, size, size) if name in content.arrays else None
    return size, GaussianNoise(std, content.array(f"noise.{i}.relative", size), correlated)
