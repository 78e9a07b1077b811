"""Bases of fields: Karhunen-Loeve modes of Gaussian priors, and proper orthogonal decomposition of samples."""

from collections.abc import Sequence

import numpy as np
from firedrake import DirichletBC, Function
from firedrake.functionspaceimpl import WithGeometry
from scipy.linalg import block_diag

from fem_diffusion.checks import check_all, check_count, check_number
from fem_diffusion.errors import InputError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.checks import check_rows, check_space
from fem_diffusion.fields.coefficients import by_component, coefficients, field, largest
from fem_diffusion.fields.modes import Covariance, leading_modes, sample_covariance, without_conditions
from fem_diffusion.prior.product import ProductPrior
from fem_diffusion.prior.protocol import GaussianCore, Prior, check_prior

__all__ = ["karhunen_loeve", "pod"]


def karhunen_loeve(prior: Prior, r: int | Sequence[int] | None = None, retained: float = 0.999,
                   most: int | None = None) -> ModalBasis:
    """Leading modes of a Gaussian prior's covariance, matrix-free through its covariance operator.

    How many modes a posterior needs is for the readings to say, not for the prior: `fit` without a basis takes as many
    as they can tell from their noise, ``karhunen_loeve(prior).leading(r)``, and draws the rest from the prior.

    Parameters
    ----------
    prior : Prior
        The prior; of a transformed one the Gaussian field inside is expanded, of a product each component by itself.
    r : int or sequence of int, optional
        Number of modes, of a product for each component; where left out, the fewest that keep `retained` of the
        variance (of each component).
    retained : float
        Share of the total variance to keep where `r` is left out.
    most : int, optional
        So many modes (of each component) at most where `r` is left out, whatever they keep.

    Raises
    ------
    InputError
        If `r` exceeds the degrees of freedom or is not one number for each component, `retained` is not between 0 and
        1, `most` no positive integer, or the prior (a component of it) is not Gaussian before its transform.
    """
    retained = check_number(retained, "retained", above=0, below=1)
    most = None if most is None else check_count(most, "most")
    core = check_prior(prior).core
    if isinstance(core, ProductPrior):
        counts = [None] * len(core.priors) if r is None else _counts(r, len(core.priors))
        parts = [karhunen_loeve(part, count, retained, most) for part, count in zip(core.priors, counts)]
        expansions = [(part.modes, part.variances, part.total_variance) for part in parts]
        return _joined(core.V, core.mean, expansions, prior, standard=True)
    if not isinstance(core, GaussianCore):
        raise InputError(f"A {type(core).__name__} has no covariance operator: use pod with samples of it.")
    r = None if r is None else check_count(r, "r, one number of modes for one unknown,")
    V, mean = core.V, coefficients(core.mean)
    covariance = Covariance(core.apply_covariance, lambda n, seed: core.sample_many(n, seed) - mean)
    modes, variances, total = leading_modes(covariance, V, core.bcs, r, retained=retained, most=most)
    return ModalBasis(V, core.mean, modes, variances, total, prior, standard_prior=True)


def pod(V: WithGeometry, samples: Sequence[Function] | np.ndarray, r: int | Sequence[int],
        bcs: DirichletBC | Sequence[DirichletBC] = (), prior: Prior | None = None) -> ModalBasis:
    """Leading modes of the sample covariance in the mass inner product, for priors that are not Gaussian.

    Parameters
    ----------
    samples : sequence of Functions, or numpy.ndarray of shape (n, n_owned)
        Fields in V of the prior, before any transform; `total_variance` of the basis is theirs.
    r : int or sequence of int
        Number of modes; with one for each component of a mixed V, each is expanded by itself, in its own units.
    bcs : sequence of DirichletBC
        Conditions that every sample satisfies; the modes then vanish there exactly.
    prior : Prior, optional
        The prior, for its transform; needed where it has one.

    Raises
    ------
    InputError
        If there are too few samples, a sample is not finite or violates a condition, or `r` is not one number for each
        component.
    """
    check_space(V)
    if prior is not None and check_prior(prior).core.V != V:
        raise InputError("The fields of prior are not in V: give the prior of the samples.")
    if not isinstance(samples, np.ndarray):
        samples = coefficients(list(check_all(samples, "samples", Function)))
    whole = not isinstance(r, Sequence)
    counts = [check_count(r, "r")] if whole else _counts(r, len(V))
    bcs = check_all((bcs,) if isinstance(bcs, DirichletBC) else bcs, "bcs", DirichletBC, "DirichletBC objects")
    samples = check_rows(samples, V, "samples")
    if len(samples) <= max(counts):
        raise InputError(f"{len(samples)} samples cannot give {r} modes: simulate more or ask for fewer modes.")
    mean = field(V, samples.mean(axis=0), name="mean")
    for bc in bcs:
        bc.apply(mean)
    deviations = samples - coefficients(mean)
    centred = without_conditions(V, bcs, deviations)
    # Each component in its own units.
    for wrong, right in zip(by_component(V, deviations - centred), by_component(V, centred)):
        violation = largest(V.comm, wrong)
        if violation > 1e-8 * max(largest(V.comm, right), 1e-300):
            raise InputError(f"The samples violate the boundary conditions by {violation:.2g}: pass the bcs they "
                             "satisfy.")
    # The samples satisfy the conditions, and so do the modes of components, their combinations.
    parts: list[tuple[np.ndarray, np.ndarray, float]] = []
    for W, part, count in [(V, centred, counts[0])] if whole else zip(V, by_component(V, centred), counts):
        parts.append(leading_modes(sample_covariance(W, part), W, bcs if whole else (), count))
    return ModalBasis(V, mean, *parts[0], prior) if whole else _joined(V, mean, parts, prior, standard=False)


def _counts(r: int | Sequence[int], components: int) -> list[int]:
    """A number of modes for each component."""
    if not isinstance(r, Sequence) or len(r) != components:
        raise InputError(f"r is {r!r}: there are {components} components, give a number of modes for each.")
    return [check_count(count, "r") for count in r]


def _joined(V: WithGeometry, mean: Function, parts: list, prior: Prior | None, standard: bool) -> ModalBasis:
    """Basis of a mixed space from modes, variances and total variance of its components, in shares of variance."""
    totals = np.array([total for _, _, total in parts])
    modes = block_diag(*(modes * np.sqrt(total) for modes, _, total in parts))
    variances = np.concatenate([variances / total for _, variances, total in parts])
    order = np.argsort(-variances, kind="stable")
    return ModalBasis(V, mean, modes[order], variances[order], float(len(parts)), prior, standard,
                      tuple((1 / totals).tolist()))
