"""Sensors as rows over state coordinates, and the laws by which training draws layouts of them.

A layout has any number of sensors. Layouts of a batch are padded to the same number of rows; a padded row sees nothing
and reads zero with unit noise, so it says nothing.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fem_diffusion.errors import InputError

__all__ = ["LayoutLaw", "SensorPool", "Sensors"]


@dataclass(frozen=True)
class Sensors:
    """Linear sensors of B layouts: reading = offset + rows · c + noise.

    Parameters
    ----------
    rows : Tensor
        Over the s state coordinates c, shape (B, k, s).
    offset : Tensor
        Readings of the mean state, shape (B, k), in units of the measurement.
    variance : Tensor
        Of the noise, positive, shape (B, k), in units of the measurement squared.
    present : Tensor
        False where a row is padding, shape (B, k), bool.
    """

    rows: Tensor
    offset: Tensor
    variance: Tensor
    present: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, c: Tensor) -> Tensor:
        """Noise-free readings (B, k) of state coordinates (B, s)."""
        return self.offset + (self.rows @ c.unsqueeze(2)).squeeze(2)

    def measure(self, c: Tensor, generator: torch.Generator) -> Tensor:
        """Readings (B, k) with noise; zero where a row is padding."""
        white = torch.randn(self.offset.shape, generator=generator, dtype=c.dtype, device=c.device)
        return torch.where(self.present, self.read(c) + self.variance.sqrt() * white, 0.0)

    def to(self, *args, **kwargs) -> "Sensors":
        """Copy with every tensor moved by `torch.Tensor.to`; `present` stays a mask."""
        moved = [getattr(self, f.name).to(*args, **kwargs) for f in fields(self)]
        return Sensors(*moved[:3], moved[3].bool())


@dataclass(frozen=True)
class SensorPool:
    """Candidates of one kind, of which a layout holds some.

    Parameters
    ----------
    rows : Tensor
        Of K candidates with g rows each (a time series has several), shape (K, g, s).
    offset : Tensor
        Shape (K, g).
    std : Tensor
        Smallest and largest standard deviation of the noise, shape (2, K, g); each sensor draws its own,
        log-uniformly between them.
    count : tuple of int
        Fewest and most candidates in a layout; between them the logarithm of the number is uniform.
    """

    rows: Tensor
    offset: Tensor
    std: Tensor
    count: tuple[int, int]

    def __post_init__(self):
        least, most = self.count
        if not 0 <= least <= most <= len(self.rows) or most == 0:
            raise InputError(f"A layout of {least} to {most} sensors cannot be drawn from {len(self.rows)} candidates.")

    def draw(self, size: int, generator: torch.Generator) -> Sensors:
        """Layouts without repetition, all padded to the most that there can be."""
        least, most = self.count
        move = {"device": self.rows.device, "generator": generator}
        number = (least + 1) * ((most + 2) / (least + 1))**torch.rand(size, dtype=torch.float64, **move)
        number = (number.long() - 1).clamp(least, most)
        chosen = torch.rand(size, len(self.rows), **move).topk(most, dim=1).indices
        present = torch.arange(most, device=self.rows.device) < number[:, None]
        share = torch.rand(size, most, 1, dtype=self.std.dtype, **move)
        low, high = self.std[:, chosen]
        std = low**(1 - share) * high**share
        seen = present[:, :, None].expand_as(std)
        flat = [torch.where(seen[..., None], self.rows[chosen], 0.0).flatten(1, 2),
                torch.where(seen, self.offset[chosen], 0.0).flatten(1),
                torch.where(seen, std**2, 1.0).flatten(1), seen.flatten(1)]
        return Sensors(*flat)

    def to(self, *args, **kwargs) -> "SensorPool":
        """Copy with every tensor moved by `torch.Tensor.to`."""
        return SensorPool(*(x.to(*args, **kwargs) for x in (self.rows, self.offset, self.std)), self.count)


@dataclass(frozen=True)
class LayoutLaw:
    """Random layouts: some sensors of each pool, all in one measurement.

    Parameters
    ----------
    pools : tuple of SensorPool
        With the same state coordinates.
    """

    pools: tuple[SensorPool, ...]

    def draw(self, size: int, generator: torch.Generator) -> Sensors:
        """Independent layouts, `size` of them."""
        parts = [pool.draw(size, generator) for pool in self.pools]
        return Sensors(*(torch.cat([getattr(part, f.name) for part in parts], dim=1) for f in fields(Sensors)))

    def to(self, *args, **kwargs) -> "LayoutLaw":
        """Copy with every tensor moved by `torch.Tensor.to`."""
        return LayoutLaw(tuple(pool.to(*args, **kwargs) for pool in self.pools))
