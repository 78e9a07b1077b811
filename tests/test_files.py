"""One file layer: whole files or none, whatever fails or is killed, and nothing that runs."""

import contextlib
import errno
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from firedrake import (
    ExtrudedMesh, Function, FunctionSpace, PeriodicUnitSquareMesh, SpatialCoordinate, Submesh,
    UnitIcosahedralSphereMesh, UnitIntervalMesh, UnitSquareMesh,
)
from mpi4py import MPI

from fem_diffusion import files
from fem_diffusion.diffusion import (
    Denoiser, GaussianNoise, History, ResidualMLP, TrainingOptions, fit_denoiser, linear_base,
)
from fem_diffusion.diffusion.packing import pack_denoiser, unpack_denoiser
from fem_diffusion.errors import FileError
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.samples import Samples, load_samples
from fem_diffusion.simulation.simulate import simulate

ARRAYS = {"x": np.arange(12.0).reshape(3, 4).T, "none": np.empty((0, 3)), "number": np.array(2.5),
          "flags": np.array([True, False]), "whole": np.array([1, -2]), "single": np.float32([1.5, np.inf]),
          "other end": np.array([1.0, 2.0], dtype=">f8")}
VALUES = {"words": ["a", None], "number": 1.1, "inner": {"b": True}, "large": 10**30}
STEPS = "open", "ftruncate", "fsync", "replace", "posix_fadvise", "fstat", "stat", "close", "unlink"


class Acting:
    """Stands for the module os, and for open: acts at one of its calls, in the order of time."""

    def __init__(self, at, action):
        self.at, self.action, self.count, self.done = at, action, 0, False

    def step(self):
        self.count += 1
        if self.count == self.at:
            self.done = True
            self.action()

    def __getattr__(self, name):
        attribute = getattr(os, name)
        if name not in STEPS:
            return attribute

        def acting(*arguments, **options):
            self.step()
            return attribute(*arguments, **options)
        return acting

    def opened(self, *arguments, **options):
        file = open(*arguments, **options)
        if "w" not in arguments[1]:
            return file
        write = file.write

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.__exit__(*error)

            def write(this, data):
                data = memoryview(data)
                write(data[:len(data) // 2])
                file.flush()
                self.step()
                write(data[len(data) // 2:])
        return Half()


@contextlib.contextmanager
def acting(at, action):
    """Let the file layer act at one of its steps."""
    stand_in = Acting(at, action)
    before, files.os, files.open = files.os, stand_in, stand_in.opened
    try:
        yield stand_in
    finally:
        files.os = before
        del files.open


def raising(number):
    def action():
        raise OSError(number, os.strerror(number))
    return action


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def forked(run, after=None):
    """Run in a child; kill it after some seconds where asked for. Whether it was killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WIFSIGNALED(status)


def test_what_is_written_is_read(tmp_path):
    files.write(tmp_path / "file", "thing", ARRAYS, VALUES)
    content = files.read(tmp_path / "file", "thing", "Write it.")
    assert content.values == VALUES and content.arrays.keys() == ARRAYS.keys()
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(content.arrays[name], x)
        assert content.arrays[name].dtype == x.dtype.newbyteorder("=") and content.arrays[name].shape == x.shape
    again = (tmp_path / "file").read_bytes()
    files.write(tmp_path / "file", "thing", ARRAYS, VALUES)
    assert (tmp_path / "file").read_bytes() == again


def test_files_get_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "file", "thing", {}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")
    files.write(tmp_path / "link", "thing", ARRAYS, {})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "file").exists()
    assert files.read(tmp_path / "link", "thing", "").arrays["number"] == 2.5


def _old(tmp_path, name):
    """Files as versions before this format wrote them."""
    path = tmp_path / name
    if name == "safetensors":
        from safetensors.numpy import save_file
        save_file({"x": np.ones(2)}, path, {"format": "fem_diffusion model 3"})
    elif name == "torch":
        torch.save({"x": 1}, path)
    else:
        import h5py
        with h5py.File(path, "w") as file:
            file["x"] = np.ones(2)
    return path


@pytest.mark.parametrize("name, words", [
    ("safetensors", "format is 'fem_diffusion model 3'"), ("torch", "version 0.1.0 wrote checkpoints"),
    ("hdf5", "version 0.1.0 wrote bases")])
def test_old_files_are_named(tmp_path, name, words):
    with pytest.raises(FileError, match=f"{words}.*Train anew."):
        files.read(_old(tmp_path, name), "model", "Train anew.")


def test_other_kinds_and_versions_are_refused(tmp_path, monkeypatch):
    files.write(tmp_path / "file", "thing", {}, {})
    with pytest.raises(FileError, match="holds a thing, where a model is expected"):
        files.read(tmp_path / "file", "model", "")
    monkeypatch.setattr(files, "VERSION", 3)
    with pytest.raises(FileError, match="is of format version 2, and this version of fem_diffusion reads 3"):
        files.read(tmp_path / "file", "thing", "")


def test_no_code_in_a_file_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    for content in (pickle.dumps(Evil()), b"PK\x03\x04" + pickle.dumps(Evil())):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(FileError):
            files.read(tmp_path / "file", "checkpoint", "")
    assert not (tmp_path / "ran").exists()


def test_sizes_in_headers_are_compared_before_anything_is_allocated(tmp_path):
    base = linear_base(torch.eye(2).double(), 0.01 * torch.eye(2).double())
    arrays, values = pack_denoiser(Denoiser(base, ResidualMLP(2, 2, 4, 1)), History())
    files.write(tmp_path / "file", "model", arrays, values)
    assert isinstance(unpack_denoiser(files.read(tmp_path / "file", "model", ""))[0].network, ResidualMLP)
    for change in ({"depth": 10**9}, {"width": 10**9}, {"width": 5}, {"r": 3}, {"depth": 2}, {"depth": -1}, {"k": 2.0},
                   {"width": True}, {"more": 1}):
        sizes = values["network"]["sizes"] | change
        files.write(tmp_path / "file", "model", arrays, values | {"network": values["network"] | {"sizes": sizes}})
        start = time.monotonic()
        with pytest.raises(FileError, match="network"):
            unpack_denoiser(files.read(tmp_path / "file", "model", ""))
        assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20     # kilobytes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_at_any_step_leaves_the_former_file(tmp_path, number):
    path, at = tmp_path / "file", 0
    files.write(path, "thing", {}, {"number": 0})
    while True:
        at += 1
        before = files.read(path, "thing", "").values["number"]
        with acting(at, raising(number)) as stand_in, contextlib.suppress(OSError):
            try:
                files.write(path, "thing", ARRAYS, {"number": at})
                failed = False
            except FileError as error:
                failed = True
                assert str(path) in str(error) and os.strerror(number) in str(error)
        if not stand_in.done:
            break
        found = files.read(path, "thing", "").values["number"]
        # Only after the rename, when the folder is flushed, or where nothing failed, it is the new one.
        assert found in ((before, at) if failed else (at,))
        # What is left, at most, is an empty file, where even looking at it fails.
        assert set(os.listdir(tmp_path)) <= {"file", "file.partial"}
        files.write(path, "thing", {}, {"number": at})
    assert at > 10 and os.listdir(tmp_path) == ["file"]


def test_a_write_that_the_disk_loses_is_noticed(tmp_path):
    path = tmp_path / "file"

    def lose():
        os.truncate(tmp_path / "file.partial", 100)
    found = []
    for at in range(1, 30):
        with acting(at, lose) as stand_in:
            try:
                files.write(path, "thing", ARRAYS, {})
            except FileError as error:
                found.append(str(error))
            except FileNotFoundError:
                pass    # before there is one
        if not stand_in.done:
            break
    assert any("reads back differently" in message for message in found)


@contextlib.contextmanager
def largest_file(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_finds_no_room_leaves_the_former_one(tmp_path):
    arrays = {"x": np.random.default_rng(0).standard_normal(3000)}
    files.write(tmp_path / "file", "thing", {}, {})
    before = (tmp_path / "file").read_bytes()
    for size in (0, 1, 8, 100, 4095, 4096, 8192, 20000, 24000):
        with largest_file(size), pytest.raises(FileError, match="File too large"):
            files.write(tmp_path / "file", "thing", arrays, {})
        assert (tmp_path / "file").read_bytes() == before and os.listdir(tmp_path) == ["file"]
    files.write(tmp_path / "file", "thing", arrays, {})
    np.testing.assert_array_equal(files.read(tmp_path / "file", "thing", "").arrays["x"], arrays["x"])


def _problem():
    V = FunctionSpace(UnitIntervalMesh(300, comm=MPI.COMM_SELF), "CG", 1)
    return InverseProblem(GaussianPrior(V, 1.0, 0.3), lambda m: Function(V).interpolate(m**2),
                          point_sensors(V, [[0.25], [0.5]]))


def test_a_full_disk_stops_a_simulation_and_a_rerun_recovers(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    arguments = {"seed": 1, "block": 8, "progress": False}
    problem = _problem()
    try:
        for fill in range(0, 250_000, 35_000):
            (disk / "other").write_bytes(bytes(fill))
            with pytest.raises(FileError, match="No space left on device.*Make room on the disk"):
                simulate(problem, 160, path=disk / "pairs", **arguments)
            blocks = list((disk / "pairs").glob("block*"))
            assert fill > 200_000 or len(blocks) > 0
            (disk / "other").unlink()
            assert len(simulate(problem, 32, path=disk / "pairs", **arguments)) == 32
            assert not list((disk / "pairs").glob("*.partial"))
            shutil.rmtree(disk / "pairs")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _tree(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_killed_between_any_two_steps_of_a_write(tmp_path):
    """The folder of a data set is that of a run without interruption, byte for byte."""
    arguments = {"seed": 1, "block": 2, "progress": False}
    problem = _problem()
    simulate(problem, 4, path=tmp_path / "whole", **arguments)
    whole, at, killed = _tree(tmp_path / "whole"), 0, True
    while killed:
        at += 1
        folder = tmp_path / f"killed{at}"

        def run():
            with acting(at, kill):
                simulate(problem, 4, path=folder, **arguments)
        killed = forked(run)
        # What is there is whole.
        assert all(whole[name] == content for name, content in (_tree(folder) if folder.exists() else {}).items())
        simulate(problem, 4, path=folder, **arguments)
        assert _tree(folder) == whole and len(list(folder.iterdir())) == len(whole)
    assert at > 40


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    arguments = {"seed": 1, "block": 4, "progress": False}
    problem, rng, count = _problem(), np.random.default_rng(0), 0
    start = time.monotonic()
    data = simulate(problem, 120, path=tmp_path / "whole", **arguments)
    length, whole = time.monotonic() - start, _tree(tmp_path / "whole")
    while count < kills:
        folder = tmp_path / f"killed{count}"
        while forked(lambda: simulate(problem, 120, path=folder, **arguments), length * rng.uniform(0, 0.8)):
            count += 1
            if count >= kills:
                break
        again = simulate(problem, 120, path=folder, **arguments)
        assert _tree(folder) == whole and len(list(folder.iterdir())) == len(whole)
        np.testing.assert_array_equal(again.readings, data.readings)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_training_killed_at_random_moments_ends_with_the_same_curve(tmp_path, kills):
    z = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = TrainingOptions(steps=40, evaluate_every=5, width=16, depth=1, batch=64, patience=99)

    def run(checkpoint=None):
        # An emulator first, with a checkpoint of its own, then the network under the base.
        return fit_denoiser(z, z**2, GaussianNoise(std=0.1), options=options, checkpoint=checkpoint)[1]
    start = time.monotonic()
    whole = run(tmp_path / "whole")
    length, rng, count = time.monotonic() - start, np.random.default_rng(0), 0
    while count < kills:
        path = tmp_path / f"state{count}"
        while forked(lambda: run(path), length * rng.uniform(0, 0.8)):
            count += 1
            if count >= kills:
                break
        history = run(path)
        assert history.step == whole.step
        np.testing.assert_allclose(history.validation, whole.validation, rtol=1e-5)
        np.testing.assert_allclose(history.train, whole.train, rtol=1e-5)
        assert not [name for name in os.listdir(tmp_path) if re.search("partial|lock", name)]


def test_two_trainings_of_one_checkpoint(tmp_path):
    with files.locked(tmp_path / "state.lock", "it"), pytest.raises(FileError, match="state is in use by another run"):
        z = torch.randn(50, 1).double()
        fit_denoiser(z, z, None, options=TrainingOptions(steps=1), checkpoint=tmp_path / "state")


def test_checkpoint_files_for_others_are_read_back(tmp_path, monkeypatch):
    """HDF5 swallows errors of its last writes: then there is no file."""
    from fem_diffusion.fields import export
    meshes = {"square": UnitSquareMesh(3, 3, comm=MPI.COMM_SELF), "extruded": ExtrudedMesh(UnitIntervalMesh(
        3, comm=MPI.COMM_SELF), 2), "periodic": PeriodicUnitSquareMesh(3, 3, comm=MPI.COMM_SELF),
        "surface": UnitIcosahedralSphereMesh(1, comm=MPI.COMM_SELF), "submesh": None}
    meshes["submesh"] = Submesh(meshes["square"], 1, 1)
    for name, mesh in meshes.items():
        functions = [Function(FunctionSpace(mesh, *element), name=f"f{i}").interpolate(SpatialCoordinate(mesh)[0] + i)
                     for i, element in enumerate((("CG", 1), ("DG", 0)))]
        export.write_checkpoint(tmp_path / name, functions)
        assert (tmp_path / name).exists()
    space = FunctionSpace(meshes["square"], "RT", 1)
    export.write_checkpoint(tmp_path / "RT", [Function(space, name="mean").assign(1.0)])

    def lost(self, function, **options):
        save(self, Function(function.function_space(), name=function.name()), **options)
    save = export.CheckpointFile.save_function
    monkeypatch.setattr(export.CheckpointFile, "save_function", lost)
    with pytest.raises(FileError, match="f1 reads back differently"):
        export.write_checkpoint(tmp_path / "lost", functions)
    assert not list(tmp_path.glob("lost*"))
    with pytest.raises(FileError, match="cannot be made"):
        export.write_checkpoint(tmp_path / "square" / "file", functions)


@pytest.mark.parallel(2)
def test_samples_that_find_no_room_on_two_ranks_hang_nobody(tmp_path):
    """HDF5 on several ranks waits for ever where one of them cannot write: so there must be room before it starts."""
    folder = Path(MPI.COMM_WORLD.bcast(str(tmp_path)))
    V = FunctionSpace(UnitSquareMesh(6, 6), "CG", 1)
    samples = Samples(V, np.ones((5, V.dof_dset.layout_vec.getLocalSize())), np.zeros((5, 1)))
    for size in (100, 20_000, 500_000):
        with largest_file(size), pytest.raises(FileError, match="File too large"):
            samples.save(folder / "s")
    assert len(load_samples(folder / "s", V)) == 5
    if MPI.COMM_WORLD.rank == 0:
        assert {path.name for path in (folder / "s").iterdir()} == {"samples.safetensors"}


def test_half_a_vtk_file_is_removed(tmp_path):
    pytest.importorskip("vtk")
    from fem_diffusion.fields.export import write_vtk
    f = Function(FunctionSpace(UnitSquareMesh(20, 20, comm=MPI.COMM_SELF), "CG", 1), name="mean")
    for size in (10, 2000):
        with largest_file(size), pytest.raises(FileError, match="File too large|cannot be written"):
            write_vtk(tmp_path / "summary.pvd", [f])
        assert not list(tmp_path.iterdir())
