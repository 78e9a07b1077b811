"""Score networks, interchangeable behind one protocol; a new one is a file here and a line in `NETWORKS`."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.network.mean import MeanNetwork
from fem_diffusion.diffusion.network.mesh import FieldGeometry, FieldNetwork
from fem_diffusion.diffusion.network.mlp import ResidualMLP, ScoreModule
from fem_diffusion.diffusion.network.sensors import SensorNetwork

__all__ = ["NETWORKS", "MeanNetwork", "ScoreModule", "ScoreNetwork", "build", "name_of"]

# By the names that `fit` and `fit_denoiser` take and model files hold. NETWORKS["mine"] = Mine adds a user's own.
NETWORKS: dict[str, type[ScoreModule]] = {"latents": ResidualMLP, "field": FieldNetwork, "sensors": SensorNetwork}


@runtime_checkable
class ScoreNetwork(Protocol):
    """What the network of a `Denoiser` has to offer: the door for users' own.

    What it sees of a measurement is made once, in two parts, then it is called at every noise level.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of its states."""
        ...

    def see(self, base: GaussianBase, layout: Layout, y: Tensor, located: Located) -> tuple[Tensor, ...]:
        """What it looks at of B measurements (B, k), in its own precision, shape (B, ...) each; no weights take part.

        The layout and parts of `located` may be shared, with a leading size of 1; so may the results. Nothing that it
        gets is its own to write into.
        """
        ...

    def context(self, *seen: Tensor) -> tuple[Tensor, ...]:
        """What its weights make of that, shape (B, ...) each."""
        ...

    def __call__(self, v: Tensor, angle: Tensor, *context: Tensor) -> Tensor:
        """N (n, B, r) for n states in base coordinates of each measurement (n, B, r).

        The angle arctan(sigma) is of shape (n, B, 1), or (1, 1, 1) where it is the same for all. It gets copies.
        """
        ...


def build(name: str, r: int, k: int, width: int, depth: int, geometry: FieldGeometry | None = None) -> ScoreModule:
    """A network of the registry before training: r latents, k coordinates or readings, on a mesh where one is given."""
    more = {} if geometry is None else {"dimension": len(geometry.gradients)}
    return NETWORKS[name](r=r, k=k, width=width, depth=depth, **more).on(geometry)


def name_of(network: object) -> str | None:
    """The name in `NETWORKS` of a network, or of the members of a mean; None where it has none."""
    kind = type(network.members[0] if isinstance(network, MeanNetwork) else network)
    return next((name for name, known in NETWORKS.items() if kind is known), None)
