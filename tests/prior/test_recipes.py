"""Velocities without divergence and fields within bounds: what every sample keeps, their laws and derivatives."""

import numpy as np
import pytest
from firedrake import (
    FacetNormal, Function, FunctionSpace, SpatialCoordinate, TestFunction, UnitCubeMesh, UnitSquareMesh,
    VectorFunctionSpace, assemble, div, dot, ds, dS, dx, inner, jump,
)
from scipy.stats import kstest, norm, uniform

from fem_diffusion import (
    GaussianPrior, InverseProblem, Steady, TransformedPrior, bounded, divergence_free, exact, laplace, point_sensors,
)
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, largest

MESH = UnitSquareMesh(8, 8)
SPACES = [lambda: FunctionSpace(MESH, "RT", 1), lambda: FunctionSpace(MESH, "BDM", 1),
          lambda: VectorFunctionSpace(MESH, "DG", 1), lambda: FunctionSpace(UnitCubeMesh(3, 3, 3), "RT", 1),
          lambda: FunctionSpace(UnitSquareMesh(4, 4, quadrilateral=True), "RTCF", 1)]


def differs(prior, seed=1):
    """By how much the transposed derivative of a transform misses differences."""
    at, comm, h = coefficients(prior.core.sample(seed)), prior.V.comm, 1e-5
    rng = np.random.default_rng(comm.rank)
    rows, step = rng.standard_normal((2, len(coefficients(Function(prior.V))))), rng.standard_normal(len(at))
    ahead, behind = (prior.transform_many((at + sign * h * step)[None])[0] for sign in (1, -1))
    change = comm.allreduce(rows @ (ahead - behind)) / (2 * h)
    return np.abs(comm.allreduce(prior.pull_back(rows, at) @ step) - change).max() / np.abs(change).max()


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("space", SPACES)
def test_no_sample_has_divergence_or_flows_through_closed_boundaries(space):
    V = space()
    prior = divergence_free(V, 0.7, 0.4, closed=(1, 2))
    u, n = prior.sample(1), FacetNormal(V.mesh())
    size = assemble(inner(u, u) * dx)**0.5
    assert assemble(div(u)**2 * dx)**0.5 < 1e-12 * size and assemble(jump(u, n)**2 * dS)**0.5 < 1e-12 * size
    assert assemble(abs(dot(u, n)) * ds((1, 2))) < 1e-12 * size < assemble(abs(dot(u, n)) * ds((3, 4)))
    assert differs(prior) < 1e-7


def test_velocities_have_the_standard_deviation_that_was_asked_for():
    for mesh, space in ((UnitSquareMesh(24, 24), "DG"), (UnitCubeMesh(8, 8, 8), "DG")):
        V, d = VectorFunctionSpace(mesh, space, 1), mesh.geometric_dimension
        prior = divergence_free(V, 0.7, 0.35)
        sensors = point_sensors(V, [[0.5] * d, [0.4] * d])
        std = (prior.sample_many(1000, seed=0) @ sensors.rows.T).std(axis=0)
        # Chance, and what a smooth field loses to the boundary and to the grid.
        np.testing.assert_allclose(std, 0.7, rtol=4 / np.sqrt(2000) + 0.08)


def test_velocities_are_inferred_from_velocities():
    """Linear, so the posterior by the transform is the Gaussian one of the stream function."""
    V = VectorFunctionSpace(MESH, "DG", 0)
    prior = divergence_free(V, 1.0, 0.5, closed="on_boundary")
    u, m, v = Function(V), Function(V), TestFunction(V)
    sensors = point_sensors(V, [[0.3, 0.4], [0.7, 0.6]])
    problem = InverseProblem(prior, Steady(inner(u - m, v) * dx, u, m), sensors, 0.1)
    y = problem.measurements(prior.sample_many(1, seed=5), seed=6)[0]
    # The same with the stream function as parameter.
    W = prior.core.V
    s, w = Function(W), Function(V)
    rotation = Steady(inner(w, v) * dx - (s.dx(1) * v[0] - s.dx(0) * v[1]) * dx, w, s)
    known = exact(InverseProblem(prior.core, rotation, sensors, 0.1), y)
    found = laplace(problem, y).sample(2000, seed=1)
    mean = prior.transform_many(coefficients(known.mean())[None])[0]
    draws = prior.transform_many(known.sample(2000, seed=2).values)
    std = draws.std(axis=0)
    moved = std.max()
    np.testing.assert_allclose(found.values.mean(axis=0), mean, atol=5 * moved / np.sqrt(2000) + 0.02 * moved)
    np.testing.assert_allclose(found.values.std(axis=0), std, atol=0.1 * moved)
    for sample in (found[0], found[1]):
        assert assemble(jump(sample, FacetNormal(MESH))**2 * dS) < 1e-20


@pytest.mark.parallel([1, 2])
def test_bounded_fields_are_uniform_at_every_point_and_never_leave():
    V = FunctionSpace(MESH, "CG", 1)
    x, _ = SpatialCoordinate(MESH)
    prior = TransformedPrior(GaussianPrior(V, 1.0, 0.4), bounded(2.0, 3.0 + x))
    draws = prior.sample_many(400, seed=0)
    upper = coefficients(Function(V).interpolate(3.0 + x))
    assert (draws > 2).all() and (draws < upper).all()
    share = (draws - 2) / (upper - 2)
    unlikely = [-np.log(kstest(column, uniform.cdf).pvalue) for column in share.T]
    assert largest(V.comm, np.array(unlikely)) < -np.log(1e-5)
    f = prior.core.sample_many(2, seed=0)
    np.testing.assert_allclose(share[:2], norm.cdf(f), rtol=1e-9)
    assert differs(prior) < 1e-7
    far = prior.transform_many(np.full((2, f.shape[1]), 40.0) * np.array([[1], [-1]]))
    assert (far >= 2).all() and (far <= upper + 1e-14).all()


def test_errors_tell_the_remedy():
    RT, CG = FunctionSpace(MESH, "RT", 1), VectorFunctionSpace(MESH, "CG", 1)
    for action, words in [
        (lambda: bounded(1.0, 1.0), "above 1"), (lambda: bounded("a", 1.0), "lower is 'a'"),
        (lambda: divergence_free(CG, 1.0, 0.3), "holds no rotations exactly: take RT"),
        (lambda: divergence_free(FunctionSpace(MESH, "N1curl", 1), 1.0, 0.3), "holds no rotations exactly"),
        (lambda: divergence_free(FunctionSpace(MESH, "CG", 1), 1.0, 0.3), "a space of velocities"),
        (lambda: divergence_free(RT, 1.0, 0.3, smoothness=1.0), "no variance: take 3 or more"),
        (lambda: divergence_free(RT, -1.0, 0.3), "std is -1.0"),
        (lambda: divergence_free(RT, 1.0, 0.3, closed=9), "no part of the mesh's boundary"),
    ]:
        with pytest.raises(InputError, match=words):
            action()
