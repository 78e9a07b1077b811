"""A trained model: condition it on a measurement, save it, load it."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import ArrayLike

from fem_diffusion.checks import alike, check_kind, check_readings
from fem_diffusion.diffusion import (
    Denoiser, Distance, MeanNetwork, GaussianNoise, History, Layout, MeasurementWarning, TrainingRange, as_noise,
)
from fem_diffusion.diffusion.sensors import EmulatedSensors
from fem_diffusion.errors import InputError
from fem_diffusion.fields.basis import ModalBasis, is_of
from fem_diffusion.fields.coefficients import on_root, owned_size
from fem_diffusion.fields.geometry import on_mesh
from fem_diffusion.model.families import project
from fem_diffusion.model.file import read_model, write_model
from fem_diffusion.model.posterior import Posterior
from fem_diffusion.model.posteriors import Posteriors, condition_all
from fem_diffusion.model.readings import at_hand
from fem_diffusion.model.tail import LinearTail, linear_tail
from fem_diffusion.observation.linear import Observation, no_sensors
from fem_diffusion.problem import InverseProblem

__all__ = ["Model", "check_basis", "check_law", "load_model"]

# An affine emulator whose error is below this share of the noise's variance holds outside the training, too.
_EXACT = 1e-2
# Readings that make up a law.
_FEWEST = 3


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A trained model of p(m | y), or of p(m | sensors, y) for a family.

    A model moves to another mesh of the same domain by `dataclasses.replace` of its problem and its basis, where both
    bases are Karhunen-Loeve bases of one prior, of equal size; a family's states have to stay where they are.

    Parameters
    ----------
    problem : InverseProblem
        What it was trained for.
    basis : ModalBasis
        Coordinates of the fields.
    denoiser : Denoiser
        Emulator, Gaussian base and network.
    history : History
        Training curve of the network under the base.
    states : ModalBasis or None
        Coordinates of the states, for a family.
    range : TrainingRange or None
        What training has seen of sensors, for a family.
    linear : bool
        Whether the training has found that fixed sensors are linear in the modes left out, whose law given the readings
        is known then.
    rows : numpy.ndarray or None
        Their derivative as pairs show it, shape (k, n_owned), where the solver has none; for the mesh of the training.
    seen : Tensor or None
        What some of the training pairs read without noise, shape (n, k), of a family their state coordinates (n, s): a
        measurement is compared with them, where they are there.
    near : numpy.ndarray or None
        The one measurement that it is refined for, shape (k,), by `refine`.

    InputError where one does not fit the others.
    """

    problem: InverseProblem
    basis: ModalBasis
    denoiser: Denoiser
    history: History
    states: ModalBasis | None = None
    range: TrainingRange | None = None
    linear: bool = False
    rows: np.ndarray | None = None
    seen: torch.Tensor | None = None
    near: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_law(check_basis(self.basis, self.problem), self.problem)
        if self.basis.r != self.denoiser.base.r:
            raise InputError(f"The basis has {self.basis.r} modes and the model {self.denoiser.base.r} latents: pass a "
                             "basis of the same size, of the prior of the training.")
        if len({self.problem.family, self.states is not None, self.range is not None}) > 1:
            raise InputError("A family, a basis of its states and the range of its training belong together: give all "
                             "or none.")
        if self.problem.k not in (None, self.denoiser.base.k):
            raise InputError(f"The problem has {self.problem.k} sensors and the model {self.denoiser.base.k}: pass a "
                             "problem with the sensors of the training.")
        if self.seen is not None and self.seen.shape[1:] != (self.denoiser.base.k + len(self.problem.levels),):
            raise InputError(f"seen has the shape {tuple(self.seen.shape)}: give what the pairs of the training read.")
        fits = self.rows is None or self.rows.shape == (self.denoiser.base.k, owned_size(self.problem.V))
        if not self.problem.comm.allreduce(fits, MPI.LAND):
            raise InputError("What pairs told of the modes left out belongs to the mesh of the training: give rows=None"
                             " to draw the rest from the prior, or train with a solver that has a sensitivity.")
        object.__setattr__(self, "denoiser", on_mesh(self.denoiser, self.basis))

    @cached_property
    def tail(self) -> LinearTail | None:
        """What readings tell of modes past those of the basis, for a linear problem of fixed sensors (collective)."""
        base = self.denoiser.base
        if self.problem.family or self.denoiser.readings is not None:
            return None
        return linear_tail(self.problem, self.basis, base, self.linear, self.rows)

    @cached_property
    def sensors(self) -> EmulatedSensors:
        """The fixed sensors as the denoiser sees them."""
        offset, scale = self.denoiser.base.emulator.offset, self.denoiser.readings
        offset = offset if scale is None else scale.inverse(offset)
        mean = torch.cat([offset, offset.new_zeros(len(self.problem.levels))])[None]
        return EmulatedSensors.fixed(self.denoiser, self.problem.noise, mean if self.seen is None else self.seen)

    def condition(self, y: ArrayLike, observation: Observation | None = None,
                  noise: GaussianNoise | ArrayLike | None = None) -> Posterior:
        """Posterior for one measurement.

        Parameters
        ----------
        y : array_like of shape (k,)
            The measurement, in the units and order of the sensors; the same on all ranks. NaN stands for a sensor that
            failed: it is left out. For fixed sensors also n readings of each, shape (n, k): the posterior's problem and
            y are then those of their mean, where the noise is constant and Gaussian, and of all of them otherwise.
        observation : Observation, optional
            For a family the sensors, on the space of the states; none where left out, which gives the prior.
        noise : GaussianNoise, float or array_like of shape (k,), optional
            Of these sensors, numbers being standard deviations; a part relative to the noise-free value takes the
            reading in its place.

        Raises
        ------
        InputError
            If the measurement is of the wrong length, not finite (the message names the sensors) or another one on
            other ranks, sensors or noise are given for a model of fixed sensors, or are missing or do not fit for a
            family.

        Warns
        -----
        MeasurementWarning
            If the measurement is unlike those of the training: one in a hundred is that belongs to them; or a network
            of fixed sensors is left out, because it knows one reading of all of them.
        FamilyWarning
            If the sensors are far outside the training family.
        """
        if self.states is None or self.range is None:
            if observation is not None or noise is not None:
                raise InputError("This model is of fixed sensors with fixed noise: leave observation and noise out, or "
                                 "train one for a SensorFamily.")
            y = self.same(y, self.denoiser.base.k, self.problem.names, repeats=True)
            problem, values, index = at_hand(self.problem, y)
            if problem is not self.problem:
                return self.of_sensors(problem, index).condition(values)
            if self.near is not None and not np.allclose(y, self.near, 1e-6, 1e-9 * np.abs(self.near).max(initial=0)):
                raise InputError("The model is refined for another measurement, and knows little elsewhere: take the "
                                 "model that was refined, or refine that for this measurement.")
            return self._posterior(self.problem, self.sensors, y, self.tail)
        observation = no_sensors(self.states.V) if observation is None else observation
        if not isinstance(observation, Observation) or observation.U != self.states.V:
            raise InputError(f"The sensors must be an Observation of states in {self.states.V}, such as "
                             "point_sensors(U, points) with that space U.")
        y = self.same(y, len(observation), observation.names)
        law = as_noise(noise, len(observation)) if len(y) else None
        covariance, there = torch.zeros(0, 0, dtype=torch.float64), torch.from_numpy(np.flatnonzero(~np.isnan(y)))
        if isinstance(law, GaussianNoise):
            # All sensors take part here, because a noise model holds a number for each.
            covariance = law.covariance(torch.tensor(np.nan_to_num(y))[None])[there][:, there]
        elif len(y):
            raise InputError("The sensors need a noise model, a Gaussian one: noise=GaussianNoise(std=...).")
        rows, offset = project(observation, self.states)
        law = law.select(there) if isinstance(law, GaussianNoise) and len(there) else None
        at = EmulatedSensors(self.denoiser, law, covariance, rows[there], offset[there])
        rows, offset, reading = rows[there], offset[there], torch.tensor(y)[there]
        # Where noise is correlated, the sensors of the family are recognised before they are mixed.
        present = torch.ones(1, len(there), dtype=torch.bool)
        seen = Layout(rows[None], offset[None], covariance.diagonal()[None], present)
        self.range.warn(seen, [observation.names[i] for i in there])
        sensors = observation[there.numpy()] if len(there) else no_sensors(self.states.V)
        problem = replace(self.problem, observation=sensors, noise=law)
        return self._posterior(problem, at, reading.numpy(), None)

    def _posterior(self, problem: InverseProblem, sensors: EmulatedSensors, y: np.ndarray,
                   tail: LinearTail | None) -> Posterior:
        """The posterior of a measurement (k,) by sensors that are all there; a warning where it is unlike the training.
        """
        distance = self.distance(problem, sensors, y)
        if distance is not None:
            distance.warn()
        return Posterior(problem, self.basis, sensors.locate(y[None]), y, tail, distance, sensors)

    def condition_all(self, y: ArrayLike, observation: Observation | None = None,
                      noise: GaussianNoise | ArrayLike | None = None, *, times: ArrayLike | None = None) -> Posteriors:
        """Posteriors of several measurements, each of a state of its own, all at once (collective).

        Parameters
        ----------
        y : array_like of shape (n, k)
            Measurements by the same sensors, as for `condition`, NaN where one of them failed. Those without a reading
            have no posterior.
        observation, noise
            As for `condition`.
        times : array_like of shape (n,), optional
            When they were made; their numbers where left out.

        Raises
        ------
        InputError
            As for `condition`, and if there is no reading at all, or the model is refined for one measurement.

        Warns
        -----
        MeasurementWarning
            Once for all: where measurements are unlike those of the training, have no reading, or a network is left
            out.
        FamilyWarning
            If the sensors are far outside the training family.
        """
        return condition_all(self, y, observation, noise, times)

    def of_sensors(self, problem: InverseProblem, index: np.ndarray) -> "Model":
        """The model of a problem with some of the fixed sensors, by their numbers (m,), of which some may come again.

        No pairs are needed: base and emulator are those of these sensors; a network knows all of them, and is left out.
        """
        if self.denoiser.network is not None:
            moves = self.denoiser.known and not self.denoiser.base.affine
            warnings.warn("The network was trained for one reading of every sensor, and is left out: samples are those "
                          f"of the Gaussian base of {len(index)} readings"
                          + ", moved under the emulator's density" * moves + ". posterior.correct(...) takes them to "
                          "the posterior itself; a model of a SensorFamily has a network for any sensors.",
                          MeasurementWarning, stacklevel=4)
        some = on_root(problem.comm, lambda: self.sensors.some(index, problem.noise))
        near = None if self.near is None else self.near[index]
        return replace(self, problem=problem, denoiser=some.denoiser, near=near,
                       rows=None if self.rows is None else self.rows[index],
                       seen=None if self.seen is None else some.seen)

    def same(self, y: ArrayLike, k: int, names: Sequence[str], repeats: bool = False) -> np.ndarray:
        """As `check_readings`, row by row where there are repeats, on all ranks together, which have to have the same.
        """
        def check() -> np.ndarray:
            lists = (list, tuple, np.ndarray)
            rows = list(y) if repeats and isinstance(y, lists) and np.shape(y[:1]) else []
            if rows and all(isinstance(row, lists) for row in rows):
                if len(rows) == k > 1 and all(len(row) == 1 for row in rows):
                    raise InputError(f"y has shape ({k}, 1): give ({k},) for one measurement, (n, {k}) for n of them.")
                return np.stack([check_readings(row, k, names or None) for row in rows])
            return check_readings(y, k, names or None)
        return alike(self.problem.comm, lambda: {"y": check()})[0]

    def distance(self, problem: InverseProblem, sensors: EmulatedSensors, y: np.ndarray) -> Distance | None:
        """How far a measurement (k,) is from training readings, and whether the model is out of its depth there.

        Readings that it makes no use of do not count. None where those of the training are not known, or too few.
        """
        if self.seen is None or len(self.seen) < _FEWEST or not len(y):
            return None
        seen = sensors.seen if sensors.rows is None or sensors.offset is None else (
            self.seen @ sensors.rows.T + sensors.offset)
        assert seen is not None
        noise, emulator = problem.noise, self.denoiser.base.emulator
        residual = sensors.total if sensors.family else sensors.denoiser.base.scatter

        def run() -> Distance:
            found = sensors.distance(seen, noise, torch.tensor(y), problem.names or [str(i) for i in range(len(y))])
            exact = sensors.denoiser.network is None and emulator.affine and isinstance(noise, GaussianNoise)
            exact = exact and sensors.denoiser.readings is None
            if isinstance(noise, GaussianNoise) and exact and found.far:
                covariance = noise.covariance(seen)
                unit = covariance.diagonal().clamp(min=1e-300).sqrt()
                left = float(((residual - covariance).diagonal() / unit**2).max())
                exact = left < _EXACT
            return replace(found, far=found.far and not exact)
        return on_root(problem.comm, run)

    def save(self, path: str | os.PathLike) -> None:
        """Write all but the problem to one safetensors file, from which `load_model` reads it on any number of ranks.

        Rank 0 writes it, whole or not at all; FileError if it cannot.
        """
        write_model(path, self)

    def export_monitor(self, folder: str | os.PathLike, quantities: Mapping[str, Any], **given: Any) -> Path:
        """Write what a live page for operators needs of the model; see `fem_diffusion.monitor.export`."""
        from fem_diffusion.monitor.export import export_monitor

        return export_monitor(self, folder, quantities, **given)

    @property
    def summary(self) -> str:
        """What was trained, in words."""
        base, history = self.denoiser.base, self.history
        sensors = "any sensors of its family" if self.problem.family else f"{base.k} fixed sensors"
        emulator = "a linear emulator" if base.emulator.affine else "a network as emulator"
        if base.learnt is not None:
            emulator += f" that knows its noise, {base.learnt.words}"
        network = "no network under the Gaussian base"
        if self.denoiser.network is not None:
            network = "a network under the Gaussian base"
            if history.validation:
                gain = 1 - min(history.validation) / history.base
                members = len(self.denoiser.network.members) if isinstance(self.denoiser.network, MeanNetwork) else 1
                network = "a network that takes" if members == 1 else f"the mean of {members} networks, which takes"
                network += f" {gain:.1%} off the loss of the Gaussian base"
        elif base.learnt is not None and self.denoiser.known:
            network += ", whose noise is learnt and tells more of held-out pairs than a network"
        elif history.step:
            network += ", which none beats on held-out pairs"
        elif base.emulator.affine and base.law is None:
            network += ", which is exact as far as held-out pairs tell"
        else:
            network += ", from which, as far as held-out pairs tell, moves under the emulator's density reach it"
        return (f"{self.basis.r} modes with {self.basis.retained:.2%} of the prior variance, {sensors}, {emulator}, "
                f"{network}{self.denoiser.words}" + ", refined for one measurement" * (self.near is not None))

    def __repr__(self) -> str:
        return f"Model: {self.summary}\n{self.problem!r}"

    def __reduce_ex__(self, protocol: int) -> None:
        raise InputError("A Model holds a mesh and cannot be copied or pickled: use its save, and load_model.")


def load_model(path: str | os.PathLike, problem: InverseProblem) -> Model:
    """Read what `Model.save` wrote, for the problem of the training on the same mesh; no code in the file is run.

    FileError if the file is damaged, foreign, or belongs to another mesh, space, prior, noise or set of sensors.
    """
    check_kind(problem, "problem", InverseProblem, "the InverseProblem of the training")
    return Model(problem, **read_model(path, problem))


def check_basis(basis: ModalBasis, problem: InverseProblem) -> ModalBasis:
    """A basis of the fields of a problem; InputError if it is of other fields."""
    check_kind(basis, "basis", ModalBasis, "karhunen_loeve(prior) or pod(...)")
    if basis.V != problem.V:
        raise InputError(f"The basis is on {basis.V} and the fields of the problem are in {problem.V}: pass a basis of "
                         "the problem's prior.")
    return basis


def check_law(basis: ModalBasis, problem: InverseProblem) -> None:
    """InputError where a Karhunen-Loeve basis is of another prior than that of a problem (collective)."""
    same = basis.prior is not None and basis.prior.core is problem.prior.core
    if basis.standard_prior and not same and not is_of(basis, problem.prior):
        raise InputError("The modes of the basis are those of another prior: pass karhunen_loeve(problem.prior, r).")
