r"""Where a sampler puts its steps: noise levels chosen from the spectrum of the posterior covariance.

In base coordinates and in the angle :math:`\theta = \arctan\sigma`, the probability flow of a Gaussian posterior with
variance :math:`\lambda` in some direction moves a particle along :math:`v(\theta) \propto s_\lambda(\theta)`,
:math:`s_\lambda = \sqrt{\lambda \cos^2\theta + \sin^2\theta}`. Two things follow.

*The spectrum can be measured.* The network is :math:`N = -dv/d\theta`, so its mean square over held-out pairs is
:math:`\sum_i w_i \dot s_{\lambda_i}^2` at each angle. Non-negative least squares turns that curve into variances and
weights. For a posterior that is not Gaussian this is the spectrum of the posterior covariance as each noise level sees
it: narrow modes count as narrow.

*The steps can be placed.* A method of order p makes the local error :math:`h^{p+1} |d^{p+1} v / d\theta^{p+1}|`. In
units of the posterior's own standard deviation :math:`\sqrt\lambda` it is the same in every step if the density of
steps is proportional to the power 1/(p+1) of that derivative.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from fem_diffusion.checks import check_count, check_kind
from fem_diffusion.diffusion.checks import check_tensor
from fem_diffusion.errors import InputError

__all__ = ["Spectrum", "fit_spectrum", "place_angles"]

_GRID = np.linspace(0.0, math.pi / 2, 4001)
_VARIANCES = np.geomspace(1e-6, 10.0, 57)
# Share of the steps that is spread evenly, for what the spectrum does not tell.
_EVEN = 0.2


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Variances of the posterior in base coordinates; a variance of 1 is what the base says itself.

    Parameters
    ----------
    variances, weights : Tensor
        Positive, and the share of the latents with that variance, >= 0, shape (m,) each.
    """

    variances: Tensor
    weights: Tensor


def fit_spectrum(angles: Tensor, speeds: Tensor) -> Spectrum:
    """Spectrum, of at most n variances, from the mean square of the network at n angles.

    InputError if the shapes differ, a mean square is negative or not finite, or an angle is out of range.

    Parameters
    ----------
    angles, speeds : Tensor
        arctan(sigma), between 0 and pi/2, shape (n,), and the mean square of N a latent, over the law of v at each
        angle, shape (n,); 0 where the base is the truth.
    """
    check_tensor(angles, "angles", ("n",))
    check_tensor(speeds, "speeds", (len(angles),))
    if not (speeds >= 0).all() or not ((angles >= 0) & (angles <= math.pi / 2)).all():
        raise InputError("A spectrum needs a finite mean square >= 0 for each angle, between 0 and pi/2.")
    theta, speed = angles.double().cpu().numpy(), speeds.double().cpu().numpy()
    curves = ((1 - _VARIANCES) * np.sin(theta)[:, None] * np.cos(theta)[:, None] / _std(_VARIANCES, theta[:, None]))**2
    weights, _ = nnls(curves, speed)
    kept = weights > 0
    return Spectrum(torch.tensor(_VARIANCES[kept]), torch.tensor(weights[kept]))


def place_angles(spectrum: Spectrum | None, steps: int, order: int = 2) -> Tensor:
    """Angles (steps + 1,) from pi/2, pure noise, down to 0 that share the error of a method evenly among its steps.

    They are spread evenly without a spectrum; `order` is that of the method. InputError if `steps` or `order` is no
    positive integer, or `spectrum` no Spectrum.
    """
    steps, order = check_count(steps, "steps"), check_count(order, "order")
    if spectrum is not None:
        check_kind(spectrum, "spectrum", Spectrum, "what fit_spectrum returns, or None")
    density = np.ones_like(_GRID)
    if spectrum is not None and len(spectrum.weights):
        variances = spectrum.variances.double().cpu().numpy()[:, None]
        curve = _std(variances, _GRID) / np.sqrt(variances)
        for _ in range(order + 1):
            curve = np.gradient(curve, _GRID[1], axis=1)
        error = (spectrum.weights.double().cpu().numpy()[:, None] * curve**2).sum(axis=0)**(0.5 / (order + 1))
        if error.mean() > 0:
            density = _EVEN + (1 - _EVEN) * error / error.mean()
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return torch.tensor(np.interp(np.linspace(1.0, 0.0, steps + 1), share / share[-1], _GRID))


def _std(variance: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Standard deviation of v at angle theta for data of this variance."""
    return np.sqrt(variance * np.cos(theta)**2 + np.sin(theta)**2)
