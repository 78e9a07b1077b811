"""Coefficients of an equation that are no unknowns: what was made of their values is kept, so they have to stay."""

import numpy as np
from firedrake import Constant, Function
from ufl.algorithms.analysis import extract_type

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.forward.equation import Equation, boundary_value

__all__ = ["Kept"]


class Kept:
    """The values of all Functions and Constants in an equation, but those that solves write to."""

    def __init__(self, e: Equation, written: list[Function | Constant]) -> None:
        found = set()
        for place in (e.A, e.N, e.initial, *map(boundary_value, e.bcs)):
            if place is not None:
                found |= set(extract_type(place, (Function, Constant)))
        self.comm = e.u.comm
        others = sorted(found - set(written), key=lambda x: x.count())
        self._values = [(x, self._version(x), _values(x)) for x in others]

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
        told = self.comm.allgather(moved)
        if any(told):
            raise InputError(f"A coefficient, the {next(filter(None, told))} has changed since the forward "
                             "problem was made, which keeps what it has made of it: make the forward problem again.")

    @staticmethod
    def _version(x: Function | Constant) -> object:
        """What changes where somebody writes to x."""
        return tuple(dat.dat_version for dat in x.dat) if isinstance(x, Function) else x.values().tobytes()


def _values(x: Function | Constant) -> np.ndarray:
    return coefficients(x) if isinstance(x, Function) else x.values().copy()
