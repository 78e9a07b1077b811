r"""What a monitor needs of a model, without Firedrake: the denoiser, and maps from latents to what operators ask.

The parameter of latents z is :math:`m = T(\bar m + \sum_k \sqrt{\lambda_k} z_k \varphi_k + t)`, with a pointwise
transform T as a table, and draws of the tail t past the modes where these are known. Quantities are linear functionals
of m, or its largest value in a region; the map shows m at the corners of triangles.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import RLock

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.stats import chi2
from torch import Tensor

from fem_diffusion.diffusion import Distance, Layout, Sampler, sample_latents
from fem_diffusion.diffusion.sensors import EmulatedSensors
from fem_diffusion.diffusion.training.range import tail_probability
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.monitor.tail import Tail

__all__ = ["LEVELS", "Answer", "Area", "Bundle", "Quantity", "Sensor", "Table"]

# One sampling at a time: recorded warnings belong to the process, and the cores to others as well.
_ALONE = RLock()
# Of quantiles that make up median and bands.
LEVELS = 0.05, 0.25, 0.5, 0.75, 0.95
# Draws of noise for each sample, by which it is judged.
_DRAWN = 4


@dataclass(frozen=True)
class Sensor:
    """Name, unit and place on the map of a sensor, None where it has none."""

    name: str
    unit: str = ""
    point: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Quantity:
    """Name and unit of a number that rules speak of; the `largest` value in a region, or a linear functional."""

    name: str
    unit: str = ""
    largest: bool = False


@dataclass(frozen=True, eq=False)
class Table:
    """Values (g,) of a transform at equally spaced places from `low` to `high`, for coefficients start to stop."""

    start: int
    stop: int
    low: float
    high: float
    values: np.ndarray

    def at(self, fields: np.ndarray) -> np.ndarray:
        """The transform of fields (n, stop - start), linear between places; NaN outside the table."""
        single, last = np.float32, len(self.values) - 1
        place = ((fields - self.low) * (last / (self.high - self.low))).astype(single)
        with np.errstate(invalid="ignore"):
            left = np.clip(place, 0, last - 1).astype(np.int32)
            found = np.diff(self.values).astype(single)[left]
        found *= place - left.astype(single)
        found += self.values.astype(single)[left]
        found[~((place >= 0) & (place <= last))] = np.nan
        return found


@dataclass(frozen=True, eq=False)
class Area:
    """Where the parameter is shown.

    Parameters
    ----------
    corners, cells : numpy.ndarray
        Places, shape (c, d) with d = 2 for a map and 1 for bands along a line, and which of them make up triangles or
        pieces of the line, one after the other, shape (t, d + 1).
    rows : csr_matrix
        What reads the parameter there, shape (c, n).
    axes : tuple of str
        Names of the d coordinates.
    name, unit, length, where : str
        What is shown, its unit, that of lengths, and of a slice where it is.
    """

    corners: np.ndarray
    cells: np.ndarray
    rows: csr_matrix
    axes: tuple[str, ...] = ("x", "y")
    name: str = "parameter"
    unit: str = ""
    length: str = ""
    where: str = ""

    @property
    def title(self) -> str:
        """What is shown, with the place of a slice."""
        return f"{self.name} {self.where}".rstrip()


@dataclass(frozen=True, eq=False)
class Answer:
    """What one reading tells.

    Parameters
    ----------
    distance : Distance or None
        From the readings of the training; None where no sensor reports.
    failed : tuple of str
        Sensors that report nothing.
    doubts : tuple of str
        Why there are no numbers, in sentences; empty where there are.
    notes : tuple of str
        What else a reader has to know.
    values : numpy.ndarray or None
        Samples of the quantities, shape (n, q).
    parameters : numpy.ndarray or None
        Samples of the parameter, shape (n, number of coefficients).
    """

    distance: Distance | None
    failed: tuple[str, ...]
    doubts: tuple[str, ...]
    notes: tuple[str, ...] = ()
    values: np.ndarray | None = None
    parameters: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model for a monitor; `export_monitor` makes one, `read_bundle` reads it.

    Parameters
    ----------
    emulated : EmulatedSensors
        The model of the sensors, with readings `seen` of the training; where their noise is none of a known law, these
        hold it, and `noise` is None.
    sensors, quantities : tuple of Sensor, tuple of Quantity
        What is measured, and what is told.
    mean, modes : numpy.ndarray
        The field of latents z is mean + z @ modes: single precision, shapes (n,) and (r, n).
    weights : numpy.ndarray
        Rows of linear quantities over the coefficients of the parameter, or ones in the region of a largest value,
        shape (q, n).
    tables : tuple of Table
        Of the transform; none of an unchanged field.
    tail : Tail or None
        What is past the modes.
    area : Area or None
        The map.
    draws, steps, moves : int
        Samples of each reading, and how they are drawn: evaluations of the network, moves under the emulator's density.
    constant : bool
        Whether noise of no known law is the same at all readings; otherwise nobody can tell whether samples explain
        them.
    checksum : str
        Of the file.
    """

    emulated: EmulatedSensors
    sensors: tuple[Sensor, ...]
    quantities: tuple[Quantity, ...]
    mean: np.ndarray
    modes: np.ndarray
    weights: np.ndarray
    tables: tuple[Table, ...] = ()
    tail: Tail | None = None
    area: Area | None = None
    draws: int = 500
    steps: int = 8
    moves: int = 4
    constant: bool = True
    checksum: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sensors."""
        return tuple(sensor.name for sensor in self.sensors)

    def answer(self, y: np.ndarray, seed: int, unlike: float = 0.01) -> Answer:
        """What a reading (k,) tells, NaN standing for a sensor that reports nothing; the same for the same seed.

        A reading that is unlike the training, as no more than this share of good ones is, or whose samples fail, gets
        no numbers, but the reasons in words.
        """
        there = np.flatnonzero(~np.isnan(y))
        failed = tuple(self.names[i] for i in range(len(y)) if i not in set(there))
        if not len(there):
            return Answer(None, failed, ("No sensor reports anything.",))
        emulated = self.emulated if not failed else self.emulated.some(there)
        assert self.emulated.seen is not None
        seen = self.emulated.seen[:, torch.from_numpy(there)] if emulated.family else emulated.seen
        assert seen is not None
        distance = emulated.distance(seen, emulated.noise, torch.from_numpy(y[there]), [self.names[i] for i in there])
        if distance.worst and (distance.far or distance.p <= unlike):
            return Answer(distance, failed, (_unlike(distance),))
        notes = (f"The reading is unusual at {', '.join(distance.worst)}.",) if distance.worst else ()
        if failed:
            rougher = not self.emulated.family and self.emulated.denoiser.network is not None
            notes = (*notes, f"Without {', '.join(failed)}, which report{'s' * (len(failed) == 1)} nothing"
                     + (", the answer is a rougher one." if rougher else ", less is known."))
        try:
            with _noticed() as caught, torch.no_grad():
                z = self._sample(emulated, y[there], seed)
                explained = self._explained(emulated, y[there], z)
                parameters = self._parameters(y, there, z.numpy())
        except (InputError, SolveError) as error:
            return Answer(distance, failed, (f"The model gives no answer: {error}",), notes)
        doubts = tuple(str(warning.message) for warning in caught if warning.category in (UserWarning, RuntimeWarning))
        if not np.isfinite(parameters).all():
            doubts = (*doubts, "Samples are beyond all that the model knows.")
        if explained < unlike / 2:
            doubts = (*doubts, "The samples do not explain this reading: the model fails there. Ask its engineer.")
        if doubts:
            return Answer(distance, failed, doubts, notes)
        return Answer(distance, failed, (), notes, self._values(parameters), parameters)

    def picture(self, answer: Answer) -> dict[str, np.ndarray]:
        """Of the parameter at the corners of the map: mean and standard deviation (c,), on a line quantiles (5, c)."""
        assert self.area is not None and answer.parameters is not None
        values = self.area.rows @ answer.parameters.T.astype(float)
        if self.area.corners.shape[1] == 1:
            return {"bands": np.quantile(values, LEVELS, axis=1)}
        return {"mean": values.mean(axis=1), "std": values.std(axis=1, ddof=1)}

    def _sample(self, emulated: EmulatedSensors, y: np.ndarray, seed: int) -> Tensor:
        """Latents (n, r) given the readings of sensors that report."""
        conditioned = emulated.locate(y[None])
        moves = None if conditioned.density is None else self.moves
        sampler = Sampler(steps=self.steps, corrections=moves)
        return sample_latents(conditioned, self.draws, sampler, seed=seed, progress=False)[0]

    def _explained(self, emulated: EmulatedSensors, y: np.ndarray, z: Tensor) -> float:
        r"""Posterior predictive p-value of readings y (k,) at samples z (n, r), on the scale of the base.

        Of Gaussian errors that of :math:`(y - h(z))^T S^{-1} (y - h(z))`, with S their covariance, of a law of the
        noise, or a mixture, that of its density, by draws. One of a right posterior is below p at most twice as often
        as p says (Meng 1994).
        """
        denoiser, at = emulated.denoiser, torch.from_numpy(y)
        base = denoiser.base
        at = at if denoiser.readings is None else denoiser.readings.forward(at)
        z = z if denoiser.latents is None else denoiser.latents.forward(z)
        if (law := base.law) is not None:
            clean = law.clean(emulated.read(z), z)
            noise = law.noise.widened(base.noise(Layout.readings(base.k, base.mean))[0].diagonal())
            return _rarer(at, lambda y: noise.log_density(y, clean),   # pyright: ignore[reportOptionalCall]
                          lambda generator: noise.sample(clean, generator))
        if base.learnt is None and not self.constant:
            return 1.0
        if (learnt := base.learnt) is not None and learnt.components > 1:
            c = base.emulator(z)
            return _rarer(at, lambda y: learnt.log_density(y - c, z), lambda generator: c + learnt.sample(z, generator))
        covariance, away = emulated.total if base.learnt is None else base.emulated(z)[1], at - emulated.read(z)
        used = emulated.used
        root = torch.linalg.cholesky(covariance[..., used, :][..., used])
        away = torch.linalg.solve_triangular(root, away[:, used, None], upper=False)
        return float(chi2.sf(away.square().sum((1, 2)).numpy(), len(used)).mean())

    def _parameters(self, y: np.ndarray, there: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Coefficients (n, ...) of the parameter with latents (n, r)."""
        fields = z.astype(np.float32) @ self.modes + self.mean
        if self.tail is not None:
            fields += self.tail.given(y, there, z)
        if not self.tables:
            return fields
        return np.hstack([table.at(fields[:, table.start:table.stop]) for table in self.tables])

    def _values(self, parameters: np.ndarray) -> np.ndarray:
        """Quantities (n, q) of parameters."""
        found = parameters.astype(float) @ self.weights.T
        for i, quantity in enumerate(self.quantities):
            if quantity.largest:
                found[:, i] = parameters[:, self.weights[i] > 0].max(axis=1)
        return found


def _rarer(y: Tensor, log_density: Callable[[Tensor], Tensor], sample: Callable[[torch.Generator], Tensor]) -> float:
    """Share of draws (n, k) of a law whose log density (n,) is at most that of readings (k,)."""
    generator, found = torch.Generator().manual_seed(0), log_density(y)
    return tail_probability(torch.cat([found - log_density(sample(generator)) for _ in range(_DRAWN)]), 0.0)


def _unlike(distance: Distance) -> str:
    """Why a measurement is not to be trusted."""
    return (f"This reading is unlike the {distance.seen:,} simulated ones that the model knows, at "
            f"{', '.join(distance.worst)}: look at {'that sensor' if len(distance.worst) == 1 else 'those sensors'}. "
            "If what is measured is right, the model does not fit the site any more: ask its engineer.")


@contextlib.contextmanager
def _noticed() -> Iterator[list]:
    """Warnings that are raised inside."""
    with _ALONE, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
