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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fem_diffusion.checks import check_count, check_kind
from fem_diffusion.diffusion.gaussian import GaussianBase
from fem_diffusion.diffusion.network import Block, harmonics
from fem_diffusion.errors import InputError

__all__ = ["FieldGeometry", "FieldNetwork"]

_FIELDS = 3  # denoised estimate, state, mean of the base


@dataclass(frozen=True)
class FieldGeometry:
    """What a network on fields has to know of the mesh; `fem_diffusion.fields.geometry` makes it from a basis.

    The domain has unit measure and the field unit mean variance here, so that units do not matter.

    Parameters
    ----------
    modes : Tensor
        Values of the modes at the points, orthonormal in L2, shape (r, q).
    projector : Tensor
        Maps values at the points to amplitudes of the modes, shape (q, r).
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


class FieldNetwork(nn.Module):
    """Residual network with layers on the mesh for N(v, angle, features of y); zero before training.

    It can be called once `on` has put it on a mesh.

    Parameters
    ----------
    r : int
        Number of latents.
    k : int
        Number of measurement features.
    width, depth : int
        Of the residual network between the layers on the mesh.
    channels : int
        Fields that the layers on the mesh hold.
    dimension : int
        Components of a gradient.

    Raises
    ------
    InputError
        If a size is not positive.
    """

    def __init__(self, r: int, k: int, width: int = 128, depth: int = 3, channels: int = 8, dimension: int = 2):
        super().__init__()
        sizes = {"r": r, "k": k, "width": width, "depth": depth, "channels": channels, "dimension": dimension}
        self.config = {name: check_count(size, name) for name, size in sizes.items()}
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
        for name in ("modes", "projector", "gradients", "mean", "mean_gradient", "spread", "gain"):
            self.register_buffer(name, None, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the weights."""
        return self.head.weight.dtype

    @property
    def row_size(self) -> int:
        """Numbers that the layers on the mesh hold for one row, about."""
        return 12 * self.config["channels"] * self.modes.shape[1]

    def on(self, geometry: FieldGeometry, base: GaussianBase) -> "FieldNetwork":
        """A copy with the same weights on a mesh.

        Parameters
        ----------
        geometry : FieldGeometry
            Of the basis whose latents the network sees.
        base : GaussianBase
            Whose coordinates the network sees.

        Returns
        -------
        FieldNetwork

        Raises
        ------
        InputError
            If geometry or base have another number of latents, measurements or dimensions.
        """
        check_kind(geometry, "geometry", FieldGeometry, "what fem_diffusion.fields.geometry makes of a basis")
        check_kind(base, "base", GaussianBase, "the base of the denoiser")
        r, k, dimension = self.config["r"], self.config["k"], self.config["dimension"]
        if (len(geometry.std), base.r, base.k, len(geometry.gradients)) != (r, r, k, dimension):
            raise InputError(f"The network was made for {r} latents, {k} measurements and {dimension} dimensions; the "
                             f"geometry has {len(geometry.std)} modes in {len(geometry.gradients)} dimensions, the "
                             f"base {base.r} latents and {base.k} measurements.")
        network, weight = deepcopy(self), self.head.weight
        std = geometry.std.to(base.factor)
        shift = std * base.latent_mean
        for name, modes in (("mean", geometry.modes), ("mean_gradient", geometry.gradients)):
            setattr(network, name, (getattr(geometry, name).to(std) + shift @ modes.to(std)).to(weight))
        for name in ("modes", "projector", "gradients"):
            setattr(network, name, getattr(geometry, name).to(weight))
        network.spread = (std[:, None] * base.factor).to(weight)
        # Each sensor in its own unit: the whitener divides by them.
        unit = base.whitener.norm(dim=0)
        gain = torch.linalg.solve(base.whitener / unit, base.gain / unit, left=False)
        network.gain = (std[:, None] * gain).to(weight)
        return network

    def forward(self, v: Tensor, angle: Tensor, features: Tensor) -> Tensor:
        """Network output.

        Parameters
        ----------
        v : Tensor
            Unit-variance state, shape (B, r).
        angle : Tensor
            arctan(sigma), shape (B, 1).
        features : Tensor
            Whitened measurements, shape (B, k).

        Returns
        -------
        Tensor
            Shape (B, r).
        """
        condition = self.embed_condition(torch.cat([features, harmonics(angle)], dim=-1))
        values, switches = self._pointwise(v, angle, features, condition)
        amplitudes = (values * switches @ self.projector).transpose(0, 1).flatten(1)
        x = self.embed_input(torch.cat([v, features], dim=-1)) + self.read(amplitudes)
        for block in self.blocks:
            x = block(x, condition)
        x = self.norm(x)
        decoded = self.write(x).view(len(v), -1, self.config["r"]).transpose(0, 1) @ self.modes
        product = (decoded * _at_points(self.gate, torch.cat([values, switches]))).sum(0)
        return self.head(x) + self.head_field(product @ self.projector @ self.spread)

    def _pointwise(self, v: Tensor, angle: Tensor, features: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Two affine maps of the fields at every point, one of them squashed, each (channels, B, q)."""
        state, centre = v @ self.spread.T, features @ self.gain.T
        amplitudes = torch.stack([centre + torch.cos(angle) * state, centre, torch.sin(angle) * state])
        fields = amplitudes @ self.modes
        slopes = amplitudes[0] @ self.gradients + self.mean_gradient[:, None]
        fields = torch.cat([fields[:2] + self.mean, fields[2:], slopes])
        values, switches = (_at_points(self.lift, fields) + self.lift_condition(condition).T[:, :, None]).chunk(2)
        return values, torch.tanh(switches)


def _at_points(layer: nn.Linear, fields: Tensor) -> Tensor:
    """A linear layer over the channels of fields (channels, B, q), at every point by itself."""
    return torch.addmm(layer.bias[:, None], layer.weight, fields.flatten(1)).view(-1, *fields.shape[1:])
