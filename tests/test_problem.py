"""An inverse problem is checked once, and says what sensors read."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, UnitIntervalMesh, exp

from fem_diffusion import (
    CallableForward, CallableNoise, GaussianNoise, GaussianPrior, InverseProblem, SensorFamily, SensorKind,
    TransformedPrior, point_sensors,
)
from fem_diffusion.comparison import moment_p_values
from fem_diffusion.errors import InputError

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
