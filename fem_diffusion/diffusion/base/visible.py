r"""How many modes measurements can tell.

Readings are regressed on the latents by least squares, and what that leaves by a cubic kernel,
:math:`(1 + \sum_j d_j z_j z'_j)^3`, whose weights d come from the derivatives of the regression itself (Radhakrishnan
et al. 2024, doi:10.1126/science.adi5639): latents that matter little neither help nor blur. What held-out pairs show
beside the regression is noise to a measurement.

Where derivatives J of the readings are known, no regression is needed: the eigenvectors of the averaged Gauss-Newton
Hessian :math:`E J^T R^{-1} J`, largest eigenvalues first, are the directions of which the readings tell most, and the
sum of the eigenvalues left out bounds the mean square that these directions change of the readings, in units of the
noise, and twice the mean divergence between the posteriors with and without (Zahm et al. 2022, doi:10.1090/mcom/3737).
"""

import math

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.emulator import regress, roots, spread
from fem_diffusion.diffusion.checks import check_pairs

__all__ = ["informed_turn", "learning_gain", "visible_modes"]

# So much of a measurement's log density, in nats, may be lost; and a margin, because training sees more pairs.
_LOSS, _MARGIN = 0.1, 1.25
# What least squares may leave of a linear problem, as a share of the noise.
_FLAT = 0.01
# Below so many pairs there is nothing to compare.
_FEWEST = 20
# Pairs that are looked at, share of them held out, points of derivatives, rounds of weights, and ridges in units of the
# kernel's mean eigenvalue.
_LOOKED_AT, _HELD_OUT, _POINTS, _ROUNDS, _RIDGES = 2000, 0.2, 200, 3, (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def visible_modes(z: Tensor, y: Tensor, noise_covariance: Tensor | None, known: bool = True) -> int:
    """The fewest leading modes, 1 to r, with which the log density of held-out measurements is as good as with any.

    All modes of a linear problem with `known` laws of latents and noise: more of them are more accurate, and cost
    nothing, because no network is trained there. Takes independent latents (n, r), those of the largest modes first,
    readings (n, k), and the covariance (k, k) of noise that the readings do not hold yet, None where they hold all of
    it. InputError if shapes disagree, a value is not finite, or there is one pair alone.
    """
    check_pairs(z, y)
    if len(z) < _FEWEST:
        return min(z.shape[1], max(1, len(z) // 4))
    z, y = z[:_LOOKED_AT].double().cpu(), y[:_LOOKED_AT].double().cpu()
    unit = spread(y - y.mean(0))
    z, y = (z - z.mean(0)) / spread(z - z.mean(0)), (y - y.mean(0)) / unit
    noise = y.new_zeros(len(unit), len(unit)) if noise_covariance is None else (
        noise_covariance.double().cpu() / unit / unit[:, None])
    weights = torch.ones(z.shape[1], dtype=z.dtype)
    # Where least squares leaves nothing beside the noise, there is no more to learn.
    flat = Regression(z, y, noise, weights, curved=False)
    curved = bool(len(unit) - torch.cholesky_solve(noise, flat.root).trace() > _FLAT)
    if known and not curved:
        return z.shape[1]
    for _ in range(_ROUNDS if curved else 0):
        weights = Regression(z, y, noise, weights).importance().sqrt()
    most = min(z.shape[1], len(z) // 2)
    counts = sorted({min(most, round(2**(i / 3))) for i in range(3 * most.bit_length() + 1)})
    scores = torch.stack([Regression(z[:, :n], y, noise, weights[:n], curved).scores.mean() for n in counts])
    enough = counts[int((scores >= scores.max() - _LOSS).int().argmax())]
    return min(z.shape[1], round(_MARGIN * enough))


def informed_turn(slopes: Tensor, noise_covariance: Tensor) -> Tensor:
    """Orthonormal directions (R, r) of standard normal latents of which readings tell, those of which most come first.

    From derivatives of the readings (n, k, R) and the covariance (k, k) of their noise, positive; r is the fewest.
    """
    whitener = roots(noise_covariance.double().cpu())[0]
    rows = (whitener @ slopes.double().cpu()).flatten(0, 1)
    values, axes = torch.linalg.eigh(rows.T @ rows / len(slopes))
    # Those past a number of directions, for each number from none on.
    left = torch.cat([values.clamp(min=0).cumsum(0).flip(0), values.new_zeros(1)])
    return axes.flip(1)[:, :max(1, int((left <= 2 * _LOSS).int().argmax()))]


def learning_gain(z: Tensor, y: Tensor, noise_covariance: Tensor | None) -> tuple[float, float] | None:
    """Log density of a held-out measurement, in nats, that twice as many pairs would gain; None where they are too few.

    From what a quarter, a half and all of at most 2,000 of them reach, and how fast that grows. Beside it, what a
    regression on these misses of the readings, root mean square in units of the noise: where that is much, and more
    pairs gain little, nothing is learned yet; NaN where the noise is not known. Arguments as for `visible_modes`.
    """
    n = len(z)
    check_pairs(z, y)
    few = min(n, _LOOKED_AT)
    if few < 4 * max(_FEWEST, z.shape[1] + 2):
        return None
    z, y = z[:few].double().cpu(), y[:few].double().cpu()
    unit = spread(y - y.mean(0))
    z, y = (z - z.mean(0)) / spread(z - z.mean(0)), (y - y.mean(0)) / unit
    noise = y.new_zeros(len(unit), len(unit)) if noise_covariance is None else (
        noise_covariance.double().cpu() / unit / unit[:, None])
    weights = torch.ones(z.shape[1], dtype=z.dtype)
    for _ in range(_ROUNDS):
        weights = Regression(z[:few // 2], y[:few // 2], noise, weights).importance().sqrt()
    held_out = round(_HELD_OUT * few)
    reached = []
    for size in (few // 4, few // 2, few):
        rows = torch.arange(held_out + round((1 - _HELD_OUT) * size))
        found = Regression(z[rows], y[rows], noise, weights, held_out=held_out)
        reached.append(float(found.scores.mean()))
    first, second = (max(b - a, 0.0) for a, b in zip(reached, reached[1:]))
    falls = min(1.0, second / first) if first > 0 else 1.0
    missed = (found.left / noise.diagonal()).mean().sqrt() if bool((noise.diagonal() > 0).all()) else torch.nan
    return second * falls**(1 + math.log2(n / few)), float(missed)


class Regression:
    """Least squares and a kernel for what it leaves.

    `scores` holds the log density of each held-out measurement, `left` the mean square (k,) of what is missed of them.
    """

    def __init__(self, z: Tensor, y: Tensor, noise: Tensor, weights: Tensor, curved: bool = True,
                 held_out: int | None = None):
        held_out = round(_HELD_OUT * len(z)) if held_out is None else held_out
        self.weights, self.train = weights / weights.sum().clamp(min=1e-300), z[held_out:]
        fewest = len(self.train) // 2
        # Least squares on as many latents as pairs would fit noise.
        self.matrix = y.new_zeros(y.shape[1], z.shape[1])
        self.matrix[:, :fewest] = regress(self.train[:, :fewest], y[held_out:])[0]
        rest = y - z @ self.matrix.T
        self.scores, self.root = _scores(rest[:held_out], noise)
        self.left = rest[:held_out].square().mean(0)
        self.dual = torch.zeros_like(rest[held_out:])
        if not curved:
            return
        kernel = self._kernel(z)
        values, vectors = torch.linalg.eigh(kernel[held_out:])
        seen, target = kernel[:held_out] @ vectors, vectors.T @ rest[held_out:]
        for ridge in _RIDGES:
            fit = target / (values + ridge * values.mean())[:, None]
            scores, root = _scores(rest[:held_out] - seen @ fit, noise)
            if scores.mean() > self.scores.mean():
                self.scores, self.root, self.dual = scores, root, vectors @ fit
                self.left = (rest[:held_out] - seen @ fit).square().mean(0)

    def __call__(self, z: Tensor) -> Tensor:
        """What it says of measurements at latents (n, r), shape (n, k)."""
        return z @ self.matrix.T + self._kernel(z) @ self.dual

    def _kernel(self, z: Tensor) -> Tensor:
        return (1 + z * self.weights @ self.train.T)**3

    def importance(self) -> Tensor:
        """Mean square of the derivative of the readings by each latent, in units of what is noise to them."""
        at = self.train[:_POINTS]
        slope = 3 * (1 + at * self.weights @ self.train.T)**2
        duals, rows = (torch.linalg.solve_triangular(self.root, x, upper=False) for x in (self.dual.T, self.matrix))
        squares = ((row + slope * dual @ self.train * self.weights).square().mean(0) for dual, row in zip(duals, rows))
        return torch.stack(list(squares)).sum(0)


def _scores(defect: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Log density of each measurement with this defect (n, k), mean over its noise, and root of the covariance."""
    covariance = defect.T @ defect / len(defect) + noise
    # Rounding is nothing to see.
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.diag(1 + covariance.diagonal()))
    white = torch.linalg.solve_triangular(root, defect.T, upper=False).square().sum(0)
    extra = torch.cholesky_solve(noise, root).trace()
    return -(white + extra) / 2 - root.diagonal().log().sum(), root
