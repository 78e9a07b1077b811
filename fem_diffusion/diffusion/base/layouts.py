"""Sensors as rows over what an emulator gives, and families from which training draws layouts of them.

`Layout`, `LayoutKind` and `LayoutFamily` are to latents what `Observation`, `SensorKind` and `SensorFamily` are to
fields on a mesh. A layout has any number of sensors. Layouts of a batch are padded to the same number of rows; a padded
row sees nothing and reads zero with unit noise, so it says nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fem_diffusion.checks import check_all, check_count
from fem_diffusion.diffusion.checks import check_tensor
from fem_diffusion.diffusion.tensors import Tensors, mapped
from fem_diffusion.errors import InputError

__all__ = ["FLOOR", "Layout", "LayoutFamily", "LayoutKind", "decorrelated"]

# Smallest variance of noise, in units of the prior variance of the reading.
FLOOR = 1e-12


@dataclass(frozen=True, eq=False, repr=False)
class Layout(Tensors):
    """Linear sensors of B measurements: reading = offset + rows · c + noise.

    Parameters
    ----------
    rows : Tensor
        Over the s state coordinates c, shape (B, k, s).
    offset, variance : Tensor
        Readings of the mean state, and variance of the noise, positive, shape (B, k) each, in units of the measurement
        and its square.
    present : Tensor
        False where a row is padding, shape (B, k), bool.
    """

    rows: Tensor
    offset: Tensor
    variance: Tensor
    present: Tensor

    @classmethod
    def readings(cls, k: int, like: Tensor) -> "Layout":
        """The one layout of k fixed sensors, B = 1, whose coordinates are their readings; their noise is elsewhere."""
        zeros = like.new_zeros(1, k)
        return cls(torch.eye(k, dtype=like.dtype, device=like.device)[None], zeros, zeros, zeros == 0)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, c: Tensor) -> Tensor:
        """Noise-free readings (B, k) of state coordinates (B, s)."""
        if len(self) == 1:
            return self.offset + c @ self.rows[0].mT
        return self.offset + (self.rows @ c.unsqueeze(2)).squeeze(2)

    def select(self, index: Tensor) -> "Layout":
        """Layouts of some of the measurements; the one layout of all stays as it is."""
        return self if len(self) == 1 else mapped(self, lambda x: x[index])

    def measure(self, c: Tensor, generator: torch.Generator) -> Tensor:
        """Readings (B, k) with noise; zero where a row is padding."""
        white = torch.randn(self.offset.shape, generator=generator, dtype=c.dtype, device=c.device)
        return torch.where(self.present, self.read(c) + self.variance.sqrt() * white, 0.0)

    def standardised(self, y: Tensor) -> tuple["Layout", Tensor]:
        """The same sensors and their readings `y` (B, k), each as the deviation from the mean in prior spreads.

        So single precision holds them, whatever their units.
        """
        spread = (self.rows.square().sum(2) + self.variance).sqrt()
        layout = Layout(self.rows / spread[:, :, None], torch.zeros_like(self.offset), self.variance / spread**2,
                        self.present)
        return layout, (y - self.offset) / spread


@dataclass(frozen=True, eq=False)
class LayoutKind(Tensors):
    """Candidates of one kind, of which a layout holds some.

    InputError if shapes disagree, a number is not finite and real, a standard deviation is not positive or the smallest
    is not the first, or there are not so many candidates.

    Parameters
    ----------
    rows : Tensor
        Of K candidates with g rows each (a time series has several), shape (K, g, s).
    offset, std : Tensor
        Shape (K, g), and the smallest and largest standard deviation of the noise, shape (2, K, g); each sensor draws
        its own, log-uniformly between them.
    count : tuple of int
        Fewest and most candidates in a layout; between them the logarithm of the number is uniform.
    """

    rows: Tensor
    offset: Tensor
    std: Tensor
    count: tuple[int, int]

    def __post_init__(self) -> None:
        K, g, _ = check_tensor(self.rows, "The rows of a kind", ("K", "g", "s"), "coordinates").shape
        check_tensor(self.offset, "The offset of a kind", (K, g), "rows")
        if not (0 < check_tensor(self.std, "The std of a kind", (2, K, g), "rows")).all() or (
                self.std[0] > self.std[1]).any():
            raise InputError("Every sensor needs noise: std must be positive, the smallest value first.")
        if not isinstance(self.count, (tuple, list)) or len(self.count) != 2:
            raise InputError(f"count is {self.count!r}: give the fewest and the most sensors, e.g. (1, 64).")
        least, most = (check_count(n, "count", least=0) for n in self.count)
        object.__setattr__(self, "count", (least, most))
        if not 0 <= least <= most <= len(self.rows) or most == 0:
            raise InputError(f"A layout of {least} to {most} sensors cannot be drawn from {len(self.rows)} candidates.")

    def draw(self, size: int, generator: torch.Generator) -> Layout:
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
        return Layout(torch.where(seen[..., None], self.rows[chosen], 0.0).flatten(1, 2),
                      torch.where(seen, self.offset[chosen], 0.0).flatten(1),
                      torch.where(seen, std**2, 1.0).flatten(1), seen.flatten(1))


@dataclass(frozen=True, eq=False)
class LayoutFamily(Tensors):
    """Random layouts: some sensors of each kind, all in one measurement.

    InputError unless the kinds are one or more, with the same number of state coordinates.
    """

    kinds: tuple[LayoutKind, ...]

    def __post_init__(self) -> None:
        kinds = check_all((self.kinds,) if isinstance(self.kinds, LayoutKind) else self.kinds, "kinds", LayoutKind)
        if len({kind.rows.shape[2] for kind in kinds}) != 1:
            raise InputError("The kinds of a family must see the same number of state coordinates: give at least one "
                             "kind, all of them made from one basis of states.")
        object.__setattr__(self, "kinds", kinds)

    @property
    def weights(self) -> Tensor:
        """What an error of each coordinate counts: root mean square over candidates, in units of noise, shape (s,)."""
        rows = torch.cat([(kind.rows / kind.std.log().mean(0).exp()[..., None]).flatten(0, 1) for kind in self.kinds])
        weights = rows.square().mean(0).sqrt()
        return weights.clamp(min=1e-6 * float(weights.max()) or 1.0)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Rows (k, s) and least noise (k,) of twice as many sensors of every kind as a layout can have, at random."""
        generator = torch.Generator().manual_seed(0)
        chosen = [(kind, torch.randperm(len(kind.rows), generator=generator)[:2 * kind.count[1]])
                  for kind in self.kinds]
        return (torch.cat([kind.rows[i].flatten(0, 1) for kind, i in chosen]),
                torch.cat([kind.std[0][i].flatten() for kind, i in chosen]))

    def draw(self, size: int, generator: torch.Generator) -> Layout:
        """Independent layouts, `size` of them."""
        parts = [vars(kind.draw(size, generator)).values() for kind in self.kinds]
        return Layout(*(torch.cat(x, dim=1) for x in zip(*parts)))


def decorrelated(rows: Tensor, offset: Tensor, covariance: Tensor,
                 y: Tensor) -> tuple[Layout, Tensor]:
    """The same measurements (..., k) with independent noise: as they are, or in the principal axes of the noise."""
    # A reading without noise would leave no density: it gets a millionth of its prior standard deviation.
    variance = torch.maximum(covariance.diagonal(), FLOOR * rows.square().sum(1) + 1e-300)
    if len(rows) and not torch.equal(covariance, torch.diag(covariance.diagonal())):
        # Each sensor in units of its own noise first: pascals beside mole fractions lose nothing.
        scale = variance.sqrt()
        values, axes = torch.linalg.eigh((covariance + torch.diag(variance - covariance.diagonal())) / scale
                                         / scale[:, None])
        rows, offset, y = axes.T @ (rows / scale[:, None]), axes.T @ (offset / scale), (y / scale) @ axes
        variance = torch.maximum(values, FLOOR * rows.square().sum(1) + 1e-14)
    return Layout(rows[None], offset[None], variance[None], torch.ones(1, len(rows), dtype=torch.bool)), y
