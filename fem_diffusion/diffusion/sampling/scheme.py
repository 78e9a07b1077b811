"""What the samplers of both coordinates share: the record of a method, and the ODE with error control."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from fem_diffusion.errors import SolveError

__all__ = ["SNR", "Scheme", "adaptive_flow"]

# Signal-to-noise ratio of a Langevin correction (Song et al. 2021, appendix G).
SNR = 0.16
# A network in single precision gives no more than five digits.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Scheme:
    """A method: how it runs, what it costs, its order.

    Parameters
    ----------
    run : Callable
        Maps (flow, normal, formulation, angles, alpha, report) to the state at sigma = 0, shape (n, B, r): `flow` has
        ``residual(v, angle)`` and ``denoise(w, sigma)``, `normal` draws standard normal numbers of that shape, `angles`
        falls from the start to 0, `alpha` is a function of time, `report` takes the number of a step, the noise level
        and the state.
    evaluations : Callable[[int], int]
        Network evaluations of so many steps.
    order : int
        Order of the error in the step.
    deterministic : bool
        Whether only alpha = 0 is served.
    """

    run: Callable
    evaluations: Callable[[int], int]
    order: int
    deterministic: bool = False


def adaptive_flow(velocity: Callable[[float, Tensor], Tensor], state: Tensor, start: float, end: float) -> Tensor:
    """Solve d state / d clock = velocity from `start` to `end` with SciPy's Runge-Kutta 5(4) pair.

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

    Raises
    ------
    SolveError
        If the step size underflows.
    """
    def right(clock, flat):
        return velocity(clock, torch.as_tensor(flat).to(state).view_as(state)).double().cpu().numpy().ravel()
    solution = solve_ivp(right, (start, end), state.double().cpu().numpy().ravel(), rtol=_TOLERANCE, atol=_TOLERANCE,
                         t_eval=[end])
    if not solution.success or not np.isfinite(solution.y).all():
        raise SolveError(f"The probability-flow ODE could not be solved ({solution.message}). Take a method with fixed "
                         "steps, and check the training curve of the network.")
    return torch.as_tensor(solution.y[:, -1]).to(state).view_as(state)
