"""A page for people who decide: what the samples say, whether they can be trusted, and how they came about.

One HTML file that needs no network: pictures are inside, there are no scripts, and it can be read on a phone and
printed.
"""

import contextlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fem_diffusion import files
from fem_diffusion.checks import (
    alike, check_count, check_file, check_flag, check_kind, check_number, check_seed, check_text,
)
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.measurements.measurements import Measurements
from fem_diffusion.page import words
from fem_diffusion.page.picture import picture_of
from fem_diffusion.page.template import check_template, render
from fem_diffusion.problem import InverseProblem
from fem_diffusion.samples import Samples
from fem_diffusion.trust.asked import check_places
from fem_diffusion.trust.check import Check, check
from fem_diffusion.trust.cross import CrossValidation
from fem_diffusion.trust.findings import Asked, Unknown, findings, readings

__all__ = ["report"]

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_DRAWS = 1000
_LEAST = 30     # solves of a check
# What a reader sees first; the shape beside the colour tells it to those who see no colours.
_LIGHTS = {"green": "Trustworthy", "yellow": "Take care", "red": "Do not rely on it", "grey": "Not checked"}


@dataclass(frozen=True)
class Verdict:
    """A light, its word, and what it means in sentences."""

    light: str
    word: str
    sentences: tuple[str, ...]


def report(posterior: Any, path: str | os.PathLike, *, threshold: float | Sequence[float | None] | None = None,
           samples: Samples | None = None, check: Check | bool | None = None, cross: CrossValidation | None = None,
           measurements: Measurements | None = None, question: str | None = None, title: str | None = None,
           name: str | Sequence[str] | None = None, units: str | Sequence[str | None] | None = None,
           mesh_units: str | None = None, reading: str = "reading", lines: Sequence | np.ndarray | None = None,
           boundaries: Sequence[int | str] = (), slices: Sequence[tuple[str, float]] | None = None,
           draws: int | None = None, solves: int = 50, seed: int = 0, progress: bool = True) -> Path:
    """Write a page about a posterior: the question, maps or bands, readings, a verdict, and what was run (collective).

    Parameters
    ----------
    posterior : Posterior, ExactPosterior, ...
        Any with ``problem`` and ``sample``.
    path : path
        Of the page, such as ``"report.html"``; rank 0 writes it, whole or not at all.
    threshold : float, or sequence of float or None, optional
        The probability that the unknown (the magnitude, for vectors) exceeds it is told; one for each of several
        unknowns.
    samples : Samples, optional
        Those that the page shows, such as corrected ones; `draws` of them are drawn where left out, 1,000 or as many as
        there are.
    check : Check or bool, optional
        The verdict; the check is made where left out, unless the samples are corrected, and False leaves it out.
    cross : CrossValidation, optional
        What the sensors say of each other, from ``cross_validate``.
    measurements : Measurements, optional
        Those that the measurement is one of: what was found in their file is told.
    question, title : str, optional
        What is to be decided, in a sentence, and the heading.
    name, units : str, or sequence of them, optional
        Of the unknown, or of each of several; the names of their spaces where left out.
    mesh_units, reading : str, optional
        Unit of lengths, and what the sensors measure, with its unit.
    lines : sequence of array_like of shape (2, gdim), optional
        Ends of lines along which bands are drawn, in the mesh; a line through the middle where left out.
    boundaries : sequence of int or str
        Markers of boundaries of a plane mesh along which bands are drawn.
    slices : sequence of tuple of str and float, optional
        Planes of maps in three dimensions, such as ("z", 0.5); the three through the middle where left out.
    solves : int
        Of the predicted readings, and of the check, 30 at least.
    progress : bool
        Show progress bars.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    InputError
        If an argument is of the wrong kind, a line, boundary or slice is not there or of no unknown, or the posterior
        has no samples for this measurement.
    FileError
        If the page cannot be written.
    InstallError
        If Jinja2 is not installed.
    """
    start = time.perf_counter()
    problem = check_kind(getattr(posterior, "problem", None), "posterior.problem", InverseProblem,
                         "a posterior such as model.condition(y), exact(problem, y) or hmc(problem, y, seed=1)")
    comm = problem.comm
    path = on_root(comm, lambda: check_file(path))
    on_root(comm, check_template)
    seed, solves, draws = alike(comm, lambda: {
        "seed": check_seed(seed), "solves": check_count(solves, "solves", least=2),
        "draws": None if draws is None else check_count(draws, "draws", least=2)})
    progress = check_flag(progress, "progress")
    for label, text in (("question", question), ("title", title), ("mesh_units", mesh_units)):
        check_kind(text, label, (str, type(None)), "a string")
    _label(reading, "reading")
    given, reason = samples is not None, None
    if samples is None:
        samples = _drawn(posterior, draws, seed, progress)
    elif check_kind(samples, "samples", Samples, "what sample or correct returned").V != problem.M:
        raise InputError("The samples are of another space than the posterior: give samples of this problem.")
    if len(samples) < 2:
        raise InputError("A report needs at least 2 samples: draw more.")
    unknowns = _unknowns(samples, name, units, threshold)
    check_places([samples.component(i).V for i in range(len(unknowns))], lines, boundaries, slices)
    certificate = getattr(samples, "certificate", None)
    check_kind(cross, "cross", (CrossValidation, type(None)), "what cross_validate returned")
    check_kind(measurements, "measurements", (Measurements, type(None)), "what read_measurements returned")
    check_kind(check, "check", (Check, bool, type(None)), "what posterior.check() returned, or False")
    if check is True or check is None and certificate is None:
        found, reason = _checked(posterior, solves, seed)
    else:
        found = check or None
    asked = Asked(question is not None, mesh_units, lines, boundaries, slices, problem.observation)
    parts = [findings(samples.component(i), unknown, asked, problem, i, seed) for i, unknown in enumerate(unknowns)]
    seen = readings(posterior, samples, None if given else found, reading, solves, seed)
    facts = _facts(posterior, samples, given, found, certificate, seen, seed, time.perf_counter() - start)
    names = " and ".join(unknown.name for unknown in unknowns)
    page = {"title": title or f"What the readings tell of the {names}",
            "question": question or _question(unknowns, problem), "verdict": _verdict(found, certificate, reason),
            "parts": parts, "readings": seen, "agreement": None if cross is None else _agreement(cross),
            "origin": () if measurements is None else str(measurements).replace("\n- ", "\n").split("\n"),
            "certificate": certificate, "facts": facts,
            "certificate_rows": [] if certificate is None else _certificate(certificate)}
    on_root(comm, lambda: files.write_bytes(path, render(_TEMPLATE, page).encode()))
    return path


def _agreement(cross: CrossValidation) -> dict[str, Any]:
    """What the sensors say of each other."""
    picture = picture_of(cross.plot(), "Sensors beside what the others let expect", str(cross), wide=True)
    return {"sentences": cross.sentences, "times": len(cross.times), "picture": picture}


def _drawn(posterior: Any, draws: int | None, seed: int, progress: bool) -> Samples:
    """Samples of a posterior, as many as it has where that is less than usual."""
    held = getattr(posterior, "draws", None)
    most = len(held) if isinstance(held, Samples) else _DRAWS
    n = min(_DRAWS, most) if draws is None else draws
    more: dict[str, Any] = {} if isinstance(held, Samples) or not hasattr(posterior, "conditioned") else {
        "progress": progress}
    return posterior.sample(n, seed=seed, **more)


def _checked(posterior: Any, solves: int, seed: int) -> tuple[Check | None, str | None]:
    """What `check` says of a posterior; None where it cannot say anything, and why."""
    try:
        return check(posterior, solves=max(_LEAST, solves), seed=seed), None
    except (InputError, SolveError) as error:
        return None, str(error)


def _unknowns(samples: Samples, name: Any, units: Any, threshold: Any) -> list[Unknown]:
    """Name, unit and threshold of each unknown."""
    count = len(samples.V)

    def each(given: Any, label: str) -> list:
        if isinstance(given, (list, tuple, np.ndarray)):
            if len(given) != count:
                raise InputError(f"{label} has {len(given)} entries and there are {count} unknowns: give one for each.")
            return list(given)
        if count > 1 and given is not None:
            raise InputError(f"There are {count} unknowns: give {label} as a sequence, one for each.")
        return [given] * count
    names = each(name, "name")
    if name is None:
        names = [W.name or (f"unknown {i}" if count > 1 else "unknown") for i, W in enumerate(samples.V)]
    parts = zip(names, each(units, "units"), each(threshold, "threshold"))
    return [Unknown(_label(n, "name"), check_kind(u, "units", (str, type(None)), "a string"),
                    None if t is None else check_number(t, "threshold")) for n, u, t in parts]


def _label(text: Any, name: str) -> str:
    """What something is called, which a page cannot do without."""
    if not check_text(text, name).strip():
        raise InputError(f"{name} is empty: give a word, such as 'conductivity', or leave it out.")
    return text


def _question(unknowns: Sequence[Unknown], problem: InverseProblem) -> str:
    """What is asked where the user has not said it."""
    names = " and the ".join(unknown.name for unknown in unknowns)
    count = "the readings" if problem.k is None else f"{words.counted(problem.k)} noisy readings"
    limits = [f"exceed {words.given(u.threshold, u.units)}" if len(unknowns) == 1 else
              f"the {u.name} exceed {words.given(u.threshold, u.units)}" for u in unknowns if u.threshold is not None]
    more = f" Does {'it ' if len(unknowns) == 1 else ''}{', and does '.join(limits)}?" if limits else ""
    return f"What {'is' if len(unknowns) == 1 else 'are'} the {names}, given {count}?{more}"


def _verdict(check: Any, certificate: Any, reason: str | None) -> Verdict:
    """The light of a check; of corrected samples without one the certificate speaks."""
    if check is not None:
        word = _LIGHTS[check.light]
        if check.verdict == "trustworthy":
            word = "Trustworthy, with care" if check.light == "yellow" else word
        else:
            word = f"{word}: {check.verdict}"
        return Verdict(check.light, word, check.sentences)
    if certificate is not None:
        why = {"red": ": the measurement conflicts with the problem", "yellow": ", with care", "green": ""}
        unseen = f"{words.number(certificate.unseen, 'noise standard deviations', 2)}"
        blind = (f"Modes that are drawn from the prior add up to {unseen} to a reading, whatever the data say of "
                 "them: fit with more modes.",) * certificate.blind
        return Verdict(certificate.light, f"Corrected{why[certificate.light]}", (
            *certificate.notes, *blind, "These samples were corrected with the forward model itself: they are samples "
            "of the finite element posterior, as far as the certificate below tells."))
    return Verdict("grey", _LIGHTS["grey"], (
        "Nobody has checked whether these samples can be trusted for this measurement"
        + (": run check, some 50 solves." if reason is None else f". {reason}"),))


def _certificate(certificate: Any) -> list[tuple[str, str]]:
    """Rows of the certificate."""
    rows = [("Method", certificate.method), ("Forward solves", words.counted(certificate.solves)),
            ("Adjoint solves", words.counted(certificate.pulls)),
            ("Evaluations that the samples are made of", words.counted(certificate.draws)),
            ("Effective sample size", words.number(certificate.ess)),
            ("Largest shift of a mean", words.number(certificate.mean_shift, "posterior standard deviations", 2)),
            ("Standard deviations, corrected over amortised", words.number(certificate.std_ratio, digits=2)),
            ("Unseen modes in a reading, at most", words.number(certificate.unseen, "noise standard deviations", 2)),
            ("Time", words.seconds(certificate.seconds))]
    for label, value, digits in (("Pareto k (at most 0.7 is fine)", certificate.khat, 2),
                                 ("R-hat (at most 1.01 is fine)", certificate.rhat, 4)):
        if value is not None:
            rows.insert(-1, (label, words.number(value, digits=digits)))
    if certificate.acceptance is not None:
        rows.insert(-1, ("Accepted proposals", words.percent(certificate.acceptance)))
    return rows


def _facts(posterior: Any, samples: Samples, given: bool, check: Any, certificate: Any, seen: Mapping | None,
           seed: int, duration: float) -> list[tuple[str, str]]:
    """What was run, as rows of a table."""
    problem = posterior.problem
    cells = problem.comm.allreduce(next(iter(problem.M)).mesh().cell_set.size)
    solves = [(f"{words.counted(n)} for {what}", n) for n, what in (
        (0 if certificate is None else certificate.solves, "the correction"),
        (0 if check is None else check.solves, "the check"), (0 if seen is None else seen["solves"], "the predictions"))
        if n]
    origin = "given" if given else f"drawn with seed {seed}"
    return [("Posterior", str(posterior).split("\n")[0]), ("Problem", str(problem)),
            ("Unknown", f"{words.counted(problem.M.dim())} numbers in {problem.M.ufl_element()} on "
                        f"{words.counted(cells)} cells"),
            ("Samples", f"{words.counted(len(samples))}, {origin}"),
            ("Seed", str(seed)), ("Forward solves", "; ".join(text for text, _ in solves) or "none"),
            ("Time of this report", words.seconds(duration)),
            ("MPI ranks", str(problem.comm.size)), *_versions()]


def _versions() -> list[tuple[str, str]]:
    """What was running."""
    from petsc4py import PETSc

    found = []
    for name, package in (("fem_diffusion", "fem_diffusion"), ("Firedrake", "firedrake"), ("PyTorch", "torch"),
                          ("NumPy", "numpy")):
        with contextlib.suppress(PackageNotFoundError):
            found.append((name, version(package)))
    return [*found, ("PETSc", ".".join(map(str, PETSc.Sys.getVersion()))), ("Python", platform.python_version())]
