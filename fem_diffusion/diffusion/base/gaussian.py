r"""The Gaussian base: for every measurement a Gaussian :math:`N(\mu, P)`, the forward map linearised where it lies.

A law N(z̄, C) of the latents, an emulator f of what can be seen of them, and sensors :math:`y = b + B c + e` of its
coordinates c make up the base. One fixed set of sensors is the layout in which the coordinates are the noise-free
readings themselves, B = I and b = 0. The Gaussian is found by iterated posterior linearisation (Garcia-Fernandez et al.
2015, doi:10.1109/TSP.2015.2454485). Given a guess N(μ, L Lᵀ), the best affine fit to f over that guess is

.. math:: f(\mu + L\xi) \approx \bar c + A \xi, \qquad \bar c = E f, \quad A = E f \xi^T, \quad
          \Omega = E (f - \bar c - A\xi)(f - \bar c - A\xi)^T,

and the Kalman update of N(z̄, C) with that affine map and the noise R + B (Σ + Ω) Bᵀ is the next guess; R is the noise
of the sensors, Σ what the emulator leaves, with noise that the readings hold already; where that is learnt as a
function of the latents, the mean given them takes part in f, and their mean covariance in Ω. The first guess is
N(z̄, C): one update gives the joint Gaussian of latents and measurement, which is the exact posterior where f is affine
and the latents are Gaussian. Expectations are means over fixed points with the first three moments of a standard
normal. Everything is batched over measurements; under an affine map all measurements by one layout share one factor.

The diffusion runs in base coordinates :math:`w = P^{-1/2}(z - \mu)`, where the prior noise is aligned with the
posterior. Where the base is the truth, w is standard normal for every measurement and the network has nothing to learn.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.emulator import Emulator, roots
from fem_diffusion.diffusion.base.law import NoiseLaw
from fem_diffusion.diffusion.base.layouts import FLOOR, Layout
from fem_diffusion.diffusion.base.learnt import LearntNoise
from fem_diffusion.diffusion.tensors import Tensors
from fem_diffusion.errors import SolveError

__all__ = ["UPDATES", "GaussianBase", "Located", "apply", "cholesky", "solve_lower"]

UPDATES = 6
# Below so many latents points lie on two shells; there are at least so many points.
_FEW, _FEWEST_POINTS = 16, 48
# Measurements whose points are emulated at once.
_TOGETHER = 256


@dataclass(frozen=True, eq=False, repr=False)
class Located(Tensors):
    """Gaussians N(mean, P) of B measurements, with P⁻¹ = M Mᵀ, and what the sensors see there.

    A leading size of 1 in place of B says that all measurements share the tensor.

    Parameters
    ----------
    mean, factor, whitener : Tensor
        Shape (B, r); M⁻ᵀ, upper triangular, shape (B, r, r), so that z = mean + factor w; Mᵀ.
    sensitivity, misfit : Tensor
        Derivative of the readings by w, shape (B, k, r), and readings minus what is expected at the mean, shape (B, k),
        in units of the readings' noise.
    """

    mean: Tensor
    factor: Tensor
    whitener: Tensor
    sensitivity: Tensor
    misfit: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation of each latent, shape (B, r)."""
        return self.factor.square().sum(2).sqrt()

    @property
    def covariance(self) -> Tensor:
        """P, shape (B, r, r)."""
        return self.factor @ self.factor.mT

    @property
    def log_determinant(self) -> Tensor:
        """Logarithm of ``|P^(1/2)|``, shape (B,)."""
        return -torch.diagonal(self.whitener, dim1=1, dim2=2).log().sum(1)

    def whiten(self, z: Tensor) -> Tensor:
        """Base coordinates w (..., B, r) of latents (..., B, r)."""
        return apply(self.whitener, z - self.mean)

    def colour(self, w: Tensor) -> Tensor:
        """Latents (..., B, r) of base coordinates (..., B, r)."""
        return self.mean + apply(self.factor, w)


@dataclass(frozen=True, eq=False, repr=False)
class GaussianBase(Tensors):
    """Law of the latents and emulator: gives a Gaussian for every measurement by any sensors.

    Parameters
    ----------
    mean, factor : Tensor
        Of the latents, shape (r,), and upper triangular F with F Fᵀ = C, their covariance, shape (r, r).
    emulator : Emulator
        Of the coordinates that sensors see.
    updates : int
        Kalman updates: 1 stops at the joint Gaussian of latents and measurement, more follow the posterior.
    law : NoiseLaw or None
        Of noise that is not in the emulator's residual, because no covariance holds it.
    learnt : LearntNoise or None
        What takes the place of the residual in fixed sensors' readings where it depends on the latents.
    told : Tensor or None
        Numbers (j,) of the readings that say something of the latents; None where all do.
    """

    mean: Tensor
    factor: Tensor
    emulator: Emulator
    updates: int = 1
    law: NoiseLaw | None = None
    learnt: LearntNoise | None = None
    told: Tensor | None = None

    @property
    def r(self) -> int:
        """Number of latents."""
        return len(self.mean)

    @property
    def k(self) -> int:
        """Number of coordinates that sensors see: of the readings, where the sensors are fixed."""
        return len(self.emulator.offset)

    @property
    def used(self) -> Tensor:
        """Numbers of the readings that say something of the latents."""
        return torch.arange(self.k, device=self.mean.device) if self.told is None else self.told

    @cached_property
    def narrow(self) -> "GaussianBase":
        """Of these readings alone."""
        return self if self.told is None else replace(
            self, emulator=self.emulator.select(self.told), learnt=self.learnt and self.learnt.select(self.told),
            told=None)

    @property
    def affine(self) -> bool:
        """Whether readings are affine in the latents, with a noise that does not depend on them."""
        return self.emulator.affine and self.learnt is None

    @property
    def bent(self) -> bool:
        """Whether noise depends on latents or has outliers, so that posteriors may be such as moves do not reach."""
        return self.law is not None or self.learnt is not None

    @property
    def scatter(self) -> Tensor:
        """Covariance (k, k) of noise, averaged over the training, and emulator error."""
        return self.emulator.residual if self.law is None else self.emulator.residual + self.law.covariance

    @cached_property
    def precision(self) -> Tensor:
        """C⁻¹, shape (r, r)."""
        return self._inverse.T @ self._inverse

    @cached_property
    def _inverse(self) -> Tensor:
        """F⁻¹, shape (r, r)."""
        return torch.linalg.solve_triangular(self.factor, torch.eye(self.r).to(self.factor), upper=True)

    @cached_property
    def _seen(self) -> tuple[Tensor, Tensor]:
        """Mean (k,) of the readings themselves, B = I, and the symmetric W (k, k) that whitens them under the prior."""
        signal = self.emulator.matrix @ self.factor
        covariance = signal @ signal.T + self.scatter + torch.diag(FLOOR * signal.square().sum(1))
        return self.emulator.offset + self.emulator.matrix @ self.mean, roots(covariance)[0]

    def features(self, y: Tensor) -> Tensor:
        """Measurements `y` (B, k) by fixed sensors, centred and whitened under the prior, shape (B, k)."""
        mean, whitener = self._seen
        return (y - mean) @ whitener.T

    def noise(self, layout: Layout) -> Tensor:
        """Covariance of sensor noise and emulator error, R + B Σ Bᵀ, shape (B, k, k), positive.

        What is of a `law`, or `learnt`, is not in it.
        """
        covariance = torch.diag_embed(layout.variance)
        if self.learnt is None:
            covariance = covariance + layout.rows @ self.emulator.residual @ layout.rows.mT
        # A reading without noise would leave no density: it gets a millionth of its prior standard deviation.
        signal = (layout.rows @ (self.emulator.matrix @ self.factor)).square().sum(2)
        return covariance + torch.diag_embed(FLOOR * signal)

    def locate(self, layout: Layout, y: Tensor) -> Located:
        """Gaussians at measurements `y` (B, k), by B layouts or one; SolveError if a covariance is not positive."""
        most = _TOGETHER
        if self.learnt is not None:
            most = min(most, max(1, self.learnt.together // len(_points(self.r, y))))
        if not (self.affine and self.law is None) and len(y) > most:
            indices = torch.arange(len(y), device=y.device).split(most)
            parts = [vars(self.locate(layout.select(index), y[index])).values() for index in indices]
            return Located(*(x[0] if len(x[0]) == 1 else torch.cat(x) for x in zip(*parts)))   # shared by all, or apart
        return self.update(layout, y, self.noise(layout)) if self.law is None else self.law.locate(self, layout, y)

    def update(self, layout: Layout, y: Tensor, noise: Tensor, more: tuple[Tensor, Tensor, Tensor] | None = None,
               start: Located | None = None) -> Located:
        """As `locate`, for noise of this covariance (B, k, k), and readings of the latents that are known beside.

        `more` are their rows (l, r), values (B, l) and variances (B, l). Where the base follows the posterior, one
        update goes on from a `start`.
        """
        affine, identity = self.affine, torch.eye(self.r, dtype=y.dtype, device=y.device)
        prior_mean = mean = self.mean[None]
        factor, points = self.factor[None], y.new_empty(0, self.r) if affine else _points(self.r, y)
        follows = start is not None and self.updates > 1
        if start is not None and follows:
            mean, factor = start.mean, start.factor
        for _ in range(1 if affine or follows else self.updates):
            if affine:
                G, expected, rest = layout.rows @ self.emulator.matrix, layout.read(self.emulator(mean)), noise
            else:
                G, expected, spread = self._fit(layout.rows, mean, factor, points)
                expected, rest = layout.offset + expected, noise + spread
            root, away = cholesky(rest), y - expected + apply(G, mean - prior_mean)
            target, white = solve_lower(root, away), torch.linalg.solve_triangular(root, G, upper=False)
            if more is not None:
                rows, values, variance = more
                spread = variance.sqrt()
                beside = rows / spread[:, :, None]
                white = torch.cat([white.expand(len(beside), -1, -1), beside], 1)
                target = torch.cat([target, (values - prior_mean @ rows.T) / spread], 1)
            if len(white) == 1:
                # Orthogonal: readings without noise do not blur what they do not see.
                Q, M = torch.linalg.qr(torch.cat([self._inverse[None], white], 1))
                sign = torch.diagonal(M, dim1=1, dim2=2).sign()
                M, pulled = (sign[:, :, None] * M).mT, sign * apply(Q[:, self.r:].mT, target)
                factor = torch.linalg.solve_triangular(M.mT, identity[None], upper=True)
            else:
                M = cholesky(self.precision + white.mT @ white)
                factor = torch.linalg.solve_triangular(M.mT, identity.expand_as(M), upper=True)
                pulled = apply(factor.mT, apply(white.mT, target))
            mean = prior_mean + apply(factor, pulled)
        scale = torch.diagonal(noise if self.learnt is None else rest, dim1=1, dim2=2).sqrt()
        misfit = torch.where(layout.present, y - layout.read(self.emulated(mean)[0]), 0.0)
        return Located(mean, factor, M.mT, G @ factor / scale[:, :, None], misfit / scale)

    def standardised(self, located: Located) -> Located:
        """The same Gaussians of latents in units of their prior spread: base coordinates stay, latents lose units."""
        std = self.factor.square().sum(1).sqrt()
        return replace(located, mean=(located.mean - self.mean) / std, factor=located.factor / std[:, None],
                       whitener=located.whitener * std)

    def _fit(self, rows: Tensor, mean: Tensor, factor: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of readings over N(mean, factor factorᵀ): slope by z (B, k, r), mean (B, k), covariance of the rest."""
        z = mean[:, None] + points @ factor.mT
        c, scatter = (x.unflatten(0, z.shape[:2]) for x in self.emulated(z.flatten(0, 1)))
        readings = rows @ c.mT
        expected = readings.mean(2)
        slope = (readings - expected[:, :, None]) @ points / len(points)
        rest = readings - expected[:, :, None] - slope @ points.T
        # slope belongs to ξ = factor⁻¹ (z - mean).
        slope = torch.linalg.solve_triangular(factor, slope, upper=True, left=False)
        return slope, expected, rest @ rest.mT / len(points) + scatter.mean(1)

    def emulated(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, k) of coordinates given latents (B, r), and covariance (B, k, k) as far as it is learnt."""
        if self.learnt is None:
            return self.emulator(z), z.new_zeros(len(z), 1, 1)
        shift, covariance = self.learnt.moments(z)
        return self.emulator(z) + shift, covariance


def cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factors (B, n, n), each row in its own units; SolveError where a matrix is not positive."""
    unit = torch.diagonal(matrix, dim1=-2, dim2=-1).sqrt()
    root, info = torch.linalg.cholesky_ex(matrix / unit[..., None] / unit[..., None, :])
    if info.any() or not torch.isfinite(unit).all():
        raise SolveError("The base of a layout has no positive covariance: the emulator grows without bound between "
                         "the training latents. Simulate more pairs, or keep fewer modes.")
    return root * unit[..., None]


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Products (..., B, m) of matrices (B, m, n), or of one for all, with vectors (..., B, n)."""
    return x @ matrix[0].mT if len(matrix) == 1 else torch.einsum("bij,...bj->...bi", matrix, x)


def solve_lower(root: Tensor, x: Tensor) -> Tensor:
    """Solutions (B, k) for right-hand sides (B, k) of lower triangular matrices (B, k, k), or of one for all."""
    if len(root) == 1:
        return torch.linalg.solve_triangular(root[0], x.mT, upper=False).mT
    return torch.linalg.solve_triangular(root, x.unsqueeze(2), upper=False).squeeze(2)


def _points(r: int, like: Tensor) -> Tensor:
    """Points (n, r) with the mean, covariance and third moments of a standard normal, in general position."""
    # Two shells in several rotations come near the fourth moments as well, on which depends what counts as not affine.
    # For many latents a normal law is near one shell itself.
    generator = torch.Generator().manual_seed(0)
    apart = 0.0 if r >= _FEW else min(1.0, (2 / r)**0.5)
    shells = [(r * (1 + sign * apart))**0.5 for sign in ((1, -1) if apart else (0,))]
    points = []
    while 2 * len(shells) * r * len(points) < _FEWEST_POINTS or not points:
        rotation = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
        points.append(torch.cat([radius * side for radius in shells for side in (rotation, -rotation)]))
    return torch.cat(points).to(like)
