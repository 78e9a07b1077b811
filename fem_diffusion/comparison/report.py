"""What the rows of the comparison protocol say: means over seeds, steps to convergence, tables and pictures.

All functions take the rows of `run_protocol`. They raise InputError if those are none, or an argument is none of those
that the rows have, and FileError if there is no folder for a file; files are written as a whole or not at all.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fem_diffusion.checks import check_choice, check_count, check_file, check_number, check_text
from fem_diffusion.errors import InputError
from fem_diffusion.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Convergence", "convergence", "plot_costs", "plot_overview", "summarise", "write_csv", "write_markdown"]

_CELL = ("problem", "base", "formulation", "sampler", "budget")
_WORDS = ("problem", "base", "formulation", "sampler", "alpha", "coordinates", "nodes")
_FIXED = _CELL + ("alpha", "coordinates", "nodes", "evaluations", "seed", "seconds")
# Okabe and Ito's palette, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*Xh<>d"


def summarise(rows: Sequence[dict]) -> list[dict]:
    """Means over seeds, a line for each problem, base, formulation, sampler and budget, in order of appearance.

    A line holds the number of seeds, mean evaluations and seconds, the mean of every score, and as NAME_spread its
    standard deviation over the seeds. Columns sbc_p* hold p-values, which have no mean: the smallest times the number
    of seeds (Bonferroni), at most 1, and no spread.
    """
    rows, result = _checked(rows), []
    for key, group in _grouped(rows).items():
        scores = [name for name in group[0] if name not in _FIXED]
        line = dict(zip(_CELL, key)) | {"seeds": len(group)}
        for name in ("evaluations", "seconds", *scores):
            values = np.array([float(row[name]) for row in group])
            if name.startswith("sbc_p"):
                line[name] = min(1.0, len(values) * values.min())
                continue
            line[name] = values.mean()
            if name in scores and not name.endswith("_floor"):
                with np.errstate(invalid="ignore"):  # a score that is infinite has no spread
                    line[f"{name}_spread"] = values.std(ddof=1) if len(values) > 1 else math.nan
        result.append(line)
    return result


def _checked(rows: Iterable[dict], *scores: str) -> list[dict]:
    """The rows as a list: each with the columns of the protocol, the score, and what others of its problem have."""
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise InputError(f"rows is of type {type(rows).__name__}: give a list of dicts, of run_protocol.")
    rows = list(rows)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise InputError("There are no rows, or they are no dicts: give the list that run_protocol returned.")
    first = {}
    for number, row in enumerate(rows):
        missing = [name for name in _FIXED if name not in row]
        if missing or set(row) != set(first.setdefault(row["problem"], row)):
            raise InputError(f"Row {number} " + (f"lacks {', '.join(missing)}" if missing else "has other columns than "
                                                 "the first of its problem") + ": give rows of one run_protocol.")
        for name in row:
            if name not in _WORDS:
                try:
                    (int if name == "budget" else float)(row[name])
                except (TypeError, ValueError) as error:
                    raise InputError(f"Row {number} has {row[name]!r} for {name}: give a number.") from error
        for score in scores:
            check_choice(score, "score", [name for name in row if name not in _FIXED])
    return rows


def _choose(rows: list[dict], name: str, value: str, others: tuple[str, ...] = ()) -> None:
    """Refuse a choice that no row has made."""
    check_choice(value, name, [word for word in dict.fromkeys(row[name] for row in rows) if word not in others])


def _grouped(rows: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Rows by problem, base, formulation, sampler and budget."""
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _CELL[:-1]) + (int(row["budget"]),), []).append(row)
    return groups


def write_csv(rows: Sequence[dict], path: str | os.PathLike) -> None:
    """Write any dicts with the same names to a CSV file, numbers with four digits."""
    path, rows = check_file(path), list(rows) if isinstance(rows, Iterable) else []
    if not rows or not all(isinstance(row, Mapping) and row and list(row) == list(rows[0]) for row in rows):
        raise InputError("There are no rows, or they are no dicts with the same names: give a list of such.")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_bytes(path, text.getvalue().encode())


@dataclass(frozen=True)
class Convergence:
    """How one sampler approaches the converged error of its denoisers.

    `error` has for each budget the score's mean over seeds, divided by that of the converged sampler, or NaN where that
    one is not finite under any seed; `budget` is the smallest from which on the score stays within the tolerance.
    """

    error: dict[int, float]
    budget: int | None


def convergence(rows: Sequence[dict], score: str, *, reference: str = "adaptive",
                tolerance: float = 0.05) -> dict[tuple, Convergence]:
    """Budgets at which samplers come within a tolerance of the converged score.

    The comparison is seed by seed, on the same denoiser, over the seeds whose converged score is finite. The median
    difference must lie within the tolerance. To the mean difference two of its standard errors over seeds are granted
    beside the tolerance, but no more than the tolerance once again: nothing to an ODE sampler that starts from the
    reference's noise, the noise of its own samples to a stochastic one, and no pardon to one that fails now and then.

    Less is better in the score, a column of the rows; the tolerance is relative. The converged sampler, `reference`,
    needs rows for every problem and base, of which the largest budget counts. Keys of the result are (problem, base,
    formulation, sampler).
    """
    rows, tolerance = _checked(rows, score), check_number(tolerance, "tolerance", least=0)
    _choose(rows, "sampler", reference)
    groups = _grouped(rows)
    converged = {}
    for (problem, base, _, sampler, _), group in sorted(groups.items(), key=lambda item: item[0][-1]):
        if sampler == reference:
            converged[problem, base] = {row["seed"]: float(row[score]) for row in group}
    result = {}
    for (*name, budget), group in sorted(groups.items(), key=lambda item: item[0][-1]):
        if tuple(name[:2]) not in converged:
            raise InputError(f"There are no rows of the sampler {reference!r} for {name[0]}, {name[1]}: run it, too.")
        target = np.array([converged[tuple(name[:2])].get(row["seed"], math.nan) for row in group])
        values = np.array([float(row[score]) for row in group])
        good = np.isfinite(target)
        values, target = values[good], target[good]
        error, passed = math.inf if good.any() else math.nan, False
        if good.any() and np.isfinite(values).all():
            gap, allowed = values - target, tolerance * target.mean()
            doubt = min(2 * gap.std(ddof=1) / math.sqrt(len(gap)), allowed) if len(gap) > 1 else 0.0
            error = values.mean() / target.mean()
            passed = gap.mean() <= allowed + doubt and np.median(gap) <= allowed
        before = result.get(tuple(name), Convergence({}, None))
        first = (before.budget if before.budget is not None else budget) if passed else None
        result[tuple(name)] = Convergence(before.error | {budget: error}, first)
    return {name: result[name] for name in dict.fromkeys(key[:-1] for key in groups)}


def write_markdown(rows: Sequence[dict], path: str | os.PathLike, score: str, *, budget: int | None = None,
                   reference: str = "adaptive") -> None:
    """Write two tables in Markdown: steps to convergence and scores at one budget, combinations down, problems across.

    Score and reference are as for `convergence`; without rows of the latter only the second table is written. Its
    budget is 8 where left out, or the largest where no row has that.
    """
    path, rows = check_file(path), _checked(rows, score)
    budget, reference = _budget(rows, budget), check_text(reference, "reference")
    parts = []
    if any(row["sampler"] == reference for row in rows):
        found = convergence(rows, score, reference=reference)
        cells = {key: "-" if value.budget is None else str(value.budget) for key, value in found.items()
                 if key[3] != reference}
        parts += [f"## Network evaluations until {score} stays within 5 % of the converged sampler ({reference})\n",
                  _table(cells)]
    lines = [line for line in summarise(rows) if line["budget"] in (budget, 0)]
    cells = {tuple(line[name] for name in _CELL[:-1]): f"{line[score]:.3g}" + (
        f" ± {line[f'{score}_spread']:.1g}" if line["seeds"] > 1 else "") for line in lines}
    parts += [f"## {score} at {budget} network evaluations, mean ± spread over seeds\n", _table(cells)]
    write_bytes(path, "\n".join(parts).encode())


def _budget(rows: list[dict], budget: int | None) -> int:
    """A budget that some row has."""
    found = sorted({int(row["budget"]) for row in rows})
    if budget is None:
        return 8 if 8 in found else found[-1]
    budget = check_count(budget, "budget", least=0)
    if budget not in found:
        raise InputError(f"budget is {budget}: the rows have {', '.join(map(str, found))}; choose one of these.")
    return budget


def _table(cells: dict[tuple, str]) -> str:
    """Markdown table of (problem, base, formulation, sampler) -> text."""
    problems = list(dict.fromkeys(key[0] for key in cells))
    lines = [["base", "formulation", "sampler", *problems], ["---"] * (3 + len(problems))]
    lines += [[*key, *(cells.get((problem, *key), "") for problem in problems)]
              for key in dict.fromkeys(key[1:] for key in cells)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot_costs(rows: Sequence[dict], score: str, path: str | os.PathLike, *, formulation: str, base: str = "gaussian",
               title: str = "") -> None:
    """Draw a score over the number of network evaluations, one panel a problem, one line a sampler.

    Bands are the spread over seeds. Where the rows hold the score's floor, it is dashed; where they hold an adaptive
    sampler, it is a star. `formulation` is that of the samplers that depend on it, `base` tells which trainings.
    """
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    path, rows, title = check_file(path), _checked(rows, score), check_text(title, "title")
    _choose(rows, "base", base)
    _choose(rows, "formulation", formulation, ("any",))
    lines = [line for line in summarise(rows) if line["base"] == base and line["formulation"] in (formulation, "any")]
    problems, samplers = (list(dict.fromkeys(line[name] for line in lines)) for name in ("problem", "sampler"))
    kinds = {row["sampler"]: (row["coordinates"], str(row["alpha"])) for row in rows}
    columns = min(4, len(problems))
    size = (max(3.2 * columns, 9.6), 2.7 * math.ceil(len(problems) / columns) + 1.1)
    figure, axes = plt.subplots(math.ceil(len(problems) / columns), columns, figsize=size, squeeze=False,
                                layout="constrained")
    for ax, problem in zip(axes.flat, problems):
        for number, sampler in enumerate(samplers):
            curve = [line for line in lines if line["problem"] == problem and line["sampler"] == sampler
                     and math.isfinite(line[score])]
            if not curve:
                continue
            x, mean, spread = (np.array([line.get(name, math.nan) for line in curve])
                               for name in ("evaluations", score, f"{score}_spread"))
            style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)],
                     "linestyle": "-" if kinds[sampler][1] == "0.0" else "--", "markersize": 4,
                     "linewidth": 2.2 if kinds[sampler][0] == "whitened" else 1.1}
            if curve[0]["budget"] == 0:
                style |= {"color": "black", "marker": "*", "markersize": 9, "linestyle": "none"}
            ax.plot(x, mean, label=sampler, **style)
            ax.fill_between(x, np.maximum(mean - spread, mean / 10), mean + spread, color=style["color"], alpha=0.12,
                            linewidth=0)
        floor = [line[f"{score}_floor"] for line in lines if line["problem"] == problem and f"{score}_floor" in line]
        if floor:
            ax.axhline(floor[0], color="grey", linestyle=(0, (4, 3)), linewidth=1, label="floor: two exact sets")
        ax.set(xscale="log", yscale="log", title=problem, xlabel="network evaluations")
        ax.set_xticks([2, 8, 32, 128, 500], ["2", "8", "32", "128", "500"])
        ax.minorticks_off()
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for ax in axes.flat[len(problems):]:
        ax.axis("off")
    figure.supylabel(score.replace("_", " "))
    figure.suptitle(title)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    _save(figure, path)


def plot_overview(rows: Sequence[dict], score: str, path: str | os.PathLike, *, budget: int | None = None,
                  base: str = "gaussian") -> None:
    """Draw a heat map, formulations across and samplers down: geometric mean over problems of score over floor.

    A sampler that does not depend on the formulation has one number in all its row. Adaptive samplers are drawn beside
    those of the `budget`, which is 8 where left out, or the largest where no row has that.
    """
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    path, rows = check_file(path), _checked(rows, score)
    if not all(f"{score}_floor" in row for row in rows):
        raise InputError(f"The rows hold no {score}_floor: choose a score that has a floor.")
    budget = _budget(rows, budget)
    _choose(rows, "base", base)
    lines = [line for line in summarise(rows) if line["base"] == base and line["budget"] in (budget, 0)]
    names = list(dict.fromkeys(line["formulation"] for line in lines if line["formulation"] != "any"))
    samplers = list(dict.fromkeys(line["sampler"] for line in lines))
    values = np.full((len(samplers), len(names)), np.nan)
    for i, sampler in enumerate(samplers):
        for j, name in enumerate(names):
            ratios = [line[score] / line[f"{score}_floor"] for line in lines
                      if line["sampler"] == sampler and line["formulation"] in (name, "any")]
            values[i, j] = np.exp(np.mean(np.log(ratios))) if ratios else np.nan
    size = (max(7.0, 3.4 + 1.1 * len(names)), 1.6 + 0.36 * len(samplers))
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    top = max(20.0, float(np.nanmin(values)) * 2)
    image = ax.imshow(values, norm=LogNorm(1, top), cmap="cividis", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not math.isnan(value):
            ax.text(j, i, f"{value:.3g}" if value < 1000 else "> 1000", ha="center", va="center", fontsize="small",
                    color="white" if value < math.sqrt(top) else "black")
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(samplers)), samplers)
    ax.set(xlabel="formulation", title=f"{score.replace('_', ' ')} over its floor at {budget} network evaluations")
    figure.colorbar(image, label="geometric mean over problems", extend="max")
    _save(figure, path)


def _save(figure: "Figure", path: str | os.PathLike) -> None:
    """Write a picture and free it."""
    from matplotlib import pyplot as plt
    from PIL import Image

    image, small = io.BytesIO(), io.BytesIO()
    figure.savefig(image, dpi=150, format="png")
    plt.close(figure)
    # A palette of 256 colours halves the file and shows no difference in line drawings.
    Image.open(image).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    write_bytes(path, small.getvalue())
