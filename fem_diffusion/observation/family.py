"""Families of sensors: which ones a measurement may hold, and how noisy each may be."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from firedrake.functionspaceimpl import WithGeometry
from numpy.typing import ArrayLike

from fem_diffusion.checks import check_array, check_count
from fem_diffusion.errors import InputError
from fem_diffusion.observation.linear import Observation

__all__ = ["SensorFamily", "SensorKind"]


@dataclass(frozen=True, eq=False)
class SensorKind:
    """Candidates of one kind of sensor, of which a measurement holds some; InputError if a number is out of range.

    Parameters
    ----------
    observation : Observation
        The candidates: places on the mesh (`random_points`), patches of many sizes, lines, fluxes, or the instruments
        of one fixed array, of which some may fail. Thousands of them are cheap.
    std : float, tuple of two floats, or array_like of shape (k,) or (2, k)
        Standard deviation of the noise, in units of the measurement: one for all, its smallest and largest value
        (each sensor of each training sample draws its own, log-uniformly), one for each row of the observation, or
        the two for each row. For exactly two rows give (2, k).
    count : tuple of int
        Fewest and most sensors of this kind in a measurement; small numbers are as frequent as large ones on a
        logarithmic scale.
    series : int
        Rows that make up one sensor and come or fail together, such as the times of a time series; they follow each
        other in the observation.
    """

    observation: Observation
    std: ArrayLike
    count: tuple[int, int]
    series: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.observation, Observation):
            raise InputError(f"A kind of sensor is an Observation, not {type(self.observation).__name__}: a family "
                             "needs linear sensors; for others fit a model of one fixed observation.")
        rows, series = len(self.observation), check_count(self.series, "series")
        if rows % series:
            raise InputError(f"series is {series}: {rows} rows must split into sensors of that many rows.")
        ends = self.count
        ends = tuple(ends) if isinstance(ends, Iterable) and not isinstance(ends, (Mapping, Set, str, bytes)) else ()
        if len(ends) != 2:
            raise InputError(f"count is {self.count!r}: give the fewest and the most sensors, e.g. (1, 64).")
        least, most = (check_count(n, f"count[{i}]", least=i) for i, n in enumerate(ends))
        if not least <= most <= rows // series:
            raise InputError(f"count is {(least, most)}: of {rows // series} candidates between 0 and all can be in "
                             "a measurement, the fewest first.")
        std = check_array(self.std, "std", (), (rows,), (2, rows), *([(2,)] if rows != 2 else []))
        std.flags.writeable = False
        for name, value in (("series", series), ("count", (least, most)), ("std", std)):
            object.__setattr__(self, name, value)
        std = self.std_range
        if not (std > 0).all() or (std[0] > std[1]).any():
            raise InputError("Every sensor needs noise: std must be positive, the smallest value first.")

    @property
    def std_range(self) -> np.ndarray:
        """Smallest and largest standard deviation of each row, shape (2, k)."""
        std, k = np.asarray(self.std), len(self.observation)
        return np.broadcast_to(std[:, None] if std.shape == (2,) and k != 2 else std, (2, k))

    def __repr__(self) -> str:
        low, high = self.std_range.min(), self.std_range.max()
        std = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        of = f" of {self.series} rows" if self.series > 1 else ""
        return (f"SensorKind: {self.count[0]} to {self.count[1]} of {len(self.observation) // self.series} sensors"
                f"{of}, std {std}")


@dataclass(frozen=True, eq=False)
class SensorFamily:
    """Some sensors of every kind, together in one measurement; InputError unless all observe one state space."""

    kinds: tuple[SensorKind, ...]

    def __post_init__(self) -> None:
        kinds = (self.kinds,) if isinstance(self.kinds, SensorKind) else self.kinds
        kinds = tuple(kinds) if isinstance(kinds, (Sequence, Iterator)) else ()
        if not kinds or not all(isinstance(kind, SensorKind) for kind in kinds):
            raise InputError(f"A SensorFamily is made of SensorKinds: give at least one, not {self.kinds!r}.")
        if any(kind.observation.U != kinds[0].observation.U for kind in kinds):
            raise InputError("Kinds of a family observe different spaces: build all of them on that of the state.")
        object.__setattr__(self, "kinds", kinds)

    @property
    def U(self) -> WithGeometry:
        """The state space."""
        return self.kinds[0].observation.U

    def __repr__(self) -> str:
        return f"SensorFamily: {'; '.join(map(repr, self.kinds))}"
