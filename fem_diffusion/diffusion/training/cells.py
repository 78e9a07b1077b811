r"""Readings of which many are equal: counts, rounded ones, answers of yes and no.

They have no density, and one that is learnt heaps up at their values, whatever the latents say. So each is spread
evenly over its cell, which ends half way to the next value that there is: :math:`p(z | y)` is the same for all of a
cell, and the density in it is the probability of the reading over its width (Theis, van den Oord and Bethge 2016, arXiv
1511.01844).
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fem_diffusion.diffusion.noise_laws import CallableNoise

__all__ = ["spread_over_cells"]

# Share of different values up to which they are those that there are.
_DIFFERENT = 0.5


def spread_over_cells(y: Tensor) -> CallableNoise | None:
    """Noise that spreads readings (n, k) over their cells, and leaves others as they are; None where all are others."""
    values = [x.unique() for x in y.T]
    equal = torch.tensor([1 < len(x) <= _DIFFERENT * len(y) for x in values])
    if not equal.any():
        return None
    found = [_edges(x) if one else x.new_zeros(2) for x, one in zip(values, equal.tolist())]
    edges = pad_sequence(found, batch_first=True, padding_value=torch.inf)

    def noisy(y: Tensor, generator: torch.Generator) -> Tensor:
        ends = edges.to(y)
        place = torch.searchsorted(ends[:, 1:].contiguous(), y.T.contiguous())
        # Readings beyond those of the pairs are of the outermost cells.
        place = torch.minimum(place, torch.isfinite(ends).sum(1, keepdim=True) - 2)
        low, high = ends.gather(1, place).T, ends.gather(1, place + 1).T
        share = torch.rand(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        return torch.where(equal.to(y.device), torch.lerp(low, high, share), y)
    return CallableNoise(noisy)


def _edges(values: Tensor) -> Tensor:
    """Ends (m + 1,) of the cells of increasing values (m,)."""
    middle = (values[1:] + values[:-1]) / 2
    return torch.cat([2 * values[:1] - middle[:1], middle, 2 * values[-1:] - middle[-1:]])
