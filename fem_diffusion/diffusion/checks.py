"""Checks of tensors and random generators at the door of every public function of this room."""

from typing import Any

import torch
from torch import Tensor

from fem_diffusion.checks import LARGEST, check_kind, shape_fits, shape_words
from fem_diffusion.errors import InputError

__all__ = ["check_generator", "check_near", "check_pairs", "check_tensor"]

# Beyond so many standard deviations of the training measurements a network in single precision overflows.
_FAR = 1e12


def check_tensor(x: Any, name: str, shape: tuple, columns: str = "columns") -> Tensor:
    """The tensor itself, of any real dtype: finite numbers whose squares do not overflow; InputError otherwise.

    Its shape is of numbers, and of words that each stand for one number: ("n", "r"). Messages say by `columns` what
    its last axis counts, and name those that hold bad values.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{name} is of type {type(x).__name__}: pass torch.as_tensor(...) of an array of shape "
                         f"{shape_words(shape)}.")
    if x.is_complex() or x.dtype == torch.bool:
        remedy = "give real and imaginary parts by themselves" if x.is_complex() else "give real numbers"
        raise InputError(f"{name} holds {x.dtype} values: {remedy}.")
    if not shape_fits(x.shape, shape):
        raise InputError(f"{name} has the shape {tuple(x.shape)}: give {shape_words(shape)}.")
    # In single precision the bound is infinite.
    bad = ~(torch.isfinite(x) & (x.abs() <= LARGEST))
    if bad.any():
        where = torch.where(bad.reshape(-1, bad.shape[-1]).any(0))[0].tolist() if bad.ndim else []
        raise InputError(f"{name} holds values that are not finite, or beyond {LARGEST:g}, at {columns} {where}: leave "
                         "those samples out, mend where they come from, or take other units.")
    return x


def check_pairs(z: Tensor, y: Tensor, more: int | None = None) -> tuple[int, int]:
    """Numbers n and r; InputError unless readings (n, k) can be regressed on latents (n, r): n > 1, or n > r + more."""
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


def check_near(deviations: Tensor, sensors: Tensor) -> None:
    """Raise InputError where measurements (B, k), in standard deviations from those of training, are out of reach.

    The numbers of their sensors are (k,).
    """
    far = (deviations.abs() > _FAR).any(0).cpu()
    if far.any():
        raise InputError(f"The readings of sensors {sensors.cpu()[far].tolist()} are more than {_FAR:g} standard "
                         "deviations from those of the training, beyond what a network's arithmetic holds: check "
                         "their units.")


def check_generator(generator: Any, device: torch.device) -> torch.Generator:
    """A source of random numbers on the device where they are drawn."""
    check_kind(generator, "generator", torch.Generator, f"torch.Generator({str(device)!r}).manual_seed(seed)")
    if generator.device.type != device.type:
        raise InputError(f"The generator is on {str(generator.device)!r} and the data are on {str(device)!r}: pass "
                         f"torch.Generator({str(device)!r}).manual_seed(seed).")
    return generator
