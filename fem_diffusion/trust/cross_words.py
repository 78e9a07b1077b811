"""What cross-validation has found, in plain words."""

from typing import TYPE_CHECKING

import numpy as np

from fem_diffusion.measurements.table import instant
from fem_diffusion.page.words import number, percent

if TYPE_CHECKING:
    from fem_diffusion.trust.cross import CrossValidation
    from fem_diffusion.trust.noise_scale import NoiseScale

__all__ = ["judge", "larger"]

# A factor of the noise that matters, one with which nothing should be decided, and how sure it has to be.
_WRONG, _BAD, _SURE = 1.25, 1.75, 0.99
# Readings of which a course in time is told, and outliers that are.
_COURSE, _TOLD = 12, 5
# An interval that is looked at, and how far its share has to be off, in standard errors and at least.
_LEVEL, _APART, _MATTERS = 0.9, 4.0, 0.05


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
    scale, word = found.noise, None
    if scale is not None:
        word = "larger" if larger(scale, _SURE) else "smaller" if _smaller(scale) else None
        low, high = scale.interval()
        std = np.unique(np.round(scale.std, 12))
        size = f", a standard deviation of {number(std[0], digits=2)}," if len(std) == 1 else ""
        if word and scale.value == scale.factors[0]:
            verdict = "too wide" if verdict == "consistent" else verdict
            words.append("Readings agree with each other better than prior and model let expect, whatever the noise: "
                         "the prior is too wide, or the emulator's own error counts for too much.")
        elif word:
            verdict = f"noise {word} than assumed" if verdict == "consistent" else verdict
            words.append(f"Readings that agree differ from each other as if the noise were {scale} times as large as "
                         f"assumed{size} where prior and model are right: train with that noise, or with a level that "
                         "is unknown" + (", or look for what the model has left out" if word == "larger" else "") + ".")
        else:
            start = "The noise may be as assumed" if low <= 1 <= high else "Whether the noise is as assumed is open"
            words.append(f"{start}: {scale.sensors} sensors do not exclude factors of it "
                         + (f"up to {high:.3g}." if low == 0 else f"from {low:.3g} to {high:.3g}."))
        if word or not low <= 1 <= high:
            light = "red" if word and scale.value > _BAD or light == "red" else "yellow"
    share, error = found.coverage[_LEVEL]
    text = (f"{percent(share)} ± {percent(error)} of the readings that agree are inside of what the others let expect "
            f"with {percent(_LEVEL)}")
    if abs(share - _LEVEL) > max(_APART * error, _MATTERS) and not word:
        light = "yellow" if light == "green" else light
        text += ": prior, model or the shape of the noise are not as assumed"
    return verdict, light, (*words, text + ".", *found.notes)


def larger(scale: "NoiseScale | str", level: float = 0.95) -> bool:
    """Whether the noise is larger than assumed, with this confidence, by a factor that matters, where one is told."""
    return not isinstance(scale, str) and scale.interval(level)[0] > 1 and scale.value > _WRONG


def _smaller(scale: "NoiseScale") -> bool:
    return scale.interval(_SURE)[1] < 1 and scale.value < 1 / _WRONG


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
