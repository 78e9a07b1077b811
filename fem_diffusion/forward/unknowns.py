"""What may be unknown in a problem: names, spaces, and the Function that stands for each unknown in the forms."""

from dataclasses import dataclass
from numbers import Number

import numpy as np
from firedrake import Function, FunctionSpace
from firedrake.functionspaceimpl import WithGeometry
from ufl import H1

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import owned_size
from fem_diffusion.fields.checks import check_marker, check_scalar, check_space, is_callable
from fem_diffusion.observation.linear import point_sensors

STEADY = "'source', 'diffusivity', 'velocity', ('flux', marker) or ('dirichlet', marker)"
TRANSIENT = "'initial', ('source', shape), " + STEADY
IN_TIME = ("source", "flux", "dirichlet", "diffusivity")


@dataclass(frozen=True, eq=False)
class Unknown:
    """One unknown coefficient and its place in the parameter."""

    name: object          # as the user wrote it
    kind: str
    marker: object        # of a flux or a Dirichlet value, else None
    shape: object         # of ("source", shape), else None
    space: WithGeometry   # M or its component
    columns: slice        # its owned coefficients among those of M
    value: Function       # what the forms contain: its coefficient, at one time where it depends on time
    nodes: np.ndarray | None = None   # the times of its components, where it is a field in space and time
    strength: bool = False            # whether it is a function of time alone
    submesh: object = None            # where a flux lives, if not on the state's mesh

    @property
    def moves(self):
        """Whether it depends on time."""
        return self.strength or self.nodes is not None

    def weights(self, times):
        """What `at` needs for each of these times: rows over the space (strength) or over the components."""
        if self.strength:
            try:
                return point_sensors(self.space, np.asarray(times)[:, None])
            except InputError as error:
                raise InputError(f"M's interval must reach from 0 to the last time, for {self.name!r}: build it as "
                                 f"IntervalMesh(n, {max(times):g}); {error}") from error
        if self.nodes is not None:
            return np.stack([np.interp(times, self.nodes, row) for row in np.eye(len(self.nodes))], axis=1)
        return None

    def at(self, ms, weights):
        """Coefficients of the value for all members and times: a callable k -> (n, n_owned of the value).

        Parameters
        ----------
        ms : numpy.ndarray
            Owned coefficients of M, shape (n, n_owned_M).
        weights
            What `weights` gave.
        """
        part = ms[:, self.columns]
        if self.strength:
            values = weights.apply(part)
            return lambda k: values[:, k:k + 1]
        if self.nodes is not None:
            part = part.reshape(len(part), -1, len(self.nodes))
            return lambda k: part @ weights[k]
        return lambda k: part

    def pull(self, values, weights, k):
        """Transpose of `at`: from rows over the value, shape (l, n_owned of it), to rows over the space."""
        if self.strength:
            return values * weights.rows[[k]].toarray()
        if self.nodes is not None:
            return (values[:, :, None] * weights[k]).reshape(len(values), -1)
        return values

    def write(self, row):
        """Set the value from one row of `at`."""
        if self.strength:
            self.value.assign(float(row[0]))
        else:
            with self.value.dat.vec_wo as x:
                x.array[:] = row


def parse(name, mesh, transient=False):
    """Split the name of an unknown into its kind, marker and shape (None where it has none)."""
    if isinstance(name, str) and (name in ("source", "diffusivity", "velocity") or (transient and name == "initial")):
        return name, None, None
    if isinstance(name, tuple) and len(name) == 2 and isinstance(name[0], str):
        if name[0] in ("flux", "dirichlet"):
            return name[0], check_marker(name[1], f"the unknown {name[0]}"), None
        if transient and name[0] == "source":
            return "source", None, check_scalar(name[1], "the shape of the source", (mesh,))
    raise InputError(f"unknown must be one of {TRANSIENT if transient else STEADY}, or a list of them, got {name!r}.")


def is_discontinuous(V):
    """Whether every coefficient belongs to one cell alone."""
    def size(dim):
        return sum(dim) if isinstance(dim, tuple) else dim
    inside = V.mesh().topological_dimension
    return all(size(dim) == inside or not any(entities.values())
               for dim, entities in V.finat_element.entity_dofs().items())


def check_spaces(V, M):
    """Refuse what is no space, and a state space that is not scalar and CG or DG."""
    check_space(V, "V")
    check_space(M, "M")
    if len(V) > 1 or V.value_shape != () or V.ufl_element().family() == "Real" or not (
            V.ufl_element() in H1 or is_discontinuous(V)):
        raise InputError("V must be scalar and either continuous or discontinuous, such as "
                         f"FunctionSpace(mesh, 'CG', 1) or FunctionSpace(mesh, 'DG', 1); got {V}.")


def read(unknown, V, M, m, given, times=None, nodes=None):
    """Read the names of the unknowns and check their spaces.

    Parameters
    ----------
    unknown : str, tuple or list
        As for the problem classes.
    V, M : FunctionSpace
        Spaces of state and parameter.
    m : Function
        The problem's parameter; it is the value of an unknown that is alone and does not depend on time.
    given : dict
        What `check_coefficients` made of the user's coefficients.
    times : ndarray, optional
        All times of a transient problem.
    nodes : ndarray, optional
        Times of the components of fields in space and time.

    Returns
    -------
    list of Unknown
    """
    several = isinstance(unknown, list)
    names = unknown if several else [unknown]
    parsed = [parse(name, V.mesh(), times is not None) for name in names]
    if not names or len({(kind, marker) for kind, marker, _ in parsed}) < len(names):
        raise InputError(f"unknown must name each coefficient once, got {unknown!r}.")
    if len(M) != len(names) or several != (len(M) > 1):
        raise InputError(f"M has {len(M)} components for the unknown {unknown!r}: a list of names, two or more, takes "
                         "MixedFunctionSpace([...]) with one component for each, a single name its own space.")
    if several:
        spaces = [M.sub(i).collapse() for i in range(len(names))]
    else:
        spaces = [M]
    ends = np.cumsum([0] + [owned_size(space) for space in spaces])
    found = []
    for (kind, marker, shape), name, space, first, last in zip(parsed, names, spaces, ends, ends[1:]):
        coefficient = given[kind] if marker is None else given[kind].get(marker)
        found.append(_one(name, kind, marker, shape, space, slice(first, last), V, None if several else m,
                          coefficient, times, nodes))
    return found


def _one(name, kind, marker, shape, space, columns, V, m, given, times, nodes):
    """One Unknown, its space checked."""
    here, there = V.mesh().topology, space.mesh().topology
    gdim = V.mesh().geometric_dimension
    strength = times is not None and there is not here and space.mesh().geometric_dimension == 1
    if shape is not None and not strength:
        raise InputError(f"{name!r} is a strength in time: take M = FunctionSpace(IntervalMesh(n, {max(times):g}), "
                         "'CG', 1).")
    if strength:
        element = space.ufl_element()
        if kind not in IN_TIME or space.value_shape or element not in H1 or element.family() == "Real":
            raise InputError(f"a function of time alone is scalar, continuous and one of {', '.join(IN_TIME)}, not "
                             f"{name!r} in {space}: take FunctionSpace(IntervalMesh(n, {max(times):g}), 'CG', 1).")
        value = Function(FunctionSpace(V.mesh(), "R", 0), name="strength")
        return Unknown(name, kind, marker, shape, space, columns, value, strength=True)
    if there is not here and (kind != "flux" or getattr(there, "submesh_parent", None) is not here):
        raise InputError("M must live on V's mesh; only a ('flux', marker) unknown may live on "
                         "Submesh(mesh, mesh.topological_dimension - 1, marker) of that same mesh"
                         + ("." if times is None else ", and a function of time on an IntervalMesh."))
    submesh = None if there is here else space.mesh()
    if nodes is not None and kind in IN_TIME and space.value_shape == (len(nodes),):
        value = Function(FunctionSpace(space.mesh(), space.ufl_element().sub_elements[0]), name=f"{kind} at one time")
        return Unknown(name, kind, marker, shape, space, columns, value, nodes, submesh=submesh)
    shapes = {"velocity": [(gdim,)], "diffusivity": [(), (gdim, gdim)]}.get(kind, [()])
    if space.value_shape not in shapes and not is_callable(given):
        family = "VectorFunctionSpace" if kind == "velocity" else "FunctionSpace"
        raise InputError(f"a {kind} unknown has value shape {shapes[0]}, but M has {space.value_shape}; "
                         f"take M = {family}(mesh, 'CG', 1), say, or give {kind} as a callable m -> UFL expression.")
    return Unknown(name, kind, marker, shape, space, columns, Function(space) if m is None else m, submesh=submesh)


def apply_unknown(name, given, default, value):
    """An unknown coefficient: the value, or what a callable makes of it."""
    if given is default or (isinstance(given, Number) and given == default):
        return value
    if is_callable(given):
        return given(value)
    raise InputError(f"{name} is the unknown, so its value is the parameter: leave it out, "
                     "or give a callable m -> UFL expression.")
