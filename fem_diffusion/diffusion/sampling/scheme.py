"""What the samplers of both coordinates share: the record of a method, and the ODE with error control."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from fem_diffusion.diffusion.denoiser import Conditioned
from fem_diffusion.diffusion.formulation import Formulation
from fem_diffusion.errors import SolveError

__all__ = ["SNR", "Run", "Scheme", "adaptive_flow", "adaptive_path"]

# Signal-to-noise ratio of a Langevin correction (Song et al. 2021, appendix G).
SNR = 0.16
# A network in single precision gives no more than five digits.
_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Run:
    """One call of a sampler, as the steps of a method see it.

    `report` takes the number of a step, the noise level that it reached and the state in base coordinates, up to scale.
    """

    conditioned: Conditioned              # denoiser with B measurements
    rows: int                             # states that are evaluated at once
    normal: Callable[[], Tensor]          # draws standard normal numbers, shape (n, B, r)
    formulation: Formulation              # whose time is meant
    angles: list[float]                   # arctan(sigma) of the steps, falling to 0
    alpha: Callable[[Tensor], Tensor]     # as a function of time
    report: Callable[[int, float, Tensor], None]

    def residual(self, v: Tensor, angle: float) -> Tensor:
        """See `Conditioned.residual`."""
        return self.conditioned.residual(v, angle, self.rows)

    def denoise(self, w: Tensor, sigma: float) -> Tensor:
        """See `Conditioned.denoise`."""
        return self.conditioned.denoise(w, sigma, self.rows)


@dataclass(frozen=True)
class Scheme:
    """A method: how it runs, what it costs, its order."""

    run: Callable[[Run], Tensor]        # gives the state at sigma = 0 in base coordinates, shape (n, B, r)
    evaluations: Callable[[int], int]   # of the network, for so many steps
    order: int                          # of the error in the step
    deterministic: bool = False         # whether only alpha = 0 is served


def adaptive_path(velocity: Callable[[float, Tensor], Tensor], state: Tensor, start: float,
                  end: float) -> Callable[[float], Tensor]:
    """Solution of d state / d clock = velocity(clock, state) as a function of the clock, by SciPy's Runge-Kutta 5(4).

    The clock may run backwards; the error is controlled in the root mean square over all entries of the state, which is
    of any shape. SolveError if the step size underflows.
    """
    def right(clock: float, flat: np.ndarray) -> np.ndarray:
        return velocity(clock, torch.as_tensor(flat).to(state).view_as(state)).double().cpu().numpy().ravel()
    solution = solve_ivp(right, (start, end), state.double().cpu().numpy().ravel(), rtol=_TOLERANCE, atol=_TOLERANCE,
                         dense_output=True)
    if not solution.success or not np.isfinite(solution.y).all():
        raise SolveError(f"The probability-flow ODE could not be solved ({solution.message}). Take a method with fixed "
                         "steps, and check the training curve of the network.")
    return lambda clock: torch.as_tensor(solution.sol(clock)).to(state).view_as(state)


def adaptive_flow(velocity: Callable[[float, Tensor], Tensor], state: Tensor, start: float, end: float) -> Tensor:
    """State at `end`, as `adaptive_path` finds it."""
    return adaptive_path(velocity, state, start, end)(end)
