"""Readings, results and alarms of a site in an SQLite file: what is acknowledged is on the disk, whatever is killed.

A reading is kept before anybody is told that it has arrived; its result and the alarms that it raises or ends are
written together. So each reading is judged once, in the order of arrival, also across restarts.
"""

import contextlib
import json
import math
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import RLock

import numpy as np

from fem_diffusion import files
from fem_diffusion.checks import check_path
from fem_diffusion.errors import FileError
from fem_diffusion.monitor.judge import Change, Result

__all__ = ["Alarm", "History", "Reading", "opened"]

_VERSION, _PROBLEMS = 1, 500
_TABLES = """
CREATE TABLE reading (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL UNIQUE, received REAL NOT NULL,
                      y TEXT NOT NULL, late INTEGER NOT NULL, done INTEGER NOT NULL DEFAULT 0);
CREATE INDEX waiting ON reading (id) WHERE done = 0;
CREATE TABLE result (id INTEGER PRIMARY KEY REFERENCES reading, model TEXT NOT NULL, text TEXT NOT NULL);
CREATE TABLE alarm (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, level TEXT NOT NULL, title TEXT NOT NULL,
                    message TEXT NOT NULL, raised REAL NOT NULL, ended REAL, by TEXT, acknowledged REAL);
CREATE INDEX open_alarm ON alarm (key) WHERE ended IS NULL;
CREATE TABLE problem (id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, text TEXT NOT NULL);
CREATE TABLE place (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True, eq=False)
class Reading:
    """What sensors read (k,) at a time, in seconds since 1970; NaN where one reports nothing."""

    time: float
    y: np.ndarray
    id: int = 0
    received: float = 0.0
    late: bool = False      # it came after a later one


@dataclass(frozen=True)
class Alarm:
    """An alarm: raised and ended at times of readings, acknowledged `by` a name at a time of the clock."""

    id: int
    key: str
    level: str
    title: str
    message: str
    raised: float
    ended: float | None
    by: str | None
    acknowledged: float | None


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator["History"]:
    """The history in a file, which is made where it is missing, for this process alone.

    FileError if it is no such file, cannot be written, or another monitor keeps it.
    """
    path = check_path(path)
    with files.locked(path.with_name(path.name + ".lock"), f"The history {path}"):
        try:
            history = History(path)
        except sqlite3.Error as error:
            raise FileError(f"{path} is no history of a monitor, or cannot be written ({error}): name another file "
                            "with --history.") from error
        try:
            yield history
        finally:
            history.close()


class History:
    """An open history; every method may be called from any thread. sqlite3.Error where the disk fails."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._lock = RLock()
        self._base = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = FULL")
        version, = self._base.execute("PRAGMA user_version").fetchone()
        if version == 0 and not self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            with self._written():
                for statement in _TABLES.split(";"):
                    self._base.execute(statement)
                self._base.execute(f"PRAGMA user_version = {_VERSION}")
        elif version != _VERSION:
            raise sqlite3.DatabaseError("it is of another program or version")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._base.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """All that is written inside, or nothing."""
        with self._lock:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._base.execute("ROLLBACK")
                raise
            self._base.execute("COMMIT")

    def _all(self, query: str, *given: float | str | None) -> list[tuple]:
        with self._lock:
            return self._base.execute(query, given).fetchall()

    def add(self, readings: Sequence[Reading], places: dict[str, str] | None = None,
            problems: Sequence[str] = ()) -> list[str]:
        """Keep readings, with the place up to which a file has been read and what was wrong there: of each, in order,
        "new", "known" where it is there already, or "other" where other values are there of that time.
        """
        outcome = []
        with self._written():
            last = self._last()
            for reading in readings:
                there = self._base.execute("SELECT y FROM reading WHERE time = ?", (reading.time,)).fetchone()
                if there is not None:
                    outcome.append("known" if there[0] == _text(reading.y) else "other")
                    continue
                late = last is not None and reading.time < last
                self._base.execute("INSERT INTO reading (time, received, y, late) VALUES (?, ?, ?, ?)",
                                   (reading.time, time.time(), _text(reading.y), late))
                last = reading.time if last is None else max(last, reading.time)
                outcome.append("new")
            for name, value in (places or {}).items():
                self._base.execute("INSERT OR REPLACE INTO place VALUES (?, ?)", (name, value))
            for text in problems:
                self._base.execute("INSERT INTO problem (time, text) VALUES (?, ?)", (time.time(), text))
            if problems:
                self._base.execute("DELETE FROM problem WHERE id <= (SELECT max(id) FROM problem) - ?", (_PROBLEMS,))
        return outcome

    def _last(self) -> float | None:
        return self._base.execute("SELECT max(time) FROM reading").fetchone()[0]

    def claim(self, sensors: Sequence[tuple[str, str]]) -> None:
        """Keep names and units of the sensors; FileError where the readings that are there are of others."""
        mine, theirs = json.dumps(sensors), self.place("sensors")
        if theirs is None:
            self.add([], {"sensors": mine})
        elif theirs != mine:
            raise FileError("The history holds readings of other sensors, or in other units: name another file with "
                            "--history.")

    def late(self, count: int) -> bool:
        """Whether the last readings that came, so many of them, all came late."""
        found = self._all("SELECT late FROM reading ORDER BY id DESC LIMIT ?", count)
        return len(found) == count and all(late for late, in found)

    def place(self, name: str) -> str | None:
        """A place that `add` has kept."""
        found = self._all("SELECT value FROM place WHERE name = ?", name)
        return found[0][0] if found else None

    def problems(self, count: int) -> list[tuple[float, str]]:
        """The last times and texts of what was wrong with readings."""
        return self._all("SELECT time, text FROM problem ORDER BY id DESC LIMIT ?", count)

    def waiting(self) -> int:
        """Number of readings that are not judged yet."""
        return self._all("SELECT count(*) FROM reading WHERE done = 0")[0][0]

    def next(self) -> Reading | None:
        """The first reading that is not judged yet."""
        return self._reading("WHERE done = 0 ORDER BY id LIMIT 1")

    def reading(self, number: int) -> Reading | None:
        """A reading by its number."""
        return self._reading("WHERE id = ?", number)

    def at(self, when: float) -> Reading | None:
        """The last judged reading at a time or before."""
        return self._reading("WHERE done = 1 AND time <= ? ORDER BY time DESC LIMIT 1", when)

    def _reading(self, condition: str, *given: float) -> Reading | None:
        found = self._all(f"SELECT time, y, id, received, late FROM reading {condition}", *given)
        if not found:
            return None
        when, y, number, received, late = found[0]
        return Reading(when, _array(y), number, received, bool(late))

    def result(self, number: int) -> tuple[str, Result] | None:
        """The model's checksum and the result of a reading."""
        found = self._all("SELECT model, text FROM result WHERE id = ?", number)
        return None if not found else (found[0][0], Result.of(found[0][1]))

    def streaks(self) -> dict[str, int]:
        """Of the last judged reading that was not late."""
        found = self._all("SELECT text FROM result JOIN reading USING (id) WHERE late = 0 ORDER BY id DESC LIMIT 1")
        return Result.of(found[0][0]).streaks if found else {}

    def finish(self, reading: Reading, model: str, result: Result, changes: Sequence[Change]) -> None:
        """Keep the result of a reading with the alarms that it raises and ends."""
        with self._written():
            self._base.execute("INSERT INTO result VALUES (?, ?, ?)", (reading.id, model, result.text()))
            self._base.execute("UPDATE reading SET done = 1 WHERE id = ?", (reading.id,))
            for change in changes:
                there = self._base.execute("SELECT 1 FROM alarm WHERE key = ? AND ended IS NULL",
                                           (change.key,)).fetchone()
                if change.on and not there:
                    self._base.execute("INSERT INTO alarm (key, level, title, message, raised) VALUES (?, ?, ?, ?, ?)",
                                       (change.key, change.level, change.title, change.message, reading.time))
                elif not change.on and there:
                    self._end(change.key, reading.time)

    def keep_only(self, keys: set[str]) -> None:
        """End alarms of rules that are laid down no longer."""
        with self._written():
            for key, in self._base.execute("SELECT DISTINCT key FROM alarm WHERE ended IS NULL").fetchall():
                if key not in keys:
                    self._end(key, self._last() or time.time())

    def _end(self, key: str, when: float) -> None:
        self._base.execute("UPDATE alarm SET ended = ? WHERE key = ? AND ended IS NULL", (when, key))

    def acknowledge(self, number: int, by: str) -> bool | None:
        """Note who has seen an alarm; False where somebody was first, None where there is no such alarm."""
        with self._written():
            done = self._base.execute("UPDATE alarm SET by = ?, acknowledged = ? WHERE id = ? AND by IS NULL",
                                      (by, time.time(), number)).rowcount
            there = self._base.execute("SELECT 1 FROM alarm WHERE id = ?", (number,)).fetchone()
        return None if there is None else bool(done)

    def alarms(self, when: float | None = None, count: int = 50) -> list[Alarm]:
        """Alarms that are on, red ones first, then ended ones that nobody has acknowledged, then the last others; or
        those that were raised up to a time.
        """
        columns = "id, key, level, title, message, raised, ended, by, acknowledged"
        if when is None:
            found = self._all(f"SELECT {columns} FROM alarm ORDER BY (ended IS NOT NULL AND by IS NOT NULL), "
                              "(ended IS NOT NULL), (level = 'notice'), id DESC LIMIT ?", count)
        else:
            found = self._all(f"SELECT {columns} FROM alarm WHERE raised <= ? ORDER BY id DESC LIMIT ?", when, count)
        return [Alarm(*row) for row in found]

    def series(self, start: float, stop: float, most: int) -> list[tuple[float, int, Result]]:
        """Times, numbers and results of the judged readings between two times, evenly thinned out to `most`."""
        total, = self._all("SELECT count(*) FROM reading WHERE done = 1 AND time BETWEEN ? AND ?", start, stop)[0]
        step = max(1, math.ceil(total / most))
        # Counted back from the newest one, which is always shown.
        found = self._all(
            "SELECT time, id, text FROM (SELECT time, id, row_number() OVER (ORDER BY time DESC) - 1 AS place FROM "
            "reading WHERE done = 1 AND time BETWEEN ? AND ?) JOIN result USING (id) WHERE place % ? = 0 ORDER BY time",
            start, stop, step)
        return [(when, number, Result.of(text)) for when, number, text in found]

    def span(self) -> tuple[float, float] | None:
        """Times of the first and last judged reading."""
        first, last = self._all("SELECT min(time), max(time) FROM reading WHERE done = 1")[0]
        return None if first is None else (first, last)

    def last(self) -> Reading | None:
        """The last judged reading."""
        return self._reading("WHERE done = 1 ORDER BY time DESC LIMIT 1")


def _text(y: np.ndarray) -> str:
    return json.dumps([None if np.isnan(x) else float(x) for x in y])


def _array(text: str) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in json.loads(text)])
