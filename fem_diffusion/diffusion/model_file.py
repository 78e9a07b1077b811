"""Trained models in safetensors files: tensors and settings, no code."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fem_diffusion.diffusion._loop import History
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.field_network import FieldNetwork
from fem_diffusion.diffusion.gaussian import GaussianBase
from fem_diffusion.diffusion.network import ResidualMLP
from fem_diffusion.diffusion.nodes import Spectrum
from fem_diffusion.diffusion.support import Support
from fem_diffusion.errors import FileError

__all__ = ["Content", "read_content", "read_model", "write_content", "write_model"]

_FORMAT = "fem_diffusion model 3"


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Parameters
    ----------
    tensors : dict of Tensor
        By name; those of a part are named ``part.tensor``.
    config : dict
        Settings; of a part that is a network, what it is built with.
    history : History
        Training curve.
    """

    tensors: dict
    config: dict
    history: History

    def part(self, name: str, *kinds: type):
        """A part as one of `kinds` (dataclass of tensors, or networks told apart by their settings), or None."""
        tensors = {key[len(name) + 1:]: x for key, x in self.tensors.items() if key.startswith(f"{name}.")}
        if not issubclass(kinds[0], nn.Module):
            return kinds[0](**tensors) if tensors else None
        if self.config[name] is None:
            return None
        network = kinds[self.config[name]["kind"]](**self.config[name]["sizes"])
        network.load_state_dict(tensors)
        return network.eval().requires_grad_(False)


def write_content(path: str | os.PathLike, form: str, tensors: dict, parts: dict, config: dict,
                  history: History) -> None:
    """Write a file atomically.

    Parameters
    ----------
    path : path
        The file.
    form : str
        Name and version of the format.
    tensors : dict of Tensor
        What belongs to no part.
    parts : dict
        Name to a dataclass of tensors, to a pair (network or None, the kinds it may be of), or to None.
    config : dict
        Settings that JSON can hold.
    history : History
        Training curve.
    """
    tensors, config = dict(tensors), dict(config)
    for name, part in parts.items():
        if isinstance(part, tuple):
            part, kinds = part
            config[name] = None if part is None else {"kind": kinds.index(type(part)), "sizes": part.config}
            state = {} if part is None else part.state_dict()
        else:
            state = {} if part is None else {f.name: getattr(part, f.name) for f in fields(part)}
        tensors |= {f"{name}.{key}": x for key, x in state.items()}
    metadata = {"format": form, "config": json.dumps(config), "history": json.dumps(asdict(history))}
    partial = Path(f"{path}.partial")
    save_file({name: x.contiguous() for name, x in tensors.items()}, partial, metadata)
    partial.replace(path)


@contextlib.contextmanager
def read_content(path: str | os.PathLike, form: str) -> Iterator[Content]:
    """Read what `write_content` wrote, as a context in which the content is taken apart.

    Parameters
    ----------
    path : path
        The file.
    form : str
        Name and version of the format.

    Yields
    ------
    Content

    Raises
    ------
    FileError
        If the file is truncated or foreign, holds values that are not finite, or something is missing in it.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("format") != form:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {form!r}")
        # Latents without a bound have infinite ones.
        if not all(torch.isfinite(x).all() for name, x in tensors.items() if not name.startswith("support.")):
            raise ValueError("values that are not finite")
        yield Content(tensors, json.loads(metadata["config"]), History(**json.loads(metadata["history"])))
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, RuntimeError,
            AttributeError) as error:
        raise FileError(f"{path} is no readable model of fem_diffusion ({error}): copy it again or train anew.") \
            from error


_NETWORKS = ResidualMLP, FieldNetwork


def write_model(path: str | os.PathLike, signature: np.ndarray, denoiser: Denoiser, history: History) -> None:
    """Write a model atomically.

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
    """
    parts = {"base": denoiser.base, "network": (denoiser.network, _NETWORKS), "spectrum": denoiser.spectrum,
             "support": denoiser.support}
    write_content(path, _FORMAT, {"basis.signature": torch.as_tensor(signature)}, parts, {}, history)


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
        If the file is truncated or foreign.
    """
    with read_content(path, _FORMAT) as content:
        base = content.part("base", GaussianBase)
        if base is None:
            raise KeyError("base")
        denoiser = Denoiser(base, content.part("network", *_NETWORKS), content.part("spectrum", Spectrum),
                            content.part("support", Support))
        return content.tensors["basis.signature"].numpy(), denoiser, content.history
