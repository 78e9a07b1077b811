"""Boundary values that contain unknowns."""

from firedrake import Constant, DirichletBC, Function, TrialFunction, derivative, interpolate
from ufl import as_ufl
from ufl.algorithms import expand_derivatives

__all__ = ["Lift"]


class Lift:
    """Boundary values of a problem with unknown Dirichlet data, as a Function that is zero at free nodes.

    The tape of firedrake.adjoint keeps the values of a DirichletBC fixed when it replays a variational
    solver, so the unknowns enter the residual through this lift and the solver sees homogeneous ones.

    Parameters
    ----------
    V : FunctionSpace
        State space.
    values : dict
        Dirichlet values by marker, all of them, those of the unknowns last.
    unknowns : list of Unknown
        Those that are Dirichlet values.
    """

    def __init__(self, V, values, unknowns):
        self.g = Function(V, name="boundary values")
        self._V, self.known, self._masked = V, Function(V), as_ufl(0)
        markers = [x.marker for x in unknowns]
        self._bcs = [DirichletBC(V, 0 if key in markers else g, key) for key, g in values.items()]
        for i, marker in enumerate(markers):
            mask = Function(V)
            DirichletBC(V, 1, marker).apply(mask)
            for later in markers[i + 1:]:
                DirichletBC(V, 0, later).apply(mask)
            self._masked += mask * values[marker]
        self.refresh()

    def refresh(self):
        """Evaluate the known values again, which may depend on time."""
        for bc in self._bcs:
            bc.apply(self.known)

    def update(self):
        """Interpolate the current parameter (recorded if a tape is running)."""
        self.g.interpolate(self._masked + self.known)

    def derivative(self, x):
        """∂g/∂m for one Unknown: an interpolation, of an argument unless the value is a number."""
        direction = Constant(1.0) if x.strength else TrialFunction(x.value.function_space())
        return interpolate(expand_derivatives(derivative(self._masked, x.value, direction)), self._V)
