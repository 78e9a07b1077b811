"""Maps, bands along lines and slices show a field where it is, in any kind of mesh."""

import numpy as np
import pytest
from firedrake import (
    BoxMesh, CircleManifoldMesh, ExtrudedMesh, FunctionSpace, IntervalMesh, PeriodicUnitIntervalMesh,
    PeriodicUnitSquareMesh, RectangleMesh, SpatialCoordinate, Submesh, UnitCubeMesh, UnitIcosahedralSphereMesh,
    UnitSquareMesh, VectorFunctionSpace, assemble, interpolate,
)

from fem_diffusion import InputError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.monitor.area import area_of


def _seen(W, area, field):
    """What an area reads of a field of the coordinates."""
    return area.rows @ coefficients(assemble(interpolate(field(SpatialCoordinate(W.mesh())), W)))


def _sizes(area):
    """Area of each triangle of a map."""
    ends = area.corners[area.cells]
    return np.abs(np.linalg.det(ends[:, 1:] - ends[:, :1])) / 2


@pytest.mark.parametrize("make", [
    lambda: FunctionSpace(UnitSquareMesh(3, 3), "CG", 2), lambda: FunctionSpace(UnitSquareMesh(3, 3), "DG", 1),
    lambda: FunctionSpace(PeriodicUnitSquareMesh(3, 3), "DG", 1),
    lambda: FunctionSpace(UnitSquareMesh(3, 3, quadrilateral=True), "CG", 2),
    lambda: FunctionSpace(ExtrudedMesh(IntervalMesh(3, 1.0), 3), "CG", 1)])
def test_maps_cover_the_plane(make):
    W = make()
    area = area_of(W, 0, "u", "K", "m")
    assert _sizes(area).sum() == pytest.approx(1) and area.axes == ("x", "y") and not area.where
    np.testing.assert_allclose(_seen(W, area, lambda x: x[0] + 2 * x[1]), area.corners @ [1, 2], atol=1e-12)


def test_lines_run_from_one_end_to_the_other():
    for mesh, length in ((IntervalMesh(7, 2.0), 2.0), (PeriodicUnitIntervalMesh(5), 1.0)):
        W = FunctionSpace(mesh, "CG" if length == 2 else "DG", 1)
        area = area_of(W, 0, "u", "", "m")
        ends = area.corners[area.cells][:, :, 0]
        assert area.axes == ("x",) and ends[0, 0] == 0 and ends[-1, 1] == length
        np.testing.assert_allclose(ends[1:, 0], ends[:-1, 1])
        assert (np.diff(ends, axis=1) > 0).all()
        np.testing.assert_allclose(_seen(W, area, lambda x: x[0]**1), area.corners[:, 0], atol=1e-12)


def test_straight_boundaries_keep_their_coordinate():
    wall = Submesh(RectangleMesh(8, 2, 4.0, 1.0), 1, 3)
    W = FunctionSpace(wall, "CG", 1)
    area = area_of(W, 0, "flux", "", "m")
    assert area.axes == ("x",) and (area.corners.min(), area.corners.max()) == (0, 4)
    np.testing.assert_allclose(_seen(W, area, lambda x: x[0]), area.corners[:, 0], atol=1e-12)


def test_curves_are_shown_by_their_length():
    W = FunctionSpace(CircleManifoldMesh(60), "CG", 1)
    area = area_of(W, 0, "u", "", "m")
    side = 2 * np.sin(np.pi / 60)
    assert area.axes == ("along the line",) and area.corners.max() == pytest.approx(60 * side)
    # On a circle the value cos t comes at the length t, from where the line begins and either way round.
    x = _seen(W, area, lambda x: x[0])
    angle = area.corners[:, 0] * np.pi / 30 / side
    first = np.arccos(np.clip(x[0], -1, 1))
    assert min(np.abs(x - np.cos(angle + turn * first)).max() for turn in (-1, 1)) < 1e-9


@pytest.mark.parametrize("make, plane, size", [
    (lambda: BoxMesh(2, 3, 2, 2.0, 3.0, 1.0), None, 6), (lambda: BoxMesh(2, 3, 2, 2.0, 3.0, 1.0), ("z", 0.3), 6),
    (lambda: BoxMesh(2, 3, 2, 2.0, 3.0, 1.0), ("x", 0.7), 3), (lambda: BoxMesh(2, 3, 2, 2.0, 3.0, 1.0), ("z", 0), 6),
    (lambda: BoxMesh(2, 3, 2, 2.0, 3.0, 1.0), ("z", 1.0), 6), (lambda: UnitCubeMesh(2, 2, 2, hexahedral=True), None, 1),
    (lambda: ExtrudedMesh(UnitSquareMesh(2, 2), 4, 0.25), ("z", 0.6), 1),
    (lambda: ExtrudedMesh(UnitSquareMesh(2, 2, quadrilateral=True), 4, 0.25), ("y", 0.6), 1)])
def test_slices_cut_cells_of_all_kinds(make, plane, size):
    W = FunctionSpace(make(), "CG", 1)
    area = area_of(W, 0, "u", "", "m", plane)
    axis, at = plane or ("z", 0.5)
    others = [i for i in range(3) if "xyz"[i] != axis]
    assert _sizes(area).sum() == pytest.approx(size) and area.axes == tuple("xyz"[i] for i in others)
    assert area.where == f"at {axis} = {at:g}\u00a0m"
    weights = np.array([1.0, 2.0, -3.0])
    shown = _seen(W, area, lambda x: sum(w * x[i] for i, w in enumerate(weights)))
    np.testing.assert_allclose(shown, area.corners @ weights[others] + weights["xyz".index(axis)] * at, atol=1e-12)


def test_what_has_no_picture():
    assert area_of(FunctionSpace(UnitIcosahedralSphereMesh(1), "CG", 1), 0, "u", "", "") is None
    assert area_of(VectorFunctionSpace(UnitSquareMesh(3, 3), "CG", 1), 0, "u", "", "") is None
    W = FunctionSpace(BoxMesh(2, 3, 2, 2.0, 3.0, 1.0), "CG", 1)
    for plane, words in ((("z", 2.0), "does not meet"), (("w", 0.5), "axis and a place"), (0.5, "axis and a place"),
                         (("z", "a"), "plane")):
        with pytest.raises(InputError, match=words):
            area_of(W, 0, "u", "", "", plane)
    with pytest.raises(InputError, match="component is 1"):
        area_of(W, 1, "u", "", "")
