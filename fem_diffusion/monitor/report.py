"""The report of a site at one time: a whole page in one file, in the look of a posterior's report."""

from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
    """Mean and standard deviation with the sensors."""
    area = bundle.area
    assert area is not None
    low, high = area.corners.min(axis=0), area.corners.max(axis=0)
    # Beside each other where the domain is high, below each other where it is wide.
    wide = np.ptp(area.corners[:, 0]) > 1.6 * np.ptp(area.corners[:, 1])
    figure = new_figure(7.5, 7.0) if wide else new_figure(9.0, 4.0)
    unit = f" [{area.unit}]" if area.unit else ""
    length = f" [{area.length}]" if area.length else ""
    points = np.array([sensor.point for sensor in bundle.sensors if sensor.point is not None]).reshape(-1, 2)
    for axes, (name, values, colours) in zip(np.ravel(figure.subplots(*((2, 1) if wide else (1, 2)))), (
            ("mean", found["mean"], "viridis"), ("standard deviation", found["std"], "cividis"))):
        shown = np.asarray(values)
        scale = Normalize(float(shown.min()), float(max(shown.max(), shown.min() + 1e-300)))
        image = axes.tripcolor(*area.corners.T, area.triangles, shown, shading="gouraud", cmap=colours, norm=scale,
                               rasterized=True)
        axes.plot(*points.T, "o", color="white", markeredgecolor="black", markersize=6)
        axes.set(title=f"{area.name}, {name}", aspect="equal", xlabel=f"x{length}", ylabel=f"y{length}",
                 xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        figure.colorbar(image, ax=axes, label=f"{area.name}{unit}")
    return picture_of(figure, f"Map of the {area.name}", f"Mean and standard deviation of the {area.name}; circles are "
                      "sensors.", wide=True)


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
    axes.fill_between(days, values[:, 0], values[:, 4], color=_BLUE, alpha=0.2, linewidth=0, label="90 %")
    axes.fill_between(days, values[:, 1], values[:, 3], color=_BLUE, alpha=0.4, linewidth=0, label="50 %")
    axes.plot(days, values[:, 2], color=_DARK, marker="." if len(days) < 40 else None, label="median")
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
