"""Trained models in files: tensors and settings, and checks at the door that they make up a model."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fem_diffusion.diffusion.base.emulator import Emulator
from fem_diffusion.diffusion.base.gaussian import UPDATES, GaussianBase
from fem_diffusion.diffusion.base.learnt import LearntNoise, numbers
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.maps.monotone import pack_map, unpack_map
from fem_diffusion.diffusion.network import NETWORKS, MeanNetwork, name_of
from fem_diffusion.diffusion.sampling.placement import Spectrum
from fem_diffusion.diffusion.sampling.support import Support
from fem_diffusion.diffusion.training.loop import History, unpack_history
from fem_diffusion.errors import InputError
from fem_diffusion.files import Content

__all__ = ["REMEDY", "pack", "pack_denoiser", "unpack", "unpack_denoiser"]

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
    """Arrays and values of a file that holds a denoiser, of a network on fields the weights without the mesh.

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
    if base.learnt is not None:
        arrays |= {"noise.whitener": base.learnt.whitener.numpy(), "noise.sensors": base.learnt.sensors.numpy()}
    return (arrays | {"base.mean": base.mean.numpy(), "base.factor": base.factor.numpy()},
            values | {"updates": base.updates, "known": denoiser.known, "history": asdict(history)})


def unpack_denoiser(content: Content) -> tuple[Denoiser, History]:
    """What `pack_denoiser` put into a file, but for the mesh; FileError if the parts do not make up a denoiser."""
    k, r = content.array("emulator.matrix", None, None).shape
    mean, factor = (torch.from_numpy(content.array(f"base.{name}", *shape)) for name, shape in (
        ("mean", (r,)), ("factor", (r, r))))
    updates = content.value("updates", int)
    if not r or (factor.diagonal() == 0).any() or bool(factor.tril(-1).any()) or not 1 <= updates <= UPDATES:
        raise content.error("holds no base")
    emulator = _unpack_network(content, "emulator", {"emulator": Emulator}, {"r": r, "s": k})
    network = _unpack_network(content, "network", NETWORKS, {"r": r, "k": k})
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
    base = GaussianBase(mean, factor, emulator, updates, learnt=_unpack_learnt(content, emulator, k))
    known = content.value("known", bool)
    return Denoiser(base, network, spectrum, support, known, latents, readings), unpack_history(content)


def _unpack_learnt(content: Content, emulator: Emulator, k: int) -> LearntNoise | None:
    """Noise that is learnt on the emulator's scale, or None; FileError if its parts do not fit k readings."""
    network = _unpack_network(content, "learnt", {"emulator": Emulator}, {"r": emulator.config["r"]})
    if network is None:
        return None
    network.curve = emulator.curve
    sensors = torch.from_numpy(content.array("noise.sensors", k, dtype=np.dtype(np.int64)))
    whitener = torch.from_numpy(content.array("noise.whitener", None, None))
    most = len(whitener)
    if whitener.shape != (most, most) or network.config["s"] != numbers(most) or not (
            (sensors >= 0) & (sensors < most)).all() or len(sensors.unique()) < k or not torch.linalg.det(whitener) > 0:
        raise content.error("holds noise that is none of its sensors")
    return LearntNoise(network, whitener, sensors)
