"""Steps of the reverse process in plain coordinates: state xi = a w + s eps, clock the time t; see `sample`.

After its steps every method goes from the last noise level to none by Tweedie's formula, one more evaluation.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fem_diffusion.diffusion.sampling.scheme import SNR, Run, Scheme, adaptive_flow

__all__ = ["METHODS"]

# Noise level of the last evaluation, in units of the base's standard deviation.
_SIGMA_END = 0.005
# With fewer steps a multistep method does not extrapolate over the last one.
_FEW = 15


class _Process:
    """Drift and noise of one formulation and one alpha; times are floats, states (n, B, r)."""

    def __init__(self, run: Run):
        self.run, formulation = run, run.formulation
        self.a, self.s, self.b, self.g, self.sigma, self.spread, self.alpha = map(_on_floats, (
            formulation.a, formulation.s, formulation.b, formulation.g, formulation.sigma, formulation.spread,
            run.alpha))
        # Strictly decreasing; at the last one the noise is small, not zero.
        sigma = torch.tan(torch.tensor(run.angles, dtype=torch.float64))
        sigma[-1] = min(_SIGMA_END, float(sigma[-2]) / 2)
        # Noise levels outside the formulation's range fall on its ends, several of them on one time.
        self.times = formulation.time(sigma).unique().flip(0).tolist()

    def denoise(self, xi: Tensor, t: float) -> Tensor:
        return self.run.denoise(xi / self.a(t), self.sigma(t))

    def score(self, xi: Tensor, t: float) -> Tensor:
        return self.run.formulation.score(xi, self.denoise(xi, t), xi.new_tensor(t))

    def drift(self, xi: Tensor, t: float) -> Tensor:
        return self.b(t) * xi + (1 + self.alpha(t)) / 2 * self.g(t) * self.score(xi, t)

    def rate(self, t: float) -> float:
        """Rate at which noise adds variance."""
        return self.alpha(t) * self.g(t)

    def first(self) -> Tensor:
        """The state at the first time."""
        return self.spread(self.times[0]) * self.run.normal()

    def last(self, xi: Tensor) -> Tensor:
        """Tweedie's formula, from the last noise level to none."""
        w = self.denoise(xi, self.times[-1])
        self.run.report(len(self.times), 0.0, w)
        return w


def _on_floats(function: Callable[[Tensor], Tensor]) -> Callable[[float], float]:
    """A function of a tensor of times as one of a float."""
    return lambda t: float(function(torch.tensor([t], dtype=torch.float64)))


def _stepped(step: Callable[[_Process, Tensor, float, float], Tensor],
             correct: bool = False) -> Callable[[Run], Tensor]:
    """A method made of steps from one time to the next, and a Langevin step after each where asked for."""
    def method(run: Run) -> Tensor:
        process = _Process(run)
        xi = process.first()
        for number, (start, end) in enumerate(zip(process.times[:-1], process.times[1:]), 1):
            xi = step(process, xi, start, end)
            if correct:
                size = 2 * (SNR * process.s(end))**2
                xi = xi + size * process.score(xi, end) + math.sqrt(2 * size) * run.normal()
            run.report(number, process.sigma(end), xi)
        return process.last(xi)
    return method


def _euler(process: _Process, xi: Tensor, start: float, end: float) -> Tensor:
    """Euler-Maruyama step; Euler's for alpha = 0."""
    length, rate = start - end, process.rate(start)
    xi = xi + length * process.drift(xi, start)
    return xi + math.sqrt(length * rate) * process.run.normal() if rate > 0 else xi


def _heun(process: _Process, xi: Tensor, start: float, end: float) -> Tensor:
    """Heun step, one draw of noise for both stages: weak order 2 for additive noise (Kloeden and Platen, 15.1)."""
    length = start - end
    rate = (process.rate(start) + 4 * process.rate((start + end) / 2) + process.rate(end)) / 6
    noise = math.sqrt(length * rate) * process.run.normal() if rate > 0 else 0.0
    first = process.drift(xi, start)
    second = process.drift(xi + length * first + noise, end)
    return xi + length / 2 * (first + second) + noise


def _dpm_solver(run: Run) -> Tensor:
    """DPM-Solver++(2M) and its stochastic version (Lu et al. 2022, algorithm 2 and appendix), for any alpha.

    With D frozen, x = xi / a obeys x' = D + rho^(1+alpha) (x - D) + sigma' sqrt(1 - rho^(2 alpha)) eps, where rho =
    sigma' / sigma; D is extrapolated to the middle of the step in log sigma, but not over the last of few steps, which
    is long.
    """
    process = _Process(run)
    times = process.times
    x = process.first() / process.a(times[0])
    earlier = None
    for step, (start, end) in enumerate(zip(times[:-1], times[1:]), 1):
        ratio = process.sigma(end) / process.sigma(start)
        denoised, length = process.denoise(process.a(start) * x, start), -math.log(ratio)
        first_order = step == len(times) - 1 < _FEW
        change = 0.0 if earlier is None or first_order else length / 2 * (denoised - earlier[0]) / earlier[1]
        earlier, target = (denoised, length), denoised + change
        strength = process.alpha((start + end) / 2)
        x = target + ratio**(1 + strength) * (x - target)
        if strength > 0:
            x = x + process.sigma(end) * math.sqrt(1 - ratio**(2 * strength)) * run.normal()
        run.report(step, process.sigma(end), process.a(end) * x)
    return process.last(process.a(times[-1]) * x)


def _adaptive(run: Run) -> Tensor:
    process = _Process(run)
    xi = adaptive_flow(lambda t, xi: -process.drift(xi, t), process.first(), process.times[0], process.times[-1])
    return process.last(xi)


METHODS = {
    "euler": Scheme(_stepped(_euler), lambda steps: steps + 1, 1),
    "heun": Scheme(_stepped(_heun), lambda steps: 2 * steps + 1, 2),
    "dpm_solver": Scheme(_dpm_solver, lambda steps: steps + 1, 2),
    "predictor_corrector": Scheme(_stepped(_euler, correct=True), lambda steps: 2 * steps + 1, 1),
    "adaptive": Scheme(_adaptive, lambda steps: steps, 2, deterministic=True),
}
