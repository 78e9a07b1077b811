"""Steps of the reverse process in whitened coordinates: state v, clock theta = arctan(sigma); see `sample`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fem_diffusion.diffusion.sampling.scheme import SNR, Run, Scheme, adaptive_flow

__all__ = ["METHODS"]


def _euler(run: Run, v: Tensor, start: float, end: float) -> Tensor:
    """One Euler step of dv/dtheta = -N from theta = start down to theta = end."""
    return v + (start - end) * run.residual(v, start)


def _heun(run: Run, v: Tensor, start: float, end: float) -> Tensor:
    """One Heun step of dv/dtheta = -N from theta = start down to theta = end."""
    first = run.residual(v, start)
    second = run.residual(v + (start - end) * first, end)
    return v + (start - end) / 2 * (first + second)


def _noise_then_flow(follow: Callable[[Run, Tensor, float, float], Tensor],
                     correct: bool = False) -> Callable[[Run], Tensor]:
    """Noise first, as an exact move of the forward process, then the flow down; a Langevin step where asked for."""
    def method(run: Run) -> Tensor:
        v = run.normal()
        for step, (start, end) in enumerate(zip(run.angles[:-1], run.angles[1:]), 1):
            exponent = _noise(run, start, end)
            if exponent > 0:
                decay = math.exp(-exponent)
                v = decay * v + math.sqrt(-math.expm1(-2 * exponent)) * run.normal()
                start = math.acos(decay * math.cos(start))
            v = follow(run, v, start, end)
            if correct and end > 0:
                size = 2 * (SNR * math.sin(end))**2
                v = v + size * (run.residual(v, end) / math.tan(end) - v) + math.sqrt(2 * size) * run.normal()
            run.report(step, math.tan(end), v)
        return v
    return method


def _noise(run: Run, start: float, end: float) -> float:
    """Integral of alpha(t) tan(theta) over a step, by Simpson's rule in log(cos theta)."""
    low, high = math.log(math.cos(start)), math.log(math.cos(end))
    cosines = torch.exp(torch.tensor([low, (low + high) / 2, high], dtype=torch.float64))
    sigma = torch.sqrt((1 - cosines**2).clamp(min=0)) / cosines
    first, middle, last = run.alpha(run.formulation.time(sigma)).tolist()
    return (high - low) * (first + 4 * middle + last) / 6


def _multistep(run: Run) -> Tensor:
    """Two-step Adams-Bashforth rule in the angle, for steps of any lengths; Euler's rule starts it."""
    v = run.normal()
    earlier = None
    for step, (start, end) in enumerate(zip(run.angles[:-1], run.angles[1:]), 1):
        speed, length = run.residual(v, start), start - end
        change = 0.0 if earlier is None else length / 2 * (speed - earlier[0]) / earlier[1]
        v = v + length * (speed + change)
        earlier = speed, length
        run.report(step, math.tan(end), v)
    return v


def _adaptive(run: Run) -> Tensor:
    v = adaptive_flow(lambda angle, v: -run.residual(v, angle), run.normal(), run.angles[0], 0.0)
    run.report(len(run.angles) - 1, 0.0, v)
    return v


METHODS = {
    "euler": Scheme(_noise_then_flow(_euler), lambda steps: steps, 1),
    "heun": Scheme(_noise_then_flow(_heun), lambda steps: 2 * steps, 2),
    "multistep": Scheme(_multistep, lambda steps: steps, 2, deterministic=True),
    "predictor_corrector": Scheme(_noise_then_flow(_euler, correct=True), lambda steps: 2 * steps - 1, 1),
    "adaptive": Scheme(_adaptive, lambda steps: steps, 2, deterministic=True),
}
