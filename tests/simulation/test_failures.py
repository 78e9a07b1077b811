"""Simulations in which solves fail: nothing is lost, nothing is hidden, nobody waits for ever."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from firedrake import Ensemble, Function, FunctionSpace, UnitIntervalMesh
from mpi4py import MPI

from fem_diffusion.errors import DataError, InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.forward.blocks import SkippedWarning
from fem_diffusion.simulation import solves
from fem_diffusion.simulation.simulate import load_pairs, simulate, simulated_parameter

SEED, BLOCK = 3, 8


class Problem:
    """u = m², which fails where m is large at the left end, in a way of the caller's choice."""

    def __init__(self, how="raises", limit=1.2, comm=MPI.COMM_SELF):
        self.V = FunctionSpace(UnitIntervalMesh(10, comm=comm), "CG", 1)
        self.prior, self.sensors = GaussianPrior(self.V, 1.0, 0.3), point_sensors(self.V, [[0.25], [0.5]])
        self.how, self.limit, self.calls = how, limit, 0

    def fails(self, m):
        return np.any(coefficients(m) > self.limit) if isinstance(m, Function) else (m > self.limit).any(axis=-1)

    def __call__(self, m):
        self.calls += 1
        if self.how and self.fails(m):
            if self.how == "raises":
                raise RuntimeError("no solution\nof this one")
            return Function(self.V).assign(np.nan)
        return Function(self.V).interpolate(m**2)

    def problem(self, **change):
        return InverseProblem(**{"prior": self.prior, "forward": self, "observation": self.sensors} | change)

    def simulate(self, n=30, **options):
        change = {"observation": options.pop("observation")} if "observation" in options else {}
        return simulate(self.problem(**change), n, **{"seed": SEED, "block": BLOCK, "progress": False} | options)


class Blocks(Problem):
    """The same with blocks of samples."""

    M = U = property(lambda self: self.V)

    def solve_many(self, ms):
        if self.how == "raises" and self.fails(ms).any():
            raise RuntimeError("no solution of one of these")
        return np.where(self.fails(ms)[:, None] & (self.how is not None), np.nan, ms**2)


def _truth(n=30):
    """All samples, and which of them fail."""
    problem = Problem(None)
    data = problem.simulate(n, keep_states=True)
    return data, np.flatnonzero((data.coefficients > problem.limit).any(axis=1)).tolist()


@pytest.mark.parametrize("kind", [Problem, Blocks])
@pytest.mark.parametrize("how", ["raises", "is nan"])
def test_a_failed_solve_stops_and_keeps_what_is_solved(kind, how, tmp_path):
    whole, bad = _truth()
    assert 2 < len(bad) < 20 and bad[0] > 0
    problem = kind(how)
    words = (f"failed for sample {bad[0]} .*block {bad[0] // BLOCK}, seed {SEED}.*"
             f"simulated_parameter\\(problem, {bad[0]}, seed={SEED}, block={BLOCK}\\)")
    for _ in range(2):
        with pytest.raises(SolveError, match=words):
            problem.simulate(path=tmp_path / "d")
    parameter = simulated_parameter(problem.problem(), bad[0], seed=SEED, block=BLOCK)
    np.testing.assert_array_equal(coefficients(parameter), whole.coefficients[bad[0]])
    # The rest is solved once the solver is mended, and the samples before the failure are not solved again.
    mended = Problem(None)
    data = mended.simulate(path=tmp_path / "d")
    assert mended.calls == 2 + 30 - bad[0]
    np.testing.assert_array_equal(data.coefficients, whole.coefficients)
    np.testing.assert_allclose(data.readings, whole.readings, rtol=1e-14)


@pytest.mark.parametrize("how", ["raises", "is nan"])
def test_a_block_that_is_solved_in_parts_is_the_same(how, monkeypatch):
    whole, bad = _truth()
    problem = Blocks(how)
    monkeypatch.setattr(solves, "_BYTES", 8 * 3 * problem.V.dim())
    with pytest.warns(SkippedWarning):
        data = problem.simulate(skip=0.7, keep_states=True)
    good = [i for i in range(30) if i not in bad]
    assert [i for i, _ in data.skipped] == bad
    np.testing.assert_allclose(data.states, whole.states[good], rtol=1e-14)
    np.testing.assert_allclose(data.readings, whole.readings[good], rtol=1e-14)
    with pytest.raises(SolveError, match=f"failed for sample {bad[0]} "):
        problem.simulate()


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("kind", [Problem, Blocks])
@pytest.mark.parametrize("how", ["raises", "is nan"])
def test_failed_solves_are_skipped_recorded_and_told(kind, how, states, tmp_path):
    whole, bad = _truth()
    good = [i for i in range(30) if i not in bad]
    reason = {"raises": "RuntimeError: no solution of this one" if kind is Problem else "no solution of one of these",
              "is nan": "the state is not finite"}[how]
    options = {"skip": 0.7, "keep_states": states}
    for path in (None, tmp_path / "d"):
        with pytest.warns(SkippedWarning, match=f"{len(bad)} of 30 samples .*on condition that the solver succeeds"):
            data = kind(how).simulate(path=path, **options)
        assert [i for i, _ in data.skipped] == bad and all(reason in why for _, why in data.skipped)
        np.testing.assert_array_equal(data.coefficients, whole.coefficients[good])
        np.testing.assert_allclose(data.readings, whole.readings[good], rtol=1e-14)
        assert (data.states is not None) == states
        if states:
            np.testing.assert_allclose(data.states, whole.states[good], rtol=1e-14)
    with pytest.warns(SkippedWarning):
        read = load_pairs(tmp_path / "d", Problem().problem())
    np.testing.assert_array_equal(read.readings, data.readings)
    assert read.skipped == data.skipped
    # Only those that are asked for are counted.
    first = bad[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_pairs(tmp_path / "d", Problem().problem(), first)) == first
    with pytest.warns(SkippedWarning, match=f"1 of {first + 1} "):
        assert len(load_pairs(tmp_path / "d", Problem().problem(), first + 1)) == first
    # Who does not want holes is told of them, and who wants more gets more.
    with pytest.raises(SolveError, match=f"failed for sample {bad[0]} "):
        kind(how).simulate(path=tmp_path / "d", keep_states=states)
    shutil.copytree(tmp_path / "d", tmp_path / "mended")
    mended = kind(None)
    again = mended.simulate(path=tmp_path / "mended", keep_states=states)
    np.testing.assert_array_equal(again.coefficients, whole.coefficients)
    np.testing.assert_allclose(again.readings, whole.readings, rtol=1e-14)
    assert again.skipped == () and mended.calls == 2 + (0 if kind is Blocks else len(bad))
    with pytest.warns(SkippedWarning):
        longer = kind(how).simulate(44, path=tmp_path / "d", **options)
    np.testing.assert_array_equal(longer.coefficients[:len(good)], data.coefficients)
    assert len(longer) + len(longer.skipped) == 44


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("kind", [Problem, Blocks])
def test_a_block_in_which_all_fail_is_one_of_many(kind, states, tmp_path):
    options = {"block": 1, "skip": 0.7, "keep_states": states}
    for path in (None, tmp_path / "d"):
        # Draws belong to blocks, so these are other samples.
        alone = Problem(None).simulate(block=1, keep_states=True)
        good = ~(alone.coefficients > Problem().limit).any(axis=1)
        with pytest.warns(SkippedWarning):
            data = kind().simulate(path=path, **options)
        np.testing.assert_array_equal(data.coefficients, alone.coefficients[good])
        if states:
            np.testing.assert_allclose(data.states, alone.states[good], rtol=1e-14)


@pytest.mark.parametrize("states", [False, True])
def test_another_turn_keeps_what_it_solves_before_the_next_failure(states, tmp_path):
    whole, bad = _truth()
    peaks = whole.coefficients.max(axis=1)
    # One that the half mended solver fails for, behind others that it solves.
    limit = next(peaks[i] for k, i in enumerate(bad) if k > 1 and i < BLOCK * (bad[0] // BLOCK + 1)
                 and peaks[i] > max(peaks[j] for j in bad[:k])) - 1e-9
    first = next(i for i in bad if peaks[i] > limit)
    options = {"path": tmp_path / "d", "keep_states": states}
    with pytest.warns(SkippedWarning):
        Problem().simulate(skip=0.7, **options)
    with pytest.raises(SolveError, match=f"failed for sample {first} "):
        Problem(limit=limit).simulate(**options)
    mended = Problem(None)
    again = mended.simulate(**options)
    assert mended.calls == 2 + len(bad) - bad.index(first)
    np.testing.assert_array_equal(again.coefficients, whole.coefficients)
    np.testing.assert_allclose(again.readings, whole.readings, rtol=1e-14)


def test_too_many_failures_stop(tmp_path):
    whole, bad = _truth()
    problem = Problem()
    with pytest.raises(SolveError, match=f"{len(bad)} of 30 samples, more than skip = 10%.*no solution"):
        problem.simulate(path=tmp_path / "d", skip=0.1)
    calls = problem.calls
    with pytest.warns(SkippedWarning):
        data = problem.simulate(path=tmp_path / "d", skip=0.7)
    assert len(data) == 30 - len(bad) and problem.calls == calls + len(whole.coefficients[:2])
    with pytest.raises(SolveError, match="failed for each of the first 8 samples.*no solution"):
        Problem(limit=-np.inf).simulate(path=tmp_path / "e", skip=1.0)
    with pytest.raises(SolveError, match="failed for 30 of 30|failed for all of 30"):
        Problem(limit=-np.inf).simulate(skip=1.0)


def test_a_long_hopeless_run_stops_early():
    problem = Problem(limit=-np.inf)
    with pytest.raises(SolveError, match="failed for 50 of 50"):
        problem.simulate(10_000, skip=0.1)
    assert problem.calls == 50


@pytest.mark.parametrize("observation, error, words", [
    (lambda u: 1 / 0, SolveError, "ZeroDivisionError: division by zero"),
    (lambda u: [np.nan, 1.0], SolveError, "the reading is not finite"),
    (lambda u: np.ones(2 + int(u.dat.data_ro[0] > 0.5)), InputError, "2 or 3 readings"),
    (lambda u: np.ones((2, 2)), InputError, "k real numbers"),
    (lambda u: 1j, InputError, "k real numbers"),
    (lambda u: "a", InputError, "k real numbers"),
    (lambda u: None, InputError, "k real numbers"),
])
@pytest.mark.parametrize("folder", [False, True])
def test_observations_of_the_users_own(observation, error, words, folder, tmp_path):
    with pytest.raises(error, match=words):
        Problem(None).simulate(observation=observation, path=tmp_path / "d" if folder else None)


def test_priors_that_are_not_finite_are_not_skipped():
    problem = Problem(None)
    prior = CallablePrior(problem.V, lambda seed: Function(problem.V).assign(np.nan if seed % 3 == 0 else 1.0))
    with pytest.raises(DataError, match=r"Samples \[.*\] of block 0 .*mend the prior"):
        simulate(problem.problem(prior=prior), 20, seed=1, skip=0.1, progress=False)
    # A transform may overflow for some of them: that is a failure of the sample.
    prior = TransformedPrior(problem.prior, lambda f: 10.0**(400 * f))
    with pytest.raises(SolveError, match="the parameter is not finite"):
        simulate(problem.problem(prior=prior), 20, seed=1, progress=False)


class Writing(Problem):
    """A solver that changes its parameter and hands out the same state again."""

    def __init__(self):
        super().__init__(None)
        self.state = Function(self.V)

    def __call__(self, m):
        self.state.interpolate(m**2)
        m.assign(7.0)
        return self.state


class WritingBlocks(Blocks):
    def solve_many(self, ms):
        states = ms**2
        ms[:] = 7.0
        return states


@pytest.mark.parametrize("make", [Writing, lambda: WritingBlocks(None)])
def test_solvers_may_write_into_their_parameters(make):
    whole, _ = _truth()
    kept = []

    def same_array(u):
        kept.append(u)
        u.assign(u * 2)
        return readings
    readings = np.zeros(2)
    data = make().simulate(keep_states=True)
    for name in ("coefficients", "readings", "states"):
        np.testing.assert_allclose(getattr(data, name), getattr(whole, name), rtol=1e-14)
    data = make().simulate(observation=same_array)
    np.testing.assert_array_equal(data.coefficients, whole.coefficients)
    readings[:] = 5.0
    np.testing.assert_array_equal(data.readings, 0.0)


@pytest.mark.parallel(2)
def test_a_failure_on_one_rank_is_one_of_all(tmp_path):
    folder = Path(MPI.COMM_WORLD.bcast(str(tmp_path)))

    class OnOneRank(Problem):
        def __call__(self, m):
            state = Function(self.V).interpolate(m**2)
            if MPI.COMM_WORLD.rank == 1 and self.fails(m):
                raise RuntimeError("no solution of this one")
            return state
    whole, _ = _truth()
    problem = OnOneRank(comm=MPI.COMM_WORLD)
    with pytest.raises(SolveError, match="RuntimeError: no solution of this one") as caught:
        problem.simulate(path=folder / "d")
    assert len(set(MPI.COMM_WORLD.allgather(str(caught.value)))) == 1
    with pytest.warns(SkippedWarning):
        data = problem.simulate(path=folder / "d", skip=0.9)
    skipped = {i for i, _ in data.skipped}
    assert skipped and len(set(MPI.COMM_WORLD.allgather(data.skipped))) == 1
    good = [i for i in range(30) if i not in skipped]
    np.testing.assert_allclose(data.readings, whole.readings[good], rtol=1e-10)
    # A reading that the user forgot to sum over ranks.
    with pytest.raises(InputError, match="other readings on other ranks"):
        Problem(None, comm=MPI.COMM_WORLD).simulate(observation=lambda u: [u.dat.data_ro.sum()])


@pytest.mark.parallel(2)
def test_what_is_not_finite_on_one_rank_fails_on_all(tmp_path):
    """Sums over ranks come after word from all of them, so that nobody waits for a rank that has stopped."""
    rank = MPI.COMM_WORLD.rank
    problem = Problem(None, comm=MPI.COMM_WORLD)
    options = {"seed": SEED, "block": BLOCK, "progress": False, "skip": 0.9}
    overflow = TransformedPrior(problem.prior, lambda f: 10.0**(300 * f))

    class OneNan(Blocks):
        def solve_many(self, ms):
            states = ms**2
            if rank == 1:
                states[ms.max(axis=1) > 0.5] = np.nan
            return states

    def fails(u):
        readings = problem.sensors(u)
        if rank == 1 and u.dat.data_ro.max() > 1.0:
            raise ValueError("on this rank only")
        return readings

    def wrong(u):
        return np.ones((2, 2)) if rank == 1 else np.ones(2)
    for prior, forward, observation, reason in [
            (overflow, problem, problem.sensors, "the parameter is not finite"),
            (problem.prior, OneNan(None, comm=MPI.COMM_WORLD), None, "the state is not finite"),
            (problem.prior, problem, fails, "ValueError: on this rank only")]:
        with pytest.warns(SkippedWarning):
            data = simulate(InverseProblem(prior if forward is problem else forward.prior, forward,
                                           observation or forward.sensors), 30, **options)
        assert 0 < len(data.skipped) < 30 and any(reason in why for _, why in data.skipped)
        assert len(set(MPI.COMM_WORLD.allgather(data.skipped))) == 1
    with pytest.raises(InputError, match="k real numbers"):
        simulate(problem.problem(observation=wrong), 3, **options)


@pytest.mark.parallel(2)
def test_an_error_of_one_member_of_an_ensemble_is_one_of_all(tmp_path):
    folder = Path(MPI.COMM_WORLD.bcast(str(tmp_path)))
    ensemble = Ensemble(MPI.COMM_WORLD, 1)
    problem = Problem(None, comm=ensemble.comm)

    def draw(seed):
        if MPI.COMM_WORLD.rank == 1:
            raise ValueError("no draw here")
        return Function(problem.V)
    with pytest.raises(DataError, match="no draw here"):
        simulate(problem.problem(prior=CallablePrior(problem.V, draw)), 30, seed=0, block=4, path=folder / "d",
                 ensemble=ensemble, progress=False)


def test_a_short_block_in_the_middle_is_incomplete(tmp_path):
    problem = Problem()
    with pytest.raises(SolveError):
        problem.simulate(16, path=tmp_path / "d")
    bad = _truth()[1][0]
    assert bad < BLOCK
    # The second block comes from elsewhere, as from another member of an ensemble.
    Problem(None).simulate(16, path=tmp_path / "e")
    shutil.copy(tmp_path / "e" / "block-00001.safetensors", tmp_path / "d")
    with pytest.raises(DataError, match=f"{bad + BLOCK} of 16 pairs"):
        load_pairs(tmp_path / "d", problem.problem())
    assert len(load_pairs(tmp_path / "d", problem.problem(), bad)) == bad


@pytest.mark.parametrize("skip", [0, 0.1])
def test_an_interruption_inside_a_solver_of_petsc_is_one(tmp_path, skip):
    """PETSc hands on what is raised in its callbacks as an error of its own, and keeps the solver locked."""
    problem = Problem(None)

    def forward(m):
        problem.calls += 1
        if problem.calls == 2 + 11:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                raise RuntimeError("error code 101") from error
        return Function(problem.V).interpolate(m**2)
    options = {"seed": SEED, "block": BLOCK, "path": tmp_path / "d", "skip": skip, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        simulate(problem.problem(forward=forward), 30, **options)
    data = simulate(problem.problem(forward=forward), 30, **options)
    assert data.skipped == () and problem.calls == 2 + 11 + 2 + 20


def test_a_solver_that_forgets_to_return_is_told_so():
    problem = Problem(None)
    with pytest.raises(InputError, match="returned NoneType: return a Function in"):
        simulate(problem.problem(forward=lambda m: None), 3, seed=0, progress=False)


def test_warnings_point_at_the_caller(tmp_path):
    with pytest.warns(SkippedWarning) as caught:
        Problem().simulate(path=tmp_path / "d", skip=0.9)
    assert caught[0].filename == __file__


def test_a_solver_may_change_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    problem = Problem(None)

    def forward(m):
        os.chdir(tmp_path / "other")
        return problem(m)
    simulate(problem.problem(forward=forward), 9, seed=0, block=4, path="pairs", progress=False)
    assert len(load_pairs(tmp_path / "pairs", problem.problem())) == 9 and not list((tmp_path / "pairs").glob("*.lock"))
    assert not list((tmp_path / "other").iterdir())


HANGS = """
from firedrake import *
from fem_diffusion import GaussianPrior, InverseProblem, point_sensors, simulate
from fem_diffusion import checks

checks._PATIENCE = 2.0
checks._TIMES = 0.0
mesh = UnitIntervalMesh(10)
V = FunctionSpace(mesh, "CG", 1)

def forward(m):
    try:
        if mesh.comm.rank == 1:
            raise RuntimeError("on this rank only")
        mesh.comm.Barrier()     # as a solver would wait in a sum over ranks
    except RuntimeError:
        pass
    return Function(V)

simulate(InverseProblem(GaussianPrior(V, 1.0, 0.3), forward, point_sensors(V, [[0.5]])), 3, seed=0, progress=False)
"""


def test_an_exception_that_one_rank_catches_does_not_hang_the_others_for_ever(tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    run = subprocess.run(["mpiexec", "-n", "2", sys.executable, str(tmp_path / "hangs.py")], capture_output=True,
                         text=True, timeout=300, env=environment)
    assert run.returncode != 0
    assert re.search("rank 1 has waited 2 s for the other ranks.*Raise exceptions on all ranks", run.stderr)
