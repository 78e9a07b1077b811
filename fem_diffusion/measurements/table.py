"""A table of readings as text: rows of a file, whatever it was written by, as times and numbers.

Wide tables have a column of times and one for each sensor; long ones have the columns "time", "sensor" and "value", and
may have "unit". Rows are numbered as editors and spreadsheets do it, the first line of the file being 1. What cannot be
right of a whole file is an error; what is wrong of some rows is left out and told.
"""

import csv
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fem_diffusion.errors import DataError, FileError

__all__ = ["Finding", "Format", "Table", "instant", "listed", "read_table", "row_words"]

_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
_DELIMITERS = ";\t|,"
_MISSING = {"", "-", "--", "---", "na", "n/a", "#n/a", "nan", "null", "none", "missing"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?", re.ASCII)
# Letters of a line, readings of a file, and characters of a cell in a message, at most.
_LONGEST, _MOST, _SHOWN = 1 << 20, 20_000_000, 40


@dataclass(frozen=True)
class Finding:
    """Something that was wrong with some rows of a file, and what was done about it.

    Parameters
    ----------
    kind : str
        "no number", "out of range", "duplicate", "conflict", "no time", "not in order", "missing rows",
        "wrong number of cells", "unit", "unknown column" or "silent".
    rows : tuple of int
        Of the file, the first line being 1; empty where it is not about single rows.
    words : str
        What was found and done.
    sensor : str or None
        Which one it is about.
    """

    kind: str
    rows: tuple[int, ...]
    words: str
    sensor: str | None = None


@dataclass(eq=False)
class Table:
    """What a file holds, reading by reading.

    Parameters
    ----------
    columns : list of tuple of str
        Sensor and unit as the file has them, "" where it has none.
    rows, column : array
        Line of each reading in the file, and its column.
    times : list of datetime or float
        Of each line that has one, by `lines`.
    value : array
        Of each reading, NaN where there is none.
    findings : list of Finding
    """

    columns: list[tuple[str, str]] = field(default_factory=list)
    rows: array = field(default_factory=lambda: array("q"))
    column: array = field(default_factory=lambda: array("q"))
    value: array = field(default_factory=lambda: array("d"))
    lines: array = field(default_factory=lambda: array("q"))
    times: list = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """How a file is written; see `read_measurements`."""

    time: str
    decimal: str
    delimiter: str | None
    time_format: str | None
    encoding: str | None


def read_table(path: Path, how: Format) -> Table:
    """The readings of a file. FileError where it is no readable text; DataError where it is no table of readings."""
    if not path.is_file():
        raise FileError(f"{path} is {'no file' if path.exists() else 'not there'}: give a file of readings.")
    try:
        with path.open("rb") as start:
            mark = start.read(3)
        encoding = how.encoding or next((name for head, name in _MARKS.items() if mark.startswith(head)), "utf-8")
        with path.open(encoding=encoding, newline="") as stream:
            return _Reader(path, how, stream).table
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error}): mend that first.") from error
    except (UnicodeError, LookupError) as error:
        raise FileError(f"{path} is no text in {how.encoding or 'UTF-8'} ({error}): name its encoding, such as "
                        "encoding='cp1252' for older Windows programs.") from error
    except csv.Error as error:
        raise FileError(f"{path} is no table ({error}): give a text file with a line for each time.") from error


class _Reader:
    """Reads a file line by line, so that a large one takes no more memory than its numbers."""

    def __init__(self, path: Path, how: Format, stream: object):
        self.path, self.how, self.stream, self.table, self.line = path, how, stream, Table(), 0
        self.wrong: dict[str, list[int]] = {"no time": [], "wrong number of cells": []}
        self.text: dict[int, list[tuple[int, str]]] = {}
        self.aware: bool | None = None
        header = self._header()
        time = self._place(header, how.time, None)
        places = [self._place(header, name, -1) for name in ("sensor", "value", "unit")]
        body = csv.reader(self._lines(), delimiter=self.delimiter)
        if min(places[:2]) >= 0:
            self._long(body, time, places, len(header))
        else:
            self._wide(body, time, header)
        self._judge()

    def _lines(self) -> Iterator[str]:
        """Lines of the file, but comments in front of its header."""
        while line := self.stream.readline(_LONGEST):   # pyright: ignore[reportAttributeAccessIssue]
            self.line += 1
            if len(line) == _LONGEST and not line.endswith(("\n", "\r")):
                raise FileError(f"{self.path} has a line {self.line} of more than {_LONGEST:,} characters: give a text "
                                "file with a line for each time.")
            yield line

    def _header(self) -> list[str]:
        first = next((line for line in self._lines() if line.strip() and not line.startswith("#")), "")
        if not first:
            raise DataError(f"{self.path} is empty: give a file whose first line names its columns.")
        self.delimiter = self.how.delimiter or max(_DELIMITERS, key=first.count)
        header = [cell.strip() for cell in next(csv.reader([first], delimiter=self.delimiter))]
        while header and not header[-1]:
            header.pop()
        twice = {name for name in header if name and header.count(name) > 1}
        if twice:
            raise DataError(f"{self.path} has {listed(sorted(twice))} twice in line {self.line}: name columns apart.")
        return header

    def _place(self, header: list[str], name: str, missing: int | None) -> int:
        """Number of a column, whatever the case of its name."""
        found = [i for i, cell in enumerate(header) if cell.casefold() == name.casefold()]
        if found:
            return found[0]
        if missing is not None:
            return missing
        raise DataError(f"{self.path} has no column {name!r} in line {self.line}, but {listed(header)}: say "
                        "time=... for the one of the times, and delimiter=... where columns are not told apart.")

    def _cells(self, body: Iterator[list[str]], count: int) -> Iterator[tuple[int, list[str]]]:
        """Rows with as many cells as the header, with their lines."""
        for cells in body:
            while len(cells) > count and not cells[-1].strip():
                cells.pop()
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != count:
                self.wrong["wrong number of cells"].append(self.line)
                continue
            yield self.line, cells

    def _wide(self, body: Iterator[list[str]], time: int, header: list[str]) -> None:
        places = [i for i, name in enumerate(header) if i != time and name]
        self.table.columns = [(header[i], "") for i in places]
        for line, cells in self._cells(body, len(header)):
            if self._time(line, cells[time]):
                for column, i in enumerate(places):
                    self._reading(line, column, cells[i])

    def _long(self, body: Iterator[list[str]], time: int, places: Sequence[int], count: int) -> None:
        known: dict[tuple[str, str], int] = {}
        sensor, value, unit = places
        for line, cells in self._cells(body, count):
            key = cells[sensor].strip(), cells[unit].strip() if unit >= 0 else ""
            if self._time(line, cells[time]):
                self._reading(line, known.setdefault(key, len(known)), cells[value])
        self.table.columns = list(known)

    def _time(self, line: int, cell: str) -> bool:
        """Keep the time of a line; whether there is one."""
        text, found = cell.strip(), None
        if self.how.time_format is not None:
            try:
                found = datetime.strptime(text, self.how.time_format)
            except ValueError:
                pass
        elif _NUMBER.fullmatch(number := text.replace(",", ".") if self.how.decimal == "," else text):
            found = float(number)
        else:
            try:
                found = datetime.fromisoformat(text)
            except ValueError:
                pass
        if found is None or isinstance(found, float) and not np.isfinite(found):
            self.wrong["no time"].append(line)
            return False
        if isinstance(found, datetime):
            aware = found.tzinfo is not None
            if self.aware not in (None, aware):
                raise DataError(f"{self.path} has times with and without a time zone, in line {line} {text!r}: give "
                                "all of them one.")
            self.aware = aware
            found = found.astimezone(UTC).replace(tzinfo=None) if aware else found
        if self.table.times and type(found) is not type(self.table.times[-1]):
            raise DataError(f"{self.path} has numbers and dates as times, in line {line} {text[:_SHOWN]!r}: write all "
                            "of them alike.")
        self.table.lines.append(line)
        self.table.times.append(found)
        return True

    def _reading(self, line: int, column: int, cell: str) -> None:
        text = cell.strip()
        number = text.replace(",", ".") if self.how.decimal == "," and _COMMA.fullmatch(text) else text
        value = np.nan
        if _NUMBER.fullmatch(number):
            value = float(number)
        elif number.casefold() not in _MISSING:
            self.text.setdefault(column, []).append((line, text))
        table = self.table
        if len(table.value) >= _MOST:
            raise DataError(f"{self.path} holds more than {_MOST:,} readings: give a part of it, or averages.")
        table.rows.append(line)
        table.column.append(column)
        table.value.append(value)

    def _judge(self) -> None:
        """Findings; errors of what is wrong with most of a file."""
        table, wrong, path = self.table, self.wrong, self.path
        good = len(table.lines)
        if not good and not any(wrong.values()):
            raise DataError(f"{path} has names of columns and no row below them: give one with readings.")
        for kind, remedy in (("wrong number of cells", "If decimals are commas, let columns be told apart by semicolons"
                              " and say decimal=','; otherwise say delimiter=..."),
                             ("no time", "Write times like 2026-03-01T12:00, or as numbers, or say time_format=..., "
                              "such as '%d.%m.%Y %H:%M'.")):
            rows = wrong[kind]
            if len(rows) > good:
                raise DataError(f"{path} has {'cells that do not fit the header' if kind[0] == 'w' else 'no time'} in "
                                f"{len(rows):,} rows, the first in line {rows[0]}, and {good:,} good rows. {remedy}.")
            if rows:
                table.findings.append(Finding(kind, tuple(rows), f"{row_words(rows)}: {kind}; left out"))
        counts = np.bincount(np.asarray(table.column)[np.isfinite(np.asarray(table.value))],
                             minlength=len(table.columns)) if len(table.value) else np.zeros(len(table.columns))
        for column, found in sorted(self.text.items()):
            name, (line, text) = table.columns[column][0], found[0]
            commas = [text for _, text in found if _COMMA.fullmatch(text)]
            if commas and self.how.decimal == ".":
                raise DataError(f"{path} has {commas[0]!r} for {name!r}: say decimal=',' where decimals are commas.")
            if len(found) > counts[column] and counts.any():
                table.findings.append(Finding(
                    "silent", tuple(line for line, _ in found), f"{len(found):,} cells are no numbers, such as "
                    f"{text[:_SHOWN]!r} in line {line}; {int(counts[column]):,} are", name))
                continue
            table.findings.append(Finding("no number", tuple(line for line, _ in found), f"{text[:_SHOWN]!r} in "
                                          f"{row_words([line for line, _ in found])}; counts as a gap", name))
        if not counts.any():
            text = next((found[0][1] for found in self.text.values()), "")
            raise DataError(f"{path} holds no numbers" + f", but {text[:_SHOWN]!r}" * bool(text) + ": give readings "
                            "such as 1.25, and say decimal=',' where decimals are commas.")


def instant(time: Any) -> str:
    """A time as short as it can be told."""
    return np.datetime_as_string(time, unit="auto") if isinstance(time, np.datetime64) else f"{time:g}"


def row_words(rows: Sequence[int]) -> str:
    """Rows in words, the first few by number."""
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"row {shown}" if len(rows) == 1 else f"{len(rows):,} rows ({shown})"


def listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:_SHOWN]) for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
