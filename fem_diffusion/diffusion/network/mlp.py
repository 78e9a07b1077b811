"""Score networks: residual networks with conditioning on noise level and measurement."""

from typing import Any

import torch
from torch import Tensor, nn

from fem_diffusion.checks import check_count
from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located
from fem_diffusion.diffusion.base.layouts import Layout

__all__ = ["Block", "ResidualMLP", "ScoreModule", "harmonics"]


class ScoreModule(nn.Module):
    """What the networks of `NETWORKS` share; see `ScoreNetwork`. It sees whitened measurements unless `see` differs.

    Sizes end up in `config`, from which files make it again: at least r, k, width and depth.
    """

    families = False   # whether it is for families of sensors, not for fixed ones
    mesh = False       # whether it has layers on a mesh
    rate = 1.0         # what the learning rate is multiplied by

    def __init__(self, **sizes: int):
        super().__init__()
        self.config = {name: check_count(size, name) for name, size in sizes.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the weights."""
        return next(self.parameters()).dtype

    def on(self, geometry: Any) -> "ScoreModule":
        """Itself: no layer is on a mesh."""
        return self

    def see(self, base: GaussianBase, layout: Layout, y: Tensor, located: Located) -> tuple[Tensor, ...]:
        """Whitened measurements (B, k)."""
        return base.features(y).to(self.dtype),

    def context(self, *seen: Tensor) -> tuple[Tensor, ...]:
        """The same."""
        return seen


class Block(nn.Module):
    """Pre-normalised residual block whose scale and shift come from the conditioning."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        return x + self.inner(self.norm(x) * (1 + scale) + shift)


def harmonics(angle: Tensor) -> Tensor:
    """What a network sees of the angle (..., 1): shape (..., 6)."""
    return torch.cat([f(m * angle) for m in (1, 2, 4) for f in (torch.cos, torch.sin)], dim=-1)


class ResidualMLP(ScoreModule):
    """Residual multilayer perceptron for N(v, angle, features of y); zero before training.

    It has r latents, k measurement features, and `depth` residual blocks around a stream of this width; InputError if
    a size is not positive.
    """

    def __init__(self, r: int, k: int, width: int = 128, depth: int = 3):
        super().__init__(r=r, k=k, width=width, depth=depth)
        self.embed_input = nn.Linear(r + k, width)
        self.embed_condition = nn.Sequential(nn.Linear(k + 6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, r)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, v: Tensor, angle: Tensor, features: Tensor) -> Tensor:
        """Network output (n, B, r) for states (n, B, r), angles and features (B, k); see `ScoreNetwork`."""
        features = features.expand(*torch.broadcast_shapes(features.shape[:-1], angle.shape[:-1]), -1)
        condition = torch.cat([features, harmonics(angle).expand(*features.shape[:-1], -1)], dim=-1)
        condition = self.embed_condition(condition)
        x = self.embed_input(torch.cat([v, features.expand(*v.shape[:-1], -1)], dim=-1))
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.norm(x))
