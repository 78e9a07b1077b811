"""One trained model for many observation operators: fit it once, condition it on any sensors of its family."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from mpi4py import MPI

from fem_diffusion import files
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.checks import check_count, check_readings
from fem_diffusion.diffusion import (
    Emulator, GaussianNoise, History, LayoutLaw, OperatorBase, OperatorDenoiser, Seen, SensorNetwork, SensorPool,
    Sensors, TrainingOptions, as_noise, fit_operators,
)
from fem_diffusion.diffusion._loop import unpack_history
from fem_diffusion.diffusion.model_file import REMEDY, pack, unpack, unpack_network, unpack_sampling
from fem_diffusion.diffusion.operator_base import UPDATES
from fem_diffusion.fields.modes import leading_modes, sample_covariance
from fem_diffusion.errors import DataError, InputError
from fem_diffusion.fields.coefficients import by_component, coefficients, field, on_root, owned_size
from fem_diffusion.fields.keyed import element_of, gather_keys, gather_rows, own_columns
from fem_diffusion.posterior import ConditionalModel, Posterior, check_training, is_standard
from fem_diffusion.observation.family import SensorFamily
from fem_diffusion.observation.linear import Observation, no_sensors
from fem_diffusion.simulation.simulate import DataSet

__all__ = ["FamilyModel", "fit_family", "load_family"]

_STATES, _CHECKED, _MOST_MODES = 4000, 500, 256
_RETAINED = 1 - 1e-8
# What state modes may miss of a reading, in units of its noise.
_MISSED = 0.2
# Smallest variance of noise, in units of the prior variance of the reading.
_FLOOR = 1e-12


def fit_family(data: DataSet, basis: ModalBasis, family: SensorFamily, *,
               options: TrainingOptions = TrainingOptions(), state_modes: int | None = None,
               checkpoint: str | os.PathLike | None = None, progress: bool = True) -> "FamilyModel":
    """Train one model for all observation operators of a family.

    Parameters
    ----------
    data : DataSet
        With states: ``simulate(problem, n, seed=...)`` of a family keeps them.
    basis : ModalBasis
        Coordinates of the fields.
    family : SensorFamily
        Every training sample gets a fresh operator and fresh noise of it, every time.
    options : TrainingOptions
        Settings of the training loop, of the emulator's and of the network's.
    state_modes : int, optional
        Number of POD modes that states are written in; where left out, as many as keep all but 1e-8 of the variance,
        at most 256.
    checkpoint : path, optional
        Training writes its state there and resumes from it.
    progress : bool
        Show progress bars on rank 0.

    Returns
    -------
    FamilyModel
        The same on all ranks; rank 0 trains.

    Raises
    ------
    DataError
        If the data set has no states.
    InputError, FileError, SolveError
        If the pairs are too few, inconsistent or not finite, or training fails; see also `fit_denoiser`.
    """
    check_training(data, basis, progress)
    if not isinstance(family, SensorFamily):
        raise InputError(f"family is of type {type(family).__name__}: give a SensorFamily of SensorKinds.")
    if data.states is None or not len(data):
        raise DataError("A model of many operators is trained on states, and the data set has none: "
                        "simulate(problem, n, seed=..., keep_states=True) keeps them.")
    U = family.U
    # The last states are not among those that the modes are made of.
    apart = min(_CHECKED, len(data) // 10)
    states = _state_basis(U, data.states[:len(data) - apart][:_STATES], state_modes)
    z, c = basis.encode(data.coefficients), states.encode(data.states)
    standard_prior = is_standard(data, basis, z)
    pools = []
    for kind in family.kinds:
        rows, offset = _project(kind.observation, states)
        std = torch.tensor(kind.std_range)
        _check_modes(kind.observation, data.states[len(data) - apart:], c[len(data) - apart:], rows, offset, std[0])
        shape = (-1, kind.series)
        pools.append(SensorPool(rows.unflatten(0, shape), offset.unflatten(0, shape), std.unflatten(1, shape),
                                tuple(int(n) for n in kind.count)))
    law = LayoutLaw(tuple(pools))

    def run():
        return fit_operators(z, c, torch.tensor(states.variances).sqrt(), law, standard_prior=standard_prior,
                             options=options, checkpoint=checkpoint, progress=progress)
    denoiser, history = on_root(U.comm, run)
    return FamilyModel(basis, states, denoiser, history, Seen.of(law))


def _state_basis(U, states: np.ndarray, size: int | None) -> ModalBasis:
    """POD modes of the states, as many as asked for or as are needed, at most as many as the states span."""
    mean = states.mean(axis=0)
    centred = states - mean
    finite = U.comm.allreduce(bool(np.isfinite(centred).all()), MPI.LAND)
    parts = by_component(U, centred) if finite and len(states) > 1 else []
    totals = np.array([sample_covariance(W, part)[1] for W, part in zip(U, parts)])
    if not (totals > 0).any():
        raise DataError("The states are not finite or all the same: check the forward problem.")
    # Components of a mixed space count by shares of variance: pressures beside velocities lose nothing.
    totals = np.where(totals > 0, totals, 1.0) if len(U) > 1 else np.ones(1)
    units = np.concatenate([np.full(owned_size(W), total**0.5) for W, total in zip(U, totals)])
    covariance, total = sample_covariance(U, centred / units)
    most = min(_MOST_MODES, len(states) - 1, U.dim())
    if size is not None and not 1 <= check_count(size, "state_modes") <= most:
        raise InputError(f"state_modes is {size}: between 1 and {most} modes can be had here.")
    count = 16 if size is None else size
    while True:
        modes, variances = leading_modes(covariance, U, (), min(count, most), fewer=True)
        enough = np.flatnonzero(np.cumsum(variances) >= _RETAINED * total)
        if size is None and len(enough):
            modes, variances = modes[:enough[0] + 1], variances[:enough[0] + 1]
        if size is not None or len(enough) or len(variances) < count:
            return ModalBasis(U, field(U, mean, name="mean"), modes * units, variances, total,
                              weights=tuple((1 / totals).tolist()) if len(U) > 1 else None)
        count *= 2


def _project(observation: Observation, states: ModalBasis) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows over the state coordinates (k, s) and readings of the mean state (k,), the same on all ranks."""
    rows = observation.apply(states.scaled_modes).T
    offset = observation.apply(coefficients(states.mean)[None])[0]
    return torch.tensor(rows), torch.tensor(offset)


def _check_modes(observation, states, c, rows, offset, std) -> None:
    """Warn where the state modes miss more of a reading than its noise forgives."""
    if not len(states):
        return
    missed = torch.tensor(observation.apply(states)) - offset - c @ rows.T
    worst = float((missed.square().mean(0).sqrt() / std).max())
    if worst > _MISSED:
        warnings.warn(f"The {rows.shape[1]} state modes miss up to {worst:.2g} noise standard deviations of a reading: "
                      "raise state_modes, or place sensors away from where the state is rough.", stacklevel=3)


@dataclass(frozen=True)
class FamilyModel:
    """A trained model of p(m | operator, y).

    Parameters
    ----------
    basis : ModalBasis
        Coordinates of the fields.
    states : ModalBasis
        Coordinates of the states.
    denoiser : OperatorDenoiser
        Emulator, base and network.
    history : History
        Training curve of the network.
    seen : object
        What training has seen of sensors, for the warning.
    """

    basis: ModalBasis
    states: ModalBasis
    denoiser: OperatorDenoiser
    history: History
    seen: Seen

    def condition(self, observation: Observation | None, y: Sequence[float],
                  noise: GaussianNoise | float | Sequence[float] | None = None) -> Posterior:
        """Posterior for one measurement by any sensors.

        Parameters
        ----------
        observation : Observation or None
            The sensors, on the space of the states; None where there are none, which gives the prior.
        y : array_like of shape (k,)
            Their readings, the same on all ranks. NaN stands for a sensor that failed: it is left out.
        noise : GaussianNoise, float or array_like of shape (k,)
            Of these sensors, numbers being standard deviations; a part relative to the noise-free value takes the
            reading in its place. May be left out where there are no sensors.

        Returns
        -------
        Posterior

        Raises
        ------
        InputError
            If the sensors are on another space, shapes disagree, a reading is infinite, or there is no noise model.

        Warns
        -----
        FamilyWarning
            If the operator is far outside the training family.
        """
        observation = no_sensors(self.states.V) if observation is None else observation
        if not isinstance(observation, Observation) or observation.U != self.states.V:
            raise InputError(f"The sensors must be an Observation of states in {self.states.V}, such as "
                             "point_sensors(U, points) with that space U.")
        y = check_readings(y, len(observation), observation.names, failed=True)
        noise = as_noise(noise, len(observation)) if len(y) else None
        if len(y) and not isinstance(noise, GaussianNoise):
            raise InputError("The sensors need a noise model, a Gaussian one: noise=GaussianNoise(std=...).")
        rows, offset = _project(observation, self.states)
        there = np.flatnonzero(~np.isnan(y))
        covariance = rows.new_zeros(0, 0)
        if len(y):
            # All sensors take part here, because a noise model holds a number for each.
            covariance = noise.covariance(torch.tensor(np.nan_to_num(y))[None])[there][:, there]
        rows, offset, reading = rows[there], offset[there], torch.tensor(y[there])
        names = [observation.names[i] for i in there]
        # Where noise is correlated, the sensors of the family are recognised before they are mixed.
        self.seen.warn(Sensors(rows[None], offset[None], covariance.diagonal()[None], None), names)
        denoiser = self.denoiser.at(*_decorrelated(rows, offset, covariance, reading))
        return Posterior(_OneMeasurement(self.basis, denoiser, self.history), y[there])

    def save(self, path: str | os.PathLike) -> None:
        """Write everything but the basis of the fields (`ModalBasis.save`) to one safetensors file.

        Parameters
        ----------
        path : path
            The file, written whole or not at all by rank 0; it is read on any number of ranks.

        Raises
        ------
        FileError
            If it cannot be written.
        """
        states, model, comm = self.states, self.denoiser, self.states.V.comm
        gathered = {"states.key": gather_keys(states.V), "states.modes": gather_rows(states.V, states.modes),
                    "states.mean": gather_rows(states.V, coefficients(states.mean)[None]),
                    "states.variances": states.variances, "basis.signature": self.basis.signature}

        def write():
            arrays, values = pack({"emulator": model.base.emulator, "network": model.network,
                                   "spectrum": model.spectrum, "support": model.support, "seen": self.seen},
                                  self.history)
            arrays |= {"base.mean": model.base.mean.numpy(), "base.factor": model.base.factor.numpy()}
            values |= {"states.element": element_of(states.V), "total_variance": states.total_variance,
                       "weights": states.weights, "standard_prior": model.standard_prior, "updates": model.base.updates}
            files.write(path, "family model", arrays | gathered, values)
        on_root(comm, write)

    def __reduce_ex__(self, protocol):
        raise InputError("A FamilyModel holds a mesh and cannot be copied or pickled: use its save, and load_family.")


def _decorrelated(rows, offset, covariance, y) -> tuple[Sensors, torch.Tensor]:
    """The same measurement with independent noise: as it is, or in the principal axes of the noise."""
    # A reading without noise would leave no density: it gets a millionth of its prior standard deviation.
    variance = torch.maximum(covariance.diagonal(), _FLOOR * rows.square().sum(1) + 1e-300)
    if len(y) and not torch.equal(covariance, torch.diag(covariance.diagonal())):
        # Each sensor in units of its own noise first: pascals beside mole fractions lose nothing.
        scale = variance.sqrt()
        values, axes = torch.linalg.eigh((covariance + torch.diag(variance - covariance.diagonal())) / scale
                                         / scale[:, None])
        rows, offset, y = axes.T @ (rows / scale[:, None]), axes.T @ (offset / scale), axes.T @ (y / scale)
        variance = torch.maximum(values, _FLOOR * rows.square().sum(1) + 1e-14)
    return Sensors(rows[None], offset[None], variance[None], torch.ones(1, len(y), dtype=torch.bool)), y


class _OneMeasurement(ConditionalModel):
    """A family model with its sensors and readings built in, as a `Posterior` wants it."""

    def condition(self, y):
        raise InputError("This model has its measurement built in: call FamilyModel.condition for another one.")

    def save(self, path):
        raise InputError("This model has its measurement built in: save the FamilyModel, or the samples.")


def load_family(path: str | os.PathLike, basis: ModalBasis, U) -> FamilyModel:
    """Read what `FamilyModel.save` wrote; no code in the file is run.

    Parameters
    ----------
    path : path
        The file.
    basis : ModalBasis
        The basis of the training: computed again, or from `load_basis`.
    U : firedrake.functionspaceimpl.WithGeometry
        Space of the states, on the mesh of the training; on any number of ranks.

    Returns
    -------
    FamilyModel

    Raises
    ------
    FileError
        If the file is truncated, foreign, or belongs to another basis or another space of states.
    """
    content, denoiser, seen, history = on_root(U.comm, lambda: _read(path))
    basis.check_signature(content.arrays["basis.signature"], path)
    columns = own_columns(content, "states.key", "states.element", U)
    mean, modes, variances = (content.arrays[f"states.{name}"] for name in ("mean", "modes", "variances"))
    weights = content.value("weights", list, type(None))
    if weights is not None and (len(weights) != len(U) or not all(type(x) is float and x > 0 for x in weights)):
        raise content.error("does not hold the weights of the states' components")
    states = ModalBasis(U, field(U, mean[0, columns], name="mean"), modes[:, columns], variances,
                        content.values["total_variance"], weights=weights and tuple(weights))
    return FamilyModel(basis, states, denoiser, history, seen)


def _read(path) -> tuple[files.Content, OperatorDenoiser, Seen, History]:
    """Content of a file, checked, and the parts that know no mesh."""
    content = files.read(path, "family model", REMEDY)
    r, s, size = *content.array("emulator.matrix", None, None).T.shape, len(content.array("states.key", None, None))
    if not (content.array("states.variances", s) > 0).all() or not 0 < content.value("total_variance", float) < np.inf:
        raise content.error("holds state modes without variance")
    for name, shape in (("states.mean", (1, size)), ("states.modes", (s, size)), ("basis.signature", (r + 1,))):
        content.array(name, *shape)
    mean, factor = (torch.from_numpy(content.array(f"base.{name}", *shape)) for name, shape in (
        ("mean", (r,)), ("factor", (r, r))))
    emulator = unpack_network(content, "emulator", [Emulator], {"r": r, "s": s})
    network = unpack_network(content, "network", [SensorNetwork], {"r": r, "s": s})
    seen = unpack(content, "seen", Seen, {"signals": (None, s)}, dtype=torch.float32)
    updates = content.value("updates", int)
    if emulator is None or seen is None or (factor.diagonal() == 0).any() or not 1 <= updates <= UPDATES:
        raise content.error("holds no base of a family")
    numbers = [*seen.std, seen.strongest, seen.most] if isinstance(seen.std, list) and len(seen.std) == 2 else [None]
    if not all(type(x) in (int, float) and 0 < x < np.inf for x in numbers):
        raise content.error("does not hold what training has seen of sensors")
    seen = replace(seen, std=tuple(seen.std))
    base = OperatorBase(mean, factor, emulator, updates)
    denoiser = OperatorDenoiser(base, network, *unpack_sampling(content, r), content.value("standard_prior", bool))
    return content, denoiser, seen, unpack_history(content)
