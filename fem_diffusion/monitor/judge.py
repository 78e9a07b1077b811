"""What an answer means for a site: summaries, rules that hold, and how long they have held."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from fem_diffusion.monitor.bundle import LEVELS, Answer, Bundle
from fem_diffusion.monitor.rules import Rule, Rules

__all__ = ["TRUST", "Change", "Result", "judge"]

# The key of alarms that an answer cannot be trusted.
TRUST = "trust"


@dataclass(frozen=True)
class Result:
    """What is kept of an answer.

    Parameters
    ----------
    quantities : list or None
        Mean and the quantiles `LEVELS` of each quantity; None where the answer is not to be trusted.
    shares : dict
        By the key of a rule, the probability that its quantity is beyond its threshold.
    streaks : dict
        By the key of a rule, or `TRUST`, in how many readings in a row it has held.
    off : list
        What each sensor reads beside what the others let expect, in standard deviations; None where it reports nothing.
    doubts, notes, failed, worst : list of str
        As of an `Answer`, and the sensors at which the reading is unlike the training.
    """

    quantities: list[list[float]] | None
    shares: dict[str, float] = field(default_factory=dict)
    streaks: dict[str, int] = field(default_factory=dict)
    off: list[float | None] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    worst: list[str] = field(default_factory=list)

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def of(cls, text: str) -> "Result":
        """From JSON."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Change:
    """An alarm that is `on` from a reading on, or off; of a rule, or of trust, with its words."""

    key: str
    on: bool
    level: str = "alarm"
    title: str = ""
    message: str = ""


def judge(bundle: Bundle, rules: Rules, answer: Answer, before: Mapping[str, int]) -> tuple[Result, list[Change]]:
    """What to keep of an answer, and the alarms that it raises or ends; `before` are the streaks up to it.

    A reading that is not to be trusted tells nothing about rules: their streaks and alarms stay as they are.
    """
    streaks, shares, changes = dict[str, int](), dict[str, float](), []
    for rule in rules.rules:
        held = before.get(rule.key, 0)
        if answer.values is not None:
            shares[rule.key] = rule.share(answer.values[:, rule.quantity])
            held = held + 1 if shares[rule.key] >= rule.probability else 0
            if not held or held >= rule.readings:
                changes.append(_of_rule(rule, held > 0))
        streaks[rule.key] = held
    streaks[TRUST] = before.get(TRUST, 0) + 1 if answer.doubts else 0
    far = answer.distance is not None and answer.distance.far
    if not answer.doubts:
        changes.append(Change(TRUST, False))
    elif far or streaks[TRUST] >= rules.readings:
        changes.append(Change(TRUST, True, "alarm", "Do not trust the page", answer.doubts[0]))
    return Result(_summary(answer.values), shares, streaks, _off(bundle, answer), list(answer.doubts),
                  list(answer.notes), list(answer.failed),
                  [] if answer.distance is None else list(answer.distance.worst)), changes


def _of_rule(rule: Rule, on: bool) -> Change:
    return Change(rule.key, on, rule.level, rule.condition, rule.message)


def _summary(values: np.ndarray | None) -> list[list[float]] | None:
    """Mean and quantiles of quantities (n, q)."""
    if values is None:
        return None
    return np.vstack([values.mean(axis=0), np.quantile(values, LEVELS, axis=0)]).T.tolist()


def _off(bundle: Bundle, answer: Answer) -> list[float | None]:
    """Of each sensor, None where it reports nothing."""
    if answer.distance is None:
        return [None] * len(bundle.sensors)
    found = iter(answer.distance.sensors)
    return [None if name in answer.failed else round(float(np.clip(next(found), -1e6, 1e6)), 2)
            for name in bundle.names]
