r"""Readings of which many are equal: counts, rounded ones, answers of yes and no.

They have no density, and one that is learnt heaps up at their values, whatever the latents say. So each is spread
evenly over a cell of its own around it, half way to the next values that there are: :math:`p(z | y)` is the same for
all of a cell, and the density in it is the probability of the reading over its width (Theis, van den Oord and Bethge
2016, arXiv 1511.01844).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["spread_over_cells"]

# How many pairs the rarer half of the values have at least, where values come again.
_AGAIN = 2
# Beyond a multiple of what is on the other side, or is usual, a gap is none of the values that there are.
_WIDEST = 2.0


def spread_over_cells(y: Tensor) -> Callable[[Tensor, torch.Generator], Tensor]:
    """What spreads such readings, as these (n, k), over their cells by a generator, and leaves others as they are."""
    found = [x.unique(return_counts=True) for x in y.T]
    equal = torch.tensor([len(values) > 1 and float(counts.quantile(0.5)) >= _AGAIN for values, counts in (
        (values, counts.double()) for values, counts in found)])
    many = [values if one else values[:1] for (values, _), one in zip(found, equal.tolist())]
    values = pad_sequence(many, batch_first=True, padding_value=torch.inf)
    sides = [pad_sequence(list(part), batch_first=True) for part in zip(*(_sides(x) for x in many))]
    middles = ((values[:, 1:] + values[:, :-1]) / 2).contiguous()

    def spread(y: Tensor, generator: torch.Generator) -> Tensor:
        place = torch.searchsorted(middles.to(y), y.T.contiguous())
        at, low, high = (part.to(y).gather(1, place).T for part in (values, *sides))
        share = torch.rand(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        return torch.where(equal.to(y.device), at - low + share * (low + high), y)
    return spread


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """How far the cells of increasing values (m,) go below and above them."""
    if len(values) == 1:
        return torch.zeros_like(values), torch.zeros_like(values)
    half = values.diff() / 2
    usual = half.median()
    below, above = torch.cat([half[:1], half]), torch.cat([half, half[-1:]])
    other = torch.cat([usual[None], half[1:], usual[None]]), torch.cat([usual[None], half[:-1], usual[None]])
    low, high = (torch.minimum(side, _WIDEST * torch.maximum(one, usual)) for side, one in zip((below, above), other))
    return low, high
