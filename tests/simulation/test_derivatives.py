"""Derivatives beside pairs: those of differences, kept in folders, the same on all ranks, refused where none are."""

from dataclasses import replace

import numpy as np
import pytest
from firedrake import DirichletBC, Ensemble, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, exp, grad, inner
from mpi4py import MPI

from fem_diffusion import files
from fem_diffusion.errors import DataError, FileError, InputError, SolveError
from fem_diffusion.forward.steady import Steady
from fem_diffusion.forward.taped import Taped
from fem_diffusion.observation.family import SensorFamily, SensorKind
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve, pod
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.product import ProductPrior
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior, level_set
from fem_diffusion.problem import InverseProblem
from fem_diffusion.simulation.simulate import SkippedWarning, load_pairs, simulate

QUIET = {"progress": False}


def _problem(comm=MPI.COMM_SELF, transform=exp, n=6):
    """A reaction that is not linear, under a source that is not, and three sensors."""
    V = FunctionSpace(UnitSquareMesh(n, n, comm=comm), "CG", 1)
    u, m, v = Function(V), Function(V), TestFunction(V)
    F = (inner(grad(u), grad(v)) + u**3 * v - 20 * m * v) * dx
    prior = TransformedPrior(GaussianPrior(V, 0.7, 0.5), transform)
    return InverseProblem(prior, Steady(F, u, m, DirichletBC(V, 0, 1)),
                          point_sensors(V, [[0.6, 0.3], [0.4, 0.8], [0.9, 0.9]]), 0.01)


def _differences(problem, data, i, step=1e-3):
    """Derivative (k, R) of the readings of a sample by latents, by differences."""
    modes = step * data.basis.scaled_modes
    ahead, behind = (problem.readings(problem.prior.transform_many(data.coefficients[i] + sign * modes))
                     for sign in (1, -1))
    return (ahead - behind).T / (2 * step)


def _agree(problem, data):
    for i in (0, len(data) - 1):
        exact = _differences(problem, data, i)
        np.testing.assert_allclose(data.derivatives[i], exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())


@pytest.fixture(scope="module")
def problem():
    return _problem()


def test_derivatives_are_those_of_differences(problem):
    data = simulate(problem, 5, seed=1, derivatives=True, **QUIET)
    assert data.derivatives.shape == (5, 3, data.basis.r) and "derivatives by" in repr(data)
    _agree(problem, data)
    plain = simulate(problem, 5, seed=1, **QUIET)
    assert plain.derivatives is None and plain.basis is None
    np.testing.assert_array_equal(plain.coefficients, data.coefficients)
    np.testing.assert_array_equal(plain.readings, data.readings)


def test_a_solver_that_is_recorded_is_solved_once_a_sample(problem):
    calls = []

    def solver(m):
        calls.append(None)
        return problem.forward(m)
    V, n = problem.V, 8
    own = replace(problem, forward=Taped(solver, problem.M, V))
    own.differentiable()
    before = len(calls)
    data = simulate(own, n, seed=1, derivatives=True, **QUIET)
    # Three more find out whether the derivative is that of differences.
    assert len(calls) - before == n + 3
    np.testing.assert_allclose(data.derivatives, simulate(problem, n, seed=1, derivatives=True, **QUIET).derivatives,
                               rtol=1e-6, atol=1e-8)


def test_other_latents_may_be_given(problem):
    basis = pod(problem.V, problem.prior.core.sample_many(20, 0), 4, prior=problem.prior)
    data = simulate(problem, 3, seed=1, derivatives=basis, **QUIET)
    assert data.basis is basis
    _agree(problem, data)


def test_several_unknowns_have_derivatives():
    V = FunctionSpace(UnitSquareMesh(4, 4, comm=MPI.COMM_SELF), "CG", 1)
    prior = ProductPrior([TransformedPrior(GaussianPrior(V, 0.5, 0.5), exp), GaussianPrior(V, 2.0, 0.8)])

    def solver(m):
        a, b = m.subfunctions
        return Function(V).interpolate(a * a + a * b)
    problem = InverseProblem(prior, solver, point_sensors(V, [[0.5, 0.5], [0.2, 0.7]]), 0.1)
    _agree(problem, simulate(problem, 3, seed=1, derivatives=True, **QUIET))


def test_an_interrupted_run_goes_on_and_is_read_again(problem, tmp_path):
    whole = simulate(problem, 9, seed=3, block=4, derivatives=True, keep_states=True, path=tmp_path / "whole", **QUIET)
    for n in (3, 6, 9):
        data = simulate(problem, n, seed=3, block=4, derivatives=True, keep_states=True, path=tmp_path / "d", **QUIET)
        np.testing.assert_allclose(data.derivatives, whole.derivatives[:n], rtol=1e-6, atol=1e-9)
    read = load_pairs(tmp_path / "d", problem, 7)
    np.testing.assert_array_equal(read.derivatives, data.derivatives[:7])
    np.testing.assert_array_equal(read.basis.scaled_modes, data.basis.scaled_modes)
    # The header may be lost: blocks stay in the modes that they were written in.
    (tmp_path / "d" / "data_set.safetensors").unlink()
    again = simulate(problem, 9, seed=3, block=4, derivatives=True, keep_states=True, path=tmp_path / "d", **QUIET)
    np.testing.assert_array_equal(again.derivatives, data.derivatives)


def test_what_is_not_that_data_set_is_refused(problem, tmp_path):
    simulate(problem, 3, seed=3, path=tmp_path / "plain", **QUIET)
    assert load_pairs(tmp_path / "plain", problem).derivatives is None
    with pytest.raises(DataError, match="with other derivatives"):
        simulate(problem, 3, seed=3, path=tmp_path / "plain", derivatives=True, **QUIET)
    assert not (tmp_path / "plain" / "modes.safetensors").exists()
    folder = tmp_path / "d"
    simulate(problem, 3, seed=3, path=folder, derivatives=True, **QUIET)
    with pytest.raises(DataError, match="with other derivatives"):
        simulate(problem, 3, seed=3, path=folder, **QUIET)
    with pytest.raises(DataError, match="other modes"):
        simulate(problem, 3, seed=3, path=folder, derivatives=karhunen_loeve(problem.prior, 3), **QUIET)
    content = files.read(folder / "block-00000.safetensors", "block", "")
    kept = content.arrays["derivatives"]
    for wrong in (kept[:, :, 1:], np.nan * kept, kept[1:]):
        files.write(folder / "block-00000.safetensors", "block", content.arrays | {"derivatives": wrong},
                    content.values)
        with pytest.raises(FileError):
            load_pairs(folder, problem)
    files.write(folder / "block-00000.safetensors", "block", content.arrays, content.values)
    karhunen_loeve(problem.prior, 3).save(folder / "modes.safetensors")
    with pytest.raises(FileError, match="other modes"):
        load_pairs(folder, problem)


def test_a_sample_without_derivative_is_a_failure(problem):
    class Failing:
        M, U = problem.M, problem.U
        calls = 0

        def __call__(self, m):
            return problem.forward(m)

        def solve_many(self, parameters):
            return problem.forward.solve_many(parameters)

        def sensitivity(self, m, rows):
            self.calls += 1
            if self.calls == 4:
                raise SolveError("no adjoint")
            return problem.forward.sensitivity(m, rows)
    with pytest.warns(SkippedWarning, match="no adjoint"):
        data = simulate(replace(problem, forward=Failing()), 6, seed=1, derivatives=True, skip=0.5, **QUIET)
    assert len(data) == len(data.derivatives) == 5 and data.skipped[0][0] == 2


@pytest.mark.parametrize("change, words", [
    (lambda p: {"observation": SensorFamily(SensorKind(p.observation, 0.1, (1, 2))), "noise": None}, "an Observation"),
    (lambda p: {"observation": lambda u: p.observation(u)**2}, "an Observation"),
    (lambda p: {"forward": lambda m: Function(p.V, val=m.dat.data_ro**2)}, "no derivative"),
    (lambda p: {"prior": CallablePrior(p.V, p.prior.sample)}, "use pod"),
    (lambda p: {"prior": TransformedPrior(p.prior.core, level_set([0.5, 2.0], [0.0]))}, "transform that jumps"),
])
def test_where_there_is_no_derivative_none_is_simulated(problem, change, words, tmp_path):
    changed = replace(problem, **change(problem))
    with pytest.raises(InputError, match=words):
        simulate(changed, 3, seed=1, derivatives=True, path=tmp_path / "d", **QUIET)
    for wrong in (1, "yes", None):
        with pytest.raises(InputError, match="derivatives is"):
            simulate(problem, 3, seed=1, derivatives=wrong, **QUIET)


def test_modes_of_another_space_are_refused(problem):
    with pytest.raises(InputError, match="not in the space"):
        simulate(problem, 3, seed=1, derivatives=karhunen_loeve(_problem(n=4).prior, 3), **QUIET)


@pytest.mark.parallel(2)
def test_a_mesh_on_two_ranks_and_an_ensemble_give_the_same(tmp_path_factory):
    folder = MPI.COMM_WORLD.bcast(str(tmp_path_factory.mktemp("pairs")))
    both = _problem(MPI.COMM_WORLD)
    data = simulate(both, 4, seed=3, block=2, derivatives=True, path=f"{folder}/both", **QUIET)
    assert len(set(MPI.COMM_WORLD.allgather(data.derivatives.tobytes()))) == 1
    alone = _problem(MPI.COMM_SELF)
    read = load_pairs(f"{folder}/both", alone)
    np.testing.assert_array_equal(read.derivatives, data.derivatives)
    _agree(alone, read)
    shared = simulate(alone, 4, seed=3, block=2, derivatives=True, path=f"{folder}/shared",
                      ensemble=Ensemble(MPI.COMM_WORLD, 1), **QUIET)
    assert len(set(MPI.COMM_WORLD.allgather(shared.derivatives.tobytes()))) == 1
    _agree(alone, shared)
