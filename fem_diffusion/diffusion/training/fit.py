"""Training by denoising score matching, under any sensors: emulator, base, then the network, without collapse.

One engine serves fixed sensors and families. Training draws a latent, what sensors see of it, sensors and fresh noise;
fixed sensors are the family of one layout whose coordinates are the readings themselves.

A conditional model trained for long on finitely many pairs learns to recognise each pair by its measurement, and its
posterior collapses onto the training parameter (arXiv 2603.14135). Against that: measurement noise is drawn afresh
where it is known, weights are averaged, the learning rate falls and training stops by the loss on held-out pairs, the
best weights there are kept, and `collapse` measures what is left and warns.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from fem_diffusion.checks import check_choice, check_flag, check_kind, check_options, check_path
from fem_diffusion.diffusion.base.density import emulator_density
from fem_diffusion.diffusion.base.emulator import roots
from fem_diffusion.diffusion.base.fitted import tell_copies, tell_uncertain
from fem_diffusion.diffusion.base.gaussian import GaussianBase
from fem_diffusion.diffusion.base.layouts import LayoutFamily
from fem_diffusion.diffusion.checks import check_pairs, check_tensor
from fem_diffusion.diffusion.denoiser import Conditioned, Denoiser
from fem_diffusion.diffusion.maps.laws import marginals
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.maps.noise import carried
from fem_diffusion.diffusion.network import NETWORKS, MeanNetwork, ScoreModule, ScoreNetwork, build
from fem_diffusion.diffusion.network.mesh import FieldGeometry
from fem_diffusion.diffusion.noise import Noise, as_noise
from fem_diffusion.diffusion.sampling.placement import Spectrum, fit_spectrum
from fem_diffusion.diffusion.sampling.sample import CORRECTIONS
from fem_diffusion.diffusion.sampling.support import Support, find_support
from fem_diffusion.diffusion.tensors import mapped
from fem_diffusion.diffusion.training.choice import advantage, even
from fem_diffusion.diffusion.training.collapse import measure_collapse
from fem_diffusion.diffusion.training.independent import bounded_laws, check_draws
from fem_diffusion.diffusion.training.loop import History, Loop, Task, TrainingOptions, hold_out, threads
from fem_diffusion.diffusion.training.measured import Measured, candidates, of_family, of_fixed
from fem_diffusion.diffusion.training.scales import Scales, choose_scales
from fem_diffusion.errors import InputError

__all__ = ["fit_denoiser"]

# Noise levels drawn for each located measurement, where that costs more than they do.
_DRAWS, _VALIDATION_DRAWS = 8, 16
_HELD_OUT, _CHUNK, _SHARED_CHUNK = 2048, 256, 8192
_SPECTRUM_ANGLES = 48
# Held-out latents that are compared with samples, at least so many; samples of each, and what chance may do.
_FEWEST_TRUTHS, _SAMPLES, _CHANCE = 100, 4, 1e-3
# Held-out pairs by which network and emulator are compared, and latents that are drawn where few are held out.
_JUDGES, _DRAWN = 512, 512
# Emulator error that the base alone may carry, as a share of the variance of the noise.
_NEGLIGIBLE = 1e-2


def fit_denoiser(z: Tensor, y: Tensor, noise: Noise | float | LayoutFamily | None = None, *,
                 slopes: Tensor | None = None, network: str | None = None, base: str | GaussianBase = "gaussian",
                 standard_prior: bool = False, prior: Any = None, scales: str = "choose",
                 options: TrainingOptions = TrainingOptions(), checkpoint: str | os.PathLike | None = None,
                 geometry: FieldGeometry | None = None, progress: bool = True) -> tuple[Denoiser, History]:
    """Fit a conditional model to joint samples: emulator and base first, then the network under it.

    A network for the emulator is kept where it helps on held-out pairs; then the base may follow the posterior, if it
    gives held-out latents more density so. The network under the base is kept where it beats the base on held-out pairs
    by more than two standard errors. Where the latents are standard normal and the law of the noise is not known, that
    is learnt as a function of the latents where this helps, as a mixture of normal laws where one does not do, and the
    emulator with it takes the place of the network where it gives held-out latents more density. None is trained where
    there is nothing to learn: where the base is known to be exact, and where held-out latents are as samples of the
    base, moved under the emulator's density: differences of 5 % in the spread of all latents, or of 15 % in that of
    one, show in 2,048 of them. At the end the spectrum is measured from which samplers place their steps, and collapse
    onto the training pairs, of which a `CollapseWarning` tells. A warning tells, too, where the pairs are so few that
    the Gaussian base itself is uncertain, and by how much.

    All of this happens on scales of latents and readings that held-out pairs choose (`choose_scales`), through which
    the noise is carried: it is drawn in the users' units, in which measurements and samples stay.

    Returns the denoiser, on the CPU, its base in double and its network in single precision and evaluation mode, and
    the training curve of the network under the base. InputError if shapes disagree, an option is out of range, a value
    is not finite, pairs are too few, or the folder of `checkpoint` is missing; FileError if `checkpoint` is unreadable
    or belongs to other data, noise or options; SolveError if training diverges.

    Parameters
    ----------
    z, y : Tensor
        Latents, shape (n, r), of any scale; noise-free readings, shape (n, k), or measurements where `noise` is None,
        in any units, with the standard normal numbers of unknown levels behind them, (n, k + l), affine in the latents;
        for a family coordinates of the state, of unit variance, shape (n, s).
    noise : Noise, float, LayoutFamily or None
        Noise model, or the standard deviation of Gaussian noise; None where `y` already holds noise; a family of
        layouts with noise of their own, of which every training sample gets a fresh one.
    slopes : Tensor, optional
        Derivatives of `y` by the latents, shape (n, k, r) or (n, k + l, r), for an emulator of fixed sensors with noise
        of a known law. InputError elsewhere.
    network : str, optional
        Name in `NETWORKS`; where left out, "sensors" for a family and "latents" for fixed sensors.
    base : {"gaussian", "plain"} or GaussianBase
        Gaussian of latents and measurements, or mere standardisation; or one that is there already.
    standard_prior : bool
        Whether the latents are known to be N(0, I), as for a Karhunen-Loeve basis.
    prior : distribution of SciPy or torch, or list of them, optional
        Law of independent latents, of all or one for each: ``scipy.stats.uniform(-1, 2)``. They are mapped to standard
        normal ones, so that no sample leaves the bounds.
    scales : {"choose", "identity"}
        Whether scales are chosen, or left as they are but for those of a known prior. An own base is of latents and
        readings as they are.
    options : TrainingOptions
        Of all networks; one with attention learns at a quarter of the rate.
    checkpoint : path, optional
        File that is written atomically at each evaluation (the emulator's with ``.emulator`` behind the name); training
        resumes from it where it exists.
    geometry : FieldGeometry, optional
        Of the mesh, for a network with layers on it: "field".
    progress : bool
        Show progress bars.
    """
    if not isinstance(base, GaussianBase):
        check_choice(base, "base", ("gaussian", "plain"))
    check_flag(standard_prior, "standard_prior")
    check_choice(scales, "scales", ("choose", "identity"))
    check_flag(progress, "progress")
    check_options(options, TrainingOptions).check()
    # Before any work: the emulator writes to a name made from it.
    checkpoint = None if checkpoint is None else check_path(checkpoint, "checkpoint")
    least = 1 if isinstance(base, str) and base == "gaussian" and slopes is None else None
    check_pairs(z, y, least)  # before the noise model sees them
    if geometry is not None:
        check_kind(geometry, "geometry", FieldGeometry, "what fem_diffusion.fields.geometry makes of a basis")
    family = isinstance(noise, LayoutFamily)
    network = check_choice(network or ("sensors" if family else "latents"), "network", NETWORKS)
    kind = NETWORKS[network]
    if kind.families != family:
        raise InputError(f"The network {network!r} is for {'families' if kind.families else 'fixed sensors'}: leave "
                         "network out.")
    if kind.mesh != (geometry is not None):
        raise InputError(f"The network {network!r} has {'' if kind.mesh else 'no '}layers on the mesh: "
                         f"{'give geometry' if kind.mesh else 'leave geometry out'}.")
    z, seen = z.double().cpu(), y.double().cpu()
    tell_copies(z, seen)
    law = None
    if prior is not None:
        if standard_prior or isinstance(base, GaussianBase) or geometry is not None:
            raise InputError("A known prior makes a map of the latents: leave standard_prior, a base and a geometry "
                             "out.")
        law = MonotoneMap.of(("law",) * z.shape[1], laws=marginals(prior, z.shape[1]))
    elif scales == "choose" and base == "gaussian" and not standard_prior and geometry is None:
        law = bounded_laws(z)
    if standard_prior or prior is not None:
        check_draws(z, law)
    # Levels of noise stand behind the readings: emulator and base have them from the latents.
    if not isinstance(noise, LayoutFamily):
        noise = as_noise(noise, seen.shape[1] - (len(noise.levels) if isinstance(noise, Noise) else 0))
    standard_prior, users = standard_prior or law is not None, z
    found = Scales(law) if scales != "choose" or base != "gaussian" else choose_scales(
        z, seen, noise, law, standard_prior, options.seed, geometry is not None)
    given, (z, seen, _) = seen, found.pairs(z, seen)
    noise = noise if isinstance(noise, LayoutFamily) else carried(noise, found.readings)
    parts = of_family(seen, noise) if isinstance(noise, LayoutFamily) else of_fixed(seen, noise)
    support = None if standard_prior else find_support(users)
    scale = found.latents if found.straight else None   # of the emulator's density alone
    if scale is not None:
        support = Support(*torch.tensor([one.bounds for one in scale.laws or () if one is not None], dtype=z.dtype).T)
    if slopes is not None and (base != "gaussian" or family or parts.errors is None):
        raise InputError("Slopes are for the emulator of fixed sensors with noise of a known law: leave them out.")
    if slopes is not None:
        check_tensor(slopes, "slopes", (*seen.shape, z.shape[1]), "latents")
        slopes = found.pairs(users, given, slopes.double().cpu())[2]

    def in_units(denoiser: Denoiser, latents: MonotoneMap | None = found.latents if scale is None else None,
                 support: Support | None = support) -> Denoiser:
        return replace(denoiser.to("cpu"), support=support, latents=latents, readings=found.readings)
    with threads(options.threads):
        bases = [base] if isinstance(base, GaussianBase) else candidates(
            z, seen, slopes, parts, base, standard_prior, found.curve, options, checkpoint, progress)
        if base == "gaussian" and not family and bases[0].law is None:
            tell_uncertain(bases[0], len(z), parts.covariance, slopes is not None)
        denoiser = Denoiser(bases[0], known=standard_prior and parts.errors is not None)
        emulator = bases[0].emulator
        alone = bases[0].law is None and bases[0].affine
        if denoiser.known and alone and parts.share(emulator.residual - parts.covariance) < _NEGLIGIBLE:
            return in_units(denoiser), History()
        options = replace(options, learning_rate=kind.rate * options.learning_rate)
        device = torch.device(options.device)
        # A base that knows the noise costs much at every measurement, and the network learns what it knows.
        bases, learnt = (bases[:1], bases[1:]) if parts.errors is None else (bases, [])
        if scale is not None:
            z = users
            bases = candidates(z, seen, None, parts, "gaussian", False, None, options, None, False)
        # Where a posterior has several modes, following one of them is worse than the joint Gaussian.
        tasks = [_Denoising(z.to(device), seen.to(device), parts.to(device), (network, geometry),
                            replace(denoiser, base=candidate).to(device), options) for candidate in bases]
        task = min(tasks, key=lambda task: task.surprise)
        if task.settled():
            return in_units(task.denoiser), History()
        loop = Loop(task, options, checkpoint)
        trained = loop.run(progress)
        denoiser = task.denoiser
        if trained is not None:
            denoiser = replace(denoiser, network=trained, spectrum=task.spectrum(trained))
        emulated = task.surpassed(denoiser, [Denoiser(candidate, known=True).to(device) for candidate in learnt],
                                  scale and scale.to(device))
        if emulated is not None:
            return in_units(emulated, found.latents, None), loop.history
        if trained is not None:
            task.collapse(denoiser, loop.history)
        return in_units(denoiser), loop.history


@dataclass(frozen=True)
class _Seen:
    """What a network sees of B measurements, and n samples of their posteriors in base coordinates (n, B, r)."""

    inputs: tuple[Tensor, ...]
    w: Tensor

    def select(self, index: Tensor) -> "_Seen":
        """Some of the measurements."""
        return _Seen(mapped(self.inputs, lambda x: x if len(x) == 1 else x[index]), self.w[:, index])


class _Denoising(Task[ScoreModule | MeanNetwork]):
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
