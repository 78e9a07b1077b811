"""Measurements by the same sensors at several times, and the file of readings that they come from."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from fem_diffusion.checks import LARGEST, check_all, check_array, check_choices, check_kind, check_path, check_text
from fem_diffusion.errors import DataError, InputError
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.measurements.table import Finding, Format, Table, instant, listed, read_table, row_words
from fem_diffusion.measurements.units import converted, split_unit
from fem_diffusion.observation.linear import Observation

if TYPE_CHECKING:
    from fem_diffusion.diffusion import GaussianNoise
    from fem_diffusion.model.model import Model
    from fem_diffusion.model.posteriors import Posteriors

__all__ = ["Measurements", "read_measurements"]

# Steps of time beyond so many usual ones are gaps; findings that a report shows.
_STEPS, _SHOWN = 1.5, 20


@dataclass(frozen=True, eq=False, repr=False)
class Measurements:
    """Readings of k sensors at n times, from `read_measurements`; printed as a report in words.

    ``measurements[::6]`` has some of the times, by a slice, a mask or their numbers.

    Parameters
    ----------
    times : numpy.ndarray
        Increasing, shape (n,): datetime64, in UTC where the file has time zones, or numbers in its own units.
    names : tuple of str
        Of the sensors, with units where they have any, such as "gauge 3 [mg/l]".
    values : numpy.ndarray
        Shape (n, k), in the units of the sensors, NaN where there is no reading.
    findings : tuple of Finding
        What was wrong with the file, and what was done about it.
    sensors : Observation or None
        They themselves, where they were given as such.
    """

    times: np.ndarray
    names: tuple[str, ...]
    values: np.ndarray
    findings: tuple[Finding, ...] = ()
    sensors: Observation | None = field(default=None)

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> "Measurements":
        """Those at some of the times; InputError where there is no such choice."""
        chosen = check_choices(index, len(self), "times")
        return replace(self, times=self.times[chosen], values=self.values[chosen])

    def condition_all(self, model: "Model", noise: "GaussianNoise | ArrayLike | None" = None) -> "Posteriors":
        """A posterior for each time, as `Model.condition_all` gives them (collective).

        The noise is for a model of a family, which takes these sensors, given to `read_measurements` as an Observation.
        InputError where the model is of other sensors.
        """
        if not model.problem.family:
            if noise is not None:
                raise InputError("The model is of fixed sensors with fixed noise: leave noise out.")
            if model.problem.names and model.problem.names != self.names:
                raise InputError(f"The model is of the sensors {listed(model.problem.names)}, and the measurements are "
                                 f"by {listed(self.names)}: read them for the sensors of the model.")
            return model.condition_all(self.values, times=self.times)
        if self.sensors is None:
            raise InputError("A model of a family takes the sensors themselves: give read_measurements an Observation, "
                             "such as point_sensors(U, points, names).")
        return model.condition_all(self.values, self.sensors, noise, times=self.times)

    def __str__(self) -> str:
        n, k = self.values.shape
        gaps = int(np.isnan(self.values).sum())
        lines = [f"Measurements: {n:,} times from {instant(self.times[0])} to {instant(self.times[-1])}, {k} sensors, "
                 f"{n * k - gaps:,} readings and {gaps:,} gaps ({gaps / (n * k):.1%})"]
        lines += [f"- {found.sensor + ': ' if found.sensor else ''}{found.words}" for found in self.findings[:_SHOWN]]
        more = len(self.findings) - _SHOWN
        return "\n".join(lines + [f"- and {more} more findings"] * (more > 0))

    __repr__ = __str__


def read_measurements(path: str | os.PathLike, sensors: Observation | Sequence[str], *,
                      limits: Sequence[float] | Mapping[str, Sequence[float]] | None = None, time: str = "time",
                      decimal: str = ".", delimiter: str | None = None, time_format: str | None = None,
                      encoding: str | None = None) -> Measurements:
    """Read a table of readings (collective where the sensors are an Observation: rank 0 reads).

    The first line names the columns. There is one of times and either one for each sensor, or "sensor", "value" and, if
    there is one, "unit". A sensor has the name of its column; a unit stands behind either in brackets, "gauge 3 [mg/l]"
    or "gauge 3 (ug/l)", and pint takes readings to the unit of the sensor. What a sensor or a column says of no unit is
    taken to be in that of the other, which is told.

    Empty cells, "NaN", "n/a" and the like are gaps. What cannot be a reading counts as a gap and is told by its row:
    text, numbers outside of the limits, and different readings of one sensor at one time. Rows that repeat others, have
    no time or another number of cells are left out and told; times are put in order.

    Parameters
    ----------
    sensors : Observation, or sequence of str
        They or their names.
    limits : pair of float, or dict of str to pair of float, optional
        Lowest and highest reading that can be, of all sensors or of some by their names, in their units.
    time, delimiter : str
        Name of the column of times; what stands between columns, found in the first line where left out.
    decimal : str
        "." or ",".
    time_format : str, optional
        As for ``datetime.strptime``, "%d.%m.%Y %H:%M"; ISO 8601, or plain numbers, where left out.
    encoding : str, optional
        UTF-8, or what the mark at the start of the file says, where left out.

    Raises
    ------
    FileError
        If the file is not there, no text, or in another encoding.
    DataError
        If it is empty, too large or no table of readings, a sensor has no column, a unit is missing or wrong, or most
        times or numbers cannot be read; the message says what to do.
    InstallError
        If units differ and pint is not installed.
    InputError
        If an argument is of the wrong kind.
    """
    path = check_path(path)
    how = _format(time, decimal, delimiter, time_format, encoding)
    given = sensors.names if isinstance(sensors, Observation) else check_all(sensors, "sensors", str, "names")
    names = tuple(given)
    if not names or len(set(names)) < len(names):
        raise InputError(f"The sensors are called {listed(names)}: give each a name of its own, such as "
                         "point_sensors(U, points, names=['gauge 1 [mg/l]', 'gauge 2 [mg/l]']).")
    bounds = _limits(limits, names)

    def run() -> tuple[np.ndarray, np.ndarray, tuple[Finding, ...]]:
        table = read_table(path, how)
        return _assembled(table, names, bounds, str(path))
    own = sensors if isinstance(sensors, Observation) else None
    times, values, findings = run() if own is None else on_root(own.U.comm, run)
    times.flags.writeable = values.flags.writeable = False
    return Measurements(times, names, values, findings, own)


def _format(time: str, decimal: str, delimiter: str | None, time_format: str | None, encoding: str | None) -> Format:
    for name, text in (("delimiter", delimiter), ("time_format", time_format), ("encoding", encoding)):
        check_kind(text, name, (str, type(None)), "a string")
    if decimal not in (".", ","):
        raise InputError(f"decimal is {decimal!r}: give '.' or ','.")
    if delimiter is not None and (len(delimiter) != 1 or delimiter in "\"\r\n"):
        raise InputError(f"delimiter is {delimiter!r}: give one character, such as ';' or '\\t'.")
    return Format(check_text(time, "time"), decimal, delimiter, time_format, encoding)


def _limits(limits: Any, names: tuple[str, ...]) -> np.ndarray:
    """Lowest and highest readings, shape (2, k)."""
    bounds = np.tile([[-LARGEST], [LARGEST]], (1, len(names)))
    if limits is None:
        return bounds
    known = {split_unit(name)[0]: i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    for name, pair in limits.items() if isinstance(limits, Mapping) else [(None, limits)]:
        if name is not None and name not in known:
            raise InputError(f"limits has {name!r}, which is no sensor: name some of {listed(names)}.")
        low, high = check_array(pair, "limits", (2,))
        if not low < high:
            raise InputError(f"limits is {(low, high)}: give the lowest reading and the highest one.")
        bounds[:, slice(None) if name is None else known[name]] = np.reshape([low, high], (2, 1) if name is None else 2)
    return bounds


def _assembled(table: Table, names: tuple[str, ...], bounds: np.ndarray,
               path: str) -> tuple[np.ndarray, np.ndarray, tuple[Finding, ...]]:
    """Times, values (n, k) and findings of a table."""
    findings: list[Finding] = []
    column, value = np.asarray(table.column), np.asarray(table.value)
    rows, sensor = np.asarray(table.rows), np.full(len(column), -1)
    owner = _owners(table.columns, names, path, findings)
    belongs = {name: names[i] for (name, _), i in zip(table.columns, owner) if i >= 0}
    findings += [replace(one, sensor=one.sensor and belongs[one.sensor]) for one in table.findings
                 if one.sensor is None or one.sensor in belongs]
    for i, (name, unit) in enumerate(table.columns):
        mine = column == i
        if owner[i] < 0:
            continue
        sensor[mine] = owner[i]
        inside, own = unit or split_unit(name)[1], split_unit(names[owner[i]])[1]
        if name != names[owner[i]] or unit:
            value[mine] = _in_units(value[mine], inside, own, names[owner[i]], path, findings)
    kept = sensor >= 0
    rows, sensor, value = rows[kept], sensor[kept], value[kept]
    for j, name in enumerate(names):
        low, high = bounds[:, j]
        wild = (sensor == j) & ((value < low) | (value > high))
        if wild.any():
            found = rows[wild].tolist()
            findings.append(Finding("out of range", tuple(found), f"{value[wild][0]:g} in {row_words(found)} is not "
                                    f"between {low:g} and {high:g}; counts as a gap", name))
            value[wild] = np.nan
    times, line = _times(table, findings)
    at = line[np.searchsorted(np.asarray(table.lines), rows)]
    values = np.full((len(times), len(names)), np.nan)
    _fill(values, at, sensor, value, rows, names, findings)
    findings += [Finding("silent", (), "no reading at all", name)
                 for j, name in enumerate(names) if np.isnan(values[:, j]).all()]
    return times, values, tuple(_joined(findings))


def _joined(findings: list[Finding]) -> list[Finding]:
    """What is said of several sensors in the same words, said once."""
    units = [found for found in findings if found.kind == "unit"]
    rest = [found for found in findings if found.kind != "unit"]
    for words in dict.fromkeys(found.words for found in units):
        who = [str(found.sensor) for found in units if found.words == words]
        some = Finding("unit", (), f"{len(who)} sensors: {words}")
        rest.append(Finding("unit", (), words, who[0]) if len(who) == 1 else some)
    return rest


def _owners(columns: list[tuple[str, str]], names: tuple[str, ...], path: str, findings: list[Finding]) -> list[int]:
    """The sensor of each column, -1 where it is of none."""
    plain = [split_unit(name)[0] for name in names]
    owner = []
    for name, _ in columns:
        base = split_unit(name)[0]
        same = [i for i, full in enumerate(names) if full == name] or [i for i, own in enumerate(plain) if own == base]
        owner.append(same[0] if len(same) == 1 else -1)
    lost = [name for i, name in enumerate(names) if i not in owner]
    if lost:
        there = [name for name, _ in columns]
        near = get_close_matches(lost[0], there, 1, 0.5)
        raise DataError(f"{path} has no readings of {listed(lost)}" + f" (is it {near[0]!r}?)" * bool(near) +
                        f", and {listed(there)}: call sensors as in the file, point_sensors(U, points, names=[...]).")
    used = [(owner[i], unit) for i, (_, unit) in enumerate(columns) if owner[i] >= 0]
    if len(set(used)) < len(used):
        twice = next(one for one in used if used.count(one) > 1)
        raise DataError(f"{path} has several columns of {names[twice[0]]!r}: leave one.")
    foreign = list(dict.fromkeys(name for i, (name, _) in enumerate(columns) if owner[i] < 0))
    if foreign:
        findings.append(Finding("unknown column", (), f"{listed(foreign)}: of no sensor; left out"))
    return owner


def _in_units(values: np.ndarray, inside: str | None, own: str | None, name: str, path: str,
              findings: list[Finding]) -> np.ndarray:
    """Readings in the unit of their sensor."""
    if inside is not None and own is None:
        raise DataError(f"{path} has {name!r} in {inside!r}, and the sensor has no unit: call it '{name} [{inside}]', "
                        "or by the unit that forward problem and noise are in.")
    if inside is None:
        if own is not None:
            findings.append(Finding("unit", (), f"no unit in the file; counts as {own}", name))
        return values
    assert own is not None
    if inside != own:
        findings.append(Finding("unit", (), f"from {inside} to {own}", name))
    return converted(values, inside, own, f"{path}: {name!r}")


def _times(table: Table, findings: list[Finding]) -> tuple[np.ndarray, np.ndarray]:
    """Increasing times (n,), and the number of each line's."""
    dates = not isinstance(table.times[0], float)
    found = np.array(table.times, dtype="datetime64[us]" if dates else float)
    late = np.flatnonzero(found[1:] < found[:-1]) + 1
    if len(late):
        rows = [table.lines[i] for i in late]
        findings.append(Finding("not in order", tuple(rows), f"{row_words(rows)}: earlier than the row before; put in "
                                "order"))
    times, number = np.unique(found, return_inverse=True)
    if len(times) > 2:
        steps = np.diff(times)
        usual = np.median(steps.astype(float))
        long = np.flatnonzero(steps.astype(float) > _STEPS * usual)
        if len(long):
            i = long[int(np.argmax(steps[long]))]
            count = "once" if len(long) == 1 else f"{len(long)} times, for longest"
            findings.append(Finding("missing rows", (), f"no row for longer than usual {count}, from "
                                    f"{instant(times[i])} to {instant(times[i + 1])}"))
    return times, number.ravel()


def _fill(values: np.ndarray, at: np.ndarray, sensor: np.ndarray, value: np.ndarray, rows: np.ndarray,
          names: tuple[str, ...], findings: list[Finding]) -> None:
    """Put readings in their places of values (n, k), of which some may be there twice."""
    there = np.isfinite(value)
    place, value, rows = at[there] * len(names) + sensor[there], value[there], rows[there]
    order = np.argsort(place, kind="stable")
    place, value, rows = place[order], value[order], rows[order]
    where, first, count = np.unique(place, return_index=True, return_counts=True)
    flat = values.reshape(-1)
    flat[where] = value[first]
    again, clash = [], {}
    for start, number in zip(first[count > 1], count[count > 1]):
        part = slice(start, start + number)
        if (value[part] == value[start]).all():
            again += rows[start + 1:start + number].tolist()
        else:
            flat[place[start]] = np.nan
            clash.setdefault(int(place[start]) % len(names), []).extend(rows[part].tolist())
    if again:
        found = sorted(set(again))
        findings.append(Finding("duplicate", tuple(found), f"{row_words(found)}: readings that are there already; left "
                                "out"))
    for j, found in sorted(clash.items()):
        findings.append(Finding("conflict", tuple(found), f"different readings at one time in {row_words(found)}; "
                                "count as a gap", names[j]))
