"""Bases of fields: Karhunen-Loeve modes of Gaussian priors, and proper orthogonal decomposition of samples.

All coefficient arrays are owned coefficients: float64, this rank's part of ``with f.dat.vec_ro as v: v.array``.
"""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
from firedrake import DirichletBC, Function
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI

from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.checks import check_all, check_count, check_kind, check_number
from fem_diffusion.fields.modes import (
    free_dofs, leading_modes, mass_action, sample_covariance, split, without_conditions,
)
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, field, owned_size

__all__ = ["karhunen_loeve", "pod"]

_TAIL_DRAWS = 64


def karhunen_loeve(prior, r: int | Sequence[int] | None = None, retained: float = 0.999) -> ModalBasis:
    """Leading modes of a Gaussian prior's covariance, matrix-free through its covariance operator.

    Parameters
    ----------
    prior : GaussianPrior, TransformedPrior or ProductPrior
        The prior; of a transformed one the Gaussian field inside is expanded, of a product each component by itself.
    r : int or sequence of int, optional
        Number of modes, of a product for each component; where left out, the fewest that keep `retained` of the
        variance (of each component).
    retained : float
        Share of the total variance to keep where `r` is left out.

    Returns
    -------
    ModalBasis

    Raises
    ------
    InputError
        If `r` exceeds the degrees of freedom or is not one number for each component, `retained` is not between 0 and
        1, or the prior (a component of it) is not Gaussian before its transform.
    """
    retained = check_number(retained, "retained", above=0, below=1)
    gaussian = getattr(prior, "base", prior)
    transformed = prior is not gaussian
    transform = (prior.transform_many, prior.V) if transformed else (None, None)
    if hasattr(gaussian, "priors"):
        counts = _counts(r, len(gaussian.priors))
        parts = [karhunen_loeve(part, count, retained) for part, count in zip(gaussian.priors, counts)]
        if any(part.transform for part in parts):
            raise InputError("A transform of a product of transformed priors has no Karhunen-Loeve basis: put both "
                             "transforms into the outer one.")
        expansions = [(part.modes, part.variances, part.total_variance) for part in parts]
        return _joined(gaussian.V, gaussian.mean, expansions, gaussian, *transform)
    if not hasattr(gaussian, "apply_covariance"):
        raise InputError(f"A {type(gaussian).__name__} has no covariance operator: use pod with samples of it.")
    r = None if r is None else check_count(r, "r, one number of modes for one unknown,")
    mean = coefficients(gaussian.mean)
    mass = mass_action(gaussian.V)
    draws = gaussian.sample_many(_TAIL_DRAWS, seed=0) - mean
    size = r if r is not None else min(16, free_dofs(gaussian.V, gaussian.bcs))
    while True:
        modes, variances = leading_modes(gaussian.apply_covariance, gaussian.V, gaussian.bcs, size)
        # The tail is the mean square of what prior draws keep outside the modes.
        outside = draws - gaussian.V.comm.allreduce(draws @ mass(modes).T, MPI.SUM) @ modes
        tail = gaussian.V.comm.allreduce(float((outside * mass(outside)).sum()), MPI.SUM) / len(draws)
        total = float(variances.sum() + max(tail, 0.0))
        if r is not None:
            break
        enough = np.flatnonzero(np.cumsum(variances) >= retained * total)
        if len(enough):
            modes, variances = modes[:enough[0] + 1], variances[:enough[0] + 1]
            break
        size = min(2 * size, free_dofs(gaussian.V, gaussian.bcs))
    return ModalBasis(gaussian.V, gaussian.mean, modes, variances, total, gaussian, *transform)


def pod(V, fields, r: int | Sequence[int], bcs: Sequence[DirichletBC] = (), transform=None,
        parameter_space=None) -> ModalBasis:
    """Leading modes of the sample covariance in the mass inner product, for priors that are not Gaussian.

    Parameters
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Space of the fields.
    fields : sequence of Functions, or numpy.ndarray of shape (n, n_owned)
        Samples of the prior.
    r : int or sequence of int
        Number of modes; with one for each component of a mixed V, each is expanded by itself, in its own units.
    bcs : sequence of DirichletBC
        Conditions that every sample satisfies; the modes then vanish there exactly.
    transform, parameter_space
        As in `ModalBasis`, where the fields are those before a transform.

    Returns
    -------
    ModalBasis
        Its `total_variance` is that of the samples.

    Raises
    ------
    InputError
        If there are too few samples, a sample is not finite or violates a condition, or `r` is not one number for each
        component.
    """
    check_kind(V, "V", WithGeometry, "the space of the fields")
    if not isinstance(fields, np.ndarray):
        fields = coefficients(list(check_all(fields, "fields", Function)))
    counts = [check_count(r, "r")] if isinstance(r, Integral) else _counts(r, len(V))
    if None in counts:
        raise InputError(f"r is {r!r}: give the number of modes.")
    bcs = (bcs,) if isinstance(bcs, DirichletBC) else bcs
    if not isinstance(bcs, Sequence) or not all(isinstance(bc, DirichletBC) for bc in bcs):
        raise InputError(f"bcs is {bcs!r}: give a sequence of DirichletBC objects, () where there are none.")
    if not V.comm.allreduce(fields.ndim == 2 and fields.shape[1] == owned_size(V), MPI.LAND):
        raise InputError(f"The samples have shape {fields.shape}: give (n, {owned_size(V)}), owned coefficients.")
    if len(fields) <= max(counts):
        raise InputError(f"{len(fields)} samples cannot give {r} modes: simulate more or ask for fewer modes.")
    if fields.dtype.kind not in "biuf" or not V.comm.allreduce(bool(np.isfinite(fields).all()), MPI.LAND):
        raise InputError("The samples hold values that are not finite real numbers.")
    average = fields.mean(axis=0)
    mean = field(V, average, name="mean")
    for bc in bcs:
        bc.apply(mean)
    centred = fields - coefficients(mean)
    outside = centred - without_conditions(V, bcs, centred)
    centred = centred - outside
    # Each component in its own units.
    for wrong, right in zip(split(V, outside), split(V, centred)):
        violation, scale = (V.comm.allreduce(float(np.abs(x).max(initial=0.0)), MPI.MAX) for x in (wrong, right))
        if violation > 1e-8 * max(scale, 1e-300):
            raise InputError(f"The samples violate the boundary conditions by {violation:.2g}; pass the bcs they "
                             "satisfy.")
    if isinstance(r, Integral):
        return ModalBasis(V, mean, *_sample_modes(V, bcs, centred, r), None, transform, parameter_space)
    # The samples satisfy the conditions, and so do the modes, their combinations.
    parts = [_sample_modes(W, (), part, count) for W, part, count in zip(V, split(V, centred), counts)]
    return _joined(V, mean, parts, None, transform, parameter_space)


def _sample_modes(V, bcs, centred: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Modes, their variances and the total variance of centred samples (n, n_owned)."""
    covariance, total = sample_covariance(V, centred)
    return *leading_modes(covariance, V, bcs, r), total


def _counts(r, components: int) -> list:
    """A number of modes for each component, or None for each."""
    counts = [None] * components if r is None else r
    if not isinstance(counts, Sequence) or len(counts) != components:
        raise InputError(f"r is {r!r}: there are {components} components, give a number of modes for each.")
    return [None if count is None else check_count(count, "r") for count in counts]


def _joined(V, mean, parts: list, prior, transform, parameter_space) -> ModalBasis:
    """Basis of a mixed space from modes, variances and total variance of its components, in shares of variance."""
    totals = np.array([total for _, _, total in parts])
    blocks = []
    for i, (modes, _, total) in enumerate(parts):
        zeros = [np.zeros((len(modes), owned_size(W))) for W in V]
        blocks.append(np.hstack([*zeros[:i], modes * np.sqrt(total), *zeros[i + 1:]]))
    variances = np.concatenate([variances / total for _, variances, total in parts])
    order = np.argsort(-variances, kind="stable")
    return ModalBasis(V, mean, np.vstack(blocks)[order], variances[order], float(len(parts)), prior, transform,
                      parameter_space, tuple((1 / totals).tolist()))
