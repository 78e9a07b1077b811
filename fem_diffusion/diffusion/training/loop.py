r"""The loop that every network is trained by: resumable, reproducible, stopped by held-out pairs.

A task says what is learned; the loop knows AdamW, the learning rate, the average of the weights, early stopping,
checkpoints and the progress bar.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fem_diffusion import files
from fem_diffusion.checks import check_count, check_device, check_number, check_path, check_seed
from fem_diffusion.diffusion.tensors import distinct
from fem_diffusion.diffusion.training.batched import Batched, flat, into
from fem_diffusion.diffusion.training.checkpoint import load_state, read_state, save_state
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.progress import bar

__all__ = ["History", "Loop", "Task", "TrainingOptions", "hold_out", "sure", "threads", "unpack_history"]

N = TypeVar("N", bound=nn.Module)

_FEWEST_HELD_OUT = 10
# Share of the pairs from which equal latents are a value that their law has, and not one of them read several times.
_SHARED = 0.05
# Beyond a log sigma of 20 noise levels leave the range of single precision.
_BOUNDS: dict[str, dict[str, float]] = {
    "learning_rate": {"above": 0}, "weight_decay": {"least": 0, "below": 1}, "ema_decay": {"least": 0, "below": 1},
    "validation_fraction": {"above": 0, "below": 1}, "log_sigma_mean": {"least": -20.0, "most": 20.0},
    "log_sigma_std": {"above": 0, "most": 20.0}}


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of the training loop. InputError if a setting is out of its range.

    Parameters
    ----------
    steps, batch : int
        Largest number of optimiser steps, pairs a step of each member.
    learning_rate, weight_decay : float
        Of AdamW; the rate warms up over 2 % of the steps and falls to zero as a cosine.
    ema_decay : float
        Decay a step of the exponential moving average of the weights, which is what is kept.
    width, depth, members : int
        Of the residual network; number of score networks that are trained side by side, from weights and on batches of
        their own, and averaged. An emulator is one network.
    validation_fraction : float
        Share of the pairs held out for early stopping.
    evaluate_every, patience : int
        Steps between evaluations of the validation loss, and between checkpoints; evaluations without a better one
        before training stops.
    log_sigma_mean, log_sigma_std : float
        Law of log sigma in training, in base coordinates.
    seed, device : int, str
        Of initial weights, batches and noise; of the training, e.g. "cpu" or "cuda".
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
    members: int = 1
    validation_fraction: float = 0.1
    evaluate_every: int = 250
    patience: int = 8
    log_sigma_mean: float = 0.0
    log_sigma_std: float = 1.2
    seed: int = 0
    device: str = "cpu"
    threads: int | None = 1

    def __post_init__(self) -> None:
        """Raise InputError where a setting is out of its range; numbers become Python's, as files want them."""
        counts = ["steps", "batch", "width", "depth", "members", "evaluate_every", "patience"] + ["threads"] * (
            self.threads is not None)
        checked = {name: check_count(getattr(self, name), name) for name in counts}
        checked |= {name: check_number(getattr(self, name), name, **bounds) for name, bounds in _BOUNDS.items()}
        for name, value in (checked | {"seed": check_seed(self.seed), "device": str(self.device)}).items():
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """Raise InputError where the device of the training is not there, of which only the training process knows."""
        check_device(self.device)


@dataclass(repr=False)
class History:
    """Training curve: losses at each evaluation; 1 is the loss of the base where the base is the truth.

    Parameters
    ----------
    step, train, validation : list
        Optimiser step, mean training loss since the last evaluation, validation loss of the averaged weights.
    base, best_step : float, int
        Validation loss without a network; step of the weights that are kept, 0 where none are.
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

    def __repr__(self) -> str:
        if not self.step:
            return "History: no training"
        return (f"History: {self.step[-1]} steps, losses {self.base:.4g} of the base and {min(self.validation):.4g}, "
                f"step {self.best_step} kept")


class Task(Protocol[N]):
    """What is learned."""

    name: str             # of the progress bar
    size: int             # number of entries that batches are drawn from
    base_losses: Tensor   # of each held-out pair without a network, shape (held_out,)
    parts: list           # tensors that a checkpoint depends on

    def network(self) -> N:
        """A network before training; the loop has seeded torch."""
        ...

    def joined(self, networks: list[N]) -> N:
        """What answers as these networks do on average."""
        network, = networks
        return network

    def prepare(self, generator: torch.Generator) -> None:
        """Called after every evaluation and before the first step: what follows depends on the generator alone."""

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """A batch of the entries `index` (B,), as `loss` takes it."""
        ...

    def loss(self, network: N, *batch: Tensor) -> Tensor:
        """Loss of a batch, a scalar to be differentiated; where there are several members, under `torch.vmap`."""
        ...

    def evaluate(self, network: N) -> Tensor:
        """Loss of each held-out pair, shape (held_out,), from draws that are always the same."""
        ...

    def gain(self, losses: Tensor) -> Tensor:
        """What a network of these losses is better at each held-out pair, (held_out,); its mean has to be sure."""
        return self.base_losses - losses


class Loop(Generic[N]):
    """One training run, of one network or of several side by side.

    The file `checkpoint` holds all of its state, is written atomically at each evaluation, and the run resumes from it.
    InputError if its folder is missing; FileError if it is unreadable or belongs to another task or other options.
    """

    def __init__(self, task: Task[N], options: TrainingOptions, checkpoint: str | os.PathLike | None):
        self.task, self.options, self.history = task, options, History()
        self.device = torch.device(options.device)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            self.networks = [task.network().to(self.device) for _ in range(options.members)]
        self.batched = Batched(self.networks[0], task.loss)
        # One tensor of all weights, (members, .): clipping, AdamW and the average take one pass over the memory each.
        self.weights = nn.Parameter(torch.stack([flat(network) for network in self.networks]))
        self.average, self.best = self.weights.detach().clone(), None
        for network, row in zip(self.networks, self.average):
            into(network, row)
        self.optimiser = torch.optim.AdamW([self.weights], lr=options.learning_rate, weight_decay=options.weight_decay,
                                           fused=self.device.type in ("cpu", "cuda"))
        self.step, self.stale, self.best_losses = 0, 0, task.base_losses
        self.history.base = float(task.base_losses.mean())
        self.fingerprint, self.marks = _fingerprint(options), _marks(task.parts)
        self.checkpoint = None if checkpoint is None else check_path(checkpoint, "checkpoint")
        if self.checkpoint is not None and not self.checkpoint.parent.is_dir():
            raise InputError(f"The folder of the checkpoint {self.checkpoint} does not exist: make it first.")
        if self.checkpoint is not None and self.checkpoint.exists():
            content = read_state(self.checkpoint, self.device.type)
            marks = content.array("marks", None, 2)
            same = content.value("fingerprint", str) == self.fingerprint and marks.shape == self.marks.shape
            if not same or not np.allclose(marks, self.marks, rtol=1e-4, atol=1e-4):
                raise content.error("belongs to other data, noise or options")
            load_state(content, self)
            self.history = unpack_history(content)

    def rate(self, step: int) -> float:
        """Learning rate at a step, as a share of the largest."""
        warmup = max(1, round(0.02 * self.options.steps))
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.options.steps)))

    def run(self, progress: bool) -> N | None:
        """Train; the network with the best loss on held-out pairs, or None where it does not beat the base."""
        options = self.options
        # Two runs that write one checkpoint would go on from each other's weights.
        lock = contextlib.nullcontext() if self.checkpoint is None else files.locked(
            self.checkpoint.with_name(f"{self.checkpoint.name}.lock"), f"The checkpoint {self.checkpoint}")
        with lock, bar(self._expected(), self.task.name, progress, self.step) as shown:
            while self.step < options.steps and self.stale < options.patience:
                losses = []
                self.task.prepare(self.generator)
                while len(losses) < options.evaluate_every and self.step < options.steps:
                    losses.append(self._train_step())
                    self.step += 1
                    shown.update()
                self._record(float(torch.stack(losses).mean()))
                shown.total = self._expected()
                shown.set_postfix(refresh=False, base=f"{self.history.base:.4g}",
                                  loss=f"{self.history.validation[-1]:.4g}")
        return self._result()

    def _expected(self) -> int:
        """Steps after which training ends unless the loss on held-out pairs falls again."""
        return min(self.options.steps, self.step + (self.options.patience - self.stale) * self.options.evaluate_every)

    def _train_step(self) -> Tensor:
        """Loss of a batch for each member, shape (members,), after which the weights have moved."""
        options, generator = self.options, self.generator
        batches = []
        for _ in self.networks:
            index = torch.randint(self.task.size, (options.batch,), generator=generator, device=self.device)
            batches.append(self.task.draw(index, generator))
        losses = self.batched(self.weights, batches)
        gradient, = torch.autograd.grad(losses.sum(), self.weights)
        # Each member by itself, as if it were alone.
        self.weights.grad = gradient.mul_((1 / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1))
        self.optimiser.param_groups[0]["lr"] = options.learning_rate * self.rate(self.step)
        self.optimiser.step()
        # The memory of the average grows with the number of steps, so that the start is forgotten.
        n = self.step
        decay = min(options.ema_decay, (1 + n) / (10 + n)) if n else 0.0
        self.average.lerp_(self.weights.detach(), 1 - decay)
        return losses.detach()

    def _record(self, train_loss: float) -> None:
        self.batched.check()
        with torch.no_grad():
            losses = self.task.evaluate(self.task.joined([network.eval() for network in self.networks]))
        value = float(losses.mean())
        if not math.isfinite(value) or not math.isfinite(train_loss):
            raise SolveError(f"Training diverged at step {self.step}: lower `learning_rate` "
                             f"({self.options.learning_rate:g}) or check the scale of the data.")
        self.history.step.append(self.step)
        self.history.train.append(train_loss)
        self.history.validation.append(value)
        if value < float(self.best_losses.mean()):
            self.best_losses, self.best, self.stale = losses, self.average.clone(), 0
            self.history.best_step = self.step
        else:
            self.stale += 1
        if self.checkpoint is not None:
            self._save(self.checkpoint)

    def _save(self, path: Path) -> None:
        save_state(path, self, {"fingerprint": self.fingerprint, "history": asdict(self.history)})

    def _result(self) -> N | None:
        if self.best is None or not sure(self.task.gain(self.best_losses)):
            self.history.best_step = 0
            return None
        # Training may go on, whose networks follow the average.
        found = [deepcopy(network) for network in self.networks]
        for network, row in zip(found, self.best):
            into(network, row.clone())
        return self.task.joined(found).eval().requires_grad_(False)


def sure(gain: Tensor) -> bool:
    """Whether held-out pairs gain (n,), on average, by more than two standard errors; too few cannot say so."""
    return len(gain) >= _FEWEST_HELD_OUT and float(gain.mean()) > 2 * float(gain.std()) / math.sqrt(len(gain))


def unpack_history(content: files.Content) -> History:
    """Training curve of a file; FileError where it is none."""
    found = content.value("history", dict)
    curves = [found.get(name) for name in ("step", "train", "validation")]
    numbers = [found.get(name) for name in ("base", "best_step", "spread_ratio", "neighbour_ratio")]
    if set(found) != set(asdict(History())) or not all(
            isinstance(curve, list) and len(curve) == len(curves[0]) for curve in curves) or not all(
            type(x) in (int, float) and not math.isinf(x) for x in [*numbers, *sum(curves, [])]):
        raise content.error("holds no training curve")
    return History(**found)


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Set torch's threads for the duration of a block."""
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def hold_out(z: Tensor, options: TrainingOptions) -> tuple[Tensor, Tensor]:
    """Indices of the training pairs and of the held-out ones; InputError if too few are left to train on.

    Latents (n, r) that are read several times are all in training, or held out, but for values that many pairs share.
    """
    which = distinct(z)[1]
    which = torch.where(which.bincount()[which] > _SHARED * len(z), len(z) + torch.arange(len(z)), which)
    which = which.unique(return_inverse=True)[1]
    size = int(which.max()) + 1
    held_out = max(round(options.validation_fraction * size), min(_FEWEST_HELD_OUT, size // 4), 1)
    if held_out >= size:
        raise InputError(f"{size} pairs are too few to train on and hold some out: simulate more.")
    place = torch.randperm(size, generator=torch.Generator().manual_seed(options.seed)).argsort()[which]
    order, apart = place.argsort(stable=True), int((place < held_out).sum())
    return order[apart:], order[:apart]


def _fingerprint(options: TrainingOptions) -> str:
    """Digest of the options that a checkpoint depends on."""
    settings = {name: value for name, value in asdict(options).items() if name not in ("device", "threads")}
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()


def _marks(parts: list[Tensor]) -> Tensor:
    """Two numbers for each tensor that tell it from others, though not from its rounding errors; shape (n, 2)."""
    # Linear algebra on several threads repeats itself up to rounding only, and a checkpoint has to survive that.
    marks = []
    for part in parts:
        x = part.detach().flatten().double().cpu()
        norm = x.norm()
        weights = torch.cos(0.7 * torch.arange(len(x), dtype=x.dtype)**1.1)
        marks.append(torch.stack([norm, (x * weights).sum() / norm.clamp(min=1e-300)]))
    return torch.stack(marks)
