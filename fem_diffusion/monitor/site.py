"""A site at work: readings come in, are judged one after the other by a thread, and can be looked at any time."""

import logging
import sqlite3
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from fem_diffusion.monitor.bundle import Answer, Bundle
from fem_diffusion.monitor.history import History, Reading
from fem_diffusion.monitor.incoming import Follower
from fem_diffusion.monitor.judge import TRUST, judge
from fem_diffusion.monitor.rules import Rules
from fem_diffusion.monitor.view import state

__all__ = ["Site"]

_LOG = logging.getLogger("fem_diffusion.monitor")
# Seconds between looks at the file of readings, and after a failure of the disk; maps that are kept; points of a line.
_PAUSE, _AGAIN, _MAPS, _POINTS = 0.5, 2.0, 8, 600


class Site:
    """A model with rules, a history and, perhaps, a file of readings that is followed.

    `start` judges what waits and what comes until `stop`. FileError if the history is of other sensors.
    """

    def __init__(self, bundle: Bundle, rules: Rules, history: History, follower: Follower | None = None) -> None:
        self.bundle, self.rules, self.history, self.follower = bundle, rules, history, follower
        self._woken, self._stopped = threading.Event(), threading.Event()
        history.claim([(sensor.name, sensor.unit) for sensor in bundle.sensors])
        self._trouble = ""
        self._maps: OrderedDict[int, dict | None] = OrderedDict()
        self._drawing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def start(self) -> None:
        """Begin to judge readings."""
        self.history.keep_only({rule.key for rule in self.rules.rules} | {TRUST})
        self._thread.start()

    def stop(self) -> None:
        """End after the reading that is being judged."""
        self._stopped.set()
        self._woken.set()
        self._thread.join()

    def add(self, reading: Reading) -> str:
        """Keep a reading: "new", "known", or "other" where other values are there of that time."""
        outcome, = self.history.add([reading])
        self._woken.set()
        return outcome

    def state(self, when: float | None = None) -> dict[str, Any]:
        """The state at present, or at a time."""
        trouble = [] if when is not None else [x for x in (self._trouble, self.follower and self.follower.trouble) if x]
        return state(self.bundle, self.rules, self.history, when, trouble)

    def series(self, start: float, stop: float) -> dict[str, Any]:
        """Quantiles of the quantities between two times, None where an answer was not to be trusted."""
        rows = self.history.series(start, stop, _POINTS)
        count = len(self.bundle.quantities)
        lines = [[None if result.quantities is None or len(result.quantities) != count else
                  [float(f"{x:.6g}") for x in result.quantities[i][1:]] for _, _, result in rows] for i in range(count)]
        return {"times": [when for when, _, _ in rows], "lines": lines, "span": self.history.span()}

    def mesh(self) -> dict[str, Any] | None:
        """Corners and cells of the map, names and units."""
        area = self.bundle.area
        if area is None:
            return None
        return {"axes": area.axes, "corners": _short(area.corners.ravel(), 8), "cells": area.cells.ravel().tolist(),
                "name": area.title, "unit": area.unit, "length": area.length, "slice": area.where}

    def answer(self, reading: Reading) -> Answer:
        """What a reading tells: the same whenever it is asked."""
        return self.bundle.answer(reading.y, reading.id, self.rules.unlike)

    def map(self, number: int) -> dict[str, Any] | None:
        """What the map shows of a reading at its corners; None where there is none to be trusted."""
        with self._drawing:
            if number not in self._maps:
                reading, found = self.history.reading(number), self.history.result(number)
                picture = None
                if reading and found and found[0] == self.bundle.checksum and self.bundle.area is not None:
                    answer = self.answer(reading)
                    picture = None if answer.values is None else self.bundle.picture(answer)
                self._maps[number] = picture and {
                    name: [_short(row) for row in part] if part.ndim > 1 else _short(part)
                    for name, part in picture.items()}
                while len(self._maps) > _MAPS:
                    self._maps.popitem(last=False)
            self._maps.move_to_end(number)
            return self._maps[number]

    def _run(self) -> None:
        """Judge readings until the site stops; a failure of the disk is told on the page, and all is tried again."""
        while not self._stopped.is_set():
            try:
                taken = 0 if self.follower is None else self.follower.step()
                judged = self._judge()
                self._trouble = ""
                if not taken and not judged:
                    self._woken.wait(_PAUSE)
                    self._woken.clear()
            except sqlite3.Error as error:
                _LOG.exception("The history fails.")
                self._trouble = f"The history cannot be written ({error}): readings are not judged."
                self._stopped.wait(_AGAIN)
            except Exception as error:
                _LOG.exception("The monitor fails.")
                self._trouble = f"The monitor fails ({type(error).__name__}), as its log says: nothing is judged."
                self._stopped.wait(_AGAIN)

    def _judge(self) -> bool:
        """Judge the next reading, if one waits."""
        reading = self.history.next()
        if reading is None:
            return False
        try:
            answer = self.answer(reading)
        except Exception as error:      # whatever a model does with a reading, the next one is judged
            _LOG.exception("The model fails at the reading %s.", reading.id)
            answer = Answer(None, (), (f"The model fails at this reading ({type(error).__name__}).",))
        before = self.history.streaks()
        result, changes = judge(self.bundle, self.rules, answer, before)
        # What comes late is shown in its place, and raises nothing.
        self.history.finish(reading, self.bundle.checksum, result, [] if reading.late else changes)
        return True


def _short(values: np.ndarray, digits: int = 5) -> list[float]:
    """Numbers (n,) to so many digits, as short texts."""
    return [float(f"{x:.{digits}g}") for x in values]
