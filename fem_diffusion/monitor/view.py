"""The state of a site in plain words, at present or at any time: what the page and its report show."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fem_diffusion.monitor.bundle import Bundle
from fem_diffusion.monitor.history import Alarm, History, Reading
from fem_diffusion.monitor.judge import TRUST, Result
from fem_diffusion.monitor.rules import Rule, Rules
from fem_diffusion.page import words

__all__ = ["state"]

# What a reader sees first, by light; readings that may wait without a word.
_WORDS = {"green": "All in order", "yellow": "Take care", "red": "Alarm", "grey": "Do not rely on this page"}
_FEW, _ALARMS, _PROBLEMS = 5, 50, 5
# Late readings in a row from which on it is a clock that is wrong.
_LATE = 3


def state(bundle: Bundle, rules: Rules, history: History, when: float | None = None,
          trouble: Sequence[str] = ()) -> dict[str, Any]:
    """The present state, or that of the last reading at a time in seconds since 1970 or before.

    `trouble` is what keeps readings from coming or being judged at present.
    """
    reading = history.last() if when is None else history.at(when)
    found = None if reading is None else history.result(reading.id)
    alarms = [alarm for alarm in history.alarms(when, _ALARMS) if alarm.level]
    waiting = history.waiting() if when is None else 0
    page: dict[str, Any] = {"title": rules.title, "clock": time.time(), "past": when is not None, "waiting": waiting,
                            "model": bundle.checksum[:12], "quantities": [], "sensors": [], "reading": None,
                            "map": None, "problems": []}
    if when is None:
        page["problems"] = [{"time": at, "text": text} for at, text in history.problems(_PROBLEMS)]
    if reading is None or found is None:
        sentences = list(trouble) or ["No reading has come yet." if when is None else "There is no reading so early."]
        return page | {"light": "grey", "word": "No reading", "sentences": sentences, "alarms": _shown(alarms, when)}
    model, result = found
    on = [alarm for alarm in alarms if alarm.ended is None or when is not None and alarm.ended > reading.time]
    trouble = list(trouble)
    if when is None and history.late(_LATE):
        trouble.append(f"The last {_LATE} readings came with times before one that was there, and raise no alarm: look "
                       "at the clocks.")
    light, sentences = _light(bundle.draws, rules, reading, result, on, alarms, trouble, when is None)
    if waiting > _FEW:
        sentences.append(f"{words.counted(waiting)} readings wait for their turn: what is shown is not the last one.")
    page |= {"light": light, "word": _WORDS[light], "sentences": sentences, "alarms": _shown(alarms, when),
             "reading": {"id": reading.id, "time": reading.time, "received": reading.received},
             "quantities": _quantities(bundle, rules, result), "sensors": _sensors(bundle, reading, result)}
    # Of another model the map cannot be drawn again.
    page["map"] = reading.id if bundle.area is not None and result.quantities and model == bundle.checksum else None
    return page


def _light(draws: int, rules: Rules, reading: Reading, result: Result, on: list[Alarm], alarms: list[Alarm],
           trouble: list[str], present: bool) -> tuple[str, list[str]]:
    """The traffic light, and why, the most important first."""
    held = {rule.key: rule for rule in rules.rules}
    red = [_why(alarm, held, result, draws) for alarm in on if alarm.level == "alarm" and alarm.key != TRUST]
    silent = [] if not present or time.time() - reading.received <= rules.silent_after else [
        f"No reading has come for {words.seconds(time.time() - reading.received)}."]
    doubts = [*silent, *trouble, *result.doubts]
    if not doubts and any(alarm.key == TRUST for alarm in on):
        doubts = ["Readings were not to be trusted."]
    notices = [_why(alarm, held, result, draws) for alarm in on if alarm.level == "notice"]
    soon = [_soon(rule, result, draws) for rule in rules.rules if result.streaks.get(rule.key)
            and rule.key not in {alarm.key for alarm in on}]
    seen = [f'Nobody has acknowledged the alarm "{alarm.title}", which is over.' for alarm in alarms
            if present and alarm.ended is not None and alarm.by is None]
    care = [*notices, *soon, *result.notes, *seen[:3]]
    if red:
        return "red", red + doubts + care
    if doubts:
        return "grey", doubts + care
    if care:
        return "yellow", care
    return "green", ["No rule is broken." if rules.rules else "No rules are laid down."]


def _why(alarm: Alarm, held: dict[str, Rule], result: Result, draws: int) -> str:
    """An alarm that is on, and how it stands."""
    title = alarm.title[:1].upper() + alarm.title[1:]
    share = result.shares.get(alarm.key)
    if share is None or alarm.key not in held:
        return f"{title}. {alarm.message}"
    streak = result.streaks.get(alarm.key, 0)
    row = f" in {streak} readings in a row" if streak > 1 else ""
    return f"{title}, with a probability of {words.chance(share, draws)}{row}. {alarm.message}"


def _soon(rule: Rule, result: Result, draws: int) -> str:
    """A rule that holds, but not for long enough."""
    share, streak = result.shares.get(rule.key), result.streaks[rule.key]
    chance = "" if share is None else f" with a probability of {words.chance(share, draws)}"
    return (f"{rule.condition[:1].upper()}{rule.condition[1:]}{chance}, in {streak} of the {rule.readings} readings in "
            "a row that raise an alarm.")


def _quantities(bundle: Bundle, rules: Rules, result: Result) -> list[dict[str, Any]]:
    """Each quantity in words and numbers."""
    shown = []
    for i, quantity in enumerate(bundle.quantities):
        mine = [rule for rule in rules.rules if rule.quantity == i]
        part: dict[str, Any] = {"name": quantity.name, "unit": quantity.unit, "text": None, "band": None,
                                "thresholds": [rule.threshold for rule in mine], "rules": []}
        if result.quantities is not None and i < len(result.quantities):
            _, low, _, middle, _, high = result.quantities[i]
            part |= {"text": words.number(middle, quantity.unit), "band": words.interval(low, high, quantity.unit)}
            part["rules"] = [{"text": f"{'above' if rule.above else 'below'} {words.given(rule.threshold, rule.unit)}",
                              "chance": words.chance(result.shares[rule.key], bundle.draws),
                              "holds": bool(result.streaks.get(rule.key))}
                             for rule in mine if rule.key in result.shares]
        shown.append(part)
    return shown


def _sensors(bundle: Bundle, reading: Reading, result: Result) -> list[dict[str, Any]]:
    """Each sensor with its reading and how that looks."""
    shown = []
    for sensor, value, off in zip(bundle.sensors, reading.y, [*result.off, *[None] * len(bundle.sensors)]):
        nothing = bool(np.isnan(value))
        # Beside a sensor that is far off the others cannot be judged.
        off = off if sensor.name in result.worst or not result.doubts else None
        look = "reports nothing" if nothing else "unlike the training" if sensor.name in result.worst else "as expected"
        shown.append({"name": sensor.name, "unit": sensor.unit, "point": sensor.point, "look": look,
                      "text": "–" if nothing else words.number(value, sensor.unit),
                      "off": "–" if off is None else words.tenths(off)})
    return shown


def _shown(alarms: list[Alarm], when: float | None) -> list[dict[str, Any]]:
    """Alarms for the page, as they were at a time of the past."""
    return [{"id": alarm.id, "level": "trust" if alarm.key == TRUST else alarm.level, "title": alarm.title,
             "message": alarm.message, "raised": alarm.raised,
             "ended": None if when is not None and alarm.ended is not None and alarm.ended > when else alarm.ended,
             "by": alarm.by, "acknowledged": alarm.acknowledged} for alarm in alarms]
