"""Patch and line averages and random points against analytic values, in serial and in parallel."""

import numpy as np
import pytest
from firedrake import (
    COMM_SELF, ExtrudedMesh, Function, FunctionSpace, MixedFunctionSpace, SpatialCoordinate, Submesh,
    UnitSquareMesh, VectorFunctionSpace, assemble, as_vector, conditional, dx, exp, gt, Or, RelabeledMesh,
)

from fem_diffusion.errors import InputError
from fem_diffusion.observation import instruments, linear as observation
from fem_diffusion.observation.instruments import line_averages, patch_averages, random_points
from fem_diffusion.observation.linear import functionals, point_sensors


def l_shape(n=8):
    """The unit square without its upper right quarter."""
    mesh = UnitSquareMesh(n, n)
    x, y = SpatialCoordinate(mesh)
    marker = Function(FunctionSpace(mesh, "DG", 0)).interpolate(conditional(Or(gt(0.5, x), gt(0.5, y)), 1, 0))
    return Submesh(RelabeledMesh(mesh, [marker], [7]), 2, 7)


@pytest.mark.parallel([1, 2])
def test_instruments_are_the_integrals_on_any_number_of_ranks():
    mesh = UnitSquareMesh(8, 8)
    x, y = SpatialCoordinate(mesh)
    U = FunctionSpace(mesh, "CG", 2)
    u = Function(U).interpolate(1 + x - 3 * y**2 + x * y)
    centres, radii = np.array([[0.3, 0.4], [0.0, 1.0], [0.9, 0.5]]), np.array([0.1, 0.2, 0.15])
    patches = patch_averages(U, centres, radii)
    for reading, (cx, cy), radius in zip(patches(u), centres, radii):
        weight, fine = exp(-((x - cx)**2 + (y - cy)**2) / (2 * radius**2)), dx(degree=16)
        assert reading == pytest.approx(assemble(u * weight * fine) / assemble(weight * fine), abs=2e-3)
    np.testing.assert_allclose(patches(Function(U).assign(2.5)), 2.5, atol=1e-11)
    assert patches.names[1] == "(0, 1)±0.2" and np.array_equal(patches.points, centres)

    lines = line_averages(U, [[0, 0], [1, 0.2]], [[1, 1], [0.1, 0.9]], points=40)
    mean = [1 + 0.5 - 1 + 1 / 3, None]
    s = (np.arange(20000) + 0.5) / 20000
    px, py = 1 - 0.9 * s, 0.2 + 0.7 * s
    mean[1] = (1 + px - 3 * py**2 + px * py).mean()
    np.testing.assert_allclose(lines(u), mean, atol=1e-6)
    assert all(np.array_equal(lines(u), other) for other in mesh.comm.allgather(lines(u)))

    places = random_points(mesh, 50, seed=3)
    np.testing.assert_array_equal(places, random_points(UnitSquareMesh(8, 8), 70, seed=3)[:50])
    expected = np.random.default_rng(3).random((50, 2))  # the square is its own bounding box
    np.testing.assert_allclose(places, expected, atol=1e-15)


def test_components_of_mixed_states():
    mesh = UnitSquareMesh(4, 4)
    x, y = SpatialCoordinate(mesh)
    W = MixedFunctionSpace([VectorFunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)])
    w = Function(W)
    w.sub(0).interpolate(as_vector([x, y]))
    w.sub(1).interpolate(2 - x)
    np.testing.assert_allclose(patch_averages(W, [[0.5, 0.5]], 0.2, component=1)(w), 1.5, atol=1e-12)
    np.testing.assert_allclose(line_averages(W, [[0, 0]], [[1, 0]], component=1)(w), 1.5, atol=1e-12)
    points = random_points(mesh, 3, seed=0)
    np.testing.assert_allclose(point_sensors(W, points, component=0)[1::2](w), points[:, 1], atol=1e-12)


def test_many_patches_cost_no_assembly_each(monkeypatch):
    calls = []
    monkeypatch.setattr(instruments, "assemble", lambda *a, **k: calls.append(1) or assemble(*a, **k))
    U = FunctionSpace(UnitSquareMesh(16, 16), "CG", 1)
    centres = random_points(U.mesh(), 2000, seed=1)
    patches = patch_averages(U, centres, 0.15)
    assert len(calls) <= 11
    # A linear state is read at the centre of a footprint inside; 0.15 is a third of the distance to the boundary.
    inside = np.abs(centres - 0.5).max(axis=1) < 0.05
    u = Function(U).interpolate(SpatialCoordinate(U.mesh())[0])
    assert np.abs(patches(u) - centres[:, 0])[inside].max() < 2e-3


def test_random_points_fill_domains_of_any_shape():
    mesh = l_shape()
    points = random_points(mesh, 3000, seed=1)
    assert not (points > 0.5 + 1e-6).all(axis=1).any() and (points.min() >= 0) and (points.max() <= 1)
    quarter = [((points > 0.5) == np.array(corner)).all(axis=1).mean() for corner in ((0, 0), (0, 1), (1, 0))]
    assert np.abs(np.array(quarter) - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 3000)  # four standard errors
    point_sensors(FunctionSpace(mesh, "CG", 1), points)
    extruded = ExtrudedMesh(UnitSquareMesh(2, 2, quadrilateral=True), 2, layer_height=0.25)
    points = random_points(extruded, 40, seed=2)
    assert points.shape == (40, 3) and points[:, 2].max() <= 0.5


def test_errors_tell_the_remedy():
    mesh = l_shape(4)
    U, V = FunctionSpace(mesh, "CG", 1), VectorFunctionSpace(mesh, "CG", 1)
    for action, words in [
        (lambda: patch_averages(U, [[0.2, 0.2]], 0.0), "radii must be one positive"),
        (lambda: patch_averages(U, [[0.2, 0.2]], [0.1, 0.1]), r"radii has the shape \(2,\): give \(\) or \(1,\)"),
        (lambda: patch_averages(U, [[0.2, 0.2], [0.3, 0.31]], [0.3, 0.02]), "does not resolve patch 1"),
        (lambda: patch_averages(U, [[30.0, 0.2]], 0.1), "does not resolve patch 0"),
        (lambda: patch_averages(V, [[0.2, 0.2]], 0.1), "averages are of scalars"),
        (lambda: patch_averages(U, [[0.2, np.nan]], 0.1), r"centres holds values in rows \[0\] that are not finite"),
        (lambda: patch_averages(U * U, [[0.2, 0.2]], 0.1), "component=0 to 1"),
        (lambda: patch_averages(U, [[0.2, 0.2]], 0.1, component=1), "component is 1"),
        (lambda: line_averages(U, [[0.1, 0.9]], [[0.9, 0.1]], points=0), "points is 0"),
        (lambda: line_averages(U, [[0, 0], [0.1, 0.9]], [[0.1, 0.1], [0.9, 0.8]]), "1 of 2 segments leave .*segment 1"),
        (lambda: line_averages(U, [[0, 0], [0, 0]], [[0.1, 0.1]]), "2 starts and 1 ends"),
        (lambda: line_averages(V, [[0, 0]], [[0.1, 0.1]]), "averages are of scalars"),
        (lambda: random_points(mesh, 0, seed=1), "n is 0"),
        (lambda: random_points(mesh, 2, seed=-1), "seed is -1"),
        (lambda: random_points(Submesh(UnitSquareMesh(2, 2), 1, 1), 2, seed=1), "choose among its nodes"),
    ]:
        with pytest.raises(InputError, match=words):
            action()


def test_rows_are_compared_with_a_direct_evaluation(monkeypatch):
    """An element that Firedrake assembled wrongly would show when the sensors are made."""
    U = FunctionSpace(UnitSquareMesh(4, 4, comm=COMM_SELF), "CG", 1)
    multiply, row = instruments.multiply, observation._row
    monkeypatch.setattr(instruments, "multiply", lambda *x, **y: 1.001 * multiply(*x, **y))
    with pytest.raises(InputError, match="patch 0 reads .* directly"):
        patch_averages(U, [(0.5, 0.5)], 0.3)
    monkeypatch.setattr(observation, "_row", lambda *x: -row(*x))
    with pytest.raises(InputError, match="functional 0 reads .* directly"):
        functionals(U, [lambda u: u * dx])
