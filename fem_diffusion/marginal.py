r"""A law of one number as the image of a standard normal one, :math:`x = F^{-1}(\Phi(z))`, accurate in both tails.

:math:`\Phi(z)` rounds to one from z = 8.3 on, so quantiles are taken from the nearer tail: :math:`F^{-1}(\Phi(z))`
below the median, and the inverse of the survival function, :math:`(1 - F)^{-1}(\Phi(-z))`, above it.
"""

from typing import Any

import numpy as np
from scipy import stats
from scipy.special import ndtr, ndtri_exp
from scipy.stats import norm

from fem_diffusion.errors import InputError

__all__ = ["Marginal"]

# Beyond, double precision knows no probabilities; and so far at least SciPy has to know quantiles.
_END, _LEAST, _STEP = 37.0, 5.0, 0.25
# How far a quantile may be from the one asked for, in standard deviations of the normal number.
_SAME = 1e-6
# SciPy's older and its newer distributions.
_METHODS = (("ppf", "isf", "logcdf", "logsf"), ("icdf", "iccdf", "logcdf", "logccdf"))


class Marginal:
    """Map from a standard normal number z to one of a given law, x.

    Where SciPy's quantiles lose a tail, more than five standard deviations out (mostly more than 8), the number stays
    at the last one that they know.

    Parameters
    ----------
    distribution : scipy.stats frozen distribution
        Continuous, of one number: ``scipy.stats.lognorm(0.5)``, ``scipy.stats.uniform(1, 2)``, one of SciPy's newer
        ones, or any object with ``ppf``, ``isf``, ``logcdf``, ``logsf``, ``logpdf`` and ``support``.
    name : str
        What messages call it.

    Attributes
    ----------
    bounds : tuple of float
        Between which all numbers lie; infinite where there is none.

    InputError if it is something else, or its quantiles do not invert its distribution function.
    """

    def __init__(self, distribution: Any, name: str = "distribution") -> None:
        self.distribution = distribution
        wrong = InputError(f"{name} is {_named(distribution)}: give one continuous distribution of one number, such as "
                           "scipy.stats.lognorm(0.5) or scipy.stats.uniform(1, 2) with its parameters; for unknowns "
                           "that are discrete or depend on each other take CallablePrior.")
        methods = [x for x in _METHODS if all(hasattr(distribution, f) for f in (*x, "logpdf", "support"))]
        if not methods or isinstance(distribution, type):
            raise wrong
        self._ppf, self._isf, self._logcdf, self._logsf = (getattr(distribution, f) for f in methods[0])
        self._reach = -_END, _END
        z = np.arange(_STEP, _END, _STEP)
        try:
            self.bounds = tuple(float(x) for x in distribution.support())
            with np.errstate(all="ignore"):
                reach = tuple(_last(z, self._missed(side * z)) for side in (-1, 1))
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:    # parameters that lack, or are many
            raise wrong from error
        if min(reach) < _LEAST:
            raise InputError(f"The quantiles of {name}, {self}, do not invert its distribution function: give another "
                             "distribution, or a TransformedPrior of a Gaussian number.")
        self._reach = -reach[0], reach[1]

    def of_normal(self, z: np.ndarray) -> np.ndarray:
        """Numbers x of the law, for standard normal z of any shape."""
        z = np.clip(z, self._reach[0], self._reach[1])
        x = np.array(z)
        for side, quantile in ((z < 0, self._ppf), (z >= 0, self._isf)):
            if side.any():
                x[side] = quantile(ndtr(-np.abs(z[side])))
        return np.clip(x, self.bounds[0], self.bounds[1])

    def to_normal(self, x: np.ndarray) -> np.ndarray:
        """Standard normal z of numbers x of the law, of any shape; infinite beyond its bounds."""
        below, above = (ndtri_exp(np.minimum(f(x), 0.0)) for f in (self._logcdf, self._logsf))
        return np.where(below < 0, below, -above)

    def slope(self, z: np.ndarray) -> np.ndarray:
        """Derivative dx/dz at z of any shape, zero where the number no longer changes."""
        with np.errstate(all="ignore"):
            slope = np.exp(norm.logpdf(z) - self.distribution.logpdf(self.of_normal(z)))
        there = np.isfinite(slope) & (z >= self._reach[0]) & (z <= self._reach[1])
        return np.where(there, slope, 0.0)

    def _missed(self, z: np.ndarray) -> np.ndarray:
        """Whether quantiles at z (n,) of one sign are not those asked for, by more than rounding of x."""
        x = self.of_normal(z)
        logs = self._logcdf(x) if z[0] < 0 else self._logsf(x)
        slope = np.exp(norm.logpdf(z) - self.distribution.logpdf(x))
        rounding = 8 * np.spacing(np.abs(x)) / slope
        off = np.abs(ndtri_exp(np.minimum(logs, 0.0)) + np.abs(z))
        return ~(off < _SAME + rounding) | ~np.isfinite(x)

    @property
    def settings(self) -> dict[str, Any]:
        """Name and parameters, from which `named` makes the law again; InputError if SciPy has none of that name."""
        frozen = self.distribution
        name = getattr(getattr(frozen, "dist", None), "name", "")
        if not isinstance(getattr(stats, name, None), stats.rv_continuous):
            raise InputError(f"{self} cannot be made again from a file: give one of SciPy's frozen distributions, such "
                             "as scipy.stats.lognorm(0.5).")
        shapes = {key: float(value) for key, value in frozen.kwds.items()}
        return {"name": name, "args": [float(x) for x in frozen.args], "kwds": shapes}

    @classmethod
    def named(cls, settings: Any) -> "Marginal":
        """What has these `settings`; InputError if they are of no distribution of SciPy, or parameters do not fit."""
        known = isinstance(settings, dict) and set(settings) == {"name", "args", "kwds"}
        family: Any = getattr(stats, str(settings["name"]), None) if known else None
        if not isinstance(family, stats.rv_continuous) or not isinstance(settings["args"], list) or not isinstance(
                settings["kwds"], dict) or not all(type(x) is float for x in (
                    *settings["args"], *settings["kwds"].values())):
            raise InputError(f"{settings!r:.200} is no distribution of SciPy: give name, args and kwds.")
        try:
            frozen = family(*settings["args"], **settings["kwds"])
        except (TypeError, ValueError) as error:
            raise InputError(f"{settings!r:.200} is no distribution of SciPy: {error}.") from error
        return cls(frozen)

    def __repr__(self) -> str:
        return _named(self.distribution)


def _last(z: np.ndarray, missed: np.ndarray) -> float:
    """The last of growing distances z (n,) before the first that is missed."""
    return float(z[np.argmax(missed) - 1]) if missed[1:].any() and not missed[0] else 0.0 if missed[0] else _END


def _named(distribution: Any) -> str:
    """A frozen distribution as it was written."""
    family = getattr(getattr(distribution, "dist", None), "name", None)
    if family is None:
        return repr(distribution)
    given = [f"{x}" for x in distribution.args] + [f"{key}={x}" for key, x in distribution.kwds.items()]
    return f"{family}({', '.join(given)})"
