r"""Weights of a few solved draws that know the moments of many unsolved ones: control variates, kept as weights.

Draws :math:`z_i` have weights :math:`w_i` of the posterior and :math:`v_i` of a law near it, of which a cloud of draws
costs no solve. For features :math:`\varphi` of the field, whose mean in the cloud is zero, :math:`\sum_i v_i
\varphi(z_i)` is an error that is known, and

.. math:: u_i = w_i (1 + v_i\, t \cdot \varphi(z_i)), \qquad
          t = -\Big(\sum_i v_i^2 \varphi \varphi^T\Big)^{-1} \sum_i v_i \varphi ,

takes from every weighted mean what its terms :math:`w_i f(z_i)` have in common with it by regression (Owen, Monte
Carlo theory, methods and examples, section 8.9).
"""

import numpy as np
from mpi4py import MPI
from scipy.linalg import lstsq
from scipy.sparse.linalg import eigsh
from scipy.stats import norm

from fem_diffusion.reference.latents import LatentProblem

__all__ = ["balanced", "cloud_size"]

# Draws of the cloud for each solved one, and all of them at most: more solves allow features of heavy tails, whose
# means no cloud knows (lognormal fields, 1,250 draws: errors of the mean 1.6 times as large with them as without).
_EACH, _ENOUGH = 8, 5000
# Effective draws for each feature, at least; principal components at most; coefficients of a rank that show these, and
# draws that are decoded together.
_SHARE, _MOST, _COLUMNS, _TOGETHER = 15, 12, 2000, 200
# Share of the variance below which a component is rounding; least effective number over that of even weights, or of w;
# chance of means so far apart below which the cloud is not believed.
_ROUNDING, _LEFT, _CHANCE = 1e-10, 0.5, 1e-4


def cloud_size(n: int) -> int:
    """Draws of a cloud beside n solved ones; 0 where these are so many that they are better off without one."""
    return _EACH * n if _EACH * n <= _ENOUGH else 0


def balanced(latent: LatentProblem, z: np.ndarray, weights: np.ndarray, near: np.ndarray, cloud: np.ndarray
             ) -> np.ndarray:
    """Weights u (n,) of solved draws z (n, R), from w and v (n,) and the cloud (N, R) (collective).

    Features are products, up to the second order, of the leading principal components of the parameter's coefficients,
    each in units of its own spread. w is returned as it is where that would be no gain: there are too few draws, v or u
    are uneven, the parameter is not finite, or the cloud is of another law than v.
    """
    comm, effective = latent.problem.comm, 1 / (weights**2).sum()
    count = min(int((np.sqrt(9 + 8 * effective / _SHARE) - 3) / 2), _MOST)
    if count < 1 or _LEFT * len(z) * (near**2).sum() > 1 or _apart(z, near, cloud):
        return weights
    fields, others = _fields(latent, z), _fields(latent, cloud)
    if not comm.allreduce(np.isfinite(fields).all() and np.isfinite(others).all(), MPI.LAND):
        return weights
    centre = weights @ fields
    spread = np.sqrt(weights @ (fields - centre)**2)
    spread[spread == 0] = 1.0
    rows = np.sqrt(weights)[:, None] * (fields - centre) / spread
    gram = comm.allreduce(rows @ rows.T)
    largest = gram.diagonal().argmax()
    if gram[largest, largest] == 0:
        return weights
    values, vectors = comm.bcast(eigsh(gram, count, v0=gram[largest]))
    there = values > _ROUNDING * gram.trace()
    loadings = rows.T @ (vectors[:, there] / values[there])

    def features(fields: np.ndarray) -> np.ndarray:
        x = comm.allreduce((fields - centre) / spread @ loadings)
        one, other = np.triu_indices(x.shape[1])
        return np.hstack([x, x[:, one] * x[:, other]])
    mine, theirs = features(fields), features(others)
    mean, unit = theirs.mean(axis=0), theirs.std(axis=0)
    terms = near[:, None] * (mine - mean) / np.where(unit > 0, unit, 1.0)
    tilt, *_ = lstsq(terms.T @ terms, -terms.sum(axis=0))
    found = np.maximum(weights * (1 + terms @ tilt), 0)
    good = _LEFT * effective * (found**2).sum() < found.sum()**2
    return latent.everyone.bcast(found / found.sum() if good else weights)


def _apart(z: np.ndarray, near: np.ndarray, cloud: np.ndarray) -> bool:
    """Whether draws with weights v and the cloud have other means of a latent, more than chance makes them."""
    mean = cloud.mean(axis=0)
    terms = near[:, None] * (z - mean)
    error = np.sqrt((terms**2).sum(axis=0) + cloud.var(axis=0) / len(cloud))
    largest = np.abs(terms.sum(axis=0) / np.where(error > 0, error, 1.0)).max(initial=0.0)
    return bool(2 * norm.sf(largest) * z.shape[1] < _CHANCE)


def _fields(latent: LatentProblem, z: np.ndarray) -> np.ndarray:
    """Some owned coefficients (n, m) of the parameters of latents (n, R)."""
    parts = (latent.parameters(z[i:i + _TOGETHER]) for i in range(0, len(z), _TOGETHER))
    first = next(parts)
    chosen = np.unique(np.linspace(0, first.shape[1] - 1, min(first.shape[1], _COLUMNS)).astype(int))
    return np.vstack([first[:, chosen], *(part[:, chosen] for part in parts)])
