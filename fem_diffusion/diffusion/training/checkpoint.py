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

# What AdamW keeps of each parameter, besides the number of steps.
_MOMENTS = "exp_avg", "exp_avg_sq"


def save_state(path: str | os.PathLike, loop: "Loop", values: dict) -> None:
    """Write the state of a run, and `values` in JSON types, to a file, whole or not at all; FileError if it cannot."""
    moving = [i for i, x in enumerate(loop.network.parameters()) if x in loop.optimiser.state]
    tensors = _tensors(loop, moving) | {"best_losses": loop.best_losses, "marks": loop.marks,
                                        "generator": loop.generator.get_state()}
    state = {"step": loop.step, "stale": loop.stale, "device": loop.device.type, "best": loop.best is not None,
             "moving": moving}
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
    step, stale, moving = content.value("step", int), content.value("stale", int), content.value("moving", list)
    parameters = list(loop.network.parameters())
    if not all(type(i) is int and 0 <= i < len(parameters) for i in moving) or not 0 <= step <= loop.options.steps or (
            not 0 <= stale <= loop.options.patience):
        raise content.error("holds a state that these options cannot reach")
    # What is there is the pattern of what comes.
    loop.best = loop.network.state_dict() if content.value("best", bool) else None
    for i in moving:
        x = parameters[i]
        loop.optimiser.state[x] = {"step": torch.zeros(()), **{name: torch.zeros_like(x) for name in _MOMENTS}}
    found = {name: _like(content, name, x) for name, x in _tensors(loop, moving).items()}
    loop.step, loop.stale = step, stale
    loop.network.load_state_dict(_under("network.", found))
    loop.average.load_state_dict(_under("average.", found))
    loop.best = loop.best and _under("best.", found)
    rate = loop.options.learning_rate * loop.rate(step)
    groups = [group | {"lr": rate} for group in loop.optimiser.state_dict()["param_groups"]]
    loop.optimiser.load_state_dict({"state": {i: _under(f"optimiser.{i}.", found) for i in moving},
                                    "param_groups": groups})
    loop.schedule.load_state_dict(loop.schedule.state_dict() | {"last_epoch": step, "_step_count": step + 1,
                                                                "_last_lr": [rate]})
    loop.best_losses = _like(content, "best_losses", loop.task.base_losses)
    try:
        loop.generator.set_state(_like(content, "generator", loop.generator.get_state()))
    except RuntimeError as error:
        raise content.error(f"holds no state of a random generator ({error})") from error


def _tensors(loop: "Loop", moving: list[int]) -> dict[str, Tensor]:
    """The tensors of the state by name; of the optimiser those of the parameters with these numbers."""
    parameters = list(loop.network.parameters())
    parts = {"network": loop.network.state_dict(), "average": loop.average.state_dict(), "best": loop.best or {},
             **{f"optimiser.{i}": loop.optimiser.state[parameters[i]] for i in moving}}
    return {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}


def _like(content: files.Content, name: str, x: Tensor) -> Tensor:
    """A tensor of the file, of the shape and type and on the device of x."""
    dtype = np.dtype(str(x.dtype).removeprefix("torch."))
    return torch.from_numpy(content.array(name, *x.shape, dtype=dtype)).to(x.device)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names start so, by the rest of the name."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
