"""The environment: MPI runs on several ranks, HDF5 writes in parallel, torch and Firedrake live together."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.parallel([2, 3])
def test_ranks_talk_to_each_other(request):
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    asked = request.node.callspec.params["_nprocs"]
    assert world.size == asked > 1
    assert world.allreduce(world.rank + 1) == asked * (asked + 1) // 2


def test_h5py_has_mpi():
    import h5py

    assert h5py.get_config().mpi


@pytest.mark.parallel(2)
def test_one_file_written_by_two_ranks():
    import h5py
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    with tempfile.TemporaryDirectory() as folder:
        path = Path(world.bcast(folder), "ranks.h5")
        with h5py.File(path, "w", driver="mpio", comm=world) as file:
            file.create_dataset("rank", (2,), dtype=int)[world.rank] = world.rank
        with h5py.File(path, "r", driver="mpio", comm=world) as file:
            assert file["rank"][:].tolist() == [0, 1]
        world.barrier()


@pytest.mark.parametrize("first, second", [("firedrake", "torch"), ("torch", "firedrake")])
def test_firedrake_and_torch_in_one_process(first, second):
    code = (f"import {first}, {second};"
            "print(torch.ones(2).sum().item(), firedrake.UnitIntervalMesh(2).num_cells())")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["2.0", "2"], run.stderr
