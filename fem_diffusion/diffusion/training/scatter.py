r"""How noise is learnt that is not known but from pairs that hold it: `LearntNoise` by its density.

Training begins with the mean, by least squares: a density, whose spreads are as wide as the mean is off, rests for long
before it falls. One normal law follows. Many readings of few pairs are learnt by heart, above all how they go together:
where training ends early, O is tried that is the same everywhere. To what one law leaves, mixtures that are the same
everywhere are fitted by expectation maximisation, and as long as twice as many laws say more of held-out pairs, there
are twice as many. Where there are several, training goes on from there. Where anything is found, a mixture for each
reading by itself is trained, too, from the mean on, and held-out pairs choose.
"""

import math
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fem_diffusion.diffusion.base.emulator import Emulator, spread
from fem_diffusion.diffusion.base.learnt import FULL, LearntNoise, each, log_density, numbers, places, whitened
from fem_diffusion.diffusion.sampling.mixtures import normal_laws
from fem_diffusion.diffusion.training.loop import Loop, Task, TrainingOptions, hold_out, sure

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

__all__ = ["depends", "fit_noise"]

# Layers more than of other networks.
_DEEPER = 2
# Normal laws that are mixed, at most; starts of expectation maximisation and what its covariances are raised by.
_MOST, _STARTS, _RAISED = 16, 3, 1e-4
# Of each reading, where readings scatter apart.
_EACH = 8
# Pairs that mixtures are fitted to, at most, and pairs that are whitened at once.
_FITTED, _TOGETHER = 5000, 1024
# Steps of the mean and of mixtures, and the rate of one of all readings, as shares of the law's: faster ones lose where
# it starts.
_STEPS, _RATE = 0.3, 0.05
# Pairs with which each held-out one is mixed up.
_MIXED_UP = 16
# Noise that readings have at least, in units of their spread.
_BLUR = 1e-6


def _found(network: "Emulator | _Constant", z: Tensor) -> Tensor:
    """What a network finds (B, q) at latents (B, r) as it takes them, in single precision."""
    return network(z) if isinstance(network, _Constant) else network.offset.float() + network.correction(z)


def _copy(source: Emulator, target: Emulator) -> None:
    """Take weights over, of the outputs that both have."""
    target.hidden.load_state_dict(source.hidden.state_dict())
    assert source.head is not None and target.head is not None   # of a depth above 0
    same = min(source.config["s"], target.config["s"])
    target.head.weight.data[:same] = source.head.weight.data[:same]


def _turned(mean: Emulator, matrix: Tensor) -> Emulator:
    """The same mean in other coordinates of the readings, by a matrix (k, k)."""
    mean = deepcopy(mean)
    assert mean.head is not None
    mean.head.weight.data[:len(matrix)] = matrix @ mean.head.weight.data[:len(matrix)]
    return mean


class _Constant(nn.Module):
    """An emulator of m and D beside numbers that are the same everywhere, which are all there is of O."""

    def __init__(self, r: int, k: int, width: int, depth: int, start: Emulator | None):
        super().__init__()
        self.inner = Emulator(r, 2 * k, width, depth, scaled=False)
        if start is not None:
            _copy(start, self.inner)
        self.shift = nn.Parameter(torch.zeros(numbers(k)))

    def forward(self, z: Tensor) -> Tensor:
        part = self.inner.correction(z)
        return self.shift + nn.functional.pad(part, (0, len(self.shift) - part.shape[1]))

    def whole(self) -> Emulator:
        """As one emulator."""
        inner, config = self.inner, self.inner.config
        found = Emulator(config["r"], len(self.shift), config["width"], config["depth"], scaled=False)
        _copy(inner, found)
        found.offset[:] = self.shift.data
        return found


class _Likelihood(Task[Emulator | _Constant]):
    """The task of `fit_noise`: minus the log density of what the emulator leaves, in units of the constant covariance.

    Readings get fresh noise where it can be drawn.
    """

    name = "noise"
    start: Emulator | None   # of training, where it goes on
    constant: bool           # whether O is
    mean: bool               # whether that is all, learnt by least squares
    apart: bool              # whether each reading has a mixture of its own

    def __init__(self, z: Tensor, y: Tensor, f: Tensor, white: Callable[[Tensor, Tensor, torch.Generator], Tensor],
                 training: Tensor, held_out: Tensor, options: TrainingOptions):
        self.options, self.size, self.white = options, len(training), white
        self.z, self.y, self.f = z[training], y[training], f[training]
        generator = torch.Generator(z.device).manual_seed(options.seed + 1)
        self.validation = z[held_out], white(y[held_out], f[held_out], generator)
        # The validation holds what noise is like, and the units of what is left.
        self.parts = [z, y, f, *self.validation]
        self.start, self.constant, self.mean, self.apart = None, False, False, False
        self.base_losses = self.validation[1].square().sum(1) / 2

    def network(self) -> Emulator | _Constant:
        r, k, options = self.z.shape[1], self.validation[1].shape[1], self.options
        if self.constant:
            return _Constant(r, k, options.width, options.depth, self.start)
        return Emulator(r, numbers(k), options.width, options.depth, scaled=False) if self.start is None else deepcopy(
            self.start)

    def _losses(self, network: Emulator | _Constant, z: Tensor, x: Tensor) -> Tensor:
        found = _found(network, z)
        if self.mean:
            return (x - found[:, :x.shape[1]]).square().sum(1) / 2
        return -log_density(x, each(found, x.shape[1]) if self.apart else found)

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return self.z[index], self.white(self.y[index], self.f[index], generator)

    def loss(self, network: Emulator | _Constant, *batch: Tensor) -> Tensor:
        return self._losses(network, *batch).mean()

    @torch.no_grad()
    def evaluate(self, network: Emulator | _Constant) -> Tensor:
        return self._losses(network, *self.validation)

    @torch.no_grad()
    def mixed_up(self, network: Emulator | _Constant) -> Tensor:
        """Losses of held-out readings (n,), each with the latents of some others."""
        z, x = self.validation
        return torch.stack([self._losses(network, z.roll(i + 1, 0), x) for i in range(min(_MIXED_UP, len(z)))]).mean(0)

    def rest(self, first: Emulator | None) -> tuple[Tensor, Tensor]:
        """What one law, or a mean, leaves of pairs and held-out ones, on the CPU: white as far as that is the law."""
        def rest(z: Tensor, x: Tensor) -> Tensor:
            return x if first is None else torch.cat([whitened(x, _found(first, z))[0] for z, x in zip(
                z.split(_TOGETHER), x.split(_TOGETHER))])
        generator = torch.Generator(self.z.device).manual_seed(self.options.seed + 2)
        e, held_out = (rest(*part).double().cpu() for part in (
            (self.z, self.white(self.y, self.f, generator)), self.validation))
        return e, held_out

    def begin(self, first: Emulator | None, mixture: Tensor, apart: bool) -> None:
        """Start at this network, or none, with a mixture behind it, as `_mixture` finds it."""
        r, k = self.z.shape[1], self.validation[1].shape[1]
        count = 2 * k if apart else numbers(k)
        mixture = mixture.repeat_interleave(k) if apart else mixture
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            start = Emulator(r, count + len(mixture), self.options.width, self.options.depth, scaled=False)
        if first is not None:
            _copy(first, start)
            start.offset[:count] = first.offset[:count]
        start.offset[count:] = mixture
        self.start, self.constant, self.apart = start.to(self.z.device), False, apart
        self.name = "mixtures" if apart else "mixture"
        # Weights of a checkpoint belong to the mixture that they were trained with.
        self.parts = [*self.parts, mixture]
        self.base_losses = self.evaluate(self.start)


def _fitted(e: Tensor, count: int, seed: int) -> tuple["GaussianMixture", Tensor]:
    """A mixture of so many normal laws of e (n, k), and its numbers, as `_split` takes them."""
    (rows, columns), full = places(e.shape[1], e.device), e.shape[1] <= FULL
    law = normal_laws(e[:_FITTED], count, seed, covariance_type="full" if full else "diag", n_init=_STARTS,
                      reg_covar=_RAISED, tol=1e-4, max_iter=200)
    shares, means, root = (torch.from_numpy(x) for x in (law.weights_, law.means_, law.precisions_cholesky_))
    root = root if full else torch.diag_embed(root)
    d = root.diagonal(dim1=1, dim2=2)
    low = (root.mT / d[..., None])[:, rows, columns]
    return law, torch.cat([shares.log(), torch.cat([means, d.log(), low], 1).flatten()])


def _singly(e: Tensor) -> Tensor:
    """Numbers (n, k) one by one, (n k, 1)."""
    return e.reshape(-1, 1)


def _mixture(e: Tensor, held_out: Tensor, seed: int) -> Tensor | None:
    """Normal laws that are mixed to the law of e (n, k), the same everywhere.

    None where two of them do not get more density at `held_out` (m, k) than a standard normal law, by more than two
    standard errors; they are doubled until twice as many do not.
    """
    best, before, count = None, -(held_out.square() + math.log(2 * math.pi)).sum(1) / 2, 2
    while count <= min(_MOST, len(e)):
        law, found = _fitted(e, count, seed)
        after = torch.from_numpy(law.score_samples(held_out.numpy()))
        if not sure(after - before):
            break
        best, before, count = found, after, 2 * count
    return best


def fit_noise(z: Tensor, y: Tensor, f: Tensor, residual: Tensor, draw: Callable[[Tensor, torch.Generator], Tensor],
              options: TrainingOptions, checkpoint: str | os.PathLike | None, progress: bool) -> LearntNoise | None:
    """The scatter of readings around what an emulator says of them.

    None where held-out pairs do not get more density by it than by their constant covariance, by more than two standard
    errors; errors are those of `fit_emulator`.

    Parameters
    ----------
    z, y, f : Tensor
        Latents (n, r), what readings are drawn of, and the emulator's values, (n, k) each.
    residual : Tensor
        Constant covariance (k, k) of readings minus the emulator's.
    draw : Callable
        Readings (B, k) of some y (B, k) by a generator.
    """
    k = y.shape[1]
    task, law, whitener, (centre, size) = _prepared(z, y, f, residual, draw, options)
    mean, network = _trained(task, law, checkpoint, progress)
    losses = task.base_losses if network is None else task.evaluate(network)
    e, held_out = task.rest(network)
    mixture = _mixture(e, held_out, options.seed)
    apart = k > 1 and (network is not None or mixture is not None or _mixture(
        _singly(e), _singly(held_out), options.seed) is not None)
    if mixture is not None:
        task.begin(network, mixture, False)
        slow = law if network is None else replace(_fewer(law), learning_rate=_RATE * law.learning_rate)
        network, losses = _mixed(task, slow, ".mixture", checkpoint, progress)
    losses = losses - torch.linalg.slogdet(whitener)[1]
    if apart:
        task, law, unit, _ = _prepared(z, y, f, residual, draw, options, apart=True)
        if mean is not None:
            mean = _turned(mean, (unit[:, None] * torch.linalg.inv(whitener)).to(task.z))
        other, found = _apart(task, law, mean, checkpoint, progress)
        # Of readings in their own units.
        if sure(losses - (found - unit.log().sum())):
            network, whitener = other, unit
    if network is None:
        return None
    assert isinstance(network, Emulator)
    network = network.to("cpu").eval().requires_grad_(False)
    network.centre, network.unit = centre, size
    return LearntNoise(network, whitener, torch.arange(k), whitener.new_zeros(0, 0))


def _fewer(options: TrainingOptions) -> TrainingOptions:
    return replace(options, steps=max(1, round(_STEPS * options.steps)))


def _mixed(task: _Likelihood, options: TrainingOptions, name: str, checkpoint: str | os.PathLike | None,
           progress: bool) -> tuple[Emulator | _Constant | None, Tensor]:
    """A mixture, trained from where the task begins, and its losses of held-out pairs."""
    loop = Loop(task, options, None if checkpoint is None else f"{checkpoint}{name}")
    network = loop.run(progress)
    return (task.start, task.base_losses) if network is None else (network, loop.best_losses)


def _apart(task: _Likelihood, options: TrainingOptions, mean: Emulator | None, checkpoint: str | os.PathLike | None,
           progress: bool) -> tuple[Emulator | _Constant | None, Tensor]:
    """Mixtures of single readings, trained from the mean on, and their losses of held-out pairs."""
    task.begin(mean, _fitted(_singly(task.rest(mean)[0]), _EACH, options.seed)[1], True)
    return _mixed(task, _fewer(options), ".apart", checkpoint, progress)


def depends(z: Tensor, y: Tensor, options: TrainingOptions, checkpoint: str | os.PathLike | None,
            progress: bool) -> bool:
    """Whether one normal law of numbers (n, k), as of others (n, r), tells less of held-out pairs that are mixed up.

    So what is no normal number, of which a law tells something whatever the others are, is none that depends on them.
    """
    rest = y - y.mean(0)
    task, options, *_ = _prepared(z, y, y.mean(0).expand_as(y), rest.T @ rest / len(y), lambda y, generator: y, options)
    _, network = _trained(task, options, checkpoint, progress)
    return network is not None and sure(task.mixed_up(network) - task.evaluate(network))


def _prepared(z: Tensor, y: Tensor, f: Tensor, residual: Tensor, draw: Callable[[Tensor, torch.Generator], Tensor],
              options: TrainingOptions, apart: bool = False
              ) -> tuple[_Likelihood, TrainingOptions, Tensor, tuple[Tensor, Tensor]]:
    """The task of `fit_noise`, its options, W (k, k), of readings apart (k,), and centre and size (r,) of the latents.
    """
    training, held_out = hold_out(z, options)
    # Of readings without noise, or sums of others, nothing would be left beside these, and a density is infinite.
    blur = _BLUR * spread(y - y.mean(0))
    residual = residual + torch.diag(blur**2)
    unit = residual.diagonal().sqrt()
    values, axes = torch.linalg.eigh(residual / unit / unit[:, None])
    values = values.clamp(min=float(values[-1]) * _BLUR**2)
    if apart:
        whitener = 1 / unit
    elif len(unit) <= FULL:
        root = torch.linalg.cholesky(axes * values @ axes.T)
        whitener = torch.linalg.solve_triangular(root, torch.eye(len(unit), dtype=y.dtype), upper=False) / unit
    else:
        whitener = (axes / values.sqrt()).flip(1).T / unit
    centre = z[training].mean(0)
    size = spread(z[training] - centre)
    device = torch.device(options.device)
    across, blur, (latents, y, f) = whitener.to(device), blur.to(device), (
        x.to(device) for x in ((z - centre) / size, y, f))

    def white(y: Tensor, f: Tensor, generator: torch.Generator) -> Tensor:
        rest = draw(y, generator) - f
        rest = rest + blur * torch.randn(rest.shape, generator=generator, dtype=rest.dtype, device=device)
        return (rest * across if apart else rest @ across.T).float()
    # Logarithms of spreads bend more than means.
    options = replace(options, members=1, batch=min(options.batch, len(training)), depth=options.depth + _DEEPER)
    task = _Likelihood(latents.float(), y, f, white, training, held_out, options)
    return task, options, whitener, (centre, size)


def _trained(task: _Likelihood, options: TrainingOptions, checkpoint: str | os.PathLike | None,
             progress: bool) -> tuple[Emulator | None, Emulator | None]:
    """The mean, and one normal law, with O that depends on the latents or is the same everywhere, as pairs want it."""
    def run(name: str, options: TrainingOptions) -> tuple[Loop[Emulator | _Constant], Emulator | _Constant | None]:
        loop = Loop(task, options, None if checkpoint is None else f"{checkpoint}{name}")
        # Noise that is the same everywhere is told soon, and is to cost little; where something is found, all patience.
        loop.options = replace(options, patience=-(-options.patience // 2))
        network = loop.run(progress)
        if loop.best is not None:
            loop.options = options
            network = loop.run(progress)
        return loop, network
    task.mean = True
    _, start = run(".mean", _fewer(options))
    assert not isinstance(start, _Constant)
    task.mean, task.start = False, None if start is None else deepcopy(start).requires_grad_(True)
    loop, network = run("", options)
    assert not isinstance(network, _Constant)
    if loop.step >= options.steps or task.validation[1].shape[1] == 1:
        return start, network
    task.constant = True
    other, found = run(".constant", options)
    if not isinstance(found, _Constant) or network is not None and other.best_losses.mean() > loop.best_losses.mean():
        return start, network
    return start, found.whole().to(task.z.device).requires_grad_(False)
