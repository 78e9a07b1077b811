"""Correlation lengths that differ between axes, places and components: against formulas and against other meshes."""

import contextlib
import warnings

import numpy as np
import pytest
from firedrake import (
    Constant, DirichletBC, ExtrudedMesh, Function, FunctionSpace, IntervalMesh, RectangleMesh, SpatialCoordinate,
    TensorFunctionSpace, UnitIcosahedralSphereMesh, UnitSquareMesh, VectorFunctionSpace, as_matrix, as_vector,
    conditional, lt, sin,
)

from fem_diffusion import GaussianPrior, karhunen_loeve, point_sensors
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, largest
from fem_diffusion.prior.matern import matern_correlation


def scalar(n=10):
    return FunctionSpace(UnitSquareMesh(n, n), "CG", 1)


@pytest.mark.parametrize("aspect", [10, 1000])
def test_a_stretched_mesh_with_stretched_lengths_has_the_same_covariance(aspect):
    V = FunctionSpace(RectangleMesh(10, 10, aspect, 1.0), "CG", 1)
    same = GaussianPrior(scalar(), 1.0, 0.3).covariance_matrix()
    lengths = 0.3 * aspect, 0.3
    for given in (lengths, as_matrix(np.diag(lengths).tolist())):
        np.testing.assert_allclose(GaussianPrior(V, 1.0, given).covariance_matrix(), same, atol=1e-12)
    # One length cannot do that, and there is a warning where all cells are too long for it.
    with pytest.warns(UserWarning, match="smallest cell") if aspect == 1000 else contextlib.nullcontext():
        one = GaussianPrior(V, 1.0, 0.3)
    assert np.abs(one.covariance_matrix() - same).max() > 0.3
    thin = FunctionSpace(ExtrudedMesh(IntervalMesh(8, float(aspect)), 6, layer_height=1 / 6), "CG", 1)
    square = FunctionSpace(ExtrudedMesh(IntervalMesh(8, 1.0), 6, layer_height=1 / 6), "CG", 1)
    np.testing.assert_allclose(GaussianPrior(thin, 1.0, lengths).covariance_matrix(),
                               GaussianPrior(square, 1.0, 0.3).covariance_matrix(), atol=1e-12)


def test_along_both_axes_of_a_tensor_the_correlation_is_that_of_the_formula():
    V, angle, lengths = FunctionSpace(UnitSquareMesh(40, 40), "CG", 2), 0.5, np.array([0.3, 0.1])
    axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    prior = GaussianPrior(V, 2.0, Constant(axes * lengths @ axes.T))
    places = [np.array([0.5, 0.5])]
    for axis, length in zip(axes.T, lengths):
        places += [places[0] + step * length * axis for step in (-1.0, -0.5, 0.25, 0.5, 1.0)]
    sensors = point_sensors(V, np.array(places))
    rows = sensors.rows.toarray()
    found = rows @ prior.apply_covariance(rows).T
    exact = matern_correlation(np.array([1.0, 0.5, 0.25, 0.5, 1.0] * 2), 1.0, 1.0)
    np.testing.assert_allclose(found.diagonal(), 4.0, rtol=0.02)
    # What is left is the grid, and the boundary.
    np.testing.assert_allclose(found[0, 1:] / 4, exact, atol=0.015)
    # Turned the wrong way it is another law.
    wrong = GaussianPrior(V, 2.0, Constant(axes.T * lengths @ axes))
    other = rows @ wrong.apply_covariance(rows).T
    assert np.abs(other[0, 1:] / 4 - exact).max() > 0.2


@pytest.mark.parallel([1, 2])
def test_where_the_length_varies_the_standard_deviation_is_as_asked_and_the_correlation_local():
    V = FunctionSpace(IntervalMesh(400, 4.0), "CG", 1)
    x, = SpatialCoordinate(V.mesh())
    prior = GaussianPrior(V, 1.5, conditional(lt(x, 2.0), 0.1, 0.4))
    f = Function(V)
    sensors = point_sensors(V, [[1.0], [1.1], [3.0], [3.1], [3.4]])
    rows = sensors.rows.toarray()
    found = V.comm.allreduce(rows @ prior.apply_covariance(rows).T) / 1.5**2
    exact = [matern_correlation(r, length, 1.5) for r, length in ((0.1, 0.1), (0.1, 0.4), (0.4, 0.4))]
    np.testing.assert_allclose(found.diagonal(), 1.0, atol=1e-3)
    np.testing.assert_allclose([found[0, 1], found[2, 3], found[2, 4]], exact, atol=0.01)
    draws = prior.sample_many(2000, seed=0)
    std = f.dat.data_ro.size and draws.std(axis=0)
    assert largest(V.comm, np.asarray(std / 1.5 - 1)) < 5 / np.sqrt(2 * 2000)
    # The modes are those of this covariance, and a constant expression is a number.
    basis = karhunen_loeve(prior, 5)
    assert basis.standard_prior and 0.4 < basis.retained < 1
    same = [GaussianPrior(V, 1.0, given).sample_many(2, seed=1) for given in (0.4, 0.4 + 0.0 * x)]
    np.testing.assert_allclose(*same, atol=1e-8)


@pytest.mark.parametrize("normalise", [True, False])
def test_each_component_of_a_vector_has_its_own_lengths_and_standard_deviation(normalise):
    V = scalar(8)
    W = VectorFunctionSpace(V.mesh(), "CG", 1)
    prior = GaussianPrior(W, as_vector([2.0, 0.5]), {0: 0.3, 1: (0.1, 0.5)}, normalise=normalise)
    C = prior.covariance_matrix()
    for i, (std, length) in enumerate(((2.0, 0.3), (0.5, (0.1, 0.5)))):
        alone = GaussianPrior(V, std, length, normalise=normalise).covariance_matrix()
        np.testing.assert_allclose(C[i::2, i::2], alone, atol=1e-10)
    np.testing.assert_allclose(C[::2, 1::2], 0, atol=1e-12)


def test_conditions_hold_and_the_mean_is_lifted_over_the_lengths():
    V = scalar(16)
    x, y = SpatialCoordinate(V.mesh())
    bc = DirichletBC(V, sin(3 * y), 1)
    prior = GaussianPrior(V, 1.0, (0.6, 0.05), bcs=bc)
    draw = prior.sample(0)
    fixed = draw.copy(deepcopy=True)
    bc.apply(fixed)
    np.testing.assert_array_equal(coefficients(draw), coefficients(fixed))
    # The lift reaches as far as the length across the boundary.
    there = point_sensors(V, [[0.3, 0.5]])
    assert there(prior.mean)[0] > 3 * there(GaussianPrior(V, 1.0, (0.05, 0.6), bcs=bc).mean)[0]


def test_a_length_that_no_cell_resolves_is_told():
    with pytest.warns(UserWarning, match="0.02 and the smallest cell of the mesh 0.0707 wide"):
        GaussianPrior(scalar(), 1.0, 0.02)
    with pytest.warns(UserWarning, match=r"correlation_length\[1\] is 0.02"):   # of one component of a vector
        GaussianPrior(VectorFunctionSpace(UnitSquareMesh(10, 10), "CG", 1), 1.0, {0: 0.3, 1: 0.02})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaussianPrior(scalar(), 1.0, 0.1)


def test_errors_tell_the_remedy():
    V = scalar(4)
    x = SpatialCoordinate(V.mesh())
    W = VectorFunctionSpace(V.mesh(), "CG", 1)
    sphere = FunctionSpace(UnitIcosahedralSphereMesh(1), "CG", 1)
    for V, length, words in [
        (V, (0.1, -0.1), "a positive length for each axis"), (V, (0.1, 0.1, 0.1), "shape"), (V, "long", "a number"),
        (V, x[0] - 0.5, "not positive everywhere"), (V, as_matrix([[1, 2], [2, 1]]), "symmetric and positive definite"),
        (V, as_matrix([[1, 0.5], [0, 1]]), "symmetric and positive definite"), (V, as_vector([1, 1]), "have shape"),
        (V, {0: 0.1}, "for each component of a vector field"), (W, {0: 0.1}, "for each component"),
        (W, {0: 0.1, 1: 0.0}, r"correlation_length\[1\] is 0.0"), (sphere, (1, 1, 1), "dimension 2 in 3 coordinates"),
        (TensorFunctionSpace(W.mesh(), "CG", 1), {0: 0.1}, "for each component of a vector"),
    ]:
        with pytest.raises(InputError, match=words):
            GaussianPrior(V, 1.0, length)
    with pytest.raises(InputError, match="leave normalise out"):
        GaussianPrior(FunctionSpace(W.mesh(), "CG", 1), 1.0, 0.3 + x[0], normalise=False)
