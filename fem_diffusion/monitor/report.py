"""The report of a site at one time: a whole page in one file, in the look of a posterior's report."""

from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure

from fem_diffusion.monitor.bundle import Bundle
from fem_diffusion.monitor.site import Site
from fem_diffusion.page.picture import Picture, new_figure, picture_of
from fem_diffusion.page.template import render

__all__ = ["report_of"]

_TEMPLATE = Path(__file__).with_name("report.html.j2")
_BEFORE = 86400.0   # seconds of the time lines
_BLUE, _DARK, _LIMIT = "#0072b2", "#003f63", "#b8400c"


def report_of(site: Site, when: float | None = None) -> str | None:
    """The page as text for the last reading, or the last one at a time or before; None where there is none."""
    now = site.state(when)
    if now["reading"] is None:
        return None
    number, at = now["reading"]["id"], now["reading"]["time"]
    pictures = []
    if (found := site.map(number)) is not None:
        pictures.append(_map_picture(site.bundle, found))
    pictures += _line_pictures(site, at)
    verdict = {"light": now["light"], "word": now["word"], "sentences": now["sentences"]}
    alarms = [alarm | {"raised": stamp(alarm["raised"]), "ended": alarm["ended"] and stamp(alarm["ended"]),
                       "acknowledged": alarm["acknowledged"] and stamp(alarm["acknowledged"])}
              for alarm in now["alarms"]]
    facts = [("Reading", f"number {number}, of {stamp(at)}"), ("Model", site.bundle.checksum),
             ("Samples", f"{site.bundle.draws} of each reading"), ("fem_diffusion", version("fem_diffusion")),
             ("PyTorch", torch.__version__)]
    return render(_TEMPLATE, {"title": now["title"], "at": stamp(at), "verdict": verdict, "alarms": alarms,
                              "pictures": pictures, "quantities": now["quantities"], "sensors": now["sensors"],
                              "facts": facts})


def stamp(when: float) -> str:
    """A time of day with date and offset, in words."""
    return datetime.fromtimestamp(when).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def _map_picture(bundle: Bundle, found: dict[str, Any]) -> Picture:
    """Mean and standard deviation with the sensors, or bands along a line."""
    area = bundle.area
    assert area is not None
    unit = f" [{area.unit}]" if area.unit else ""
    labels = [f"{axis} [{area.length}]" if area.length else axis for axis in area.axes]
    points = np.array([sensor.point for sensor in bundle.sensors if sensor.point is not None]).reshape(-1, len(labels))
    if len(labels) == 1:
        return _along_picture(bundle, np.array(found["bands"]), points[:, 0], labels[0], f"{area.name}{unit}")
    low, high = area.corners.min(axis=0), area.corners.max(axis=0)
    # Beside each other where the domain is high, below each other where it is wide.
    wide = np.ptp(area.corners[:, 0]) > 1.6 * np.ptp(area.corners[:, 1])
    figure = new_figure(7.5, 7.0) if wide else new_figure(9.0, 4.0)
    for axes, (name, values, colours) in zip(np.ravel(figure.subplots(*((2, 1) if wide else (1, 2)))), (
            ("mean", found["mean"], "viridis"), ("standard deviation", found["std"], "cividis"))):
        shown = np.asarray(values)
        scale = Normalize(float(shown.min()), float(max(shown.max(), shown.min() + 1e-300)))
        image = axes.tripcolor(*area.corners.T, area.cells, shown, shading="gouraud", cmap=colours, norm=scale,
                               rasterized=True)
        axes.plot(*points.T, "o", color="white", markeredgecolor="black", markersize=6)
        axes.set(title=f"{area.title}, {name}", aspect="equal", xlabel=labels[0], ylabel=labels[1],
                 xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        figure.colorbar(image, ax=axes, label=f"{area.name}{unit}")
    return picture_of(figure, f"Map of the {area.title}", f"Mean and standard deviation of the {area.title}; circles "
                      f"are sensors{', those above and below it, too' if area.where else ''}.",
                      wide=True)


def _along_picture(bundle: Bundle, bands: np.ndarray, points: np.ndarray, place: str, value: str) -> Picture:
    """Median with bands (5, c) by place; lines end where the domain does."""
    assert bundle.area is not None
    figure = new_figure(8.0, 3.4)
    axes = figure.subplots()
    x = bundle.area.corners[:, 0]
    ends = np.flatnonzero(np.diff(x)[1::2] != 0) * 2 + 2
    x, bands = np.insert(x, ends, np.nan), np.insert(bands, ends, np.nan, axis=1)
    _bands(axes, x, bands)
    axes.plot(points, np.full(len(points), 0.03), "o", transform=axes.get_xaxis_transform(), color="white",
              markeredgecolor="black", label="sensors")
    axes.set(xlabel=place, ylabel=value)
    figure.legend(loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    name = bundle.area.name
    return picture_of(figure, f"The {name} by place", f"Median of the {name} with 50 and 90 % bands; circles are "
                      "sensors.", wide=True)


def _bands(axes: Axes, x: np.ndarray, values: np.ndarray, marker: str | None = None) -> None:
    """Median with bands (5, n)."""
    axes.fill_between(x, values[0], values[4], color=_BLUE, alpha=0.2, linewidth=0, label="90 %")
    axes.fill_between(x, values[1], values[3], color=_BLUE, alpha=0.4, linewidth=0, label="50 %")
    axes.plot(x, values[2], color=_DARK, marker=marker, label="median")


def _line_pictures(site: Site, at: float) -> list[Picture]:
    """A time line of each quantity over the day before."""
    found = site.series(at - _BEFORE, at)
    shown = site.state(at)["quantities"]
    return [picture_of(_line(found["times"], rows, part), part["name"],
                       f"{part['name']} over the day before, median with 50 and 90 % bands.", wide=True)
            for part, rows in zip(shown, found["lines"])]


def _line(times: list[float], rows: list, part: dict[str, Any]) -> Figure:
    """Median with bands; gaps where there was nothing to be trusted."""
    figure = new_figure(8.0, 2.8)
    axes = figure.subplots()
    days = date2num([datetime.fromtimestamp(when) for when in times])
    values = np.array([[np.nan] * 5 if row is None else row for row in rows])
    _bands(axes, days, values.T, "." if len(days) < 40 else None)
    for threshold in part["thresholds"]:
        axes.axhline(threshold, color=_LIMIT, linestyle="--", label="threshold")
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set(ylabel=f"{part['name']}\n[{part['unit']}]" if part["unit"] else part["name"], xlabel="time")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize="small",
                  frameon=False)
    return figure
