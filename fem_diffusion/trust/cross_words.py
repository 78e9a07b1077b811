"""What cross-validation has found, in plain words."""

from typing import TYPE_CHECKING

import numpy as np

from fem_diffusion.measurements.table import instant
from fem_diffusion.page.words import number, percent

if TYPE_CHECKING:
    from fem_diffusion.trust.cross import CrossValidation

__all__ = ["judge"]

# A factor of the noise that matters, one with which nothing should be decided, and how sure it has to be.
_WRONG, _BAD, _SURE = 1.25, 1.75, 0.99
# Readings of which a course in time is told, share of the scatter that makes a drift, and of the mean an offset.
_COURSE, _DRIFT, _OFFSET = 12, 0.5, 0.6
_TOLD = 5


def judge(found: "CrossValidation") -> tuple[str, str, tuple[str, ...]]:
    """Verdict, light and sentences."""
    verdict, light, words = "consistent", "green", []
    for name in found.worst:
        words.append(_sensor(found, found.names.index(name)))
    if found.worst:
        verdict, light = "sensors disagree", "red"
        words.append(f"{'This sensor was' if len(found.worst) == 1 else 'These sensors were'} left out before the "
                     "others were predicted; check them, or leave them out: found.cleaned is without them.")
    if found.outliers.any():
        light = "yellow" if light == "green" else light
        words.append(_outliers(found))
    scale = found.noise
    if scale is not None:
        low, high = scale.interval(_SURE)
        larger, smaller = low > 1 and scale.value > _WRONG, high < 1 and scale.value < 1 / _WRONG
        if larger or smaller:
            word = "larger" if larger else "smaller"
            verdict = f"noise {word} than assumed" if verdict == "consistent" else verdict
            light = "red" if larger and scale.value > _BAD else light if light == "red" else "yellow"
            std = np.unique(np.round(scale.std, 12))
            size = f", a standard deviation of {number(std[0], digits=2)}," if len(std) == 1 else ""
            words.append(f"Readings that agree differ from each other as if the noise were {scale} times as large as "
                         f"assumed{size} where prior and model are right: train with that noise, or with a level that "
                         "is unknown" + (", or look for what the model has left out" if larger else "") + ".")
        else:
            words.append(f"The noise is as assumed as far as {scale.sensors} sensors tell: a factor of {scale}.")
    level = 0.9
    share, error = found.coverage[level]
    words.append(f"{percent(share)} ± {percent(error)} of the readings that agree are inside of what the others let "
                 f"expect with {percent(level)}.")
    if scale is None:
        words.append("The law of the noise has outliers or a level of its own, and no factor of it is told.")
    if found.without:
        words.append("Predictions are those of the Gaussian base: the network knows all sensors together only.")
    return verdict, light, tuple(words)


def _sensor(found: "CrossValidation", i: int) -> str:
    """How a sensor disagrees: once, by an offset, by a drift, or by scatter."""
    some = np.isfinite(found.residuals[:, i])
    t, name = found.residuals[some, i], found.names[i]
    if len(t) == 1:
        row = int(np.argmax(some))
        return (f"The others contradict sensor {name}: it reads {number(found.values[row, i])}, where "
                f"{number(found.mean[row, i])} ± {number(found.std[row, i], digits=2)} is expected, "
                f"{abs(t[0]):.1f} standard deviations away.")
    size = np.sqrt((t**2).mean())
    head = (f"The others contradict sensor {name}: it is {size:.1f} standard deviations away from what they let expect "
            f"(root mean square of {len(t):,} readings)")
    if len(t) >= _COURSE:
        x = np.linspace(-1, 1, len(t))
        # A line through the residuals, robust to some that are far off.
        third = max(1, len(t) // 3)
        first, last = np.median(t[:third]), np.median(t[-third:])
        middle = np.median(t)
        scatter = np.median(np.abs(t - middle - (last - first) / 2 * x * 1.5))
        if abs(last - first) > 3 * max(scatter, 1.0):
            return head + f". It drifts: {first:+.1f} in the first third of the time, {last:+.1f} in the last."
        if abs(middle) > 2 * max(scatter, 1.0):
            return head + f". It reads too {'high' if middle > 0 else 'low'} all the time, by {abs(middle):.1f}."
        return head + ". It scatters: it does not follow what the others see."
    return head + "."


def _outliers(found: "CrossValidation") -> str:
    rows, columns = np.nonzero(found.outliers)
    order = np.argsort(-np.abs(found.residuals[rows, columns]))
    told = [f"{found.names[j]} at {instant(found.times[i])} reads {number(float(found.values[i, j]))}, where "
            f"{number(float(found.mean[i, j]))} ± {number(float(found.std[i, j]), digits=2)} is expected"
            for i, j in zip(rows[order[:_TOLD]].tolist(), columns[order[:_TOLD]].tolist())]
    count, sensors = len(rows), len(set(columns.tolist()))
    more = f"; and {count - _TOLD} more" if count > _TOLD else ""
    return (f"{count} single reading{'s' * (count > 1)} of {sensors} sensor{'s' * (sensors > 1)} "
            f"disagree{'s' * (count == 1)} with the others at {'its' if count == 1 else 'their'} time: "
            f"{'; '.join(told)}{more}. If such readings are no mistakes, StudentNoise has outliers in its law.")
