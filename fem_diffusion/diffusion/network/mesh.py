r"""A score network whose first and last layers live on the points of a mesh.

A field that enters the forward map as :math:`m = f^2` or :math:`e^f` makes a posterior that a fully connected network
must learn product by product, although the nonlinearity acts at every point by itself. Here the state is decoded to
fields, on which pointwise layers act; their mass-orthonormal projection on the modes feeds the residual network. Its
output is decoded again, multiplied with the pointwise features and projected by the adjoint of the decoding, as the
gradient of a log likelihood would be,

.. math:: N = h_0 + A\, (\Phi \Lambda^{1/2} L)^T M \left[\textstyle\sum_c g_c(x)\, h_c(x)\right] .

The weights act on mode amplitudes and on channels at a point, and every integral is a projection through the mass
matrix: another mesh of the same domain exchanges the geometry and keeps the weights.
"""

from copy import deepcopy
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from fem_diffusion.checks import check_kind
from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located, apply
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.network.mlp import Block, ScoreModule, harmonics
from fem_diffusion.errors import InputError

__all__ = ["FieldGeometry", "FieldNetwork"]

_FIELDS = 3  # denoised estimate, state, mean of the base


@dataclass(frozen=True, eq=False)
class FieldGeometry:
    """What a network on fields has to know of the mesh; `fem_diffusion.fields.geometry` makes it from a basis.

    The domain has unit measure and the field unit mean variance here, so that units do not matter.

    Parameters
    ----------
    modes, projector : Tensor
        Values of the modes at the points, orthonormal in L2, shape (r, q), and the map of values at the points to
        amplitudes of the modes, shape (q, r).
    gradients : Tensor
        Of the modes at the points, in units of one over the distance between modes, shape (d, r, q).
    mean, mean_gradient : Tensor
        Mean of the field at the points and its gradient, shapes (q,) and (d, q).
    std : Tensor
        Standard deviations of the amplitudes, shape (r,).
    """

    modes: Tensor
    projector: Tensor
    gradients: Tensor
    mean: Tensor
    mean_gradient: Tensor
    std: Tensor


class FieldNetwork(ScoreModule):
    """Residual network with layers on the mesh for N(v, angle, features of y); zero before training.

    It can be called once `on` has put it on a mesh. Sizes are as for `ResidualMLP`, with the number of fields that the
    layers on the mesh hold, `channels`, and of components of a gradient, `dimension`.
    """

    mesh = True
    modes: Tensor
    projector: Tensor
    gradients: Tensor
    mean: Tensor
    mean_gradient: Tensor
    std: Tensor

    def __init__(self, r: int, k: int, width: int = 128, depth: int = 3, channels: int = 8, dimension: int = 2):
        super().__init__(r=r, k=k, width=width, depth=depth, channels=channels, dimension=dimension)
        self.embed_input = nn.Linear(r + k, width)
        self.embed_condition = nn.Sequential(nn.Linear(k + 6, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.lift = nn.Linear(_FIELDS + dimension, 2 * channels)
        self.lift_condition = nn.Linear(width, 2 * channels)
        self.read = nn.Linear(channels * r, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, r)
        self.write = nn.Linear(width, channels * r)
        self.gate = nn.Linear(2 * channels, channels)
        self.head_field = nn.Linear(r, r, bias=False)
        for parameter in (*self.lift_condition.parameters(), *self.head.parameters(), self.head_field.weight):
            nn.init.zeros_(parameter)
        # Geometry is no state: it belongs to a mesh, the weights to all.
        for f in fields(FieldGeometry):
            self.register_buffer(f.name, None, persistent=False)

    @property
    def row_size(self) -> int:
        """Numbers that the layers on the mesh hold for one row, about."""
        return 12 * self.config["channels"] * self.modes.shape[1]

    def on(self, geometry: FieldGeometry) -> "FieldNetwork":
        """A copy with the same weights on a mesh, that of the basis whose latents the network sees.

        InputError if the geometry has another number of latents or dimensions.
        """
        check_kind(geometry, "geometry", FieldGeometry, "what fem_diffusion.fields.geometry makes of a basis")
        found, wanted = (len(geometry.std), len(geometry.gradients)), (self.config["r"], self.config["dimension"])
        if found != wanted:
            raise InputError(f"The network was made for {wanted[0]} latents in {wanted[1]} dimensions, the geometry "
                             f"has {found[0]} modes in {found[1]}: pass the basis of the training, or train anew.")
        network = deepcopy(self)
        for name, x in vars(geometry).items():
            setattr(network, name, x.to(self.head.weight))
        return network

    def see(self, base: GaussianBase, layout: Layout, y: Tensor, located: Located) -> tuple[Tensor, ...]:
        """Whitened measurements (B, k), and amplitudes of the base: means (B, r) and factors (B, r, r)."""
        seen = base.features(y), self.std * located.mean, self.std[:, None] * located.factor
        return tuple(x.to(self.dtype) for x in seen)

    def forward(self, v: Tensor, angle: Tensor, features: Tensor, centre: Tensor, factor: Tensor) -> Tensor:
        """Network output (n, B, r) for states (n, B, r), angles and what `see` gives; see `ScoreNetwork`."""
        shape, rows = v.shape, v.shape[0] * v.shape[1]
        features, centre, angle = (x.expand(*shape[:2], -1).reshape(rows, -1) for x in (features, centre, angle))
        state, v = apply(factor, v).reshape(rows, -1), v.reshape(rows, -1)
        condition = self.embed_condition(torch.cat([features, harmonics(angle)], dim=-1))
        values, switches = self._pointwise(state, centre, angle, condition)
        amplitudes = (values * switches @ self.projector).transpose(0, 1).flatten(1)
        x = self.embed_input(torch.cat([v, features], dim=-1)) + self.read(amplitudes)
        for block in self.blocks:
            x = block(x, condition)
        x = self.norm(x)
        decoded = self.write(x).view(rows, -1, shape[2]).transpose(0, 1) @ self.modes
        product = (decoded * _at_points(self.gate, torch.cat([values, switches]))).sum(0) @ self.projector
        return self.head(x).view(shape) + self.head_field(apply(factor.mT, product.view(shape)))

    def _pointwise(self, state: Tensor, centre: Tensor, angle: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Two affine maps of the fields at every point, one of them squashed, each (channels, B, q)."""
        amplitudes = torch.stack([centre + torch.cos(angle) * state, centre, torch.sin(angle) * state])
        values = amplitudes @ self.modes
        slopes = amplitudes[0] @ self.gradients + self.mean_gradient[:, None]
        values = torch.cat([values[:2] + self.mean, values[2:], slopes])
        values, switches = (_at_points(self.lift, values) + self.lift_condition(condition).T[:, :, None]).chunk(2)
        return values, torch.tanh(switches)


def _at_points(layer: nn.Linear, channels: Tensor) -> Tensor:
    """A linear layer over the channels of fields (channels, B, q), at every point by itself."""
    return torch.addmm(layer.bias[:, None], layer.weight, channels.flatten(1)).view(-1, *channels.shape[1:])
