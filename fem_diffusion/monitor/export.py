"""From a trained model to what a monitor needs of it, which knows nothing of meshes, solvers and code."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from firedrake import SpatialCoordinate, assemble, conditional, interpolate

from fem_diffusion.checks import check_callable, check_count, check_kind, check_text
from fem_diffusion.diffusion import GaussianNoise, as_noise
from fem_diffusion.diffusion.sensors import EmulatedSensors
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, owned_size
from fem_diffusion.levels import Beside
from fem_diffusion.measurements.units import split_unit
from fem_diffusion.model.families import project
from fem_diffusion.monitor.area import area_of, component_of
from fem_diffusion.monitor.bundle import Bundle, Quantity, Sensor, Table
from fem_diffusion.monitor.file import write_bundle
from fem_diffusion.monitor.tail import Known, Tail
from fem_diffusion.observation.linear import Observation
from fem_diffusion.prior.protocol import Prior
from fem_diffusion.problem import InverseProblem

if TYPE_CHECKING:
    from fem_diffusion.model.model import Model

__all__ = ["Largest", "export_monitor"]

# Places of a table, standard deviations that it reaches, and how far it may be off, in standard deviations.
_PLACES, _REACH, _OFF, _CHUNK = 4001, 12.0, 2e-3, 128
_TRIALS, _SEED, _WHOLE = 64, 0x3017, 1 - 1e-6


@dataclass(frozen=True)
class Largest:
    """The largest value of a scalar parameter at the nodes in a region; of one number, as a level of noise, its value.

    Parameters
    ----------
    where : callable, optional
        Maps the coordinates to a UFL condition, such as ``lambda x: x[0] > 2``; everywhere where left out.
    component : int
        Of a parameter of several unknowns, which; unknown levels of noise are the last ones.
    """

    where: Callable[[Any], Any] | None = None
    component: int = 0


def export_monitor(model: "Model", folder: str | os.PathLike, quantities: Mapping[str, "Observation | Largest"], *,
                   name: str = "parameter", mesh_units: str = "", component: int = 0,
                   plane: tuple[str, float] | None = None, observation: Observation | None = None, noise: Any = None,
                   draws: int = 500, steps: int = 8, moves: int | None = None) -> Path:
    """Write what ``python -m fem_diffusion monitor FOLDER`` needs of a model, in one file that holds no code.

    A transform of the field becomes a table, so it has to be one function of the value at each node, the same
    everywhere: `exp`, a square, `bounded(...)`.

    Parameters
    ----------
    folder : path
        Is made where it is missing.
    quantities : dict of str to Observation or Largest
        What operators are told and rules speak of, by names with units, ``"emission [g/s]"``: observations of one row
        of the parameter itself, such as ``functionals(M, [lambda m: m * dx])`` or ``point_sensors(M, [p])``, and
        largest values.
    name, mesh_units, component : str, str, int
        What the map shows, ``"emission [g/(s m²)]"``, and the unit of lengths; of a parameter of several unknowns,
        which one. Scalar fields have a map on plane meshes and flat boundaries, on lines bands over the place, and in
        three dimensions the map of a slice.
    plane : tuple of str and float, optional
        Of a mesh in three dimensions, where the slice lies: ``("z", 1.5)``; in the middle of its height where left out.
    observation, noise : Observation, GaussianNoise or number
        The sensors of a model of a family. The names of sensors, too, may have units.
    draws, steps : int
        Samples of each reading, and evaluations of the network for each of them.
    moves : int, optional
        Under the emulator's density; where left out 4, or 2 where the samples are tempered, which has moves of its own.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    InputError
        If a quantity does not fit the parameter, a plane does not meet the mesh, the transform of the prior is no table
        or it has a constraint, the model is refined for one measurement, sensors are missing or given twice, or there
        are several processes.
    FileError
        If the file cannot be written.
    """
    problem = model.problem
    if problem.comm.size > 1:
        raise InputError("A monitor is exported by one process: load the model without mpiexec, and export it there.")
    if model.near is not None:
        raise InputError("The model is refined for one measurement: export the model that was refined.")
    if problem.prior.allows is not None:
        raise InputError("The prior allows some fields only, and a monitor cannot tell which: take a prior without a "
                         "constraint, such as a TransformedPrior.")
    for label, text in (("name", name), ("mesh_units", mesh_units)):
        check_text(text, label)
    emulated, constant = _emulated(model, observation, noise)
    observation = problem.observation if observation is None else observation   # pyright: ignore[reportAssignmentType]
    draws = check_count(draws, "draws", least=100)
    tempered = model.denoiser.base.bent and model.denoiser.network is None
    moves = (2 if tempered else 4) if moves is None else check_count(moves, "moves", least=0)
    basis, n = model.basis, owned_size(problem.M)
    if not isinstance(quantities, Mapping) or not quantities:
        raise InputError("There are no quantities: give a dict such as {'emission [g/s]': functionals(M, [...])}.")
    rows = np.stack([_row(problem, label, what) for label, what in quantities.items()])
    area = area_of(problem.M, component, *_split(name), mesh_units, plane)
    tail = _tail(model, draws)
    tables = _tables(problem.prior, n)
    shown = np.zeros(n) if area is None else np.abs(area.rows).sum(axis=0).A1
    used = np.flatnonzero(np.abs(rows).sum(axis=0) + shown > 0)
    if area is not None:
        area = replace(area, rows=area.rows[:, used])
    bundle = Bundle(emulated, _sensors(observation, len(emulated), () if area is None else area.axes), tuple(
        Quantity(*_split(label), isinstance(what, Largest)) for label, what in quantities.items()),
        coefficients(basis.mean)[used].astype(np.float32), basis.scaled_modes[:, used].astype(np.float32),
        rows[:, used], _chosen(tables, used), None if tail is None else tail.some(used), area, draws,
        check_count(steps, "steps"), moves, constant)
    names = [quantity.name for quantity in bundle.quantities]
    if len(set(names)) < len(names) or len(set(bundle.names)) < len(bundle.names):
        raise InputError("Two quantities or two sensors have one name: give each a name of its own.")
    return write_bundle(folder, bundle, model.history)


def _emulated(model: "Model", observation: Observation | None, noise: Any) -> tuple[EmulatedSensors, bool]:
    """The sensors with readings of the training, and whether noise of no known law is the same at all of these."""
    if not model.problem.family:
        if observation is not None or noise is not None:
            raise InputError("This model is of fixed sensors with fixed noise: leave observation and noise out.")
        sensors, law = model.sensors, model.problem.noise
    else:
        if not isinstance(observation, Observation) or model.states is None or observation.U != model.states.V:
            raise InputError("This model is of a family: give the sensors of the site, such as point_sensors(U, "
                             "points), and their noise.")
        law = as_noise(noise, len(observation))
        if not isinstance(law, GaussianNoise) or not law.constant:
            raise InputError("The sensors of a family need constant Gaussian noise: noise=GaussianNoise(std=...).")
        rows, offset = project(observation, model.states)
        clean = None if model.seen is None else model.seen @ rows.T + offset
        sensors = EmulatedSensors(model.denoiser, law, law.covariance(offset[None]), rows, offset, clean)
    if model.seen is None or sensors.seen is None or len(sensors.seen) < 3:
        raise InputError("The model does not know what its training pairs read, with which readings are compared: "
                         "train it anew.")
    if law is None or law.told:
        return sensors, True
    # Noise of the user's own is code: the readings hold it, as the emulator's residual does.
    noisy = law.sample(sensors.seen, torch.Generator().manual_seed(_SEED))
    return EmulatedSensors.fixed(sensors.denoiser, None, noisy), law.constant


def _split(label: str) -> tuple[str, str]:
    """A name and its unit."""
    name, unit = split_unit(check_text(label, "the name of a quantity"))
    return name, unit or ""


def _sensors(observation: Any, k: int, axes: tuple[str, ...]) -> tuple[Sensor, ...]:
    """Names, units and places along the axes of the map of k sensors; numbers where an instrument of the user's has no
    names.
    """
    if not isinstance(observation, Observation):
        return tuple(Sensor(f"sensor {i + 1}") for i in range(k))
    columns = ["xyz".find(axis) for axis in axes]
    known = columns and 0 <= min(columns) and max(columns) < observation.points.shape[1]
    places = [tuple(map(float, point[columns])) if known and np.isfinite(point[columns]).all() else None
              for point in observation.points]
    return tuple(Sensor(*_split(name), place) for name, place in zip(observation.names, places))


def _row(problem: InverseProblem, label: str, what: "Observation | Largest") -> np.ndarray:
    """Weights (n,) of a linear quantity over the coefficients of the parameter, or ones where a largest value is looked
    for.
    """
    M, forward = problem.M, problem.forward
    if isinstance(what, Observation):
        own = forward.prior.V if isinstance(forward, Beside) else M
        if what.U not in (M, own) or len(what) != 1:
            raise InputError(f"{label!r} reads {len(what)} numbers of {what.U}: give an observation of one row of the "
                             f"parameter's own space {own}.")
        return np.append(what.rows.toarray()[0], np.zeros(owned_size(M) - what.rows.shape[1]))
    check_kind(what, repr(label), Largest, "an Observation of the parameter, or Largest(...)")
    W, before = component_of(M, what.component)
    number = W.finat_element is None    # of a space of one number
    if W.value_shape or not (number or W.finat_element.has_pointwise_dual_basis) or number and what.where is not None:
        raise InputError(f"{label!r} is the largest value of {W}, which has no scalar values at nodes: take a "
                         "functional.")
    inside = np.ones(owned_size(W))
    if what.where is not None:
        condition = check_callable(what.where, f"the region of {label!r}", "a function of the coordinates", 1)(
            SpatialCoordinate(W.mesh()))
        inside = coefficients(assemble(interpolate(conditional(condition, 1.0, 0.0), W)))
    row = np.zeros(owned_size(M))
    row[before:before + len(inside)] = inside > 0.5
    if not row.any():
        raise InputError(f"No node is in the region of {label!r}: make it larger.")
    return row


def _tail(model: "Model", draws: int) -> Tail | None:
    """Draws of what is past the modes, as samples of a posterior have it where they are refilled."""
    basis = model.basis
    if not basis.standard_prior or model.tail is None and basis.retained > _WHOLE:
        return None
    zero = np.zeros((draws, basis.r))
    rest = basis.decode(zero, _SEED) - basis.decode(zero)
    if (linear := model.tail) is None:
        return Tail(rest.astype(np.float32))
    noise = linear.root @ linear.root.T
    # Of the gain K = C Hᵀ (S + R)⁻¹ it follows what K was made of: H K = S (S + R)⁻¹.
    share = linear.rows @ linear.gain.T
    signal = np.linalg.solve(np.eye(len(noise)) - share, share @ noise)
    signal = (signal + signal.T) / 2
    cross = (signal + noise) @ linear.gain
    return Tail(rest.astype(np.float32), Known(rest @ linear.rows.T, cross, signal, noise, linear.matrix,
                                               linear.offset))


def _tables(prior: Prior, n: int) -> tuple[Table, ...]:
    """The transform of a prior as tables, checked at draws of the prior; none where there is no transform."""
    if prior.core is prior:
        return ()
    wrong = InputError("The transform of the prior is not one function of the value at each node: a monitor cannot "
                       "carry it. Write it so, with what varies in the mean of the field.")
    V = prior.core.V
    sizes = [owned_size(W.collapse() if len(V) > 1 else W) for W in V]
    if n != owned_size(V) or sizes != [owned_size(W.collapse() if len(prior.V) > 1 else W) for W in prior.V]:
        raise wrong
    trials = prior.core.sample_many(_TRIALS, _SEED)
    truth, tables, start = prior.transform_many(trials), [], 0
    for size in sizes:
        part = slice(start, start + size)
        middle, spread = trials[:, part].mean(axis=0), trials[:, part].std(axis=0).max()
        low, high = middle.min() - _REACH * spread, middle.max() + _REACH * spread
        places = np.linspace(low, high, _PLACES)
        values = np.empty(_PLACES)
        for first in range(0, _PLACES, _CHUNK):
            chosen = places[first:first + _CHUNK]
            constant = np.tile(trials.mean(axis=0), (len(chosen), 1))
            constant[:, part] = chosen[:, None]
            found = prior.transform_many(constant)[:, part]
            same = np.abs(found - found[:, :1]).max(axis=1) <= 1e-9 * (1e-300 + np.abs(found[:, 0]))
            if not (same | ~np.isfinite(found[:, 0])).all():
                raise wrong
            values[first:first + _CHUNK] = found[:, 0]
        # What overflows at the far ends is beyond all that is known.
        good = np.flatnonzero(np.abs(values) < 1e30)
        if len(good) < 2 or np.diff(good).max() > 1:
            raise wrong
        tables.append(Table(start, start + size, places[good[0]], places[good[-1]], values[good[0]:good[-1] + 1]))
        start += size
    made = np.hstack([table.at(trials[:, table.start:table.stop]) for table in tables])
    if not np.abs(made - truth).max() <= _OFF * truth.std(axis=0).max():
        raise wrong
    return tuple(tables)


def _chosen(tables: tuple[Table, ...], used: np.ndarray) -> tuple[Table, ...]:
    """Tables of some of the coefficients, in their order."""
    found, start = [], 0
    for table in tables:
        count = int(((used >= table.start) & (used < table.stop)).sum())
        if count:
            found.append(Table(start, start + count, table.low, table.high, table.values))
        start += count
    return tuple(found)
