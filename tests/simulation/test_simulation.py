"""Data sets: reproducible, resumable, shared by ensembles, and refused where they do not fit."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from firedrake import (
    DirichletBC, Ensemble, Function, FunctionSpace, TestFunction, UnitIntervalMesh, UnitSquareMesh, dx, grad, inner,
)
from mpi4py import MPI

from fem_diffusion.diffusion.noise import GaussianNoise
from fem_diffusion.fields import keyed
from fem_diffusion.errors import DataError, FileError, InputError
from fem_diffusion.forward.steady import Steady
from fem_diffusion.observation.family import SensorFamily, SensorKind
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.matern import MaternOperator
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.simulation import solves
from fem_diffusion.simulation.simulate import load_pairs, simulate


def _problem(comm=MPI.COMM_SELF, n=10):
    V = FunctionSpace(UnitIntervalMesh(n, comm=comm), "CG", 1)
    prior = GaussianPrior(V, 1.0, 0.3)
    return InverseProblem(prior, lambda m: Function(V).interpolate(m**2), point_sensors(V, [[0.25], [0.5]]))


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
    problem = _problem()
    data = simulate(problem, 20, seed=3, keep_states=True, progress=False)
    assert len(data) == 20
    np.testing.assert_allclose(problem.observation.apply(data.states), data.readings)
    np.testing.assert_allclose(problem.observation.apply(data.coefficients**2), data.readings, rtol=1e-12)
    assert repr(data) == "DataSet: 20 pairs with 2 readings and states"


@pytest.mark.parametrize("block", [100, 500])
def test_no_more_than_two_copies_of_the_fields_are_in_memory(block, monkeypatch):
    V = FunctionSpace(UnitSquareMesh(70, 70), "CG", 1)
    u, m, v = Function(V), Function(V), TestFunction(V)
    forward = Steady(inner(grad(u), grad(v)) * dx - m * v * dx, u, m, DirichletBC(V, 0, "on_boundary"))
    problem = InverseProblem(GaussianPrior(V, 1.0, 0.3), forward, point_sensors(V, [[0.25, 0.5]]))
    monkeypatch.setattr(solves, "_BYTES", 8 * 10 * V.dim())
    simulate(problem, 1, seed=1, progress=False)   # compiles
    monkeypatch.setattr(MaternOperator, "block", lambda op: 10)
    tracemalloc.start()
    data = simulate(problem, 500, seed=1, block=block, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.4 * data.coefficients.nbytes


def test_numbers_of_numpy_will_do(tmp_path):
    problem = _problem()
    assert len(simulate(problem, np.int64(3), seed=np.int64(1), path=tmp_path / "a")) == 3


def test_interrupted_run_continues_where_it_stopped(tmp_path):
    problem = _problem()
    whole = simulate(problem, 30, seed=3, block=8, progress=False)
    stopped = Counting(problem.forward, 2 + 18)
    with pytest.raises(KeyboardInterrupt):
        simulate(replace(problem, forward=stopped), 30, seed=3, block=8, path=tmp_path / "d", progress=False)
    again = Counting(problem.forward)
    data = simulate(replace(problem, forward=again), 30, seed=3, block=8, path=tmp_path / "d", progress=False)
    # Two samples are solved once more as a check. Seventeen were solved before, and are kept.
    assert again.calls == 2 + 30 - 17
    np.testing.assert_array_equal(data.coefficients, whole.coefficients)
    np.testing.assert_array_equal(data.readings, whole.readings)
    assert not list((tmp_path / "d").glob("*.partial*"))
    longer = simulate(problem, 40, seed=3, block=8, path=tmp_path / "d", progress=False)
    np.testing.assert_array_equal(longer.readings[:24], whole.readings[:24])
    assert len(load_pairs(tmp_path / "d", problem, 11)) == 11


def test_blocks_and_single_solves_agree():
    from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
    from fem_diffusion.forward.physics import Boundary
    V = FunctionSpace(UnitSquareMesh(4, 4, comm=MPI.COMM_SELF), "CG", 1)
    prior = TransformedPrior(GaussianPrior(V, 0.5, 0.5), lambda g: g**2)
    forward = AdvectionDiffusion(V, V, "source", bcs=Boundary(dirichlet={"on_boundary": 0}))
    problem = InverseProblem(prior, forward, point_sensors(V, [[0.5, 0.5]]))
    fast = simulate(problem, 6, seed=1, progress=False)
    slow = simulate(replace(problem, forward=lambda m: forward(m)), 6, seed=1, progress=False)
    np.testing.assert_array_equal(fast.coefficients, slow.coefficients)
    np.testing.assert_allclose(fast.readings, slow.readings, rtol=1e-8)


@pytest.mark.parallel(2)
def test_an_ensemble_makes_the_same_data(tmp_path_factory):
    ensemble = Ensemble(MPI.COMM_WORLD, 1)
    folder = MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("pairs")))
    problem = _problem(ensemble.comm)
    counting = Counting(problem.forward)
    data = simulate(replace(problem, forward=counting), 32, seed=3, block=4, path=f"{folder}/d", ensemble=ensemble,
                    progress=False)
    # Each member checks two samples by itself.
    assert counting.calls == 2 + 16
    alone = simulate(problem, 32, seed=3, block=4, progress=False)
    np.testing.assert_array_equal(data.readings, alone.readings)


@pytest.mark.parallel(2)
def test_a_mesh_on_two_ranks(tmp_path_factory, monkeypatch):
    # Rows go in parts, because a message holds less than 2 GiB.
    monkeypatch.setattr(keyed, "_MESSAGE", 200)
    folder = MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("pairs")))
    problem = _problem(MPI.COMM_WORLD)
    data = simulate(problem, 6, seed=3, path=f"{folder}/d", keep_states=True, progress=False)
    again = load_pairs(f"{folder}/d", problem)
    np.testing.assert_array_equal(data.coefficients, again.coefficients)
    np.testing.assert_allclose(problem.observation.apply(again.states), again.readings)
    # The same samples on one rank, whatever the numbering.
    one = _problem(MPI.COMM_SELF)
    alone = load_pairs(f"{folder}/d", one)
    np.testing.assert_allclose(one.observation.apply(alone.coefficients**2), data.readings)
    with pytest.raises(FileError, match="another mesh"):
        load_pairs(f"{folder}/d", _problem(MPI.COMM_SELF, n=12))


def test_other_prior_sensor_or_seed_is_noticed(tmp_path):
    problem = _problem()
    kept = simulate(problem, 5, seed=3, path=tmp_path, progress=False)
    V, one = problem.V, point_sensors(problem.V, [[0.5]])
    for change, seed, words in [({"prior": GaussianPrior(V, 2.0, 0.3)}, 3, "another prior"),
                                ({"forward": lambda m: m}, 3, "another prior"),
                                ({"observation": point_sensors(V, [[0.3], [0.5]])}, 3, "another prior"),
                                ({"observation": one}, 3, "another prior"), ({}, 4, "seed")]:
        with pytest.raises(DataError, match=words):
            simulate(replace(problem, **change), 5, seed=seed, path=tmp_path, progress=False)
        if change and change != {"observation": one}:
            with pytest.raises(DataError, match="another prior, forward problem or observation.*pass the problem"):
                load_pairs(tmp_path, replace(problem, **change))
    np.testing.assert_array_equal(load_pairs(tmp_path, problem).readings, kept.readings)
    with pytest.raises(DataError, match="holds 2 readings of each sample, and the problem has 1: pass the problem"):
        load_pairs(tmp_path, replace(problem, observation=one))


def test_pairs_of_a_solver_that_draws_its_noise_are_loaded(tmp_path):
    """It gives other readings each time; with another prior they are refused all the same."""
    problem, generator = _problem(), np.random.default_rng(0)

    def noisy(m):
        state = problem.forward(m)
        return state.assign(state + generator.standard_normal())
    own = replace(problem, forward=noisy, noise=None)
    kept = simulate(own, 5, seed=3, path=tmp_path, progress=False)
    np.testing.assert_array_equal(load_pairs(tmp_path, own).readings, kept.readings)
    assert len(simulate(own, 7, seed=3, path=tmp_path, progress=False)) == 7
    for change in ({"prior": GaussianPrior(problem.V, 2.0, 0.3)}, {"noise": GaussianNoise(std=0.1)}):
        with pytest.raises(DataError, match="another prior"):
            load_pairs(tmp_path, replace(own, **change))


def test_pairs_are_loaded_where_the_solver_fails(tmp_path):
    problem = _problem()

    def absent(m):
        raise RuntimeError("no licence here")
    kept = simulate(problem, 5, seed=3, path=tmp_path, progress=False)
    with pytest.warns(UserWarning, match="is of this problem cannot be told: .*no licence here"):
        again = load_pairs(tmp_path, replace(problem, forward=absent))
    np.testing.assert_array_equal(again.readings, kept.readings)


def test_damaged_foreign_and_swapped_blocks_are_refused_and_kept(tmp_path):
    problem = _problem()
    folder, other = tmp_path / "d", tmp_path / "e"
    arguments = {"seed": 3, "block": 3, "progress": False}
    whole = simulate(problem, 6, path=folder, **arguments)
    simulate(replace(problem, forward=lambda m: Function(problem.V).interpolate(m**2 + 1)), 6, path=other, **arguments)
    block = folder / "block-00001.safetensors"
    content = block.read_bytes()
    for broken, words in [(content[:len(content) // 2], "damaged|no file"), (b"", "no file"), (b"foreign", "no file"),
                          ((folder / "block-00000.safetensors").read_bytes(), "its index is 0"),
                          ((other / block.name).read_bytes(), "its data set is"),
                          ((folder / "data_set.safetensors").read_bytes(), "holds a data set, where a block")]:
        block.write_bytes(broken)
        for read in (lambda: load_pairs(folder, problem),
                     lambda: simulate(problem, 6, path=folder, **arguments)):
            with pytest.raises(FileError, match=words):
                read()
        assert block.read_bytes() == broken
    # As the message says.
    block.unlink()
    again = simulate(problem, 6, path=folder, **arguments)
    np.testing.assert_array_equal(again.readings, whole.readings)
    assert block.read_bytes() == content
    # So with the header: the blocks still belong to it.
    (folder / "data_set.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match="Delete that file and run simulate again"):
        load_pairs(folder, problem)
    (folder / "data_set.safetensors").unlink()
    again = simulate(problem, 6, path=folder, **arguments)
    np.testing.assert_array_equal(again.readings, whole.readings)


def test_old_empty_and_incomplete_data_sets_are_refused(tmp_path):
    problem = _problem()
    folder = tmp_path / "d"
    with pytest.raises(DataError, match="no data set"):
        load_pairs(tmp_path / "nothing", problem)
    simulate(problem, 9, seed=3, block=3, path=folder, progress=False)
    with pytest.raises(DataError, match="9 of 10"):
        load_pairs(folder, problem, 10)
    (folder / "block-00001.safetensors").unlink()
    with pytest.raises(DataError, match="6 of 9"):
        load_pairs(folder, problem)
    assert len(load_pairs(folder, problem, 3)) == 3
    for file in folder.glob("block*"):
        file.unlink()
    with pytest.raises(DataError, match="no samples"):
        load_pairs(folder, problem)


def test_two_runs_on_one_folder(tmp_path):
    problem = _problem()
    inner = []

    def meanwhile(m):
        if not inner:
            inner.append(None)
            with pytest.raises(FileError, match="in use by another run"):
                simulate(problem, 3, seed=3, path=tmp_path / "d", progress=False)
            inner.append(True)
        return problem.forward(m)
    simulate(replace(problem, forward=meanwhile), 3, seed=3, path=tmp_path / "d", progress=False)
    assert inner == [None, True]
    assert len(simulate(problem, 3, seed=3, path=tmp_path / "d", progress=False)) == 3
    assert {file.name for file in (tmp_path / "d").iterdir()} == {"data_set.safetensors", "block-00000.safetensors"}


@pytest.mark.parametrize("change, words", [
    ({"n": 0}, "n is 0"), ({"n": 2.5}, "n is 2.5"), ({"n": True}, "n is True"), ({"seed": -1}, "seed is -1"),
    ({"seed": 1.5}, "seed is 1.5"), ({"seed": None}, "seed is None"), ({"block": 0}, "block is 0"),
    ({"skip": 1.5}, "skip is 1.5"), ({"skip": "none"}, "skip is 'none'"), ({"progress": 1}, "progress is 1"),
    ({"keep_states": "no"}, "keep_states is 'no'"), ({"ensemble": Ensemble(MPI.COMM_SELF, 1)}, "give `path`"),
    ({"problem": None}, "problem is of type NoneType: give an InverseProblem"),
])
def test_bad_arguments_are_refused_before_any_work(change, words, tmp_path):
    problem = _problem()
    with pytest.raises(InputError, match=words):
        simulate(**{"problem": problem, "n": 3, "seed": 0} | change)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be made"):
        simulate(_problem(), 3, seed=0, path=tmp_path / "file" / "d", progress=False)


def test_samples_of_the_wrong_space_are_a_mistake():
    problem = _problem()
    other = FunctionSpace(problem.V.mesh(), "CG", 2)
    for change, words in [({"prior": CallablePrior(problem.V, lambda seed: Function(other))}, "interpolate it into"),
                          ({"forward": lambda m: Function(other)}, "build it and the observation on the same space")]:
        with pytest.raises(InputError, match=words):
            simulate(replace(problem, **change), 3, seed=5, progress=False)


def test_a_family_keeps_states_and_an_instrument_of_the_users_own_keeps_none(tmp_path):
    problem = _problem()
    family = replace(problem, observation=SensorFamily(SensorKind(problem.observation, 0.1, (1, 2))))
    data = simulate(family, 5, seed=3, path=tmp_path / "d", progress=False)
    assert data.readings.shape == (5, 0)
    np.testing.assert_allclose(data.states, data.coefficients**2, rtol=1e-12)
    np.testing.assert_array_equal(load_pairs(tmp_path / "d", family).states, data.states)
    bent = replace(problem, forward=lambda m: Function(problem.V).interpolate(m**2),
                   observation=lambda u: problem.observation(u)**2)
    data = simulate(bent, 5, seed=3, path=tmp_path / "e", progress=False)
    np.testing.assert_allclose(data.readings, problem.observation.apply(data.coefficients**2)**2, rtol=1e-12)
    assert data.states is None and load_pairs(tmp_path / "e", bent).states is None
