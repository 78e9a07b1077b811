r"""Noise that is learnt: the law of readings given the latents, where nothing is known of it but pairs that hold it.

Readings scatter around the emulator's f(z) by a law whose mean and covariance depend on the latents,

.. math:: y = f(z) + W^{-1} \big(m(z) + T(z)^{-1} e\big), \qquad T(z) = e^{D(z)} (1 + O(z)),

with e standard normal, or of a mixture of normal laws,

.. math:: p(e | z) = \sum_i \pi_i(z) N\big(\mu_i(z), (S_i^T S_i)^{-1}\big), \qquad S_i = e^{E_i(z)} (1 + U_i(z)).

W whitens the constant covariance, by its Cholesky factor; D and E are diagonal, O and U strictly lower triangular, and
one network emulates them all: where it is zero the covariance is the constant one. T and S are factors of precisions:
they have inverses whatever the network says, and no system is solved for the density by which it is trained, up to a
constant c,

.. math:: \log p(y | z) = \mathrm{tr} D + \log \sum_i \pi_i e^{\mathrm{tr} E_i - |S_i (e - \mu_i)|^2 / 2} + c.

Of many readings W are principal axes, the widest first, and O has few columns: what the widest say of the others.

Where readings scatter *apart*, each by a law of its own as outliers of single sensors do, mixtures of normal laws for
all of them together would have to be as many as there are ways to combine them. There each reading is one whose W, T
and S are numbers, with a mixture of its own, and densities are products.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.emulator import Emulator
from fem_diffusion.diffusion.tensors import Tensors

__all__ = ["FULL", "LearntNoise", "each", "log_density", "mixed", "numbers", "places", "whitened"]

# Readings up to which O is full, and columns that it has beyond.
FULL, _COLUMNS = 24, 12
# Logarithms of spreads, as of latents where the network means nothing, whose squares are numbers still.
_FAR = 150.0
# Numbers in the matrices that are held at once.
_NUMBERS = 2**23


@dataclass(frozen=True, eq=False, repr=False)
class LearntNoise(Tensors):
    """Scatter of readings around an emulator, as the latents make it; from `fit_noise`.

    Parameters
    ----------
    network : Emulator
        Of m, D and O for k readings; then of the laws that are mixed, if there are several: logarithms of shares, which
        need not sum to one, of all of them, and mu, E and U of each. Of readings apart each number for all k of them.
    whitener : Tensor
        W, shape (k, k), or its diagonal (k,) where readings scatter apart.
    sensors : Tensor
        Numbers of the readings that are at hand, shape (j,), all of them unless some have failed: those of W, and
        behind them those aside.
    aside : Tensor
        Root of the covariance of i readings that say nothing of the latents, shape (i, i); (0, 0) for none.
    """

    network: Emulator
    whitener: Tensor
    sensors: Tensor
    aside: Tensor

    def select(self, sensors: Tensor) -> "LearntNoise":
        """Of some of the readings at hand, by their numbers."""
        return replace(self, sensors=self.sensors[sensors])

    @property
    def apart(self) -> bool:
        """Whether each reading scatters by itself."""
        return self.whitener.dim() == 1

    @cached_property
    def _own(self) -> Tensor:
        """Which of the readings at hand W is of, shape (j,)."""
        return self.sensors < len(self.whitener)

    @cached_property
    def whole(self) -> bool:
        """Whether all readings that W is of are at hand, in their order."""
        return self.sensors[self._own].tolist() == list(range(len(self.whitener)))

    @property
    def components(self) -> int:
        """How many normal laws are mixed, of all readings or of each."""
        return mixed(self.network.config["s"], len(self.whitener), self.apart)

    @property
    def words(self) -> str:
        """What the law is, in words."""
        laws = self.components
        return (f"a mixture of {laws} normal laws" if laws > 1 else "a normal law") + " for each reading" * self.apart

    @property
    def together(self) -> int:
        """How many latents have their matrices held at once."""
        entries = len(self.whitener) if self.apart else len(self.whitener)**2
        return max(1, _NUMBERS // (self.components * entries + len(self.sensors)**2))

    def _one_by_one(self, found: Tensor) -> Tensor:
        """Of what the network finds, (B, q), what is of each of those at hand that W is of, (B, o, n)."""
        return each(found, len(self.whitener))[:, self.sensors[self._own]]

    def _mixture(self, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normal laws of the scatter of those at hand that W is of, for what the network finds, (B, q).

        Logarithms of shares (B, p), means (B, p, o), roots of covariances (B, p, o, k); apart they are of B o readings.
        """
        here, k = self.sensors[self._own], len(self.whitener)
        if self.apart:
            back, k = (1 / self.whitener[here]).repeat(len(found))[:, None, None, None], 1
            found = self._one_by_one(found).flatten(0, 1)
        else:
            back = torch.linalg.inv(self.whitener)[here]
        shared, shares, own = _split(found, k)
        (m, d, low), (mu, e, inner) = (_entries(x, k) for x in (shared, own))
        root = back @ _inverse(d, low)
        mean = (back @ m[..., None])[..., 0] + (root @ mu[..., None])[..., 0]
        if shares.shape[1] > 1:
            root = root @ _inverse(e, inner)
        return shares, mean, root

    def _beside(self, mean: Tensor, size: int) -> Tensor:
        """Means (B, o), or (B o, 1), of those at hand that W is of, with zeros for the others, (B, j), of `size` B."""
        mean = mean.reshape(size, int(self._own.sum()))
        return mean if bool(self._own.all()) else mean.new_zeros(len(mean), len(self.sensors)).index_copy(
            1, torch.where(self._own)[0], mean)

    def _with_aside(self, mean: Tensor, covariance: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Means (B, o) and covariances (B, o, o) of those at hand that W is of, with the others: (B, j) and (B, j, j).

        Apart they are (B o, 1) and (B o, 1, 1); `size` is B.
        """
        if self.apart:
            covariance = torch.diag_embed(covariance.reshape(size, int(self._own.sum())))
        mean = self._beside(mean, size)
        if bool(self._own.all()):
            return mean, covariance
        own, others = torch.where(self._own)[0], torch.where(~self._own)[0]
        found = mean.new_zeros(len(mean), len(self.sensors), len(self.sensors))
        found[:, own[:, None], own] = covariance
        found[:, others[:, None], others] = self._aside @ self._aside.mT
        return mean, found

    @cached_property
    def _aside(self) -> Tensor:
        """Root of the covariance of the others at hand, (l, i)."""
        return self.aside[self.sensors[~self._own] - len(self.whitener)]

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the scatter (B, j) at latents (B, r), and covariance (B, j, j)."""
        shares, means, root = self._mixture(self.network(z))
        weights = shares.exp()[..., None]
        mean = (weights * means).sum(1)
        root = torch.cat([root, (means - mean[:, None])[..., None]], 3) if shares.shape[1] > 1 else root
        return self._with_aside(mean, (weights[..., None] * root @ root.mT).sum(1), len(z))

    def sample(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of the scatter (B, j), one at each of the latents (B, r)."""
        def white(root: Tensor, n: int) -> Tensor:
            normal = torch.randn(n, root.shape[-1], 1, generator=generator, dtype=z.dtype, device=z.device)
            return (root @ normal)[..., 0]
        mean, root = _one(*self._mixture(self.network(z)), generator)
        found = self._beside(mean + white(root, len(root)), len(z))
        if not bool(self._own.all()):
            found[:, ~self._own] = white(self._aside, len(z))
        return found

    def mean_with_pull(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Mean of the scatter (B, j), and the map of covectors (B, j) to their pull-back (B, r)."""
        found, pull = self.network.with_pull(z)
        with torch.enable_grad():
            at = found.detach().requires_grad_()
            shares, means, _ = self._mixture(at)
            mean = self._beside((shares.exp()[..., None] * means).sum(1), len(z))
        return mean.detach(), lambda covector: pull(torch.autograd.grad(mean, at, covector, retain_graph=True)[0])

    def log_density(self, rest: Tensor, z: Tensor) -> Tensor:
        """log p (B,) of readings minus the emulator's, `rest` (B, j), at latents (B, r), up to a constant."""
        return self._log_density(rest, self.network(z))

    def _log_density(self, rest: Tensor, found: Tensor) -> Tensor:
        rest = rest[:, self._own]
        if self.apart:
            return log_density(rest * self.whitener[self.sensors[self._own]], self._one_by_one(found))
        if self.whole:
            return log_density(rest @ self.whitener.mT, found)
        shares, mean, root = self._mixture(found)
        return _log_parts(rest, shares, mean, root @ root.mT).logsumexp(1)

    def with_pull(self, rest: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of `log_density` by the rest, (B, j), and by the latents beside it, (B, r)."""
        found, pull = self.network.with_pull(z)
        with torch.enable_grad():
            at = rest.detach().requires_grad_(), found.detach().requires_grad_()
            by_rest, by_found = torch.autograd.grad(self._log_density(*at).sum(), at)
        return by_rest, pull(by_found)

    def others(self, rest: Tensor, z: Tensor, kept: Tensor, left: Tensor,
               generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normal laws, means (B, l) and covariances (B, l, l), of the scatter of readings `left` given those `kept`.

        `rest` (B, m) is the scatter of those kept, at latents (B, r). One of the laws that are mixed is drawn for each.
        """
        if len(z) > (most := self.together):
            parts = [self.others(a, b, kept, left, generator) for a, b in zip(rest.split(most), z.split(most))]
            return torch.cat([mean for mean, _ in parts]), torch.cat([covariance for _, covariance in parts])
        shares, mean, root = self._mixture(self.network(z))
        S, own = root @ root.mT, self._own[kept]
        log = shares
        if not self.apart:
            place = (self._own.cumsum(0) - 1)[kept[own]]
            log = _log_parts(rest[:, own], shares, mean[..., place], S[..., place, :][..., place])
            log = torch.where(torch.isfinite(log).any(1, keepdim=True), log, shares)
        mean, S = self._with_aside(*_one(log, mean, S, generator), len(z))
        gain = torch.linalg.solve(S[:, kept][..., kept], S[:, kept][..., left]).mT
        return (mean[:, left] + (gain @ (rest - mean[:, kept])[..., None])[..., 0],
                S[:, left][..., left] - gain @ S[:, kept][..., left])


def _inverse(d: Tensor, low: Tensor) -> Tensor:
    """Inverse (..., k, k) of exp(D) (1 + O), of the diagonal (..., k) and O (..., k, k); huge, and finite, far out."""
    identity = torch.eye(low.shape[-1]).to(low)
    unit = torch.linalg.solve_triangular(low, identity.expand_as(low), upper=False, unitriangular=True)
    return unit * torch.exp(-d)[..., None, :]


def _one(log: Tensor, means: Tensor, matrices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of B mixtures one law each, by the logarithms of shares (B, p), up to a constant: its mean and its matrix."""
    drawn = torch.multinomial(log.softmax(1), 1, generator=generator)[:, 0]
    rows = torch.arange(len(log), device=log.device)
    return means[rows, drawn], matrices.expand(-1, means.shape[1], -1, -1)[rows, drawn]


def _log_parts(rest: Tensor, shares: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Logarithms (B, p), up to a constant, of what each normal law adds to the density of `rest` (B, j)."""
    failed = torch.linalg.cholesky_ex(covariance.detach())[1] > 0
    # One that fails must not spoil the derivatives of the others.
    identity = torch.eye(covariance.shape[-1]).to(covariance)
    root = torch.linalg.cholesky(torch.where(failed[..., None, None], identity, covariance))
    white = torch.linalg.solve_triangular(root, (rest[:, None] - mean)[..., None], upper=False)[..., 0]
    found = shares - root.diagonal(dim1=2, dim2=3).log().sum(2) - white.square().sum(2) / 2
    # Far out, where a network means nothing, rounding may leave no covariance.
    return torch.where(failed, -torch.inf, found)


def places(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of O."""
    rows, columns = torch.tril_indices(k, k, -1, device=device)
    if k > FULL:
        rows, columns = rows[columns < _COLUMNS], columns[columns < _COLUMNS]
    return rows, columns


def numbers(k: int, components: int = 1) -> int:
    """How many the network emulates for k readings."""
    one = 2 * k + len(places(k, torch.device("cpu"))[0])
    return one if components == 1 else one + components * (one + 1)


def mixed(size: int, k: int, apart: bool = False) -> int:
    """Of how many normal laws a network emulates so many numbers for k readings."""
    return mixed(size // k, 1) if apart else max(1, (size - numbers(k)) // (numbers(k) + 1))


def each(found: Tensor, k: int) -> Tensor:
    """Of what a network finds of k readings apart, (B, q), what is of each, (B, k, n)."""
    return found.unflatten(1, (-1, k)).mT


def _split(found: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of what a network finds, (B, q): what all laws share (B, 1, n), logarithms of shares (B, p), the rest (B, p, n).
    """
    one, count = numbers(k), mixed(found.shape[1], k)
    if count == 1:
        return found[:, None], found.new_zeros(len(found), 1), found.new_zeros(len(found), 1, one)
    shared, shares, own = found.split([one, count, count * one], 1)
    return shared[:, None], shares.log_softmax(1), own.unflatten(1, (count, one))


def _entries(found: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """m (..., k), the diagonal of D (..., k) and O (..., k, k), of their numbers (..., n)."""
    rows, columns = places(k, found.device)
    low = found.new_zeros(*found.shape[:-1], k, k)
    low[..., rows, columns] = found[..., 2 * k:]
    return found[..., :k], found[..., k:2 * k].clamp(-_FAR, _FAR), low


def whitened(x: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """T (x - m) of x (..., k), and tr D (...), by their numbers (..., n)."""
    m, d, low = _entries(found, x.shape[-1])
    x = x - m
    return torch.exp(d) * (x + (low @ x[..., None])[..., 0]), d.sum(-1)


def log_density(x: Tensor, found: Tensor) -> Tensor:
    """Log density (B,) up to a constant of x = W (y - f), (B, k), for what a network finds, (B, q).

    Of readings apart it is what `each` makes of that, (B, k, n).
    """
    if found.dim() == 3:
        return log_density(x.reshape(-1, 1), found.flatten(0, 1)).view_as(x).sum(1)
    shared, shares, own = _split(found, x.shape[1])
    e, volume = whitened(x[:, None], shared)
    if shares.shape[1] == 1:
        return volume[:, 0] - e[:, 0].square().sum(1) / 2
    white, more = whitened(e, own)
    return volume[:, 0] + (shares + more - white.square().sum(2) / 2).logsumexp(1)
