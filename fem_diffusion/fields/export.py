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
    """Write Functions of one mesh, by name, and their mesh (collective).

    Parameters
    ----------
    path : pathlib.Path
        The file, which appears when it is whole; its folder is made.
    functions : sequence of Function
        On one mesh, with names that differ.

    Raises
    ------
    FileError
        If it cannot be written, or reads back differently.
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

    def keep(name, x):
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
    """Write Functions of one mesh for viewing (collective).

    Parameters
    ----------
    path : pathlib.Path
        The ``.pvd`` file; the data are in a folder of its name.
    functions : sequence of Function
        On one mesh.

    Raises
    ------
    FileError
        If it cannot be written.
    InstallError
        If VTK is not installed.
    """
    try:
        together(functions[0].function_space().comm, lambda: VTKFile(
            str(path), comm=functions[0].function_space().comm).write(*functions))
    except ModuleNotFoundError as error:
        raise InstallError(f"The samples are written to {path.parent}; files for viewing need VTK: "
                           "pip install 'fem_diffusion[vtk]'.") from error
    except OSError as error:
        on_root(functions[0].function_space().comm, lambda: _remove(path))
        raise FileError(f"{path} cannot be written ({error}). Make room on the disk, or name another place.") from error


def _remove(path: Path) -> None:
    """Remove half a VTK file and its folder."""
    path.unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
