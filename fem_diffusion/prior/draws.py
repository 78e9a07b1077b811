"""Draws some at a time, and draws of which only those count that a constraint allows."""

from collections.abc import Callable, Iterator

import numpy as np

from fem_diffusion.checks import stream
from fem_diffusion.errors import SolveError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import owned_size
from fem_diffusion.prior.protocol import Prior

__all__ = ["chunks", "filled", "prior_fields", "restricted"]

# Samples that are decoded together; draws of a prior that are looked at together.
_CHUNK, _BLOCK = 64, 256
# Draws of modes past those of a basis until a constraint allows them.
_TRIES = 100
# Draws for each one that is wanted, and in all, after which too few are allowed.
_TIMES, _FEWEST = 50, 5000


def chunks(n: int, seed: int) -> Iterator[tuple[slice, int]]:
    """Some of n samples at a time, each with a seed of its own for the modes that they lack.

    There may be more unknowns than memory for several copies of all samples.
    """
    for number, first in enumerate(range(0, n, _CHUNK)):
        yield slice(first, first + _CHUNK), stream(seed, f"chunk {number}")


def filled(prior: Prior, basis: ModalBasis, z: np.ndarray, seed: int, constrained: bool = True) -> np.ndarray:
    """Parameters (n, n_owned of V) with latents z (n, r); modes past r are drawn from a prior where they are Gaussian.

    Where it is `constrained` they are drawn anew until it allows them; SolveError if it hardly does (collective).
    """
    out = np.empty((len(z), owned_size(prior.V)))
    allows = prior.allows if constrained and basis.standard_prior else None
    for part, tail in chunks(len(z), seed):
        fields = basis.decode(z[part], tail if basis.standard_prior else None)
        for number in range(_TRIES if allows else 0):
            wrong = np.flatnonzero(~allows(fields))   # pyright: ignore[reportOptionalCall]
            if not len(wrong):
                break
            fields[wrong] = basis.decode(z[part][wrong], stream(tail, f"again {number}"))
        else:
            if allows:
                raise SolveError(f"Modes past the {basis.r} of the basis decide whether the prior allows a sample: "
                                 "give a basis of more modes, karhunen_loeve(prior, r).")
        out[part] = prior.transform_many(fields)
    return out


def restricted(allows: Callable[[np.ndarray], np.ndarray], n: int, draw: Callable[[int], tuple[np.ndarray, ...]],
               remedy: str) -> list[np.ndarray]:
    """The first n rows that are allowed of what `draw` gives by number of the round, by the first of its parts.

    SolveError with a remedy where hardly any are (collective).
    """
    kept, found, tried, number = [], 0, 0, 0
    while found < n:
        if tried >= max(_TIMES * n, _FEWEST):
            raise SolveError(f"The constraint of the prior allows {found} of {tried:,} draws, and {n} are asked for: "
                             f"{remedy}.")
        parts = draw(number)
        there = allows(parts[0])
        kept.append([part[there] for part in parts])
        found, tried, number = found + int(there.sum()), tried + len(there), number + 1
    return [np.concatenate(part)[:n] for part in zip(*kept)]


def prior_fields(prior: Prior, n: int, seed: int) -> np.ndarray:
    """Draws (n, n_owned of core.V) of a prior before any transform, the first ones that it allows."""
    if prior.allows is None:
        return prior.core.sample_many(n, seed)
    # Blocks of one size: the first draws are the same, however many follow.
    return restricted(prior.allows, n, lambda i: (prior.core.sample_many(_BLOCK, stream(seed, f"block {i}")),),
                      "mend the constraint, or take a prior that fulfils it more often")[0]
