r"""Noise that is learnt: the law of readings given the latents, where nothing is known of it but pairs that hold it.

Readings scatter around the emulator's f(z) by a law whose mean and covariance depend on the latents,

.. math:: y = f(z) + W^{-1} \big(m(z) + T(z)^{-1} e\big), \qquad T(z) = e^{D(z)} (1 + O(z)),

with e standard normal, or of a mixture of normal laws,

.. math:: p(e | z) = \sum_i \pi_i(z) N\big(\mu_i(z), (S_i^T S_i)^{-1}\big), \qquad S_i = e^{E_i(z)} (1 + U_i(z)).

W whitens the constant covariance, by its Cholesky factor; D and E are diagonal, O and U strictly lower triangular, and
one network emulates them all: where it is zero the covariance is the constant one. T and S are factors of precisions:
they have inverses whatever the network says, and no system is solved for the density by which it is trained, up to a
constant c,

.. math:: \log p(y | z) = \mathrm{tr} D + \log \sum_i \pi_i e^{\mathrm{tr} E_i - |S_i (e - \mu_i)|^2 / 2} + c.

Of many readings W are principal axes, the widest first, and O has few columns: what the widest say of the others.

Training begins with one normal law. To what that leaves, mixtures that are the same everywhere are fitted by
expectation maximisation, and as long as twice as many laws say more of held-out pairs, there are twice as many. Where
there are several, training goes on from there.
"""

import math
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.emulator import Emulator, spread
from fem_diffusion.diffusion.sampling.mixtures import normal_laws
from fem_diffusion.diffusion.tensors import Tensors
from fem_diffusion.diffusion.training.loop import Loop, Task, TrainingOptions, hold_out, sure

__all__ = ["LearntNoise", "fit_noise"]

# Readings up to which O is full, and columns that it has beyond.
_FULL, _COLUMNS = 24, 12
# Layers more than of other networks.
_DEEPER = 2
# Normal laws that are mixed, at most; starts of expectation maximisation and what its covariances are raised by.
_MOST, _STARTS, _RAISED = 16, 3, 1e-4
# Pairs that mixtures are fitted to, at most, pairs whose matrices are held at once, and numbers in these.
_FITTED, _TOGETHER, _NUMBERS = 5000, 1024, 2**23
# Steps and learning rate of a mixture, as shares of those before: faster ones lose where it starts.
_STEPS, _RATE = 0.3, 0.05


@dataclass(frozen=True, eq=False, repr=False)
class LearntNoise(Tensors):
    """Scatter of readings around an emulator, as the latents make it; from `fit_noise`.

    Parameters
    ----------
    network : Emulator
        Of m, D and O for k readings; then of the laws that are mixed, if there are several: logarithms of shares, which
        need not sum to one, of all of them, and mu, E and U of each.
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

    @cached_property
    def whole(self) -> bool:
        """Whether all readings are at hand, in their order."""
        return self.sensors.tolist() == list(range(len(self.whitener)))

    @property
    def components(self) -> int:
        """How many normal laws are mixed."""
        return mixed(self.network.config["s"], len(self.whitener))

    @property
    def together(self) -> int:
        """How many latents have their matrices held at once."""
        return max(1, _NUMBERS // (self.components * len(self.whitener)**2))

    def mixture(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normal laws of the scatter at latents (B, r): logarithms of shares (B, p), means (B, p, j), roots of
        covariances (B, p, j, k).
        """
        return self._mixture(self.network(z))

    def _mixture(self, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for what the network finds, (B, q)."""
        shared, shares, own = _split(found, len(self.whitener))
        (m, d, low), (mu, e, inner) = (_entries(x, len(self.whitener)) for x in (shared, own))
        identity = torch.eye(low.shape[-1]).to(low)
        back = torch.linalg.inv(self.whitener)[self.sensors]
        root = back @ torch.linalg.inv(torch.exp(d)[..., None] * (low + identity))
        mean = m @ back.T + (root @ mu[..., None])[..., 0]
        if len(shares[0]) > 1:
            root = root @ torch.linalg.inv(torch.exp(e)[..., None] * (inner + identity))
        return shares, mean, root

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the scatter (B, j) at latents (B, r), and covariance (B, j, j)."""
        shares, means, root = self.mixture(z)
        weights = shares.exp()[..., None]
        mean = (weights * means).sum(1)
        root = torch.cat([root, (means - mean[:, None])[..., None]], 3) if len(shares[0]) > 1 else root
        return mean, (weights[..., None] * root @ root.mT).sum(1)

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of the scatter (B, j), one at each of the latents (B, r)."""
        shares, means, root = self.mixture(z)
        mean, root = _one(shares, means, root, generator)
        white = torch.randn(*root.shape[:1], root.shape[2], 1, generator=generator, dtype=z.dtype, device=z.device)
        return mean + (root @ white)[..., 0]

    def mean_with_pull(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Mean of the scatter (B, j), and the map of covectors (B, j) to their pull-back (B, r)."""
        found, pull = self.network.with_pull(z)
        with torch.enable_grad():
            at = found.detach().requires_grad_()
            shares, means, _ = self._mixture(at)
            mean = (shares.exp()[..., None] * means).sum(1)
        return mean.detach(), lambda covector: pull(torch.autograd.grad(mean, at, covector, retain_graph=True)[0])

    def log_density(self, rest: Tensor, z: Tensor) -> Tensor:
        """log p (B,) of readings minus the emulator's, `rest` (B, j), at latents (B, r), up to a constant."""
        return self._log_density(rest, self.network(z))

    def _log_density(self, rest: Tensor, found: Tensor) -> Tensor:
        if self.whole:
            return _log_density(rest @ self.whitener.mT, found)
        shares, mean, root = self._mixture(found)
        return _log_parts(rest, shares, mean, root @ root.mT).logsumexp(1)

    def with_pull(self, rest: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of `log_density` by the rest, (B, j), and by the latents beside it, (B, r)."""
        found, pull = self.network.with_pull(z)
        with torch.enable_grad():
            at = rest.detach().requires_grad_(), found.detach().requires_grad_()
            by_rest, by_found = torch.autograd.grad(self._log_density(*at).sum(), at)
        return by_rest, pull(by_found)

    def others(self, rest: Tensor, z: Tensor, kept: Tensor, left: Tensor,
               generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normal laws, means (B, l) and covariances (B, l, l), of the scatter of readings `left` given those `kept`.

        `rest` (B, m) is the scatter of those kept, at latents (B, r). One of the laws that are mixed is drawn for each.
        """
        if len(z) > (most := self.together):
            parts = [self.others(a, b, kept, left, generator) for a, b in zip(rest.split(most), z.split(most))]
            return torch.cat([mean for mean, _ in parts]), torch.cat([covariance for _, covariance in parts])
        shares, mean, root = self.mixture(z)
        S = root @ root.mT
        log = _log_parts(rest, shares, mean[..., kept], S[..., kept, :][..., kept])
        log = torch.where(torch.isfinite(log).any(1, keepdim=True), log, shares)
        mean, S = _one(log, mean, S, generator)
        gain = torch.linalg.solve(S[:, kept][..., kept], S[:, kept][..., left]).mT
        return (mean[:, left] + (gain @ (rest - mean[:, kept])[..., None])[..., 0],
                S[:, left][..., left] - gain @ S[:, kept][..., left])


def _one(log: Tensor, means: Tensor, matrices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of B mixtures one law each, by the logarithms of shares (B, p), up to a constant: its mean and its matrix."""
    drawn = torch.multinomial(log.softmax(1), 1, generator=generator)[:, 0]
    rows = torch.arange(len(log), device=log.device)
    return means[rows, drawn], matrices.expand(-1, means.shape[1], -1, -1)[rows, drawn]


def _log_parts(rest: Tensor, shares: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Logarithms (B, p), up to a constant, of what each normal law adds to the density of `rest` (B, j)."""
    failed = torch.linalg.cholesky_ex(covariance.detach())[1] > 0
    # One that fails must not spoil the derivatives of the others.
    identity = torch.eye(covariance.shape[-1]).to(covariance)
    root = torch.linalg.cholesky(torch.where(failed[..., None, None], identity, covariance))
    white = torch.linalg.solve_triangular(root, (rest[:, None] - mean)[..., None], upper=False)[..., 0]
    found = shares - root.diagonal(dim1=2, dim2=3).log().sum(2) - white.square().sum(2) / 2
    # Far out, where a network means nothing, rounding may leave no covariance.
    return torch.where(failed, -torch.inf, found)


def _places(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of O."""
    rows, columns = torch.tril_indices(k, k, -1, device=device)
    if k > _FULL:
        rows, columns = rows[columns < _COLUMNS], columns[columns < _COLUMNS]
    return rows, columns


def numbers(k: int, components: int = 1) -> int:
    """How many the network emulates for k readings."""
    one = 2 * k + len(_places(k, torch.device("cpu"))[0])
    return one if components == 1 else one + components * (one + 1)


def mixed(size: int, k: int) -> int:
    """Of how many normal laws a network emulates so many numbers for k readings."""
    return max(1, (size - numbers(k)) // (numbers(k) + 1))


def _split(found: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of what a network finds, (B, q): what all laws share (B, 1, n), logarithms of shares (B, p), the rest (B, p, n).
    """
    one, count = numbers(k), mixed(found.shape[1], k)
    if count == 1:
        return found[:, None], found.new_zeros(len(found), 1), found.new_zeros(len(found), 1, one)
    shared, shares, own = found.split([one, count, count * one], 1)
    return shared[:, None], shares.log_softmax(1), own.unflatten(1, (count, one))


def _entries(found: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """m (..., k), the diagonal of D (..., k) and O (..., k, k), of their numbers (..., n)."""
    rows, columns = _places(k, found.device)
    low = found.new_zeros(*found.shape[:-1], k, k)
    low[..., rows, columns] = found[..., 2 * k:]
    return found[..., :k], found[..., k:2 * k], low


def _whitened(x: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """T (x - m) of x (..., k), and tr D (...), by their numbers (..., n)."""
    m, d, low = _entries(found, x.shape[-1])
    x = x - m
    return torch.exp(d) * (x + (low @ x[..., None])[..., 0]), d.sum(-1)


def _log_density(x: Tensor, found: Tensor) -> Tensor:
    """Log density (B,) up to a constant of x = W (y - f), (B, k), for what a network finds, (B, q)."""
    shared, shares, own = _split(found, x.shape[1])
    e, volume = _whitened(x[:, None], shared)
    if len(shares[0]) == 1:
        return volume[:, 0] - e[:, 0].square().sum(1) / 2
    white, more = _whitened(e, own)
    return volume[:, 0] + (shares + more - white.square().sum(2) / 2).logsumexp(1)


class _Likelihood(Task[Emulator]):
    """The task of `fit_noise`: minus the log density of what the emulator leaves, in units of the constant covariance.

    Readings get fresh noise where it can be drawn.
    """

    name = "noise"
    start: Emulator | None   # of training, where it goes on

    def __init__(self, z: Tensor, y: Tensor, f: Tensor, white: Callable[[Tensor, Tensor, torch.Generator], Tensor],
                 training: Tensor, held_out: Tensor, options: TrainingOptions):
        self.options, self.size, self.white = options, len(training), white
        self.z, self.y, self.f = z[training], y[training], f[training]
        generator = torch.Generator(z.device).manual_seed(options.seed + 1)
        self.validation = z[held_out], white(y[held_out], f[held_out], generator)
        self.parts = [z, y]
        self.start = None
        self.base_losses = self.validation[1].square().sum(1) / 2

    def network(self) -> Emulator:
        if self.start is not None:
            return deepcopy(self.start)
        r, k = self.z.shape[1], self.validation[1].shape[1]
        return Emulator(r, numbers(k), self.options.width, self.options.depth, scaled=False)

    @staticmethod
    def _losses(network: Emulator, z: Tensor, x: Tensor) -> Tensor:
        return -_log_density(x, network.offset.float() + network.correction(z))

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return self.z[index], self.white(self.y[index], self.f[index], generator)

    def loss(self, network: Emulator, *batch: Tensor) -> Tensor:
        return self._losses(network, *batch).mean()

    @torch.no_grad()
    def evaluate(self, network: Emulator) -> Tensor:
        return self._losses(network, *self.validation)

    def mix(self, first: Emulator | None) -> bool:
        """Start at this network, or none, with a mixture behind it if held-out pairs ask for one; whether they do."""
        generator = torch.Generator(self.z.device).manual_seed(self.options.seed + 2)
        pairs = self.z, self.white(self.y, self.f, generator)

        def rest(z: Tensor, x: Tensor) -> Tensor:
            return x if first is None else torch.cat([_whitened(x, first.correction(z))[0] for z, x in zip(
                z.split(_TOGETHER), x.split(_TOGETHER))])
        e, held_out = (rest(*part).double().cpu() for part in (pairs, self.validation))
        mixture = _mixture(e, held_out, self.options.seed)
        if mixture is None:
            return False
        r, k = self.z.shape[1], e.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(self.options.seed)
            start = Emulator(r, numbers(k) + len(mixture), self.options.width, self.options.depth, scaled=False)
        if first is not None and first.head is not None and start.head is not None:
            start.hidden.load_state_dict(first.hidden.state_dict())
            start.head.weight.data[:numbers(k)] = first.head.weight.data
        start.offset[numbers(k):] = mixture
        self.start, self.name = start.to(self.z.device), "mixture"
        # Weights of a checkpoint belong to the mixture that they were trained with.
        self.parts = [*self.parts, mixture]
        self.base_losses = self.evaluate(self.start)
        return True


def _mixture(e: Tensor, held_out: Tensor, seed: int) -> Tensor | None:
    """Normal laws that are mixed to the law of e (n, k), the same everywhere: their numbers, as `_split` takes them.

    None where two of them do not get more density at `held_out` (m, k) than a standard normal law, by more than two
    standard errors; they are doubled until twice as many do not.
    """
    (rows, columns), full = _places(e.shape[1], e.device), e.shape[1] <= _FULL
    best, before, count = None, -(held_out.square() + math.log(2 * math.pi)).sum(1) / 2, 2
    e = e[:_FITTED]
    while count <= min(_MOST, len(e)):
        law = normal_laws(e, count, seed, covariance_type="full" if full else "diag", n_init=_STARTS,
                          reg_covar=_RAISED, tol=1e-4, max_iter=200)
        after = torch.from_numpy(law.score_samples(held_out.numpy()))
        if not sure(after - before):
            break
        shares, means, root = (torch.from_numpy(x) for x in (law.weights_, law.means_, law.precisions_cholesky_))
        root = root if full else torch.diag_embed(root)
        d = root.diagonal(dim1=1, dim2=2)
        best = torch.cat([shares.log(), torch.cat([means, d.log(), (root.mT / d[..., None])[:, rows, columns]],
                                                  1).flatten()])
        before, count = after, 2 * count
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
    if task.mix(network):
        if network is not None:
            options = replace(options, steps=max(1, round(_STEPS * options.steps)),
                              learning_rate=_RATE * options.learning_rate)
        loop = Loop(task, options, None if checkpoint is None else f"{checkpoint}.mixture")
        network = loop.run(progress) or task.start
    if network is None:
        return None
    network = network.to("cpu").eval().requires_grad_(False)
    network.centre, network.unit = centre, size
    return LearntNoise(network, whitener, torch.arange(k))
