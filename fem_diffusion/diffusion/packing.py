"""Trained models as files: tensors and settings, and checks at the door that they make up a model.

`pack` and `unpack` are for parts of any model, `write_model` and `read_model` for a model of one fixed set of sensors.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, fields

import numpy as np
import torch
from torch import Tensor, nn

from fem_diffusion import files
from fem_diffusion.diffusion.training.loop import History, unpack_history
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.field_network import FieldNetwork
from fem_diffusion.diffusion.gaussian import GaussianBase
from fem_diffusion.diffusion.network import ResidualMLP
from fem_diffusion.diffusion.nodes import Spectrum
from fem_diffusion.diffusion.support import Support
from fem_diffusion.files import Content

__all__ = ["REMEDY", "pack", "read_model", "unpack", "unpack_network", "unpack_sampling", "write_model"]

REMEDY = "Copy it again, or train anew."


def pack(parts: dict, history: History) -> tuple[dict, dict]:
    """Arrays and values of a file that holds these parts.

    Parameters
    ----------
    parts : dict
        Name to a dataclass of tensors and numbers, to a network with its sizes in `config`, or to None.
    history : History
        Training curve.

    Returns
    -------
    dict of numpy.ndarray, dict
        For `files.write`.
    """
    arrays, values = {}, {"history": asdict(history)}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            values[name] = {"class": type(part).__name__, "sizes": part.config}
            content = part.state_dict()
        else:
            content = {} if part is None else {f.name: getattr(part, f.name) for f in fields(part)}
            values[name] = None if part is None else {k: x for k, x in content.items() if not isinstance(x, Tensor)}
        arrays |= {f"{name}.{key}": x.detach().cpu().numpy() for key, x in content.items() if isinstance(x, Tensor)}
    return arrays, values


def unpack(content: Content, name: str, kind: type, shapes: dict, dtype: torch.dtype = torch.float64,
           finite: bool = True):
    """A part of a file as a dataclass, or None.

    Parameters
    ----------
    content : Content
        Of the file.
    name : str
        Of the part.
    kind : type
        Dataclass of tensors and numbers.
    shapes : dict of tuple
        Shape of each tensor, by field; None in place of a size that may be any.
    dtype : torch.dtype
        Of the tensors.
    finite : bool
        Whether tensors must be finite.

    Returns
    -------
    object or None

    Raises
    ------
    FileError
        If a tensor or number is missing, or is not of its shape and type.
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


def unpack_network(content: Content, name: str, kinds: Sequence[type], sizes: dict) -> nn.Module | None:
    """A network of a file, in evaluation mode, or None.

    Nothing is allocated before the sizes in the settings have been compared with the tensors that are there.

    Parameters
    ----------
    content : Content
        Of the file.
    name : str
        Of the part.
    kinds : sequence of type
        Classes that it may be of.
    sizes : dict of int
        What some of its sizes must be.

    Returns
    -------
    torch.nn.Module or None

    Raises
    ------
    FileError
        If class, sizes and tensors do not fit each other.
    """
    settings = content.value(name, dict, type(None))
    if settings is None:
        return None
    start = f"{name}."
    tensors = {key[len(start):]: torch.from_numpy(x) for key, x in content.arrays.items() if key.startswith(start)}
    numbers, config = sum(x.numel() for x in tensors.values()), settings.get("sizes")
    kind = next((kind for kind in kinds if kind.__name__ == settings.get("class")), None)
    if kind is None or not isinstance(config, dict) or not all(
            type(x) is int and 0 <= x <= numbers for x in config.values()) or config.get("depth", 0) > len(tensors):
        raise content.error(f"holds no network {name!r} of known class and sizes ({settings!r:.200})")
    if any(config.get(key) != size for key, size in sizes.items()):
        raise content.error(f"holds a network {name!r} of sizes {config!r:.200}, which do not fit {sizes}")
    try:
        with torch.device("meta"):
            network = kind(**config)
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


def unpack_sampling(content: Content, r: int) -> tuple[Spectrum | None, Support | None]:
    """What samplers know of a model: spectrum, and bounds of its r latents; FileError where they are none."""
    spectrum = unpack(content, "spectrum", Spectrum, {"variances": (None,), "weights": (None,)})
    support = unpack(content, "support", Support, {"lower": (r,), "upper": (r,)}, finite=False)
    if spectrum is not None and not (len(spectrum.variances) == len(spectrum.weights) and (spectrum.variances > 0).all()
                                     and (spectrum.weights >= 0).all()):
        raise content.error("holds no spectrum of variances")
    if support is not None and not (support.lower < support.upper).all():
        raise content.error("holds bounds of the latents without room between them")
    return spectrum, support


def write_model(path: str | os.PathLike, signature: np.ndarray, denoiser: Denoiser, history: History) -> None:
    """Write a model.

    Parameters
    ----------
    path : path
        The file.
    signature : numpy.ndarray
        Of the basis, by which reading tells whether it fits.
    denoiser : Denoiser
        Base and network; of a network on fields the weights, not the mesh.
    history : History
        Training curve.

    Raises
    ------
    FileError
        If it cannot be written.
    """
    arrays, values = pack({"base": denoiser.base, "network": denoiser.network, "spectrum": denoiser.spectrum,
                           "support": denoiser.support}, history)
    files.write(path, "model", arrays | {"basis.signature": signature}, values)


def read_model(path: str | os.PathLike) -> tuple[np.ndarray, Denoiser, History]:
    """Read what `write_model` wrote.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    signature, denoiser, history
        A network on fields has yet to be put on its mesh.

    Raises
    ------
    FileError
        If the file is damaged, foreign, or its parts do not make up a model.
    """
    content = files.read(path, "model", REMEDY)
    r, k = content.array("base.gain", None, None).shape
    base = unpack(content, "base", GaussianBase, {
        "latent_mean": (r,), "measurement_mean": (k,), "gain": (r, k), "factor": (r, r), "factor_inverse": (r, r),
        "whitener": (k, k)})
    if base is None or not r:
        raise content.error("holds no base")
    # Each latent in its own units.
    unit = base.factor.square().sum(1).sqrt()
    inverse = (base.factor @ base.factor_inverse) * unit / unit[:, None]
    if not torch.allclose(inverse, torch.eye(r, dtype=inverse.dtype), rtol=0, atol=1e-4):
        raise content.error("holds a base whose factors are no inverses of each other")
    network = unpack_network(content, "network", (ResidualMLP, FieldNetwork), {"r": r, "k": k})
    signature = content.array("basis.signature", r + 1)
    return signature, Denoiser(base, network, *unpack_sampling(content, r)), unpack_history(content)
