"""Coefficients of a function space in files: told apart by geometry, whatever the numbering and the number of ranks.

Rows of coefficients are gathered on rank 0, beside a key for every degree of freedom; reading picks this rank's columns
by the keys of the user's own space. No mesh is stored and no element is made from a file.
"""

import os

import numpy as np
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI

from fem_diffusion import files
from fem_diffusion.checks import together
from fem_diffusion.errors import FileError
from fem_diffusion.fields.coefficients import geometric_key, owned_columns

__all__ = ["element_of", "gather_keys", "gather_rows", "own_columns", "read_everywhere"]

_MESSAGE = 2**28    # bytes


def element_of(V: WithGeometry) -> str:
    """The element of a space in words; compared before coefficients are."""
    return str(V.ufl_element())


def gather_keys(V: WithGeometry) -> np.ndarray | None:
    """Keys of all degrees of freedom, shape (n_global, c), on rank 0; None elsewhere."""
    key = gather_rows(V, geometric_key(V).T)
    return None if key is None else np.ascontiguousarray(key.T)


def gather_rows(V: WithGeometry, rows: np.ndarray) -> np.ndarray | None:
    """Rows of coefficients (B, n_owned) as (B, n_global) on rank 0; None elsewhere."""
    if V.comm.size == 1:
        return np.array(rows)
    # In parts, because a message holds less than 2 GiB.
    step = max(1, _MESSAGE // (8 * max(1, V.dim())))
    parts = [V.comm.gather(rows[i:i + step]) for i in range(0, max(1, len(rows)), step)]
    return None if V.comm.rank else np.concatenate([np.concatenate(part, axis=1) for part in parts])


def own_columns(content: files.Content, keys: str, element: str, V: WithGeometry) -> np.ndarray:
    """Where this rank's degrees of freedom of V are among those of a file, shape (n_owned,).

    `keys` and `element` name what `gather_keys` and `element_of` made; FileError if it is of another mesh or space.
    """
    stored = content.value(element, str)
    remedy = "Pass the space that it was written with, on the same mesh."
    if stored != element_of(V):
        raise FileError(f"{content.path} belongs to another mesh or space: its element is {stored:.200}, not "
                        f"{element_of(V)}. {remedy}")
    columns = owned_columns(content.array(keys, None, None), V)
    if columns is None:
        # Where coefficients have an orientation, it follows the numbering of the mesh.
        oriented = not all(W.finat_element.has_pointwise_dual_basis for W in V if W.ufl_element().family() != "Real")
        ranks = ", or was written on another number of ranks, on which edges and faces are oriented otherwise"
        raise FileError(f"{content.path} belongs to another mesh or space{ranks if oriented else ''}. {remedy}")
    return columns


def read_everywhere(comm: MPI.Comm, path: str | os.PathLike, kind: str, remedy: str) -> files.Content:
    """As `files.read`; an error of one rank is one of all."""
    return together(comm, lambda: files.read(path, kind, remedy))
