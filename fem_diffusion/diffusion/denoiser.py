r"""The denoiser :math:`D(z_t, \sigma, y) = E[z_0 | z_t, y]` as Gaussian base plus network.

In base coordinates, :math:`w_t = w_0 + \sigma \varepsilon`, the denoiser is

.. math:: D = \frac{w_t}{1 + \sigma^2} + \frac{\sigma}{\sqrt{1 + \sigma^2}} N(v, \theta, y), \qquad
          v = \frac{w_t}{\sqrt{1 + \sigma^2}}, \qquad \theta = \arctan \sigma.

The first term is the exact denoiser of a standard normal. With :math:`v = \cos\theta\, w_0 + \sin\theta\,
\varepsilon` the regression target of N is :math:`\sin\theta\, w_0 - \cos\theta\, \varepsilon`, of unit variance at
every noise level (the preconditioning of Karras et al., arXiv 2206.00364, table 1, with operators in place of
scalars), and the probability-flow equation is :math:`dv/d\theta = -N`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fem_diffusion.checks import check_flag, check_kind
from fem_diffusion.diffusion.base.density import EmulatorDensity, emulator_density
from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located
from fem_diffusion.diffusion.base.layouts import Layout
from fem_diffusion.diffusion.checks import check_near, check_tensor
from fem_diffusion.diffusion.network import ScoreNetwork
from fem_diffusion.diffusion.noise import Noise
from fem_diffusion.diffusion.sampling.placement import Spectrum
from fem_diffusion.diffusion.sampling.support import Support
from fem_diffusion.diffusion.tensors import Tensors, mapped
from fem_diffusion.errors import InputError

__all__ = ["Conditioned", "Denoiser"]


@dataclass(frozen=True, eq=False, repr=False)
class Conditioned(Tensors):
    """A denoiser with B measurements built in: all that samplers, densities and corrections see.

    Parameters
    ----------
    located : Located
        Gaussian base of each measurement.
    network, context : ScoreNetwork or None, tuple of Tensor
        None where the base is the answer, and what the network has made of each measurement, shape (B, ...) each.
    spectrum, support : Spectrum or None, Support or None
        As for `Denoiser`: samplers place their steps by the one and keep the other.
    density : EmulatorDensity or None
        Of the posterior by the emulator, with which samplers correct what base and network have missed.
    """

    located: Located
    network: ScoreNetwork | None = None
    context: tuple[Tensor, ...] = ()
    spectrum: Spectrum | None = None
    support: Support | None = None
    density: EmulatorDensity | None = None

    def __len__(self) -> int:
        return len(self.located.mean)

    @property
    def r(self) -> int:
        """Number of latents."""
        return self.located.mean.shape[1]

    def residual(self, v: Tensor, angle: float, rows: int | None = None) -> Tensor:
        """N(v, angle, y), what the network adds to the base, of the shape and dtype of `v`.

        The states `v` (n, B, r) are of unit variance, in base coordinates; `angle` is arctan(sigma). So many `rows` are
        evaluated at once, or all of them.
        """
        if self.network is None:
            return torch.zeros_like(v)
        n, size = v.shape[:2]
        if rows is not None and n * size > rows:
            if size == 1:
                return torch.cat([self.residual(part, angle) for part in v.split(max(1, rows))])
            parts = torch.arange(size, device=v.device).split(max(1, rows // n))
            return torch.cat([self.select(part).residual(v[:, part], angle, rows) for part in parts], 1)
        # A network of the user's own may write into what it gets.
        x = v.to(self.network.dtype, copy=True)
        return self.network(x, x.new_full((n, size, 1), angle), *(part.clone() for part in self.context)).to(v.dtype)

    def denoise(self, w: Tensor, sigma: float, rows: int | None = None) -> Tensor:
        """E[w_0 | w_t] in base coordinates (n, B, r), for the variance exploding process at a noise level sigma > 0."""
        norm = math.sqrt(1 + sigma**2)
        return w / norm**2 + sigma / norm * self.residual(w / norm, math.atan(sigma), rows)

    def select(self, index: Tensor) -> "Conditioned":
        """Some of the measurements, by their numbers."""
        def own(part: Any) -> Any:   # what all measurements share stays as it is
            return mapped(part, lambda x: x[index] if len(x) == len(self) > 1 else x)
        located = replace(own(self.located), mean=self.located.mean[index])
        density = self.density and replace(self.density, located=located, rows=own(self.density.rows),
                                           target=own(self.density.target))
        return replace(self, located=located, context=own(self.context), density=density)


@dataclass(frozen=True, eq=False, repr=False)
class Denoiser(Tensors):
    """Gaussian base and network together. InputError if a part is of the wrong kind.

    Parameters
    ----------
    base : GaussianBase
        Gaussian approximation of the posterior of any measurement.
    network : ScoreNetwork or None
        None where the base is the answer.
    spectrum, support : Spectrum or None, Support or None
        Of the posterior covariance in base coordinates, over training measurements; hard bounds of the latents.
    known : bool
        Whether latents are N(0, I) and the law of the noise is known, or learnt so well that nothing better is, so that
        the emulator gives the density of any posterior.
    """

    base: GaussianBase
    network: ScoreNetwork | None = None
    spectrum: Spectrum | None = None
    support: Support | None = None
    known: bool = False

    def __post_init__(self) -> None:
        check_kind(self.base, "base", GaussianBase, "what fit_base or plain_base returns")
        check_flag(self.known, "known")
        for name, kind in (("network", ScoreNetwork), ("spectrum", Spectrum), ("support", Support)):
            part = getattr(self, name)
            if isinstance(part, type):   # which has all methods of its objects
                raise InputError(f"{name} is the class {part.__name__}: give an object of it.")
            if part is not None:
                check_kind(part, name, kind, f"a {kind.__name__} or None")

    def select(self, sensors: Tensor, before: Tensor, after: Tensor, noise: Noise | None) -> "Denoiser":
        """For some of the fixed sensors, by their numbers, of which some may come again; without its network.

        The noise had the covariance `before` (k, k) in training, and `after` (m, m) in the measurement, whose `noise`
        is that of these sensors.
        """
        emulator = self.base.emulator.select(sensors)
        learnt = self.base.learnt
        if learnt is not None and len(sensors.unique()) == len(sensors):
            base = replace(self.base, emulator=emulator, learnt=learnt.select(sensors))
            return Denoiser(base, None, None, self.support, self.known)
        if self.base.law is not None and noise is not None:
            law = replace(self.base.law, noise=noise, covariance=after)
            return Denoiser(replace(self.base, emulator=emulator, law=law), None, None, self.support, self.known)
        # What is left beside the noise is the emulator's own error; rounding may make it negative.
        unit = after.diagonal().clamp(min=1e-300).sqrt()
        error = (emulator.residual - before[sensors][:, sensors]) / unit / unit[:, None]
        values, axes = torch.linalg.eigh((error + error.T) / 2)
        emulator.residual = after + unit[:, None] * (axes * values.clamp(min=0) @ axes.T) * unit
        # Of sensors that come again the noise is not learnt.
        return Denoiser(replace(self.base, emulator=emulator, learnt=None), None, None, self.support,
                        self.known and learnt is None)

    def at(self, y: Tensor, layout: Layout | None = None) -> Conditioned:
        """The denoiser for measurements; its cost does not depend on the layouts of the training.

        No sensors at all leave the prior. InputError if shapes disagree, a number is not finite and real, a variance is
        not positive, or a reading is out of all reach.

        Parameters
        ----------
        y : Tensor
            Measurements, shape (B, k).
        layout : Layout, optional
            Of each measurement or of all; where left out, the fixed sensors whose readings the emulator gives.
        """
        base = self.base
        y = check_tensor(y, "The measurement", ("B", base.k if layout is None else "k"), "sensors").to(base.mean)
        if layout is None:
            check_near(base.features(y))
            layout = Layout.readings(base.k, base.mean)
        else:
            _check_layout(layout, base.k, *y.shape)
            check_near(layout.standardised(y)[1])
        located = base.locate(layout, y)
        located = replace(located, mean=located.mean.expand(len(y), -1))
        if y.shape[1] == 0 and self.known:
            return Conditioned(located)
        moves = not base.affine or base.law is not None
        density = emulator_density(base, layout, y, located) if self.known and moves else None
        if self.network is None:
            return Conditioned(located, None, (), None, self.support, density)
        with torch.no_grad():
            context = self.network.context(*self.network.see(base, layout, y, located))
        return Conditioned(located, self.network, tuple(context), self.spectrum, self.support, density)


def _check_layout(layout: Layout, s: int, size: int, k: int) -> None:
    """Raise InputError unless a layout of s coordinates fits measurements (size, k)."""
    check_kind(layout, "layout", Layout, "a Layout of the measurement")
    number = len(check_tensor(layout.rows, "The rows of the layout", ("B", k, s), "coordinates"))
    for name, x in (("offset", layout.offset), ("variance", layout.variance)):
        check_tensor(x, f"The {name} of the layout", (number, k), "sensors")
    if number not in (1, size):
        raise InputError(f"There are {number} layouts and {size} measurements: give one layout, or one for each.")
    if not (layout.variance > 0).all():
        raise InputError("Every sensor needs noise: its variance must be positive.")
    present = layout.present
    if not isinstance(present, Tensor) or present.dtype != torch.bool or present.shape != (number, k):
        raise InputError(f"present must say true or false of each sensor: give a bool tensor of shape ({number}, {k}).")
