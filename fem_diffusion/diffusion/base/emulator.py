r"""What sensors can see as a function of the latents, learned once.

What can be seen has coordinates c: of the state in modes, :math:`u = \bar u + \sum_j c_j \psi_j`, over which any sensor
is a row, or the noise-free readings of fixed sensors themselves. They are regressed on the latents,

.. math:: c = f(z) + \text{residual}, \qquad f(z) = f_0 + A z + \text{network}(z),

by least squares first; a network for what is left is kept only where it helps on held-out pairs. Where derivatives of
the coordinates are known beside them, both parts are fitted to values and derivatives alike, in the Sobolev norm
:math:`E|c - f|^2 + E|\partial c - \partial f|^2` in units of the noise, the second term along random directions
(derivative-informed operators, O'Leary-Roseberry et al. 2024, doi:10.1016/j.jcp.2023.112555).
"""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from fem_diffusion.checks import check_count, check_flag, check_options
from fem_diffusion.diffusion.checks import check_pairs, check_tensor
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.tensors import mapped
from fem_diffusion.diffusion.training.loop import History, Loop, Task, TrainingOptions, hold_out, threads
from fem_diffusion.errors import InputError

__all__ = ["Emulator", "affine_emulator", "fit_emulator", "regress", "roots", "spread"]

# A regression gains from more width than a score network does (docs/training.md).
_WIDER = 2
# What the affine map leaves is nothing to learn below this share of the noise's variance, and below rounding.
_SMALL, _ROUNDING = 1e-3, 1e-9
# Directions along which derivatives of held-out pairs are compared.
_DIRECTIONS = 4


class Emulator(nn.Module):
    """f(z): an affine map, and a residual multilayer perceptron where there is one.

    InputError if a size is not positive, or the depth negative.

    Parameters
    ----------
    r, s : int
        Numbers of latents and state coordinates.
    width, depth : int
        Of the hidden layers; a depth of 0 leaves the affine map alone.
    scaled : bool
        Whether there are `scale` and `residual`, which hold s² numbers each; without, outputs stay as they are.
    """

    matrix: Tensor     # A, shape (s, r)
    offset: Tensor     # f_0, shape (s,)
    centre: Tensor     # what is taken from latents before the network sees them, shape (r,)
    unit: Tensor       # what they are divided by then, shape (r,)
    curve_mean: Tensor   # of what the curve's inverse gives, shape (r,)
    curve_std: Tensor
    scale: Tensor      # what the network's output is multiplied by, from the right, shape (s, s)
    residual: Tensor   # covariance of c - f(z) on held-out pairs, shape (s, s)
    curve: MonotoneMap | None = None   # whose inverse takes latents to the scale on which f is this map

    def __init__(self, r: int, s: int, width: int = 128, depth: int = 3, scaled: bool = True):
        super().__init__()
        r, s, width = (check_count(n, name) for name, n in (("r", r), ("s", s), ("width", width)))
        depth = check_count(depth, "depth", least=0)
        self.config = {"r": r, "s": s, "width": width, "depth": depth, "scaled": int(scaled)}
        square = (s, s) if scaled else (0, 0)
        for name, shape in (("matrix", (s, r)), ("offset", (s,)), ("scale", square), ("residual", square),
                            ("centre", (r,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("unit", torch.ones(r, dtype=torch.float64))
        self.register_buffer("curve_mean", torch.zeros(r, dtype=torch.float64))
        self.register_buffer("curve_std", torch.ones(r, dtype=torch.float64))
        sizes = [r] + depth * [width]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:]))
        self.head = nn.Linear(width, s, bias=False) if depth else None
        if self.head is not None:
            nn.init.zeros_(self.head.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Emulator":
        super()._apply(fn, recurse)   # which knows buffers, but no map
        self.curve = mapped(self.curve, fn)
        return self

    def __repr__(self) -> str:
        return f"Emulator({', '.join(f'{name}={size}' for name, size in self.config.items())})"

    def _input(self, z: Tensor) -> Tensor:
        """Latents (B, r) as the network sees them: centred before they lose precision."""
        return ((z.double() - self.centre) / self.unit).float()

    @property
    def affine(self) -> bool:
        """Whether f is an affine map of the latents."""
        return self.head is None and self.curve is None

    def bent(self, curve: MonotoneMap, mean: Tensor, std: Tensor) -> "Emulator":
        """The emulator of latents that a map has made, where it was one of ``(x - mean) / std``, x as they were."""
        part = deepcopy(self)
        part.curve, part.curve_mean, part.curve_std = curve, mean, std
        return part

    def _straight(self, z: Tensor) -> Tensor:
        return z.double() if self.curve is None else (self.curve.inverse(z.double()) - self.curve_mean) / self.curve_std

    def correction(self, z: Tensor) -> Tensor:
        """The network's part, in units of `scale`: (B, r) to (B, s), in single precision."""
        if self.head is None:
            return z.new_zeros(len(z), len(self.scale), dtype=torch.float32)
        x = nn.functional.silu(self.hidden[0](self._input(z)))
        for layer in self.hidden[1:]:
            x = x + nn.functional.silu(layer(x))
        return self.head(x)

    def correction_along(self, z: Tensor, way: Tensor) -> tuple[Tensor, Tensor]:
        """The network's part at latents (B, r), and its derivative along directions (B, r), of a depth above 0."""
        x, change = self._input(z), (way / self.unit).float()
        assert self.head is not None
        for number, layer in enumerate(self.hidden):
            before = layer(x)
            gate = torch.sigmoid(before)
            through = change @ layer.weight.T * gate * (1 + before * (1 - gate))  # pyright: ignore
            x = before * gate + (x if number else 0.0)
            change = change + through if number else through
        return self.head(x), self.head(change)

    def forward(self, z: Tensor) -> Tensor:
        """State coordinates (B, s) for latents (B, r), in double precision."""
        z = self._straight(z)
        affine = self.offset + z @ self.matrix.T
        return affine if self.head is None else affine + self._scaled(self.correction(z))

    def _scaled(self, x: Tensor) -> Tensor:
        """What the network gives, (B, s), in units of the coordinates."""
        return x.double() @ self.scale if self.config["scaled"] else x.double()

    def select(self, outputs: Tensor) -> "Emulator":
        """Emulator of some of the coordinates, by their numbers, of which some may come again."""
        part = deepcopy(self)
        part.matrix, part.offset, part.scale = self.matrix[outputs], self.offset[outputs], self.scale[:, outputs]
        part.residual = self.residual[outputs][:, outputs]
        return part

    def with_pull(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """State coordinates (B, s) at latents (B, r), and the map of covectors (B, s) to their pull-back (B, r)."""
        if self.curve is not None:
            x = self.curve.inverse(z.double())
            slope = (-self.curve.log_slope(x)).exp() / self.curve_std
            c, straight = self._with_pull((x - self.curve_mean) / self.curve_std)
            return c, lambda covector: straight(covector) * slope
        return self._with_pull(z.double())

    def _with_pull(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        affine = self.offset + z @ self.matrix.T
        head, x, slopes = self.head, self._input(z), []
        if head is None:
            return affine, lambda covector: covector @ self.matrix
        for number, layer in enumerate(self.hidden):
            before = layer(x)
            gate = torch.sigmoid(before)
            x = before * gate + (x if number else 0.0)
            slopes.append(gate * (1 + before * (1 - gate)))   # of silu

        def pull(covector: Tensor) -> Tensor:
            back = (covector @ self.scale.T if self.config["scaled"] else covector).float() @ head.weight
            for number in reversed(range(len(self.hidden))):
                through = (back * slopes[number]) @ self.hidden[number].weight  # pyright: ignore[reportOperatorIssue]
                back = back + through if number else through
            return covector @ self.matrix + back.double() / self.unit
        return affine + self._scaled(head(x)), pull


class _Regression(Task[Emulator]):
    """The task of `fit_emulator`: what the affine map leaves, in units of its size, at latents of unit variance."""

    name = "emulate"

    def __init__(self, z: Tensor, rest: Tensor, slopes: Tensor | None, training: Tensor, held_out: Tensor,
                 options: TrainingOptions):
        self.options, self.size = options, len(training)
        self.z, self.rest, self.slopes = z[training], rest[training], None if slopes is None else slopes[training]
        self.validation = z[held_out], rest[held_out], None if slopes is None else slopes[held_out]
        self.parts = [z, rest] if slopes is None else [z, rest, slopes]
        # One direction a pair would leave the comparison to chance.
        some = (_DIRECTIONS, *self.validation[0].shape)
        self.ways = torch.randn(some, generator=torch.Generator(z.device).manual_seed(options.seed), device=z.device)
        self.base_losses = self._losses(self.validation, self.ways, None)

    @staticmethod
    def _losses(pairs: tuple[Tensor, Tensor, Tensor | None], ways: Tensor, network: Emulator | None) -> Tensor:
        """Squares of what is missed at pairs (B,): of values, and the mean of slopes along directions (n, B, r)."""
        z, rest, slopes = pairs
        if slopes is None:
            return (rest if network is None else network.correction(z) - rest).square().sum(1)
        value, found = torch.zeros_like(rest), []
        for way in ways:
            change = torch.einsum("bsr,br->bs", slopes, way)
            if network is not None:
                value, moved = network.correction_along(z, way)
                change = moved - change
            found.append(change.square().sum(1))
        return (value - rest).square().sum(1) + torch.stack(found).mean(0)

    def network(self) -> Emulator:
        return Emulator(self.z.shape[1], self.rest.shape[1], self.options.width, self.options.depth)

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        z, rest = self.z[index], self.rest[index]
        if self.slopes is None:
            return z, rest
        return z, rest, self.slopes[index], torch.randn(1, *z.shape, generator=generator, device=z.device)

    def loss(self, network: Emulator, *batch: Tensor) -> Tensor:
        z, rest, *more = batch
        slopes, ways = more or (None, z[None])
        return self._losses((z, rest, slopes), ways, network).mean()

    def evaluate(self, network: Emulator) -> Tensor:
        return self._losses(self.validation, self.ways, network)

    def gain(self, losses: Tensor) -> Tensor:
        # Of the whole: one pair far out may hold most of the base's loss, and no two standard errors tell from chance.
        return (self.base_losses - losses) / (self.base_losses + losses).clamp(min=1e-300)


def spread(centred: Tensor) -> Tensor:
    """Root mean square of each column, shape (r,); 1 where it is zero."""
    size = centred.square().mean(0).sqrt()
    return torch.where(size > 0, size, 1.0)


def roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """W and F (s, s) with W F = 1 and F Fᵀ the covariance (s, s), whose eigenvalues are held above rounding."""
    # Each coordinate in units of its own; symmetric: eigenvectors of close eigenvalues turn with rounding, their
    # products do not.
    unit = covariance.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(covariance / unit / unit[:, None])
    root = values.clamp(min=values[-1] * torch.finfo(values.dtype).eps * len(values)).sqrt()
    return vectors / root @ vectors.T / unit, unit[:, None] * (vectors * root @ vectors.T)


def regress(z: Tensor, c: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares c = offset + G z, n > r + 1: G (k, r), offset (k,), and covariance (k, k) of what is left.

    With derivatives `slopes` (n, k, r) of c by z any n > 1 will do.
    """
    n, r = z.shape
    z_mean, c_mean = z.mean(0), c.mean(0)
    centred, response = z - z_mean, c - c_mean
    # Each latent in units of its own spread: what counts as a rank must not depend on units.
    unit = spread(centred)
    if slopes is None:
        matrix, told = torch.linalg.lstsq(centred / unit, response).solution.T / unit, r + 1
    else:
        # Where c is quadratic, this weight makes the error of G least: values tell of r latents at once, and a
        # derivative of each alone.
        weight, white = r / 2, centred / unit
        moments = response.T @ white + weight * slopes.sum(0) * unit
        gram = white.T @ white + weight * n * torch.eye(r, dtype=z.dtype, device=z.device)
        matrix, told = torch.linalg.solve(gram, moments.T).T / unit, 1
    rest = response - centred @ matrix.T
    return matrix, c_mean - matrix @ z_mean, rest.T @ rest / (n - told)


def affine_emulator(matrix: Tensor, offset: Tensor, residual: Tensor) -> Emulator:
    """Emulator c = offset + G z of a matrix G (s, r) and an offset (s,), with the covariance (s, s) of its error."""
    emulator = Emulator(*matrix.shape[::-1], width=1, depth=0).to(matrix.device)
    emulator.matrix, emulator.offset, emulator.residual = matrix.double(), offset.double(), residual.double()
    return emulator.eval().requires_grad_(False)


def fit_emulator(z: Tensor, c: Tensor, noise: Tensor, *, slopes: Tensor | None = None,
                 options: TrainingOptions = TrainingOptions(), held_out: tuple[Tensor, ...] | None = None,
                 checkpoint: str | os.PathLike | None = None, progress: bool = True) -> tuple[Emulator, History]:
    """Regress coordinates of what sensors see on latents: emulator, on the CPU, and training curve of its network.

    It is affine where a network does not help on held-out pairs; losses are in units of what the affine map leaves.
    InputError if shapes disagree, there are too few pairs, or a value is not finite; FileError and SolveError as for
    `fit_denoiser`.

    Parameters
    ----------
    z, c : Tensor
        Latents, shape (n, r), and coordinates, shape (n, s).
    noise : Tensor
        Errors that count alike, as a covariance (s, s) or positive standard deviations (s,): of the readings' noise; of
        state modes one over their standard deviation, such that errors count as they do in the state.
    slopes : Tensor, optional
        Derivatives of the coordinates by the latents, shape (n, s, r).
    options : TrainingOptions
        Of the network, which is twice as wide.
    held_out : tuple of Tensor, optional
        Latents and coordinates of other pairs, and their derivatives where pairs have them, by which the network and
        its error are judged: of the region that counts, where z is of no prior. A share of the pairs where left out.
    checkpoint, progress : path, optional, and bool
        As for `fit_denoiser`.
    """
    check_options(options, TrainingOptions).check()
    check_flag(progress, "progress")
    check_pairs(z, c, 1 if slopes is None else None)
    s = c.shape[1]
    square = isinstance(noise, Tensor) and noise.ndim == 2
    noise = check_tensor(noise, "noise", (s, s) if square else (s,), "coordinates").double().cpu()
    if not ((noise.diagonal() if square else noise) > 0).all():
        raise InputError("The noise of coordinates must be positive: leave coordinates of no weight out.")
    if slopes is not None:
        slopes = check_tensor(slopes, "slopes", (len(z), s, z.shape[1]), "latents").double().cpu()
    if held_out is None:
        training, apart = hold_out(z, options)
    else:
        check_pairs(held_out[0], held_out[1])
        if len(held_out) != (2 if slopes is None else 3):
            raise InputError("Held-out pairs have slopes where the others have them: give both, or none.")
        training, apart = torch.arange(len(z)), len(z) + torch.arange(len(held_out[0]))
        z, c = (torch.cat([x, other.to(x)]) for x, other in zip((z, c), held_out))
        if slopes is not None:
            slopes = torch.cat([slopes, check_tensor(
                held_out[2], "held-out slopes", (len(apart), s, z.shape[1]), "latents").to(slopes)])
    if slopes is None and len(training) <= z.shape[1] + 1:
        raise InputError(f"{len(z)} pairs cannot determine an emulator of {z.shape[1]} latents: simulate more.")
    z, c = z.double().cpu(), c.double().cpu()
    matrix, offset, _ = regress(z[training], c[training], None if slopes is None else slopes[training])
    # Noise that two sensors share leaves their difference sharp: only in the noise's own axes errors count alike.
    whitener, root = roots(noise if square else torch.diag(noise**2))
    rest = (c - offset - z @ matrix.T) @ whitener.T
    left = rest[training].T @ rest[training] / len(training)
    size = left.trace().sqrt()
    network, history = None, History()
    if float(torch.linalg.eigvalsh(left)[-1]) > _SMALL and (
            float(size) > _ROUNDING * float(((c[training] - offset) @ whitener.T).square().sum(1).mean().sqrt())):
        options = replace(options, width=_WIDER * options.width, members=1, batch=min(options.batch, len(training)))
        with threads(options.threads):
            device = torch.device(options.device)
            centre, unit = z[training].mean(0), spread(z[training] - z[training].mean(0))
            white = ((z - centre) / unit).float().to(device)
            if slopes is not None:
                slopes_left = (whitener @ (slopes - matrix) * unit / size).float().to(device)
            loop = Loop(_Regression(white, (rest / size).float().to(device), None if slopes is None else slopes_left,
                                    training, apart, options), options, checkpoint)
            network, history = loop.run(progress), loop.history
    if network is None and held_out is None:
        return affine_emulator(*regress(z, c, slopes)), history
    if network is None:
        defect = (c - offset - z @ matrix.T)[apart]
        return affine_emulator(matrix, offset, defect.T @ defect / len(defect)), history
    emulator = network.to("cpu").eval().requires_grad_(False)
    emulator.centre, emulator.unit, emulator.scale = centre, unit, size * root.T
    emulator.matrix, emulator.offset = matrix, offset
    defect = (c - emulator(z))[apart] @ whitener.T
    # Few pairs tell how large errors are, and not along which axes: there they count as alike, in units of the noise.
    share = s / (s + len(defect))
    alike = defect.square().mean() * torch.eye(s, dtype=defect.dtype)
    emulator.residual = root @ ((1 - share) * defect.T @ defect / len(defect) + share * alike) @ root.T
    return emulator, history
