r"""Measurements as people have them: sensors that failed, and several readings of each sensor.

Constant Gaussian noise leaves of n readings :math:`y_j` of the sensors :math:`S_j`, those that had not failed, their
mean in the sense of least squares,

.. math:: \bar y = \Lambda^{-1} \sum_j S_j^T R_j^{-1} y_j, \qquad \Lambda = \sum_j S_j^T R_j^{-1} S_j,

with the noise covariance :math:`\Lambda^{-1}`: nothing of the posterior is lost. Of other noise every reading stays one
of its own, by the same sensor once more.
"""

from dataclasses import replace

import numpy as np
import torch
from firedrake import Function

from fem_diffusion.diffusion import GaussianNoise, Noise, join_noise
from fem_diffusion.errors import InputError
from fem_diffusion.observation.linear import Observation
from fem_diffusion.problem import InverseProblem

__all__ = ["at_hand"]


def at_hand(problem: InverseProblem, y: np.ndarray) -> tuple[InverseProblem, np.ndarray, np.ndarray]:
    """The problem of a measurement by fixed sensors, its readings (m,), and the numbers (m,) of their sensors.

    Takes readings (k,) or, of n times, (n, k), with NaN where a sensor failed. InputError if all have failed, or what
    is left has no known noise.
    """
    rows = np.atleast_2d(y)
    there = ~np.isnan(rows)
    if y.ndim == 1 and there.all():
        return problem, y, np.arange(len(y))
    if not there.any():
        raise InputError("All sensors failed: the posterior is the prior, of which problem.prior.sample(seed) draws.")
    noise = problem.noise
    if len(rows) > 1 and noise is None:
        raise InputError("The readings hold noise of their own, so it is not known what several of them tell: give the "
                         "problem its noise.")
    if len(rows) > 1 and isinstance(noise, GaussianNoise) and noise.constant:
        index, values, law = _mean(rows, there, noise)
    else:
        parts = [np.flatnonzero(row) for row in there if row.any()]
        index, values = np.concatenate(parts), rows[there]
        laws = [] if noise is None else [noise.select(torch.from_numpy(part)) for part in parts]
        law = laws[0] if len(laws) == 1 else join_noise(*zip(map(len, parts), laws)) if laws else None
    seen = problem.observation

    def some(state: Function) -> np.ndarray:
        return np.array(seen(state), ndmin=1)[index]   # pyright: ignore[reportCallIssue]
    seen_now = seen[index] if isinstance(seen, Observation) else some
    return replace(problem, observation=seen_now, noise=law), values, index


def _mean(rows: np.ndarray, there: np.ndarray, noise: GaussianNoise) -> tuple[np.ndarray, np.ndarray, Noise]:
    """Sensors that read at least once (m,), their mean (m,), and its noise."""
    k = rows.shape[1]
    R = noise.covariance(torch.zeros(1, k, dtype=torch.float64)).numpy()
    # Each sensor in units of its noise: pascals beside mole fractions lose nothing.
    unit, index = np.sqrt(R.diagonal()), np.flatnonzero(there.any(axis=0))
    R, white = R / np.outer(unit, unit), rows / unit
    information, pulled = np.zeros((k, k)), np.zeros(k)
    patterns, which = np.unique(there, axis=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        some, mine = np.ix_(pattern, pattern), white[which.ravel() == i][:, pattern]
        precision = np.linalg.inv(R[some])
        information[some] += len(mine) * precision
        pulled[pattern] += precision @ mine.sum(axis=0)
    covariance = np.linalg.inv(information[np.ix_(index, index)])
    values, unit = unit[index] * (covariance @ pulled[index]), unit[index]
    if np.array_equal(R, np.diag(R.diagonal())):
        return index, values, GaussianNoise(std=unit * np.sqrt(covariance.diagonal()))
    return index, values, GaussianNoise(covariance=np.outer(unit, unit) * (covariance + covariance.T) / 2)
