"""Lines, boundaries and slices that a report is asked for: refused before a solve where they are not there."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from firedrake.functionspaceimpl import WithGeometry

from fem_diffusion.checks import check_array, together
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import bounding_box, is_real, owned_size
from fem_diffusion.observation.points import locate
from fem_diffusion.plot.places import boundary_curve, line_curve, plane_of
from fem_diffusion.plot.samples import drawn_space, nodal_values

__all__ = ["check_places"]

_TOLERANCE = 1e-6       # of a cell's size, for ends of lines


def check_places(spaces: Sequence[WithGeometry], lines: Any, boundaries: Any, slices: Any) -> None:
    """Look at places that a page is to show of unknowns in some spaces (collective).

    InputError if they are no sequences, or one of them can be drawn of no unknown.
    """
    for given, name, example in ((lines, "lines", "[[(0, 0), (1, 1)]]"), (boundaries, "boundaries", "(1,)"),
                                 (slices, "slices", "[('z', 0.5)]")):
        if given is not None and not isinstance(given, (list, tuple, np.ndarray)):
            raise InputError(f"{name} is {given!r}: give a sequence, such as {example}.")
    lines, boundaries, slices = ([] if given is None else list(given) for given in (lines, boundaries, slices))
    fields = [drawn_space(V) for V in spaces if not is_real(V)]
    fields = [V for V in fields if V.mesh().geometric_dimension == V.mesh().topological_dimension > 1]
    scalars = [V for V in fields if not V.value_shape]
    if (lines or boundaries) and not scalars:
        raise InputError("lines and boundaries are for bands of a scalar field on a mesh of two or three dimensions, "
                         "and no unknown is one: leave them out.")
    solids = [V for V in fields if V.mesh().geometric_dimension == 3]
    if slices and not solids:
        raise InputError("slices are planes of a mesh of three dimensions, and no unknown lives on one: leave slices "
                         "out.")
    for line in lines:
        _any(scalars, lambda V: _line(V, line))
    for marker in boundaries:
        _any(scalars, lambda V: boundary_curve(V, marker))
    for plane in slices:
        _any(solids, lambda V: plane_of(nodal_values(V, np.zeros((1, owned_size(V))), None)[0], plane))


def _any(spaces: Sequence[WithGeometry], draw: Callable[[WithGeometry], object]) -> None:
    """Whether something can be drawn in one of some spaces; the first error where it cannot."""
    errors = []
    for V in spaces:
        try:
            draw(V)
            return
        except InputError as error:
            errors.append(error)
    raise errors[0]


def _line(V: WithGeometry, line: Any) -> None:
    """A line both ends of which are in the mesh; between them it may have holes."""
    mesh = V.mesh()
    ends = together(V.comm, lambda: check_array(line, "each of lines", (2, mesh.geometric_dimension)))
    inside = locate(mesh, ends, _TOLERANCE)[2]
    if not inside.all():
        low, high = (tuple(corner.tolist()) for corner in bounding_box(mesh))
        raise InputError(f"One of lines ends at {tuple(ends[np.argmin(inside)].tolist())}, which is outside the mesh: "
                         f"move it there, between {low} and {high}.")
    line_curve(V, ends)
