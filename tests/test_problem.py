"""An inverse problem is checked once, and says what sensors read."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, UnitIntervalMesh, exp

from fem_diffusion import (
    CallableForward, CallableNoise, GaussianNoise, GaussianPrior, InverseProblem, SensorFamily, SensorKind,
    TransformedPrior, karhunen_loeve, point_sensors, simulate,
)
from fem_diffusion.comparison import moment_p_values
from fem_diffusion.errors import InputError
from fem_diffusion.forward.taped import Taped
from fem_diffusion.reference.latents import LatentProblem

MESH = UnitIntervalMesh(8)
V, W = FunctionSpace(MESH, "CG", 1), FunctionSpace(MESH, "CG", 2)
PRIOR, SENSORS = TransformedPrior(GaussianPrior(V, 1.0, 0.5), exp), point_sensors(W, [[0.25], [0.75]])
FAMILY = SensorFamily(SensorKind(SENSORS, 0.1, (1, 2)))


def _solve(m):
    return Function(W).interpolate(m**2)


def _problem(**change):
    return InverseProblem(**{"prior": PRIOR, "forward": _solve, "observation": SENSORS, "noise": 0.1} | change)


def test_it_knows_its_spaces_and_sensors():
    problem, family = _problem(), _problem(observation=FAMILY, noise=None)
    assert (problem.V, problem.M, problem.U) == (V, V, W) and problem.comm is V.comm
    assert (problem.k, problem.names, problem.family) == (2, SENSORS.names, False)
    assert (family.k, family.names, family.family, family.U) == (None, (), True, W)
    bare = _problem(observation=lambda u: u.dat.data_ro[:3])
    assert bare.U is None and bare.k is None
    assert _problem(forward=CallableForward(_solve, V, W), observation=lambda u: [1.0]).U == W
    assert repr(problem) == "InverseProblem: TransformedPrior of 9 unknowns, CallableForward, 2 sensors, GaussianNoise"
    assert "any sensors of a family, no noise of its own" in repr(family) and ", a function, " in repr(bare)


class Spaceless:
    """A solver that does not tell the space of its states before it is called."""

    M, U = V, None

    def __init__(self, W):
        self.W, self.calls = W, 0

    def __call__(self, m):
        self.calls += 1
        return Function(self.W)

    def solve_many(self, parameters):
        return np.zeros((len(parameters), self.W.dim()))


ELSEWHERE = FunctionSpace(UnitIntervalMesh(8), "CG", 2)


@pytest.mark.parametrize("forward, words", [
    (lambda m: Function(ELSEWHERE), "a Function in .* on another mesh: return a Function in .* on the mesh of the obs"),
    (lambda m: Function(V), "a Function in <CG1 on a interval>: return a Function in <CG2"),
    (lambda m: np.zeros(17), "returned ndarray"),
    (Taped(lambda m: Function(ELSEWHERE), V), "on another mesh"), (Spaceless(ELSEWHERE), "on another mesh"),
    (Spaceless(V), "states of shape .*, and the sensors see states in .*: build both on the same space"),
])
def test_states_that_sensors_do_not_see_are_refused_at_first_use(forward, words):
    problem, values, basis = _problem(forward=forward), PRIOR.sample_many(2, 0), karhunen_loeve(PRIOR, 2)
    for use in (lambda: problem.readings(values), lambda: simulate(problem, 2, seed=1, progress=False),
                lambda: LatentProblem(problem, [0.0, 0.0], basis).energy(np.zeros((1, 2)))):
        with pytest.raises(InputError, match=words):
            use()


def test_a_solver_that_tells_no_space_is_called_once_for_it():
    solver = Spaceless(W)
    problem = _problem(forward=solver)
    for _ in range(3):
        problem.readings(PRIOR.sample_many(2, 0))
    assert solver.calls == 1


def test_readings_and_measurements():
    values = PRIOR.sample_many(3, 0)
    clean = _problem().readings(values)
    np.testing.assert_allclose(clean, np.array([SENSORS(_solve(Function(V, val=row))) for row in values]))
    squares = _problem(observation=lambda u: SENSORS(u)**2).readings(values)
    np.testing.assert_allclose(squares, clean**2)
    np.testing.assert_array_equal(_problem(noise=None).measurements(values, seed=0), clean)
    noise = GaussianNoise(covariance=[[0.04, 0.03], [0.03, 0.09]])
    drawn = _problem(noise=noise).measurements(np.tile(values[:1], (400, 1)), seed=1)
    assert min(moment_p_values(drawn, clean[0], np.array([[0.04, 0.03], [0.03, 0.09]]))) > 1e-4
    again = _problem(noise=noise).measurements(np.tile(values[:1], (400, 1)), seed=1)
    np.testing.assert_array_equal(drawn, again)
    with pytest.raises(InputError, match="A family has no readings: choose sensors"):
        _problem(observation=FAMILY, noise=None).readings(values)
    with pytest.raises(InputError, match="seed is -1"):
        _problem().measurements(values, seed=-1)


@pytest.mark.parametrize("change, words", [
    ({"prior": None}, "prior is NoneType: give a prior"), ({"prior": GaussianPrior}, "give a prior"),
    ({"forward": None}, "forward is None: give a function"), ({"observation": 3}, "observation is of type int: give"),
    ({"observation": FAMILY}, "kinds of a family have their own noise: leave noise out"),
    ({"noise": [0.1] * 3}, "is for .3. sensors, the observations have 2"), ({"noise": "small"}, "Noise 'std' holds"),
    ({"noise": lambda y: y}, "CallableNoise.noise."), ({"forward": CallableForward(_solve, W, W)}, "same spaces"),
    ({"forward": CallableForward(_solve, V, V)}, "same spaces"), ({"forward": lambda: None}, "does not take 1"),
])
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        _problem(**change)


def test_a_state_in_another_space_is_refused_when_it_comes():
    with pytest.raises(InputError, match="returned a Function in .*build it and the observation on the same space"):
        _problem(forward=lambda m: m).readings(PRIOR.sample_many(1, 0))
    assert isinstance(_problem(noise=CallableNoise(lambda y, g: y + 1.0)).noise, CallableNoise)
    with pytest.raises(InputError, match="cannot be copied or pickled"):
        copy.deepcopy(_problem())
    assert replace(_problem(), noise=None).noise is None
