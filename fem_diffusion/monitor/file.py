"""A bundle as one file in a folder: tensors and words, checked to make up a monitor; nothing in it is run."""

import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from fem_diffusion import files
from fem_diffusion.checks import check_path
from fem_diffusion.diffusion import FieldGeometry, GaussianNoise, History, MeanNetwork
from fem_diffusion.diffusion.packing import (
    pack, pack_denoiser, pack_noise, unpack, unpack_denoiser, unpack_law, unpack_noise,
)
from fem_diffusion.diffusion.sensors import EmulatedSensors
from fem_diffusion.errors import InputError
from fem_diffusion.monitor.bundle import Area, Bundle, Quantity, Sensor, Table
from fem_diffusion.monitor.tail import Known, Tail

__all__ = ["FILE", "read_bundle", "write_bundle"]

FILE = "monitor.safetensors"
_REMEDY = "Copy it again, or export it anew: model.export_monitor(folder, ...)."
# Characters of a name, and bounds of whole numbers.
_LONG, _MOST_DRAWS, _MOST_STEPS = 200, 10_000, 1000


def write_bundle(folder: str | os.PathLike, bundle: Bundle, history: History = History()) -> Path:
    """Write a bundle to a folder, whole or not at all; FileError if it cannot be written."""
    folder = check_path(folder, "folder")
    emulated = bundle.emulated
    denoiser = emulated.denoiser
    assert emulated.seen is not None
    arrays, values = pack_denoiser(denoiser, history)
    parts = pack_noise(emulated.noise, len(emulated))
    arrays, values = arrays | parts[0], values | parts[1]
    network = denoiser.network
    like = network.members[0] if isinstance(network, MeanNetwork) else network
    geometry = FieldGeometry(*(getattr(like, f.name) for f in fields(FieldGeometry))) if _meshed(network) else None
    parts = pack({"geometry": geometry})
    arrays, values = arrays | parts[0], values | parts[1]
    arrays |= {"seen": emulated.seen.numpy(), "mean": bundle.mean, "modes": bundle.modes, "weights": bundle.weights}
    arrays |= {f"table.{i}": table.values for i, table in enumerate(bundle.tables)}
    if emulated.rows is not None and emulated.offset is not None:
        arrays |= {"layout.rows": emulated.rows.numpy(), "layout.offset": emulated.offset.numpy()}
    if bundle.tail is not None:
        arrays["tail.draws"] = bundle.tail.draws
        if bundle.tail.known is not None:
            arrays |= {f"tail.{name}": x for name, x in vars(bundle.tail.known).items()}
    shown: dict[str, Any] = {"area": None}
    if (area := bundle.area) is not None:
        rows = area.rows.tocsr()
        arrays |= {"area.corners": area.corners, "area.cells": area.cells.astype(np.int64),
                   "area.data": rows.data, "area.indices": rows.indices.astype(np.int64),
                   "area.indptr": rows.indptr.astype(np.int64)}
        shown["area"] = {"name": area.name, "unit": area.unit, "length": area.length, "where": area.where,
                         "axes": list(area.axes)}
    values |= shown | {"sensors": [asdict(sensor) for sensor in bundle.sensors],
                       "quantities": [asdict(quantity) for quantity in bundle.quantities],
                       "tables": [[t.start, t.stop, float(t.low), float(t.high)] for t in bundle.tables],
                       "draws": bundle.draws, "steps": bundle.steps, "moves": bundle.moves,
                       "constant": bundle.constant}
    files.make_folder(folder)
    files.write(folder / FILE, "monitor", arrays, values)
    return folder / FILE


def read_bundle(folder: str | os.PathLike) -> Bundle:
    """Read what `write_bundle` wrote; FileError if it is not there, damaged, foreign, or its parts do not fit."""
    content = files.read(check_path(folder, "folder") / FILE, "monitor", _REMEDY)
    denoiser, _ = unpack_denoiser(content)
    r = denoiser.base.r
    network: Any = denoiser.network
    if _meshed(network):
        shapes = {"modes": (r, None), "projector": (None, r), "gradients": (None, r, None), "mean": (None,),
                  "mean_gradient": (None, None), "std": (r,)}
        geometry = unpack(content, "geometry", FieldGeometry, shapes, dtype=torch.float32)
        points = 0 if geometry is None else geometry.modes.shape[1]
        if geometry is None or {geometry.projector.shape[0], geometry.gradients.shape[2], len(geometry.mean),
                                geometry.mean_gradient.shape[1]} != {points}:
            raise content.error("holds no mesh for its network")
        try:
            network = network.on(geometry)
        except InputError as error:
            raise content.error(f"holds a mesh of another network ({error})") from error
        denoiser = replace(denoiser, network=network)
    sensors = tuple(_sensor(content, part) for part in _parts(content, "sensors", {"name", "unit", "point"}))
    quantities = tuple(Quantity(**part) for part in _parts(content, "quantities", {"name", "unit", "largest"})
                       if isinstance(part["largest"], bool))
    k, q = len(sensors), len(quantities)
    names = [sensor.name for sensor in sensors], [quantity.name for quantity in quantities]
    if not k or any(len(set(part)) < len(part) for part in names) or q != len(content.values["quantities"]):
        raise content.error("holds no sensors, or two things of one name")
    rows, offset = _layout(content, k, denoiser.base.k)
    if rows is None and denoiser.base.k != k:
        raise content.error("holds a model of other sensors")
    mean = content.array("mean", None, dtype=np.float32)
    n = len(mean)
    noise = unpack_noise(content, k)
    seen = torch.from_numpy(content.array("seen", None, k + (0 if noise is None else len(noise.levels))))
    if len(seen) < 3:
        raise content.error("holds no readings of its training")
    denoiser = unpack_law(content, denoiser, noise)
    if rows is None or offset is None:
        emulated = EmulatedSensors.fixed(denoiser, noise, seen)
    elif isinstance(noise, GaussianNoise) and noise.constant:
        emulated = EmulatedSensors(denoiser, noise, noise.covariance(offset[None]), rows, offset, seen)
    else:
        raise content.error("holds sensors of a family without their noise")
    tables = _tables(content, n)
    # What a table makes of a coefficient is one coefficient.
    weights = content.array("weights", q, n)
    if not all((weights[i] > 0).any() for i in range(q) if quantities[i].largest):
        raise content.error("holds a largest value in a region without a place")
    draws, steps, moves = (content.value(name, int) for name in ("draws", "steps", "moves"))
    if not (100 <= draws <= _MOST_DRAWS and 1 <= steps <= _MOST_STEPS and 0 <= moves <= _MOST_STEPS):
        raise content.error("holds numbers of samples or steps out of range")
    return Bundle(emulated, sensors, quantities, mean, content.array("modes", r, n, dtype=np.float32), weights, tables,
                  _tail(content, draws, k, r, n), _area(content, n), draws, steps, moves,
                  content.value("constant", bool), content.checksum)


def _meshed(network: Any) -> bool:
    """Whether a network has layers on a mesh."""
    return bool(getattr(network, "mesh", False))


def _parts(content: files.Content, name: str, keys: set[str]) -> list[dict]:
    """A list of settings with these keys, of which names and units are short texts."""
    parts = content.value(name, list)
    for part in parts:
        if not isinstance(part, dict) or set(part) != keys or not all(
                isinstance(part[key], str) and len(part[key]) <= _LONG for key in ("name", "unit")) or not part["name"]:
            raise content.error(f"holds {name} without name and unit ({part!r:.200})")
    return parts


def _sensor(content: files.Content, part: dict) -> Sensor:
    point = part["point"]
    if point is not None:
        area = content.value("area", dict, type(None))
        if not isinstance(point, list) or area is None or len(point) != len(area.get("axes", ())) or not all(
                type(x) in (int, float) and np.isfinite(x) for x in point):
            raise content.error(f"holds a sensor without a place on its map ({point!r:.200})")
        point = tuple(map(float, point))
    return Sensor(part["name"], part["unit"], point)


def _layout(content: files.Content, k: int, s: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if "layout.rows" not in content.arrays:
        return None, None
    return (torch.from_numpy(content.array("layout.rows", k, s)), torch.from_numpy(content.array("layout.offset", k)))


def _tables(content: files.Content, n: int) -> tuple[Table, ...]:
    """Tables of consecutive coefficients, all of them or none."""
    tables, place = [], 0
    for i, part in enumerate(content.value("tables", list)):
        good = isinstance(part, list) and len(part) == 4 and all(type(x) is int for x in part[:2]) and all(
            type(x) is float and np.isfinite(x) for x in part[2:])
        if not good or part[0] != place or not place < part[1] <= n or not part[2] < part[3]:
            raise content.error(f"holds a table of a transform that does not fit ({part!r:.200})")
        values = content.array(f"table.{i}", None)
        if len(values) < 2:
            raise content.error("holds an empty table of a transform")
        tables.append(Table(part[0], part[1], part[2], part[3], values))
        place = part[1]
    if tables and place != n:
        raise content.error("holds tables of a transform for some of the coefficients only")
    return tuple(tables)


def _tail(content: files.Content, draws: int, k: int, r: int, n: int) -> Tail | None:
    if "tail.draws" not in content.arrays:
        return None
    found = content.array("tail.draws", draws, n, dtype=np.float32)
    if "tail.cross" not in content.arrays:
        return Tail(found)
    shapes = {"seen": (draws, k), "cross": (k, n), "signal": (k, k), "noise": (k, k), "matrix": (k, r), "offset": (k,)}
    known = Known(**{name: content.array(f"tail.{name}", *shape) for name, shape in shapes.items()})
    if not (np.linalg.eigvalsh(known.signal + known.noise) > 0).all():
        raise content.error("holds no covariance of its readings")
    return Tail(found, known)


def _area(content: files.Content, n: int) -> Area | None:
    shown = content.value("area", dict, type(None))
    if shown is None:
        return None
    axes = shown.get("axes")
    texts = [shown.get(name) for name in ("name", "unit", "length", "where")]
    if len(shown) != 5 or not isinstance(axes, list) or len(axes) not in (1, 2) or not all(
            isinstance(x, str) and len(x) <= _LONG for x in (*texts, *axes)):
        raise content.error("holds a map without a name")
    d = len(axes)
    corners = content.array("area.corners", None, d)
    cells = content.array("area.cells", None, d + 1, dtype=np.int64)
    data, c = content.array("area.data", None), len(corners)
    indices, indptr = (content.array(f"area.{name}", None, dtype=np.int64) for name in ("indices", "indptr"))
    whole = (len(indptr) == c + 1 and indptr[0] == 0 and indptr[-1] == len(data) == len(indices)
             and (np.diff(indptr) >= 0).all())
    inside = all(not len(x) or 0 <= x.min() and x.max() < top for x, top in ((cells, c), (indices, n)))
    if not whole or not inside or not len(cells):
        raise content.error("holds a map whose parts do not fit")
    return Area(corners, cells, csr_matrix((data, indices, indptr), shape=(c, n)), tuple(axes), *texts)
