r"""The denoiser :math:`D(z_t, \sigma, y) = E[z_0 | z_t, y]` as Gaussian base plus network.

In base coordinates, :math:`w_t = w_0 + \sigma \varepsilon`, the denoiser is

.. math:: D = \frac{w_t}{1 + \sigma^2} + \frac{\sigma}{\sqrt{1 + \sigma^2}} N(v, \theta, y), \qquad
          v = \frac{w_t}{\sqrt{1 + \sigma^2}}, \qquad \theta = \arctan \sigma.

The first term is the exact denoiser of a standard normal. With :math:`v = \cos\theta\, w_0 + \sin\theta\,
\varepsilon` the regression target of N is :math:`\sin\theta\, w_0 - \cos\theta\, \varepsilon`, of unit variance at
every noise level (the preconditioning of Karras et al., arXiv 2206.00364, table 1, with operators in place of
scalars), and the probability-flow equation is :math:`dv/d\theta = -N`.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from fem_diffusion.checks import check_callable, check_device, check_kind
from fem_diffusion.diffusion.gaussian import GaussianBase
from fem_diffusion.diffusion.nodes import Spectrum
from fem_diffusion.diffusion.support import Support
from fem_diffusion.diffusion.surrogate import Surrogate

__all__ = ["Denoiser"]


class Denoiser:
    """Gaussian base and network together.

    Parameters
    ----------
    base : GaussianBase
        Gaussian approximation of the posterior.
    network : nn.Module, Callable or None
        Maps v (B, r), angle (B, 1) and features (B, k), copies of all three, to N (B, r); None where the base is the
        answer.
    spectrum : Spectrum, optional
        Of the posterior covariance in base coordinates, from which samplers place their steps.
    support : Support, optional
        Hard bounds of the latents, which samplers keep.
    surrogate : Surrogate, optional
        Density of the posterior by an emulator, with which samplers correct what the network has missed.

    Raises
    ------
    InputError
        If the network cannot be called, or another part is of the wrong kind.
    """

    def __init__(self, base: GaussianBase, network: nn.Module | Callable | None, spectrum: Spectrum | None = None,
                 support: Support | None = None, surrogate: Surrogate | None = None):
        self.base = check_kind(base, "base", GaussianBase, "what fit_base or plain_base returns")
        self.network = network if network is None else check_callable(network, "The network", "a module or None")
        for name, part, kind in (("spectrum", spectrum, Spectrum), ("support", support, Support),
                                 ("surrogate", surrogate, Surrogate)):
            if part is not None:
                check_kind(part, name, kind, f"a {kind.__name__} or None")
        self.spectrum = spectrum
        self.support = support
        self.surrogate = surrogate

    def features(self, y: Tensor) -> Tensor:
        """What the network sees of measurements `y` (B, k): shape (B, k), in the precision of the network."""
        # Measurements are centred in their own precision before the network's, which may be lower.
        return self.base.features(y).to(getattr(self.network, "dtype", y.dtype))

    def residual(self, v: Tensor, angle: Tensor, features: Tensor) -> Tensor:
        """What the network adds to the base, N(v, angle, y).

        Parameters
        ----------
        v : Tensor
            Unit-variance state, shape (B, r).
        angle : Tensor
            arctan(sigma), shape (B, 1).
        features : Tensor
            Of the measurements, from `features`, shape (B, k).

        Returns
        -------
        Tensor
            Shape (B, r), dtype of `v`.
        """
        if self.network is None:
            return torch.zeros_like(v)
        # A network of the user's own may write into what it gets.
        inputs = (x.to(features.dtype, copy=True) for x in (v, angle, features))
        return self.network(*inputs).to(v.dtype)

    def denoise(self, z_t: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """E[z_0 | z_t, y] for the variance exploding process with noise covariance sigma² P.

        Parameters
        ----------
        z_t : Tensor
            Noisy latents, shape (B, r); for a scaled formulation pass z_t / a and s / a.
        sigma : Tensor
            Noise level in base coordinates, shape (B, 1), positive.
        y : Tensor
            Measurements, shape (B, k).

        Returns
        -------
        Tensor
            Shape (B, r).
        """
        w_t = self.base.whiten(z_t, y)
        norm = torch.sqrt(1 + sigma**2)
        w_0 = w_t / norm**2 + sigma / norm * self.residual(w_t / norm, torch.arctan(sigma), self.features(y))
        return self.base.colour(w_0, y)

    def score(self, z_t: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """P ∇ log p_t(z_t | y) = (D - z_t) / sigma², shape (B, r), in the metric of the base; see `denoise`."""
        return (self.denoise(z_t, sigma, y) - z_t) / sigma**2

    def to(self, device: str | torch.device) -> "Denoiser":
        """A copy on another device; this one stays where it is. InputError where torch has no such device."""
        device = check_device(device)
        network = deepcopy(self.network).to(device) if isinstance(self.network, nn.Module) else self.network
        surrogate = self.surrogate and self.surrogate.to(device)
        return Denoiser(self.base.to(device), network, self.spectrum, self.support, surrogate)
