r"""A cheap map from latents to readings, learned from the solves made so far: what corrections propose with.

Readings in units of their noise, minus what an emulator tells where there is one, are a Gaussian process with one
kernel for all of them (Rasmussen and Williams 2006, sections 2.2, 4.2 and 5.4),

.. math:: K(x, x') = a_1\, x \cdot x' + a_2 (x \cdot x')^2 + a_3 (1 + |x - x'|^2 / l^2)^{-3/2} + \tau \delta .

The coordinates x are the principal axes V of the mean square derivative of the readings, :math:`E J^T J = V \Lambda
V^T` (the active subspace), each divided by its standard deviation under posterior and temperature T and shrunk where
the readings tell little of it,

.. math:: x = (1 + \Lambda / T)^{1/2} \left(\frac{\Lambda / T}{1 + \Lambda / T}\right)^{p} V^T (z - \bar z).

The parameters a, l, τ and p maximise the marginal likelihood, in which each reading has a scale of its own. Nothing
that follows is exact because of this map, only cheap.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

__all__ = ["Base", "Surrogate", "fit_surrogate"]

Pull = Callable[[np.ndarray], np.ndarray]
# Readings (B, k) at latents (B, R), and the map of covectors (B, k) to their pull-back (B, R).
Base = Callable[[np.ndarray], tuple[np.ndarray, Pull]]

# Points that the parameters are fitted to, for each latent and at least and most; steps of that, and what ends it.
_SUBSET, _STEPS, _CLOSE = (12, 100, 600), 40, 1e-5
# Points and probes of the mean square derivative.
_POINTS, _PROBES = 300, 4
# Bounds of log a, log l², log τ and log p; width of their prior; a share of the kernel's diagonal against rounding.
_BOUNDS = [(-12.0, 12.0)] * 4 + [(-18.0, 3.0), (-4.0, 1.0)]
_WIDTH, _ROUNDING, _USUAL = 3.0, 1e-9, -2.0
_RIDGES = 10.0**np.arange(-3, 4)


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
        Λ / T of the axes, shape (R,).
    parameters : numpy.ndarray
        Logarithms of a₁, a₂, a₃, l², τ and p, shape (6,).
    points, weights : numpy.ndarray
        Coordinates (n, R) of the solves, and the kernel's weights there (n, k), in units of the noise.
    mean, units : numpy.ndarray
        Mean of what is regressed, in units of the noise, and these units: shape (k,) each.
    left_out : numpy.ndarray
        What each solve misses of its readings where it is left out of the regression, shape (n, k).
    """

    base: Base | None
    centre: np.ndarray
    axes: np.ndarray
    importance: np.ndarray
    parameters: np.ndarray
    points: np.ndarray
    weights: np.ndarray
    mean: np.ndarray
    units: np.ndarray
    left_out: np.ndarray

    @property
    def _scale(self) -> np.ndarray:
        return _scales(self.importance, np.exp(self.parameters[5]))

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Readings (B, k) at latents (B, R)."""
        return self.with_pull(z)[0]

    def with_pull(self, z: np.ndarray) -> tuple[np.ndarray, Pull]:
        """Readings (B, k) at latents (B, R), and the map of covectors (B, k) to their pull-back (B, R)."""
        a1, a2, a3, square = np.exp(self.parameters[:4])
        scale = self._scale
        x = (z - self.centre) @ self.axes * scale
        dot = x @ self.points.T
        apart = 1 + np.maximum((x**2).sum(1)[:, None] + (self.points**2).sum(1) - 2 * dot, 0) / square
        bump = a3 * apart**-1.5
        found = (dot * (a1 + a2 * dot) + bump) @ self.weights + self.mean
        known, pull_known = (0.0, None) if self.base is None else self.base(z)

        def pull(covector: np.ndarray) -> np.ndarray:
            pulled = (covector * self.units) @ self.weights.T
            radial = -3 / square * bump / apart * pulled
            back = ((a1 + 2 * a2 * dot) * pulled - radial) @ self.points + radial.sum(1)[:, None] * x
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


def fit_surrogate(z: np.ndarray, readings: np.ndarray, units: np.ndarray, base: Base | None, temper: float = 1.0,
                  former: Surrogate | None = None, seed: int = 0, anew: bool = True) -> Surrogate:
    """Regress readings (n, k), of noise `units` (k,), on latents (n, R), at posterior temperature T >= 1.

    The first ones matter most: axes and parameters are made for them.
    A former surrogate of the same problem says where the axes are and where the search for parameters begins, or,
    where it is not made `anew`, what they are.
    """
    rng = np.random.default_rng(seed)
    rest = readings if base is None else readings - base(z)[0]
    rest = rest / units
    mean, centre = rest.mean(axis=0), z[:_POINTS].mean(axis=0)
    looks = slice(_POINTS)
    if former is not None:
        derivative = former.derivative(z[looks], rng)
    else:
        whole = readings / units
        derivative = _linear(z - centre, whole - whole.mean(axis=0))
    found = former
    for _ in range(2 if former is None else 1):
        importance, axes = np.linalg.eigh(derivative)
        importance = np.maximum(importance, 0) / temper
        each, least, most = _SUBSET
        chosen = slice(min(max(least, each * len(axes)), most))
        parameters = None if found is None else found.parameters
        if parameters is None or anew:
            parameters = _likeliest((z - centre)[chosen] @ axes, importance, (rest - mean)[chosen], parameters)
        x = (z - centre) @ axes * _scales(importance, np.exp(parameters[5]))
        kernel = _kernel(torch.from_numpy(x), torch.from_numpy(parameters)).numpy()
        root = cho_factor(kernel, lower=True)
        weights, inverse = cho_solve(root, rest - mean), cho_solve(root, np.eye(len(z)))
        found = Surrogate(base, centre, axes, importance, parameters, x, weights, mean, units,
                          weights / inverse.diagonal()[:, None] * units)
        derivative = found.derivative(z[looks], rng)
    assert found is not None
    return found


def _scales(importance: np.ndarray, power: float) -> np.ndarray:
    """What coordinates along the axes are multiplied by, shape (R,)."""
    return np.sqrt(1 + importance) * np.maximum(importance / (1 + importance), 1e-8)**power


def _kernel(x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Kernel matrix of points (n, R), with noise."""
    a1, a2, a3, square, noise = parameters[:5].exp()
    dot = x @ x.T
    size = dot.diagonal()
    apart = (size[:, None] + size - 2 * dot).clamp(min=0) / square
    kernel = a1 * dot + a2 * dot**2 + a3 * (1 + apart)**-1.5
    return kernel + (noise + _ROUNDING * kernel.diagonal().mean()) * torch.eye(len(x), dtype=x.dtype)


def _likeliest(z: np.ndarray, importance: np.ndarray, rest: np.ndarray, former: np.ndarray | None) -> np.ndarray:
    """Parameters (6,) of largest marginal likelihood for coordinates z (n, R) along the axes, and responses (n, k).

    The likelihood has several maxima: the search begins where smooth responses have it, and at former parameters.
    """
    along, target, weight = (torch.from_numpy(part) for part in (z, rest, importance))
    size = float(((z * _scales(importance, np.exp(_USUAL)))**2).sum(axis=1).mean())
    usual = np.array([0.0, np.log(0.07 / size), 1.0, np.log(5 * size), np.log(1e-5), _USUAL])
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
        with contextlib.suppress(torch.linalg.LinAlgError):
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
