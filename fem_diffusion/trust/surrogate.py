r"""A cheap map from latents to readings, learned from the solves made so far: what corrections propose with.

Readings in units of their noise, minus what an emulator tells where there is one, are a Gaussian process with one
kernel for all of them (Rasmussen and Williams 2006, sections 2.2, 4.2 and 5.4),

.. math:: K(x, x') = a_1\, x \cdot x' + a_2 (x \cdot x')^2 + a_3 u^{-3/2} + \tau \delta , \qquad u = 1 + |x - x'|^2 / s.

Where the solver has a derivative, that of some readings is known as well (section 9.4 there), along the axes that the
readings tell most of. The coordinates x are the principal axes V of the mean square derivative of the readings,
:math:`E J^T J = V \Lambda V^T` (the active subspace), each divided by its standard deviation under posterior and
temperature T and shrunk where the readings tell little of it,

.. math:: x = (1 + \Lambda / T)^{1/2} \left(\frac{\Lambda / T}{1 + \Lambda / T}\right)^{p} V^T (z - \bar z).

The parameters a, s, τ and p maximise the marginal likelihood of the readings, in which each has a scale of its own,
near usual values, which serve as they are where derivatives are known. Nothing that follows is exact because of this
map, only cheap.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

__all__ = ["Base", "Solves", "Surrogate", "fit_surrogate"]

Pull = Callable[[np.ndarray], np.ndarray]
# Readings (B, k) at latents (B, R), and the map of covectors (B, k) to their pull-back (B, R).
Base = Callable[[np.ndarray], tuple[np.ndarray, Pull]]

# Points that the parameters are fitted to, for each latent and at least and most; steps of that, and what ends it.
_SUBSET, _STEPS, _CLOSE = (12, 100, 600), 40, 1e-5
# Points and probes of the mean square derivative, and numbers of derivatives that take part.
_POINTS, _PROBES, _SLOPES = 300, 4, 2500
# Bounds of log a, log s, log τ and log p; width of their prior; a share of the kernel's diagonal against rounding.
_BOUNDS = [(-12.0, 12.0)] * 4 + [(-18.0, 3.0), (-4.0, 1.0)]
_WIDTH, _ROUNDING, _USUAL = 1.5, 1e-9, -1.4
_RIDGES = 10.0**np.arange(-3, 4)


@dataclass(frozen=True, eq=False)
class Solves:
    """What the forward problem has told, the most relevant first.

    Parameters
    ----------
    z, readings : numpy.ndarray
        Latents (n, R) and readings (n, k).
    places, slopes : numpy.ndarray
        Latents (m, R) where the derivative is known, and derivatives (m, k, R).
    """

    z: np.ndarray
    readings: np.ndarray
    places: np.ndarray
    slopes: np.ndarray


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Readings as a function of all R latents; from `fit_surrogate`.

    Parameters
    ----------
    base : Base or None
        What is known beforehand.
    centre, axes : numpy.ndarray
        Of the coordinates, z̄ (R,) and V (R, R), columns.
    importance : numpy.ndarray
        Λ / T of the axes, shape (R,), largest first.
    parameters : numpy.ndarray
        Logarithms of a₁, a₂, a₃, s, τ and p, shape (6,).
    points, weights : numpy.ndarray
        Coordinates (n, R) of the solves, and the kernel's weights there (n, k), in units of the noise.
    places, slopes : numpy.ndarray
        The same for derivatives, (m, R) and (m, q, k), along the first q axes.
    mean, units : numpy.ndarray
        Mean of what is regressed, in units of the noise, and these units: shape (k,) each.
    """

    base: Base | None
    centre: np.ndarray
    axes: np.ndarray
    importance: np.ndarray
    parameters: np.ndarray
    points: np.ndarray
    weights: np.ndarray
    places: np.ndarray
    slopes: np.ndarray
    mean: np.ndarray
    units: np.ndarray

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Readings (B, k) at latents (B, R)."""
        return self.with_pull(z)[0]

    def with_pull(self, z: np.ndarray) -> tuple[np.ndarray, Pull]:
        """Readings (B, k) at latents (B, R), and the map of covectors (B, k) to their pull-back (B, R)."""
        a1, a2, a3, square = np.exp(self.parameters[:4])
        scale = _scales(self.importance, np.exp(self.parameters[5]))
        x = (z - self.centre) @ self.axes * scale
        dot = x @ self.points.T
        # Powers and new arrays cost more than the products.
        near = _squares(x, self.points, dot)
        near /= square
        near += 1
        np.reciprocal(near, out=near)
        bump = np.sqrt(near)
        bump *= near
        bump *= a3
        found = (dot * (a1 + a2 * dot) + bump) @ self.weights + self.mean
        m, q, k = self.slopes.shape
        along = x[:, :q] @ self.slopes.transpose(1, 0, 2).reshape(q, m * k)
        constant = (self.places[:, :q, None] * self.slopes).sum(axis=1)
        inner = x @ self.places.T
        linear, radial, bent = _slope(self.parameters, inner, _squares(x, self.places, inner))
        found = found + ((linear - radial)[:, :, None] * along.reshape(len(x), m, k)).sum(axis=1) + radial @ constant
        known, pull_known = (0.0, None) if self.base is None else self.base(z)

        def pull(covector: np.ndarray) -> np.ndarray:
            white = covector * self.units
            pulled = white @ self.weights.T
            inward = bump * near
            inward *= -3 / square
            inward *= pulled
            outward = 2 * a2 * dot
            outward += a1
            outward *= pulled
            outward -= inward
            back = outward @ self.points + inward.sum(1)[:, None] * x
            if m:
                weight = (white @ self.slopes.transpose(2, 0, 1).reshape(k, m * q)).reshape(len(x), m, q)
                size = (weight @ x[:, :q, None])[:, :, 0]
                turn = (white @ constant.T - size) * bent
                back += (2 * a2 * size - turn) @ self.places + turn.sum(1)[:, None] * x
                back[:, :q] += ((linear - radial)[:, None] @ weight)[:, 0]
            back = back * scale @ self.axes.T
            return back if pull_known is None else back + pull_known(covector)
        return found * self.units + known, pull

    def derivative(self, z: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Mean over latents (n, R) of JᵀJ, shape (R, R), of readings in units of the noise, by random covectors."""
        pull, total = self.with_pull(z)[1], np.zeros((z.shape[1], z.shape[1]))
        for _ in range(_PROBES):
            back = pull(rng.choice([-1.0, 1.0], (len(z), len(self.units))) / self.units)
            total += back.T @ back / (len(z) * _PROBES)
        return total


def fit_surrogate(solves: Solves, units: np.ndarray, base: Base | None, temper: float = 1.0,
                  former: Surrogate | None = None, seed: int = 0, anew: bool = True) -> Surrogate:
    """Regress readings, of noise `units` (k,), on latents, at posterior temperature T >= 1.

    A former surrogate of the same problem says where the axes are, unless derivatives do, and where the search for
    parameters begins, or, where it is not made `anew`, what they are.
    """
    rng, z = np.random.default_rng(seed), solves.z
    rest = solves.readings if base is None else solves.readings - base(z)[0]
    rest = rest / units
    mean, centre = rest.mean(axis=0), z[:_POINTS].mean(axis=0)
    true = solves.slopes / units[:, None]
    if len(true):
        derivative = np.einsum("mkr,mks->rs", true, true) / len(true)
    elif former is not None:
        derivative = former.derivative(z[:_POINTS], rng)
    else:
        whole = solves.readings / units
        derivative = _linear(z - centre, whole - whole.mean(axis=0))
    found = former
    for last in (False, True) if former is None and not len(true) else (True,):
        importance, axes = np.linalg.eigh(derivative)
        importance, axes = np.maximum(importance[::-1], 0) / temper, axes[:, ::-1]
        each, least, most = _SUBSET
        chosen = slice(min(max(least, each * len(axes)), most))
        parameters = None if found is None else found.parameters
        if len(true):
            parameters = _usual((z - centre)[chosen] @ axes, importance)
        elif parameters is None or anew:
            parameters = _likeliest((z - centre)[chosen] @ axes, importance, (rest - mean)[chosen], parameters)
        scale = _scales(importance, np.exp(parameters[5]))
        q = min(len(axes), _SLOPES // max(len(true), 1))
        slopes = (_beside(base, solves.places, solves.slopes) / units[:, None]) @ axes[:, :q] / scale[:q]
        x, places = (z - centre) @ axes * scale, (solves.places - centre) @ axes * scale
        root = cho_factor(_covariance(parameters, x, places, q), lower=True, overwrite_a=True)
        weights = cho_solve(root, np.vstack([rest - mean, slopes.transpose(0, 2, 1).reshape(-1, len(units))]))
        found = Surrogate(base, centre, axes, importance, parameters, x, weights[:len(z)], places,
                          weights[len(z):].reshape(len(places), q, len(units)), mean, units)
        if not last:
            derivative = found.derivative(z[:_POINTS], rng)
    assert found is not None
    return found


def _beside(base: Base | None, z: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """Derivatives (m, k, R) at latents (m, R) minus those of the base."""
    if base is None or not len(z):
        return slopes
    pull = base(z)[1]
    return slopes - np.stack([pull(np.tile(row, (len(z), 1))) for row in np.eye(slopes.shape[1])], axis=1)


def _scales(importance: np.ndarray, power: float) -> np.ndarray:
    """What coordinates along the axes are multiplied by, shape (R,)."""
    return np.sqrt(1 + importance) * np.maximum(importance / (1 + importance), 1e-8)**power


def _squares(x: np.ndarray, y: np.ndarray, dot: np.ndarray) -> np.ndarray:
    """Squared distances (B, n) of points (B, R) and (n, R) with these products."""
    found = -2 * dot
    found += (x**2).sum(axis=1)[:, None]
    found += (y**2).sum(axis=1)
    return np.maximum(found, 0, out=found)


def _slope(parameters: np.ndarray, dot: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors g, h and h' with which dK/dx' is g x + h (x' - x), and dh/dx is h' (x - x')."""
    a1, a2, a3, square = np.exp(parameters[:4])
    apart = 1 + squares / square
    return a1 + 2 * a2 * dot, -3 * a3 / square * apart**-2.5, 15 * a3 / square**2 * apart**-3.5


def _covariance(parameters: np.ndarray, x: np.ndarray, places: np.ndarray, q: int) -> np.ndarray:
    """Of readings at points (n, R), and of their derivatives along the first q axes at places (m, R)."""
    (n, m), values = (len(x), len(places)), torch.from_numpy(parameters)
    whole = np.empty((n + m * q, n + m * q))
    whole[:n, :n] = _kernel(torch.from_numpy(x), values).numpy()
    dot = x @ places.T
    linear, radial, _ = _slope(parameters, dot, _squares(x, places, dot))
    cross = (linear - radial)[:, :, None] * x[:, None, :q] + radial[:, :, None] * places[None, :, :q]
    whole[:n, n:] = cross.reshape(n, m * q)
    whole[n:, :n] = whole[:n, n:].T
    dot = places @ places.T
    linear, radial, bent = _slope(parameters, dot, _squares(places, places, dot))
    head, twice = places[:, :q], 2 * np.exp(parameters[1])
    for i in range(m):
        apart = head[i] - head
        block = (linear[i] - radial[i])[:, None, None] * np.eye(q)
        block = block + twice * head[:, :, None] * head[i] - bent[i][:, None, None] * apart[:, :, None] * apart[:, None]
        whole[n + i * q:n + (i + 1) * q, n:] = block.transpose(1, 0, 2).reshape(q, m * q)
    whole[np.arange(n, len(whole)), np.arange(n, len(whole))] += np.exp(parameters[4])
    return whole


def _kernel(x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Kernel matrix of points (n, R), with noise."""
    a1, a2, a3, square, noise = parameters[:5].exp()
    dot = x @ x.T
    size = dot.diagonal()
    apart = (size[:, None] + size - 2 * dot).clamp(min=0) / square
    kernel = a1 * dot + a2 * dot**2 + a3 * (1 + apart)**-1.5
    return kernel + (noise + _ROUNDING * kernel.diagonal().mean()) * torch.eye(len(x), dtype=x.dtype)


def _usual(z: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Parameters (6,) of smooth responses, for coordinates z (n, R) along the axes."""
    size = float(((z * _scales(importance, np.exp(_USUAL)))**2).sum(axis=1).mean())
    return np.array([0.0, np.log(0.3 / size), 1.0, np.log(3 * size), np.log(1e-5), _USUAL])


def _likeliest(z: np.ndarray, importance: np.ndarray, rest: np.ndarray, former: np.ndarray | None) -> np.ndarray:
    """Parameters (6,) of largest marginal likelihood for coordinates z (n, R) along the axes, and responses (n, k).

    The likelihood has several maxima: the search begins where smooth responses have it, and at former parameters.
    """
    along, target, weight = (torch.from_numpy(np.ascontiguousarray(part)) for part in (z, rest, importance))
    usual = _usual(z, importance)
    n, expected = len(z), torch.from_numpy(usual)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.tensor(values, requires_grad=True)
        scale = torch.sqrt(1 + weight) * (weight / (1 + weight)).clamp(min=1e-8)**parameters[5].exp()
        root = torch.linalg.cholesky(_kernel(along * scale, parameters))
        white = torch.linalg.solve_triangular(root, target, upper=False)
        found = root.diagonal().log().sum() + n / 2 * (white.square().mean(0) + 1e-300).log().mean()
        found = found + ((parameters - expected) / _WIDTH).square().sum() / 2
        found.backward()
        assert parameters.grad is not None
        return float(found.detach()), parameters.grad.numpy()
    results = []
    for start in [usual] if former is None else [usual, former]:
        # torch.linalg raises a RuntimeError of its own where a kernel is singular.
        with contextlib.suppress(RuntimeError):
            results.append(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=_BOUNDS,
                                    options={"maxiter": _STEPS, "ftol": _CLOSE}))
    return min(results, key=lambda result: result.fun).x if results else usual


def _linear(z: np.ndarray, target: np.ndarray) -> np.ndarray:
    """JᵀJ (R, R) of a ridge regression of centred responses (n, k) on centred latents (n, R), by left-out errors."""
    spread = np.maximum(z.std(axis=0), 1e-300)
    left, sizes, right = np.linalg.svd(z / spread, full_matrices=False)
    projected, best, slope = left.T @ target, np.inf, np.zeros((z.shape[1], target.shape[1]))
    for ridge in _RIDGES:
        shrink = sizes**2 / (sizes**2 + ridge)
        leverage = (left**2 * shrink).sum(axis=1)
        error = (target - left * shrink @ projected) / np.maximum(1 - leverage, 1e-3)[:, None]
        score = np.log((error**2).mean(axis=0) + 1e-300).sum()
        if score < best:
            best, slope = score, right.T * (sizes / (sizes**2 + ridge)) @ projected / spread[:, None]
    return slope @ slope.T
