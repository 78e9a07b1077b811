"""Coefficients of an equation that are no unknowns: what was made of their values is kept, so they have to stay."""

from typing import Any

import numpy as np
from firedrake import Constant, DirichletBC, Function
from ufl.algorithms.analysis import extract_type
from ufl.core.expr import Expr

from fem_diffusion.errors import InputError
from fem_diffusion.forward.equation import Equation, boundary_value

__all__ = ["Kept"]


class Kept:
    """The values of all Functions and Constants in an equation, but those that solves write to, and its meshes."""

    def __init__(self, e: Equation, written: list[Function | Constant]) -> None:
        spaces = [e.u.function_space(), *(x.space for x in e.unknowns)]
        found = {W.mesh().coordinates for space in spaces for W in space}
        for place in (e.A, e.N, e.initial, *map(boundary_value, e.bcs)):
            if place is not None:
                found |= set(extract_type(place, (Function, Constant)))
        self.comm = e.u.comm
        others = sorted(found - set(written), key=lambda x: x.count())
        self._values = [(x, self._version(x), _values(x)) for x in others]
        self._conditions: list[tuple[DirichletBC, Any]] = [(bc, bc._original_arg) for bc in e.bcs]

    def check(self) -> None:
        """InputError where one of them has another value now, on any rank."""
        moved = None
        for number, (x, version, values) in enumerate(self._values):
            if self._version(x) == version:
                continue
            if not np.array_equal(_values(x), values, equal_nan=True):
                moved = moved or (f"Function {x.name()}" if isinstance(x, Function) else
                                  f"Constant, {values.squeeze()} before and {_values(x).squeeze()} now,")
            else:   # written, but as it was
                self._values[number] = x, self._version(x), values
        for bc, value in self._conditions:
            now: Any = bc._original_arg
            numbers = not isinstance(now, Expr) and not isinstance(value, Expr) and np.array_equal(now, value)
            if now is not value and not numbers:
                moved = moved or f"value of the condition on {bc.sub_domain!r},"
        told = self.comm.allgather(moved)
        if any(told):
            raise InputError(f"A coefficient, the {next(filter(None, told))} has changed since the forward "
                             "problem was made, which keeps what it has made of it: make the forward problem again.")

    @staticmethod
    def _version(x: Function | Constant) -> object:
        """What changes where somebody writes to x."""
        return tuple(dat.dat_version for dat in x.dat) if isinstance(x, Function) else x.values().tobytes()


def _values(x: Function | Constant) -> np.ndarray:
    # A component of a vector field has no vector of its own.
    return np.concatenate([np.ravel(dat.data_ro) for dat in x.dat]) if isinstance(x, Function) else x.values().copy()
