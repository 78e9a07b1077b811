"""Training by denoising score matching, under any sensors: emulator, base, then the network, without collapse.

One engine serves fixed sensors and families. Training draws a latent, what sensors see of it, sensors and fresh noise;
fixed sensors are the family of one layout whose coordinates are the readings themselves.

A conditional model trained for long on finitely many pairs learns to recognise each pair by its measurement, and its
posterior collapses onto the training parameter (arXiv 2603.14135). Against that: measurement noise is drawn afresh
where it is known, weights are averaged, the learning rate falls and training stops by the loss on held-out pairs, the
best weights there are kept, and `collapse` measures what is left and warns.
"""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fem_diffusion.checks import check_choice, check_flag, check_kind, check_options, check_path
from fem_diffusion.diffusion.base.fitted import fit_base, tell_copies, tell_uncertain
from fem_diffusion.diffusion.base.gaussian import GaussianBase
from fem_diffusion.diffusion.base.layouts import LayoutFamily
from fem_diffusion.diffusion.checks import check_pairs, check_tensor
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.maps.laws import marginals
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.maps.noise import carried
from fem_diffusion.diffusion.network import NETWORKS
from fem_diffusion.diffusion.network.mesh import FieldGeometry
from fem_diffusion.diffusion.noise import Noise, as_noise
from fem_diffusion.diffusion.sampling.support import Support, find_support
from fem_diffusion.diffusion.training.denoising import Denoising
from fem_diffusion.diffusion.training.independent import bounded_laws, check_draws
from fem_diffusion.diffusion.training.loop import History, Loop, TrainingOptions, threads
from fem_diffusion.diffusion.training.measured import candidates, of_family, of_fixed
from fem_diffusion.diffusion.training.scales import Scales, choose_scales
from fem_diffusion.diffusion.training.telling import telling, widened
from fem_diffusion.errors import InputError

__all__ = ["fit_denoiser"]

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
    is learnt as a function of the latents where this helps, as a mixture of normal laws, of all readings or of each,
    where one does not do, and the emulator with it takes the place of the network where it gives held-out latents more
    density; readings of which many are equal, such as counts, are spread over the gaps between them for that, and where
    most say nothing of the latents all is learnt from the others. None is trained where there is nothing to learn:
    where the base is known to be exact, and where held-out latents are as samples of the base, moved under the
    emulator's density: differences of 5 % in the spread of all latents, or of 15 % in that of one, show in 2,048 of
    them. At the end the spectrum is measured from which samplers place their steps, and collapse onto the training
    pairs, of which a `CollapseWarning` tells. A warning tells, too, where the pairs are so few that the Gaussian base
    itself is uncertain, and by how much.

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
    if noise is None and slopes is None and base == "gaussian":
        told = telling(z, seen, options, None if checkpoint is None else f"{checkpoint}.told", progress)
        if told is not None:
            fit_base(z, seen, seen.new_zeros(seen.shape[1], seen.shape[1]))   # refuses sensors by their own numbers
            narrow, history = fit_denoiser(
                z, seen[:, told], network=network, standard_prior=standard_prior, prior=prior, scales=scales,
                options=options, checkpoint=checkpoint, geometry=geometry, progress=progress)
            return widened(narrow, seen, told), history
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
        if base == "gaussian" and not family:
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
        tasks = [Denoising(z.to(device), seen.to(device), parts.to(device), (network, geometry),
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
            loop.history.best_step = 0
            return in_units(emulated, found.latents, None), loop.history
        if trained is not None:
            task.collapse(denoiser, loop.history)
        return in_units(denoiser), loop.history
