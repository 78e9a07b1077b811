"""What a report says of each unknown and of the readings: sentences and pictures, the same on all ranks but pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from firedrake import FunctionSpace, TestFunction, TrialFunction, assemble, dx, interpolate
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from scipy.special import ndtr

from fem_diffusion.checks import stream
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import bounding_box, by_component, coefficients, is_real, multiply
from fem_diffusion.observation.linear import Observation
from fem_diffusion.page import words
from fem_diffusion.page.picture import Picture, new_figure, picture_of
from fem_diffusion.plot.places import nodes_of
from fem_diffusion.plot.samples import nodal_values, plot_samples
from fem_diffusion.problem import InverseProblem
from fem_diffusion.samples import Samples
from fem_diffusion.trust.inline import readings_picture

__all__ = ["Asked", "Unknown", "findings", "readings"]

_BEFORE = 100       # prior samples that tell what was known before
_QUANTILES = 0.05, 0.95
_ROWS = 40          # of the table of readings


@dataclass(frozen=True)
class Unknown:
    """Name, unit and threshold of one unknown."""

    name: str
    units: str | None
    threshold: float | None

    def number(self, x: float) -> str:
        """A number with its unit."""
        return words.number(x, self.units)

    @property
    def limit(self) -> str:
        """The threshold with its unit."""
        return "" if self.threshold is None else words.given(self.threshold, self.units)


@dataclass(frozen=True)
class Asked:
    """What else a page is to show."""

    question: bool
    mesh_units: str | None
    lines: Any
    boundaries: Any
    slices: Any
    observation: Any


@dataclass(frozen=True)
class Part:
    """A section of the page: one unknown."""

    name: str
    sentences: tuple[str, ...]
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...]


def findings(samples: Samples, unknown: Unknown, asked: Asked, problem: InverseProblem, component: int,
             seed: int) -> Part:
    """The section of one unknown (collective)."""
    V = samples.V
    if is_real(V):
        sentences = _of_numbers(samples, unknown)
    else:
        before = problem.prior.sample_many(_BEFORE, stream(seed, "report"))
        sentences = _of_field(samples, unknown, by_component(problem.M, before)[component], asked)
    pictures, notes = _Drawing(samples, unknown, asked).all()
    return Part(unknown.name, tuple(sentences), tuple(pictures), tuple(notes))


def _of_numbers(samples: Samples, unknown: Unknown) -> list[str]:
    """Sentences about a few numbers."""
    comm, rows = samples.V.comm, samples.values
    values = np.concatenate(comm.allgather(rows), axis=1)
    found = []
    for i, column in enumerate(values.T[:12]):
        what = unknown.name if values.shape[1] == 1 else f"{unknown.name}, component {i},"
        low, high = np.quantile(column, [0.025, 0.975])
        text = (f"The {what} is {words.plus_minus(column.mean(), column.std(ddof=1), unknown.units)}, with 95 % "
                f"probability between {words.interval(low, high, unknown.units).replace(' to ', ' and ')}.")
        if unknown.threshold is not None:
            share = float((column > unknown.threshold).mean())
            text += f" It exceeds {unknown.limit} with a probability {_of(share, len(column))}."
        found.append(text)
    return found


def _of(share: float, n: int) -> str:
    """A probability after "probability": of 34 %, below 0.3 %."""
    text = words.chance(share, n)
    return text if text.startswith(("below", "above")) else f"of {text}"


def _of_field(samples: Samples, unknown: Unknown, before: np.ndarray, asked: Asked) -> list[str]:
    """Sentences about a scalar field, or about the magnitude of a vector field."""
    try:
        V, values, _ = nodal_values(samples.V, samples.values, None)
        before = nodal_values(samples.V, before, None)[1]
    except InputError:
        return [f"The {unknown.name} has no values at nodes to be told in words."]
    comm = V.comm
    if values.ndim == 3:
        values, before = np.linalg.norm(values, axis=2), np.linalg.norm(before, axis=2)
        unknown = replace(unknown, name=f"magnitude of the {unknown.name}")
    share = coefficients(assemble(TestFunction(V) * dx).riesz_representation("l2"))
    volume = comm.allreduce(share.sum())
    average = comm.allreduce(values @ share) / volume
    low, high = np.quantile(average, [0.025, 0.975])
    found = [f"Averaged over the domain the {unknown.name} is "
             f"{words.plus_minus(average.mean(), average.std(ddof=1), unknown.units)}, with 95 % probability between "
             f"{words.interval(low, high, unknown.units).replace(' to ', ' and ')}."]
    mean, std = values.mean(axis=0), values.std(axis=0, ddof=1)
    places = nodes_of(V)
    # Where conditions fix the unknown there is nothing to be known.
    free = std > 1e-9 * max(comm.allgather(std.max(initial=0.0)))
    extremes = {key: _extreme(comm, row, places, sign, asked.mesh_units) for key, row, sign in (
        ("least", mean, -1), ("most", mean, 1), ("best", np.where(free, std, np.inf), -1), ("worst", std, 1))}
    found.append(f"Its posterior mean lies between {unknown.number(extremes['least'][0])}, at {extremes['least'][1]}, "
                 f"and {unknown.number(extremes['most'][0])}, at {extremes['most'][1]}.")
    if np.isfinite(extremes["best"][0]):
        found.append(f"It is known least at {extremes['worst'][1]}, within a standard deviation of "
                     f"{unknown.number(extremes['worst'][0])}, and best at {extremes['best'][1]}, within "
                     f"{unknown.number(extremes['best'][0])}.")
    typical, prior = (float(np.sqrt(comm.allreduce((x.var(axis=0, ddof=1) * share).sum()) / volume))
                      for x in (values, before))
    if np.isfinite(prior) and prior > 0:
        found.append(f"The typical standard deviation is {unknown.number(typical)}; before the measurement it was "
                     f"{unknown.number(prior)}.")
    if unknown.threshold is not None:
        found += _exceeding(V, values, average, unknown)
    return found


def _extreme(comm: MPI.Comm, row: np.ndarray, places: np.ndarray, sign: int, unit: str | None) -> tuple[float, str]:
    """Smallest (sign -1) or largest value over all ranks, and where it is in words."""
    i = int(np.argmax(sign * row)) if len(row) else None
    mine = (-np.inf, 0.0, ()) if i is None else (sign * float(row[i]), float(row[i]), tuple(places[:, i].tolist()))
    _, value, place = max(comm.allgather(mine))
    return value, words.place(place, unit)


def _exceeding(V: WithGeometry, values: np.ndarray, average: np.ndarray, unknown: Unknown) -> list[str]:
    """Sentences about a threshold: anywhere, in the average, and on how much of the domain, by the middles of cells."""
    comm, n = V.comm, len(values)
    D = FunctionSpace(V.mesh(), "DG", 0)
    volumes = coefficients(assemble(TestFunction(D) * dx).riesz_representation("l2"))
    middles = multiply(assemble(interpolate(TrialFunction(V), D), mat_type="aij").petscmat, values)
    above = middles > unknown.threshold
    shares = comm.allreduce(above @ volumes) / comm.allreduce(volumes.sum())
    here = (values > unknown.threshold).any(axis=1) | above.any(axis=1)
    somewhere = float((comm.allreduce(here.astype(int)) > 0).mean())
    low, high = np.quantile(shares, [0.025, 0.975])
    part = "" if not shares.any() else f" The part of the domain where it does is {words.percent(shares.mean())}"
    if high > low:
        part += f", with 95 % probability between {words.percent(low)} and {words.percent(high)}"
    part += "." if part else ""
    return [f"The probability that the {unknown.name} exceeds {unknown.limit} somewhere is "
            f"{words.chance(somewhere, n)}; that its average does, "
            f"{words.chance(float((average > unknown.threshold).mean()), n)}.{part}"]


class _Drawing:
    """Pictures of one unknown, and what could not be drawn in words."""

    def __init__(self, samples: Samples, unknown: Unknown, asked: Asked) -> None:
        self.samples, self.unknown, self.asked = samples, unknown, asked
        self.pictures: list[Picture] = []
        self.notes: list[str] = []
        self.given: dict[str, Any] = {"threshold": unknown.threshold, "units": unknown.units}
        self.root = samples.V.comm.rank == 0
        self.name = unknown.name

    def all(self) -> tuple[list[Picture], list[str]]:
        """Draw what the unknown lives on (collective)."""
        V = self.samples.V
        mesh = V.mesh()
        if is_real(V):
            self._numbers()
            return self.pictures, self.notes
        self.given |= {"ylabel": self.name, "mesh_units": self.asked.mesh_units}
        points = self.asked.observation.points if isinstance(self.asked.observation, Observation) else None
        if points is not None and points.shape[1] == mesh.geometric_dimension and np.isfinite(points).all(axis=1).any():
            self.given["sensors"] = self.asked.observation
        if mesh.topological_dimension == 1:
            self._band("Along its length", {})
            return self.pictures, self.notes
        slices: Sequence = (None,)
        if mesh.geometric_dimension == 3:
            middle = np.mean(bounding_box(mesh), axis=0)
            slices = [("xyz"[i], float(middle[i])) for i in (2, 1, 0)]
            slices = slices if self.asked.slices is None else self.asked.slices
        drawn = [self._maps(where, first=i == 0) for i, where in enumerate(slices)]
        if any(drawn) and len(V.value_shape) == 0:
            self._bands()
        return self.pictures, self.notes

    def _attempt(self, draw: Callable[[], object], what: str) -> bool:
        """Whether something could be drawn; where there is no such picture, its reason becomes a note."""
        try:
            draw()
        except InputError as error:
            self.notes.append(f"{what} cannot be drawn: {error}")
            return False
        return True

    def _add(self, figure: Any, title: str, text: str, wide: bool = False) -> None:
        if self.root:
            self.pictures.append(picture_of(figure, title, text, wide))

    def _numbers(self) -> None:
        count = self.samples.V.dim()
        figures = [new_figure() for _ in range(min(count, 12))]
        if count > 12:
            return self.notes.append(f"Histograms of {count} numbers are left out: draw them with samples.plot().")
        self._attempt(lambda: plot_samples(self.samples, [figure.add_subplot() for figure in figures],
                                           xlabel=self.name, **self.given), "A histogram")
        for i, figure in enumerate(figures):
            title = self.name if count == 1 else f"{self.name}, component {i}"
            self._add(figure, title, f"Histogram of the samples of the {title}.")

    def _maps(self, where: Any, first: bool) -> bool:
        """Maps, of a slice or the whole; whether they could be drawn."""
        limit = self.unknown.limit
        titles = {"mean": ("Mean", f"Map of the posterior mean of the {self.name}."),
                  "std": ("Standard deviation", f"Map of how uncertain the {self.name} is."),
                  "sample": ("One possible field", f"Map of one sample of the {self.name}."),
                  **{q: (f"{100 * q:g} % quantile", f"Map of what the {self.name} exceeds with a probability of "
                         f"{100 - 100 * q:g} %.") for q in _QUANTILES}}
        if self.unknown.threshold is not None:
            titles["more"] = (f"Probability of more than {limit}", f"Map of the probability that the {self.name} "
                              f"exceeds {limit}.")
        low, high = bounding_box(self.samples.V.mesh())
        shape = (high - low)[:2] if where is None else np.delete(high - low, "xyz".index(where[0]) if isinstance(
            where, tuple) and where and where[0] in tuple("xyz") else 0)
        figures = [new_figure(5.0, float(np.clip(0.8 + 3.6 * shape[1] / max(shape[0], 1e-300), 2.0, 6.0)))
                   for _ in titles]
        axes = [figure.add_subplot() for figure in figures]
        # The page says what is drawn: the colours need their unit only.
        given = self.given | {"ylabel": self.unknown.units or self.name, "units": None}
        given |= {} if where is None else {"slice": where}
        drawn = self._attempt(lambda: plot_samples(self.samples, axes, quantile=_QUANTILES, **given), "A map")
        for figure, ax, (key, (title, text)) in zip(figures, axes, titles.items()):
            if drawn and (first or key in ("mean", "std", "more")):
                place = "" if where is None else f", {where[0]} = {words.place([where[1]], self.asked.mesh_units)}"
                ax.set_title("")    # the page has it
                self._add(figure, title + place, text)
        return drawn

    def _bands(self) -> None:
        """Bands along lines and boundaries of a scalar field."""
        mesh, lines = self.samples.V.mesh(), self.asked.lines
        if lines is None:
            low, high = bounding_box(mesh)
            ends = np.tile((low + high) / 2, (2, 1))
            longest = int(np.argmax(high - low))
            ends[:, longest] = low[longest], high[longest]
            lines = [ends]
        for line in lines:
            text = " to ".join(words.place(end) for end in np.asarray(line))
            self._band(f"Along the line {text}", {"line": line})
        for marker in self.asked.boundaries:
            self._band(f"Along the boundary {marker}", {"boundary": marker})

    def _band(self, title: str, where: dict) -> None:
        limit = self.unknown.threshold is not None
        figure = new_figure(6.0, 4.6 if limit else 3.4)
        axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1)) if limit else figure.add_subplot()
        drawn = self._attempt(lambda: plot_samples(self.samples, axes, **self.given, **where), "A band")
        if drawn and self.root:
            first = figure.axes[0]
            if legend := first.get_legend():
                legend.remove()     # beside the curves there is room for it
            figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small",
                          frameon=False)
            self._add(figure, title, f"Mean, 95 % band and single samples of the {self.name}.", wide=True)


def readings(posterior: Any, samples: Samples, check: Any, label: str, solves: int, seed: int) -> dict | None:
    """Readings against what the samples predict; None where the posterior holds no measurement (collective)."""
    problem, used = posterior.problem, 0
    y = getattr(check, "y", None) if check is not None else getattr(posterior, "y", None)
    if y is None or problem.family or not len(y):
        return None
    y = np.asarray(y, dtype=float)
    if check is not None:
        clean, std = np.asarray(check.readings), np.broadcast_to(check.noise_std, y.shape)
        clean = clean[np.isfinite(clean).all(axis=1)]
    else:
        used = min(solves, len(samples))
        drawn = samples.values[np.linspace(0, len(samples) - 1, used).astype(int)]
        clean, std = problem.readings(drawn), np.zeros_like(y)
        if problem.noise is not None:
            known = torch.from_numpy(problem.beside_levels(clean, drawn))
            std = problem.noise.covariance(known).diagonal().sqrt().numpy()
    names = problem.names or tuple(f"reading {i}" for i in range(len(y)))
    total = np.sqrt(clean.var(axis=0, ddof=1) + std**2)
    off = (y - clean.mean(axis=0)) / np.where(total > 0, total, np.inf)
    p = 2 * ndtr(-np.abs(off))
    if check is not None and getattr(check, "sensor_p", None) is not None:
        p = np.asarray(check.sensor_p)
    outside = int((np.abs(off) > 1.96).sum())
    some = f"{words.counted(outside) if outside else 'None'} of {words.counted(len(y))} readings"
    text = (f"{some} {'lies' if outside < 2 else 'lie'} outside the 95 % interval that the samples predict; by chance "
            f"alone it would be about {words.tenths(0.05 * len(y))}.")
    order = np.arange(len(y)) if len(y) <= _ROWS else np.sort(np.argsort(p)[:_ROWS])
    rows = [{"number": int(i), "name": names[i], "measured": words.number(y[i]),
             "predicted": words.plus_minus(float(clean[:, i].mean()), float(total[i])),
             "off": words.tenths(off[i]), "word": _fit(float(p[i]))} for i in order]
    picture = None
    if problem.comm.rank == 0:
        shown = names if problem.names and not all(name.startswith("(") for name in names) else [
            str(i) for i in range(len(y))]
        picture = picture_of(readings_picture(y, clean, std, shown, label), "Readings and predictions",
                             "Each measured reading beside the interval that the samples predict.", wide=True)
    judged = "Fit judges each reading beside all others" if check is not None else "Fit judges each reading by itself"
    return {"sentence": text, "judged": f"{judged}: unusual below a probability of 5 %, conflicts below 0.1 %.",
            "rows": rows, "left_out": len(y) - len(rows), "picture": picture, "solves": used, "label": label}


def _fit(p: float) -> str:
    """How a reading fits, in a word."""
    return "conflicts" if p < 1e-3 else "unusual" if p < 0.05 else "fits"
