"""Maps, slices, lines and boundaries show the values of the field there; sensors stand where they are."""

import matplotlib
import numpy as np
import pytest
from firedrake import (
    Function, FunctionSpace, SpatialCoordinate, UnitCubeMesh, UnitIntervalMesh, UnitSquareMesh,
    VectorFunctionSpace, as_vector, dx,
)
from matplotlib import pyplot as plt

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.observation.linear import functionals, point_sensors
from fem_diffusion.plot import plot_samples
from fem_diffusion.plot.places import boundary_curve
from fem_diffusion.samples import Samples

matplotlib.use("Agg")
SQUARE = UnitSquareMesh(4, 4)
V = FunctionSpace(SQUARE, "CG", 1)
CUBE = FunctionSpace(UnitCubeMesh(2, 2, 3), "CG", 1)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def _samples(V, expression, factors=np.arange(1.0, 21.0)):
    """A field times one factor for each sample."""
    values = coefficients(Function(V).interpolate(expression(SpatialCoordinate(V.mesh()))))
    return Samples(V, np.outer(factors, values), np.zeros((len(factors), 1)))


def _shown(ax):
    """Numbers behind the colours of a map, without those outside."""
    return np.ma.compressed(np.ma.masked_invalid((ax.images or ax.collections)[0].get_array()))


def test_quantiles_and_probabilities_have_maps_with_units():
    samples = _samples(V, lambda x: 1 + 0 * x[0])
    axes = samples.plot(quantile=[0.05, 0.95], threshold=16.5, units="K", mesh_units="m", ylabel="heat")
    assert [ax.get_title().replace("\n", " ") for ax in axes] == [
        "posterior mean", "standard deviation", "one sample", "5 % quantile", "95 % quantile",
        "probability of more than 16.5 K"]
    for ax, q in zip(axes[3:], (0.05, 0.95)):
        np.testing.assert_allclose(_shown(ax), np.quantile(np.arange(1, 21), q))
    np.testing.assert_allclose(_shown(axes[5]), 4 / 20)
    assert axes[0].get_xlabel() == "x [m]"
    assert {ax.get_ylabel() for ax in axes} == {"y [m]"}
    assert [ax.child_axes[0].get_ylabel() for ax in axes] == ["heat [K]"] * 5 + ["probability"]


def test_sensors_are_drawn_where_they_are_with_the_names_of_users():
    names = ["gate $", "<script>", "a name that is much too long"]
    named = point_sensors(V, [(0.1, 0.2), (0.5, 0.5), (0.9, 0.7)], names=names)
    samples = _samples(V, lambda x: x[0])
    for sensors, words in ((named, ["gate $", "<script>", "a name that is …"]),
                           (point_sensors(V, named.points), ["0", "1", "2"]), (named.points, ["0", "1", "2"])):
        ax = samples.plot(sensors=sensors)[0]
        np.testing.assert_allclose(ax.lines[0].get_xydata(), named.points)
        assert [text.get_text() for text in ax.texts] == words
        ax.figure.canvas.draw()     # names are no formulas
    vector = point_sensors(VectorFunctionSpace(SQUARE, "CG", 1), named.points)
    assert [text.get_text() for text in samples.plot(sensors=vector)[0].texts] == ["0", "2", "4"]
    line = samples.plot(line=((0, 0.5), (1, 0.5)), sensors=named)
    feet = {line.get_label(): line.get_xdata() for line in line.lines}
    np.testing.assert_allclose(feet["1 sensor"], [0.5])
    np.testing.assert_allclose(feet["2 sensors away from here"], [0.1, 0.9])


def test_a_slice_shows_the_plane_and_sensors_off_it_are_hollow():
    samples = _samples(CUBE, lambda x: x[0] + 10 * x[1] + 100 * x[2])
    axes = samples.plot(slice=("x", 0.25), sensors=[(0.25, 0.5, 0.5), (0.9, 0.5, 0.2)], threshold=1e9)
    image = axes[2].images[0].get_array()
    y, z = np.meshgrid(*[(np.arange(150) + 0.5) / 150] * 2)
    np.testing.assert_allclose(image, 0.25 + 10 * y + 100 * z, rtol=1e-9)
    assert axes[2].get_title() == "one sample\nat x = 0.25"
    assert (axes[2].get_xlabel(), axes[2].get_ylabel()) == ("y", "z")
    assert [line.get_markerfacecolor() for line in axes[0].lines] == ["white", "none"]
    assert _shown(axes[3]).max() == 0
    assert "at z = 0.5" in samples.plot()[0].get_title()


def test_lines_and_boundaries_show_the_values_there():
    samples = _samples(V, lambda x: x[0] + 2 * x[1])
    ax = samples.plot(line=((0, 0.5), (1, 0.5)), curves=0)
    mean = next(line for line in ax.lines if line.get_label() == "posterior mean")
    np.testing.assert_allclose(mean.get_ydata(), 10.5 * (mean.get_xdata() + 1))
    assert ax.get_xlabel() == "x"
    outside = samples.plot(line=((0.5, 0.5), (0.5, 2.0)), curves=0)
    mean = next(line for line in outside.lines if line.get_label() == "posterior mean").get_ydata()
    assert np.isfinite(mean[:60]).all() and np.isnan(mean[70:]).all()
    top = samples.plot(boundary=4, curves=0, threshold=20.0, mesh_units="m")
    mean = next(line for line in top[0].lines if line.get_label() == "posterior mean")
    np.testing.assert_allclose(mean.get_ydata(), 10.5 * (np.linspace(0, 1, 5) + 2))
    share = top[1].lines[0].get_ydata()
    np.testing.assert_allclose(share, [(np.arange(1, 21) * (x + 2) > 20).mean() for x in np.linspace(0, 1, 5)])
    assert top[1].get_xlabel() == "distance along the boundary 4 [m]"


def test_a_closed_boundary_is_walked_around_once():
    curve = boundary_curve(FunctionSpace(UnitSquareMesh(7, 5), "CG", 2), "on_boundary")
    steps = np.linalg.norm(np.diff(curve.places, axis=0), axis=1)
    assert len(curve.x) == 48 and steps.max() <= 0.1 + 1e-12
    np.testing.assert_allclose(curve.x[-1], 4, atol=0.11)


@pytest.mark.parametrize("space", [lambda: VectorFunctionSpace(SQUARE, "CG", 1),
                                   lambda: FunctionSpace(SQUARE, "RT", 1)])
def test_vectors_have_their_magnitude_and_arrows(space):
    W = space()
    samples = _samples(W, lambda x: as_vector([3 + 0 * x[0], 4 + 0 * x[0]]))
    axes = samples.plot(threshold=51.0, quantile=0.5)
    np.testing.assert_allclose(_shown(axes[0]), 5 * 10.5)
    np.testing.assert_allclose(_shown(axes[1]), 5 * np.arange(1, 21).std(ddof=1))
    np.testing.assert_allclose(_shown(axes[3]), 5 * 10.5)
    np.testing.assert_allclose(_shown(axes[4]), 10 / 20)
    arrows = axes[0].collections[-1]
    np.testing.assert_allclose((arrows.U, arrows.V), np.array([[31.5], [42]]) * np.ones(256))


def test_numbers_and_bands_show_a_threshold():
    numbers = Samples(FunctionSpace(SQUARE, "R", 0), np.arange(20.0)[:, None], np.zeros((20, 1)))
    ax = numbers.plot(threshold=14.5, quantile=0.9, units="1/s", xlabel="rate")
    labels = {text.get_text() for text in ax.get_legend().get_texts()}
    assert {"14.5 1/s: passed with probability 0.25", "90 % quantile"} <= labels and ax.get_xlabel() == "rate [1/s]"
    band = _samples(FunctionSpace(UnitIntervalMesh(4), "CG", 1), lambda x: 1 + 0 * x[0])
    axes = band.plot(threshold=14.5, quantile=0.9)
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), 6 / 20)
    given = plt.subplots(2)[1]
    assert band.plot(threshold=1.0, axes=given)[1] is given[1]


@pytest.mark.parametrize("space, given, words", [
    (V, dict(slice=("z", 0.5)), "no use for slice"), (CUBE, dict(slice="z"), "slice is 'z'"),
    (CUBE, dict(slice=("z", 2.0)), "between 0 and 1"), (CUBE, dict(boundary=1), "meshes in a plane"),
    (V, dict(boundary=9), "boundary"), (V, dict(line=((0, 0), (0, 0))), "one point"), (V, dict(line=3), "line"),
    (V, dict(line=((5, 5), (6, 6))), "misses the mesh"), (V, dict(line=((0, 0), (1, 1)), boundary=1), "both line"),
    (V, dict(quantile=2.0), "quantile is 2"), (V, dict(threshold="x"), "threshold is 'x'"),
    (V, dict(units=3), "units is of type int"), (V, dict(sensors=[(1, 2, 3)]), "sensors has the shape"),
    (V, dict(sensors=functionals(V, [lambda u: u * dx])), "has a place")])
def test_what_cannot_be_shown_is_refused(space, given, words):
    with pytest.raises(InputError, match=words):
        plot_samples(_samples(space, lambda x: x[0]), **given)


@pytest.mark.parallel(2)
def test_two_ranks_draw_the_same_maps_lines_and_boundaries():
    mesh = UnitSquareMesh(4, 4)
    samples = _samples(FunctionSpace(mesh, "CG", 1), lambda x: x[0] + 2 * x[1])
    axes, line, top = (samples.plot(**given) for given in (
        dict(sensors=[(0.2, 0.2)]), dict(line=((0, 0.5), (1, 0.5)), curves=0), dict(boundary=4, curves=0)))
    if mesh.comm.rank:
        assert axes is None and line is None and top is None
        return
    x, y = np.meshgrid(*[(np.arange(150) + 0.5) / 150] * 2)
    np.testing.assert_allclose(axes[2].images[0].get_array(), x + 2 * y, rtol=1e-9)
    for ax, height in ((line, 0.5), (top, 1.0)):
        mean = next(line for line in ax.lines if line.get_label() == "posterior mean")
        np.testing.assert_allclose(mean.get_ydata(), 10.5 * (mean.get_xdata() + 2 * height))
