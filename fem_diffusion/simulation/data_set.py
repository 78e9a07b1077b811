"""The folder of a data set: a header that says what is simulated, and a file for each block of samples."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fem_diffusion import files
from fem_diffusion.checks import check_path
from fem_diffusion.errors import DataError
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.fields.keyed import element_of, gather_keys, gather_rows, own_columns, read_everywhere

__all__ = ["Block", "Folder"]

_HEADER = "data_set.safetensors"
_FORMER_HEADER = "header.json"


@dataclass(frozen=True)
class Block:
    """Results of the samples of one block.

    Parameters
    ----------
    fields, observations : numpy.ndarray
        Of those that were solved, shape (m, n_owned) and (m, k).
    states : numpy.ndarray or None
        Shape (m, n_owned of U).
    count : int
        Number of samples that have had their turn: m, and those that failed.
    failed : dict of int to str
        Position of those that failed, to the reason.
    """

    fields: np.ndarray
    observations: np.ndarray
    states: np.ndarray | None
    count: int
    failed: dict

    @property
    def rows(self) -> list[int]:
        """Positions in the block of those that were solved."""
        return [i for i in range(self.count) if i not in self.failed]


class Folder:
    """Blocks of one data set, on any number of ranks.

    Parameters
    ----------
    path : path
        The folder.
    V : firedrake.functionspaceimpl.WithGeometry
        Space of the fields.
    U : firedrake.functionspaceimpl.WithGeometry or None
        Space of the states where they are wanted.
    """

    def __init__(self, path: str | os.PathLike, V, U=None):
        self.path, self.V, self.U, self.comm = check_path(path), V, U, V.comm
        self._columns = {}

    def exists(self) -> bool:
        """Whether there is a data set in the folder (collective)."""
        def look():
            if (self.path / _FORMER_HEADER).exists():
                raise DataError(f"{self.path} holds a data set of version 0.1.0, which this version does not read: "
                                "name another folder, or delete this one.")
            return (self.path / _HEADER).exists()
        return on_root(self.comm, look)

    def create(self, seed: int, block: int, fields: np.ndarray, observations: np.ndarray) -> None:
        """Write the header of a new data set, with a few samples by which its problem is recognised (collective)."""
        arrays = {"fields.key": gather_keys(self.V), "probe.fields": gather_rows(self.V, fields)}
        if self.U is not None:
            arrays["states.key"] = gather_keys(self.U)
        values = {"seed": seed, "block": block, "fields.element": element_of(self.V),
                  "states.element": None if self.U is None else element_of(self.U)}

        def write():
            files.write(self.path / _HEADER, "data set", arrays | {"probe.observations": observations}, values)
        on_root(self.comm, write)

    def open(self) -> files.Content:
        """Read the header; DataError or FileError if it is none, or of other spaces (collective)."""
        if not self.exists():
            raise DataError(f"{self.path} is no data set of fem_diffusion: name a folder that simulate wrote.")
        self.header = header = read_everywhere(
            self.comm, self.path / _HEADER, "data set",
            f"Delete that file and run simulate again, which keeps the blocks in {self.path} that are whole.")
        header.value("seed", int)
        if header.value("block", int) < 1:
            raise header.error("holds a block size that is not positive")
        self._columns["fields"] = own_columns(header, "fields.key", "fields.element", self.V)
        if self.U is not None:
            if header.value("states.element", str, type(None)) is None:
                raise DataError(f"{self.path} holds no states: simulate with keep_states=True in another folder.")
            self._columns["states"] = own_columns(header, "states.key", "states.element", self.U)
        return header

    @property
    def size(self) -> int:
        """Samples in a whole block."""
        return self.header.values["block"]

    @property
    def sensors(self) -> int:
        """Number of readings of a sample."""
        return self.header.array("probe.observations", None, None, finite=False).shape[1]

    def probe(self) -> tuple[np.ndarray, np.ndarray]:
        """Fields (p, n_owned) and readings (p, k) by which the problem is recognised; NaN where a solve failed."""
        observations = self.header.array("probe.observations", None, None, finite=False)
        fields = self.header.array("probe.fields", len(observations), len(self.header.arrays["fields.key"]))
        return fields[:, self._columns["fields"]], observations

    def blocks(self) -> list[int]:
        """Numbers of the blocks that are there, in order (collective)."""
        def look():
            found = (re.fullmatch("block-([0-9]{5,})", file.stem) for file in self.path.glob("block-*.safetensors"))
            return sorted(int(match[1]) for match in found if match)
        return on_root(self.comm, look)

    def file(self, index: int) -> Path:
        """Path of a block."""
        return self.path / f"block-{index:05d}.safetensors"

    def clean(self) -> None:
        """Remove what a killed run has left; on one rank, under the lock of the folder."""
        for file in self.path.glob("*.partial"):
            with contextlib.suppress(OSError):
                file.unlink()

    def lock(self):
        """Context that keeps other runs out; on one rank, which makes the folder."""
        files.make_folder(self.path)
        return files.locked(self.path / "in_use.lock", f"The folder {self.path}")

    def write(self, index: int, block: Block) -> None:
        """Write a block, whole or not at all (collective)."""
        arrays = {"fields": gather_rows(self.V, block.fields), "observations": block.observations}
        if block.states is not None:
            arrays["states"] = gather_rows(self.U, block.states)
        values = {"data set": self.header.checksum, "seed": self.header.values["seed"], "index": index,
                  "count": block.count, "failed": {str(i): reason for i, reason in block.failed.items()}}
        on_root(self.comm, lambda: files.write(self.file(index), "block", arrays, values))

    def read(self, index: int) -> Block:
        """This rank's part of a block; FileError if it is damaged or not that block of this data set (collective)."""
        content = read_everywhere(self.comm, self.file(index), "block", "Delete that file and run simulate again.")
        identity = {"data set": self.header.checksum, "seed": self.header.values["seed"], "index": index}
        for name, wanted in identity.items():
            if content.value(name, type(wanted)) != wanted:
                raise content.error(f"is not block {index} of this data set: its {name} is {content.values[name]}")
        count, failed = content.value("count", int), content.value("failed", dict)
        positions = {str(i) for i in range(min(count, self.size))}
        if not 0 < count <= self.size or not all(
                i in positions and isinstance(reason, str) for i, reason in failed.items()):
            raise content.error("holds counts that do not fit its samples")
        rows = count - len(failed)
        parts = {name: content.array(name, rows, len(self.header.arrays[f"{name}.key"]))[:, columns]
                 for name, columns in self._columns.items()}
        return Block(parts["fields"], content.array("observations", rows, self.sensors), parts.get("states"), count,
                     {int(i): reason for i, reason in failed.items()})
