"""Expensive evaluations of a run that repeats itself, kept block by block: a killed run goes on where it was."""

import os
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

from fem_diffusion import files
from fem_diffusion.checks import check_path, together
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import on_root

__all__ = ["Journal"]

# How far inputs and answers of the same run are apart after a restart, as shares of their size.
_SAME, _ALIKE = 1e-8, 1e-6


class Journal:
    """Answers to the questions of a run, in their order, as files in a folder.

    The run has to ask the same again after a restart, as one does whose draws come from seeds and whose decisions come
    from the answers. Then nothing is computed twice but one row, the first: a changed solver shows in it.

    Parameters
    ----------
    folder : path or None
        Made where it is missing; None keeps nothing.
    comm : mpi4py.MPI.Comm
        Rank 0 of it reads and writes, and all get what it has.
    extends : bool
        Whether a run may go beyond the end of a former one, which asked otherwise near its end: from there on what is
        kept is replaced.
    """

    def __init__(self, folder: str | os.PathLike | None, comm: MPI.Comm = MPI.COMM_WORLD, extends: bool = False
                 ) -> None:
        self.folder, self.comm, self.extends = None if folder is None else check_path(folder, "path"), comm, extends
        self.asked = self.found = 0
        if self.folder is not None:
            made = self.folder
            on_root(comm, lambda: files.make_folder(made))

    def __repr__(self) -> str:
        place = "in memory" if self.folder is None else f"in {self.folder}"
        return f"Journal {place}: {self.asked} blocks, {self.found} of them from a former run"

    def ask(self, inputs: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Answers (B, p) to inputs (B, m), both global: of a former run, or computed and kept before they are returned.

        Answers may be NaN. FileError if the next block on the disk is damaged, or belongs to a run that has asked or
        answered something else; what `compute` raises is passed on.
        """
        inputs, index = np.asarray(inputs, dtype=float), self.asked
        if inputs.ndim != 2:
            raise InputError(f"The inputs have the shape {inputs.shape}: give (B, m).")
        former = self._former(index, inputs)
        if former is not None and not self.found and len(inputs):
            again, known = self._computed(inputs[:1], compute), former[:1]
            if not on_root(self.comm, lambda: _near(again, known)):
                raise self._content(index).error("was computed by another forward problem, or by one that does not "
                                                 "repeat itself")
        answers = self._computed(inputs, compute) if former is None else former
        if former is None and self.folder is not None:
            path = self._path(index)
            on_root(self.comm, lambda: files.write(path, "answers", {"inputs": inputs, "answers": answers},
                                                   {"index": index}))
        self.asked += 1
        self.found += former is not None
        return answers

    def _path(self, index: int) -> os.PathLike:
        assert self.folder is not None
        return self.folder / f"answers-{index:05d}.safetensors"

    def _content(self, index: int) -> files.Content:
        """A block on the disk; on rank 0."""
        return files.read(self._path(index), "answers",
                          f"Delete it with the later ones, or the whole folder {self.folder}, or name another one.")

    def _former(self, index: int, inputs: np.ndarray) -> np.ndarray | None:
        """Answers (B, p) of a former run; None where it has not come so far."""
        def look() -> np.ndarray | None:
            if self.folder is None or not os.path.exists(self._path(index)):
                return None
            content = self._content(index)
            asked = content.array("inputs", None, None)
            scale = np.abs(asked).max(initial=0.0)
            if asked.shape != inputs.shape or not np.allclose(asked, inputs, _SAME, _SAME * scale):
                if self.extends and self.found:
                    self._forget(index)
                    return None
                raise content.error("belongs to another run: its inputs are not those of this one")
            return content.array("answers", len(inputs), None, finite=False)
        return on_root(self.comm, look)

    def _forget(self, index: int) -> None:
        """Remove the blocks from this one on; on rank 0. The last goes first, so that no gap is left by a kill."""
        last = index
        while os.path.exists(self._path(last + 1)):
            last += 1
        for i in range(last, index - 1, -1):
            os.remove(self._path(i))

    def _computed(self, inputs: np.ndarray, compute: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Answers (B, p), the same on all ranks."""
        answers = together(self.comm, lambda: np.array(compute(inputs.copy()), dtype=float))
        if answers.ndim != 2 or len(answers) != len(inputs):
            raise InputError(f"The answers have the shape {answers.shape}: give one row for each of the {len(inputs)} "
                             "inputs.")
        return self.comm.bcast(answers)


def _near(new: np.ndarray, old: np.ndarray) -> bool:
    """Whether answers agree as far as solvers do; NaN agrees with NaN."""
    scale = np.abs(np.nan_to_num(old)).max(initial=0.0)
    return new.shape == old.shape and np.allclose(new, old, _ALIKE, _ALIKE * scale, equal_nan=True)
