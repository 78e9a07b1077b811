"""Training pairs, and the folder of a data set: a header that says what is simulated, and a file for each block."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from firedrake.functionspaceimpl import WithGeometry

from fem_diffusion import files
from fem_diffusion.checks import check_path
from fem_diffusion.errors import DataError
from fem_diffusion.fields.basis import ModalBasis, pack_basis, unpack_basis
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.fields.keyed import element_of, gather_keys, gather_rows, own_columns, read_everywhere
from fem_diffusion.prior.protocol import Prior

__all__ = ["Block", "DataSet", "Folder"]

_HEADER, _MODES = "data_set.safetensors", "modes.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class DataSet:
    """Training pairs.

    Parameters
    ----------
    coefficients : numpy.ndarray
        Of the prior's fields, before any transform; owned, shape (n, n_owned).
    readings : numpy.ndarray
        Without noise, shape (n, k), global.
    states : numpy.ndarray or None
        Owned coefficients, shape (n, n_owned of U), where they were kept.
    skipped : tuple of (int, str)
        Number and reason of each sample that is missing because its solve failed; `simulated_parameter` gives its
        parameter.
    chosen : int
        How many of the last ones are of no prior draw, but near a measurement, by `refine`.
    derivatives : numpy.ndarray or None
        Of the readings by the latents of `basis`, shape (n, k, R), global, where they were kept.
    basis : ModalBasis or None
        Of R modes, in which the derivatives are written.
    """

    coefficients: np.ndarray
    readings: np.ndarray
    states: np.ndarray | None = None
    skipped: tuple[tuple[int, str], ...] = ()
    chosen: int = 0
    derivatives: np.ndarray | None = None
    basis: ModalBasis | None = None

    def __len__(self) -> int:
        return len(self.readings)

    def __repr__(self) -> str:
        states, skipped = "no states" if self.states is None else "states", len(self.skipped)
        if self.basis is not None:
            states += f", derivatives by {self.basis.r} latents"
        return (f"DataSet: {len(self)} pairs with {self.readings.shape[1]} readings and {states}"
                + f", {skipped} skipped" * bool(skipped) + f", {self.chosen} chosen by refine" * bool(self.chosen))


@dataclass(frozen=True, eq=False)
class Block:
    """Results of one block as in a `DataSet`: of `count` samples all but those that `failed`, position to reason."""

    coefficients: np.ndarray
    readings: np.ndarray
    states: np.ndarray | None
    count: int
    failed: dict[int, str]
    derivatives: np.ndarray | None = None

    @property
    def parts(self) -> tuple[np.ndarray | None, ...]:
        """The four arrays."""
        return self.coefficients, self.readings, self.states, self.derivatives

    @property
    def rows(self) -> list[int]:
        """Positions in the block of those that were solved."""
        return [i for i in range(self.count) if i not in self.failed]


class Folder:
    """Blocks of fields in V and states in U on any ranks; every method but `file`, `clean` and `lock` is collective."""

    def __init__(self, path: str | os.PathLike, V: WithGeometry, U: WithGeometry | None):
        self.path, self.V, self.U, self.comm, self.derivatives = check_path(path), V, U, V.comm, False

    def exists(self) -> bool:
        """Whether there is a data set in the folder."""
        return on_root(self.comm, (self.path / _HEADER).exists)

    def keep_modes(self, basis: ModalBasis) -> None:
        """Write the modes in which derivatives are, where none are there yet: blocks may be left that are in those."""
        arrays, values = pack_basis(basis, "basis")

        def keep() -> None:
            if not (self.path / _MODES).exists():
                files.write(self.path / _MODES, "basis", arrays, values)
        on_root(self.comm, keep)

    def modes(self, prior: Prior) -> ModalBasis:
        """The modes in which derivatives are; raises as `load_basis`."""
        content = read_everywhere(self.comm, self.path / _MODES, "basis", "Simulate into another folder.")
        self.checksum = content.checksum
        if self.derivatives and self.header.value("modes", str) != self.checksum:
            raise content.error("holds other modes than those of this data set")
        return unpack_basis(content, "basis", self.V, prior)

    def create(self, seed: int, block: int, states: bool, latents: int | None, coefficients: np.ndarray,
               readings: np.ndarray) -> None:
        """Write the header of a new data set, with a few samples by which its problem is recognised."""
        arrays = {"coefficients.key": gather_keys(self.V), "probe.coefficients": gather_rows(self.V, coefficients),
                  "probe.readings": readings} | ({"states.key": gather_keys(self.U)} if states else {})
        values = {"seed": seed, "block": block, "coefficients.element": element_of(self.V),
                  "states.element": element_of(self.U) if states else None} | (
                      {"modes": self.checksum, "latents": latents} if latents else {})
        on_root(self.comm, lambda: files.write(self.path / _HEADER, "data set", arrays, values))

    def open(self) -> None:
        """Read the header; DataError or FileError if it is none, or of other spaces."""
        if not self.exists():
            raise DataError(f"{self.path} is no data set of fem_diffusion: name a folder that simulate wrote.")
        self.header = header = read_everywhere(
            self.comm, self.path / _HEADER, "data set",
            f"Delete that file and run simulate again, which keeps the blocks in {self.path} that are whole.")
        self.seed: int = header.value("seed", int)
        self.size: int = header.value("block", int)
        if self.size < 1:
            raise header.error("holds a block size that is not positive")
        self.states = header.value("states.element", str, type(None)) is not None
        self.derivatives = "modes" in header.values
        parts = {"coefficients": self.V} | ({"states": self.U} if self.states and self.U is not None else {})
        self._columns = {name: own_columns(header, f"{name}.key", f"{name}.element", V) for name, V in parts.items()}
        # Of the samples by which the problem is recognised; NaN where a solve failed.
        self.readings = header.array("probe.readings", None, None, finite=False)
        self.coefficients = header.array("probe.coefficients", len(self.readings), len(
            header.arrays["coefficients.key"]))[:, self._columns["coefficients"]]

    def blocks(self) -> list[int]:
        """Numbers of the blocks that are there, in order."""
        def look() -> list[int]:
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

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Context that keeps other runs out; on one rank, which makes the folder."""
        files.make_folder(self.path)
        return files.locked(self.path / "in_use.lock", f"The folder {self.path}")

    def write(self, index: int, block: Block) -> None:
        """Write a block, whole or not at all."""
        arrays = {"coefficients": gather_rows(self.V, block.coefficients), "readings": block.readings}
        if block.states is not None:
            arrays["states"] = gather_rows(self.U, block.states)
        if block.derivatives is not None:
            arrays["derivatives"] = block.derivatives
        values = {"data set": self.header.checksum, "seed": self.seed, "index": index, "count": block.count,
                  "failed": {str(i): reason for i, reason in block.failed.items()}}
        on_root(self.comm, lambda: files.write(self.file(index), "block", arrays, values))

    def read(self, index: int) -> Block:
        """This rank's part of a block; FileError if it is damaged or not that block of this data set."""
        content = read_everywhere(self.comm, self.file(index), "block", "Delete that file and run simulate again.")
        for name, wanted in {"data set": self.header.checksum, "seed": self.seed, "index": index}.items():
            if content.value(name, type(wanted)) != wanted:
                raise content.error(f"is not block {index} of this data set: its {name} is {content.values[name]}")
        count, failed = content.value("count", int), content.value("failed", dict)
        positions = {str(i) for i in range(min(count, self.size))}
        if not (0 < count <= self.size and set(failed) <= positions and {*map(type, failed.values())} <= {str}):
            raise content.error("holds counts that do not fit its samples")
        rows = count - len(failed)
        parts = {name: content.array(name, rows, len(self.header.arrays[f"{name}.key"]))[:, columns]
                 for name, columns in self._columns.items()}
        k = self.readings.shape[1]
        slopes = content.array("derivatives", rows, k, self.header.value("latents", int)) if self.derivatives else None
        return Block(parts["coefficients"], content.array("readings", rows, k), parts.get("states"), count,
                     {int(i): reason for i, reason in failed.items()}, slopes)
