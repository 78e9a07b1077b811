r"""What is past the modes of a model: draws of the prior, or of their law given the readings of a linear problem.

With the readings :math:`y = b + G z + H t + e`, any of them may be missing: a draw of t becomes one given the others by
:math:`t + C_t H^T S^{-1} (y - b - G z - H t - e)`, :math:`S = H C_t H^T + R`, over the sensors that report.
"""

from dataclasses import dataclass, replace

import numpy as np

__all__ = ["Known", "Tail"]


@dataclass(frozen=True, eq=False)
class Known:
    """What readings of a linear problem tell of the tail.

    Parameters
    ----------
    seen : numpy.ndarray
        Readings H t of the draws, shape (n, k).
    cross : numpy.ndarray
        Covariance H C_t of readings and tail, shape (k, n_coefficients).
    signal, noise : numpy.ndarray
        Covariances H C_t H^T and R of the readings, shape (k, k).
    matrix, offset : numpy.ndarray
        G (k, r) and b (k,).
    """

    seen: np.ndarray
    cross: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    matrix: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True, eq=False)
class Tail:
    """Prior draws of what is past the modes, shape (n, n_coefficients), one for each sample of a reading."""

    draws: np.ndarray
    known: Known | None = None

    def given(self, y: np.ndarray, there: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Draws of the tail for latents (n, r), given the readings (k,) of the sensors that are there, by number."""
        draws = self.draws[:len(z)]
        if self.known is None:
            return draws
        known, some = self.known, np.ix_(there, there)
        # The same draws of noise for every reading, as the tail's own draws are.
        errors = np.random.default_rng(len(known.offset)).standard_normal((len(z), len(known.offset)))
        values, axes = np.linalg.eigh(known.noise)
        errors = errors @ (axes * np.sqrt(values.clip(min=0))).T
        missed = (y - known.offset - z @ known.matrix.T - known.seen[:len(z)] - errors)[:, there]
        gain = np.linalg.solve(known.signal[some] + known.noise[some], known.cross[there])
        return draws + (missed @ gain).astype(draws.dtype)

    def some(self, used: np.ndarray) -> "Tail":
        """The tail of some of the coefficients, by their numbers."""
        known = self.known and replace(self.known, cross=self.known.cross[:, used])
        return Tail(self.draws[:, used], known)
