"""Functions in files of other programs: Firedrake's CheckpointFile, and VTK for viewing. Nothing here reads them back
for use: Firedrake runs code that it finds in a CheckpointFile.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from firedrake import CheckpointFile, Function, VTKFile
from firedrake.petsc import PETSc

from fem_diffusion import files
from fem_diffusion.checks import together
from fem_diffusion.errors import FileError, InstallError
from fem_diffusion.fields.coefficients import coefficients, on_root
from fem_diffusion.fields.keyed import gather_rows

__all__ = ["write_checkpoint", "write_vtk"]


def write_checkpoint(path: Path, functions: Sequence[Function]) -> None:
    """Write Functions of one mesh, with names that differ, and their mesh; the folder is made.

    The file appears when it is whole; FileError if it cannot be written, or reads back differently.
    """
    mesh, comm = functions[0].function_space().mesh(), functions[0].function_space().comm
    partial = path.with_name(path.name + ".partial")
    on_root(comm, lambda: files.make_folder(path.parent))
    # Ranks that write together hang where the disk is full, so there must be room: measured, and twice as much.
    cells, numbers = comm.allreduce(mesh.cell_set.size), sum(f.function_space().dim() for f in functions)
    on_root(comm, lambda: files.check_room(partial, 2**21 + 600 * cells + 32 * numbers))
    wanted = {f.name(): gather_rows(f.function_space(), coefficients(f)[None]) for f in functions}
    try:
        with CheckpointFile(str(partial), "w", comm=comm) as file:
            file.save_mesh(mesh)
            for function in functions:
                file.save_function(function)
        on_root(comm, lambda: _read_back(partial, wanted))
        on_root(comm, lambda: files.adopt(partial, path))
    except (OSError, RuntimeError, PETSc.Error) as error:
        on_root(comm, lambda: partial.unlink(missing_ok=True))
        raise FileError(f"{path} cannot be written ({error!r:.200}). Look at the disk, or name another place; "
                        "samples.safetensors beside it is whole.") from error


def _read_back(path: Path, wanted: dict) -> None:
    """Raise OSError where coefficients are not in the file: HDF5 drops errors of its last writes."""
    found = {}

    def keep(name: str, x: h5py.Dataset | h5py.Group) -> None:
        if isinstance(x, h5py.Dataset) and "/vecs/" in name:
            found[name.rpartition("/")[2]] = x[:]
    with h5py.File(path, "r") as file:
        file.visititems(keep)
    for name, values in wanted.items():
        # In an order of their own; some elements as discontinuous ones.
        stored = found.get(name, found.get(f"firedrake_embedded_{name}"))
        same = stored is not None and (np.any(stored) == np.any(values) if stored.size != values.size else
                                       np.array_equal(np.sort(stored.ravel()), np.sort(values.ravel())))
        if not same:
            raise OSError(f"{name} reads back differently")


def write_vtk(path: Path, functions: Sequence[Function]) -> None:
    """Write Functions of one mesh for viewing: a ``.pvd`` file with the data in a folder of its name.

    FileError if it cannot be written, InstallError if VTK is not installed.
    """
    comm = functions[0].function_space().comm
    try:
        together(comm, lambda: VTKFile(str(path), comm=comm).write(*functions))
    except ModuleNotFoundError as error:
        raise InstallError(f"The samples are written to {path.parent}; files for viewing need VTK: "
                           "pip install 'fem_diffusion[vtk]'.") from error
    except OSError as error:
        on_root(comm, lambda: path.unlink(missing_ok=True))
        on_root(comm, lambda: shutil.rmtree(path.with_suffix(""), ignore_errors=True))
        raise FileError(f"{path} cannot be written ({error}). Make room on the disk, or name another place.") from error
