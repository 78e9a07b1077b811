"""A trained denoiser in a safetensors file: tensors and settings, no code."""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fem_diffusion.diffusion._loop import History
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.field_network import FieldNetwork
from fem_diffusion.diffusion.gaussian import GaussianBase
from fem_diffusion.diffusion.network import ResidualMLP
from fem_diffusion.diffusion.nodes import Spectrum
from fem_diffusion.diffusion.support import Support
from fem_diffusion.errors import ModelFileError

__all__ = ["read_model", "write_model"]

_FORMAT = "fem_diffusion model 2"
# Parts of a denoiser that may be missing.
_PARTS = {"spectrum": Spectrum, "support": Support}


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
    tensors = {f"base.{f.name}": getattr(denoiser.base, f.name).contiguous() for f in fields(GaussianBase)}
    tensors["basis.signature"] = torch.as_tensor(signature)
    config = None
    for name, kind in _PARTS.items():
        part = getattr(denoiser, name)
        if part is not None:
            tensors |= {f"{name}.{f.name}": getattr(part, f.name) for f in fields(kind)}
    if denoiser.network is not None:
        config = denoiser.network.config
        tensors |= {f"network.{name}": x for name, x in denoiser.network.state_dict().items()}
    metadata = {"format": _FORMAT, "network": json.dumps(config), "history": json.dumps(asdict(history))}
    partial = Path(f"{path}.partial")
    save_file(tensors, partial, metadata)
    partial.replace(path)


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
    ModelFileError
        If the file is truncated or foreign.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}")
        base = GaussianBase(*(tensors[f"base.{f.name}"] for f in fields(GaussianBase)))
        signature = tensors["basis.signature"].numpy()
        config, history = json.loads(metadata["network"]), History(**json.loads(metadata["history"]))
        network = None
        parts = {name: kind(*(tensors[f"{name}.{f.name}"] for f in fields(kind))) for name, kind in _PARTS.items()
                 if any(key.startswith(f"{name}.") for key in tensors)}
        if config is not None:
            network = (FieldNetwork if "channels" in config else ResidualMLP)(**config)
            prefix = "network."
            network.load_state_dict({n[len(prefix):]: x for n, x in tensors.items() if n.startswith(prefix)})
            network.eval().requires_grad_(False)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelFileError(f"{path} is no readable model of fem_diffusion ({error}): copy it again or train anew.") \
            from error
    return signature, Denoiser(base, network, **parts), history
