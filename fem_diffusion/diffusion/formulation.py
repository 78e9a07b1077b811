r"""Forward diffusion processes derived from linear PDEs for the density.

The heat equation :math:`\partial_t p = \tfrac12 \gamma(t) \Delta p` has the Gaussian Green's function, so
:math:`p_t = p_0 * N(0, \sigma^2 I)` with :math:`\sigma^2 = \int \gamma`: the variance exploding process. The change
of variables :math:`\xi = x / \varsigma(t)` turns it into the advection-diffusion equation

.. math:: \partial_t p = \nabla\cdot(b\, \xi\, p) + \tfrac{g}{2} \Delta p, \qquad
          b = \dot\varsigma / \varsigma, \qquad g = \dot{(\sigma^2)} / \varsigma^2,

whose solution at time t is the law of :math:`a z_0 + s \varepsilon` with :math:`a = 1/\varsigma` and
:math:`s = \sigma/\varsigma`. A formulation is therefore the pair of functions :math:`\sigma(t)` and
:math:`\varsigma(\sigma)`; every other coefficient follows by automatic differentiation.

References
----------
A. Dasgupta et al., "Unifying and extending Diffusion Models through PDEs for solving Inverse Problems",
arXiv 2504.07437, the sections on the variance exploding and variance preserving formulations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fem_diffusion.errors import InputError

__all__ = ["Formulation", "variance_exploding", "variance_preserving"]


@dataclass(frozen=True)
class Formulation:
    """A forward process on the time interval [0, 1], given by its noise level and its scaling.

    Parameters
    ----------
    name : str
        Name for tables and files.
    noise_level : Callable[[Tensor], Tensor]
        sigma(t), elementwise, increasing on [0, 1]; in units of the base's standard deviation.
    scaling : Callable[[Tensor], Tensor]
        The scaling as a function of sigma, elementwise; 1 for variance exploding.
    """

    name: str
    noise_level: Callable[[Tensor], Tensor]
    scaling: Callable[[Tensor], Tensor]

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of the unscaled process, same shape as `t`."""
        return self.noise_level(t)

    def a(self, t: Tensor) -> Tensor:
        """Factor of the data, a = 1 / scaling, same shape as `t`."""
        return 1 / self.scaling(self.noise_level(t))

    def s(self, t: Tensor) -> Tensor:
        """Factor of the noise, s = sigma / scaling, same shape as `t`."""
        sigma = self.noise_level(t)
        return sigma / self.scaling(sigma)

    def b(self, t: Tensor) -> Tensor:
        """Drift coefficient b = d/dt log(scaling) of the density PDE, same shape as `t`."""
        return _derivative(lambda x: torch.log(self.scaling(self.noise_level(x))), t)

    def g(self, t: Tensor) -> Tensor:
        """Diffusion coefficient g = d/dt(sigma^2) / scaling^2 of the density PDE, same shape as `t`."""
        return _derivative(lambda x: self.noise_level(x) ** 2, t) * self.a(t) ** 2

    def angles(self, steps: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Angles arctan(sigma) at equally spaced times from t = 1 down, closed by an exact zero.

        Parameters
        ----------
        steps : int
            Number of steps, at least 1.
        dtype : torch.dtype
            Floating point type of the result.

        Returns
        -------
        Tensor
            Shape (steps + 1,), decreasing, last entry 0.

        Raises
        ------
        InputError
            If `steps` is not a positive whole number.
        """
        if int(steps) != steps or steps < 1:
            raise InputError(f"The number of steps must be a whole number >= 1, not {steps!r}.")
        t = torch.linspace(1.0, 0.0, int(steps) + 1, dtype=torch.float64)
        angles = torch.arctan(self.noise_level(t))
        angles[-1] = 0.0
        return angles.to(dtype)


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Elementwise derivative of an elementwise function by automatic differentiation."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        value = function(t)
        # A constant function has no graph; its derivative is zero.
        return torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)


def variance_exploding(sigma_min: float = 0.01, sigma_max: float = 100.0) -> Formulation:
    """Variance exploding formulation with a geometric noise level.

    Parameters
    ----------
    sigma_min, sigma_max : float
        Noise levels at t = 0 and t = 1, in units of the base's standard deviation.

    Returns
    -------
    Formulation
        sigma(t) = sigma_min (sigma_max / sigma_min)^t with scaling 1.

    Raises
    ------
    InputError
        Unless 0 < sigma_min < sigma_max.
    """
    if not 0 < sigma_min < sigma_max:
        raise InputError(f"Choose 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}.")
    ratio = math.log(sigma_max / sigma_min)
    return Formulation("VE", lambda t: sigma_min * torch.exp(ratio * t), torch.ones_like)


def variance_preserving(beta_min: float = 0.1, beta_max: float = 20.0) -> Formulation:
    """Variance preserving formulation with a linear rate beta(t).

    Parameters
    ----------
    beta_min, beta_max : float
        The rate beta = 2 b = g at t = 0 and t = 1.

    Returns
    -------
    Formulation
        1 + sigma^2 = exp(integral of beta) with scaling sqrt(1 + sigma^2), so a^2 + s^2 = 1.

    Raises
    ------
    InputError
        Unless 0 < beta_min <= beta_max.
    """
    if not 0 < beta_min <= beta_max:
        raise InputError(f"Choose 0 < beta_min <= beta_max, not {beta_min} and {beta_max}.")

    def sigma(t: Tensor) -> Tensor:
        return torch.sqrt(torch.expm1(beta_min * t + 0.5 * (beta_max - beta_min) * t**2))

    return Formulation("VP", sigma, lambda sigma: torch.sqrt(1 + sigma**2))
