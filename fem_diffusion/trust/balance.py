r"""Weights of a few solved draws that know the moments of many unsolved ones: control variates, kept as weights.

Draws :math:`z_i` have weights :math:`w_i` of the posterior and :math:`v_i` of a law near it, of which a cloud of draws
costs no solve. Factors :math:`1 + \lambda \cdot \varphi(z_i)` give features :math:`\varphi` of the field the means
under :math:`v_i` that they have in the cloud (calibration estimators: Deville and Särndal 1992, section 2), and
:math:`u_i = w_i (1 + \lambda \cdot \varphi(z_i))` leaves of the error of any mean what its terms, weight ratio times
function, have beside their regression on the features. With many solves the :math:`u_i` are the :math:`w_i`.
"""

import numpy as np
from scipy.linalg import eigh, lstsq

from fem_diffusion.reference.latents import LatentProblem

__all__ = ["CLOUD", "balanced"]

# Draws of the cloud for each solved one.
CLOUD = 8
# Effective draws for each feature, at least; principal components at most; coefficients of a rank that show these, and
# draws that are decoded together.
_SHARE, _MOST, _COLUMNS, _TOGETHER = 15, 12, 2000, 200
# Share of the variance below which a component is rounding; least effective number after over before.
_ROUNDING, _LEFT = 1e-10, 0.6


def balanced(latent: LatentProblem, z: np.ndarray, weights: np.ndarray, near: np.ndarray, cloud: np.ndarray
             ) -> np.ndarray:
    """Weights u (n,) of solved draws z (n, R), from w and v (n,) and the cloud (N, R) (collective).

    Features are products, up to the second order, of the leading principal components of the parameter's coefficients,
    each in units of its own spread. Where there are too few draws for that, or weights would become uneven, w is
    returned as it is.
    """
    comm, effective = latent.problem.comm, 1 / (weights**2).sum()
    count = min(int((np.sqrt(9 + 8 * effective / _SHARE) - 3) / 2), _MOST)
    if count < 1:
        return weights
    fields = _fields(latent, z)
    centre = weights @ fields
    spread = np.sqrt(weights @ (fields - centre)**2)
    spread[spread == 0] = 1.0
    rows = np.sqrt(weights)[:, None] * (fields - centre) / spread
    gram = comm.allreduce(rows @ rows.T)
    values, vectors = eigh(gram, subset_by_index=[max(len(z) - count, 0), len(z) - 1])
    there = values > _ROUNDING * gram.trace()
    loadings = rows.T @ (vectors[:, there] / values[there])

    def features(fields: np.ndarray) -> np.ndarray:
        x = comm.allreduce((fields - centre) / spread @ loadings)
        one, other = np.triu_indices(x.shape[1])
        return np.hstack([x, x[:, one] * x[:, other]])
    mine, theirs = features(fields), features(_fields(latent, cloud))
    mean, unit = theirs.mean(axis=0), theirs.std(axis=0)
    mine = (mine - mean) / np.where(unit > 0, unit, 1.0)
    # The cloud's own mean is zero in these units.
    tilt, *_ = lstsq((mine * near[:, None]).T @ mine, -near @ mine)
    found = np.maximum(weights * (1 + mine @ tilt), 0)
    found /= found.sum()
    return latent.everyone.bcast(found if _LEFT * effective * (found**2).sum() < 1 else weights)


def _fields(latent: LatentProblem, z: np.ndarray) -> np.ndarray:
    """Some owned coefficients (n, m) of the parameters of latents (n, R)."""
    parts = (latent.parameters(z[i:i + _TOGETHER]) for i in range(0, len(z), _TOGETHER))
    first = next(parts)
    chosen = np.unique(np.linspace(0, first.shape[1] - 1, min(first.shape[1], _COLUMNS)).astype(int))
    return np.vstack([first[:, chosen], *(part[:, chosen] for part in parts)])
