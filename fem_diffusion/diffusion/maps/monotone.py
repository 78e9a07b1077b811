r"""Monotone maps of single numbers, :math:`u_i = S_i(g_i(x_i))`: to a scale on which a Gaussian says more.

The scale g is the number itself, its logarithm, :math:`\operatorname{asinh}((x - c) / a)`, which is linear around c and
logarithmic far from it, or :math:`\Phi^{-1}(F(x))` of a known law F. On it there may be a rational quadratic spline S
(Gregory and Delbourgo 1982, doi:10.1093/imanum/2.2.123), whose inverse is that of a quadratic, and which goes on
straight beyond its knots, so it never saturates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fem_diffusion.diffusion.maps.laws import log_slope, of_normal, to_normal
from fem_diffusion.diffusion.tensors import Tensors
from fem_diffusion.errors import InputError
from fem_diffusion.files import Content
from fem_diffusion.marginal import Marginal

__all__ = ["KINDS", "MonotoneMap", "pack_map", "unpack_map"]

KINDS = "identity", "log", "asinh", "law"
# Where the exponential leaves what double precision squares.
_MOST = 340.0
_ALL = slice(None)


@dataclass(frozen=True, eq=False, repr=False)
class MonotoneMap(Tensors):
    """One increasing map for each of n numbers.

    Parameters
    ----------
    kinds : tuple of str
        Of `KINDS`, one for each number.
    centre, unit : Tensor
        c and a > 0 of "asinh", shape (n,) each.
    knots, values, slopes : Tensor
        Of the splines, strictly increasing and positive slopes, shape (n, m) each; m = 0 for none.
    laws : tuple of Marginal or None
        F of "law".
    """

    kinds: tuple[str, ...]
    centre: Tensor
    unit: Tensor
    knots: Tensor
    values: Tensor
    slopes: Tensor
    laws: tuple[Marginal | None, ...]

    @classmethod
    def of(cls, kinds: tuple[str, ...], centre: Tensor | None = None, unit: Tensor | None = None,
           laws: tuple[Marginal | None, ...] | None = None) -> "MonotoneMap":
        """Of scales alone."""
        none = torch.zeros(len(kinds), 0, dtype=torch.float64)
        zero = torch.zeros(len(kinds), dtype=torch.float64)
        return cls(tuple(kinds), zero if centre is None else centre, zero + 1 if unit is None else unit, none, none,
                   none, (None,) * len(kinds) if laws is None else tuple(laws))

    def __len__(self) -> int:
        return len(self.kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Mapped numbers (..., n); infinite, or not a number, of those that do not `contain` x."""
        u = self._each(x, self._scale)
        return self._spline(u)[0] if self.knots.shape[1] else u

    def inverse(self, u: Tensor) -> Tensor:
        """Numbers (..., n) of mapped ones, inside all bounds; differentiable."""
        return self._each(self._unspline(u) if self.knots.shape[1] else u, self._unscale)

    def log_slope(self, x: Tensor) -> Tensor:
        """Logarithm of du/dx at numbers (..., n)."""
        found = self._each(x, self._log_scale)
        return found + self._spline(self._each(x, self._scale))[1] if self.knots.shape[1] else found

    def contains(self, x: Tensor) -> Tensor:
        """Whether all numbers (..., n) are where the map is defined, shape (...)."""
        return torch.isfinite(self._each(x.detach(), self._scale)).all(-1)

    def select(self, index: Tensor) -> "MonotoneMap":
        """Maps of some of the numbers, by their places, of which some may come again."""
        places = index.tolist()
        return MonotoneMap(tuple(self.kinds[i] for i in places), self.centre[index], self.unit[index],
                           self.knots[index], self.values[index], self.slopes[index],
                           tuple(self.laws[i] for i in places))

    def __repr__(self) -> str:
        return f"MonotoneMap({self.words})"

    @property
    def words(self) -> str:
        """What kinds there are, and of how many numbers."""
        parts = [f"{kind} of {self.kinds.count(kind)}" for kind in KINDS if kind in self.kinds]
        return ", ".join(parts) + ", made Gaussian" * bool(self.knots.shape[1])

    def _each(self, x: Tensor, function: Callable[[str, Tensor, Any, Marginal | None], Tensor]) -> Tensor:
        """A function of each kind's numbers, put together in their order."""
        if len(self._places) == 1:      # many small calls cost more than what they do
            kind, _, law = self._places[0]
            return function(kind, x, _ALL, law)
        parts = [function(kind, x[..., places], places, law) for kind, places, law in self._places]
        return torch.cat(parts, -1)[..., self._order]

    @cached_property
    def _places(self) -> list[tuple[str, Tensor, Marginal | None]]:
        """Kinds, the places of their numbers, and the law where there is one."""
        keys = list(dict.fromkeys((kind, id(law)) for kind, law in zip(self.kinds, self.laws)))
        mine = [[i for i, (kind, law) in enumerate(zip(self.kinds, self.laws)) if (kind, id(law)) == key]
                for key in keys]
        return [(self.kinds[places[0]], torch.tensor(places, device=self.centre.device), self.laws[places[0]])
                for places in mine]

    @cached_property
    def _order(self) -> Tensor:
        return torch.cat([places for _, places, _ in self._places]).argsort()

    def _scale(self, kind: str, x: Tensor, places: Any, law: Marginal | None) -> Tensor:
        if kind == "log":
            return torch.where(x > 0, x, torch.nan).log()
        if kind == "asinh":
            return torch.asinh((x - self.centre[places]) / self.unit[places])
        return x if law is None else to_normal(law, x)

    def _unscale(self, kind: str, u: Tensor, places: Any, law: Marginal | None) -> Tensor:
        if kind == "log":
            return u.clamp(-_MOST, _MOST).exp()
        if kind == "asinh":
            return self.centre[places] + self.unit[places] * u.clamp(-_MOST, _MOST).sinh()
        return u if law is None else of_normal(law, u)

    def _log_scale(self, kind: str, x: Tensor, places: Any, law: Marginal | None) -> Tensor:
        if kind == "log":
            return -torch.where(x > 0, x, torch.nan).log()
        if kind == "asinh":
            unit = self.unit[places]
            return -torch.hypot((x - self.centre[places]) / unit, torch.ones_like(x)).log() - unit.log()
        return torch.zeros_like(x) if law is None else log_slope(law, x)

    def _piece(self, at: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
        """Of numbers (..., n) between `ends` (n, m): x0, y0, width, height and slopes at both sides of their piece."""
        m, flat = ends.shape[1], at.detach().reshape(-1, len(self)).T.contiguous()
        index = (torch.searchsorted(ends, flat) - 1).clamp(0, m - 2)

        def there(part: Tensor, step: int = 0) -> Tensor:
            return part.gather(1, index + step).T.reshape(at.shape)
        x0, y0 = there(self.knots), there(self.values)
        return (x0, y0, there(self.knots, 1) - x0, there(self.values, 1) - y0, there(self.slopes),
                there(self.slopes, 1))

    def _spline(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and logarithms of slopes at numbers (..., n) on their scales."""
        x0, y0, width, height, left, right = self._piece(x, self.knots)
        s, share = height / width, ((x - x0) / width).clamp(0, 1)
        rest = share * (1 - share)
        below = s + (left + right - 2 * s) * rest
        y = y0 + height * (s * share.square() + left * rest) / below
        log = (2 * s.log() + (right * share.square() + 2 * s * rest + left * (1 - share).square()).log()
               - 2 * below.log())
        y = y + (x - self.knots[:, 0]).clamp(max=0) * self.slopes[:, 0]
        return y + (x - self.knots[:, -1]).clamp(min=0) * self.slopes[:, -1], log

    def _unspline(self, y: Tensor) -> Tensor:
        """Numbers (..., n) on their scales, of values."""
        x0, y0, width, height, left, right = self._piece(y, self.values)
        s, rise = height / width, torch.minimum((y - y0).clamp(min=0), height)
        bend = rise * (left + right - 2 * s)
        a, b, c = height * (s - left) + bend, height * left - bend, -s * rise
        root = (b.square() - 4 * a * c).clamp(min=0).sqrt()
        x = x0 + width * (2 * c / (-b - root))
        x = x + (y - self.values[:, 0]).clamp(max=0) / self.slopes[:, 0]
        return x + (y - self.values[:, -1]).clamp(min=0) / self.slopes[:, -1]


_PARTS = "centre", "unit", "knots", "values", "slopes"


def pack_map(name: str, part: MonotoneMap | None) -> tuple[dict, dict]:
    """Arrays and values of a file that holds a map, or none; InputError if a law has no name in SciPy."""
    if part is None:
        return {}, {name: None}
    laws = [law and law.settings for law in part.laws]
    return {f"{name}.{key}": getattr(part, key).cpu().numpy() for key in _PARTS}, {
        name: {"kinds": list(part.kinds), "laws": laws}}


def unpack_map(content: Content, name: str, n: int) -> MonotoneMap | None:
    """What `pack_map` put into a file, of n numbers; FileError unless it is an increasing map of these."""
    found = content.value(name, dict, type(None))
    if found is None:
        return None
    centre, unit, knots, values, slopes = (torch.from_numpy(content.array(f"{name}.{key}", *shape)) for key, shape in (
        ("centre", (n,)), ("unit", (n,)), ("knots", (n, None)), ("values", (n, None)), ("slopes", (n, None))))
    m, kinds, laws = knots.shape[1], found.get("kinds"), found.get("laws")
    if not isinstance(kinds, list) or not isinstance(laws, list) or len(kinds) != n or len(laws) != n or not all(
            kind in KINDS and (kind == "law") == (law is not None) for kind, law in zip(kinds, laws)) or (
            m == 1 or values.shape[1] != m or slopes.shape[1] != m or not bool((unit > 0).all())) or not all(
            bool((x > 0).all()) for x in (knots.diff(dim=1), values.diff(dim=1), slopes)):
        raise content.error(f"holds no increasing map of {name}")
    try:
        made = tuple(law if law is None else Marginal.named(law) for law in laws)
    except InputError as error:
        raise content.error(f"holds a map of {name} by an unknown law ({error})") from error
    return MonotoneMap(tuple(kinds), centre, unit, knots, values, slopes, made)
