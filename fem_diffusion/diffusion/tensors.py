"""Dataclasses of tensors: one function of all of their tensors at once."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["mapped", "moved"]

T = TypeVar("T")


def mapped(part: T, function: Callable[[Any], Any]) -> T:
    """A copy with a function applied to every tensor and network in a dataclass or tuple, however deep."""
    if isinstance(part, (Tensor, nn.Module)):
        return function(part)
    if isinstance(part, tuple):
        return tuple(mapped(x, function) for x in part)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{f.name: mapped(getattr(part, f.name), function) for f in fields(part)})
    return part


def moved(part: T, *to: str | torch.device | torch.dtype) -> T:
    """A copy moved by the `to` of tensors and networks; this one stays where it is."""
    return mapped(part, lambda x: deepcopy(x).to(*to) if isinstance(x, nn.Module) else x.to(*to))
