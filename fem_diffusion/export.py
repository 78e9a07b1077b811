"""Functions in files of other programs: Firedrake's CheckpointFile, and VTK for viewing. Nothing here reads them back
for use: Firedrake runs code that it finds in a CheckpointFile.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from firedrake import CheckpointFile, Function, VTKFile, assemble, dx, inner
from firedrake.petsc import PETSc

from fem_diffusion import files
from fem_diffusion.errors import FileError, InstallError
from fem_diffusion.fields import on_root

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
    try:
        with CheckpointFile(str(partial), "w", comm=comm) as file:
            file.save_mesh(mesh)
            for function in functions:
                file.save_function(function)
        # HDF5 drops errors of its last writes: only reading tells.
        with CheckpointFile(str(partial), "r", comm=comm) as file:
            copy = file.load_mesh(mesh.name)
            for function in functions:
                norms = [assemble(inner(f, f) * dx) for f in (function, file.load_function(copy, function.name()))]
                if not np.isclose(*norms, rtol=1e-10, atol=0):
                    raise OSError(f"{function.name()} reads back differently")
        on_root(comm, lambda: files.adopt(partial, path))
    except (OSError, RuntimeError, KeyError, ValueError, PETSc.Error) as error:
        on_root(comm, lambda: partial.unlink(missing_ok=True))
        raise FileError(f"{path} cannot be written ({error!r:.200}). Look at the disk, or name another place; "
                        "samples.safetensors beside it is whole.") from error


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
        file = VTKFile(str(path), comm=functions[0].function_space().comm)
    except ModuleNotFoundError as error:
        raise InstallError(f"The samples are written to {path.parent}; files for viewing need VTK: "
                           "pip install 'fem_diffusion[vtk]'.") from error
    try:
        file.write(*functions)
    except OSError as error:
        raise FileError(f"{path} cannot be written ({error}). Make room on the disk, or name another place.") from error
