"""One model for every set of sensors: training under random layouts, and the denoiser of any one layout."""

import os
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from fem_diffusion.checks import check_flag, check_kind, check_options
from fem_diffusion.diffusion._checks import check_near, check_tensor
from fem_diffusion.diffusion._loop import History, Loop, Task, TrainingOptions, hold_out, threads
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.emulator import fit_emulator
from fem_diffusion.diffusion.gaussian import GaussianBase, check_pairs
from fem_diffusion.diffusion.nodes import Spectrum
from fem_diffusion.diffusion.operator_base import UPDATES, Located, OperatorBase
from fem_diffusion.diffusion.sensor_network import SensorNetwork
from fem_diffusion.diffusion.sensors import LayoutLaw, Sensors
from fem_diffusion.diffusion.surrogate import surrogate
from fem_diffusion.diffusion.support import Support, find_support
from fem_diffusion.diffusion.training import measure_spectrum, noisy
from fem_diffusion.errors import InputError

__all__ = ["OperatorDenoiser", "fit_operators"]

# Attention learns nothing at the rate that suits the fully connected network.
_RATE = 0.25
# Noise levels drawn for each located measurement, which costs more than they do.
_DRAWS, _VALIDATION_DRAWS = 8, 16
_HELD_OUT, _CHUNK = 2048, 256
# Share of the variance of a latent that the others may leave at least.
_DEPENDENT = 1e-12


class OperatorDenoiser:
    """Base and network for any sensors of a state.

    Parameters
    ----------
    base : OperatorBase
        Gaussian base of any layout.
    network : SensorNetwork or None
        None where the base is the answer.
    spectrum : Spectrum, optional
        Of the posterior covariance in base coordinates, over the training layouts.
    support : Support, optional
        Hard bounds of the latents.
    standard_prior : bool
        Whether the latents are known to be N(0, I).

    Raises
    ------
    InputError
        If a part is of the wrong kind.
    """

    def __init__(self, base: OperatorBase, network: SensorNetwork | None, spectrum: Spectrum | None = None,
                 support: Support | None = None, standard_prior: bool = False):
        check_kind(base, "base", OperatorBase, "an OperatorBase")
        for name, part, kind in (("network", network, SensorNetwork), ("spectrum", spectrum, Spectrum),
                                 ("support", support, Support)):
            if part is not None:
                check_kind(part, name, kind, f"a {kind.__name__} or None")
        self.base, self.network, self.spectrum, self.support = base, network, spectrum, support
        self.standard_prior = check_flag(standard_prior, "standard_prior")

    def at(self, sensors: Sensors, y: Tensor) -> Denoiser:
        """The denoiser for one measurement; its cost does not depend on the layouts of the training.

        Parameters
        ----------
        sensors : Sensors
            One layout, B = 1.
        y : Tensor
            Measurement, shape (k,).

        Returns
        -------
        Denoiser
            Whose base has the measurement built in. No sensors at all leave the prior.

        Raises
        ------
        InputError
            If shapes disagree, a number is not finite and real, or a variance is not positive.
        """
        check_kind(sensors, "sensors", Sensors, "Sensors of one layout")
        s = self.base.emulator.config["s"]
        k = check_tensor(sensors.rows, "The rows of the sensors", (1, "k", s), "coordinates").shape[1]
        for name, x in (("offset", sensors.offset), ("variance", sensors.variance)):
            check_tensor(x, f"The {name} of the sensors", (1, k), "sensors")
        if not (sensors.variance > 0).all():
            raise InputError("Every sensor needs noise: its variance must be positive.")
        present = sensors.present
        if not isinstance(present, Tensor) or present.dtype != torch.bool or present.shape != (1, k):
            raise InputError(f"present must say true or false of each sensor: give a bool tensor of shape (1, {k}).")
        check_near(sensors.standardised(check_tensor(y, "The measurement", (k,), "sensors")[None])[1])
        located = self.base.locate(sensors, y[None])
        # The mean is that of this very measurement, so the gain is zero.
        base = GaussianBase(located.mean[0], y, y.new_zeros(self.base.r, k), located.factor[0], located.whitener[0],
                            torch.eye(k, dtype=y.dtype, device=y.device))
        if k == 0 and self.standard_prior:
            return Denoiser(base, None)
        density = None
        if self.standard_prior and self.base.emulator.head is not None:
            density = surrogate(self.base, sensors, y[None], located)
        if self.network is None:
            return Denoiser(base, None, None, self.support, density)
        seen = self.base.standardised(located)
        with torch.no_grad():
            context = self.network.context(sensors, seen, y[None])
        network = _Conditioned(self.network, context, seen.factor)
        return Denoiser(base, network, self.spectrum, self.support, density)


class _Conditioned(nn.Module):
    """A sensor network with its measurement built in, as `Denoiser` wants it."""

    def __init__(self, network: SensorNetwork, context: Tensor, factor: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("context", context)
        self.register_buffer("factor", factor.to(context))

    @property
    def dtype(self) -> torch.dtype:
        """Floating point type of the weights."""
        return self.network.dtype

    def forward(self, v: Tensor, angle: Tensor, features: Tensor) -> Tensor:
        return self.network(v[:, None], angle[:, None], self.context, self.factor)[:, 0]


@dataclass(frozen=True)
class _Measured:
    """What a network sees of B located measurements, and n samples of their posteriors in base coordinates."""

    sensors: Sensors
    located: Located
    y: Tensor
    w: Tensor

    def context(self, network: nn.Module) -> Tensor:
        return network.context(self.sensors, self.located, self.y)

    def select(self, index: Tensor) -> "_Measured":
        """Some of the measurements."""
        return _Measured(*(_map(lambda x: x[index], part) for part in (self.sensors, self.located)), self.y[index],
                         self.w[:, index])


def _map(function, part):
    """A dataclass of tensors with the function applied to each."""
    return type(part)(*(function(getattr(part, f.name)) for f in fields(part)))


def _joined(parts: list):
    """Dataclasses of tensors behind each other."""
    return type(parts[0])(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(parts[0])))


class _Layouts(Task):
    """The task of `fit_operators`: denoise latents given measurements by layouts that are never the same."""

    name = "train"

    def __init__(self, z: Tensor, c: Tensor, law: LayoutLaw, base: OperatorBase, standard_prior: bool,
                 options: TrainingOptions):
        self.options, self.base, self.law, self.standard_prior = options, base, law, standard_prior
        training, held_out = hold_out(len(z), options)
        held_out = held_out[:_HELD_OUT]
        self.z, self.c, self.size = z[training], c[training], len(training)
        generator = torch.Generator(z.device).manual_seed(options.seed + 1)
        self.validation = []
        for part in held_out.split(_CHUNK):
            seen = self._measure(z[part], c[part], generator)
            self.validation.append((seen, noisy(seen.w.expand(_VALIDATION_DRAWS, -1, -1), options, generator)))
        self.base_losses = self._losses(lambda seen, v, angle: torch.zeros_like(v))
        # Minus the log density of the base at held-out latents: the denoising loss knows no determinants.
        self.surprise = float(torch.cat([seen.w[0].square().sum(1) / 2 - torch.diagonal(
            seen.located.whitener, dim1=1, dim2=2).log().sum(1) for seen, _ in self.validation]).mean())
        self.parts = [z, c, *(x for seen, draws in self.validation for x in (seen.y, *draws))]

    def _measure(self, z: Tensor, c: Tensor, generator: torch.Generator, moves: int = 0) -> _Measured:
        """Fresh layouts and noise for latents (B, r) and state coordinates (B, s), without units in single precision.

        The latents are a sample of their posterior; Hamiltonian moves from there make more.
        """
        parts = []
        with torch.no_grad():
            for latents, state in zip(z.split(_CHUNK), c.split(_CHUNK)):
                sensors = self.law.draw(len(latents), generator)
                y = sensors.measure(state, generator)
                located = self.base.locate(sensors, y)
                chain = [located.whiten(latents)]
                if moves:
                    density = surrogate(self.base, sensors, y, located)
                    for _ in range(moves):
                        chain.append(density.move(chain[-1][:, None], generator)[0][:, 0])
                sensors, y = sensors.standardised(y)
                parts.append(_Measured(_map(_single, sensors), _map(_single, self.base.standardised(located)),
                                       _single(y), _single(torch.stack(chain, 1))))
        return _Measured(*(_joined([getattr(part, name) for part in parts]) for name in ("sensors", "located")),
                         torch.cat([part.y for part in parts]), torch.cat([part.w for part in parts]).transpose(0, 1))

    def network(self) -> nn.Module:
        return SensorNetwork(self.base.r, self.c.shape[1], self.options.width, self.options.depth)

    def prepare(self, generator):
        count = -(-self.options.batch * self.options.evaluate_every // _DRAWS)
        index = torch.randint(self.size, (count,), generator=generator, device=self.z.device)
        # Under an affine emulator the base is all that moves could find.
        known = self.standard_prior and self.base.emulator.head is not None
        self.bank = self._measure(self.z[index], self.c[index], generator, _DRAWS - 1 if known else 0)

    def loss(self, network, index, generator):
        seen = self.bank.select(index % len(self.bank.y))
        draw = torch.randint(len(seen.w), (len(index),), generator=generator, device=index.device)
        w = seen.w.gather(0, draw[None, :, None].expand(1, -1, seen.w.shape[2]))
        v, angle, target = noisy(w, self.options, generator)
        return (network(v, angle, seen.context(network), seen.located.factor) - target).square().mean()

    def _losses(self, output) -> Tensor:
        """Validation loss of each held-out pair, averaged over its draws; shape (held_out,)."""
        return torch.cat([(output(seen, v, angle) - target).square().mean((0, 2))
                          for seen, (v, angle, target) in self.validation])

    def evaluate(self, network):
        model = getattr(network, "module", network)
        return self._losses(lambda seen, v, angle: model(v, angle, seen.context(model), seen.located.factor))

    def spectrum(self, network: nn.Module) -> Spectrum:
        """Spectrum of the posteriors of held-out measurements in base coordinates."""
        seen = [seen for seen, _ in self.validation]
        contexts = [part.context(network) for part in seen]

        def residual(v, angle):
            sizes = [len(part.y) for part in seen]
            return torch.cat([network(a[None], b[None], context, part.located.factor)[0] for a, b, context, part
                              in zip(v.split(sizes), angle.split(sizes), contexts, seen)])
        generator = torch.Generator(self.z.device).manual_seed(self.options.seed + 2)
        return measure_spectrum(residual, torch.cat([part.w[0] for part in seen]), generator)


def _single(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def fit_operators(z: Tensor, c: Tensor, weights: Tensor, law: LayoutLaw, *, standard_prior: bool = False,
                  options: TrainingOptions = TrainingOptions(), checkpoint: str | os.PathLike | None = None,
                  progress: bool = False) -> tuple[OperatorDenoiser, History]:
    """Fit one model for all layouts of a law: emulator, base, then the network under it.

    Parameters
    ----------
    z : Tensor
        Latents, shape (n, r).
    c : Tensor
        State coordinates of unit variance, shape (n, s).
    weights : Tensor
        Standard deviations of the state modes, shape (s,).
    law : LayoutLaw
        Of the layouts. Each one that is drawn, with its noise, serves eight noise levels, since to locate its base
        costs more than a step.
    standard_prior : bool
        Whether the latents are known to be N(0, I).
    options : TrainingOptions
        Of both networks; the one with attention learns at a quarter of the rate.
    checkpoint : path, optional
        Training writes its state there (the emulator's with ``.emulator`` behind the name) and resumes from it.
    progress : bool
        Show progress bars.

    Returns
    -------
    OperatorDenoiser
        On the CPU.
    History
        Training curve of the network under the base; its collapse ratios are not measured, NaN.

    Raises
    ------
    InputError, FileError, SolveError
        As `fit_emulator` and `train` do.
    """
    check_options(options, TrainingOptions).check()
    check_flag(standard_prior, "standard_prior")
    check_pairs(z, c, 1)
    check_kind(law, "law", LayoutLaw, "a LayoutLaw")
    if law.pools[0].rows.shape[2] != c.shape[1]:
        raise InputError(f"The sensors see {law.pools[0].rows.shape[2]} state coordinates and the pairs hold "
                         f"{c.shape[1]}: make both from one basis of states.")
    z, c = z.double().cpu(), c.double().cpu()
    if standard_prior:
        mean, factor = z.new_zeros(z.shape[1]), torch.eye(z.shape[1], dtype=z.dtype)
    else:
        # Upper triangular, from the Cholesky factor of the covariance in reversed order.
        covariance = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
        factor, info = torch.linalg.cholesky_ex(covariance.flip(0, 1))
        if info.any() or (factor.diagonal()**2 < _DEPENDENT * covariance.diagonal().flip(0)).any():
            raise InputError("The latents depend linearly on each other in all pairs: keep fewer modes, or simulate "
                             "more.")
        mean, factor = z.mean(0), factor.flip(0, 1)
    emulator, _ = fit_emulator(z, c, weights, options=options, progress=progress,
                               checkpoint=None if checkpoint is None else f"{checkpoint}.emulator")
    device = torch.device(options.device)
    options = replace(options, learning_rate=_RATE * options.learning_rate)
    moved = [x.to(device) for x in (z, c, mean, factor)]
    emulator.to(device)
    law = law.to(device, torch.float64)
    with threads(options.threads):
        # Where a posterior has several modes, following one of them is worse than the joint Gaussian.
        tasks = [_Layouts(*moved[:2], law, OperatorBase(*moved[2:], emulator, updates), standard_prior,
                          options)
                 for updates in ((1,) if emulator.head is None else (1, UPDATES))]
        task = min(tasks, key=lambda task: task.surprise)
        loop = Loop(task, options, checkpoint)
        network = loop.run(progress)
        spectrum = None if network is None else task.spectrum(network)
        if network is not None:
            loop.history.spread_ratio = loop.history.neighbour_ratio = float("nan")
    emulator.to("cpu")
    network = None if network is None else network.to("cpu")
    support = None if standard_prior else find_support(z)
    base = OperatorBase(mean, factor, emulator, task.base.updates)
    return OperatorDenoiser(base, network, spectrum, support, standard_prior), loop.history
