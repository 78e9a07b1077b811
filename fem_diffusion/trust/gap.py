"""How far amortised samples are from the posterior of one measurement: what a correction closes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from firedrake import Function

from fem_diffusion.checks import check_kind
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.fields.modes import mass_action
from fem_diffusion.samples import Samples

__all__ = ["Gap", "amortised_gap", "tell_gaps"]


@dataclass(frozen=True)
class Gap:
    """Amortised samples of one measurement beside its posterior; from `amortised_gap`.

    Parameters
    ----------
    mean, std : float
        Distance of the means over the size of the posterior standard deviation, and ratio of the sizes of the standard
        deviations, amortised over posterior; sizes are L2 norms over the domain.
    chance : float
        What so many samples make of the first by themselves.
    """

    mean: float
    std: float
    chance: float

    def __str__(self) -> str:
        return tell_gaps([self])


def amortised_gap(samples: Samples, mean: Function, std: Function) -> Gap:
    """Compare amortised samples with mean and standard deviation of the posterior at their measurement (collective).

    The latter are those of `exact`, `hmc`, or corrected samples, in the space of the samples. InputError if they are
    not, there are fewer than two samples, or the parameter has several components: compare each, `component(i)`.
    """
    check_kind(samples, "samples", Samples, "what posterior.sample returns")
    V = samples.V
    if len(V) > 1:
        raise InputError(f"The samples have {len(V)} components, in units of their own: compare each, component(i).")
    for name, f in (("mean", mean), ("std", std)):
        W = check_kind(f, name, Function, f"{name}() of the posterior").function_space()
        if W.mesh() is not V.mesh() or W.ufl_element() != V.ufl_element():
            raise InputError(f"{name} is in {W.ufl_element()} on {W.mesh()}, the samples are in {V.ufl_element()} on "
                             f"{V.mesh()}: give both in one space.")
    mass = mass_action(V)

    def size(x: np.ndarray) -> float:
        return float(np.sqrt(V.comm.allreduce(float((mass(x[None])[0] * x).sum()))))
    theirs = size(coefficients(std))
    if not theirs > 0:
        raise InputError("The standard deviation of the posterior is zero: there is nothing to compare with.")
    ours = size(coefficients(samples.std()))
    return Gap(size(coefficients(samples.mean()) - coefficients(mean)) / theirs, ours / theirs, len(samples)**-0.5)


def tell_gaps(gaps: Sequence[Gap]) -> str:
    """One sentence for the gaps of one measurement or of several: root mean squares, and the largest."""
    mean, ratio = np.array([gap.mean for gap in gaps]), np.array([gap.std for gap in gaps])
    chance = f"{gaps[0].chance:.2g} is what so few samples make by themselves"
    if len(gaps) == 1:
        return (f"Amortised against the posterior of this measurement: mean off by {mean[0]:.2g} posterior standard "
                f"deviations ({chance}), standard deviation {ratio[0]:.2f} times the posterior's.")
    return (f"Amortised against the posteriors of these {len(gaps)} measurements: means off by "
            f"{np.sqrt((mean**2).mean()):.2g} posterior standard deviations (root mean square; {chance}), by "
            f"{mean.max():.2g} at most; standard deviations {ratio.min():.2f} to {ratio.max():.2f} times the "
            "posteriors'.")
