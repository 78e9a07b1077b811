"""One Hamiltonian move, the same for the emulator's density and for references with the finite element model."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["hamiltonian_move", "shorter"]

# Share of the points that go less far, and by how many powers of ten at most.
_SMALL, _POWERS = 0.25, 2.0


def shorter(position: Tensor, generator: torch.Generator) -> Tensor:
    """Factors (...) of the steps of points (..., r), below 1 for some: where a law is narrow others would be stuck."""
    u = torch.rand(position.shape[:-1], generator=generator, dtype=position.dtype, device=position.device)
    return torch.where(u < _SMALL, 10**(-_POWERS * u / _SMALL), 1.0)


def hamiltonian_move(position: Tensor, energy: Callable[[Tensor], Tensor], force: Callable[[Tensor], Tensor],
                     length: float | Tensor, leaps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Move points by a leapfrog trajectory that is accepted or refused (Neal 2011, section 5.3): points, acceptance.

    The trajectory is reversible and keeps volume for any force that depends on the position alone, so the force may
    come from a cheap approximation: the law stays exp(-energy) and only the acceptance, shape (...), suffers.

    Parameters
    ----------
    position : Tensor
        Points, shape (..., r), in coordinates in which their law is near standard normal.
    energy, force : Callable[[Tensor], Tensor]
        Negative log density up to a constant, (..., r) to (...); points where it is not finite are refused. Its
        gradient or an approximation, (..., r) to (..., r).
    length, leaps : float or Tensor, int
        Of a leapfrog step, of each point where it is of the shape (..., 1), and number of them.
    generator : torch.Generator
        Of momenta and acceptance, on the device of the points.
    """
    like = {"generator": generator, "dtype": position.dtype, "device": position.device}
    momentum = torch.randn(position.shape, **like)
    start = energy(position) + momentum.square().sum(-1) / 2
    place, momentum = position, momentum - length / 2 * force(position)
    for leap in range(leaps):
        place = place + length * momentum
        momentum = momentum - (length if leap < leaps - 1 else length / 2) * force(place)
    end = energy(place)
    gain = start - end - momentum.square().sum(-1) / 2
    # A comparison with NaN is false; an energy of minus infinity is no density either.
    accept = (torch.log(torch.rand(gain.shape, **like)) < gain) & torch.isfinite(end)
    return torch.where(accept[..., None], place, position), accept
