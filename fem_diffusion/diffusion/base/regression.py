"""Least squares of what is seen on latents, whatever the units of either."""

import torch
from torch import Tensor

from fem_diffusion.checks import LARGEST
from fem_diffusion.diffusion.checks import check_tensor
from fem_diffusion.errors import InputError

__all__ = ["check_pairs", "regress", "spread"]


def spread(centred: Tensor) -> Tensor:
    """Root mean square of each column, shape (r,); 1 where it is zero."""
    size = centred.square().mean(0).sqrt()
    return torch.where(size > 0, size, 1.0)


def regress(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares c = offset + G z of coordinates (n, k) on latents (n, r), n > r + 1.

    Returns
    -------
    tuple of Tensor
        G (k, r), the offset (k,), and the covariance (k, k) of what is left.
    """
    n, r = z.shape
    z_mean, c_mean = z.mean(0), c.mean(0)
    centred, response = z - z_mean, c - c_mean
    # Each latent in units of its own spread: what counts as a rank must not depend on units.
    unit = spread(centred)
    matrix = torch.linalg.lstsq(centred / unit, response).solution.T / unit
    rest = response - centred @ matrix.T
    return matrix, c_mean - matrix @ z_mean, rest.T @ rest / (n - r - 1)


def check_pairs(z: Tensor, y: Tensor, more: int | None = None) -> tuple[int, int]:
    """Numbers of pairs and latents; InputError unless latents (n, r) and readings (n, k) can be regressed.

    At least two pairs, and more than latents and `more` together where that is given.
    """
    check_tensor(z, "z", ("n", "r"), "latents")
    check_tensor(y, "y", ("n", "k"), "sensors")
    (n, r), k = z.shape, y.shape[1]
    if len(y) != n or not r or not k:
        raise InputError(f"Latents (n, r) and readings (n, k) are needed for the same pairs, not {tuple(z.shape)} and "
                         f"{tuple(y.shape)}: simulate again.")
    if n <= (1 if more is None else r + more):
        raise InputError(f"{n} pairs cannot determine a base for {r} latents: simulate more, or keep fewer modes.")
    if not (z.amax(0) > z.amin(0)).all():
        raise InputError("A latent takes the same value in all pairs: leave it out.")
    for name, x in (("latents", z), ("sensors", y)):
        size = x.abs().amax(0)
        small = (size > 0) & (size < 1 / LARGEST)
        if small.any():
            raise InputError(f"All values of {name} {torch.where(small)[0].tolist()} are below {1 / LARGEST:g}, where "
                             "squares vanish: take other units.")
    return n, r
