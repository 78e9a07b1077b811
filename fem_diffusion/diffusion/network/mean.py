"""Several score networks as one, whose answer is the mean of theirs.

Denoiser and score are affine in N, so the mean of the outputs is the mean of the denoisers and of the scores. Errors
that initial weights and batches leave to chance average out; what all members have in common stays.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.network.mesh import FieldGeometry
from fem_diffusion.diffusion.network.mlp import ScoreModule

__all__ = ["MeanNetwork"]


class MeanNetwork(nn.Module):
    """The mean of networks of one class and size; a `ScoreNetwork`.

    Parameters
    ----------
    members : sequence of ScoreModule
        Two networks or more, which see the same of a measurement.
    """

    def __init__(self, members: Sequence[ScoreModule]):
        super().__init__()
        self.members = nn.ModuleList(members)

    def _each(self) -> list[ScoreModule]:
        return cast(list[ScoreModule], list(self.members))

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the weights."""
        return self._each()[0].dtype

    @property
    def mesh(self) -> bool:
        """Whether the members have layers on a mesh."""
        return self._each()[0].mesh

    @property
    def row_size(self) -> int:
        """Numbers that layers on a mesh hold for one row, about; the members are evaluated one after another."""
        return getattr(self._each()[0], "row_size", 0)

    def on(self, geometry: FieldGeometry) -> "MeanNetwork":
        """A copy with the same weights on a mesh; see `FieldNetwork.on`."""
        return MeanNetwork([member.on(geometry) for member in self._each()]).train(self.training)

    def see(self, base: GaussianBase, layout: Layout, y: Tensor, located: Located) -> tuple[Tensor, ...]:
        """What each member looks at."""
        return self._each()[0].see(base, layout, y, located)

    def context(self, *seen: Tensor) -> tuple[Tensor, ...]:
        """What the members make of that, one after another."""
        return tuple(part for member in self._each() for part in member.context(*seen))

    def forward(self, v: Tensor, angle: Tensor, *context: Tensor) -> Tensor:
        """Mean output (n, B, r) for states (n, B, r), angles and what `context` gives; see `ScoreNetwork`."""
        size = len(context) // len(self.members)
        outputs = [member(v, angle, *context[i * size:(i + 1) * size]) for i, member in enumerate(self._each())]
        return torch.stack(outputs).mean(0)
