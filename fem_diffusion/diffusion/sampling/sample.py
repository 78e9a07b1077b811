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

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fem_diffusion.checks import check_callable, check_choice, check_count, check_flag, check_kind, check_number
from fem_diffusion.diffusion import _plain, _whitened
from fem_diffusion.diffusion._checks import check_generator
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.formulation import Formulation, check_elementwise, variance_preserving
from fem_diffusion.diffusion.nodes import place_angles
from fem_diffusion.diffusion.support import Support
from fem_diffusion.errors import InputError

__all__ = ["METHODS", "check_method", "churn", "evaluations", "sample_latents"]

_REDRAWS, _CORRECTIONS = 20, 6
# Between these noise levels a formulation has to run.
_SMALL, _LARGE = 0.05, 5.0
METHODS = {"whitened": _whitened.METHODS, "plain": _plain.METHODS}


def evaluations(method: str, steps: int, coordinates: str = "whitened") -> int:
    """Network evaluations for each sample.

    Parameters
    ----------
    method : str
        One of ``METHODS[coordinates]``, except "adaptive", which chooses the number itself.
    steps : int
        Number of steps.
    coordinates : {"whitened", "plain"}
        As for `sample_latents`.

    Returns
    -------
    int

    Raises
    ------
    InputError
        If the method is unknown, or adaptive, or `steps` is no positive integer.
    """
    check_method(method, coordinates)
    steps = check_count(steps, "steps")
    if method == "adaptive":
        raise InputError("The adaptive method chooses its own number of evaluations; count them in the network.")
    return METHODS[coordinates][method].evaluations(steps)


def churn(formulation: Formulation, strength: float, sigma_min: float = 0.0,
          sigma_max: float = math.inf) -> Callable[[Tensor], Tensor]:
    """The alpha(t) whose reverse process adds noise as the churn of EDM does (Karras et al. 2022, algorithm 2).

    That algorithm raises the noise level before each of n steps by the factor 1 + strength / n while it lies in
    [sigma_min, sigma_max]. Its limit of many steps, equally spaced in the formulation's time, is the family's member
    with alpha = strength / (d log sigma / dt).

    Parameters
    ----------
    formulation : Formulation
        Whose time and steps are meant.
    strength : float
        S_churn, >= 0.
    sigma_min, sigma_max : float
        S_tmin and S_tmax, in units of the base's standard deviation.

    Returns
    -------
    Callable[[Tensor], Tensor]
        alpha as a function of time, for `sample_latents`.

    Raises
    ------
    InputError
        If the strength is negative, or another argument is of the wrong kind.
    """
    _check_formulation(formulation)
    strength, sigma_min = check_number(strength, "strength", least=0), check_number(sigma_min, "sigma_min", least=0)
    if not (isinstance(sigma_max, float) and sigma_max == math.inf):
        sigma_max = check_number(sigma_max, "sigma_max", least=sigma_min)

    def alpha(t: Tensor) -> Tensor:
        # d(sigma^2)/dt = g scaling^2, hence d log sigma / dt = g scaling^2 / (2 sigma^2) = g / (2 s^2).
        sigma = formulation.sigma(t)
        inside = (sigma >= sigma_min) & (sigma <= sigma_max) & (sigma > 0)
        return torch.where(inside, strength * 2 * formulation.s(t)**2 / formulation.g(t), torch.zeros_like(t))
    return alpha


def sample_latents(denoiser: Denoiser, y: Tensor, formulation: Formulation | None = None, *,
                   generator: torch.Generator, method: str | None = None,
                   alpha: float | Callable[[Tensor], Tensor] = 0.0, steps: int = 20, coordinates: str = "whitened",
                   nodes: str | None = None, callback: Callable[[int, float, Tensor], None] | None = None,
                   corrections: int | None = None, memory: int = 2**28, progress: bool = False) -> Tensor:
    """Draw one latent vector for each row of measurements.

    Parameters
    ----------
    denoiser : Denoiser
        Trained denoiser.
    y : Tensor
        Measurements, shape (B, k); repeat a row to draw many samples for it.
    formulation : Formulation, optional
        Path of noise levels and, in plain coordinates, the scaling; variance preserving where left out.
    generator : torch.Generator
        Source of randomness, on the device of the base.
    method : str, optional
        Whitened: "euler", "heun", "multistep" (two-step Adams-Bashforth, for alpha = 0), "predictor_corrector" (Euler
        and a Langevin step), "adaptive" (the ODE with error control, through SciPy).
        Plain: "euler" (Euler-Maruyama where alpha > 0), "heun" (stochastic Heun where alpha > 0), "exponential"
        (DPM-Solver++(2M) and its stochastic version), "predictor_corrector", "adaptive".
        Where left out: multistep for alpha = 0 and heun for alpha > 0 in whitened, exponential in plain coordinates.
    alpha : float or Callable[[Tensor], Tensor]
        0 for the probability-flow ODE, 1 for the usual reverse SDE, any value >= 0 between and beyond, or a function
        of the formulation's time, elementwise; see `churn`.
    steps : int
        Number of steps; `evaluations` tells how many evaluations of the network they cost.
    coordinates : {"whitened", "plain"}
        In which the process is integrated.
    nodes : {"spectrum", "time"}, optional
        Steps placed from the spectrum of the posterior covariance, or equally spaced in the formulation's time. Where
        left out: "time" if a formulation is given, otherwise "spectrum".
    callback : Callable, optional
        Called after each step with its number, the noise level it reached and the state in latent coordinates,
        shape (B, r); the adaptive method calls it once, at the end.
    corrections : int, optional
        Hamiltonian moves at the end, under the density of the emulator, where the denoiser has one: they take samples
        to the emulator's posterior, wherever the network put them. 6 where there is one and this is left out.
    memory : int
        Bound in bytes on what one evaluation of the network may hold; larger batches are evaluated in parts. Samples
        do not depend on it beyond rounding.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Tensor
        Latents z, shape (B, r), dtype and device of the base. Rows outside the support of the latents are drawn again,
        with evaluations of their own, up to 20 times; a warning tells if rows are outside even then.

    Raises
    ------
    InputError
        If `alpha` is negative, `steps` is not a positive integer, a word is unknown, the method does not serve
        alpha > 0, the formulation's noise does not reach far enough, `y` is of the wrong shape, not finite and real or
        out of all reach, corrections are asked for without a surrogate, or another argument is of the wrong kind.
    """
    check_kind(denoiser, "denoiser", Denoiser, "a trained Denoiser")
    y = denoiser.base.check_measurements(y)
    check_generator(generator, y.device)
    memory = check_count(memory, "memory")
    check_flag(progress, "progress")
    if callback is not None:
        check_callable(callback, "callback", "a function of step, noise level and latents")
    if callable(alpha):
        check_elementwise(alpha, "alpha", least=0)
    else:
        alpha = check_number(alpha, "alpha", least=0)
    if method is None:
        method = "exponential" if coordinates == "plain" else "multistep" if _is_zero(alpha) else "heun"
    steps = check_count(steps, "steps")
    scheme = _check(method, alpha, coordinates, nodes, formulation)
    corrections = _corrections(denoiser, corrections)
    nodes = nodes or ("spectrum" if formulation is None else "time")
    formulation = formulation or variance_preserving()
    rate = alpha if callable(alpha) else lambda t: torch.full_like(t, alpha)
    angles = _angles(denoiser, formulation, nodes, scheme.order, steps)
    rows = max(1, memory // _row_bytes(denoiser, y))

    def draw(y: Tensor, report: Callable[[int, float, Tensor], None]) -> Tensor:
        features = denoiser.features(y)

        def network(v: Tensor, angle: float) -> Tensor:
            parts = zip(v.split(rows), features.split(rows))
            return torch.cat([denoiser.residual(part, part.new_full((len(part), 1), angle), seen)
                              for part, seen in parts])

        def normal() -> Tensor:
            return torch.randn(len(y), denoiser.base.r, generator=generator, dtype=y.dtype, device=y.device)
        w = scheme.run(network, normal, formulation, angles, rate, report)
        for _ in range(corrections):
            w = denoiser.surrogate.move(w[None], generator)[0][0]
        return denoiser.base.colour(w, y)
    with torch.no_grad(), tqdm(total=steps, desc="sample", disable=not progress) as bar:
        def report(step: int, sigma: float, state: Tensor) -> None:
            bar.update(step - bar.n)
            if callback is not None:
                callback(step, sigma, denoiser.base.colour(state, y))
        z = draw(y, report)
        return z if denoiser.support is None else _redraw(z, y, denoiser.support, draw)


def _redraw(z: Tensor, y: Tensor, support: Support, draw: Callable) -> Tensor:
    """Latents (B, r) with the rows outside the support drawn again."""
    for _ in range(_REDRAWS):
        # A row that is not finite has diverged, which must be seen.
        outside = ~support.contains(z) & torch.isfinite(z).all(1)
        if not outside.any():
            return z
        z[outside] = draw(y[outside], lambda *_: None)
    left = ~support.contains(z)
    if left.any():
        warnings.warn(f"{int(left.sum())} of {len(z)} samples lie outside the bounds of the training latents after "
                      f"{_REDRAWS} draws: the measurement is unlike the training measurements, or the prior has no "
                      "hard bounds and `denoiser.support` should be None.", stacklevel=3)
    return z


def _corrections(denoiser: Denoiser, corrections: int | None) -> int:
    """Number of corrections; raises InputError where they are asked for in vain."""
    if corrections is None:
        return _CORRECTIONS if denoiser.surrogate is not None else 0
    corrections = check_count(corrections, "corrections", least=0)
    if corrections and denoiser.surrogate is None:
        raise InputError("Corrections need the density of an emulator, which models of many operators with a Gaussian "
                         "prior have: leave `corrections` out.")
    return corrections


def _is_zero(alpha) -> bool:
    return not callable(alpha) and alpha == 0


def check_method(method: str, coordinates: str) -> None:
    """Raise InputError unless there is such a method in such coordinates."""
    check_choice(coordinates, "coordinates", METHODS)
    check_choice(method, f"The method in {coordinates} coordinates", METHODS[coordinates])


def _check(method, alpha, coordinates, nodes, formulation):
    """The scheme asked for; raises InputError where an argument of `sample_latents` is wrong."""
    check_method(method, coordinates)
    if nodes is not None:
        check_choice(nodes, "nodes", ("spectrum", "time"))
    if formulation is not None:
        _check_formulation(formulation)
        _check_reach(formulation, coordinates)
    scheme = METHODS[coordinates][method]
    if scheme.deterministic and not _is_zero(alpha):
        raise InputError(f"The method {method!r} in {coordinates} coordinates follows the ODE, alpha = 0; take 'heun' "
                         "for alpha > 0.")
    return scheme


def _check_formulation(formulation) -> None:
    check_kind(formulation, "formulation", Formulation, "a Formulation such as variance_preserving()")


def _check_reach(formulation, coordinates) -> None:
    first, last = formulation.sigma(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    if last < _LARGE or (coordinates == "plain" and first > _SMALL):
        raise InputError(f"Formulation {formulation.name} runs from sigma = {first:g} to {last:g}: sampling starts "
                         f"from noise alone, at {_LARGE:g} or more, and ends, in plain coordinates, at {_SMALL:g} or "
                         "less.")


def _angles(denoiser: Denoiser, formulation: Formulation, nodes: str, order: int, steps: int) -> list[float]:
    """Angles arctan(sigma) of the steps, decreasing to an exact zero."""
    if nodes == "spectrum":
        return place_angles(denoiser.spectrum, steps, order).tolist()
    t = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return [*torch.arctan(formulation.sigma(t[:-1])).tolist(), 0.0]


def _row_bytes(denoiser: Denoiser, y: Tensor) -> int:
    """Estimate of what the evaluation of one row holds: the outputs of all linear layers, twice, and the state."""
    layers = denoiser.network.modules() if isinstance(denoiser.network, nn.Module) else ()
    width = sum(layer.out_features for layer in layers if isinstance(layer, nn.Linear))
    width += getattr(denoiser.network, "row_size", 0)  # of layers on a mesh
    return 8 * width + 8 * (y.shape[1] + 4 * denoiser.base.r)
