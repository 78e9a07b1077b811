"""Data sets: reproducible, resumable, shared by ensembles, and refused where they do not fit."""

import numpy as np
import pytest
from firedrake import Ensemble, Function, FunctionSpace, UnitIntervalMesh, UnitSquareMesh
from mpi4py import MPI

from fem_diffusion.fields import keyed
from fem_diffusion.errors import DataError, FileError, InputError
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior
from fem_diffusion.simulation.simulate import load_pairs, simulate


def _problem(comm=MPI.COMM_SELF, n=10):
    V = FunctionSpace(UnitIntervalMesh(n, comm=comm), "CG", 1)
    prior = GaussianPrior(V, 1.0, 0.3)
    return prior, (lambda m: Function(V).interpolate(m**2)), point_sensors(V, [[0.25], [0.5]])


class Counting:
    """A forward map that counts its calls and can be told to fail."""

    def __init__(self, forward, fail_at=None):
        self.forward, self.calls, self.fail_at = forward, 0, fail_at

    def __call__(self, m):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.forward(m)


def test_pairs_belong_together():
    prior, forward, observation = _problem()
    data = simulate(prior, forward, observation, 20, seed=3, keep_states=True, progress=False)
    assert len(data) == 20
    np.testing.assert_allclose(observation.apply(data.states), data.observations)
    np.testing.assert_allclose(observation.apply(data.fields**2), data.observations, rtol=1e-12)


def test_numbers_of_numpy_will_do(tmp_path):
    prior, forward, observation = _problem()
    assert len(simulate(prior, forward, observation, np.int64(3), seed=np.int64(1), path=tmp_path / "a")) == 3


def test_interrupted_run_continues_where_it_stopped(tmp_path):
    prior, forward, observation = _problem()
    whole = simulate(prior, forward, observation, 30, seed=3, block=8, progress=False)
    stopped = Counting(forward, 2 + 18)
    with pytest.raises(KeyboardInterrupt):
        simulate(prior, stopped, observation, 30, seed=3, block=8, path=tmp_path / "d", progress=False)
    again = Counting(forward)
    data = simulate(prior, again, observation, 30, seed=3, block=8, path=tmp_path / "d", progress=False)
    # Two samples are solved once more as a check. Seventeen were solved before, and are kept.
    assert again.calls == 2 + 30 - 17
    np.testing.assert_array_equal(data.fields, whole.fields)
    np.testing.assert_array_equal(data.observations, whole.observations)
    assert not list((tmp_path / "d").glob("*.partial*"))
    longer = simulate(prior, forward, observation, 40, seed=3, block=8, path=tmp_path / "d", progress=False)
    np.testing.assert_array_equal(longer.observations[:24], whole.observations[:24])
    assert len(load_pairs(tmp_path / "d", prior.V, 11)) == 11


def test_blocks_and_single_solves_agree():
    from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
    V = FunctionSpace(UnitSquareMesh(4, 4, comm=MPI.COMM_SELF), "CG", 1)
    prior = TransformedPrior(GaussianPrior(V, 0.5, 0.5), lambda g: g**2)
    forward = AdvectionDiffusion(V, V, "source", dirichlet={"on_boundary": 0})
    observation = point_sensors(V, [[0.5, 0.5]])
    fast = simulate(prior, forward, observation, 6, seed=1, progress=False)
    slow = simulate(prior, lambda m: forward(m), observation, 6, seed=1, progress=False)
    np.testing.assert_array_equal(fast.fields, slow.fields)
    np.testing.assert_allclose(fast.observations, slow.observations, rtol=1e-8)


@pytest.mark.parallel(2)
def test_an_ensemble_makes_the_same_data(tmp_path_factory):
    ensemble = Ensemble(MPI.COMM_WORLD, 1)
    folder = MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("pairs")))
    prior, forward, observation = _problem(ensemble.comm)
    counting = Counting(forward)
    data = simulate(prior, counting, observation, 32, seed=3, block=4, path=f"{folder}/d", ensemble=ensemble,
                    progress=False)
    # Each member checks two samples by itself.
    assert counting.calls == 2 + 16
    alone = simulate(prior, forward, observation, 32, seed=3, block=4, progress=False)
    np.testing.assert_array_equal(data.observations, alone.observations)


@pytest.mark.parallel(2)
def test_a_mesh_on_two_ranks(tmp_path_factory, monkeypatch):
    # Rows go in parts, because a message holds less than 2 GiB.
    monkeypatch.setattr(keyed, "_MESSAGE", 200)
    folder = MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("pairs")))
    prior, forward, observation = _problem(MPI.COMM_WORLD)
    data = simulate(prior, forward, observation, 6, seed=3, path=f"{folder}/d", keep_states=True, progress=False)
    again = load_pairs(f"{folder}/d", prior.V, U=prior.V)
    np.testing.assert_array_equal(data.fields, again.fields)
    np.testing.assert_allclose(observation.apply(again.states), again.observations)
    # The same samples on one rank, whatever the numbering.
    V, _, one = _problem(MPI.COMM_SELF)
    alone = load_pairs(f"{folder}/d", V.V, U=V.V)
    np.testing.assert_allclose(one.apply(alone.fields**2), data.observations)
    with pytest.raises(FileError, match="another mesh"):
        load_pairs(f"{folder}/d", _problem(MPI.COMM_SELF, n=12)[0].V)


def test_other_prior_sensor_or_seed_is_noticed(tmp_path):
    prior, forward, observation = _problem()
    kept = simulate(prior, forward, observation, 5, seed=3, path=tmp_path, progress=False)
    V = prior.V
    for other, words in [((GaussianPrior(V, 2.0, 0.3), forward, observation, 5, 3), "another prior"),
                         ((prior, lambda m: m, observation, 5, 3), "another prior"),
                         ((prior, forward, point_sensors(V, [[0.3], [0.5]]), 5, 3), "another prior"),
                         ((prior, forward, point_sensors(V, [[0.5]]), 5, 3), "another prior"),
                         ((prior, forward, observation, 5, 4), "seed")]:
        *arguments, seed = other
        with pytest.raises(DataError, match=words):
            simulate(*arguments, seed=seed, path=tmp_path, progress=False)
    np.testing.assert_array_equal(load_pairs(tmp_path, V).observations, kept.observations)


def test_damaged_foreign_and_swapped_blocks_are_refused_and_kept(tmp_path):
    prior, forward, observation = _problem()
    folder, other = tmp_path / "d", tmp_path / "e"
    arguments = {"seed": 3, "block": 3, "progress": False}
    whole = simulate(prior, forward, observation, 6, path=folder, **arguments)
    simulate(prior, lambda m: Function(prior.V).interpolate(m**2 + 1), observation, 6, path=other, **arguments)
    block = folder / "block-00001.safetensors"
    content = block.read_bytes()
    for broken, words in [(content[:len(content) // 2], "damaged|no file"), (b"", "no file"), (b"foreign", "no file"),
                          ((folder / "block-00000.safetensors").read_bytes(), "its index is 0"),
                          ((other / block.name).read_bytes(), "its data set is"),
                          ((folder / "data_set.safetensors").read_bytes(), "holds a data set, where a block")]:
        block.write_bytes(broken)
        for read in (lambda: load_pairs(folder, prior.V),
                     lambda: simulate(prior, forward, observation, 6, path=folder, **arguments)):
            with pytest.raises(FileError, match=words):
                read()
        assert block.read_bytes() == broken
    # As the message says.
    block.unlink()
    again = simulate(prior, forward, observation, 6, path=folder, **arguments)
    np.testing.assert_array_equal(again.observations, whole.observations)
    assert block.read_bytes() == content
    # So with the header: the blocks still belong to it.
    (folder / "data_set.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match="Delete that file and run simulate again"):
        load_pairs(folder, prior.V)
    (folder / "data_set.safetensors").unlink()
    again = simulate(prior, forward, observation, 6, path=folder, **arguments)
    np.testing.assert_array_equal(again.observations, whole.observations)


def test_old_empty_and_incomplete_data_sets_are_refused(tmp_path):
    prior, forward, observation = _problem()
    folder = tmp_path / "d"
    with pytest.raises(DataError, match="no data set"):
        load_pairs(tmp_path / "nothing", prior.V)
    simulate(prior, forward, observation, 9, seed=3, block=3, path=folder, progress=False)
    with pytest.raises(DataError, match="9 of 10"):
        load_pairs(folder, prior.V, 10)
    (folder / "block-00001.safetensors").unlink()
    with pytest.raises(DataError, match="6 of 9"):
        load_pairs(folder, prior.V)
    assert len(load_pairs(folder, prior.V, 3)) == 3
    for file in folder.glob("block*"):
        file.unlink()
    with pytest.raises(DataError, match="no samples"):
        load_pairs(folder, prior.V)
    (folder / "header.json").write_text("{}")
    with pytest.raises(DataError, match="version 0.1.0"):
        simulate(prior, forward, observation, 9, seed=3, path=folder, progress=False)


def test_two_runs_on_one_folder(tmp_path):
    prior, forward, observation = _problem()
    inner = []

    def meanwhile(m):
        if not inner:
            inner.append(None)
            with pytest.raises(FileError, match="in use by another run"):
                simulate(prior, forward, observation, 3, seed=3, path=tmp_path / "d", progress=False)
            inner.append(True)
        return forward(m)
    simulate(prior, meanwhile, observation, 3, seed=3, path=tmp_path / "d", progress=False)
    assert inner == [None, True]
    assert len(simulate(prior, forward, observation, 3, seed=3, path=tmp_path / "d", progress=False)) == 3
    assert {file.name for file in (tmp_path / "d").iterdir()} == {"data_set.safetensors", "block-00000.safetensors"}


@pytest.mark.parametrize("change, words", [
    ({"n": 0}, "n is 0"), ({"n": 2.5}, "n is 2.5"), ({"n": True}, "n is True"), ({"seed": -1}, "seed is -1"),
    ({"seed": 1.5}, "seed is 1.5"), ({"seed": None}, "seed is None"), ({"block": 0}, "block is 0"),
    ({"on_failure": "ignore"}, "on_failure is 'ignore'"), ({"most_failures": 1.5}, "most_failures is 1.5"),
    ({"most_failures": "none"}, "most_failures is 'none'"), ({"keep_states": "no"}, "keep_states is 'no'"),
    ({"progress": 1}, "progress is 1"), ({"ensemble": Ensemble(MPI.COMM_SELF, 1)}, "give `path`"),
    ({"forward": None}, "forward problem is of type NoneType"), ({"observation": 3}, "observation is of type int"),
])
def test_bad_arguments_are_refused_before_any_work(change, words, tmp_path):
    prior, forward, observation = _problem()
    arguments = {"prior": prior, "forward": forward, "observation": observation, "n": 3, "seed": 0, **change}
    with pytest.raises(InputError, match=words):
        simulate(**arguments)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be made"):
        simulate(*_problem(), 3, seed=0, path=tmp_path / "file" / "d", progress=False)


def test_samples_of_the_wrong_space_are_a_mistake():
    prior, forward, observation = _problem()
    other = FunctionSpace(prior.V.mesh(), "CG", 2)
    with pytest.raises(InputError):
        simulate(CallablePrior(prior.V, lambda seed: Function(other)), forward, observation, 3, seed=5, progress=False)
    with pytest.raises(InputError, match="interpolate it into"):
        simulate(prior, lambda m: Function(other), observation, 3, seed=5, progress=False)
