"""Dataclasses of tensors: one function of all of their tensors at once."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fem_diffusion.checks import check_device

__all__ = ["Tensors", "distinct", "mapped"]

Self = TypeVar("Self", bound="Tensors")


@dataclass(frozen=True, eq=False)
class Tensors:
    """Mixin of dataclasses that hold tensors, networks and further such parts."""

    def to(self: Self, device: str | torch.device, dtype: torch.dtype | None = None) -> Self:
        """A copy on another device; this one stays where it is. InputError where torch has no such device."""
        to = {"device": check_device(device), "dtype": dtype}
        return mapped(self, lambda x: deepcopy(x).to(**to) if isinstance(x, nn.Module) else x.to(**to))

    def __repr__(self) -> str:
        def short(part: Any) -> str:
            if isinstance(part, Tensor):
                return str(tuple(part.shape))
            if isinstance(part, tuple):
                return f"[{', '.join(map(short, part))}]"
            own = isinstance(part, Tensors) and type(part).__repr__ is not Tensors.__repr__
            return repr(part) if own or part is None or isinstance(part, (bool, int)) else type(part).__name__
        return f"{type(self).__name__}({', '.join(f'{f.name}: {short(getattr(self, f.name))}' for f in fields(self))})"


def mapped(part: Any, function: Callable[[Any], Any]) -> Any:
    """A copy with a function applied to every tensor and network in `Tensors` or in a tuple, however deep."""
    if isinstance(part, (Tensor, nn.Module)):
        return function(part)
    if isinstance(part, tuple):
        return tuple(mapped(x, function) for x in part)
    if isinstance(part, Tensors):
        return replace(part, **{f.name: mapped(getattr(part, f.name), function) for f in fields(part)})
    return part


def distinct(x: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers (m,) of the first of equal rows of x (n, k), and for each row which of these it is, (n,)."""
    every = torch.arange(len(x))
    if len(x[:, 0].unique()) == len(x):   # as good as always, and cheap
        return every, every
    _, which = x.cpu().unique(dim=0, return_inverse=True)
    return torch.full_like(which.unique(), len(x)).scatter_reduce(0, which, every, "amin"), which
