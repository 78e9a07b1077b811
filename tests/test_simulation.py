"""Data sets: reproducible, resumable, shared by ensembles, and refused where they do not fit."""

import json
import re

import h5py
import numpy as np
import pytest
from firedrake import Ensemble, Function, FunctionSpace, UnitIntervalMesh, UnitSquareMesh
from mpi4py import MPI

from fem_diffusion.errors import DataError, InputError
from fem_diffusion.fields import geometric_key
from fem_diffusion.problem.observation import point_sensors
from fem_diffusion.problem.prior import CallablePrior, GaussianPrior, TransformedPrior
from fem_diffusion.simulation import load_pairs, simulate


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


@pytest.mark.parametrize("space", [False, True], ids=["sensors", "states alone"])
def test_any_part_of_a_sample_that_is_not_finite_is_an_error(space, tmp_path):
    prior, forward, observation = _problem()

    def fails_sometimes(m):
        return Function(prior.V).assign(np.nan) if m.dat.data_ro[0] > 1 else forward(m)
    bad = np.flatnonzero(simulate(prior, forward, prior.V, 10, seed=3, progress=False).fields[:, 0] > 1)
    assert 0 < len(bad) < 10
    for path in (None, tmp_path / "pairs"):
        with pytest.raises(DataError, match=re.escape(str(bad.tolist()))):
            simulate(prior, fails_sometimes, prior.V if space else observation, 10, seed=3, path=path, progress=False)
    assert not list((tmp_path / "pairs").glob("block*"))


def test_numbers_of_numpy_will_do(tmp_path):
    prior, forward, observation = _problem()
    assert len(simulate(prior, forward, observation, np.int64(3), seed=np.int64(1), path=tmp_path / "a")) == 3
    with pytest.raises(InputError, match="integers"):
        simulate(prior, forward, observation, 3, seed=1.5)


def test_interrupted_run_continues_where_it_stopped(tmp_path):
    prior, forward, observation = _problem()
    whole = simulate(prior, forward, observation, 30, seed=3, block=8, progress=False)
    with pytest.raises(KeyboardInterrupt):
        simulate(prior, Counting(forward, 20), observation, 30, seed=3, block=8, path=tmp_path / "d", progress=False)
    again = Counting(forward)
    data = simulate(prior, again, observation, 30, seed=3, block=8, path=tmp_path / "d", progress=False)
    # Two blocks were whole; the first is simulated once more as a check.
    assert again.calls == 8 + 30 - 16
    np.testing.assert_array_equal(data.fields, whole.fields)
    np.testing.assert_array_equal(data.observations, whole.observations)
    assert not list((tmp_path / "d").glob("*.partial*"))
    longer = simulate(prior, forward, observation, 40, seed=3, block=8, path=tmp_path / "d", progress=False)
    np.testing.assert_array_equal(longer.observations[:24], whole.observations[:24])
    assert len(load_pairs(tmp_path / "d", prior.V, 11)) == 11


def test_blocks_and_single_solves_agree():
    from fem_diffusion.problem.advection_diffusion import AdvectionDiffusion
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
    assert counting.calls == 16
    alone = simulate(prior, forward, observation, 32, seed=3, block=4, progress=False)
    np.testing.assert_array_equal(data.observations, alone.observations)


@pytest.mark.parallel(2)
def test_a_mesh_on_two_ranks(tmp_path_factory):
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
    with pytest.raises(DataError, match="another mesh"):
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


def test_damaged_data_are_refused_and_kept(tmp_path):
    prior, forward, observation = _problem()
    simulate(prior, forward, observation, 6, seed=3, block=3, path=tmp_path / "d", progress=False)
    folder, block = tmp_path / "d", tmp_path / "d" / "block-00001.h5"
    content, key = block.read_bytes(), geometric_key(prior.V)
    block.write_bytes(content[:len(content) // 2])
    with pytest.raises(DataError, match="damaged.*delete that file"):
        load_pairs(folder, prior.V)
    with h5py.File(block, "w") as file:
        file["fields"], file["observations"], file["fields_key"] = np.zeros((3, 11)), np.zeros((2, 2)), key
    with pytest.raises(DataError, match="damaged"):
        load_pairs(folder, prior.V)
    with h5py.File(block, "w") as file:
        file["fields"], file["observations"], file["fields_key"] = np.full((3, 11), np.nan), np.zeros((3, 2)), key
    with pytest.raises(DataError, match="not finite"):
        load_pairs(folder, prior.V)
    for header in ("not json", json.dumps({"format": "other"}), json.dumps([1])):
        (folder / "header.json").write_text(header)
        with pytest.raises(DataError):
            load_pairs(folder, prior.V)
    with pytest.raises(DataError, match="no data set"):
        load_pairs(tmp_path / "nothing", prior.V)
    assert block.exists()


def test_empty_data_set_and_wrong_numbers_are_refused(tmp_path):
    prior, forward, observation = _problem()
    simulate(prior, forward, observation, 3, seed=3, path=tmp_path, progress=False)
    with pytest.raises(DataError, match="3 of 10"):
        load_pairs(tmp_path, prior.V, 10)
    (tmp_path / "block-00000.h5").unlink()
    with pytest.raises(DataError, match="no samples"):
        load_pairs(tmp_path, prior.V)
    for change in ({"n": 0}, {"seed": -1}, {"block": 0}):
        with pytest.raises(InputError):
            simulate(prior, forward, observation, **{"n": 3, "seed": 0, **change})
    with pytest.raises(InputError, match="path"):
        simulate(prior, forward, observation, 3, seed=0, ensemble=Ensemble(MPI.COMM_SELF, 1))


def test_samples_that_are_not_finite_are_named(tmp_path):
    prior, forward, observation = _problem()
    with pytest.raises(DataError, match=r"Samples \[0, 1, 2\] of block 0 \(seed 5\)"):
        simulate(prior, lambda m: Function(m).assign(np.nan), observation, 3, seed=5, progress=False)
    other = FunctionSpace(prior.V.mesh(), "CG", 2)
    with pytest.raises(InputError):
        simulate(CallablePrior(prior.V, lambda seed: Function(other)), forward, observation, 3, seed=5, progress=False)
