"""What corrected samples carry: how they were made, and how far they can be trusted."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from fem_diffusion.files import Content

__all__ = ["GOOD_ESS", "VISIBLE", "Certificate", "are_rough", "pack_certificate", "unpack_certificate"]

# Effective sample size below which, and R-hat above which samples are rough; what modes that are not seen may add to a
# reading, in standard deviations of its noise.
GOOD_ESS, _GOOD_RHAT, VISIBLE = 100.0, 1.05, 0.3
_LIGHTS = "green", "yellow", "red"


def are_rough(ess: float, rhat: float | None) -> bool:
    """Whether samples of an effective size and an R-hat are rough: few, or of chains that differ."""
    return ess < GOOD_ESS or rhat is not None and rhat > _GOOD_RHAT


@dataclass(frozen=True)
class Certificate:
    """How samples of the finite element posterior were made, from `Posterior.correct`.

    Parameters
    ----------
    method : str
        "weights", of amortised samples; "surrogate weights", of a surrogate's samples; "surrogate moves" or "gradient
        moves", of chains.
    solves, pulls, draws : int
        Forward solves, adjoint or tangent solves, and evaluations of the model that the samples are made of.
    ess : float
        Smallest effective sample size, over latents and log likelihood.
    khat, rhat, acceptance : float or None
        Pareto tail index of the weights; largest rank-normalised R-hat, and share of accepted proposals, of the chains.
    mean_shift : float
        Largest shift of a latent's mean from the amortised samples, in standard deviations of the corrected ones.
    std_ratio : float
        Typical ratio of a latent's standard deviation, corrected over amortised: the geometric mean of those that the
        measurement tells something of.
    unseen : float
        Largest share, in noise standard deviations, that modes drawn from the prior have in any reading.
    seconds : float
        Wall time.
    notes : tuple of str
        What else a user should know, a sentence each.
    residuals : str
        "green" where the residuals of the samples are as noise; "yellow" where the noise is smaller than assumed, and
        "red" where the measurement is in conflict with the problem, which a note tells.
    """

    method: str
    solves: int
    pulls: int
    draws: int
    ess: float
    khat: float | None
    rhat: float | None
    acceptance: float | None
    mean_shift: float
    std_ratio: float
    unseen: float
    seconds: float
    notes: tuple[str, ...] = ()
    residuals: str = "green"

    @property
    def rough(self) -> bool:
        """Whether there are few effective samples, or chains that differ."""
        return are_rough(self.ess, self.rhat)

    @property
    def blind(self) -> bool:
        """Whether modes that are drawn from the prior add much to a reading."""
        return self.unseen > VISIBLE

    @property
    def light(self) -> str:
        """That of the residuals; "yellow" at best where the samples are rough or blind."""
        return "yellow" if self.residuals == "green" and (self.rough or self.blind) else self.residuals

    def __str__(self) -> str:
        pulls = f" and {self.pulls:,} adjoint solves" if self.pulls else ""
        figures = [f"effective sample size {self.ess:,.0f}"]
        figures += [] if self.khat is None else [f"Pareto k {self.khat:.2f}"]
        figures += [] if self.rhat is None else [f"R-hat {self.rhat:.3f}"]
        figures += [] if self.acceptance is None else [f"{self.acceptance:.0%} of the proposals accepted"]
        words = (f"Corrected by {self.method} with the forward model: {self.solves:,} solves{pulls} in "
                 f"{self.seconds:.0f} s; {', '.join(figures)}. Means moved by up to {self.mean_shift:.2g} posterior "
                 f"standard deviations, standard deviations are {self.std_ratio:.2f} times those of the amortised "
                 "samples.")
        if self.unseen > 1e-3:
            words += f" Modes drawn from the prior add up to {self.unseen:.2g} noise standard deviations to a reading."
        return " ".join([words, *self.notes])


def pack_certificate(certificate: Certificate | None) -> dict[str, Any] | None:
    """As a file's setting."""
    return certificate and {**asdict(certificate), "notes": list(certificate.notes)}


def unpack_certificate(content: Content, name: str) -> Certificate | None:
    """The certificate under a name in a file, or None where there is none; FileError where it is not one."""
    if content.values.get(name) is None:
        return None
    part = Content(content.path, content.remedy, {}, content.value(name, dict))
    kinds = {"notes": (list,), **{key: (str,) for key in ("method", "residuals")},
             **{key: (int,) for key in ("solves", "pulls", "draws")},
             **{key: (float, type(None)) for key in ("khat", "rhat", "acceptance")}}
    found = {field.name: part.value(field.name, *kinds.get(field.name, (float,))) for field in fields(Certificate)}
    if not all(isinstance(note, str) for note in found["notes"]):
        raise content.error("holds notes of a certificate that are no text")
    if found["residuals"] not in _LIGHTS:
        raise content.error("holds residuals of a certificate that are neither green, yellow nor red")
    return Certificate(**{**found, "notes": tuple(found["notes"])})
