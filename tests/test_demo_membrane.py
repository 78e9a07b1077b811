"""The membrane benchmark: the forward model is the published one, its derivative is right, and the demo runs."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from fem_diffusion import Differentiable, GaussianNoise, GaussianPrior, InverseProblem, field, point_sensors

FOLDER = Path(__file__).parent.parent / "demos" / "membrane"


def _load(name):
    sys.path.insert(0, str(FOLDER))
    try:
        specification = importlib.util.spec_from_file_location(f"membrane_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def forward():
    return _load("forward")


@pytest.fixture(scope="module")
def problem(forward):
    membrane = forward.Membrane()
    return InverseProblem(GaussianPrior(membrane.M, 2.0, mean=4.0), membrane, point_sensors(membrane.U, forward.POINTS),
                          GaussianNoise(std=0.05))


def test_readings_are_those_of_the_published_program(forward, problem):
    stiffness, readings = forward.forward_tests()
    assert len(stiffness) == 10
    assert np.abs(problem.readings(np.log(stiffness)) - readings).max() < 1e-11


def test_the_derivative_is_that_of_differences(problem):
    assert isinstance(problem.forward, Differentiable)
    g, step = problem.prior.sample_many(1, seed=3), 1e-5
    differences = [(problem.readings(g + step * d) - problem.readings(g - step * d))[0] / (2 * step)
                   for d in np.eye(64)[::9]]
    found = problem.sensitivity(field(problem.M, g[0]))[:, ::9]
    np.testing.assert_allclose(found.T, differences, atol=1e-7 * np.abs(found).max())


def test_solves_and_pulls_are_counted_once(forward):
    membrane = forward.Membrane()
    problem = InverseProblem(GaussianPrior(membrane.M, 2.0), membrane, point_sensors(membrane.U, forward.POINTS), 0.05)
    g = problem.prior.sample_many(forward.KEPT, seed=4)
    problem.readings(g)
    for row in g[:3]:
        problem.sensitivity(field(problem.M, row))
    assert membrane.solves == len(g) and membrane.pulls == 3 * 169
