"""Canonical conditional density problems whose exact conditional can be sampled.

Each problem has a joint law of latents z (r numbers) and measurements y (k numbers), and p(z | y) is known: in closed
form, or by inverting a distribution function on a fine grid in one dimension, which is exact for this purpose.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import truncnorm

from fem_diffusion.reference.dense import linear_gaussian_posterior

__all__ = ["PROBLEMS", "SCALED", "Problem"]


@dataclass(frozen=True)
class Problem:
    """A conditional density problem with known answer.

    Parameters
    ----------
    name : str
        For tables and files.
    r, k : int
        Number of latents and of measurements.
    joint : Callable
        Maps (n, rng) to joint samples z (n, r) and y (n, k).
    posterior : Callable
        Maps (y (k,), n, rng) to exact draws of p(z | y), shape (n, r).
    observations : numpy.ndarray
        Three typical measurements, the most telling one first, shape (3, k).
    """

    name: str
    r: int
    k: int
    joint: Callable
    posterior: Callable
    observations: np.ndarray

    def draw(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Joint samples z (n, r) and y (n, k)."""
        return self.joint(n, np.random.default_rng(seed))

    def conditional(self, y: np.ndarray, n: int, seed: int) -> np.ndarray:
        """Exact draws of p(z | y) for one measurement y (k,), shape (n, r)."""
        return self.posterior(np.asarray(y), n, np.random.default_rng(seed))


def _invert(log_density: np.ndarray, grid: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draws (n,) of the density with these logarithms on a grid, by inverting its distribution function."""
    density = np.exp(log_density - log_density.max())
    cumulative = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    return np.interp(rng.uniform(0, cumulative[-1], n), cumulative, grid)


def _from_conditional(name: str, k: int, observations: list, prior: Callable, posterior: Callable, r: int) -> Problem:
    """A problem given by a law of y and p(z | y); `posterior` maps y (n, k) and rng to one draw each."""
    def joint(n, rng):
        y = prior(n, rng)
        return posterior(y, rng), y

    def conditional(y, n, rng):
        return posterior(np.tile(y, (n, 1)), rng)
    return Problem(name, r, k, joint, conditional, np.array(observations))


def _normal(k: int) -> Callable:
    return lambda n, rng: rng.standard_normal((n, k))


def bimodal() -> Problem:
    """z ~ N(0, 1), y = z² + e, e ~ N(0, 0.3²): two modes where y is large, one flat one at 0."""
    std = 0.3
    grid = np.linspace(-6, 6, 20001)

    def joint(n, rng):
        z = rng.standard_normal((n, 1))
        return z, z**2 + std * rng.standard_normal((n, 1))

    def posterior(y, n, rng):
        return _invert(-grid**2 / 2 - (y[0] - grid**2) ** 2 / (2 * std**2), grid, n, rng)[:, None]
    return Problem("bimodal", 1, 1, joint, posterior, np.array([[1.5], [0.0], [3.5]]))


def heteroscedastic() -> Problem:
    """z | y Gaussian in 2D, y ~ U(-2, 2): mean on a curve, spreads between 0.07 and 0.8, correlation tanh(y)."""
    def posterior(y, rng):
        y = y[:, 0]
        first, second = rng.standard_normal((2, len(y)))
        rho = np.tanh(y)
        mixed = rho * first + np.sqrt(1 - rho**2) * second
        return np.column_stack([np.sin(2 * y) + np.exp(-1.4 + 0.6 * y) * first,
                                y**2 / 2 + np.exp(-1.4 - 0.6 * y) * mixed])
    return _from_conditional("heteroscedastic", 1, [[1.5], [0.0], [-1.5]],
                             lambda n, rng: rng.uniform(-2, 2, (n, 1)), posterior, 2)


def spiral() -> Problem:
    """z on a spiral of one and a half turns with width 0.1; y is its first coordinate with noise 0.2."""
    width, std = 0.1, 0.2
    grid = np.linspace(0, 1, 20001)

    def centre(t):
        radius, angle = 0.3 + 1.7 * t, 3 * np.pi * t
        return radius * np.cos(angle), radius * np.sin(angle)

    def joint(n, rng):
        z = np.column_stack(centre(rng.uniform(size=n))) + width * rng.standard_normal((n, 2))
        return z, z[:, :1] + std * rng.standard_normal((n, 1))

    def posterior(y, n, rng):
        # Given the place t on the spiral, z_1 has a Gaussian update and z_2 none.
        total = width**2 + std**2
        t = _invert(-(y[0] - centre(grid)[0]) ** 2 / (2 * total), grid, n, rng)
        first, second = centre(t)
        noise = rng.standard_normal((n, 2)) * [width * std / np.sqrt(total), width]
        return np.column_stack([first + width**2 / total * (y[0] - first), second]) + noise
    return Problem("spiral", 2, 1, joint, posterior, np.array([[0.3], [-1.1], [1.2]]))


def banana() -> Problem:
    """z ~ N(0, I) in 2D, y = z_2 + z_1² + e, e ~ N(0, 0.2²): a bent ridge."""
    std = 0.2
    grid = np.linspace(-6, 6, 20001)

    def joint(n, rng):
        z = rng.standard_normal((n, 2))
        return z, z[:, 1:] + z[:, :1] ** 2 + std * rng.standard_normal((n, 1))

    def posterior(y, n, rng):
        # Given z_1, z_2 has a Gaussian update.
        total = 1 + std**2
        first = _invert(-grid**2 / 2 - (y[0] - grid**2) ** 2 / (2 * total), grid, n, rng)
        second = (y[0] - first**2) / total + std / np.sqrt(total) * rng.standard_normal(n)
        return np.column_stack([first, second])
    return Problem("banana", 2, 1, joint, posterior, np.array([[1.0], [-0.5], [3.0]]))


def _mixture(name: str, means: np.ndarray | list, shifts: np.ndarray, stds: list, slopes: np.ndarray,
             observations: list) -> Problem:
    """z | y mixture: weights softmax(slopes y), means + shifts y, diagonal stds; y ~ N(0, I)."""
    means, stds = np.asarray(means, dtype=float), np.asarray(stds, dtype=float)

    def posterior(y, rng):
        logits = y @ slopes.T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        steps = np.cumsum(weights / weights.sum(axis=1, keepdims=True), axis=1)
        # The last step is 1 up to rounding.
        part = (rng.uniform(size=(len(y), 1)) > steps[:, :-1]).sum(axis=1)
        return means[part] + y @ shifts.T + stds[part] * rng.standard_normal((len(y), means.shape[1]))
    return _from_conditional(name, slopes.shape[1], observations, _normal(slopes.shape[1]), posterior, means.shape[1])


def mixture() -> Problem:
    """Three modes in 2D whose weights depend on y (2 numbers)."""
    turns = 2 * np.pi * np.arange(3) / 3
    return _mixture("mixture", 1.5 * np.column_stack([np.cos(turns), np.sin(turns)]), 0.3 * np.eye(2),
                    [[0.2, 0.5], [0.4, 0.2], [0.3, 0.3]], 1.5 * np.column_stack([np.cos(turns), np.sin(turns)]),
                    [[0.3, 0.3], [-0.8, 0.6], [1.0, -0.5]])


def mixture_10d() -> Problem:
    """Two modes in 10D whose weights depend on y (3 numbers), spreads from 0.3 to 1, means linear in y."""
    mean = np.linspace(1.2, 0.0, 10)
    stds = np.linspace(0.3, 1.0, 10)
    shifts = np.random.default_rng(7).standard_normal((10, 3)) / np.sqrt(3)
    slopes = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    return _mixture("mixture-10d", [mean, -mean], shifts, [stds, stds[::-1]], slopes,
                    [[0.2, 0.5, -0.5], [0.8, -1.0, 0.0], [-0.4, 0.3, 1.0]])


def heavy_tailed() -> Problem:
    """z | y Student-t with four degrees of freedom in 3D; place and scale depend on y (2 numbers)."""
    freedom = 4
    shape = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.2, 0.5]])

    def posterior(y, rng):
        heavy = rng.standard_normal((len(y), 3)) / np.sqrt(rng.chisquare(freedom, (len(y), 1)) / freedom)
        place = np.column_stack([y[:, 0], y[:, 1], y[:, 0] * y[:, 1]])
        return place + 0.4 * np.exp(0.4 * y[:, :1]) * heavy @ shape.T
    return _from_conditional("heavy-tailed", 2, [[0.0, 0.0], [1.0, -1.0], [-1.0, 0.5]], _normal(2), posterior, 3)


def linear_gaussian() -> Problem:
    """z ~ N(0, I) in 10D, y = G z + e with 5 numbers and noise 0.1: the Gaussian base is the answer."""
    std = 0.1
    operator = np.random.default_rng(11).standard_normal((5, 10)) / np.sqrt(10)

    def joint(n, rng):
        z = rng.standard_normal((n, 10))
        return z, z @ operator.T + std * rng.standard_normal((n, 5))

    def posterior(y, n, rng):
        mean, covariance = linear_gaussian_posterior(operator, np.eye(10), std**2 * np.eye(5), y)
        return mean + rng.standard_normal((n, 10)) @ np.linalg.cholesky(covariance).T
    return Problem("linear-gaussian", 10, 5, joint, posterior, joint(3, np.random.default_rng(13))[1])


def decades() -> Problem:
    """z = log10 c ~ U(-9, -3), y = c (1 + 0.1 e): a reading over six decades with relative noise."""
    relative = 0.1
    grid = np.linspace(-9, -3, 20001)

    def joint(n, rng):
        z = rng.uniform(-9, -3, (n, 1))
        return z, 10**z * (1 + relative * rng.standard_normal((n, 1)))

    def posterior(y, n, rng):
        std = relative * 10**grid
        return _invert(-(y[0] - 10**grid) ** 2 / (2 * std**2) - np.log(std), grid, n, rng)[:, None]
    return Problem("decades", 1, 1, joint, posterior, np.array([[1e-6], [3e-9], [4e-4]]))


def bounded() -> Problem:
    """z ~ U(-1, 1) in 5D, y = z + e, e of variance 0.1: a truncated Gaussian."""
    std = np.sqrt(0.1)

    def joint(n, rng):
        z = rng.uniform(-1, 1, (n, 5))
        return z, z + std * rng.standard_normal((n, 5))

    def posterior(y, n, rng):
        return truncnorm.rvs((-1 - y) / std, (1 - y) / std, y, std, size=(n, 5), random_state=rng)
    return Problem("bounded", 5, 5, joint, posterior, joint(3, np.random.default_rng(17))[1])


def unknown_spread() -> Problem:
    """z ~ N(0, I) in 2D, four readings z_1 + exp(z_2 - 1) e: noise whose level is unknown."""
    k = 4
    grid = np.linspace(-6, 6, 20001)

    def joint(n, rng):
        z = rng.standard_normal((n, 2))
        return z, z[:, :1] + np.exp(z[:, 1:] - 1) * rng.standard_normal((n, k))

    def posterior(y, n, rng):
        # Given z_2, z_1 has a Gaussian update, and readings are N(0, s² I + 1 1ᵀ).
        square = np.exp(2 * grid - 2)
        apart, together = ((y - y.mean()) ** 2).sum(), k * y.mean() ** 2
        logs = (k - 1) * np.log(square) + np.log(square + k) + apart / square + together / (square + k)
        second = _invert(-grid**2 / 2 - logs / 2, grid, n, rng)
        square = np.exp(2 * second - 2)
        first = k * y.mean() / (square + k) + np.sqrt(square / (square + k)) * rng.standard_normal(n)
        return np.column_stack([first, second])
    return Problem("unknown-spread", 2, k, joint, posterior, joint(3, np.random.default_rng(19))[1])


PROBLEMS = {problem.name: problem for problem in (
    bimodal(), heteroscedastic(), spiral(), banana(), mixture(), mixture_10d(), heavy_tailed(), linear_gaussian())}
# Readings, parameters or noise on a scale that is not the network's.
SCALED = {problem.name: problem for problem in (decades(), bounded(), unknown_spread())}
