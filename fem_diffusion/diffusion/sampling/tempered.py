r"""Draws of a law that moves alone do not reach: sequential Monte Carlo by adaptive tempering.

Points begin as draws of a mixture q of normal laws and follow

.. math:: \pi_\beta(w) \propto q(w)^{1 - \beta} e^{-\beta E(w)}, \qquad 0 = \beta_0 < \beta_1 < \dots = 1,

to the law exp(-E) (Del Moral, Doucet and Jasra 2006). Each step to the next :math:`\beta` is as long as leaves half of
the points effective; n of them are drawn by their weights and move under the law of that :math:`\beta` (Hamiltonian
moves). So several modes get the points that are due to them, and none is left behind where there is no density. The
product of the mean weights estimates the integral of exp(-E).

What chance does to the shares of modes adds up over the steps. Three things keep it small: the places of all moves have
weights, and not those of the last alone (waste-free, Dau and Chopin 2022, doi:10.1111/rssb.12475); points are drawn in
the order of their principal axis, so that each part of it gets its due (Gerber, Chopin and Whiteley 2019,
doi:10.1214/18-AOS1746); and what is found from a standard normal law is where q of a second run comes from, which takes
few steps.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fem_diffusion.diffusion.sampling.hamiltonian import hamiltonian_move, shorter
from fem_diffusion.diffusion.sampling.mixtures import NormalMixture, turned
from fem_diffusion.errors import SolveError

__all__ = ["tempered"]

# Draws at the start, for each point that is wanted.
_START = 4
# Share of the points that stay effective; halvings of an interval of beta; leaps of a move.
_EFFECTIVE, _HALVINGS, _LEAPS = 0.5, 30, 5
# Moves at each beta, at most; first and longest leap, and acceptance that it is adapted to.
_MOVES, _FIRST, _LONGEST, _ACCEPTED = 4, 0.4, 1.2, 0.75
# Values of beta, at most.
_MOST = 300
_REMEDY = ("simulate more pairs, or, where the measurement is unlike those of the training, take "
           "Sampler(corrections=0), which stays at the base")


def tempered(start: NormalMixture, n: int, energy: Callable[[Tensor], Tensor], force: Callable[[Tensor], Tensor],
             moves: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """Points (n, B, r) of B laws exp(-energy), n of 100 and more, and logarithms (B,) of the laws' integrals.

    Also the number of temperatures that this took. SolveError where no point has a density.

    Parameters
    ----------
    energy, force : Callable[[Tensor], Tensor]
        Negative log densities, (n, B, r) to (n, B), known up to constants and not finite where there is none; their
        gradients, (n, B, r) to (n, B, r).
    moves : int
        At the end, under the laws themselves; no more than these at each temperature.
    """
    pool = start.draw(_START * n, generator)
    integral = torch.zeros_like(start.means[:, 0, 0])
    beta, leap = torch.zeros_like(integral), torch.full_like(integral, _FIRST)
    for step in range(1, _MOST + 1):
        change = start.energy(pool) - energy(pool)
        change = torch.where(torch.isfinite(change), change, -1e300)
        if (change.amax(0) <= -1e300).any():
            raise SolveError(f"The emulator's posterior has no density where the base is: {_REMEDY}.")
        ahead = _ahead(change, 1 - beta)
        weights = torch.softmax(ahead * change, 0)
        integral = integral + torch.logsumexp(ahead * change, 0) - math.log(len(pool))
        place = _resampled(pool, weights, n, generator)
        w = pool.gather(0, place[..., None].expand(-1, -1, pool.shape[2]))
        # Rounding must not leave a rest.
        beta = torch.where(ahead >= 1 - beta, 1.0, beta + ahead)
        done = bool((beta == 1).all())

        def bridge(x: Tensor, beta: Tensor = beta) -> Tensor:
            return (1 - beta) * start.energy(x) + beta * energy(x)

        def slope(x: Tensor, beta: Tensor = beta) -> Tensor:
            return (1 - beta)[:, None] * start.force(x) + beta[:, None] * force(x)
        factor, places = _factor(w), []
        for _ in range(moves if done else min(_MOVES, moves)):
            w, leap = _moved(w, factor, bridge, slope, leap, generator)
            places.append(w)
        if done:
            return w, integral, step
        pool = torch.cat(places)
    raise SolveError(f"The emulator's posterior is not reached in {_MOST} temperatures: {_REMEDY}.")


def _ahead(change: Tensor, most: Tensor) -> Tensor:
    """The steps of beta (B,), up to `most`, that leave enough points effective, for log weights (n, B) of a step of 1.
    """
    def enough(step: Tensor) -> Tensor:
        log = torch.log_softmax(step * change, 0)
        return torch.exp(-torch.logsumexp(2 * log, 0)) >= _EFFECTIVE * len(change)
    low, high, whole = torch.zeros_like(most), most, enough(most)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(whole, most, high)


def _resampled(w: Tensor, weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Numbers (n, B) of points (m, B, r) with weights (m, B), each as often as n times its weight, rounded up or down.
    """
    away = (w - w.mean(0)).transpose(0, 1)
    axis = torch.linalg.eigh(away.mT @ away)[1][:, :, -1:]
    order = (away @ axis)[..., 0].T.argsort(0)
    shift = torch.rand(weights.shape[1], 1, generator=generator, dtype=weights.dtype, device=weights.device)
    places = (torch.arange(n, dtype=weights.dtype, device=weights.device) + shift) / n
    found = torch.searchsorted(weights.gather(0, order).T.cumsum(1).contiguous(), places)
    return order.gather(0, found.clamp(max=len(weights) - 1).T)


def _factor(w: Tensor) -> Tensor:
    """Transposed factors (B, r, r) of covariances of points (n, B, r), with less weight on few points' correlations."""
    n, _, r = w.shape
    away = (w - w.mean(0)).transpose(0, 1)
    covariance = away.mT @ away / n
    diagonal = covariance.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(w.dtype).tiny)
    covariance = (n * covariance + (r + 1e-6 * n) * torch.diag_embed(diagonal)) / (n + r)
    return torch.linalg.cholesky(covariance).mT


def _moved(w: Tensor, factor: Tensor, energy: Callable[[Tensor], Tensor], force: Callable[[Tensor], Tensor],
           leap: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points (n, B, r) after one move each, and the leaps (B,) for the next one.

    They move in coordinates in which they are spread evenly, by `_factor`.
    """
    share = shorter(w, generator)
    length = leap * share * (0.8 + 0.4 * torch.rand(share.shape, generator=generator, dtype=w.dtype, device=w.device))
    back = torch.linalg.solve_triangular(factor.mT, w.permute(1, 2, 0), upper=False).permute(2, 0, 1)
    u, accept = hamiltonian_move(back, lambda u: energy(turned(u, factor)), lambda u: turned(
        force(turned(u, factor)), factor.mT), length[..., None], _LEAPS, generator)
    w = torch.where(accept[..., None], turned(u, factor), w)
    rate = (accept & (share == 1)).sum(0) / (share == 1).sum(0).clamp(min=1)
    return w, (leap * torch.exp(0.5 * (rate - _ACCEPTED))).clamp(max=_LONGEST)
