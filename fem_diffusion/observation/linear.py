"""Linear observation operators: what sensors see of a state.

An `Observation` holds the rows of ``B`` over the coefficients of the state space, so ``B(u)`` is a sparse
product and a sum over ranks.  Measurement noise is not added here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from firedrake import Argument, Cofunction, Function, MismatchingDomainError, TestFunction, assemble
from firedrake.functionspaceimpl import WithGeometry
from firedrake.mesh import MeshGeometry
from mpi4py import MPI
from numpy.typing import ArrayLike
from pyadjoint import no_annotations
from scipy.sparse import csr_matrix, hstack, vstack
from ufl import Form
from ufl.algorithms import expand_derivatives
from ufl.algorithms.check_arities import ArityMismatch
from ufl.algorithms.formtransformations import compute_form_arities

from fem_diffusion.checks import check_all, check_array, check_callable, check_number
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, field, independent_entries, on_root, owned_size
from fem_diffusion.fields.checks import check_rows, check_space
from fem_diffusion.observation.points import locate, sensor_rows

__all__ = ["Observation", "functionals", "no_sensors", "point_sensors"]

_FUNCTIONAL = "a callable that maps the state to an integral linear in it, such as lambda u: u * ds(2)"


@dataclass(frozen=True, eq=False)
class Observation:
    """Linear observation operator ``B`` of states in U, with k named rows; ``observation[rows]`` has some of them.

    Attributes
    ----------
    rows : scipy.sparse.csr_matrix
        This rank's columns of all k rows, shape (k, n_owned).
    points : numpy.ndarray
        Shape (k, gdim): where a row is a point sensor (or the centre of its footprint), NaN where it is neither.
    """

    U: WithGeometry
    rows: csr_matrix
    names: tuple[str, ...]
    points: np.ndarray

    def __call__(self, u: Function) -> np.ndarray:
        """Readings of one state, shape (k,); InputError if u is no Function in ``U``."""
        got = u.function_space() if isinstance(u, Function) else type(u).__name__
        if got != self.U:
            remedy = ("return one mixed Function from the solver" if isinstance(u, (tuple, list)) else
                      "interpolate it into the observation's space" if isinstance(u, Function) else
                      "let the solver return the state, a Function")
            raise InputError(f"the state is in {got}, expected a Function in {self.U}: {remedy}.")
        # A state that is not finite gives NaN: those who solve tell a failed solve from a mistake by it.
        return self._readings(coefficients(u)[None])[0]

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Readings (n, k) of states with coefficients (n, n_owned); InputError unless these are real and finite."""
        return self._readings(check_rows(values, self.U, "values"))

    def _readings(self, values: np.ndarray) -> np.ndarray:
        """As `apply`, of an array of floats."""
        return self.U.comm.allreduce((self.rows @ values.T).T)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        names = ", ".join(self.names[:3]) + (", ..." if len(self) > 3 else "")
        return f"Observation: {len(self)} rows ({names}) of states in {self.U.ufl_element()}, {self.U.dim()} unknowns"

    __iter__ = None  # a row alone means little, and NumPy would otherwise take an observation for a sequence

    def __reduce_ex__(self, protocol: object) -> None:
        raise InputError("An Observation holds a mesh and cannot be copied or pickled: build it again.")

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> "Observation":
        """Observation of some of the rows, for example without a failed sensor; InputError if none is left.

        They are given in the order of the result, or by a boolean mask of shape (k,).
        """
        try:
            rows = rows if isinstance(rows, slice) or len(np.atleast_1d(rows)) else slice(0)
            chosen = np.atleast_1d(np.arange(len(self))[rows if isinstance(rows, slice) else np.asarray(rows)])
        except (IndexError, TypeError, ValueError, NotImplementedError) as error:
            raise InputError(f"there is no such row ({error}): the observation has {len(self)} rows; select them by "
                             "whole numbers, a slice or a boolean mask.") from error
        if chosen.ndim != 1 or not len(chosen):
            raise InputError(f"rows of shape {chosen.shape} are selected: keep at least one, in one dimension.")
        return Observation(self.U, self.rows[chosen], tuple(self.names[i] for i in chosen), self.points[chosen])

    def __add__(self, other: "Observation") -> "Observation":
        """Stack the rows of two observations of the same space; InputError if the spaces differ."""
        if not isinstance(other, Observation):
            return NotImplemented
        if other.U != self.U:
            raise InputError(f"cannot stack observations of {self.U} and {other.U}: build both on one space.")
        return Observation(self.U, vstack([self.rows, other.rows], format="csr"), self.names + other.names,
                           np.concatenate([self.points, other.points]))

    def __radd__(self, other: int) -> "Observation":
        """``sum(observations)`` starts from 0."""
        return self if isinstance(other, Integral) and other == 0 else NotImplemented


def checked_names(names: Sequence[str] | None, default: Iterable[str], count: int) -> tuple[str, ...]:
    """Names as a tuple of count strings."""
    names = tuple(default) if names is None else check_all(names, "names", str, "strings")
    if len(names) != count:
        raise InputError(f"got {len(names)} names for {count} sensors: give one name for each.")
    return names


def component_space(U: WithGeometry, component: int | None) -> tuple[WithGeometry, Callable[[csr_matrix], csr_matrix]]:
    """The space of a component of a mixed U, and a map of its rows (k, n_owned) to rows over the whole of U."""
    check_space(U, "U")
    if component is None:
        if len(U) > 1:
            raise InputError(f"the state space is mixed: name one of its components, component=0 to {len(U) - 1}, or "
                             "use functionals.")
        return U, lambda rows: rows
    if not isinstance(component, Integral) or isinstance(component, (bool, np.bool_)) or not 0 <= component < len(U):
        raise InputError(f"component is {component!r}: the state space has components 0 to {len(U) - 1}, name one.")
    spaces = [W.collapse() for W in U]
    before, after = (sum(owned_size(W) for W in part) for part in (spaces[:component], spaces[component + 1:]))

    def embed(rows: csr_matrix) -> csr_matrix:
        k = rows.shape[0]
        return hstack([csr_matrix((k, before)), rows, csr_matrix((k, after))], format="csr")
    return spaces[component], embed


def checked_points(mesh: MeshGeometry, points: ArrayLike, what: str = "points") -> np.ndarray:
    """Coordinates of rank 0 as an array (k, gdim)."""
    gdim = mesh.geometric_dimension
    shapes = [("k", gdim)] + [("k",)] * (gdim == 1)
    points = on_root(mesh.comm, lambda: check_array(points, what, *shapes)).reshape(-1, gdim)
    if not len(points):
        raise InputError(f"{what} has the shape {points.shape}: give one row for each sensor, at least one.")
    return points


def labels(points: np.ndarray) -> list[str]:
    """A readable name for each of the points (k, gdim)."""
    return ["(" + ", ".join(f"{x:g}" for x in point) + ")" for point in points]


@no_annotations
def point_sensors(U: WithGeometry, points: ArrayLike, names: Sequence[str] | None = None, *,
                  component: int | None = None, tolerance: float = 1e-6) -> Observation:
    """Sensors that read the state, or one component of a mixed state, at points, in their order.

    Parameters
    ----------
    U : firedrake.functionspaceimpl.WithGeometry
        The state space.
    points : array_like
        Shape (k, gdim); those of rank 0 count.  If the state (or the component) is vector-valued, every point gives one
        row for each of its entries, entries running fastest: ``point_sensors(U, points)[0::2]`` keeps the first entry
        of a vector of two.  Of symmetric tensors, equal entries are read once.
    names : sequence of str | None
        One name for each row; default the coordinates.
    component : int | None
        Index of the component of a mixed U that the sensors read, e.g. 0 for the velocity in Stokes.
    tolerance : float
        How far outside the mesh a sensor may be, as a fraction of the size of a cell.

    Raises
    ------
    InputError
        If a component of a mixed U or a name is missing, the points have the wrong shape, are not finite or outside the
        mesh, or Firedrake reads the state wrongly there.
    """
    W, embed = component_space(U, component)
    mesh, tolerance = W.mesh(), check_number(tolerance, "tolerance", above=0)
    points = checked_points(mesh, points)
    vom, index, found = locate(mesh, points, tolerance)
    if not found.all():
        lost = np.flatnonzero(~found)
        first = ", ".join(f"{i} at {tuple(points[i].tolist())}" for i in lost[:5])
        raise InputError(f"{len(lost)} of {len(points)} sensors are outside the mesh (sensor {first}): "
                         "move them inside, or give a larger tolerance.")
    entries = [np.unravel_index(c, W.value_shape) for c in independent_entries(W)[0]]
    tags = ["[" + ", ".join(map(str, entry)) + "]" if entry else "" for entry in entries]
    names = checked_names(names, [x + tag for x in labels(points) for tag in tags], len(tags) * len(points))
    return Observation(U, embed(sensor_rows(W, vom, index, len(points))), names, np.repeat(points, len(tags), axis=0))


@no_annotations
def functionals(U: WithGeometry, forms: Sequence[Callable], names: Sequence[str] | None = None) -> Observation:
    """Sensors that read linear functionals of the state, one row for each.

    Parameters
    ----------
    forms : sequence of callable
        Each maps the state to a UFL 0-form linear in it, e.g. ``lambda u: u * ds(2)``, an average
        ``lambda u: u / area * ds(2)`` or a flux ``lambda u: -kappa * dot(grad(u), n) * ds(3)``; ``split`` a mixed one.
    names : sequence of str | None
        One name for each form; default ``functional 0`` and so on.

    Raises
    ------
    InputError
        If a form is no UFL form, not linear or not finite, or a name is missing.
    """
    forms = [check_callable(form, f"functional {i}", _FUNCTIONAL, 1)
             for i, form in enumerate(check_all(forms, "forms", object, "functions of the state"))]
    try:
        argument = TestFunction(check_space(U, "U"))
    except NotImplementedError as error:
        raise InputError(f"Firedrake assembles no functional of this state ({error}): take a "
                         "FunctionSpace(mesh, \"R\", 0) for each number.") from error
    if not forms:
        raise InputError("there are no forms: give at least one functional of the state.")
    rows = [csr_matrix(_row(U, form, argument, i)) for i, form in enumerate(forms)]
    compare_row(U, rows[0], "functional 0", lambda u: assemble(forms[0](u)))
    names = checked_names(names, (f"functional {i}" for i in range(len(forms))), len(forms))
    points = np.full((len(forms), U.mesh().geometric_dimension), np.nan)
    return Observation(U, vstack(rows, format="csr"), names, points)


def compare_row(U: WithGeometry, row: csr_matrix, name: str, direct: Callable[[Function], float]) -> None:
    """Raise InputError unless a row (1, n_owned) reads of a random state what `direct` finds in the Function."""
    state = field(U, np.random.default_rng([0, U.comm.rank]).standard_normal(owned_size(U)))
    values = coefficients(state)
    found, size = U.comm.allreduce(np.array([(row @ values)[0], (abs(row) @ np.abs(values))[0]]))
    wanted = float(direct(state))
    if not abs(found - wanted) <= 1e-8 * size:
        raise InputError(f"{name} reads {found:g} of a state by its row, and {wanted:g} directly: Firedrake assembles "
                         "one of them wrongly on this mesh; choose another element or another form.")


def _row(U: WithGeometry, form: Callable, argument: Argument, i: int) -> np.ndarray:
    """Row of one functional, shape (1, n_owned)."""
    try:
        integral = form(argument)
        arities = compute_form_arities(expand_derivatives(integral)) if isinstance(integral, Form) else None
        if arities != {1}:
            raise ArityMismatch(f"arities {arities}")
        covector = assemble(integral)
    except (ArityMismatch, LookupError, MismatchingDomainError, TypeError, ValueError) as error:
        raise InputError(f"functional {i} cannot be assembled as a linear form ({error}): give "
                         f"{_FUNCTIONAL}.") from error
    if not isinstance(covector, Cofunction):
        raise InputError(f"functional {i} gave {type(covector).__name__}: give {_FUNCTIONAL}.")
    row = coefficients(covector)
    if not U.comm.allreduce(bool(np.isfinite(row).all()), MPI.LAND):
        raise InputError(f"functional {i} has weights that are not finite: look for a division by zero or a root of a "
                         "negative number in its form.")
    return row.reshape(1, owned_size(U))


def no_sensors(U: WithGeometry) -> Observation:
    """The observation without a single row: nothing is measured."""
    gdim = check_space(U, "U").mesh().geometric_dimension
    return Observation(U, csr_matrix((0, owned_size(U))), (), np.empty((0, gdim)))
