"""Rules of a site in a TOML file: what raises an alarm, in the units of the quantities; mistakes are told by line."""

import math
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fem_diffusion.checks import check_path
from fem_diffusion.errors import FileError, InputError
from fem_diffusion.monitor.bundle import Quantity
from fem_diffusion.page import words

__all__ = ["Rule", "Rules", "read_rules"]

_LARGEST_FILE, _MOST_RULES, _MOST_READINGS, _LONG = 2**18, 100, 1000, 300
_PAGE = {"title": str, "silent_after": float}
_TRUST = {"unlike": float, "readings": int}
_RULE = {"quantity": str, "above": float, "below": float, "unit": str, "probability": float, "readings": int,
         "message": str, "level": str}
_NAMES = {str: "a text in quotes", float: "a number", int: "a whole number"}


@dataclass(frozen=True)
class Rule:
    """An alarm where a quantity is above or below a threshold, with so much probability, in so many readings in a row.

    Attributes
    ----------
    quantity : int
        Its number among those of the model.
    level : {"alarm", "notice"}
        Red or yellow.
    """

    quantity: int
    name: str
    unit: str
    above: bool
    threshold: float
    probability: float
    readings: int
    message: str
    level: str = "alarm"

    @property
    def key(self) -> str:
        """What tells it from other rules; the message and the level may change."""
        return f"{self.name}|{'above' if self.above else 'below'}|{self.threshold!r}|{self.probability!r}"

    @property
    def condition(self) -> str:
        """What it looks for, in words."""
        return f"{self.name} {'above' if self.above else 'below'} {words.given(self.threshold, self.unit)}"

    def share(self, values: Any) -> float:
        """Share of samples (n,) of the quantity that are beyond the threshold."""
        return float(((values > self.threshold) if self.above else (values < self.threshold)).mean())


@dataclass(frozen=True)
class Rules:
    """What a site has laid down.

    Parameters
    ----------
    rules : tuple of Rule
        Of quantities.
    title : str
        Of the page.
    silent_after : float
        Seconds without a reading after which the state is unknown.
    unlike, readings : float, int
        Share of good readings that may be taken for ones unlike the training, and after how many of them in a row that
        is an alarm; one that is far away is one at once.
    """

    rules: tuple[Rule, ...] = ()
    title: str = "Monitor"
    silent_after: float = 900.0
    unlike: float = 0.01
    readings: int = 2


def read_rules(path: str | os.PathLike, quantities: Sequence[Quantity]) -> Rules:
    """Read the rules of a site about the quantities of its model.

    FileError if the file cannot be read or is no TOML, InputError if a rule does not fit; messages name the line.
    """
    path = check_path(path)
    try:
        with open(path, "rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error}): give a TOML file of rules.") from error
    if len(data) > _LARGEST_FILE:
        raise FileError(f"{path} is larger than {_LARGEST_FILE // 1024} KiB: give a TOML file of rules.")
    try:
        text = data.decode()
        found = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise FileError(f"{path}, line {line}: this is no UTF-8 text; save it as UTF-8.") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        last = data.count(b"\n") + 1
        reason = str(error).replace("at end of document", f"at its end, line {last}")
        raise FileError(f"{path} is no TOML ({reason}): mend that place.") from error
    return _Reader(str(path), text, quantities).rules(found)


@dataclass(frozen=True)
class _Reader:
    path: str
    text: str
    quantities: Sequence[Quantity]

    def rules(self, found: dict) -> Rules:
        """All that the file holds."""
        for name in found:
            if name not in ("page", "trust", "rule"):
                raise self.error(lambda x: name in x, f"{name!r} is unknown: there are [page], [trust] and [[rule]]")
        page, trust = (self.table(found, name, kinds) for name, kinds in (("page", _PAGE), ("trust", _TRUST)))
        rules = found.get("rule", [])
        if not isinstance(rules, list) or len(rules) > _MOST_RULES or not all(isinstance(x, dict) for x in rules):
            raise self.error(lambda x: "rule" in x, f"give rules as [[rule]], at most {_MOST_RULES}")
        made = tuple(self.rule(i, part) for i, part in enumerate(rules))
        for i, rule in enumerate(made):
            if rule.key in {other.key for other in made[:i]}:
                raise self.error(lambda x: len(x.get("rule", [])) > i, f"rule {i + 1} is there twice")

        def inside(part: dict, table: str, key: str, default: Any, low: float, high: float) -> Any:
            value = part.get(key, default)
            if not low <= value <= high:
                raise self.error(lambda x: key in x.get(table, {}), f"{key} is {value}: give {low:g} to {high:g}")
            return value
        title = page.get("title", "Monitor")
        self.text_of(title, lambda x: "title" in x.get("page", {}), "title")
        return Rules(made, title, float(inside(page, "page", "silent_after", 900.0, 1, 1e7)),
                     float(inside(trust, "trust", "unlike", 0.01, 1e-9, 0.01)),
                     inside(trust, "trust", "readings", 2, 1, _MOST_READINGS))

    def rule(self, i: int, part: dict) -> Rule:
        """Rule i, from zero."""
        def at(key: str) -> Callable[[dict], bool]:
            return lambda x: len(x.get("rule", [])) > i and key in x["rule"][i]

        def there(x: dict) -> bool:
            return len(x.get("rule", [])) > i
        self.kinds(part, _RULE, at)
        for key in ("quantity", "probability", "message"):
            if key not in part:
                raise self.error(there, f"rule {i + 1} has no {key}")
        names = [quantity.name for quantity in self.quantities]
        if part["quantity"] not in names:
            raise self.error(at("quantity"), f"{part['quantity']!r} is no quantity of the model, which has "
                             f"{', '.join(map(repr, names))}")
        number = names.index(part["quantity"])
        unit = self.quantities[number].unit
        if part.get("unit", unit) != unit:
            raise self.error(at("unit"), f"{part['quantity']!r} is in {unit or 'no unit'!r}, not in {part['unit']!r}: "
                             "give the threshold in the unit of the model")
        if ("above" in part) == ("below" in part):
            raise self.error(there, f"rule {i + 1} needs one of above and below")
        side = "above" if "above" in part else "below"
        threshold, probability = float(part[side]), float(part["probability"])
        if not math.isfinite(threshold):
            raise self.error(at(side), f"{side} is {threshold}: give a finite number")
        if not 0 < probability < 1:
            raise self.error(at("probability"), f"probability is {probability:g}: give a number between 0 and 1")
        readings = part.get("readings", 1)
        if not 1 <= readings <= _MOST_READINGS:
            raise self.error(at("readings"), f"readings is {readings}: give 1 to {_MOST_READINGS}")
        level = part.get("level", "alarm")
        if level not in ("alarm", "notice"):
            raise self.error(at("level"), f"level is {level!r}: give \"alarm\" or \"notice\"")
        self.text_of(part["message"], at("message"), "message")
        return Rule(number, part["quantity"], unit, side == "above", threshold, probability, readings, part["message"],
                    level)

    def table(self, found: dict, name: str, kinds: dict) -> dict:
        """A table of settings of these kinds."""
        part = found.get(name, {})
        if not isinstance(part, dict):
            raise self.error(lambda x: name in x, f"give {name} as [{name}]")
        self.kinds(part, kinds, lambda key: lambda x: isinstance(x.get(name), dict) and key in x[name])
        return part

    def kinds(self, part: dict, kinds: dict, at: Callable[[str], Callable[[dict], bool]]) -> None:
        """Every setting is known and of its kind; a whole number will do for a number."""
        for key, value in part.items():
            if key not in kinds:
                raise self.error(at(key), f"{key!r} is unknown: there are {', '.join(kinds)}")
            kind = kinds[key]
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise self.error(at(key), f"{key} is {value!r}: give {_NAMES[kind]}")

    def text_of(self, text: str, there: Callable[[dict], bool], name: str) -> None:
        """A short text that is not empty."""
        if not text.strip() or len(text) > _LONG:
            raise self.error(there, f"{name} is empty or longer than {_LONG} characters")

    def error(self, there: Callable[[dict], bool], reason: str) -> InputError:
        """The error at the first line with which the text, cut off after it, holds something."""
        lines, number = self.text.split("\n"), 0
        for number in range(1, len(lines) + 1):
            # What is cut off in the middle of a value is no TOML yet.
            try:
                if there(tomllib.loads("\n".join(lines[:number]))):
                    break
            except (tomllib.TOMLDecodeError, AttributeError, TypeError):
                continue
        return InputError(f"{self.path}, line {number}: {reason}.")
