"""Denoising score matching: trains the network under the Gaussian base, resumably, reproducibly and without collapse.

A conditional model trained for long on finitely many pairs learns to recognise each pair by its measurement, and its
posterior collapses onto the training parameter (arXiv 2603.14135). Against that: measurement noise is drawn afresh in
every batch where the noise is known, weights are averaged, the learning rate falls and training stops by the loss on
held-out pairs, the best weights there are kept, and `collapse` measures what is left and warns.
"""

import math
import os
from dataclasses import fields

import torch
from torch import Tensor, nn

from fem_diffusion.checks import check_choice, check_flag, check_kind, check_options
from fem_diffusion.diffusion._checks import check_tensor
from fem_diffusion.diffusion._loop import History, Loop, Task, TrainingOptions, hold_out, threads
from fem_diffusion.diffusion.collapse import measure_collapse
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.field_network import FieldGeometry, FieldNetwork
from fem_diffusion.diffusion.gaussian import GaussianBase, check_pairs, fit_base, plain_base
from fem_diffusion.diffusion.network import ResidualMLP
from fem_diffusion.diffusion.nodes import Spectrum, fit_spectrum
from fem_diffusion.diffusion.noise import CallableNoise, GaussianNoise, as_noise
from fem_diffusion.diffusion.support import find_support

__all__ = ["History", "TrainingOptions", "fit_denoiser", "train"]

_VALIDATION_DRAWS = 16
_SPECTRUM_PAIRS, _SPECTRUM_ANGLES = 2048, 48


def fit_denoiser(z: Tensor, y: Tensor, noise: GaussianNoise | CallableNoise | None = None, *, base: str = "gaussian",
                 standard_prior: bool = False, options: TrainingOptions = TrainingOptions(),
                 checkpoint: str | os.PathLike | None = None, geometry: FieldGeometry | None = None,
                 progress: bool = False) -> tuple[Denoiser, History]:
    """Fit a conditional model to joint samples: the base first, then the network under it, and the latents' bounds.

    Parameters
    ----------
    z : Tensor
        Latents, shape (n, r); any scale.
    y : Tensor
        Noise-free observations, shape (n, k), or measurements where `noise` is None; any units.
    noise : GaussianNoise, CallableNoise, float or None
        Noise model, or the standard deviation of Gaussian noise; None where `y` already holds noise.
    base : {"gaussian", "plain"}
        Joint Gaussian of latents and measurements, or mere standardisation.
    standard_prior : bool
        Whether the latents are known to be N(0, I), as for a Karhunen-Loeve basis.
    options, checkpoint, geometry, progress
        As for `train`.

    Returns
    -------
    Denoiser, History
        As from `train`.

    Raises
    ------
    InputError, FileError
        As `fit_base`, `plain_base` and `train` do; InputError if `base` is unknown.
    """
    check_choice(base, "base", ("gaussian", "plain"))
    check_flag(standard_prior, "standard_prior")
    check_options(options, TrainingOptions).check()
    check_pairs(z, y)  # before the noise model sees them
    z, y, noise = z.double(), y.double(), as_noise(noise, y.shape[1])
    centred, covariance = y, y.new_zeros(y.shape[1], y.shape[1])
    if noise is not None:
        centred, covariance = y + noise.mean(y), noise.covariance(y)
    fitted = (fit_base(z, centred, covariance, standard_prior) if base == "gaussian"
              else plain_base(z, centred, covariance))
    denoiser, history = train(z, y, noise, fitted, options, checkpoint=checkpoint, geometry=geometry, progress=progress)
    denoiser.support = None if standard_prior else find_support(z)
    return denoiser, history


def train(z: Tensor, y: Tensor, noise: GaussianNoise | CallableNoise | None, base: GaussianBase,
          options: TrainingOptions = TrainingOptions(), *, checkpoint: str | os.PathLike | None = None,
          geometry: FieldGeometry | None = None, progress: bool = False) -> tuple[Denoiser, History]:
    """Fit the network under the base by denoising score matching.

    Every batch draws fresh measurement noise, so a training pair cannot be recognised by its measurement. The
    weights with the best loss on held-out pairs are kept, and the network as a whole is kept only where it beats
    the base there by more than two standard errors. At the end the spectrum is measured from which samplers place
    their steps, and collapse onto the training pairs, of which a `CollapseWarning` tells.

    Parameters
    ----------
    z : Tensor
        Latents, shape (n, r).
    y : Tensor
        Noise-free observations, shape (n, k), or measurements where `noise` is None.
    noise : GaussianNoise, CallableNoise, float or None
        Noise model, or the standard deviation of Gaussian noise; None where `y` already holds noise.
    base : GaussianBase
        Gaussian base of the same r and k.
    options : TrainingOptions
        Settings of the loop.
    checkpoint : path, optional
        File that is written atomically at each evaluation; training resumes from it where it exists.
    geometry : FieldGeometry, optional
        Train a `FieldNetwork` on this mesh; the fully connected `ResidualMLP` where left out.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Denoiser
        On the CPU: base in double, network in single precision, in evaluation mode; with its spectrum.
    History
        The training curve.

    Raises
    ------
    InputError
        If shapes disagree, an option is out of range, a value is not finite or the folder of `checkpoint` is missing.
    FileError
        If `checkpoint` is unreadable or belongs to other data, noise or options.
    SolveError
        If training diverges.
    """
    check_options(options, TrainingOptions).check()
    check_flag(progress, "progress")
    check_kind(base, "base", GaussianBase, "what fit_base or plain_base returns")
    if geometry is not None:
        check_kind(geometry, "geometry", FieldGeometry, "what fem_diffusion.fields.geometry makes of a basis")
    check_tensor(z, "z", ("n", base.r), "latents")
    check_tensor(y, "y", (len(z), base.k), "sensors")
    noise = as_noise(noise, base.k)
    with threads(options.threads):
        task = _Pairs(z, y, noise, base, options, geometry)
        loop = Loop(task, options, checkpoint)
        network = loop.run(progress)
        if network is None:
            return Denoiser(base.to("cpu", torch.float64), None), loop.history
        return task.finish(network, loop.history), loop.history


class _Pairs(Task):
    """The task of `train`: denoise latents in base coordinates, given their measurement."""

    name = "train"

    def __init__(self, z, y, noise, base, options, geometry=None):
        self.options, self.noise, self.geometry = options, noise, geometry
        self.device = torch.device(options.device)
        training, held_out = hold_out(len(z), options)
        # Pairs stay in double precision until they are centred; the network works in single precision.
        move = {"device": self.device, "dtype": torch.float64}
        self.z, self.y = z[training].to(**move), y[training].to(**move)
        self.held_out = z[held_out].to(**move), y[held_out].to(**move)
        self.base, self.size = base.to(**move), len(training)
        generator = torch.Generator(self.device).manual_seed(options.seed + 1)
        self.validation = self._draw(*(x.repeat(_VALIDATION_DRAWS, 1) for x in self.held_out), generator)
        self.base_losses = self._pair_losses(torch.zeros_like(self.validation[0]))
        self.parts = [z, y, *(getattr(base, f.name) for f in fields(base)), *self.validation]
        if geometry is not None:
            self.parts += [getattr(geometry, f.name) for f in fields(geometry)]

    def network(self) -> nn.Module:
        sizes = self.base.r, self.base.k, self.options.width, self.options.depth
        if self.geometry is None:
            return ResidualMLP(*sizes)
        return FieldNetwork(*sizes, dimension=len(self.geometry.gradients)).on(self.geometry, self.base)

    def _draw(self, z, y, generator):
        """One draw of measurement noise, noise level and diffusion noise: network inputs and target."""
        y = self._measure(y, generator)
        w, features = self.base.whiten(z, y).float(), self.base.features(y).float()
        return noisy(w, self.options, generator, features)

    def _measure(self, y, generator):
        """Measurements (n, k) for observations (n, k), with fresh noise where its model is known."""
        return y if self.noise is None else self.noise.sample(y, generator)

    def loss(self, network, index, generator):
        v, angle, features, target = self._draw(self.z[index], self.y[index], generator)
        return (network(v, angle, features) - target).square().mean()

    def _pair_losses(self, output: Tensor) -> Tensor:
        """Validation loss of each held-out pair, averaged over its draws; shape (held_out,)."""
        return (output - self.validation[3]).square().mean(1).view(_VALIDATION_DRAWS, -1).mean(0)

    def evaluate(self, network):
        parts = zip(*(x.split(2048) for x in self.validation[:3]))
        return self._pair_losses(torch.cat([network(*part) for part in parts]))

    def finish(self, network: nn.Module, history: History) -> Denoiser:
        """The denoiser on the CPU, with its spectrum, after collapse has been measured."""
        denoiser = Denoiser(self.base, network)
        generator = torch.Generator(self.device).manual_seed(self.options.seed + 2)
        z, y = self.held_out[0], self._measure(self.held_out[1], generator)
        w, features = self.base.whiten(z, y)[:_SPECTRUM_PAIRS], denoiser.features(y[:_SPECTRUM_PAIRS])
        denoiser.spectrum = measure_spectrum(lambda v, angle: denoiser.residual(v, angle, features), w, generator)
        collapse = measure_collapse(denoiser, (self.z, self._measure(self.y, generator)), (z, y), self.options.seed)
        collapse.warn()
        history.spread_ratio, history.neighbour_ratio = collapse.spread_ratio, collapse.neighbour_ratio
        return denoiser.to("cpu")


def noisy(w: Tensor, options: TrainingOptions, generator: torch.Generator, *features: Tensor) -> tuple[Tensor, ...]:
    """Noise levels and noise for latents in base coordinates `w` (..., r): v, angle (..., 1), features, target."""
    def normal(*shape):
        return torch.randn(shape, generator=generator, device=w.device, dtype=w.dtype)
    angle = torch.arctan(torch.exp(options.log_sigma_mean + options.log_sigma_std * normal(*w.shape[:-1], 1)))
    white = normal(*w.shape)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    return cosine * w + sine * white, angle, *features, sine * w - cosine * white


def measure_spectrum(residual, w: Tensor, generator: torch.Generator) -> Spectrum:
    """Spectrum of the posterior in base coordinates, from the network's mean square over held-out pairs `w` (n, r)."""
    angles = (torch.arange(_SPECTRUM_ANGLES, dtype=torch.float64) + 0.5) / _SPECTRUM_ANGLES * math.pi / 2
    speeds = []
    with torch.no_grad():
        for angle in angles.tolist():
            white = torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype)
            v = math.cos(angle) * w + math.sin(angle) * white
            speeds.append(residual(v, v.new_full((len(v), 1), angle)).square().mean())
    return fit_spectrum(angles, torch.stack(speeds))
