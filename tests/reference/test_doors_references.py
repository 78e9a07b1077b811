"""Bad arguments of references get an error of ours with a remedy; NumPy's numbers are good."""

import re
from dataclasses import replace

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, UnitSquareMesh, exp

from fem_diffusion.diffusion import CallableNoise, GaussianNoise
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary
from fem_diffusion.observation.family import SensorFamily, SensorKind
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve, pod
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import TransformedPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.exact import exact
from fem_diffusion.reference.hmc import hmc
from fem_diffusion.reference.laplace import laplace
from fem_diffusion.reference.pcn import pcn
from fem_diffusion.reference.point import map_point

V = FunctionSpace(UnitSquareMesh(4, 4), "CG", 1)
SENSORS = point_sensors(V, [(0.2, 0.2), (0.7, 0.2), (0.2, 0.7), (0.7, 0.7)])
PRIOR = GaussianPrior(V, 1.0, 0.5)
READINGS = np.array([0.1, 0.0, -0.1, 0.2])


@pytest.fixture(scope="module")
def problem():
    return InverseProblem(PRIOR, AdvectionDiffusion(V, V, "source", bcs=Boundary(dirichlet={1: 0.0})), SENSORS, 0.1)


@pytest.fixture(scope="module")
def basis():
    return karhunen_loeve(PRIOR, 4)


@pytest.fixture(scope="module")
def chains(basis):
    settings = {"basis": basis, "seed": 0, "chains": 8, "draws": 100, "progress": False}
    return lambda problem, y, **given: hmc(problem, y, **settings | given)


@pytest.mark.parametrize("change, words", [
    ({"noise": None}, "The noise is of type NoneType: give GaussianNoise"),
    ({"noise": CallableNoise(lambda y, generator: y)}, "of type CallableNoise, without a density"),
    ({"noise": GaussianNoise(covariance=np.ones((4, 4)))}, "singular, so there is no density: add a std"),
    ({"noise": GaussianNoise(covariance=np.diag([1.0, 1.0, 1.0, 0.0]))}, "singular"),
    ({"observation": SensorFamily(SensorKind(SENSORS, 0.1, (1, 4))), "noise": None}, "type SensorFamily"),
])
def test_problems_that_no_reference_takes(problem, chains, change, words):
    for reference in (exact, chains, laplace, map_point, lambda *given: pcn(*given, seed=0)):
        with pytest.raises(InputError, match=re.escape(words)):
            reference(replace(problem, **change), READINGS)


@pytest.mark.parametrize("change, words", [
    ({"noise": GaussianNoise(std=0.1, relative=0.1)}, "is relative, so the posterior is not Gaussian: take hmc"),
    ({"noise": CallableNoise(lambda y, g: y + 1, lambda y, clean: -(y - clean).abs().sum(1))}, "is not Gaussian"),
    ({"observation": lambda u: np.zeros(4)}, "type function: a derivative takes an Observation"),
])
def test_problems_that_have_no_exact_posterior(problem, change, words):
    with pytest.raises(InputError, match=re.escape(words)):
        exact(replace(problem, **change), READINGS)


@pytest.mark.parametrize("y, words", [
    ([0, np.nan, 0, np.inf], f"y holds values of {SENSORS.names[1]}, {SENSORS.names[3]} that are not finite"),
    ([0.0] * 3, "y has the shape (3,): give (4,)"), (np.zeros((1, 4)), "y has the shape (1, 4)"),
    (0.0, "y has the shape ()"), (READINGS * 1j, "y holds complex128 values"), (["a"] * 4, "y holds <U1"),
    (None, "y holds object"), ([True] * 4, "y holds bool"),
])
def test_bad_measurements_of_references(problem, chains, y, words):
    for reference in (exact, chains):
        with pytest.raises(InputError, match=re.escape(words)):
            reference(problem, y)


@pytest.mark.parallel([2])
def test_measurements_that_differ_between_ranks_are_refused_by_all():
    W = FunctionSpace(UnitSquareMesh(4, 4), "CG", 1)
    given = InverseProblem(GaussianPrior(W, 1.0, 0.5), lambda m: Function(W).interpolate(2 * m),
                           point_sensors(W, [(0.3, 0.3)]), 0.1)
    for mine, words in [([float(W.comm.rank)], "y is another one on other ranks"),
                        ([[1.0], [np.nan]][W.comm.rank], "that are not finite")]:
        for reference in (exact, laplace):
            with pytest.raises(InputError, match=words):
                reference(given, mine)


def test_other_bad_arguments_of_references(problem, chains, basis):
    right = exact(problem, READINGS)
    curved = replace(problem, prior=TransformedPrior(PRIOR, exp))
    sampled = pod(V, PRIOR.sample_many(20, 0), 3)
    for call, words in [
            (lambda: exact(None, READINGS), "problem is of type NoneType: give an InverseProblem"),
            (lambda: exact(curved, READINGS), "is a TransformedPrior: give a GaussianPrior, or take hmc"),
            (lambda: chains(problem, READINGS, basis=PRIOR), "give karhunen_loeve"),
            (lambda: chains(problem, READINGS, basis=sampled), "no standard normal latents"),
            (lambda: chains(problem, READINGS, seed=None), "seed is None"),
            (lambda: chains(problem, READINGS, seed=True), "seed is True"),
            (lambda: chains(problem, READINGS, chains=1), "chains is 1: give an integer of at least 2"),
            (lambda: chains(problem, READINGS, draws=2.0), "draws is 2.0"),
            (lambda: chains(problem, READINGS, progress="no"), "progress is 'no'"),
            (lambda: right.sample(0, seed=0), "n is 0"), (lambda: right.sample(2, seed=1.5), "seed is"),
            (lambda: chains(problem, READINGS).sample(801, seed=0), "the chains hold 800 draws: ask for less")]:
        with pytest.raises(InputError, match=words):
            call()


def test_noise_models_and_numbers_of_numpy_mean_the_same_to_references(problem, chains):
    right, moments = (coefficients(reference(problem, READINGS).mean()) for reference in (exact, chains))
    for noise in (np.float32(0.1), np.array(0.1), [0.1] * 4, GaussianNoise(std=[0.1] * 4),
                  GaussianNoise(covariance=0.01 * np.eye(4))):
        given = replace(problem, noise=noise)
        np.testing.assert_allclose(coefficients(exact(given, READINGS.tolist()).mean()), right, atol=1e-7)
        np.testing.assert_allclose(coefficients(chains(given, READINGS).mean()), moments, atol=1e-6)
    posterior = exact(problem, READINGS)
    np.testing.assert_array_equal(posterior.sample(np.int64(2), seed=np.int64(1)).values,
                                  posterior.sample(2, seed=1).values)
