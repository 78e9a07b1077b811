"""Names with units, as axes have them: "gauge 3 [mg/l]"; numbers from one unit to another, by pint."""

import re
from functools import cache
from typing import Any

import numpy as np

from fem_diffusion.errors import DataError, InstallError

__all__ = ["converted", "split_unit"]

_BRACKETS = re.compile(r"(.*\S)\s+(?:\[([^\[\]]+)\]|\(([^()]+)\))")
# What a unit is made of; pint would calculate with longer numbers for ever.
_UNIT = re.compile(r"[^\W\d_][\w\s/*^·().%°µμ²³⁻¹-]{0,39}|[%°‰][\w/ ]{0,20}")
_LONG = re.compile(r"\d{3}")


def split_unit(name: str) -> tuple[str, str | None]:
    """A name and its unit: "gauge 3 [mg/l]" is "gauge 3" in "mg/l"; None where it has none, as "(0.2, 0.5)[1]"."""
    found = _BRACKETS.fullmatch(name.strip())
    if found is None:
        return name.strip(), None
    return found[1], (found[2] or found[3]).strip() or None


def converted(values: np.ndarray, unit: str, to: str, what: str) -> np.ndarray:
    """Numbers of one unit in another one; messages say of `what` they are.

    InstallError where units differ and pint is not there; DataError where it does not know one of them, or they are of
    different kinds.
    """
    if unit == to or not len(values):
        return values
    registry = _registry(what, unit, to)
    import pint

    for one in (unit, to):
        if not _UNIT.fullmatch(one) or _LONG.search(one):
            raise DataError(f"{what} has the unit {one[:40]!r}, which is none: write it like 'mg/l' or 'degC'.")
    try:
        found = registry.Quantity(values, unit).to(to).magnitude
    except pint.DimensionalityError as error:
        raise DataError(f"{what} is in {unit!r} and the sensor in {to!r}, which are different things ({error}): mend "
                        "the header of the file, or the name of the sensor.") from error
    except Exception as error:      # pint's parser raises what tokenizers and operators do
        raise DataError(f"{what} is in {unit!r} and the sensor in {to!r}, and pint does not know both ({error}): write "
                        "them like 'mg/l' or 'degC'.") from error
    return np.asarray(found, dtype=float)


@cache
def _units() -> Any:
    import pint

    return pint.UnitRegistry(autoconvert_offset_to_baseunit=False)


def _registry(what: str, unit: str, to: str) -> Any:
    try:
        return _units()
    except ImportError as error:
        raise InstallError(f"{what} is in {unit!r} and the sensor in {to!r}: pip install 'fem_diffusion[units]' for "
                           "pint, which converts them, or give both one unit.") from error
