r"""Noise that is learnt: the law of readings given the latents, where nothing is known of it but pairs that hold it.

Readings scatter around the emulator's f(z) by a Gaussian law whose mean and covariance depend on the latents,

.. math:: y | z \sim N\big(f(z) + W^{-1} m(z),\ (T W)^{-1} (T W)^{-T}\big), \qquad T(z) = e^{D(z)} (1 + O(z)).

W whitens the constant covariance, by its Cholesky factor; D is diagonal and O strictly lower triangular, both and m are
what one network emulates, and where that is zero the covariance is the constant one. T is a factor of the precision: it
has an inverse whatever the network says, and no system is solved for a density,
:math:`\log p(y | z) = \mathrm{tr} D - |T (W (y - f) - m)|^2 / 2 + \mathrm{const}`, by which it is trained. Of many
readings W are principal axes, the widest first, and O has few columns: what the widest say of the others.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fem_diffusion.diffusion.base.emulator import Emulator, spread
from fem_diffusion.diffusion.tensors import Tensors
from fem_diffusion.diffusion.training.loop import Loop, Task, TrainingOptions, hold_out

__all__ = ["LearntNoise", "fit_noise"]

# Readings up to which O is full, and columns that it has beyond.
_FULL, _COLUMNS = 24, 12
# Layers more than of other networks.
_DEEPER = 2


@dataclass(frozen=True, eq=False, repr=False)
class LearntNoise(Tensors):
    """Scatter of readings around an emulator, as the latents make it; from `fit_noise`.

    Parameters
    ----------
    network : Emulator
        Of m, D and O, in this order, for k readings.
    whitener : Tensor
        W, shape (k, k).
    sensors : Tensor
        Numbers of the readings that are at hand, shape (j,), all of them unless some have failed.
    """

    network: Emulator
    whitener: Tensor
    sensors: Tensor

    def select(self, sensors: Tensor) -> "LearntNoise":
        """Of some of the readings at hand, by their numbers."""
        return replace(self, sensors=self.sensors[sensors])

    @property
    def whole(self) -> bool:
        """Whether all readings are at hand."""
        return len(self.sensors) == len(self.whitener)

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, j) of the scatter at latents (B, r), and covariance (B, j, j)."""
        m, d, low = _parts(self.network(z), len(self.whitener))
        factor = torch.exp(d)[:, :, None] * (low + torch.eye(low.shape[1]).to(low)) @ self.whitener
        root = torch.linalg.inv(factor)[:, self.sensors]
        return m @ self._back.T, root @ root.mT

    def mean_with_pull(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Mean of the scatter (B, j), and the map of covectors (B, j) to their pull-back (B, r)."""
        found, pull = self.network.with_pull(z)
        k, back = len(self.whitener), self._back
        return found[:, :k] @ back.T, lambda covector: pull(nn.functional.pad(
            covector @ back, (0, found.shape[1] - k)))

    @property
    def _back(self) -> Tensor:
        """W⁻¹, of the readings at hand, (j, k)."""
        return torch.linalg.inv(self.whitener)[self.sensors]

    def log_density(self, rest: Tensor, z: Tensor) -> Tensor:
        """log p (B,) of readings minus the emulator's, `rest` (B, j), at latents (B, r), up to a constant."""
        if self.whole:
            white, d = _whitened(rest @ self.whitener.mT, self.network(z))
            return d.sum(1) - white.square().sum(1) / 2
        mean, covariance = self.moments(z)
        root, failed = torch.linalg.cholesky_ex(covariance)
        white = torch.linalg.solve_triangular(root, (rest - mean)[:, :, None], upper=False)[:, :, 0]
        found = -root.diagonal(dim1=1, dim2=2).log().sum(1) - white.square().sum(1) / 2
        # Far out, where a network means nothing, rounding may leave no covariance.
        return torch.where(failed > 0, -torch.inf, found)

    def with_pull(self, rest: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of `log_density` by the rest, (B, j), and by the latents beside it, (B, r)."""
        if not self.whole:
            with torch.enable_grad():
                at = rest.detach().requires_grad_(), z.detach().requires_grad_()
                return torch.autograd.grad(self.log_density(*at).sum(), at)   # pyright: ignore
        k = len(self.whitener)
        found, pull = self.network.with_pull(z)
        m, d, low = _parts(found, k)
        x = rest @ self.whitener.mT - m
        white = torch.exp(d) * (x + (low @ x[:, :, None])[:, :, 0])
        scaled = torch.exp(d) * white
        back = scaled + (low.mT @ scaled[:, :, None])[:, :, 0]   # Tᵀ T x
        rows, columns = _places(k, z.device)
        slopes = torch.cat([back, 1 - white.square(), -scaled[:, rows] * x[:, columns]], 1)
        return -back @ self.whitener, pull(slopes)


def _places(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of O."""
    rows, columns = torch.tril_indices(k, k, -1, device=device)
    if k > _FULL:
        rows, columns = rows[columns < _COLUMNS], columns[columns < _COLUMNS]
    return rows, columns


def numbers(k: int) -> int:
    """How many the network emulates for k readings."""
    return 2 * k + len(_places(k, torch.device("cpu"))[0])


def _parts(found: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """m (B, k), the diagonal of D (B, k) and O (B, k, k)."""
    rows, columns = _places(k, found.device)
    low = found.new_zeros(len(found), k, k)
    low[:, rows, columns] = found[:, 2 * k:]
    return found[:, :k], found[:, k:2 * k], low


def _whitened(x: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """T (x - m) of W (y - f), x (B, k); and the diagonal of D."""
    m, d, low = _parts(found, x.shape[1])
    x = x - m
    return torch.exp(d) * (x + (low @ x[:, :, None])[:, :, 0]), d


class _Likelihood(Task[Emulator]):
    """The task of `fit_noise`: minus the log density of what the emulator leaves, in units of the constant covariance.

    Readings get fresh noise where it can be drawn.
    """

    name = "noise"

    def __init__(self, z: Tensor, y: Tensor, f: Tensor, white: Callable[[Tensor, Tensor, torch.Generator], Tensor],
                 training: Tensor, held_out: Tensor, options: TrainingOptions):
        self.options, self.size, self.white = options, len(training), white
        self.z, self.y, self.f = z[training], y[training], f[training]
        x = white(y[held_out], f[held_out], torch.Generator().manual_seed(options.seed + 1))
        self.validation = z[held_out], x
        self.parts = [z, y]
        self.base_losses = x.square().sum(1) / 2

    def network(self) -> Emulator:
        k, options = self.validation[1].shape[1], self.options
        return Emulator(self.z.shape[1], numbers(k), options.width, options.depth)

    @staticmethod
    def _losses(network: Emulator, z: Tensor, x: Tensor) -> Tensor:
        white, d = _whitened(x, network.correction(z))
        return white.square().sum(1) / 2 - d.sum(1)

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return self.z[index], self.white(self.y[index], self.f[index], generator)

    def loss(self, network: Emulator, *batch: Tensor) -> Tensor:
        return self._losses(network, *batch).mean()

    def evaluate(self, network: Emulator) -> Tensor:
        return self._losses(network, *self.validation)


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
    training, held_out = hold_out(z, options)
    unit = residual.diagonal().sqrt()
    scaled = residual / unit / unit[:, None]
    if k <= _FULL:
        identity = torch.eye(k, dtype=y.dtype)
        whitener = torch.linalg.solve_triangular(torch.linalg.cholesky(scaled), identity, upper=False) / unit
    else:
        values, axes = torch.linalg.eigh(scaled)
        whitener = (axes / values.clamp(min=values[-1] * 1e-12).sqrt()).flip(1).T / unit
    centre = z[training].mean(0)
    size = spread(z[training] - centre)
    device = torch.device(options.device)
    across, (latents, y, f) = whitener.to(device), (x.to(device) for x in ((z - centre) / size, y, f))

    def white(y: Tensor, f: Tensor, generator: torch.Generator) -> Tensor:
        return ((draw(y, generator) - f) @ across.T).float()
    # Noise that is the same everywhere is told soon, and is to cost little; logarithms of spreads bend more than means.
    options = replace(options, members=1, batch=min(options.batch, len(training)), depth=options.depth + _DEEPER,
                      patience=-(-options.patience // 2))
    task = _Likelihood(latents.float(), y, f, white, training, held_out, options)
    network = Loop(task, options, checkpoint).run(progress)
    if network is None:
        return None
    network = network.to("cpu").eval().requires_grad_(False)
    network.centre, network.unit, network.scale = centre, size, torch.eye(len(network.scale), dtype=torch.float64)
    return LearntNoise(network, whitener, torch.arange(k))
