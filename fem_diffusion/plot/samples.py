"""Samples with their uncertainty, on whatever the parameter lives on."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from finat.ufl import TensorProductElement
from firedrake import Function, FunctionSpace, TrialFunction, VectorFunctionSpace, assemble, interpolate
from firedrake.functionspaceimpl import WithGeometry
from matplotlib.axes import Axes

from fem_diffusion.checks import check_array, check_count, check_kind, check_number, together
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, multiply, owned_size
from fem_diffusion.observation.linear import Observation
from fem_diffusion.plot.curves import plot_curve, plot_numbers
from fem_diffusion.plot.maps import plot_maps
from fem_diffusion.plot.places import boundary_curve, line_curve, mesh_curve
from fem_diffusion.plot.style import Asked, check_axes, marks_of
from fem_diffusion.samples import Samples

__all__ = ["drawn_space", "nodal_values", "plot_samples"]


def plot_samples(samples: Samples, axes: Axes | Sequence[Axes] | None = None, truth: Function | None = None,
                 reference: Sequence | None = None, curves: int | None = None, xlabel: str | None = None,
                 ylabel: str | None = None, *, units: str | None = None, mesh_units: str | None = None,
                 sensors: Observation | np.ndarray | Sequence | None = None,
                 quantile: float | Sequence[float] | None = None, threshold: float | None = None,
                 slice: tuple[str, float] | None = None, line: Sequence | np.ndarray | None = None,
                 boundary: int | str | tuple[int, ...] | None = None) -> Axes | np.ndarray | None:
    """Draw samples of a field, or of a few numbers; the axes are returned, None but on rank 0.

    On a one-dimensional mesh (a boundary part, too), along a line through a mesh, or along one of its boundaries: mean,
    95 % band, single samples, truth and reference. On a plane mesh, or in a plane through a three-dimensional one: maps
    of mean, standard deviation and one sample, and of the truth where it is given; of vectors the magnitude, with
    arrows. In Real space: for each number a histogram with mean, 95 % interval, truth and reference. What is constant
    along an extrusion is drawn on the base mesh.

    Parameters
    ----------
    axes : matplotlib Axes (lines, one number) or sequence of them (maps, several numbers), optional
        Where to draw; a new figure where left out. Lines with a threshold take two.
    truth : Function, optional
        In the space of the samples.
    reference : tuple of numpy.ndarray or Function, optional
        Not for maps: mean and standard deviation of a reference posterior, owned coefficients, shape (n_owned,) each;
        its band is mean ± 1.96 standard deviations, or pass (mean, lower, upper).
    curves : int, optional
        Lines only: number of single samples; 20 where left out.
    xlabel, ylabel : str, optional
        Position and parameter (lines), or parameter and density (numbers); ylabel of the colours (maps). The
        parameter has the name of its space where left out.
    units, mesh_units : str, optional
        Of the parameter, and of lengths; they follow the labels in brackets.
    sensors : Observation or array_like of shape (k, gdim), optional
        Not for numbers: they are drawn where they are, with the names that the user gave or the number of their row;
        hollow where they lie off the plane of a slice.
    quantile : float or sequence of float, optional
        Levels of further curves, maps (of the magnitude, for vectors) or lines.
    threshold : float, optional
        The probability that the parameter (the magnitude, for vectors) exceeds it is drawn as well.
    slice : tuple of str and float, optional
        Three dimensions only: the plane, such as ("z", 0.5); through the middle, across the shortest side, where left
        out.
    line : array_like of shape (2, gdim), optional
        Ends of a line through the mesh of a scalar field.
    boundary : int, tuple of int or str, optional
        Marker of a boundary of a plane mesh, for a scalar field.

    InputError is raised if an argument is of the wrong kind, shape or space, or nothing would be drawn of it; if the
    parameter is a tensor, or the mesh a surface in space.
    """
    check_kind(samples, "samples", Samples, "what Posterior.sample returned")
    V, comm = samples.V, samples.V.comm
    if len(V) > 1:
        raise InputError(f"plot_samples draws one parameter and these samples have {len(V)}: pass one of them, "
                         "samples.component(0).plot() and so on, or use save().")
    values = together(comm, lambda: check_array(samples.values, "samples.values", ("n", owned_size(V))))
    if not len(values):
        raise InputError("There are no samples: draw one at least.")
    if truth is not None:
        space = truth.function_space() if isinstance(truth, Function) else None
        if space is None or space.mesh() is not V.mesh() or space.ufl_element() != V.ufl_element():
            raise InputError(f"truth is {truth!r}: give a Function in the space of the samples, {V}.")
        truth = together(comm, lambda: check_array(coefficients(truth), "truth", (owned_size(V),)))
    band = None if reference is None else together(comm, lambda: _reference(reference, owned_size(V)))
    for name, label in (("xlabel", xlabel), ("ylabel", ylabel), ("units", units), ("mesh_units", mesh_units)):
        check_kind(label, name, (str, type(None)), "a string")
    levels = () if quantile is None else (quantile,) if isinstance(quantile, Real) else quantile
    levels = together(comm, lambda: check_array(levels, "quantile", ("n",)))
    name = V.name or "parameter"
    asked = Asked(tuple(check_number(q, "quantile", least=0, most=1) for q in levels.tolist()),
                  None if threshold is None else check_number(threshold, "threshold"), ylabel or name, units,
                  mesh_units, xlabel)
    V = drawn_space(V)
    if V.ufl_element().family() == "Real":
        _refuse("numbers", curves=curves, sensors=sensors, slice=slice, line=line, boundary=boundary,
                mesh_units=mesh_units)
        together(comm, lambda: check_axes(axes, V.dim()))
        asked = replace(asked, name=xlabel or name, density=ylabel or "density")
        return plot_numbers(V, values, axes, truth, band, asked)
    V, values, truth = nodal_values(V, values, truth)
    vector, mesh = values.ndim == 3, V.mesh()
    marks = together(comm, lambda: marks_of(sensors, mesh))
    if mesh.topological_dimension == 1 or line is not None or boundary is not None:
        if vector:
            raise InputError("Bands are drawn of scalar fields: interpolate a component of the samples, or its normal "
                             "part, into a scalar space.")
        _refuse("lines", slice=slice, **({"line": line, "boundary": boundary} if mesh.topological_dimension == 1 else
                                         {"both line and boundary": line if boundary is not None else None}))
        curves = 20 if curves is None else check_count(curves, "curves", least=0)
        together(comm, lambda: check_axes(axes, 1 if threshold is None else 2))
        curve = (line_curve(V, line) if line is not None else mesh_curve(V) if boundary is None else
                 boundary_curve(V, boundary))
        return plot_curve(curve, values, axes, truth, band, curves, asked, marks)
    _refuse("maps", curves=curves, reference=reference, xlabel=xlabel,
            slice=slice if mesh.geometric_dimension == 2 else None)
    if mesh.topological_dimension != mesh.geometric_dimension:
        raise InputError("plot_samples draws no surfaces in space: use save() and a viewer.")
    if getattr(mesh, "extruded_periodic", False):
        raise InputError("Firedrake draws no maps on periodic extrusions: use save() and a viewer.")
    return plot_maps(V, values, axes, truth, asked, marks, slice)


def _refuse(what: str, **arguments: Any) -> None:
    """Refuse arguments that a picture has no use for."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise InputError(f"pictures of {what} have no use for {' and '.join(given)}: leave it out.")


def drawn_space(V: WithGeometry) -> WithGeometry:
    """A space with the same coefficients: scalar for vectors of one component, of the base mesh along an extrusion."""
    element, mesh = V.ufl_element(), V.mesh()
    if element.family() != "Real" and V.value_size == 1 and V.value_shape:
        element = element.sub_elements[0]
    factors = list(element.factor_elements) if isinstance(element, TensorProductElement) else []
    if [factor.family() == "Real" for factor in factors] == [False, True]:
        element, mesh = factors[0], mesh._base_mesh
    return V if element == V.ufl_element() else FunctionSpace(mesh, element)


def _reference(reference: Sequence, size: int) -> np.ndarray:
    """Mean, lower and upper bound, shape (3, n_owned)."""
    if not isinstance(reference, (tuple, list, np.ndarray)) or len(reference) not in (2, 3):
        raise InputError(f"reference is of type {type(reference).__name__}: give (mean, std) or (mean, lower, upper).")
    mean, *others = (check_array(coefficients(part) if isinstance(part, Function) else part, "reference", (size,))
                     for part in reference)
    if len(others) == 1 and (others[0] < 0).any():
        raise InputError("reference has negative standard deviations: give (mean, std) or (mean, lower, upper).")
    return np.stack([mean, *(others if len(others) == 2 else mean + 1.96 * np.outer([-1, 1], others[0]))])


def nodal_values(V: WithGeometry, values: np.ndarray, truth: np.ndarray | None) -> tuple[
        WithGeometry, np.ndarray, np.ndarray | None]:
    """A scalar space with values at nodes, samples (n, n_owned) and truth there; (n, n_owned, dim) of vectors."""
    element, mesh = V.ufl_element(), V.mesh()
    if len(V.value_shape) > 1:
        raise InputError("plot_samples draws no tensors: use save() and a viewer.")
    if not V.value_shape:
        if element.mapping() != "identity":
            raise InputError(f"the coefficients in {element} are not values, so their deviations and quantiles are "
                             "not those of the field: interpolate the samples into a CG or DG space.")
        return V, values, truth
    if not element.sub_elements or element.mapping() != "identity":
        simplex = mesh.ufl_cell().cellname in ("interval", "triangle", "tetrahedron")
        degree = element.embedded_superdegree if simplex else int(np.max(element.degree()))
        D = VectorFunctionSpace(mesh, "DG" if simplex else "DQ", degree)
        matrix = assemble(interpolate(TrialFunction(V), D), mat_type="aij").petscmat
        values, truth = multiply(matrix, values), None if truth is None else multiply(matrix, truth[None])[0]
        V = D
    dim = V.value_size
    return (FunctionSpace(mesh, V.ufl_element().sub_elements[0]), values.reshape(len(values), -1, dim),
            None if truth is None else truth.reshape(-1, dim))
