"""Block Lanczos method for a covariance in the mass inner product, on any number of ranks.

From a block of draws X it spans ``X, CM X, (CM)² X, ...``; the Ritz vectors in that space are uncorrelated under C, and
its leading ones are the leading modes long before the space is large (Musco and Musco 2015).
"""

from collections.abc import Callable

import numpy as np
from mpi4py import MPI

__all__ = ["Lanczos"]

Rows = Callable[[np.ndarray], np.ndarray]

# Directions that stand out by less, of a block in units of its largest one, are rounding.
_FLAT = 1e-7


class Lanczos:
    """The space that is spanned so far, and C M seen in it, `T` (k, k), global.

    `apply` maps dual coefficients (B, n_owned) to primal ones, and `mass` primal ones to dual ones.
    """

    def __init__(self, apply: Rows, mass: Rows, comm: MPI.Comm, width: int) -> None:
        self._apply, self._mass, self._comm = apply, mass, comm
        self._rows, self.T, self._left = np.empty((0, width)), np.empty((0, 0)), np.empty((0, 0))

    @property
    def basis(self) -> np.ndarray:
        """Orthonormal rows (k, n_owned), a view."""
        return self._rows[:]

    def inner(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Inner products (B, C) of rows x (B, n_owned) and y (C, n_owned)."""
        return self._comm.allreduce(x @ self._mass(y).T)

    def beside(self, x: np.ndarray, least: float = 0.0) -> np.ndarray:
        """Orthonormal rows for what the rows of x (B, n_owned) have outside the space, where that is above `least`."""
        x = x - self.inner(self.basis, x).T @ self.basis
        for again in range(5):
            gram = self.inner(x, x)
            values, vectors = np.linalg.eigh((gram + gram.T) / 2)
            if not again:
                keep = values > max(least**2, _FLAT**2 * values.max(initial=0.0), 0.0)
                values, vectors = values[keep], vectors[:, keep]
            if again and np.abs(gram - np.eye(len(gram))).max(initial=0.0) < 1e-12:
                break
            x = (vectors / np.sqrt(values)).T @ x
            # What was small has lost its right angle to the space.
            x -= self.inner(self.basis, x).T @ self.basis
        return x

    def extend(self, new: np.ndarray) -> np.ndarray:
        """Take orthonormal rows beside the space into it; returns what their images have outside, (B, n_owned)."""
        image, former = self._apply(self._mass(new)), len(self.T)
        try:    # in place: there may be no memory for a second copy
            self._rows.resize((former + len(new), new.shape[1]))
            self._rows[former:] = new
        except ValueError:      # someone else holds the array, such as a profiler
            self._rows = np.concatenate([self._rows, new])
        seen = self.inner(self._rows, image)
        self.T = np.block([[self.T, seen[:former]], [seen.T]])
        self.T = (self.T + self.T.T) / 2
        image = image - seen.T @ self.basis
        self._left = self.inner(image, image)
        return image

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Variances (k,), largest first, their vectors in the basis (k, k), and norms of the residuals (k,)."""
        values, vectors = np.linalg.eigh(self.T)
        values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
        last = vectors[len(vectors) - len(self._left):]
        return values, vectors, np.sqrt(np.maximum((last * (self._left @ last)).sum(axis=0), 0.0))
