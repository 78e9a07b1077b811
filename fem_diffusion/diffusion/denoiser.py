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
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.maps.noise import carried
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
    latents, readings : MonotoneMap or None
        From the users' latents and readings to those that all other parts are of.
    """

    located: Located
    network: ScoreNetwork | None = None
    context: tuple[Tensor, ...] = ()
    spectrum: Spectrum | None = None
    support: Support | None = None
    density: EmulatorDensity | None = None
    latents: MonotoneMap | None = None
    readings: MonotoneMap | None = None

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

    def mapped(self, z: Tensor) -> Tensor:
        """Latents (..., r) as base, network and density have them, of those of the users."""
        return z if self.latents is None else self.latents.forward(z)

    def back(self, z: Tensor) -> Tensor:
        """Latents (..., r) of the users, of those that base, network and density have."""
        return z if self.latents is None else self.latents.inverse(z)


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
        Of the posterior covariance in base coordinates, over training measurements; hard bounds of the users' latents.
    known : bool
        Whether latents are N(0, I) and the law of the noise is known, or learnt so well that nothing better is, so that
        the emulator gives the density of any posterior.
    latents, readings : MonotoneMap or None
        To the scale on which base and network have latents and readings; None where it is the users' own.
    """

    base: GaussianBase
    network: ScoreNetwork | None = None
    spectrum: Spectrum | None = None
    support: Support | None = None
    known: bool = False
    latents: MonotoneMap | None = None
    readings: MonotoneMap | None = None

    def __post_init__(self) -> None:
        check_kind(self.base, "base", GaussianBase, "what fit_base or plain_base returns")
        check_flag(self.known, "known")
        for name, kind in (("network", ScoreNetwork), ("spectrum", Spectrum), ("support", Support),
                           ("latents", MonotoneMap), ("readings", MonotoneMap)):
            part = getattr(self, name)
            if isinstance(part, type):   # which has all methods of its objects
                raise InputError(f"{name} is the class {part.__name__}: give an object of it.")
            if part is not None:
                check_kind(part, name, kind, f"a {kind.__name__} or None")
        for name, part, size in (("latents", self.latents, self.base.r), ("readings", self.readings, self.base.k)):
            if part is not None and len(part) != size:
                raise InputError(f"The map of {name} is of {len(part)} numbers and the base of {size}: give one for "
                                 "each.")

    def __repr__(self) -> str:
        base = self.base
        answer = "the Gaussian base alone" if self.network is None else f"a {type(self.network).__name__} under it"
        if base.learnt is not None and self.known:
            answer = f"the density of an emulator that has learnt its noise, {base.learnt.words}"
        elif self.known and not base.affine:
            answer = f"{answer}, moved under the density of its emulator"
        return f"Denoiser of {base.r} latents for {base.k} readings: {answer}{self.words}"

    @property
    def words(self) -> str:
        """On which scales latents and readings are, and which are in use, in words that go on; empty for all as it is.
        """
        parts = [f"{name} on another scale ({part.words})" for name, part in (
            ("latents", self.latents), ("readings", self.readings)) if part is not None]
        words = f", {' and '.join(parts)}" if parts else ""
        told = self.base.told
        return words if told is None else (
            f"{words}, all from the {len(told)} of {self.base.k} readings that say anything of the latents")

    def select(self, sensors: Tensor, before: Tensor, after: Tensor, noise: Noise | None) -> "Denoiser":
        """For some of the fixed sensors, by their numbers, of which some may come again; without its network.

        The noise had the covariance `before` (k, k) in training, and `after` (m, m) in the measurement, both on the
        scale of the base; `noise` is that of these sensors, in the users' units.
        """
        emulator, readings = self.base.emulator.select(sensors), self.readings and self.readings.select(sensors)
        noise, law, learnt, known = carried(noise, readings), self.base.law, self.base.learnt, self.known
        if learnt is not None and len(sensors.unique()) == len(sensors):
            learnt = learnt.select(sensors)
        elif law is not None and noise is not None:
            law = replace(law, noise=noise, covariance=after)
        else:
            # What is left beside the noise is the emulator's own error; rounding may make it negative.
            unit = after.diagonal().clamp(min=1e-300).sqrt()
            error = (emulator.residual - before[sensors][:, sensors]) / unit / unit[:, None]
            values, axes = torch.linalg.eigh((error + error.T) / 2)
            emulator.residual = after + unit[:, None] * (axes * values.clamp(min=0) @ axes.T) * unit
            # Of sensors that come again the noise is not learnt.
            known, learnt = known and learnt is None, None
        told = None if self.base.told is None else torch.where(torch.isin(sensors, self.base.told))[0]
        told = told if told is not None and len(told) else None   # of no use to what is the prior then
        base = replace(self.base, emulator=emulator, law=law, learnt=learnt, told=told)
        return replace(self, base=base, network=None, spectrum=None, known=known, readings=readings)

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
        maps: dict[str, Any] = {"latents": self.latents, "readings": self.readings}
        if layout is None:
            y = y if self.readings is None else self.readings.forward(y)
            check_near(base.narrow.features(y[:, base.used]), base.used)
            layout = Layout.readings(base.k, base.mean)
        else:
            _check_layout(layout, base.k, *y.shape)
            check_near(layout.standardised(y)[1], torch.arange(y.shape[1]))
        located = base.locate(layout, y)
        located = replace(located, mean=located.mean.expand(len(y), -1))
        if y.shape[1] == 0 and self.known:
            return Conditioned(located, **maps)
        moves = not base.affine or base.law is not None
        density = emulator_density(base, layout, y, located) if self.known and moves else None
        if self.network is None:
            return Conditioned(located, None, (), None, self.support, density, **maps)
        seen = base, layout, y, located
        if base.told is not None:   # a network knows of no others
            seen = base.narrow, Layout.readings(base.narrow.k, base.mean), y[:, base.told], replace(
                located, sensitivity=located.sensitivity[:, base.told], misfit=located.misfit[:, base.told])
        with torch.no_grad():
            context = self.network.context(*self.network.see(*seen))
        return Conditioned(located, self.network, tuple(context), self.spectrum, self.support, density, **maps)


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
