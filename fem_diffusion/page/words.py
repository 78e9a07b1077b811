"""Numbers as people read them: three digits, with units; probabilities no finer than the samples can tell."""

import math
import re
from collections.abc import Iterable

__all__ = ["chance", "counted", "given", "interval", "number", "percent", "place", "plus_minus", "seconds", "tenths"]

_DIGITS = 3
_SMALL, _LARGE = 1e-3, 1e6      # beyond, powers of ten are written
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SPACE = "\u00a0"    # numbers and units stay together


def _united(text: str, unit: str | None) -> str:
    # A line may break between the words of "noise standard deviations", not within the brackets of "g/(m s)".
    return f"{text}{_SPACE}{re.sub(' (?=[^(]*[)])', _SPACE, unit)}" if unit else text


def _power(exponent: int) -> str:
    return f"{_SPACE}×{_SPACE}10{str(exponent).translate(_SUPERSCRIPT)}"


def _fixed(x: float, places: int) -> str:
    """A number with so many places after the point, which may be negative: then it is rounded before it."""
    text = f"{round(x, places):,.{max(0, places)}f}"
    return (text if any(c in "123456789" for c in text) else text.lstrip("-")).replace("-", "−")


def _exponent(x: float) -> int:
    return math.floor(math.log10(abs(x)))


def number(x: float, unit: str | None = None, digits: int = _DIGITS) -> str:
    """A number with three significant digits and its unit, in powers of ten where it is very small or large."""
    x = float(x)
    if not math.isfinite(x):
        return "unknown" if math.isnan(x) else "∞" if x > 0 else "−∞"
    if x == 0:
        return _united("0", unit)
    exponent = _exponent(x)
    exponent = _exponent(round(x, digits - 1 - exponent))   # 9.999 has two digits before the point
    if _SMALL <= abs(x) < _LARGE:
        return _united(_fixed(x, digits - 1 - exponent), unit)
    return _united(_fixed(x / 10.0**exponent, digits - 1) + _power(exponent), unit)


def given(x: float, unit: str | None = None) -> str:
    """A number that a user has given, with up to six digits and no more than it has."""
    x = float(x)
    digits = next((n for n in range(1, 6) if float(f"{x:.{n}g}") == x), 6)
    if x and _SMALL <= abs(x) < _LARGE:
        return _united(_fixed(x, max(0, digits - 1 - _exponent(x))), unit)
    return number(x, unit, digits)


def place(point: Iterable[float], unit: str | None = None) -> str:
    """Coordinates of a point, to three digits and without zeros at the end."""
    texts = [given(0.0 if abs(x) < 1e-12 else float(f"{x:.{_DIGITS}g}")) for x in point]
    return _united(texts[0] if len(texts) == 1 else f"({', '.join(texts)})", unit)


def tenths(x: float) -> str:
    """A number with one place after the point."""
    return _fixed(x, 1) if abs(x) < _LARGE else number(x)


def counted(n: int) -> str:
    """A whole number with separators of thousands."""
    return f"{int(n):,}"


def plus_minus(mean: float, std: float, unit: str | None = None) -> str:
    """A mean with its standard deviation, both to two digits of the latter."""
    if not (math.isfinite(mean) and math.isfinite(std)) or std <= 0:
        return number(mean, unit)
    return _joined((mean, std), std, f"{_SPACE}±{_SPACE}", unit)


def interval(low: float, high: float, unit: str | None = None) -> str:
    """The ends of an interval, to two digits of its width."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return number(low, unit)
    return _joined((low, high), high - low, " to ", unit)


def _joined(numbers: tuple[float, float], step: float, between: str, unit: str | None) -> str:
    """Two numbers, to two digits of a step but no more than six in all, with a common power of ten where it helps."""
    largest = max(map(abs, numbers))
    exponent = 0 if _SMALL <= largest < _LARGE else _exponent(largest)
    places = min(1 - _exponent(step), 5 - _exponent(largest)) + exponent
    text = between.join(_fixed(x / 10.0**exponent, places) for x in numbers)
    return _united(text if not exponent else f"({text}){_power(exponent)}", unit)


def percent(share: float) -> str:
    """A share in per cent, finer near its ends."""
    share = 100 * float(share)
    close = min(share, 100 - share)
    places = 0 if close >= 1 or close == 0 else 1 if close >= 0.1 else 2
    return f"{share:.{places}f}{_SPACE}%"


def chance(share: float, n: int) -> str:
    """A probability by the share of n samples; where none or all of them say so, a bound with 95 % confidence."""
    bound = 3 / max(3, n)
    if share <= 0:
        return f"below {percent(bound)}"
    return f"above {percent(1 - bound)}" if share >= 1 else percent(share)


def seconds(duration: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if duration >= 2 * size:
            return number(duration / size, unit, 2)
    return number(duration, "s", 2)
