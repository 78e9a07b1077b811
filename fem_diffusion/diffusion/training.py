"""Denoising score matching: trains the network under the Gaussian base, resumably, reproducibly and without collapse.

A conditional model trained for long on finitely many pairs learns to recognise each pair by its measurement, and its
posterior collapses onto the training parameter (arXiv 2603.14135). Against that: measurement noise is drawn afresh in
every batch where the noise is known, weights are averaged, the learning rate falls and training stops by the loss on
held-out pairs, the best weights there are kept, and `collapse` measures what is left and warns.
"""

import contextlib
import hashlib
import math
import os
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fem_diffusion.diffusion.collapse import measure_collapse
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.gaussian import GaussianBase, check_pairs, fit_base, plain_base
from fem_diffusion.diffusion.network import ResidualMLP
from fem_diffusion.diffusion.nodes import Spectrum, fit_spectrum
from fem_diffusion.diffusion.noise import CallableNoise, GaussianNoise
from fem_diffusion.diffusion.support import find_support
from fem_diffusion.errors import InputError, ModelFileError, SolveError

__all__ = ["History", "TrainingOptions", "fit_denoiser", "train"]

_FORMAT = "fem_diffusion training checkpoint 2"
_VALIDATION_DRAWS = 16
_SPECTRUM_PAIRS, _SPECTRUM_ANGLES = 2048, 48
_FEWEST_HELD_OUT = 10


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of the training loop.

    Parameters
    ----------
    steps : int
        Largest number of optimiser steps.
    batch : int
        Pairs a step.
    learning_rate, weight_decay : float
        Of AdamW; the rate warms up over 2 % of the steps and falls to zero as a cosine.
    ema_decay : float
        Decay a step of the exponential moving average of the weights, which is what is kept.
    width, depth : int
        Of the residual network.
    validation_fraction : float
        Share of the pairs held out for early stopping.
    evaluate_every : int
        Steps between evaluations of the validation loss, and between checkpoints.
    patience : int
        Evaluations without a better validation loss before training stops.
    log_sigma_mean, log_sigma_std : float
        Law of log sigma in training, in base coordinates.
    seed : int
        Of initial weights, batches and noise.
    device : str
        Of the training, e.g. "cpu" or "cuda".
    threads : int or None
        Threads of torch while training on the CPU; None leaves torch's setting.
    """

    steps: int = 10000
    batch: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    ema_decay: float = 0.998
    width: int = 128
    depth: int = 3
    validation_fraction: float = 0.1
    evaluate_every: int = 250
    patience: int = 8
    log_sigma_mean: float = 0.0
    log_sigma_std: float = 1.2
    seed: int = 0
    device: str = "cpu"
    threads: int | None = 1

    def check(self) -> None:
        """Raise InputError where a setting is out of its range."""
        positive = ("steps", "batch", "learning_rate", "evaluate_every", "patience", "width", "depth", "log_sigma_std")
        bad = [name for name in positive if not getattr(self, name) > 0]
        bad += [name for name in ("steps", "batch", "evaluate_every", "patience", "width", "depth", "seed")
                if not isinstance(getattr(self, name), Integral)]
        bad += ["threads"] if self.threads is not None and not self.threads >= 1 else []
        bad += [name for name in ("ema_decay", "weight_decay") if not 0 <= getattr(self, name) < 1]
        if bad:
            raise InputError(f"Training options out of range: {', '.join(bad)}.")
        if not 0 < self.validation_fraction < 1:
            raise InputError("validation_fraction must lie between 0 and 1; early stopping needs held-out pairs.")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise InputError(f"Training was asked to run on {self.device!r}, but torch sees no such device here.")


@dataclass
class History:
    """Training curve: losses at each evaluation; 1 is the loss of the base where the base is the truth.

    Parameters
    ----------
    step, train, validation : list
        Optimiser step, mean training loss since the last evaluation, validation loss of the averaged weights.
    base : float
        Validation loss without a network.
    best_step : int
        Step of the weights that are kept; 0 where the base alone is kept.
    spread_ratio, neighbour_ratio : float
        Of `Collapse`, measured at the end; 1 where the base alone is kept.
    """

    step: list = field(default_factory=list)
    train: list = field(default_factory=list)
    validation: list = field(default_factory=list)
    base: float = float("nan")
    best_step: int = 0
    spread_ratio: float = 1.0
    neighbour_ratio: float = 1.0


def fit_denoiser(z: Tensor, y: Tensor, noise: GaussianNoise | CallableNoise | None = None, *, base: str = "gaussian",
                 standard_prior: bool = False, options: TrainingOptions = TrainingOptions(),
                 checkpoint: str | os.PathLike | None = None, progress: bool = False) -> tuple[Denoiser, History]:
    """Fit a conditional model to joint samples: the base first, then the network under it, and the latents' bounds.

    Parameters
    ----------
    z : Tensor
        Latents, shape (n, r); any scale.
    y : Tensor
        Noise-free observations, shape (n, k), or measurements where `noise` is None; any units.
    noise : GaussianNoise, CallableNoise or None
        Noise model; None where `y` already holds noise.
    base : {"gaussian", "plain"}
        Joint Gaussian of latents and measurements, or mere standardisation.
    standard_prior : bool
        Whether the latents are known to be N(0, I), as for a Karhunen-Loeve basis.
    options, checkpoint, progress
        As for `train`.

    Returns
    -------
    Denoiser, History
        As from `train`.

    Raises
    ------
    InputError, ModelFileError
        As `fit_base`, `plain_base` and `train` do; InputError if `base` is unknown.
    """
    if base not in ("gaussian", "plain"):
        raise InputError(f"The base is 'gaussian' or 'plain', not {base!r}.")
    _check_finite(z, y)
    z, y = z.double(), y.double()
    check_pairs(z, y, 1)  # before the noise model sees them
    centred, covariance = y, y.new_zeros(y.shape[1], y.shape[1])
    if noise is not None:
        centred, covariance = y + noise.mean(y), noise.covariance(y)
    fitted = (fit_base(z, centred, covariance, standard_prior) if base == "gaussian"
              else plain_base(z, centred, covariance))
    denoiser, history = train(z, y, noise, fitted, options, checkpoint=checkpoint, progress=progress)
    denoiser.support = None if standard_prior else find_support(z)
    return denoiser, history


def train(z: Tensor, y: Tensor, noise: GaussianNoise | CallableNoise | None, base: GaussianBase,
          options: TrainingOptions = TrainingOptions(), *, checkpoint: str | os.PathLike | None = None,
          progress: bool = False) -> tuple[Denoiser, History]:
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
    noise : GaussianNoise, CallableNoise or None
        Noise model; None where `y` already holds noise.
    base : GaussianBase
        Gaussian base of the same r and k.
    options : TrainingOptions
        Settings of the loop.
    checkpoint : path, optional
        File that is written atomically at each evaluation; training resumes from it where it exists.
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
    ModelFileError
        If `checkpoint` is unreadable or belongs to other data, noise or options.
    SolveError
        If training diverges.
    """
    options.check()
    if z.ndim != 2 or y.ndim != 2 or len(z) != len(y) or (base.r, base.k) != (z.shape[1], y.shape[1]):
        raise InputError(f"Latents {tuple(z.shape)} and observations {tuple(y.shape)} do not fit the base "
                         f"(r = {base.r}, k = {base.k}).")
    _check_finite(z, y)
    with _threads(options.threads):
        return _Loop(z, y, noise, base, options, checkpoint).run(progress)


def _check_finite(z: Tensor, y: Tensor) -> None:
    if not isinstance(z, Tensor) or not isinstance(y, Tensor):
        raise InputError("Latents and observations must be tensors: pass torch.as_tensor(...) of them.")
    if not torch.isfinite(z).all() or not torch.isfinite(y).all():
        raise InputError("Training pairs hold values that are not finite; leave those samples out or simulate anew.")


class _Loop:
    """One training run; a checkpoint holds all of its state."""

    def __init__(self, z, y, noise, base, options, checkpoint):
        self.options, self.noise, self.history = options, noise, History()
        self.device = torch.device(options.device)
        held_out = max(1, round(options.validation_fraction * len(z)))
        if held_out >= len(z):
            raise InputError(f"{len(z)} pairs are too few to train on and hold some out: simulate more.")
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(options.seed))
        # Pairs stay in double precision until they are centred; the network works in single precision.
        move = {"device": self.device, "dtype": torch.float64}
        self.z, self.y = z[order[held_out:]].to(**move), y[order[held_out:]].to(**move)
        self.held_out = z[order[:held_out]].to(**move), y[order[:held_out]].to(**move)
        self.base = base.to(**move)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            self.network = ResidualMLP(base.r, base.k, options.width, options.depth).to(self.device)
        self.average = AveragedModel(self.network, multi_avg_fn=_warm_average(options.ema_decay))
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=options.learning_rate,
                                           weight_decay=options.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, self._rate)
        self.step, self.stale = 0, 0
        validation_generator = torch.Generator(self.device).manual_seed(options.seed + 1)
        self.validation = self._draw(*(x.repeat(_VALIDATION_DRAWS, 1) for x in self.held_out), validation_generator)
        zero = torch.zeros_like(self.validation[0])
        self.base_losses = self._pair_losses(zero)
        self.best_losses, self.best = self.base_losses, None
        self.history.base = float(self.base_losses.mean())
        parts = [z, y, *(getattr(base, f.name) for f in fields(base)), *self.validation]
        self.fingerprint = _fingerprint(parts, options)
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        if self.checkpoint is not None and not self.checkpoint.parent.is_dir():
            raise InputError(f"The folder of the checkpoint {self.checkpoint} does not exist: make it first.")
        if self.checkpoint is not None and self.checkpoint.exists():
            self._load()

    def _rate(self, step: int) -> float:
        warmup = max(1, round(0.02 * self.options.steps))
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.options.steps)))

    def _draw(self, z, y, generator):
        """One draw of measurement noise, noise level and diffusion noise: network inputs and target."""
        def normal(*shape):
            return torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        y = self._measure(y, generator)
        w, features = self.base.whiten(z, y).float(), self.base.features(y).float()
        angle = torch.arctan(torch.exp(self.options.log_sigma_mean + self.options.log_sigma_std * normal(len(z), 1)))
        white = normal(*w.shape)
        cosine, sine = torch.cos(angle), torch.sin(angle)
        return cosine * w + sine * white, angle, features, sine * w - cosine * white

    def _measure(self, y, generator):
        """Measurements (n, k) for observations (n, k), with fresh noise where its model is known."""
        return y if self.noise is None else self.noise.sample(y, generator)

    def _pair_losses(self, output: Tensor) -> Tensor:
        """Validation loss of each held-out pair, averaged over its draws; shape (held_out,)."""
        return (output - self.validation[3]).square().mean(1).view(_VALIDATION_DRAWS, -1).mean(0)

    def _evaluate(self) -> Tensor:
        self.average.eval()
        with torch.no_grad():
            parts = zip(*(x.split(8192) for x in self.validation[:3]))
            return self._pair_losses(torch.cat([self.average(*part) for part in parts]))

    def _train_step(self) -> Tensor:
        index = torch.randint(len(self.z), (self.options.batch,), generator=self.generator, device=self.device)
        v, angle, features, target = self._draw(self.z[index], self.y[index], self.generator)
        self.network.train()
        loss = (self.network(v, angle, features) - target).square().mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.average.update_parameters(self.network)
        return loss.detach()

    def run(self, progress: bool) -> tuple[Denoiser, History]:
        options = self.options
        with tqdm(total=options.steps, initial=self.step, desc="train", disable=not progress) as bar:
            while self.step < options.steps and self.stale < options.patience:
                losses = []
                while len(losses) < options.evaluate_every and self.step < options.steps:
                    losses.append(self._train_step())
                    self.step += 1
                    bar.update()
                self._record(float(torch.stack(losses).mean()))
                bar.set_postfix(loss=f"{self.history.validation[-1]:.4f}", base=f"{self.history.base:.4f}")
        return self._result()

    def _record(self, train_loss: float) -> None:
        losses = self._evaluate()
        value = float(losses.mean())
        if not math.isfinite(value) or not math.isfinite(train_loss):
            raise SolveError(f"Training diverged at step {self.step}: lower `learning_rate` "
                             f"({self.options.learning_rate:g}) or check the scale of the data.")
        self.history.step.append(self.step)
        self.history.train.append(train_loss)
        self.history.validation.append(value)
        if value < float(self.best_losses.mean()):
            self.best_losses, self.stale = losses, 0
            self.best = {name: x.clone() for name, x in self.average.module.state_dict().items()}
            self.history.best_step = self.step
        else:
            self.stale += 1
        if self.checkpoint is not None:
            self._save()

    def _result(self) -> tuple[Denoiser, History]:
        gain = self.base_losses - self.best_losses
        # Too few held-out pairs cannot speak for a network.
        threshold = 2 * float(gain.std()) / math.sqrt(len(gain)) if len(gain) >= _FEWEST_HELD_OUT else math.inf
        if self.best is None or not float(gain.mean()) > threshold:
            self.history.best_step = 0
            return Denoiser(self.base.to("cpu"), None), self.history
        network = ResidualMLP(**self.network.config).to(self.device)
        network.load_state_dict(self.best)
        denoiser = Denoiser(self.base, network.eval().requires_grad_(False))
        generator = torch.Generator(self.device).manual_seed(self.options.seed + 2)
        z, y = self.held_out[0], self._measure(self.held_out[1], generator)
        denoiser.spectrum = self._spectrum(denoiser, z, y, generator)
        collapse = measure_collapse(denoiser, (self.z, self._measure(self.y, generator)), (z, y), self.options.seed)
        collapse.warn()
        self.history.spread_ratio, self.history.neighbour_ratio = collapse.spread_ratio, collapse.neighbour_ratio
        return denoiser.to("cpu"), self.history

    def _spectrum(self, denoiser: Denoiser, z: Tensor, y: Tensor, generator: torch.Generator) -> Spectrum:
        """Spectrum of the posterior in base coordinates, from the network's mean square over held-out pairs."""
        w, features = self.base.whiten(z, y)[:_SPECTRUM_PAIRS], denoiser.features(y[:_SPECTRUM_PAIRS])
        angles = (torch.arange(_SPECTRUM_ANGLES, dtype=torch.float64) + 0.5) / _SPECTRUM_ANGLES * math.pi / 2
        speeds = []
        with torch.no_grad():
            for angle in angles.tolist():
                white = torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype)
                v = math.cos(angle) * w + math.sin(angle) * white
                speeds.append(denoiser.residual(v, v.new_full((len(v), 1), angle), features).square().mean())
        return fit_spectrum(angles, torch.stack(speeds))

    def _parts(self) -> dict:
        """The objects whose `state_dict` makes up the state of the run."""
        return {"network": self.network, "average": self.average, "optimiser": self.optimiser,
                "schedule": self.schedule}

    def _save(self) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"format": _FORMAT, "fingerprint": self.fingerprint, "step": self.step, "stale": self.stale,
                  "best": self.best, "best_losses": self.best_losses, "history": asdict(self.history),
                  "generator": self.generator.get_state()}
        partial = self.checkpoint.with_name(self.checkpoint.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        remedy = f"Delete {self.checkpoint} or name another file to start afresh."
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            form = state["format"]
        except Exception as error:
            raise ModelFileError(f"The checkpoint cannot be read ({error}). {remedy}") from error
        if form != _FORMAT or state["fingerprint"] != self.fingerprint:
            raise ModelFileError(f"The checkpoint belongs to other data, noise or options. {remedy}")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.stale = state["step"], state["stale"]
        self.best, self.best_losses = state["best"], state["best_losses"]
        self.history = History(**state["history"])
        self.generator.set_state(state["generator"].cpu())


@contextlib.contextmanager
def _threads(number: int | None):
    """Set torch's threads for the duration of a block."""
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def _warm_average(decay: float):
    """Exponential moving average whose memory grows with the number of updates n, so that the start is forgotten."""
    def update(averages, currents, n):
        get_ema_multi_avg_fn(min(decay, float((1 + n) / (10 + n))))(averages, currents, n)
    return update


def _fingerprint(parts: list[Tensor], options: TrainingOptions) -> str:
    """Digest of the options and of what a checkpoint depends on: data, base, and draws that show the noise model."""
    settings = {name: value for name, value in asdict(options).items() if name not in ("device", "threads")}
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for x in parts:
        digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
