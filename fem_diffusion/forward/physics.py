"""What a user says of a problem: its coefficients, its boundary conditions and its steps in time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from firedrake import Constant, Function
from numpy.typing import ArrayLike
from ufl.core.expr import Expr

from fem_diffusion.checks import check_array, check_number
from fem_diffusion.errors import InputError

__all__ = ["Boundary", "Physics", "TimeSteps"]

MOST_STEPS = 10_000_000   # beyond, the units are wrong

Scalar = Expr | float
Marker = int | str | tuple[int, ...]


@dataclass(frozen=True, eq=False, repr=False)
class _Group:
    """Arguments that belong together."""

    def __repr__(self) -> str:
        given = {x.name: getattr(self, x.name) for x in fields(self) if getattr(self, x.name) is not x.default}
        words = (f"{name}={f'<{type(x).__name__}>' if len(repr(x)) > 40 else repr(x)}" for name, x in given.items())
        return f"{type(self).__name__}({', '.join(words)})"


@dataclass(frozen=True, eq=False, repr=False)
class Physics(_Group):
    """Coefficients of ``v·∇u - ∇·(κ∇u) + r(u) = f``, checked by the problem that takes them.

    Parameters
    ----------
    velocity : UFL vector or sequence of float, optional
        v, of shape ``(gdim,)``.
    diffusivity : UFL scalar or tensor, float or array
        κ, positive, or symmetric positive definite of shape ``(gdim, gdim)``.
    reaction : callable, optional
        ``u -> UFL expression`` r(u).
    source : UFL scalar or float
        f.
    """

    velocity: Expr | Sequence[Scalar] | Callable[[Function], Expr] | None = None
    diffusivity: Scalar | Sequence | np.ndarray | Callable[[Function], Expr] = 1.0
    reaction: Callable[[Function], Scalar] | None = None
    source: Scalar | Callable[[Function], Expr] = 0


@dataclass(frozen=True, eq=False, repr=False)
class Boundary(_Group):
    """Boundary conditions: ``u = g``, ``n·κ∇u = q``, ``n·κ∇u = h (u_ext - u)`` or ``n·κ∇u = 0``.

    A marker is an integer, a tuple of integers, ``"on_boundary"``, or ``"top"`` and ``"bottom"`` of an extruded mesh.

    Parameters
    ----------
    dirichlet, flux, robin : dict, optional
        ``{marker: g}``, ``{marker: q}`` and ``{marker: (h, u_ext)}``.
    outflow : tuple or marker, optional
        Markers with ``n·κ∇u = 0``, which markers not named anywhere get as well.
    """

    dirichlet: Mapping[Marker, Scalar | Callable[[Function], Expr]] | None = None
    flux: Mapping[Marker, Scalar | Callable[[Function], Expr]] | None = None
    robin: Mapping[Marker, tuple[Scalar, Scalar]] | None = None
    outflow: Sequence[Marker] | Marker | None = ()


@dataclass(frozen=True, eq=False, repr=False, init=False)
class TimeSteps(_Group):
    """Constant steps of the θ-scheme, and the times whose states are saved.

    Parameters
    ----------
    times : sequence of float
        Saved times, increasing, from 0 on, each a multiple of ``time_step``.
    time_step : float
        Δt, positive.
    theta : float
        From 1/2 (Crank-Nicolson) to 1 (implicit Euler).
    t : Constant, optional
        The time, as it appears in the coefficients: make ``t = Constant(0.0)``, write coefficients with it, pass it
        here.  It is overwritten by every solve.
    parameter_times : sequence of float, optional
        Times of the components of an unknown in space and time, increasing, from 0 to the last time; piecewise linear
        in between.  An unknown source, flux, Dirichlet value or diffusivity whose space has that many components is
        taken so.
    """

    times: np.ndarray
    time_step: float
    theta: float
    t: Constant
    parameter_times: np.ndarray | None = None

    def __init__(self, times: ArrayLike | Iterator[float], time_step: float, theta: float = 0.5,
                 t: Constant | None = None, parameter_times: ArrayLike | Iterator[float] | None = None) -> None:
        step, times = check_number(time_step, "time_step", above=0), _numbers(times, "times")
        if not len(times) or times[0] < 0 or (np.diff(times) <= 0).any():
            raise InputError(f"times must be increasing, from 0 on, with at least one of them, got {times}.")
        if times[-1] > MOST_STEPS * step:
            raise InputError(f"it takes more than {MOST_STEPS:,} steps of time_step = {step:g} to reach times[-1] = "
                             f"{times[-1]:g}: check their units, or take a larger step.")
        saved = np.rint(times / step).astype(int)
        if len(bad := np.flatnonzero(np.abs(saved * step - times) > 1e-9 * max(times[-1], step))):
            raise InputError(f"times[{bad[0]}] = {times[bad[0]]:g} is no multiple of time_step = {step:g}: choose a "
                             "step that divides all saved times.")
        if saved[-1] == 0:
            raise InputError("times holds 0 only: add a time after it, because nothing happens before.")
        nodes, end = None, saved[-1] * step
        if parameter_times is not None:
            nodes = _numbers(parameter_times, "parameter_times")
            if len(nodes) < 2 or not (np.diff(nodes) > 0).all() or nodes[0] != 0 or nodes[-1] < end * (1 - 1e-9):
                raise InputError(f"parameter_times must be two or more increasing times from 0 to at least the last "
                                 f"saved time {end:g}, got {nodes}.")
        clock: Constant = Constant(0.0) if t is None else t
        if not isinstance(clock, Constant) or clock.ufl_shape != ():
            raise InputError(f"t must be the scalar Constant that the coefficients contain, got {t!r}.")
        for name, value in (("times", times), ("time_step", step), ("parameter_times", nodes), ("t", clock),
                            ("theta", check_number(theta, "theta", least=0.5, most=1))):
            object.__setattr__(self, name, value)

    @property
    def saved(self) -> np.ndarray:
        """Numbers of the steps that reach the saved times."""
        return np.rint(self.times / self.time_step).astype(int)

    @property
    def all(self) -> np.ndarray:
        """Times of all steps, from 0 to the last saved one."""
        return self.time_step * np.arange(self.saved[-1] + 1)


def _numbers(values: ArrayLike | Iterator[float], name: str) -> np.ndarray:
    """A sequence or an iterator of numbers as an array (n,)."""
    return check_array(list(values) if isinstance(values, Iterator) else values, name, ("n",))
