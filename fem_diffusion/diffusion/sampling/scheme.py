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

__all__ = ["SNR", "Run", "Scheme", "adaptive_flow"]

# Signal-to-noise ratio of a Langevin correction (Song et al. 2021, appendix G).
SNR = 0.16
# A network in single precision gives no more than five digits.
_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Run:
    """One call of a sampler, as the steps of a method see it.

    Parameters
    ----------
    conditioned : Conditioned
        Denoiser with B measurements.
    rows : int
        States that are evaluated at once.
    normal : Callable[[], Tensor]
        Draws standard normal numbers, shape (n, B, r).
    formulation : Formulation
        Whose time is meant.
    angles : list of float
        arctan(sigma) of the steps, falling to 0.
    alpha : Callable[[Tensor], Tensor]
        As a function of time.
    report : Callable[[int, float, Tensor], None]
        Takes the number of a step, the noise level that it reached and the state in base coordinates, up to scale.
    """

    conditioned: Conditioned
    rows: int
    normal: Callable[[], Tensor]
    formulation: Formulation
    angles: list[float]
    alpha: Callable[[Tensor], Tensor]
    report: Callable[[int, float, Tensor], None]

    def residual(self, v: Tensor, angle: float) -> Tensor:
        """See `Conditioned.residual`."""
        return self.conditioned.residual(v, angle, self.rows)

    def denoise(self, w: Tensor, sigma: float) -> Tensor:
        """See `Conditioned.denoise`."""
        return self.conditioned.denoise(w, sigma, self.rows)


@dataclass(frozen=True)
class Scheme:
    """A method: how it runs, what it costs, its order.

    Parameters
    ----------
    run : Callable[[Run], Tensor]
        Gives the state at sigma = 0 in base coordinates, shape (n, B, r).
    evaluations : Callable[[int], int]
        Network evaluations of so many steps.
    order : int
        Order of the error in the step.
    deterministic : bool
        Whether only alpha = 0 is served.
    """

    run: Callable[[Run], Tensor]
    evaluations: Callable[[int], int]
    order: int
    deterministic: bool = False


def adaptive_flow(velocity: Callable[[float, Tensor], Tensor], state: Tensor, start: float, end: float) -> Tensor:
    """Solve d state / d clock = velocity from `start` to `end` with SciPy's Runge-Kutta 5(4) pair.

    SolveError if the step size underflows.

    Parameters
    ----------
    velocity : Callable
        Maps the clock and a state to a tensor of the state's shape.
    state : Tensor
        Any shape; the error is controlled in the root mean square over all entries.
    start, end : float
        Of the clock, in either order.

    Returns
    -------
    Tensor
        The state at `end`.
    """
    def right(clock: float, flat: np.ndarray) -> np.ndarray:
        return velocity(clock, torch.as_tensor(flat).to(state).view_as(state)).double().cpu().numpy().ravel()
    solution = solve_ivp(right, (start, end), state.double().cpu().numpy().ravel(), rtol=_TOLERANCE, atol=_TOLERANCE,
                         t_eval=[end])
    if not solution.success or not np.isfinite(solution.y).all():
        raise SolveError(f"The probability-flow ODE could not be solved ({solution.message}). Take a method with fixed "
                         "steps, and check the training curve of the network.")
    return torch.as_tensor(solution.y[:, -1]).to(state).view_as(state)
