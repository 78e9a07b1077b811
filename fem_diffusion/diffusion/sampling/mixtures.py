"""Mixtures of normal laws, one for each measurement: where tempering starts."""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fem_diffusion.diffusion.tensors import Tensors

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

__all__ = ["NormalMixture", "fit_mixture", "normal_laws", "standard_normal", "turned"]

# Numbers of laws that are tried, and the share of a standard normal law beside them.
_TRIED, _BESIDE = (1, 2, 4, 8), 0.1


@dataclass(frozen=True, eq=False, repr=False)
class NormalMixture(Tensors):
    """B mixtures of p normal laws of r numbers; from `standard_normal` or `fit_mixture`.

    Parameters
    ----------
    shares, means, roots : Tensor
        Logarithms of shares (B, p), means (B, p, r), and R (B, p, r, r) with R Rᵀ the precisions.
    """

    shares: Tensor
    means: Tensor
    roots: Tensor

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of each, shape (n, B, r)."""
        which = torch.multinomial(self.shares.exp(), n, replacement=True, generator=generator).T[..., None]
        like = {"generator": generator, "dtype": self.means.dtype, "device": self.means.device}
        white = torch.randn(n, *self.means[:, 0].shape, **like)
        back, drawn = torch.linalg.inv(self.roots), torch.empty_like(white)
        for i in range(self.shares.shape[1]):
            drawn = torch.where(which == i, self.means[:, i] + turned(white, back[:, i]), drawn)
        return drawn

    def _parts(self, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Log density that each law adds at points (n, B, r), (p, n, B), and the points as it whitens them."""
        white = [turned(w - mean, root) for mean, root in zip(self.means.unbind(1), self.roots.unbind(1))]
        return torch.stack([self._heights[:, i] - x.square().sum(2) / 2 for i, x in enumerate(white)]), white

    @cached_property
    def _heights(self) -> Tensor:
        """Log density that each law adds at its mean, (B, p); a root may have any sign on its diagonal."""
        return self.shares + torch.linalg.slogdet(self.roots)[1] - self.means.shape[2] / 2 * math.log(2 * math.pi)

    def energy(self, w: Tensor) -> Tensor:
        """Minus the log density (n, B) at points (n, B, r)."""
        return -self._parts(w)[0].logsumexp(0)

    def force(self, w: Tensor) -> Tensor:
        """Gradient of `energy`, (n, B, r)."""
        logs, white = self._parts(w)
        total = torch.zeros_like(w)
        for weight, x, root in zip(logs.softmax(0), white, self.roots.unbind(1)):
            total += weight[..., None] * turned(x, root.mT)
        return total


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    """Points (n, B, r) times matrices (B, r, r)."""
    return (x.transpose(0, 1) @ matrix).transpose(0, 1)


def standard_normal(like: Tensor) -> NormalMixture:
    """Of one standard normal law each, for `like` (B, r)."""
    size, r = like.shape
    identity = torch.eye(r, dtype=like.dtype, device=like.device)
    return NormalMixture(like.new_zeros(size, 1), like.new_zeros(size, 1, r), identity.expand(size, 1, r, r))


def normal_laws(points: Tensor, count: int, seed: int, **settings: str | float) -> "GaussianMixture":
    """A mixture of so many normal laws, by expectation maximisation for points (n, r) with scikit-learn's settings.

    What becomes of it mends what is missed where the iterations end early, of which nothing is said.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(count, random_state=seed, **settings).fit(points.cpu().numpy())


def fit_mixture(points: Tensor, seed: int) -> NormalMixture:
    """Mixtures fitted to points (n, B, r), of more laws as long as the Bayesian information criterion asks for them.

    A tenth is standard normal, so that no place is left out.
    """
    n, size, r = points.shape
    scale = points.std(0)
    scale = torch.where(scale > 0, scale, 1.0)   # of a coordinate in which no point has moved
    parts = []
    for lane in (points / scale).unbind(1):
        fits, x = [], lane.cpu().numpy()
        for count in _TRIED:
            law = normal_laws(lane, count, seed, tol=1e-2, max_iter=50)
            if fits and law.bic(x) > fits[-1].bic(x):
                break
            fits.append(law)
        best = fits[-1]
        parts.append([torch.as_tensor(x).to(points) for x in (best.weights_, best.means_, best.precisions_cholesky_)])
    most = max(len(shares) for shares, _, _ in parts)
    shares, means = points.new_zeros(size, 1 + most), points.new_zeros(size, 1 + most, r)
    roots = torch.eye(r).to(points).repeat(size, 1 + most, 1, 1)
    shares[:, 0] = _BESIDE
    for i, (share, mean, root) in enumerate(parts):
        here = slice(1, 1 + len(share))
        shares[i, here], means[i, here] = (1 - _BESIDE) * share, mean * scale[i]
        roots[i, here] = root / scale[i][:, None]
    return NormalMixture(shares.log(), means, roots)
