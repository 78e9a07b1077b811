"""From derivatives by the parameter to those by latents: back through the prior's transform and the modes."""

from functools import cached_property

import numpy as np

from fem_diffusion.errors import InputError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import coefficients, owned_size
from fem_diffusion.prior.protocol import Prior

__all__ = ["ChainRule"]


class ChainRule:
    """Derivatives by the latents of a basis; rows are owned ones of the parameter, all methods are collective."""

    def __init__(self, prior: Prior, basis: ModalBasis):
        self._prior, self._comm, self._basis, self._owned = prior, prior.V.comm, basis, owned_size(prior.V)

    @cached_property
    def there(self) -> bool:
        """Whether the transform has a derivative."""
        try:
            self._prior.pull_back(np.zeros((1, self._owned)), coefficients(self._basis.mean))
        except InputError:
            return False
        return True

    @cached_property
    def _pointwise(self) -> bool:
        """Whether the transform acts at each node by itself, which is faster."""
        try:
            self._prior.slope_many(coefficients(self._basis.mean)[None])
        except InputError:
            return False
        return True

    def at(self, rows: np.ndarray, field: np.ndarray) -> np.ndarray:
        """Shape (l, r), of rows (l, n_owned of M) at one field (n_owned,)."""
        if self._pointwise:
            return self._comm.allreduce(rows * self._prior.slope_many(field[None]) @ self._basis.scaled_modes.T)
        return self._comm.allreduce(self._prior.pull_back(rows, field) @ self._basis.scaled_modes.T)

    def each(self, rows: np.ndarray, fields: np.ndarray) -> np.ndarray:
        """Shape (B, r), of rows (B, n_owned of M) at a field for each, (B, n_owned)."""
        if not self._pointwise:
            return np.concatenate([self.at(row[None], field) for row, field in zip(rows, fields)])
        return self._comm.allreduce(rows * self._prior.slope_many(fields) @ self._basis.scaled_modes.T)
