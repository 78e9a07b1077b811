"""Noise that is not Gaussian: outliers, noise of the user's own, and that of several instruments together."""

from collections.abc import Callable, Iterable, Sized
from copy import copy
from dataclasses import dataclass
from math import lgamma, log, pi
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fem_diffusion.checks import LARGEST, check_array, check_callable, check_count, check_number
from fem_diffusion.diffusion.checks import check_generator
from fem_diffusion.diffusion.maps.laws import of_normal
from fem_diffusion.diffusion.noise import GaussianNoise, Noise, as_levels, as_noise
from fem_diffusion.errors import InputError
from fem_diffusion.marginal import Marginal

__all__ = ["CallableNoise", "DrawnNoise", "JoinedNoise", "StudentNoise", "join_noise"]


class StudentNoise(Noise):
    r"""Noise with outliers: :math:`e_i = s_i t_i` with independent t of Student's law, whose tails are powers.

    A reading that is far from all others counts little, instead of drawing the answer to itself. With 4 degrees of
    freedom one reading in 170 is more than 5 s away; with 30 the law is nearly Gaussian.

    Parameters
    ----------
    std : float, array_like of shape (k,), or frozen distribution of SciPy
        The scale s of each sensor, or the law of an unknown one of all, in units of the measurement: the standard
        deviation is sqrt(df / (df - 2)) times
        that, most of it from outliers.
    df : float
        Degrees of freedom, above 2, so that there is a covariance.

    InputError if a number is out of range.
    """

    law = heavy = True

    def __init__(self, std: ArrayLike | Any, df: float = 4.0):
        self.levels, std = as_levels(std)
        self.constant, self._more = not self.levels, torch.zeros((), dtype=torch.float64)
        self.std = torch.from_numpy(check_array(std, "Noise 'std'", (), ("k",)))
        self.df = check_number(df, "df", above=2)
        if not self.levels and not (self.std >= 1 / LARGEST).all():
            raise InputError("Every sensor needs noise: give 'std' positive values.")

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """As `Noise.sample`, by the polar method (Bailey 1994, doi:10.1090/S0025-5718-1994-1219702-8)."""
        scale = self._scale(y)
        check_generator(generator, y.device)
        y = self.readings(y)
        u, v = (torch.rand(y.shape, generator=generator, dtype=torch.float64, device=y.device) for _ in range(2))
        radius = (self.df * torch.expm1(-2 / self.df * torch.log1p(-u))).sqrt()
        return y + scale * (radius * torch.cos(2 * pi * v)).to(y)

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        """As `GaussianNoise.log_density`."""
        df, std = self.df, self._scale(clean)
        clean = self.readings(clean)
        constant = lgamma((df + 1) / 2) - lgamma(df / 2) - log(df * pi) / 2
        away = (y.to(clean) - clean) / std
        return (constant - torch.log(std) - (df + 1) / 2 * torch.log1p(away.square() / df)).sum(1)

    def each(self, y: Tensor) -> Tensor:
        """As `Noise.each`, s² df / (df - 2) on the diagonal."""
        return torch.diag_embed((self._scale(y)**2 * self.df / (self.df - 2)).expand_as(self.readings(y)))

    def near(self, y: Tensor, square: Tensor) -> Tensor:
        """As `Noise.near`: the mean precision of the scale mixture given a residual, (df + 1) / (df s² + e²)."""
        return torch.diag_embed((self.df * self._scale(y)**2 + square) / (self.df + 1))

    def known(self, normal: Tensor) -> "StudentNoise":
        """As `Noise.known`."""
        part = copy(self)
        if self.levels:
            part.std, part.levels, part.constant = of_normal(self.levels[0], normal[0]).double(), (), True
        return part

    def widened(self, variance: Tensor) -> "StudentNoise":
        """As `Noise.widened`, of the same degrees of freedom."""
        part = copy(self)
        part._more = variance * (self.df - 2) / self.df
        return part

    def _scale(self, y: Tensor) -> Tensor:
        """The scale, of a shape that goes with noise-free readings (..., k)."""
        self.check(y.shape[-1] - len(self.levels))
        scale = of_normal(self.levels[0], y[..., -1:]) if self.levels else self.std.to(y)
        return (scale**2 + self._more.to(y)).sqrt()

    def select(self, sensors: Tensor) -> "StudentNoise":
        """As `Noise.select`."""
        part = copy(self)
        part.std, part._more = (x[sensors] if x.ndim else x for x in (self.std, self._more))
        return part

    def check(self, k: int) -> None:
        """As `Noise.check`."""
        if self.std.ndim and len(self.std) != k:
            raise InputError(f"The noise model is for {len(self.std)} sensors, the observations have {k}: give one "
                             "number for all, or one for each.")


class DrawnNoise(Noise):
    """Noise whose moments are those of draws, which are the same in every call."""

    def mean(self, y: Tensor) -> Tensor:
        """Mean of the noise over `y` (B, k), shape (k,), from the same draws as `covariance`."""
        return self._errors(y).mean(0)

    def covariance(self, y: Tensor) -> Tensor:
        """Covariance (k, k) of the noise averaged over `y` (B, k), from draws for each row."""
        error = self._errors(y)
        error = error - error.mean(0)
        return error.T @ error / len(error)

    def _errors(self, y: Tensor) -> Tensor:
        """One draw of the noise for each row, the same in every call, shape (B, k)."""
        return self.sample(y, torch.Generator(y.device).manual_seed(0)) - y


@dataclass(frozen=True)
class CallableNoise(DrawnNoise):
    """Noise of the user's own making. InputError if one of its parts cannot be called.

    Parameters
    ----------
    function : callable
        Maps noise-free observations (B, k), a copy that it may write into, and a generator to measurements (B, k).
    log_density : callable, optional
        Its density, which references, checks and corrections need, as `GaussianNoise.log_density`: maps a measurement
        y (k,) and noise-free readings (B, k) to log p(y | readings), shape (B,), minus infinity where y is impossible.
        Gradients by the readings are torch's, where it has any.
    """

    function: Callable[[Tensor, torch.Generator], Tensor]
    log_density: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check_callable(self.function, "The noise", "a function of observations and generator, or GaussianNoise")
        if self.log_density is not None:
            check_callable(self.log_density, "log_density", "a function of measurement and readings", 2)

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Noisy measurements (B, k) for noise-free ones (B, k); InputError unless they are finite and of that shape."""
        # The function may write into what it gets, and may return the same tensor in every call.
        noisy = self.function(y.clone(), generator)
        real = isinstance(noisy, Tensor) and not noisy.is_complex()
        if not real or noisy.shape != y.shape or not torch.isfinite(noisy).all():
            raise InputError(f"The noise callable must return a finite real tensor of shape {tuple(y.shape)}: mend it.")
        return noisy.detach().to(y, copy=True)


class JoinedNoise(Noise):
    """Independent noise of several instruments, whose readings follow each other; from `join_noise`.

    `parts` are pairs of a number of sensors and their noise; `levels` those of all parts, of the same noise model once.
    """

    def __init__(self, parts: Iterable[tuple[int, Noise]]):
        self.parts = tuple(parts)
        self.constant = all(noise.constant for _, noise in self.parts)
        self.law = all(noise.told for _, noise in self.parts)
        # A level is itself alone, whatever others are of the same law.
        self.heavy = any(noise.heavy for _, noise in self.parts)
        self._keep(tuple({id(level): level for _, noise in self.parts for level in noise.levels}.values()))
        if any(noise.log_density is None for _, noise in self.parts):
            self.log_density = None   # pyright: ignore[reportAttributeAccessIssue]

    def _split(self, y: Tensor, clean: bool = True) -> list[Tensor]:
        """What belongs to each part, of noise-free readings (..., k) with the levels, or of measurements."""
        count = len(self.levels) if clean else 0
        self.check(y.shape[-1] - count)
        parts = y[..., :y.shape[-1] - count].split([k for k, _ in self.parts], -1)
        levels = y[..., y.shape[-1] - count:]
        return [torch.cat([x, levels[..., places]], -1) if clean and places else x
                for x, places in zip(parts, self._places)]

    def sample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """As `Noise.sample`."""
        return torch.cat([noise.sample(x, generator) for x, (_, noise) in zip(self._split(y), self.parts)], -1)

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        """As `GaussianNoise.log_density`."""
        parts = zip(self._split(y, False), self._split(clean), self.parts)
        found = [noise.log_density(a, b) for a, b, (_, noise) in parts]   # pyright: ignore[reportOptionalCall]
        return torch.stack(found).sum(0)

    def mean(self, y: Tensor) -> Tensor:
        """As `Noise.mean`."""
        return torch.cat([noise.mean(x) for x, (_, noise) in zip(self._split(y), self.parts)])

    def each(self, y: Tensor) -> Tensor:
        """As `Noise.each`."""
        return _blocks([noise.each(x) for x, (_, noise) in zip(self._split(y), self.parts)])

    def near(self, y: Tensor, square: Tensor) -> Tensor:
        """As `Noise.near`."""
        parts = zip(self._split(y), self._split(square, False), self.parts)
        return _blocks([noise.near(a, b) for a, b, (_, noise) in parts])

    def known(self, normal: Tensor) -> Noise:
        """As `Noise.known`."""
        return join_noise(*((k, noise.known(normal[places])) for (k, noise), places in zip(self.parts, self._places)))

    def widened(self, variance: Tensor) -> "JoinedNoise":
        """As `Noise.widened`."""
        shares = variance.split([k for k, _ in self.parts], -1)
        part = JoinedNoise((k, noise.widened(share)) for share, (k, noise) in zip(shares, self.parts))
        part._keep(self.levels)
        return part

    def covariance(self, y: Tensor) -> Tensor:
        """As `Noise.covariance`."""
        return torch.block_diag(*(noise.covariance(x) for x, (_, noise) in zip(self._split(y), self.parts)))

    def select(self, sensors: Tensor) -> Noise:
        """As `Noise.select`; the sensors' numbers increase."""
        parts, first = [], 0
        # A level whose sensors have failed stays one.
        for k, noise in self.parts:
            mine = sensors[(sensors >= first) & (sensors < first + k)] - first
            if len(mine):
                parts.append((len(mine), noise.select(mine) if len(mine) < k else noise))
            first += k
        part = JoinedNoise(parts)
        part._keep(self.levels)
        return part

    def _keep(self, levels: tuple[Marginal, ...]) -> None:
        """Have these levels, in this order, of which those of all parts are some."""
        self.levels = levels
        self._places = [[[id(x) for x in levels].index(id(level)) for level in noise.levels] for _, noise in self.parts]

    def check(self, k: int) -> None:
        """As `Noise.check`."""
        if sum(size for size, _ in self.parts) != k:
            raise InputError(f"The noise model is for instruments of {[size for size, _ in self.parts]} sensors, the "
                             f"observations have {k}: join as many instruments, in the same order.")


def _blocks(parts: list[Tensor]) -> Tensor:
    """Block diagonal matrices (B, k, k) of such parts."""
    sizes = [part.shape[-1] for part in parts]
    return torch.cat([torch.nn.functional.pad(part, (sum(sizes[:i]), sum(sizes[i + 1:])))
                      for i, part in enumerate(parts)], -2)


def join_noise(*parts: tuple[Sized | int, Noise | ArrayLike]) -> Noise:
    """Noise of instruments joined by ``first + second``: independent, each with its own model, units and precision.

    An unknown standard deviation of one model is one number, wherever that model object comes again.

    Gaussian noise of all of them makes one `GaussianNoise`, so that linear problems stay exact.

    Parameters
    ----------
    *parts : tuple
        Of each instrument, in their order: itself, or its number of sensors, and its noise, a number being a standard
        deviation: ``join_noise((probes, 0.01), (beams, StudentNoise(2.0)))``.

    InputError if a part is none of these, or its noise is for another number of sensors.
    """
    found = []
    for i, part in enumerate(parts):
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise InputError(f"part {i} is {part!r}: give pairs of an instrument and its noise.")
        k = check_count(len(part[0]) if isinstance(part[0], Sized) else part[0], f"the sensors of part {i}")
        noise = as_noise(part[1], k)
        if noise is None:
            raise InputError(f"part {i} has no noise: give each instrument some.")
        found.append((k, noise))
    if not found:
        raise InputError("There are no parts: give pairs of an instrument and its noise.")
    if not all(isinstance(noise, GaussianNoise) and not noise.levels for _, noise in found):
        return JoinedNoise(found)
    gaussian = [(k, noise) for k, noise in found if isinstance(noise, GaussianNoise)]
    std, relative = (torch.cat([getattr(noise, name).expand(k) for k, noise in gaussian]).numpy()
                     for name in ("std", "relative"))
    correlated = any(noise.correlated is not None for _, noise in gaussian)
    blocks = [torch.zeros(k, k) if noise.correlated is None else noise.correlated for k, noise in gaussian]
    return GaussianNoise(std, relative, torch.block_diag(*blocks).numpy() if correlated else None)
