r"""The reverse process for every :math:`\alpha \ge 0`: one family of samplers between ODE and SDE.

With time reversed and score q, particles of :math:`d\xi = [b \xi + \tfrac{1+\alpha}{2} g q] d\tau + \sqrt{\alpha g}
dW` share the marginals of the forward process for every :math:`\alpha` (arXiv 2504.07437). They are integrated in one
of two coordinates.

**Plain** coordinates are :math:`\xi` itself, scaled as the formulation says. The last step goes from a small noise
level to none by Tweedie's formula.

**Whitened** coordinates are those of the base, :math:`v = \cos\theta\, w_0 + \sin\theta\, \varepsilon` with
:math:`\theta = \arctan\sigma`. There :math:`b = \tan\theta`, :math:`g = 2 \tan\theta`,
:math:`q = -v + \cot\theta\, N`, hence

.. math:: dv = -\alpha \tan\theta\, v\, d\tau + \sqrt{2 \alpha \tan\theta}\, dW + (1 + \alpha) N\, d\tau ,

the probability-flow equation :math:`dv = N d\tau` joined with a Langevin part, which is the forward process run for a
while and the flow back. So a step from :math:`\theta` to :math:`\theta'` adds the step's noise first, an exact move up
to the angle :math:`\hat\theta` with :math:`\cos\hat\theta = \cos\theta\,
e^{-\int \alpha \tan\theta}`, and then follows the flow down to :math:`\theta'`. Both moves keep the marginals, so the
only error is that of the flow in N: what the network adds. Where the base is the truth, N = 0 and one step is exact for
every :math:`\alpha`. All formulations coincide in these coordinates; they differ in where their steps lie.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fem_diffusion.checks import (
    check_callable, check_choice, check_count, check_flag, check_kind, check_number, check_seed,
)
from fem_diffusion.diffusion.denoiser import Conditioned
from fem_diffusion.diffusion.formulation import Formulation, check_elementwise, variance_preserving
from fem_diffusion.diffusion.sampling import plain, whitened
from fem_diffusion.diffusion.sampling.placement import place_angles
from fem_diffusion.diffusion.sampling.scheme import Run, Scheme
from fem_diffusion.diffusion.sampling.support import Support
from fem_diffusion.errors import InputError
from fem_diffusion.progress import bar

__all__ = ["CORRECTIONS", "METHODS", "Sampler", "churn", "out_of_range", "sample_latents"]

_REDRAWS, CORRECTIONS = 40, 10
# Where fewer samples are asked for, as many are drawn again as for these.
_FEW = 50
# Between these noise levels a formulation has to run.
_SMALL, _LARGE = 0.05, 5.0
METHODS = {"whitened": whitened.METHODS, "plain": plain.METHODS}


@dataclass(frozen=True)
class Sampler:
    """One way to sample: without arguments the probability-flow ODE in 20 steps placed by the posterior's spectrum.

    InputError if `alpha` is negative, a number is out of range, a word is unknown, the method does not serve alpha > 0,
    or the formulation's noise does not reach far enough.

    Parameters
    ----------
    alpha : float or Callable[[Tensor], Tensor]
        0 for the probability-flow ODE, 1 for the usual reverse SDE, any value >= 0 between and beyond, or a function
        of the formulation's time, elementwise; see `churn`.
    steps : int
        Number of steps; `evaluations` tells how many evaluations of the network they cost.
    method : str, optional
        Whitened: "euler", "heun", "multistep" (two-step Adams-Bashforth, for alpha = 0), "predictor_corrector" (Euler
        and a Langevin step), "adaptive" (the ODE with error control, through SciPy).
        Plain: "euler" (Euler-Maruyama where alpha > 0), "heun" (stochastic Heun where alpha > 0), "dpm_solver"
        (DPM-Solver++(2M) and its stochastic version), "predictor_corrector", "adaptive".
        Where left out: multistep for alpha = 0 and heun for alpha > 0 in whitened, dpm_solver in plain coordinates.
    coordinates : {"whitened", "plain"}
        In which the process is integrated.
    nodes : {"spectrum", "time"}, optional
        Steps placed from the spectrum of the posterior covariance, or equally spaced in the formulation's time. Where
        left out: "time" if a formulation is given, otherwise "spectrum".
    corrections : int, optional
        Hamiltonian moves at the end, under the density of the emulator, where there is one: they take samples to the
        emulator's posterior, wherever base and network put them. 10 where there is one and this is left out. Where the
        noise depends on the latents and there is no network, samples are tempered first, from the base.
    formulation : Formulation, optional
        Path of noise levels and, in plain coordinates, the scaling; variance preserving where left out.
    """

    alpha: float | Callable[[Tensor], Tensor] = 0.0
    steps: int = 20
    method: str | None = None
    coordinates: str = "whitened"
    nodes: str | None = None
    corrections: int | None = None
    formulation: Formulation | None = None

    def __post_init__(self) -> None:
        if callable(self.alpha):
            check_elementwise(self.alpha, "alpha", least=0)
        else:
            object.__setattr__(self, "alpha", check_number(self.alpha, "alpha", least=0))
        object.__setattr__(self, "steps", check_count(self.steps, "steps"))
        check_choice(self.coordinates, "coordinates", METHODS)
        still = not callable(self.alpha) and self.alpha == 0
        if self.method is None:
            object.__setattr__(self, "method", "dpm_solver" if self.coordinates == "plain" else "multistep" if still
                               else "heun")
        check_choice(self.method, f"The method in {self.coordinates} coordinates", METHODS[self.coordinates])
        if self.nodes is None:
            object.__setattr__(self, "nodes", "spectrum" if self.formulation is None else "time")
        check_choice(self.nodes, "nodes", ("spectrum", "time"))
        if self.corrections is not None:
            object.__setattr__(self, "corrections", check_count(self.corrections, "corrections", least=0))
        if self.formulation is not None:
            first, last = _checked(self.formulation).sigma(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
            if last < _LARGE or (self.coordinates == "plain" and first > _SMALL):
                raise InputError(f"Formulation {self.formulation.name} runs from sigma = {first:g} to {last:g}: "
                                 f"sampling starts from noise alone, at {_LARGE:g} or more, and ends, in plain "
                                 f"coordinates, at {_SMALL:g} or less.")
        if self.scheme.deterministic and not still:
            raise InputError(f"The method {self.method!r} in {self.coordinates} coordinates follows the ODE, "
                             "alpha = 0: take 'heun' for alpha > 0.")

    @property
    def scheme(self) -> Scheme:
        """How the method runs."""
        return METHODS[self.coordinates][str(self.method)]

    @property
    def evaluations(self) -> int:
        """Network evaluations for each sample; InputError for the adaptive method, which chooses the number itself."""
        if self.method == "adaptive":
            raise InputError("The adaptive method chooses its own number of evaluations: count them in the network.")
        return self.scheme.evaluations(self.steps)

    def angles(self, conditioned: Conditioned) -> list[float]:
        """Angles arctan(sigma) of the steps, decreasing to an exact zero."""
        if self.nodes == "spectrum":
            return place_angles(conditioned.spectrum, self.steps, self.scheme.order).tolist()
        t = torch.linspace(1.0, 0.0, self.steps + 1, dtype=torch.float64)
        formulation = self.formulation or variance_preserving()
        return [*torch.arctan(formulation.sigma(t[:-1])).tolist(), 0.0]


def out_of_range(sampler: Sampler, far: bool) -> Sampler:
    """The sampler; for measurements far from the training without moves under the emulator's density, unless asked."""
    return replace(sampler, corrections=0) if far and sampler.corrections is None else sampler


def churn(formulation: Formulation, strength: float, sigma_min: float = 0.0,
          sigma_max: float = math.inf) -> Callable[[Tensor], Tensor]:
    """The alpha(t) whose reverse process adds noise as the churn of EDM does (Karras et al. 2022, algorithm 2).

    That algorithm raises the noise level before each of n steps by the factor 1 + strength / n while it lies in
    [sigma_min, sigma_max]. Its limit of many steps, equally spaced in the formulation's time, is the family's member
    with alpha = strength / (d log sigma / dt). InputError if the strength is negative, or another argument is of the
    wrong kind.

    Parameters
    ----------
    formulation : Formulation
        Whose time and steps are meant.
    strength, sigma_min, sigma_max : float
        S_churn, >= 0, and S_tmin and S_tmax, in units of the base's standard deviation.
    """
    _checked(formulation)
    strength, sigma_min = check_number(strength, "strength", least=0), check_number(sigma_min, "sigma_min", least=0)
    if not (isinstance(sigma_max, float) and sigma_max == math.inf):
        sigma_max = check_number(sigma_max, "sigma_max", least=sigma_min)

    def alpha(t: Tensor) -> Tensor:
        # d(sigma^2)/dt = g scaling^2, hence d log sigma / dt = g scaling^2 / (2 sigma^2) = g / (2 s^2).
        sigma = formulation.sigma(t)
        inside = (sigma >= sigma_min) & (sigma <= sigma_max) & (sigma > 0)
        return torch.where(inside, strength * 2 * formulation.s(t)**2 / formulation.g(t), torch.zeros_like(t))
    return alpha


def sample_latents(conditioned: Conditioned, n: int, sampler: Sampler = Sampler(), *, seed: int,
                   callback: Callable[[int, float, Tensor], None] | None = None, memory: int = 2**28,
                   progress: bool = True) -> Tensor:
    """Draw n latent vectors for each measurement: z (B, n, r), of dtype and device of the base.

    Samples outside the support of the latents are drawn again, with evaluations of their own, up to 40 for each that is
    asked for; a warning tells if some are outside even then. InputError if corrections are asked for without a density,
    or another argument is of the wrong kind; SolveError if the adaptive method fails.

    Parameters
    ----------
    conditioned : Conditioned
        From `Denoiser.at`.
    n, sampler, seed : int, Sampler, int
        Samples of each measurement, how to integrate the reverse process, seed of all draws.
    callback : Callable, optional
        Called after each step with its number, the noise level it reached and the state in latent coordinates,
        shape (B, n, r); the adaptive method calls it once, at the end.
    memory : int
        Bound in bytes on what one evaluation of the network may hold; larger batches are evaluated in parts. Samples
        do not depend on it beyond rounding.
    """
    check_kind(conditioned, "conditioned", Conditioned, "what Denoiser.at returns")
    check_kind(sampler, "sampler", Sampler, "a Sampler")
    n, memory, progress = check_count(n), check_count(memory, "memory"), check_flag(progress, "progress")
    if callback is not None:
        check_callable(callback, "callback", "a function of step, noise level and latents")
    if sampler.corrections and conditioned.density is None:
        raise InputError("Corrections need the density of an emulator, which models with a Gaussian prior and known "
                         "noise have: leave `corrections` out.")
    device = conditioned.located.mean.device
    generator = torch.Generator(device).manual_seed(check_seed(seed))
    rows = max(1, memory // _row_bytes(conditioned))
    with torch.no_grad(), bar(sampler.steps, "sample", progress) as shown:
        def report(step: int, sigma: float, state: Tensor) -> None:
            shown.update(step - shown.n)
            if callback is not None:
                callback(step, sigma, conditioned.back(conditioned.located.colour(state)).transpose(0, 1).contiguous())
        z = _draw(conditioned, n, sampler, generator, rows, report)
        if conditioned.support is not None:
            _redraw(z, conditioned, conditioned.support, sampler, generator, rows)
    return z.transpose(0, 1).contiguous()


def _draw(conditioned: Conditioned, n: int, sampler: Sampler, generator: torch.Generator, rows: int,
          report: Callable[[int, float, Tensor], None]) -> Tensor:
    """Latents (n, B, r) of the users."""
    like, alpha, density = conditioned.located.mean, sampler.alpha, conditioned.density

    def normal() -> Tensor:
        return torch.randn(n, *like.shape, generator=generator, dtype=like.dtype, device=like.device)
    moves = CORRECTIONS if sampler.corrections is None else sampler.corrections
    if density is not None and density.base.bent and conditioned.network is None and moves:
        w = density.draw(n, moves, generator)
        report(sampler.steps, 0.0, w)
        return conditioned.back(conditioned.located.colour(w))
    rate = alpha if callable(alpha) else lambda t: torch.full_like(t, alpha)
    w = sampler.scheme.run(Run(conditioned, rows, normal, sampler.formulation or variance_preserving(),
                               sampler.angles(conditioned), rate, report))
    if density is not None:
        for _ in range(moves):
            w = density.move(w, generator)[0]
    return conditioned.back(conditioned.located.colour(w))


def _redraw(z: Tensor, conditioned: Conditioned, support: Support, sampler: Sampler, generator: torch.Generator,
            rows: int) -> None:
    """Draw the latents (n, B, r) that are outside the support again, in place."""
    drawn, most = 0, _REDRAWS * max(_FEW, z.shape[0] * z.shape[1])
    while drawn < most:
        # A row that is not finite has diverged, which must be seen.
        outside = ~support.contains(z) & torch.isfinite(z).all(-1)
        if not outside.any():
            return
        drawn += int(outside.sum())
        z[outside] = _draw(conditioned.select(torch.where(outside)[1]), 1, sampler, generator, rows, lambda *_: None)[0]
    left = ~support.contains(z)
    if left.any():
        warnings.warn(f"{int(left.sum())} of {left.numel()} samples lie outside the bounds of the training latents "
                      f"after {drawn:,} more draws: the measurement is unlike the training measurements, or the prior "
                      "has no hard bounds and the support of the denoiser should be None.", stacklevel=3)


def _checked(formulation: Formulation) -> Formulation:
    return check_kind(formulation, "formulation", Formulation, "a Formulation such as variance_preserving()")


def _row_bytes(conditioned: Conditioned) -> int:
    """Estimate of what the evaluation of one row holds: the outputs of all linear layers, twice, and the state."""
    network = conditioned.network
    layers = network.modules() if isinstance(network, nn.Module) else ()
    width = sum(layer.out_features for layer in layers if isinstance(layer, nn.Linear))
    width += getattr(network, "row_size", 0)  # of layers on a mesh
    return 8 * width + 32 * conditioned.r
