"""Known laws of single numbers in torch: to standard normal numbers and back, and what priors of others' are in these.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from scipy.stats import norm
from torch import Tensor, distributions

from fem_diffusion.errors import InputError
from fem_diffusion.marginal import Marginal

__all__ = ["marginals", "of_normal", "to_normal"]

# SciPy's frozen distributions for torch's, by their parameters.
_SCIPY: dict[type, Any] = {
    distributions.Normal: lambda d: stats.norm(d.loc, d.scale),
    distributions.Uniform: lambda d: stats.uniform(d.low, d.high - d.low),
    distributions.LogNormal: lambda d: stats.lognorm(d.scale, scale=np.exp(d.loc)),
    distributions.Exponential: lambda d: stats.expon(scale=1 / d.rate),
    distributions.Gamma: lambda d: stats.gamma(d.concentration, scale=1 / d.rate),
    distributions.Beta: lambda d: stats.beta(d.concentration1, d.concentration0),
    distributions.Laplace: lambda d: stats.laplace(d.loc, d.scale),
    distributions.HalfNormal: lambda d: stats.halfnorm(scale=d.scale),
    distributions.StudentT: lambda d: stats.t(d.df, d.loc, d.scale),
    distributions.Cauchy: lambda d: stats.cauchy(d.loc, d.scale),
}


class _OfNormal(torch.autograd.Function):
    """Numbers of a law for standard normal ones, with the derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, law: Marginal) -> Tensor:   # pyright: ignore[reportIncompatibleMethodOverride]
        flat = z.detach().cpu().double().reshape(-1).numpy()
        ctx.save_for_backward(torch.from_numpy(law.slope(flat)).to(z).view(z.shape))
        return torch.from_numpy(law.of_normal(flat)).to(z).view(z.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:   # pyright: ignore
        return gradient * ctx.saved_tensors[0], None


def of_normal(law: Marginal, z: Tensor) -> Tensor:
    """Numbers of a law for standard normal numbers `z` of any shape, differentiable."""
    return _OfNormal.apply(z, law)   # pyright: ignore[reportReturnType]


def to_normal(law: Marginal, x: Tensor) -> Tensor:
    """Standard normal numbers for numbers `x` of a law, of any shape; infinite beyond its bounds."""
    return torch.from_numpy(law.to_normal(x.detach().cpu().double().numpy())).to(x)


def log_slope(law: Marginal, x: Tensor) -> Tensor:
    """Logarithm of dz/dx at numbers `x` of a law, of any shape."""
    values = x.detach().cpu().double().numpy()
    with np.errstate(all="ignore"):
        found = law.distribution.logpdf(values) - norm.logpdf(law.to_normal(values))
    return torch.from_numpy(np.asarray(found)).to(x)


def marginals(prior: Any, r: int) -> tuple[Marginal, ...]:
    """The laws of r independent latents: of a SciPy or torch distribution for all, or of a sequence of one for each.

    InputError if there are not as many, or one is of no known kind, discrete, or of latents that depend on each other.
    """
    if isinstance(prior, Marginal) or hasattr(prior, "support") and not isinstance(prior, distributions.Distribution):
        parts = [prior] * r
    elif isinstance(prior, distributions.Distribution):
        parts = _of_torch(prior)
        parts = parts * r if len(parts) == 1 else parts
    elif isinstance(prior, Sequence) and not isinstance(prior, str):
        parts = [part for x in prior for part in (
            _of_torch(x) if isinstance(x, distributions.Distribution) else [x])]
    else:
        raise InputError(f"prior is of type {type(prior).__name__}: give a distribution of SciPy or torch, or a list "
                         "of one for each latent.")
    if len(parts) != r:
        raise InputError(f"prior is of {len(parts)} latents and the pairs hold {r}: give one distribution for all, or "
                         "one for each.")
    made: dict[int, Marginal] = {}
    for i, part in enumerate(parts):
        if id(part) not in made:
            made[id(part)] = part if isinstance(part, Marginal) else Marginal(part, f"the prior of latent {i}")
    return tuple(made[id(part)] for part in parts)


class _Entry:
    """Parameters of one of the numbers of a distribution of torch's."""

    def __init__(self, prior: distributions.Distribution, i: int):
        self._prior, self._i = prior, i

    def __getattr__(self, name: str) -> float:
        values = torch.as_tensor(getattr(self._prior, name)).detach().double().cpu()
        return float(values.expand(self._prior.batch_shape).reshape(-1)[self._i])


def _of_torch(prior: distributions.Distribution) -> list[Any]:
    """SciPy's distributions of each number of one of torch's."""
    while isinstance(prior, distributions.Independent):
        prior = prior.base_dist
    if isinstance(prior, distributions.MultivariateNormal):
        covariance = prior.covariance_matrix
        if not torch.equal(covariance, torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))):
            raise InputError("prior is a normal law of latents that depend on each other: give the pairs with latents "
                             "whitened by its Cholesky factor, and standard_prior=True.")
        prior = distributions.Normal(prior.loc, prior.stddev)
    # Others' distributions, as Pyro's, are subclasses of torch's.
    kind = next((kind for kind in type(prior).__mro__ if kind in _SCIPY), None)
    if kind is None:
        raise InputError(f"prior is torch's {type(prior).__name__}: give the distribution of SciPy, one for each "
                         "latent.")
    return [_SCIPY[kind](_Entry(prior, i)) for i in range(max(1, prior.batch_shape.numel()))]
