"""The state of a training run as a file: weights, their average, the best ones, the optimiser and the generator.

Learning rates follow from the step, so they are not stored. Every tensor is compared with the one that it replaces.
"""

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fem_diffusion import files

if TYPE_CHECKING:
    from fem_diffusion.diffusion.training.loop import Loop

__all__ = ["load_state", "read_state", "save_state"]

# What AdamW keeps of each weight, besides the number of steps.
_MOMENTS = "exp_avg", "exp_avg_sq"


def save_state(path: str | os.PathLike, loop: "Loop", values: dict) -> None:
    """Write the state of a run, and `values` in JSON types, to a file, whole or not at all; FileError if it cannot."""
    tensors = {"weights": loop.weights, "average": loop.average, "best_losses": loop.best_losses, "marks": loop.marks,
               "generator": loop.generator.get_state()}
    tensors |= {} if loop.best is None else {"best": loop.best}
    tensors |= {name: loop.optimiser.state[loop.weights][name] for name in _MOMENTS}
    state = {"step": loop.step, "stale": loop.stale, "device": loop.device.type}
    files.write(path, "checkpoint", {key: x.detach().cpu().numpy() for key, x in tensors.items()}, values | state)


def read_state(path: str | os.PathLike, device: str) -> files.Content:
    """Read a file that `save_state` wrote; FileError where it is none, or was written on another kind of device."""
    content = files.read(path, "checkpoint", f"Delete {path} or name another file to start afresh.")
    found = content.value("device", str)
    if found != device:
        raise content.error(f"was written on {found!r}, whose random numbers are others: resume with "
                            f"TrainingOptions(device={found!r})")
    return content


def load_state(content: files.Content, loop: "Loop") -> None:
    """Put what `read_state` found into a run of the same task and options; FileError unless the run can have it."""
    step, stale = content.value("step", int), content.value("stale", int)
    if not 0 < step <= loop.options.steps or not 0 <= stale <= loop.options.patience:
        raise content.error("holds a state that these options cannot reach")
    loop.step, loop.stale = step, stale
    with torch.no_grad():
        loop.weights.copy_(_like(content, "weights", loop.weights))
        loop.average.copy_(_like(content, "average", loop.average))
    loop.best = _like(content, "best", loop.average) if "best" in content.arrays else None
    moments = {name: _like(content, name, loop.weights) for name in _MOMENTS}
    groups = loop.optimiser.state_dict()["param_groups"]
    loop.optimiser.load_state_dict({"state": {0: {"step": torch.tensor(float(step)), **moments}},
                                    "param_groups": groups})
    loop.best_losses = _like(content, "best_losses", loop.task.base_losses)
    try:
        loop.generator.set_state(_like(content, "generator", loop.generator.get_state()))
    except RuntimeError as error:
        raise content.error(f"holds no state of a random generator ({error})") from error


def _like(content: files.Content, name: str, x: Tensor) -> Tensor:
    """A tensor of the file, of the shape and type and on the device of x."""
    dtype = np.dtype(str(x.dtype).removeprefix("torch."))
    return torch.from_numpy(content.array(name, *x.shape, dtype=dtype)).to(x.device)
