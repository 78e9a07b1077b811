"""Bad arguments of priors, observations and instruments get an error of ours with a remedy; NumPy's are good."""

from fractions import Fraction

import numpy as np
import pytest
from firedrake import (Cofunction, Constant, DirichletBC, Function, FunctionSpace, MixedFunctionSpace,
                       SpatialCoordinate, TestFunction, UnitSquareMesh, VectorFunctionSpace, ds, dx, exp, grad,
                       interpolate)

from fem_diffusion.errors import InputError
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary, Physics
from fem_diffusion.observation.instruments import line_averages, patch_averages, random_points
from fem_diffusion.observation.linear import functionals, no_sensors, point_sensors
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.matern import matern_correlation
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior, level_set
from fem_diffusion.prior.product import ProductPrior

MESH, OTHER = UnitSquareMesh(3, 3), UnitSquareMesh(3, 3)
V, VECTOR, NUMBER = FunctionSpace(MESH, "CG", 1), VectorFunctionSpace(MESH, "CG", 1), FunctionSpace(MESH, "R", 0)
MIXED = MixedFunctionSpace([V, VECTOR])
ELSEWHERE = Function(FunctionSpace(OTHER, "CG", 1)).assign(1.0)
NAN = Function(V).assign(np.nan)
SIZE = V.dim()
PLACE = [(0.5, 0.5)]


def gauss(V=V, std=1.0, correlation_length=0.5, **given):
    return GaussianPrior(V, std, correlation_length, **given)


PRIOR = gauss()
LEVELS = TransformedPrior(PRIOR, exp)
PRODUCT = ProductPrior([LEVELS, GaussianPrior(NUMBER, 2.0)])
SENSORS = point_sensors(V, [(0.2, 0.2), (0.5, 0.5)])


@pytest.mark.parametrize("V", [None, MESH, V.dual(), Function(V), "CG", 3])
def test_what_is_no_space_is_refused(V):
    for call in (lambda: gauss(V), lambda: CallablePrior(V, PRIOR.sample), lambda: point_sensors(V, PLACE),
                 lambda: functionals(V, [lambda u: u * dx]), lambda: no_sensors(V),
                 lambda: patch_averages(V, PLACE, 0.5), lambda: line_averages(V, PLACE, [(0.2, 0.2)])):
        with pytest.raises(InputError, match="must be a FunctionSpace, got"):
            call()
    if V is not None:
        with pytest.raises(InputError, match="V must be a FunctionSpace, got"):
            TransformedPrior(PRIOR, exp, V)


# --- priors

@pytest.mark.parametrize("name", ["std", "mean"])
@pytest.mark.parametrize("value, words", [
    (True, "is True: give a number"), (np.True_, "holds bool values"), ("1", "holds <U1 values"),
    (np.complex128(1), "is .*1.*: give a number"), ([1j], "real and imaginary"), (np.nan, "is nan"),
    (1e200, "is 1e.200"),
    (10**400, "is inf"), (None, "holds object values"), (ELSEWHERE, "lives on another mesh: interpolate"),
    (SpatialCoordinate(OTHER)[0], "lives on another mesh"), (NAN, "not finite everywhere"),
    (Constant(np.nan), "not finite everywhere"), (TestFunction(V), "test or trial functions"),
    (grad(Function(V)), r"must have shape \(\), got \(2,\)"),
    (Cofunction(V.dual()), "assemble or interpolate it first"),
    (interpolate(Function(V), V), "assemble or interpolate it first"), (V, "is no array of numbers"),
])
def test_bad_means_and_deviations(name, value, words):
    for more in ({}, {"V": NUMBER, "correlation_length": None}):
        with pytest.raises(InputError, match=f"{name} .*{words}"):
            gauss(**{name: value} | more)


@pytest.mark.parametrize("given, words", [
    (dict(correlation_length=True), "correlation_length is True"), (dict(correlation_length=1e200), "at most 1e.100"),
    (dict(smoothness=True), "smoothness is True"), (dict(smoothness=1e200), "smoothness is 1e.200.*at most 100"),
    (dict(smoothness=np.array([1.0, 3.0])), "smoothness is array"), (dict(normalise="no"), "normalise is 'no'"),
    (dict(bcs=0), "bcs is 0: give a sequence of DirichletBC"), (dict(bcs=""), "bcs is ''"),
    (dict(bcs=np.array([None])), "bcs holds NoneType"), (dict(bcs=Constant(1.0)), "bcs is"),
    (dict(bcs=DirichletBC(V, np.nan, 1)), "values of bcs is not finite"),
    (dict(bcs=DirichletBC(V, 0, 99)), r"condition on \(99,\), no part .*name its markers"),
    (dict(bcs=DirichletBC(V, 0, "top")), r"condition on \('top',\)"),
    (dict(solver_parameters=None), "'direct', 'iterative' or a dict"),
    (dict(solver_parameters="lu"), "'direct', 'iterative' or a dict.*got 'lu'"),
    (dict(solver_parameters={"ksp_type": "cgg"}), "PETSc refuses.*cgg"),
    (dict(solver_parameters={"-ksp_type": "cg"}), "without a dash"), (dict(solver_parameters={1: 2}), "has the key 1"),
])
def test_bad_arguments_of_gaussian_priors(given, words):
    with pytest.raises(InputError, match=words):
        gauss(**given)


def test_words_and_numbers_of_numpy_are_good_for_priors():
    right = PRIOR.sample_many(2, 1)
    for given in (dict(std=np.float64(1)), dict(std=np.int64(1)), dict(std=np.array(1)), dict(std=Fraction(1)),
                  dict(correlation_length=np.float32(0.5)), dict(smoothness=np.int64(1)), dict(normalise=np.True_),
                  dict(bcs=None), dict(bcs=[]), dict(solver_parameters="direct"), dict(mean=Constant(0.0))):
        np.testing.assert_array_equal(gauss(**given).sample_many(np.int64(2), np.int64(1)), right)
    np.testing.assert_allclose(gauss(solver_parameters="iterative").sample_many(2, 1), right, atol=1e-8)
    np.testing.assert_array_equal(PRIOR.pointwise_std(np.True_).dat.data_ro, PRIOR.pointwise_std(True).dat.data_ro)


def rows(width, bad):
    values = np.zeros((2, width), dtype=np.asarray(bad).dtype)
    values[1, 0] = bad
    return values


@pytest.mark.parametrize("name, call, width", [
    ("x", PRIOR.apply_covariance, SIZE), ("values", LEVELS.transform_many, SIZE),
    ("coefficients", PRODUCT.core.apply_covariance, SIZE + 1), ("coefficients", PRODUCT.transform_many, SIZE + 1),
    ("values", SENSORS.apply, SIZE)])
def test_bad_coefficients(name, call, width):
    for bad, words in [(np.nan, r"holds values in rows \[1\] that are not finite"), (1j, "holds complex128 values"),
                       ("1", "holds <U1 values"), (True, "holds bool values"), (None, "holds object values")]:
        with pytest.raises(InputError, match=f"{name} {words}"):
            call(rows(width, bad))
    for bad in (None, "no", np.zeros(width), np.zeros((1, width + 1)), Function(V), [[0.0], [0.0, 1.0]]):
        with pytest.raises(InputError, match=rf"{name} (holds|has|is no).*"):
            call(bad)
    good = call(np.zeros((2, width)))
    for same in (np.zeros((2, width), "f"), np.zeros((2, width), int), np.zeros((2, width)).tolist()):
        np.testing.assert_array_equal(call(same), good)


@pytest.mark.parametrize("call, words", [
    (lambda: PRIOR.pointwise_std("no"), "exact is 'no'"), (lambda: PRODUCT.core.pointwise_std(1), "exact is 1"),
    (lambda: PRIOR.sample_many(10**400, 0), "n is 1000"),
    (lambda: level_set([0, 1], [np.nan]), "thresholds holds values that are not finite"),
    (lambda: level_set([0, np.inf], [0]), "values holds values that are not finite"),
    (lambda: level_set(None, [0]), "values holds object values"),
    (lambda: level_set(["0", "1"], [0]), "values holds <U1"),
    (lambda: level_set([0, 1], [True]), "thresholds holds bool"), (lambda: level_set([0, 1], 0.0), r"give \(n,\)"),
    (lambda: level_set([0, 1], [0])(None), "a scalar field"),
    (lambda: TransformedPrior(None, exp), "prior is NoneType"),
    (lambda: level_set([0, 1], [0])(Function(VECTOR)), "a scalar field"),
    (lambda: TransformedPrior(GaussianPrior, exp), "prior is a class"),
    (lambda: TransformedPrior(V, exp), "prior is WithG"),
    (lambda: TransformedPrior(PRIOR, None), "transform is None"),
    (lambda: TransformedPrior(PRIOR, int), "transform is"),
    (lambda: TransformedPrior(PRIOR, Function(V)), "transform is"),
    (lambda: TransformedPrior(PRIOR, lambda: 1), "transform does not take 1 arguments"),
    (lambda: TransformedPrior(PRIOR, lambda f: ELSEWHERE), "transform gave lives on another mesh"),
    (lambda: TransformedPrior(PRIOR, lambda f: f * TestFunction(V)), "test or trial functions"),
    (lambda: TransformedPrior(PRIOR, lambda f: NAN * f), "not finite everywhere"),
    (lambda: TransformedPrior(PRIOR, np.exp), "write it in UFL, with exp and sqrt from firedrake"),
    (lambda: CallablePrior(V, int), "sample is"), (lambda: CallablePrior(V, lambda: 1), "does not take 1 arguments"),
    (lambda: CallablePrior(V, Function(V)), "sample is"),
    (lambda: ProductPrior(None), "priors is None: give a sequence"),
    (lambda: ProductPrior(PRIOR), "priors is"), (lambda: ProductPrior([PRIOR, None]), "prior 1 is NoneType"),
    (lambda: ProductPrior({PRIOR, LEVELS}), "priors is .*give a sequence"),
    (lambda: ProductPrior([GaussianPrior, PRIOR]), "prior 0 is a class"),
    (lambda: ProductPrior(Constant(1.0)), "priors is"),
    (lambda: matern_correlation(None, 1, 1), "r holds object"),
    (lambda: matern_correlation(-1, 1, 1), "give distances"),
    (lambda: matern_correlation(1, 0, 1), "correlation_length is 0"),
    (lambda: matern_correlation(1, 1, np.nan), "smoothness is nan"),
    (lambda: AdvectionDiffusion(V, V, "source", Physics(velocity=lambda m: grad(m)), Boundary(dirichlet={1: 0})),
     "velocity is a callable, which only an unknown may be"),
])
def test_other_bad_arguments_of_priors_and_problems(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_a_prior_of_a_sampler_gives_functions_of_its_own():
    kept = Function(V).assign(1.0)
    prior = CallablePrior(V, lambda seed: kept)
    prior.sample(0).assign(9.0)
    assert (kept.dat.data_ro == 1).all() and prior.sample(0) is not prior.sample(0)


def test_products_know_their_exact_deviation():
    fixed = gauss(std=0.5, bcs=DirichletBC(V, 0, 1))
    both = ProductPrior([fixed, GaussianPrior(NUMBER, 2.0)]).pointwise_std(exact=True)
    variances = np.diag(fixed.covariance_matrix())
    np.testing.assert_allclose(both.sub(0).dat.data_ro**2, variances, rtol=1e-8, atol=1e-14)
    assert float(both.sub(1).dat.data_ro[0]) == 2.0


# --- observations and instruments

@pytest.mark.parametrize("points, words", [
    (np.array([[0.2 + 1j, 0.2]]), "holds complex128 values"), ([["0.2", "0.2"]], "holds <U3 values"),
    ([[True, False]], "holds bool values"), (None, "holds object values"), ([[0.2, np.nan]], r"in rows \[0\]"),
    ([[0.2], [0.2, 0.3]], "is no array of numbers"), (Constant(1.0), "holds object values"), (V, "is no array"),
    (np.zeros((0, 2)), "at least one"),
])
def test_bad_places(points, words):
    for name, call in [("points", lambda: point_sensors(V, points)),
                       ("centres", lambda: patch_averages(V, points, 0.5)),
                       ("starts", lambda: line_averages(V, points, PLACE)),
                       ("ends", lambda: line_averages(V, PLACE, points))]:
        with pytest.raises(InputError, match=f"{name} .*{words}"):
            call()


INSTRUMENTS = [lambda U, **given: point_sensors(U, PLACE, **given),
               lambda U, **given: patch_averages(U, PLACE, 0.5, **given),
               lambda U, **given: line_averages(U, PLACE, [(0.2, 0.5)], **given)]


@pytest.mark.parametrize("sensors", [*INSTRUMENTS, lambda U, **given: functionals(U, [lambda u: u * dx], **given)])
def test_bad_names(sensors):
    for names, words in [(3, "names is 3: give a sequence of strings"), ("a", "names is 'a'"), ({"a"}, "names is"),
                         ([3], "names holds int"), ([None], "names holds NoneType"), (b"a", "names is"),
                         ({"a": 1}, "names is"), (["a", "b"], "2 names for 1 sensors"), (Constant(1.0), "names is")]:
        with pytest.raises(InputError, match=words):
            sensors(V, names=names)
    for names in (("a",), np.array(["a"]), [np.str_("a")], iter("a")):
        assert sensors(V, names=names).names == ("a",)


@pytest.mark.parametrize("sensors", INSTRUMENTS)
def test_bad_components(sensors):
    for component in (True, np.True_, 2, -1, 0.0, "0", [0]):
        with pytest.raises(InputError, match="component is .*the state space has components 0 to 1"):
            sensors(MIXED, component=component)
    assert (sensors(MIXED, component=np.int64(0)).rows != sensors(MIXED, component=0).rows).nnz == 0


@pytest.mark.parametrize("tolerance", [-1.0, 0, np.nan, np.inf, "1", None, True])
def test_bad_tolerances(tolerance):
    for call in (INSTRUMENTS[0], INSTRUMENTS[2], lambda U, tolerance: random_points(MESH, 2, 0, tolerance=tolerance)):
        with pytest.raises(InputError, match="tolerance is .*give a number that is above 0"):
            call(V, tolerance=tolerance)


@pytest.mark.parametrize("call, words", [
    (lambda: patch_averages(V, PLACE, True), "radii holds bool"),
    (lambda: patch_averages(V, PLACE, "1"), "radii holds <U1"),
    (lambda: patch_averages(V, PLACE, None), "radii holds object"),
    (lambda: patch_averages(V, PLACE, [1j]), "imaginary"),
    (lambda: patch_averages(V, PLACE, np.nan), "radii holds values that are not finite"),
    (lambda: patch_averages(V, PLACE, -1), "one positive number"), (lambda: random_points(None, 2, 0), "give a mesh"),
    (lambda: random_points(V, 2, 0), "give a mesh"), (lambda: functionals(V, None), "forms is None: give a sequence"),
    (lambda: functionals(V, lambda u: u * dx), "forms is"),
    (lambda: functionals(V, {"a": lambda u: u * dx}), "forms is"),
    (lambda: functionals(V, [None]), "functional 0 is None"),
    (lambda: functionals(V, [Function(V) * dx]), "functional 0"),
    (lambda: functionals(V, [lambda: 1]), "functional 0 does not take 1 arguments"),
    (lambda: functionals(V, [lambda u: u[1] * dx]), "functional 0 cannot be assembled"),
    (lambda: functionals(V, [lambda u: u * ds(99)]), "functional 0 cannot be assembled .*99"),
    (lambda: functionals(V, [lambda u: u * dx(OTHER)]), "functional 0 cannot be assembled"),
    (lambda: SENSORS[0.5:], "no such row"), (lambda: SENSORS[None], "no such row"),
    (lambda: SENSORS["a":], "no such row"),
    (lambda: SENSORS[::0], "no such row"), (lambda: SENSORS[Constant(1.0)], "no such row"),
])
def test_other_bad_arguments_of_observations(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_a_state_that_is_not_finite_reads_as_such():
    """Those who solve tell a failed solve, which may be skipped, from a mistake by it."""
    assert np.isnan(SENSORS(NAN)).all()
