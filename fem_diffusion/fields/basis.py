r"""Fields to latents and back.

A field is written in modes that are orthonormal in the mass inner product,

.. math:: m = \bar m + \sum_k \sqrt{\lambda_k}\, z_k\, \varphi_k ,

with the eigenvalues of the prior covariance, :math:`C M \varphi = \lambda \varphi` (Karhunen-Loeve), or of the
sample covariance (proper orthogonal decomposition, POD). The latents z have unit prior variance, do not depend on
the mesh beyond discretisation error, and white noise in z is the prior's own noise in V. Every mode vanishes where
the field has Dirichlet conditions and the mean carries their values, so every decoded field satisfies them. A rotation
of the latents changes none of this: :math:`z = Q^T z'` of all modes' latents z', with orthonormal columns, may lead
with what the data see most instead of what varies most.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field as dataclass_field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from firedrake import Function
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from numpy.typing import ArrayLike
from scipy.stats import chi2, norm

from fem_diffusion import files
from fem_diffusion.checks import check_array, check_count, check_kind, check_seed
from fem_diffusion.errors import DataError, FileError, InputError
from fem_diffusion.fields.coefficients import coefficients, field, largest, on_root
from fem_diffusion.fields.keyed import element_of, gather_keys, gather_rows, own_columns, read_everywhere
from fem_diffusion.fields.modes import mass_action

if TYPE_CHECKING:
    from fem_diffusion.prior.protocol import Prior

__all__ = ["ModalBasis", "is_of", "load_basis", "pack_basis", "unpack_basis"]

# Below this probability of their moments, latents are not those of the prior.
_CHANCE = 1e-9
# Memory for fields that are encoded at once, on this rank.
_BYTES = 2**28
# How far covariances of modes may be from those of a prior, in units of their standard deviations.
_SAME = 1e-2


@dataclass(frozen=True)
class ModalBasis:
    """Orthonormal modes with their variances: the coordinates in which diffusion takes place.

    Parameters
    ----------
    mean : firedrake.Function
        Mean of the field, in V (scalar, vector or mixed), with the values of inhomogeneous Dirichlet conditions.
    modes, variances : numpy.ndarray
        Coefficients of the modes, shape (r, n_owned), orthonormal in the (weighted) mass inner product, and variance of
        the field along each of them, shape (r,), decreasing.
    total_variance : float
        Integral over the mesh of the field's pointwise variance.
    prior : Prior or None
        The prior of the parameter, of whose core the modes are; it brings the transform, where there is one.
    standard_prior : bool
        Whether the latents are standard normal under the prior: for a Karhunen-Loeve basis, not for POD.
    weights : tuple of float or None
        Of the components of a mixed V in its inner product: where each was expanded by itself, one over its total
        variance, so that `variances` and `retained` compare shares of variance, not units.
    turn : numpy.ndarray or None
        Q, orthonormal columns, shape (number of modes, r); the latents are those of the modes where left out.

    Attributes
    ----------
    scaled_modes : numpy.ndarray
        Modes times the square root of their variance, turned, shape (r, n_owned): a field is mean + z @ scaled_modes.
    """

    V: WithGeometry
    mean: Function
    modes: np.ndarray
    variances: np.ndarray
    total_variance: float
    prior: "Prior | None" = None
    standard_prior: bool = False
    weights: tuple[float, ...] | None = None
    turn: np.ndarray | None = None
    scaled_modes: np.ndarray = dataclass_field(init=False)
    _encoder: np.ndarray = dataclass_field(init=False)

    def __post_init__(self) -> None:
        unit = np.sqrt(self.variances)[:, None]
        parts = mass_action(self.V, self.weights)(self.modes) / unit, self.modes * unit
        for name, rows in zip(("_encoder", "scaled_modes"), parts):
            object.__setattr__(self, name, rows if self.turn is None else self.turn.T @ rows)

    @property
    def r(self) -> int:
        """Number of latents: of the modes, or of the directions among them where they are turned."""
        return len(self.variances) if self.turn is None else self.turn.shape[1]

    @property
    def retained(self) -> float:
        """Share of the total variance that the latents carry."""
        shares = 1.0 if self.turn is None else (self.turn**2).sum(axis=1)
        return float((shares * self.variances).sum() / self.total_variance)

    def leading(self, r: int) -> "ModalBasis":
        """The basis of the first r latents, of the same total variance; InputError if it has fewer."""
        if check_count(r, "r") > self.r:
            raise InputError(f"r is {r}: the basis has {self.r} modes, ask for at most as many.")
        if self.turn is not None:
            return replace(self, turn=self.turn[:, :r])
        return replace(self, modes=self.modes[:r], variances=self.variances[:r])

    def encode(self, values: Function | Sequence[Function] | np.ndarray) -> np.ndarray:
        """Latents (B, r) of fields in V, before any transform, or of their coefficients (B, n_owned).

        Shape (r,) for one Function; InputError if a field is in another space.
        """
        if not isinstance(values, np.ndarray):
            for f in values if isinstance(values, Sequence) else [values]:
                if f.function_space() != self.V:
                    raise InputError(f"A field in {f.function_space()} cannot be encoded: the basis is on {self.V}. "
                                     "Interpolate the field into that space first.")
            values = coefficients(values)
        mean = coefficients(self.mean)
        if not self.V.comm.allreduce(values.dtype.kind in "biuf" and values.shape[-1:] == mean.shape, MPI.LAND):
            raise InputError(f"Fields of shape {values.shape} and type {values.dtype} do not fit the basis: give real "
                             f"numbers of shape (B, {len(mean)}).")
        # Some at a time: there may be more fields than memory for a second copy.
        rows, step = np.atleast_2d(values), max(1, _BYTES // (8 * max(1, len(mean))))
        z = np.empty((len(rows), self.r))
        for part in (slice(i, i + step) for i in range(0, len(rows), step)):
            z[part] = (rows[part] - mean) @ self._encoder.T
        return self.V.comm.allreduce(z).reshape(*values.shape[:-1], self.r)

    def decode(self, z: ArrayLike, refill_seed: int | None = None) -> np.ndarray:
        """Coefficients (B, n_owned) of the fields, before any transform, with latents z (B, r).

        A `refill_seed` adds the modes past r of a Gaussian prior: prior draws of this seed minus their projection.
        InputError if the latents are of another length, or a refill is asked for without a Gaussian prior.
        """
        z = check_array(z, "latents", ("B", self.r))
        values = z @ self.scaled_modes
        values += coefficients(self.mean)
        if refill_seed is not None:
            if not self.standard_prior or self.prior is None:
                raise InputError("Modes past r can be refilled for a Karhunen-Loeve basis of a Gaussian prior only: "
                                 "leave out the refill.")
            draws = self.prior.core.sample_many(len(z), check_seed(refill_seed, "refill_seed"))
            values += draws
            values -= self.decode(self.encode(draws))
        return values

    def parameters(self, z: ArrayLike, refill_seed: int | None = None) -> np.ndarray:
        """Coefficients of the parameter, the transform of `decode`; shape (B, n_owned of the parameter's space)."""
        values = self.decode(z, refill_seed)
        return values if self.prior is None else self.prior.transform_many(values)

    def functions(self, z: ArrayLike) -> list[Function]:
        """The parameters with latents z (B, r) as Functions."""
        return [field(self.V if self.prior is None else self.prior.V, values) for values in self.parameters(z)]

    def check_draws(self, z: ArrayLike, missing: float = 0.0) -> None:
        """Raise DataError where latents (n, r) of training fields cannot be draws of the basis's own prior, N(0, I).

        A share of them may be missing; by what moments can differ then, the inequality of Cauchy and Schwarz tells.
        """
        if not self.standard_prior:
            return
        z = np.asarray(z, dtype=float)
        n = len(z)
        means, squares = np.abs(z.mean(axis=0)), (z**2).sum(axis=0)
        if missing:
            worst = int(np.abs(squares / n - 1).argmax())
            wrong = (means.max() > np.sqrt(missing / (1 - missing)) + norm.isf(_CHANCE) / np.sqrt(n)
                     or squares.max() > chi2.isf(_CHANCE, n) / (1 - missing)
                     or squares.min() < chi2.ppf(_CHANCE, n) * (1 - np.sqrt(3 * missing)))
        else:
            chances = 2 * np.stack([norm.sf(means * np.sqrt(n)), chi2.sf(squares, n), chi2.cdf(squares, n)])
            worst = int(chances.min(axis=0).argmin())
            # All latents together tell of small differences that no single one does.
            total = 2 * min(chi2.sf(squares.sum(), z.size), chi2.cdf(squares.sum(), z.size))
            wrong = min(chances.size * chances.min(), total) < _CHANCE
        if wrong:
            raise DataError(f"The fields of the data are no draws of the prior behind the basis: over {n} of them "
                            f"latent {worst} has mean {z[:, worst].mean():.3g} and mean square "
                            f"{squares[worst] / n:.3g}, where 0 and 1 are due. Compute the basis from the prior of the "
                            "simulation, or take pod(V, data.coefficients, r) where that prior is not known.")

    def __repr__(self) -> str:
        turned = "" if self.turn is None else f"directions of {len(self.variances)} "
        return (f"ModalBasis: {self.r} {turned}{'Karhunen-Loeve' if self.standard_prior else 'POD'} modes with "
                f"{self.retained:.2%} of the variance, {self.V.dim()} unknowns"
                f"{f', of {self.prior}' if self.prior else ''}")

    def __reduce_ex__(self, protocol: object) -> None:
        raise InputError("A ModalBasis holds a mesh and cannot be copied or pickled: use its save, and load_basis.")

    def save(self, path: str | os.PathLike) -> None:
        """Write mean and modes to a file, from which `load_basis` reads them on any number of ranks.

        A transform or a prior is code, not data, and is not written; that there is one is. Nor is the mesh. The file is
        written whole or not at all; FileError if it cannot be written.
        """
        arrays, values = pack_basis(self, "basis")
        on_root(self.V.comm, lambda: files.write(path, "basis", arrays, values))


def pack_basis(basis: ModalBasis, name: str) -> tuple[dict, dict]:
    """Arrays, on rank 0, and values of a file that holds a basis under a name."""
    V = basis.V
    arrays = {"key": gather_keys(V), "mean": gather_rows(V, coefficients(basis.mean)[None]),
              "modes": gather_rows(V, basis.modes), "variances": basis.variances}
    if basis.turn is not None:
        arrays["turn"] = basis.turn
    values = {"element": element_of(V), "total_variance": basis.total_variance, "weights": basis.weights,
              "transformed": basis.prior is not None and basis.prior.core is not basis.prior,
              "standard_prior": basis.standard_prior}
    arrays, values = ({f"{name}.{key}": x for key, x in part.items()} for part in (arrays, values))
    return arrays, values


def load_basis(path: str | os.PathLike, V: WithGeometry, prior: "Prior | None" = None) -> ModalBasis:
    """Read what `ModalBasis.save` wrote, for the same space V on the user's own mesh; no code in the file is run.

    Parameters
    ----------
    prior : Prior, optional
        The prior of the basis. It brings the transform, where there is one, and fills in modes past r; without it
        samples hold the modes of the basis alone.

    Raises
    ------
    InputError
        If the fields of the prior are in another space, or the basis has a transform and there is no prior to bring it.
    FileError
        If the file is damaged, foreign, holds no basis, or belongs to another mesh, space or prior.
    """
    check_kind(V, "V", WithGeometry, "the space of the basis")
    if prior is not None and prior.core.V != V:
        raise InputError(f"prior is of type {type(prior).__name__} and its fields are not in V: give the basis's own.")
    return unpack_basis(read_everywhere(V.comm, path, "basis", "Write one with ModalBasis.save."), "basis", V, prior)


def unpack_basis(content: files.Content, name: str, V: WithGeometry, prior: "Prior | None" = None) -> ModalBasis:
    """The basis under a name in a file; raises as `load_basis`."""
    columns = own_columns(content, f"{name}.key", f"{name}.element", V)
    variances, size = content.array(f"{name}.variances", None), len(content.arrays[f"{name}.key"])
    mean, modes = content.array(f"{name}.mean", 1, size), content.array(f"{name}.modes", len(variances), size)
    weights, total = content.value(f"{name}.weights", list, type(None)), content.value(f"{name}.total_variance", float)
    weighted = weights is None or (len(weights) == len(V) and all(type(x) is float and 0 < x < np.inf for x in weights))
    falling = len(variances) > 0 and (variances > 0).all() and (np.diff(variances) <= 1e-6 * variances[0]).all()
    if not falling or not weighted or not (1 - 1e-6) * variances.sum() <= total < np.inf:
        raise content.error("holds no modes of positive variance, largest first")
    transformed, standard = (content.value(f"{name}.{key}", bool) for key in ("transformed", "standard_prior"))
    if transformed and (prior is None or prior.core is prior):
        raise InputError("The parameter of the basis in the file is a transform of its field, which is code and not in "
                         "the file: pass the TransformedPrior.")
    basis = ModalBasis(V, field(V, mean[0, columns], name="mean"), modes[:, columns], variances, float(total), prior,
                       standard and prior is not None, weights and tuple(weights))
    if basis.standard_prior and not is_of(basis, prior):
        raise FileError(f"{content.path} belongs to another prior: pass the prior with which it was made.")
    if not np.allclose(basis.encode(basis.decode(np.eye(basis.r))), np.eye(basis.r), rtol=0, atol=1e-6):
        raise content.error("holds modes that are not orthonormal on this mesh")
    if f"{name}.turn" not in content.arrays:
        return basis
    turn = content.array(f"{name}.turn", len(variances), None)
    if not turn.size or not np.allclose(turn.T @ turn, np.eye(turn.shape[1]), rtol=0, atol=1e-8):
        raise content.error("holds a rotation of latents that is none")
    return replace(basis, turn=turn)


def is_of(basis: ModalBasis, prior: "Prior | None") -> bool:
    """Whether mean and modes are those of a prior, up to what modes are converged to."""
    comm, mean = basis.V.comm, coefficients(basis.mean)
    core: Any = getattr(prior, "core", None)
    if not (hasattr(core, "mean") and hasattr(core, "apply_covariance")):
        return False
    off = largest(comm, mean - coefficients(core.mean))
    dual = mass_action(basis.V, basis.weights)(basis.modes)
    # As the modes see it, the covariance is diagonal.
    seen, unit = comm.allreduce(dual @ core.apply_covariance(dual).T), np.sqrt(basis.variances)
    same = np.abs(seen / unit / unit[:, None] - np.eye(len(unit))).max() < _SAME
    return bool(same) and off <= 1e-6 * largest(comm, basis.scaled_modes) + 1e-9 * largest(comm, mean)
