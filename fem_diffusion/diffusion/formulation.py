r"""Forward diffusion processes derived from linear PDEs for the density.

The heat equation :math:`\partial_t p = \tfrac12 \gamma(t) \Delta p` has the Gaussian Green's function, so
:math:`p_t = p_0 * N(0, \sigma^2 I)` with :math:`\sigma^2 = \int \gamma`: the variance exploding process. The change
of variables :math:`\xi = x / \varsigma(t)` turns it into the advection-diffusion equation

.. math:: \partial_t p = \nabla\cdot(b\, \xi\, p) + \tfrac{g}{2} \Delta p, \qquad
          b = \dot\varsigma / \varsigma, \qquad g = \dot{(\sigma^2)} / \varsigma^2,

whose solution at time t is the law of :math:`a z_0 + s \varepsilon` with :math:`a = 1/\varsigma` and
:math:`s = \sigma/\varsigma`. A formulation is therefore the pair of functions :math:`\sigma^2(t)` and
:math:`\varsigma(t)`; every other coefficient follows from these two by formula or automatic differentiation. A
formulation of your own::

    mine = Formulation("mine", variance=lambda t: 2500 * t**2, scaling=lambda t: (1 + 50**3 * t**3)**(1 / 3))

The second moment of data with variance V becomes :math:`(V + \sigma^2)/\varsigma^2`. It grows without bound for
:math:`\varsigma = 1` and stays bounded for every scaling that grows like :math:`\sigma`: the wider class of variance
preserving models.

References
----------
A. Dasgupta et al., "Unifying and extending Diffusion Models through PDEs for solving Inverse Problems",
arXiv 2504.07437, the sections on the variance exploding and variance preserving formulations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fem_diffusion.checks import check_callable, check_choice, check_number
from fem_diffusion.errors import InputError

__all__ = ["Formulation", "check_elementwise", "constant_moment", "straight_line", "sub_variance_preserving",
           "variance_exploding", "variance_preserving"]


@dataclass(frozen=True)
class Formulation:
    """A forward process on the time interval [0, 1], given by its noise level and its scaling.

    InputError if the name is no word, sigma^2 or the scaling is no elementwise function, sigma^2 is negative, not
    finite or not increasing, or the scaling is not finite and positive.

    Parameters
    ----------
    name : str
        Name for tables and files.
    variance, scaling : Callable[[Tensor], Tensor]
        sigma^2(t), increasing on [0, 1], in units of the base's variance; the scaling at time t, positive; both
        elementwise. They get copies of the times.
    """

    name: str
    variance: Callable[[Tensor], Tensor]
    scaling: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"The name of a formulation is {self.name!r}: give a word.")
        variance = check_elementwise(self.variance, f"Formulation {self.name}: the variance")
        check_elementwise(self.scaling, f"Formulation {self.name}: the scaling", above=0)
        if variance[0] < 0 or not (variance.diff() > 0).all():
            raise InputError(f"Formulation {self.name}: the variance must be >= 0 and increase on [0, 1].")

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of the unscaled process, same shape as `t`."""
        return torch.sqrt(self.variance(t.clone()))

    def a(self, t: Tensor) -> Tensor:
        """Factor of the data, a = 1 / scaling, same shape as `t`."""
        return 1 / self.scaling(t.clone())

    def s(self, t: Tensor) -> Tensor:
        """Factor of the noise, s = sigma / scaling, same shape as `t`."""
        return self.sigma(t) / self.scaling(t.clone())

    def b(self, t: Tensor) -> Tensor:
        """Drift coefficient b = d/dt log(scaling) of the density PDE, same shape as `t`."""
        return _derivative(lambda x: torch.log(self.scaling(x)), t)

    def g(self, t: Tensor) -> Tensor:
        """Diffusion coefficient g = d/dt(sigma^2) / scaling^2 of the density PDE, same shape as `t`."""
        return _derivative(self.variance, t) * self.a(t) ** 2

    def spread(self, t: Tensor, variance: float = 1.0) -> Tensor:
        """Standard deviation sqrt(a^2 V + s^2) at time t of data with variance V; the terminal law is t = 1."""
        return torch.sqrt(self.a(t) ** 2 * variance + self.s(t) ** 2)

    def score(self, xi: Tensor, denoised: Tensor, t: Tensor) -> Tensor:
        """Score (a D - xi) / s^2 at xi (B, r) from the denoiser's output D (B, r); Tweedie's formula."""
        return (self.a(t) * denoised - xi) / self.s(t) ** 2

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight s^2 of the squared error of the score, which gives its target -eps / s unit variance."""
        return self.s(t) ** 2

    def time(self, sigma: Tensor) -> Tensor:
        """Time at which the noise level is `sigma`, same shape; 0 or 1 where it lies outside the range."""
        low, high = torch.zeros_like(sigma), torch.ones_like(sigma)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.sigma(middle) < sigma
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high


def check_elementwise(function: Callable[[Tensor], Tensor], name: str, above: float = -math.inf,
                      least: float = -math.inf) -> Tensor:
    """Values (101,) of a function of time on [0, 1]; InputError unless it is elementwise, real, finite and in range."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    values = check_callable(function, name, "a function of a tensor of times")(t.clone())
    if not isinstance(values, Tensor) or values.shape != t.shape or values.is_complex():
        raise InputError(f"{name} must be elementwise: map a tensor of times to a real tensor of that shape.")
    if not torch.isfinite(values).all() or not ((values > above) & (values >= least)).all():
        words = "positive and " if above == 0 else f">= {least:g} and " if least > -math.inf else ""
        raise InputError(f"{name} must be {words}finite on [0, 1]: mend the function.")
    return values


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Elementwise derivative of an elementwise function by automatic differentiation."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        value = function(t.clone())
        # A constant function has no graph; its derivative is zero.
        return torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)


def variance_exploding(sigma_min: float = 0.01, sigma_max: float = 100.0, schedule: str = "geometric") -> Formulation:
    """Variance exploding formulation: scaling 1; sigma(t) = sigma_min (sigma_max / sigma_min)^t, or "linear" in t.

    The noise levels at t = 0 and t = 1 are in units of the base's standard deviation. InputError unless 0 < sigma_min <
    sigma_max and the schedule is "geometric" or "linear".
    """
    check_choice(schedule, "schedule", ("geometric", "linear"))
    sigma_min = check_number(sigma_min, "sigma_min", above=0)
    sigma_max = check_number(sigma_max, "sigma_max", above=sigma_min)
    if schedule == "linear":
        return Formulation("VE-linear", lambda t: (sigma_min + (sigma_max - sigma_min) * t) ** 2, torch.ones_like)
    ratio = math.log(sigma_max / sigma_min)
    return Formulation("VE", lambda t: sigma_min**2 * torch.exp(2 * ratio * t), torch.ones_like)


def variance_preserving(beta_min: float = 0.1, beta_max: float = 20.0, schedule: str = "linear",
                        sigma_max: float = 100.0) -> Formulation:
    """Variance preserving formulation: scaling sqrt(1 + sigma^2), so a^2 + s^2 = 1 and g = 2 b.

    InputError unless 0 < beta_min <= beta_max, sigma_max is positive and the schedule is known.

    Parameters
    ----------
    beta_min, beta_max : float
        Linear schedule: the rate beta = 2 b = g at t = 0 and t = 1; 1 + sigma^2 = exp(integral of beta).
    schedule : {"linear", "cosine"}
        "cosine": a falls as a cosine, so arctan(sigma) is linear in t (Nichol and Dhariwal 2021, without offset).
    sigma_max : float
        Cosine schedule: noise level at t = 1.
    """
    check_choice(schedule, "schedule", ("linear", "cosine"))
    integral = _integral(beta_min, beta_max)
    sigma_max = check_number(sigma_max, "sigma_max", above=0)
    if schedule == "cosine":
        return replace(constant_moment(1.0, sigma_max), name="VP-cosine")
    return Formulation("VP", lambda t: torch.expm1(integral(t)), lambda t: torch.exp(integral(t) / 2))


def sub_variance_preserving(beta_min: float = 0.1, beta_max: float = 20.0) -> Formulation:
    """Sub-VP formulation (Song et al. 2021, eq. 14): a = exp(-B/2) and s = 1 - exp(-B) with B the integral of beta.

    So sigma = 2 sinh(B/2) with scaling exp(B/2); the rate beta is linear from beta_min at t = 0 to beta_max at t = 1.
    InputError unless 0 < beta_min <= beta_max.
    """
    integral = _integral(beta_min, beta_max)
    return Formulation("sub-VP", lambda t: 4 * torch.sinh(integral(t) / 2) ** 2, lambda t: torch.exp(integral(t) / 2))


def straight_line(sigma_max: float = 100.0) -> Formulation:
    """Straight-line path a + s = 1, that of flow matching: scaling 1 + sigma.

    The noise level is sigma_max at t = 1; s is linear in t up to sigma_max / (1 + sigma_max). InputError unless
    sigma_max is positive.
    """
    sigma_max = check_number(sigma_max, "sigma_max", above=0)
    end = sigma_max / (1 + sigma_max)
    return Formulation("straight", lambda t: (end * t / (1 - end * t)) ** 2, lambda t: 1 / (1 - end * t))


def constant_moment(variance: float, sigma_max: float = 100.0) -> Formulation:
    """Formulation under which data of the given variance keep it at all times: scaling sqrt(1 + sigma^2 / V).

    V is the variance in each direction, in base coordinates, sigma_max the noise level at t = 1 in units of sqrt(V);
    arctan(sigma / sqrt(V)) is linear in t. InputError unless `variance` and sigma_max are positive.
    """
    sigma_max, variance = check_number(sigma_max, "sigma_max", above=0), check_number(variance, "variance", above=0)
    end = math.atan(sigma_max)
    return Formulation(f"constant-{variance:g}", lambda t: variance * torch.tan(end * t) ** 2,
                       lambda t: 1 / torch.cos(end * t))


def _integral(beta_min: float, beta_max: float) -> Callable[[Tensor], Tensor]:
    """Integral from 0 to t of the rate beta, linear from beta_min to beta_max; InputError unless it is one."""
    low = check_number(beta_min, "beta_min", above=0)
    high = check_number(beta_max, "beta_max", least=low)
    return lambda t: low * t + 0.5 * (high - low) * t**2
