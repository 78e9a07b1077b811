"""The task of `fit_denoiser`: denoise latents in base coordinates, given measurements with fresh noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.density import emulator_density
from fem_diffusion.diffusion.base.emulator import roots
from fem_diffusion.diffusion.denoiser import Conditioned, Denoiser
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.network import MeanNetwork, ScoreModule, ScoreNetwork, build
from fem_diffusion.diffusion.network.mesh import FieldGeometry
from fem_diffusion.diffusion.sampling.placement import Spectrum, fit_spectrum
from fem_diffusion.diffusion.sampling.sample import CORRECTIONS
from fem_diffusion.diffusion.tensors import mapped
from fem_diffusion.diffusion.training.choice import advantage, even
from fem_diffusion.diffusion.training.collapse import measure_collapse
from fem_diffusion.diffusion.training.loop import History, Task, TrainingOptions, hold_out
from fem_diffusion.diffusion.training.measured import Measured

__all__ = ["Denoising", "noisy"]

# Noise levels drawn for each located measurement, where that costs more than they do.
_DRAWS, _VALIDATION_DRAWS = 8, 16
_HELD_OUT, _CHUNK, _SHARED_CHUNK = 2048, 256, 8192
_SPECTRUM_ANGLES = 48
# Held-out latents that are compared with samples, at least so many; samples of each, and what chance may do.
_FEWEST_TRUTHS, _SAMPLES, _CHANCE = 100, 4, 1e-3
# Held-out pairs by which network and emulator are compared, and latents that are drawn where few are held out.
_JUDGES, _DRAWN = 512, 512


@dataclass(frozen=True)
class _Seen:
    """What a network sees of B measurements, and n samples of their posteriors in base coordinates (n, B, r)."""

    inputs: tuple[Tensor, ...]
    w: Tensor

    def select(self, index: Tensor) -> "_Seen":
        """Some of the measurements."""
        return _Seen(mapped(self.inputs, lambda x: x if len(x) == 1 else x[index]), self.w[:, index])


class Denoising(Task[ScoreModule | MeanNetwork]):
    """The task of `fit_denoiser`: denoise latents in base coordinates, given measurements with fresh noise."""

    name = "train"

    def __init__(self, z: Tensor, c: Tensor, parts: Measured, wanted: tuple[str, FieldGeometry | None],
                 denoiser: Denoiser, options: TrainingOptions):
        self.options, self.denoiser, self.source, self.wanted = options, denoiser, parts, wanted
        shared = denoiser.base.affine and denoiser.base.law is None and not parts.family
        self.draws, self.chunk = (1, _SHARED_CHUNK) if shared else (_DRAWS, _CHUNK)
        self.size = -(-options.batch * options.evaluate_every // self.draws)
        with torch.random.fork_rng():
            self.looking = self.network().to(z.device)
        training, held_out = hold_out(z, options)
        held_out = held_out[:_HELD_OUT]
        self.z, self.c = z[training], c[training]
        generator = torch.Generator(z.device).manual_seed(options.seed + 1)
        self.validation, surprise = [], []
        for part in held_out.split(_CHUNK):
            seen, found = self._see(z[part], c[part], generator)
            surprise.append(found)
            self.validation.append((seen, noisy(seen.w.expand(_VALIDATION_DRAWS, -1, -1), options, generator)))
        self.held_out = z[held_out], c[held_out]
        self.base_losses = self._losses(lambda seen, v, angle: torch.zeros_like(v))
        # Minus the log density of the base at held-out latents: the denoising loss knows no determinants.
        self.surprise = float(torch.cat(surprise).mean())
        self.parts = [z, c, *(x for seen, draws in self.validation for x in (*seen.inputs, *draws))]

    def network(self) -> ScoreModule:
        (name, geometry), base, options = self.wanted, self.denoiser.base, self.options
        return build(name, base.r, base.k, options.width, options.depth, geometry)

    def joined(self, networks: list[ScoreModule | MeanNetwork]) -> ScoreModule | MeanNetwork:
        return networks[0] if len(networks) == 1 else MeanNetwork(cast(list[ScoreModule], networks))

    def _see(self, z: Tensor, c: Tensor, generator: torch.Generator, moves: int = 0) -> tuple[_Seen, Tensor]:
        """Fresh sensors and noise for latents (B, r) and coordinates (B, s); also the base's surprise at the latents.

        The latents are a sample of their posterior; Hamiltonian moves from there make more.
        """
        base, seen, chains, surprise = self.denoiser.base, [], [], []
        with torch.no_grad():
            for latents, coordinates in zip(z.split(self.chunk), c.split(self.chunk)):
                layout, y = self.source.measure(coordinates, generator)
                located = base.locate(layout, y)
                chain = [located.whiten(latents)[None]]
                if moves:
                    density = emulator_density(base, layout, y, located)
                    for _ in range(moves):
                        chain.append(density.move(chain[-1], generator)[0])
                seen.append(self.looking.see(base, layout, y, located))
                chains.append(torch.cat(chain).float())
                surprise.append(chain[0][0].square().sum(1) / 2 + located.log_determinant)
        inputs = tuple(parts[0] if len(parts[0]) == 1 != len(surprise[0]) else torch.cat(parts) for parts in zip(*seen))
        return _Seen(inputs, torch.cat(chains, 1)), torch.cat(surprise)

    def settled(self) -> bool:
        """Whether held-out latents are as samples of the base, moved under the emulator's density, where there is one.

        Samples of the posterior itself fail one time in a thousand. Where few pairs are held out, latents and readings
        of fixed sensors are drawn from the emulator's own law, which is what moves have to reach.
        """
        z, c = self.held_out
        if not self.denoiser.known or (len(z) < _FEWEST_TRUTHS and self.source.family):
            return False
        generator = torch.Generator(z.device).manual_seed(self.options.seed + 3)
        base, drawn = self.denoiser.base, len(z) < _FEWEST_TRUTHS
        if drawn:
            z, white = (torch.randn(_DRAWN, n, generator=generator, dtype=z.dtype, device=z.device)
                        for n in (base.r, base.k))
            c = base.emulator(z) + white @ roots(base.emulator.residual)[1].T
            if base.law is not None:
                c = base.law.noise.sample(base.law.clean(c, z), generator)
        found, seen = [], []
        for latents, coordinates in zip(z.split(_CHUNK), c.split(_CHUNK)):
            conditioned = self.denoiser.at(coordinates) if drawn else self._conditioned(
                self.denoiser, coordinates, generator)
            located, density = conditioned.located, conditioned.density
            w = torch.randn(_SAMPLES, *latents.shape, generator=generator, dtype=z.dtype, device=z.device)
            for _ in range(CORRECTIONS):
                w = w if density is None else density.move(w, generator)[0]
            w = torch.cat([located.whiten(latents)[None], w])
            found.append(w if density is None else torch.cat([w, density.energy(w)[..., None]], 2))
            seen.append(located.mean)
        values = even(torch.cat(found, 1), torch.cat(seen), self.denoiser.base.r)
        return float(values.min()) * len(values) > _CHANCE

    def prepare(self, generator: torch.Generator) -> None:
        index = torch.randint(len(self.z), (self.size,), generator=generator, device=self.z.device)
        # Under an affine emulator the base is all that moves could find.
        base = self.denoiser.base
        alone = base.affine and base.law is None
        moves = self.draws - 1 if self.denoiser.known and not alone else 0
        self.bank, _ = self._see(self.z[index], self.c[index], generator, moves)

    def draw(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        seen = self.bank.select(index)
        draw = torch.randint(len(seen.w), (len(index),), generator=generator, device=index.device)
        w = seen.w.gather(0, draw[None, :, None].expand(1, -1, seen.w.shape[2]))
        return *noisy(w, self.options, generator), *seen.inputs

    def loss(self, network: ScoreNetwork, *batch: Tensor) -> Tensor:
        v, angle, target, *inputs = batch
        return (network(v, angle, *network.context(*inputs)) - target).square().mean()

    def _losses(self, output: Callable[[_Seen, Tensor, Tensor], Tensor]) -> Tensor:
        """Validation loss of each held-out pair, averaged over its draws; shape (held_out,)."""
        return torch.cat([(output(seen, v, angle) - target).square().mean((0, 2))
                          for seen, (v, angle, target) in self.validation])

    def evaluate(self, network: ScoreNetwork) -> Tensor:
        return self._losses(lambda seen, v, angle: network(v, angle, *network.context(*seen.inputs)))

    def spectrum(self, network: ScoreNetwork) -> Spectrum:
        """Spectrum of the posterior in base coordinates, from the network's mean square over held-out measurements."""
        generator = torch.Generator(self.z.device).manual_seed(self.options.seed + 2)
        angles = (torch.arange(_SPECTRUM_ANGLES, dtype=torch.float64) + 0.5) / _SPECTRUM_ANGLES * math.pi / 2
        with torch.no_grad():
            seen = [(part.w[:1], network.context(*part.inputs)) for part, _ in self.validation]
            speeds = []
            for angle in angles.tolist():
                squares = []
                for w, context in seen:
                    white = torch.randn(w.shape, generator=generator, device=w.device, dtype=w.dtype)
                    v = math.cos(angle) * w + math.sin(angle) * white
                    squares.append(network(v, v.new_full((1, 1, 1), angle), *context).square().flatten())
                speeds.append(torch.cat(squares).mean())
        return fit_spectrum(angles, torch.stack(speeds))

    def _conditioned(self, denoiser: Denoiser, c: Tensor, generator: torch.Generator) -> Conditioned:
        """The denoiser at measurements of coordinates (B, s), with fresh sensors and noise."""
        layout, y = self.source.measure(c, generator)
        return denoiser.at(y, layout if self.source.family else None)

    def surpassed(self, denoiser: Denoiser, learnt: list[Denoiser], scale: MonotoneMap | None) -> Denoiser | None:
        """The best of those whose emulator knows its noise, where it knows more of held-out latents than a denoiser.

        They are of latents on this scale, where there is one.
        By a standard error: where both know as much either will do, and Gaussian noise that is none is off by many.
        """
        if not learnt:
            return None
        z, c = (x[:_JUDGES] for x in self.held_out)
        generator = torch.Generator(z.device).manual_seed(self.options.seed + 4)
        y, inner = self.source.measure(c, generator)[1], z if scale is None else scale.forward(z)

        def surprise(conditioned: Conditioned) -> float:
            located = conditioned.located
            return float((located.whiten(inner).square().sum(1) / 2 + located.log_determinant).mean())
        found = [other.at(y) for other in learnt]
        values = [surprise(one) for one in found]
        best = values.index(min(values))
        density = found[best].density
        assert density is not None
        gain = advantage(denoiser.at(y), density, z, self.options.seed, scale)
        return learnt[best] if float(gain.mean()) > float(gain.std()) / len(gain)**0.5 else None

    def collapse(self, denoiser: Denoiser, history: History) -> None:
        """Measure collapse, warn of it, and put it into the history."""
        generator = torch.Generator(self.z.device).manual_seed(self.options.seed + 2)
        training, held_out = ((self._conditioned(denoiser, c, generator), z) for z, c in (
            (self.z[:_HELD_OUT], self.c[:_HELD_OUT]), self.held_out))
        found = measure_collapse(training, held_out, self.z, self.options.seed)
        found.warn()
        history.spread_ratio, history.neighbour_ratio = found.spread_ratio, found.neighbour_ratio


def noisy(w: Tensor, options: TrainingOptions, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise levels and noise for latents in base coordinates `w` (..., r): v, angle (..., 1) and target."""
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=w.device, dtype=w.dtype)
    angle = torch.arctan(torch.exp(options.log_sigma_mean + options.log_sigma_std * normal(*w.shape[:-1], 1)))
    white = normal(*w.shape)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    return cosine * w + sine * white, angle, sine * w - cosine * white
