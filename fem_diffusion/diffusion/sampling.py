r"""The reverse process for every :math:`\alpha \ge 0`, integrated in the coordinates of the base.

With time reversed and score q, particles of :math:`d\xi = [b \xi + \tfrac{1+\alpha}{2} g q] d\tau + \sqrt{\alpha g}
dW` share the marginals of the forward process for every :math:`\alpha` (arXiv 2504.07437). For the trigonometric
process :math:`v = \cos\theta\, w_0 + \sin\theta\, \varepsilon` one has :math:`b = \tan\theta`,
:math:`g = 2 \tan\theta` and :math:`q = -v + \cot\theta\, N`, hence

.. math:: dv = -\alpha \tan\theta\, v\, d\tau + \sqrt{2 \alpha \tan\theta}\, dW + (1 + \alpha) N\, d\tau .

That is the probability-flow equation :math:`dv = N d\tau` joined with a Langevin part, and the Langevin part is the
forward process run for a while and the flow back. So a step from :math:`\theta` to :math:`\theta'` adds the step's
noise first, which is an exact move up to the angle :math:`\hat\theta` with :math:`\cos\hat\theta = \cos\theta
(\cos\theta / \cos\theta')^\alpha`, and then follows the flow down from :math:`\hat\theta` to :math:`\theta'` by
Heun's rule. Both moves keep the marginals, so the only error is that of Heun's rule in N. Where the base is the
truth, N = 0 and one step is exact for every :math:`\alpha`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.formulation import Formulation
from fem_diffusion.errors import InputError

__all__ = ["sample_latents"]


def sample_latents(denoiser: Denoiser, y: Tensor, formulation: Formulation, *, generator: torch.Generator,
                   alpha: float = 0.0, steps: int = 20, chunk: int = 8192, progress: bool = False) -> Tensor:
    """Draw one latent vector for each row of measurements.

    Parameters
    ----------
    denoiser : Denoiser
        Trained denoiser, its base in the dtype and on the device of `y`.
    y : Tensor
        Measurements, shape (B, k); repeat a row to draw many samples for it.
    formulation : Formulation
        Gives the discrete path of noise levels.
    generator : torch.Generator
        Source of randomness, on the device of `y`.
    alpha : float
        0 for the probability-flow ODE, 1 for the usual reverse SDE, any value >= 0 between and beyond.
    steps : int
        Number of steps; each costs two network evaluations.
    chunk : int
        Largest number of rows that are integrated at once; bounds the memory.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Tensor
        Latents z, shape (B, r), dtype and device of `y`.

    Raises
    ------
    InputError
        If `alpha` is negative, `steps` is not a positive whole number, or `y` is of the wrong shape or not finite.
    """
    if not alpha >= 0:
        raise InputError(f"alpha must be >= 0, not {alpha}.")
    if y.ndim != 2 or y.shape[1] != denoiser.base.k or not torch.isfinite(y).all():
        raise InputError(f"Measurements must be finite and of shape (B, {denoiser.base.k}), not {tuple(y.shape)}.")
    angles = formulation.angles(steps, torch.float64).tolist()
    parts = y.split(chunk)
    with torch.no_grad(), tqdm(total=steps * len(parts), desc="sample", disable=not progress) as bar:
        return torch.cat([_integrate(denoiser, part, angles, alpha, generator, bar.update) for part in parts])


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of `like`."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _integrate(denoiser: Denoiser, y: Tensor, angles: list[float], alpha: float, generator: torch.Generator,
               tick: Callable[[], None]) -> Tensor:
    """Reverse process from angles[0] to angles[-1] for the rows of `y` (B, k); latents (B, r)."""
    v = _normal(y.new_empty(len(y), denoiser.base.r), generator)
    for start, end in zip(angles[:-1], angles[1:]):
        if alpha > 0:
            v, start = _add_noise(v, start, end, alpha, generator)
        v = _heun(denoiser, v, y, start, end)
        tick()
    return denoiser.base.colour(v, y)


def _add_noise(v: Tensor, start: float, end: float, alpha: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Noise of one step of the alpha family, as an exact move of the forward process; the new v and its angle."""
    decay = (math.cos(start) / math.cos(end)) ** alpha
    return decay * v + math.sqrt(1 - decay**2) * _normal(v, generator), math.acos(decay * math.cos(start))


def _heun(denoiser: Denoiser, v: Tensor, y: Tensor, start: float, end: float) -> Tensor:
    """Heun step of dv/dtheta = -N(v, theta) from theta = start down to theta = end."""
    length = start - end
    first = denoiser.residual(v, v.new_full((len(v), 1), start), y)
    second = denoiser.residual(v + length * first, v.new_full((len(v), 1), end), y)
    return v + length / 2 * (first + second)
