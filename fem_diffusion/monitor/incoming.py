"""Readings as they come, by JSON or in the rows of a growing CSV file: checked, or refused in words.

A row or object has a time (ISO 8601; without an offset it is that of this machine's clock) and numbers by the names of
the sensors; what is missing, empty or null is a sensor that reports nothing.
"""

import csv
import io
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from time import time as now
from typing import Any

import numpy as np

from fem_diffusion.checks import LARGEST
from fem_diffusion.errors import DataError, FileError
from fem_diffusion.measurements.units import split_unit
from fem_diffusion.monitor.history import History, Reading

__all__ = ["Follower", "reading_of"]

# How far ahead of the clock a time may be, in seconds; bytes of a row, and bytes that are read at once.
_AHEAD, _LONGEST, _CHUNK = 600.0, 2**16, 2**20
_NOTHING = "", "nan", "null", "none", "-"


def reading_of(data: Any, names: Sequence[str]) -> Reading:
    """A reading from JSON, ``{"time": "2026-11-27T10:00:00+01:00", "values": {"gauge 1": 0.3}}``.

    DataError if it is something else, or from the future.
    """
    if not isinstance(data, dict) or set(data) != {"time", "values"}:
        raise DataError('A reading is an object with "time" and "values", and nothing else.')
    values = data["values"]
    if not isinstance(values, dict):
        raise DataError('"values" is an object of numbers by the names of the sensors.')
    if unknown := [name for name in values if name not in names]:
        raise DataError(f"There is no sensor {unknown[0]!r:.80}: the sensors are {_listed(names)}.")
    if not values:
        raise DataError('"values" is empty: give a number, or null, for a sensor.')
    y = np.full(len(names), np.nan)
    for i, name in enumerate(names):
        value = values.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise DataError(f"{name} reads {value!r:.80}: give a finite number, or null where it reports nothing.")
        y[i] = value
    return Reading(_time(data["time"]), y)


def json_of(body: bytes) -> Any:
    """What a JSON text holds; DataError if it is none."""
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise DataError("The body is no JSON text.") from error


def _time(text: Any) -> float:
    """Seconds since 1970 of a time in words."""
    try:
        when = datetime.fromisoformat(text.strip() if isinstance(text, str) and len(text) < 64 else "?").timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise DataError(f"The time is {text!r:.80}: give it as 2026-11-27T10:00:00+01:00.") from error
    if not 0 <= when <= now() + _AHEAD:
        raise DataError(f"The time is {text!r:.80}, {'before 1970' if when < 0 else 'in the future'}: look at the "
                        "clocks.")
    return when


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


@dataclass
class Follower:
    """Follows a CSV file that grows, or is replaced: rows of it become readings of a history, each of them once.

    The first row has the names, ``time`` and those of the sensors in any order, of which some may be missing; fields
    are separated by commas, or by semicolons, where numbers may have a decimal comma. A row counts when its line has
    ended. Rows that cannot be read are told as problems.

    Parameters
    ----------
    path, names, history : Path, sequence of str, History
        The file, the sensors, and where readings and the place in the file are kept.
    units : sequence of str
        Of the sensors; the first row may repeat them, ``mill [mg/l]``.
    """

    path: Path
    names: Sequence[str]
    history: History
    units: Sequence[str] = ()
    trouble: str = field(default="", init=False)   # why the file cannot be read at present

    def step(self) -> int:
        """Take over some rows, if there are new ones; how many there were."""
        try:
            with open(self.path, "rb") as file:
                head = file.readline(_LONGEST)
                if not head.endswith(b"\n"):
                    self.trouble = "" if len(head) < _LONGEST else f"The first row of {self.path.name} has no end."
                    return 0
                place = self._place(head, os.fstat(file.fileno()))
                file.seek(place["offset"])
                data = file.read(_CHUNK)
        except OSError as error:
            self.trouble = f"The file of readings cannot be read ({error.strerror or error})."
            return 0
        try:
            separator, columns = self._columns(head)
        except FileError as error:
            self.trouble = str(error)
            return 0
        self.trouble = ""
        end = data.rfind(b"\n") + 1
        if not end:
            if len(data) < _CHUNK:
                return 0
            end = len(data)     # no row is that long
        return self._take(data[:end], place, separator, columns)

    def check(self) -> None:
        """Raise FileError where the file is there and its first row does not fit."""
        if self.path.is_file():
            with open(self.path, "rb") as file:
                head = file.readline(_LONGEST)
            if head.endswith(b"\n"):
                self._columns(head)

    def _place(self, head: bytes, file: os.stat_result) -> dict:
        """Up to where this file has been read; one with another first row, a smaller one or one put in its place is
        another file. Rows that are read once more are known.
        """
        mine = {"mark": zlib.crc32(head), "name": str(self.path), "node": file.st_ino}
        found = json.loads(self.history.place("file") or "{}")
        if any(found.get(key) != value for key, value in mine.items()) or found["offset"] > file.st_size:
            return mine | {"offset": len(head), "row": 1}
        return found

    def _columns(self, head: bytes) -> tuple[str, list[int]]:
        """The separator, and of each column the number of its sensor, -1 for the time."""
        try:
            text = head.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise FileError(f"{self.path} is no UTF-8 text: save it as UTF-8.") from error
        separator = ";" if ";" in text and "," not in text else ","
        names = [self._named(cell.strip()) for cell in next(csv.reader([text], delimiter=separator), [])]
        unknown = [name for name in names if name != "time" and name not in self.names]
        if names.count("time") != 1 or unknown or len(set(names)) < len(names) or len(names) < 2:
            what = f"has {unknown[0]!r:.80}, which is no sensor" if unknown else "does not have each name once"
            raise FileError(f"The first row of {self.path.name} {what}: name the columns time and sensors of "
                            f"{_listed(self.names)}.")
        return separator, [-1 if name == "time" else list(self.names).index(name) for name in names]

    def _named(self, cell: str) -> str:
        """The sensor of a column, which may say the sensor's unit behind its name; another unit is refused."""
        name, unit = (cell, None) if cell in self.names else split_unit(cell)
        if unit is None or name not in self.names or not self.units:
            return cell
        wanted = self.units[list(self.names).index(name)]
        if unit != wanted:
            raise FileError(f"{self.path.name} has {name!r} in {unit!r}, and the model takes {wanted or 'no unit'!r}: "
                            "write the readings in that unit.")
        return name

    def _take(self, data: bytes, place: dict, separator: str, columns: list[int]) -> int:
        """Keep the rows of whole lines."""
        readings, rows, problems = [], [], []
        lines = data.split(b"\n")[:-1] if data.endswith(b"\n") else [data]
        for number, line in enumerate(lines, place["row"] + 1):
            if not line.strip():
                continue
            try:
                readings.append(self._row(line, separator, columns))
                rows.append(number)
            except DataError as error:
                problems.append(f"Row {number} of {self.path.name} is left out: {error}")
        after = place | {"offset": place["offset"] + len(data), "row": place["row"] + len(lines)}
        outcome = self.history.add(readings, {"file": json.dumps(after)}, problems)
        others = [f"Row {row} of {self.path.name} is left out: other values are there of that time."
                  for row, what in zip(rows, outcome) if what == "other"]
        if others:
            self.history.add([], None, others)
        return len(lines)

    def _row(self, line: bytes, separator: str, columns: list[int]) -> Reading:
        """One row as a reading."""
        if len(line) > _LONGEST:
            raise DataError("It is too long.")
        try:
            cells = next(csv.reader(io.StringIO(line.decode().rstrip("\r")), delimiter=separator, strict=True), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"It is no row of a CSV file ({error}).") from error
        if len(cells) != len(columns):
            raise DataError(f"It has {len(cells)} fields, the first row {len(columns)}.")
        y, when = np.full(len(self.names), np.nan), 0.0
        for column, cell in zip(columns, cells):
            if column < 0:
                when = _time(cell)
            elif cell.strip().lower() not in _NOTHING:
                y[column] = self._number(cell.replace(",", ".") if separator == ";" else cell, self.names[column])
        return Reading(when, y)

    @staticmethod
    def _number(cell: str, name: str) -> float:
        try:
            value = float(cell) if "_" not in cell else math.inf
        except ValueError:
            value = math.inf
        if not abs(value) <= LARGEST:
            raise DataError(f"{name} reads {cell.strip()!r:.80}, which is no number.")
        return value
