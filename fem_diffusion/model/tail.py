r"""What readings tell of the modes past those of the basis, where the problem is linear.

A field is the modes' part and the rest, :math:`m = \bar m + \Phi z + t`. Where :math:`y = b + G z + H t + e`, the law
of t given z and y is Gaussian, and a prior draw of t becomes a draw of it by the draw's own update (Matheron's rule),

.. math:: t + K (y - b - G z - H t - e), \qquad K = C_t H^T (H C_t H^T + R)^{-1} .

With z from the posterior in which :math:`H t` counts as noise, both together are samples of the exact posterior.
"""

from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from fem_diffusion.diffusion import GaussianBase, GaussianNoise
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.modes import mass_action
from fem_diffusion.observation.linear import Observation
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.product import is_gaussian
from fem_diffusion.problem import InverseProblem
from fem_diffusion.simulation.data_set import DataSet

__all__ = ["LinearTail", "linear_tail", "pair_rows"]

# Signal of the rest below this share of the noise's variance is none; how far the pairs may be from what H says of it.
_UNSEEN, _ALIKE = 1e-6, 0.2
# Pairs that each mode wants, and the variance that modes are to keep, of few unknowns and of many.
_PAIRS_A_MODE, _ALL, _MOST = 2, 1 - 1e-6, 0.999


@dataclass(frozen=True, eq=False)
class LinearTail:
    """Sensors and their gain past the modes of a basis; from `linear_tail`.

    Parameters
    ----------
    rows : numpy.ndarray
        H, owned coefficients, shape (k, n_owned).
    gain : numpy.ndarray
        Rows of K, owned coefficients, shape (k, n_owned).
    matrix, offset : numpy.ndarray
        G (k, r) and b (k,).
    root : numpy.ndarray
        Factor of R, shape (k, k).
    """

    rows: np.ndarray
    gain: np.ndarray
    matrix: np.ndarray
    offset: np.ndarray
    root: np.ndarray

    def given(self, draws: np.ndarray, y: np.ndarray, z: np.ndarray, seed: int, comm: MPI.Comm) -> np.ndarray:
        """Prior draws of the rest (n, n_owned) as draws of it given the measurement (k,) and latents (n, r)."""
        noise = np.random.default_rng([seed, 1]).standard_normal((len(z), len(y))) @ self.root.T
        missed = y - self.offset - z @ self.matrix.T - comm.allreduce(draws @ self.rows.T) - noise
        return draws + missed @ self.gain


def linear_tail(problem: InverseProblem, basis: ModalBasis, base: GaussianBase, known: bool,
                rows: np.ndarray | None = None) -> LinearTail | None:
    """What the readings of a problem tell of the rest; None where it is not linear or they tell nothing (collective).

    The problem has fixed sensors; the base is of its readings, fitted in the basis, or in that of another mesh where
    the problem is `known` to be linear. Relative noise counts by its mean over the prior. Without `rows` of `pair_rows`
    it takes a derivative of the solver.
    """
    prior, noise, emulator = problem.prior, problem.noise, base.emulator
    if not (isinstance(noise, GaussianNoise) and emulator.affine and basis.standard_prior and is_gaussian(prior)
            and prior.core is prior):
        return None
    # All ranks hold the same base, so they go on together.
    found = rows is not None
    if rows is None:
        if not (isinstance(problem.observation, Observation) and problem.derived):
            return None
        rows = problem.sensitivity(prior.mean)
    seen_modes = problem.comm.allreduce(rows @ basis.scaled_modes.T)
    cross = prior.apply_covariance(rows) - seen_modes @ basis.scaled_modes
    seen = problem.comm.allreduce(rows @ cross.T)
    matrix, offset = emulator.matrix.numpy(), emulator.offset.numpy()
    # Two points with the mean and the variance of the readings have their mean square.
    mean = offset + matrix @ base.mean.numpy()
    spread = np.sqrt(((matrix @ base.factor.numpy())**2).sum(axis=1) + seen.diagonal())
    R = noise.covariance(torch.from_numpy(np.stack([mean - spread, mean + spread]))).numpy()
    unit = np.sqrt(R.diagonal())
    if not (unit > 0).all():
        return None
    signal, noise, left = (x / unit / unit[:, None] for x in (seen, R, base.scatter.numpy() - R - seen))
    strength = np.linalg.norm(signal, 2)
    if strength < _UNSEEN or not known and np.linalg.norm(left, 2) > _ALIKE * strength:
        return None
    if found:
        # What pairs do not tell counts as noise, as it does in the base.
        values, axes = np.linalg.eigh(left)
        noise = noise + axes * values.clip(min=0) @ axes.T
    gain = np.linalg.solve(signal + noise, cross / unit[:, None]) / unit[:, None]
    values, axes = np.linalg.eigh(noise)
    root = unit[:, None] * axes * np.sqrt(values.clip(min=0))
    return LinearTail(rows, gain, matrix, offset, root)


def pair_rows(problem: InverseProblem, data: DataSet) -> np.ndarray:
    """The derivative that pairs show where a Gaussian prior and a solver are all that is known: owned, (k, n_owned).

    By least squares on the prior's leading modes, as many as the pairs can tell (collective).
    """
    most = max(1, len(data) // _PAIRS_A_MODE)
    basis = karhunen_loeve(problem.prior, retained=_ALL if problem.V.dim() <= most else _MOST, most=most)
    basis = basis.leading(min(basis.r, most))
    z, y = (x - x.mean(axis=0) for x in (basis.encode(data.coefficients), np.asarray(data.readings, dtype=float)))
    matrix = np.linalg.lstsq(z, y, rcond=None)[0].T / np.sqrt(basis.variances)
    return matrix @ mass_action(basis.V, basis.weights)(basis.modes)
