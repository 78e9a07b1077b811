"""One trained model for many observation operators: fit it once, condition it on any sensors of its family."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI

from fem_diffusion.bridge import ModalBasis
from fem_diffusion.diffusion import (
    Emulator, GaussianNoise, History, LayoutLaw, OperatorBase, OperatorDenoiser, Seen, SensorNetwork, SensorPool,
    Sensors, Spectrum, Support, TrainingOptions, fit_operators,
)
from fem_diffusion.diffusion.model_file import Content, read_content, write_content
from fem_diffusion.eigenmodes import leading_modes, sample_covariance
from fem_diffusion.errors import DataError, InputError, FileError
from fem_diffusion.fields import coefficients, field, geometric_key, on_root, owned_columns
from fem_diffusion.posterior import ConditionalModel, Posterior
from fem_diffusion.problem.family import OperatorFamily
from fem_diffusion.problem.observation import Observation, no_sensors
from fem_diffusion.simulation import DataSet

__all__ = ["FamilyModel", "fit_family", "load_family"]

_FORMAT = "fem_diffusion family model 2"
_STATE_PARTS = "key", "mean", "modes", "variances"
_STATES, _CHECKED, _MOST_MODES = 4000, 500, 256
_RETAINED = 1 - 1e-8
# What state modes may miss of a reading, in units of its noise.
_MISSED = 0.2
# Smallest variance of noise, in units of the prior variance of the reading.
_FLOOR = 1e-12


def fit_family(data: DataSet, basis: ModalBasis, family: OperatorFamily, *,
               options: TrainingOptions = TrainingOptions(), state_modes: int | None = None,
               checkpoint: str | os.PathLike | None = None, progress: bool = True) -> "FamilyModel":
    """Train one model for all observation operators of a family.

    Parameters
    ----------
    data : DataSet
        With states: ``simulate(prior, forward, U, n, seed=...)``.
    basis : ModalBasis
        Coordinates of the fields.
    family : OperatorFamily
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
    if data.states is None or not len(data):
        raise DataError("A model of many operators is trained on states, and the data set has none: "
                        "simulate(prior, forward, U, n, seed=..., path=...) with the space U of the states keeps them.")
    U = family.U
    # The last states are not among those that the modes are made of.
    apart = min(_CHECKED, len(data) // 10)
    states = _state_basis(U, data.states[:len(data) - apart][:_STATES], state_modes)
    z, c = basis.encode(data.fields), states.encode(data.states)
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
        return fit_operators(z, c, torch.tensor(states.variances).sqrt(), law, standard_prior=basis.standard_prior,
                             options=options, checkpoint=checkpoint, progress=progress)
    denoiser, history = on_root(U.comm, run)
    return FamilyModel(basis, states, denoiser, history, Seen.of(law))


def _state_basis(U, states: np.ndarray, size: int | None) -> ModalBasis:
    """POD modes of the states, as many as asked for or as are needed, at most as many as the states span."""
    mean = states.mean(axis=0)
    centred = states - mean
    finite = U.comm.allreduce(bool(np.isfinite(centred).all()), MPI.LAND)
    total = 0.0
    if finite and len(states) > 1:
        covariance, total = sample_covariance(U, centred)
    if not total > 0:
        raise DataError("The states are not finite or all the same: check the forward problem.")
    most = min(_MOST_MODES, len(states) - 1, U.dim())
    if size is not None and not 1 <= size <= most:
        raise InputError(f"state_modes is {size}: between 1 and {most} modes can be had here.")
    count = 16 if size is None else size
    while True:
        modes, variances = leading_modes(covariance, U, (), min(count, most), fewer=True)
        enough = np.flatnonzero(np.cumsum(variances) >= _RETAINED * total)
        if size is None and len(enough):
            modes, variances = modes[:enough[0] + 1], variances[:enough[0] + 1]
        if size is not None or len(enough) or len(variances) < count:
            return ModalBasis(U, field(U, mean, name="mean"), modes, variances, total)
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
                  noise: GaussianNoise | None = None) -> Posterior:
        """Posterior for one measurement by any sensors.

        Parameters
        ----------
        observation : Observation or None
            The sensors, on the space of the states; None where there are none, which gives the prior.
        y : array_like of shape (k,)
            Their readings, the same on all ranks. NaN stands for a sensor that failed: it is left out.
        noise : GaussianNoise
            Of these sensors; a part relative to the noise-free value takes the reading in its place. May be left out
            where there are no sensors.

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
        y = np.asarray(y, dtype=float)
        if not isinstance(observation, Observation) or observation.U != self.states.V:
            raise InputError(f"The sensors must be an Observation of states in {self.states.V}, such as "
                             "point_sensors(U, points) with that space U.")
        if y.shape != (len(observation),):
            raise InputError(f"{len(observation)} sensors give as many readings; y has shape {y.shape}.")
        if np.isinf(y).any():
            raise InputError(f"The readings of sensors {np.flatnonzero(np.isinf(y)).tolist()} are infinite: repair "
                             "them, or give NaN for a sensor that failed.")
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
            The file, written atomically by rank 0; it is read on any number of ranks.
        """
        U, comm, model = self.states.V, self.states.V.comm, self.denoiser
        gathered = [comm.gather(x) for x in (geometric_key(U)[None], coefficients(self.states.mean)[None],
                                             self.states.modes)]
        signature = self.basis.signature

        def write():
            key, mean, modes = (torch.tensor(np.concatenate(parts, axis=1)) for parts in gathered)
            tensors = {"states.key": key[0], "states.mean": mean[0], "states.modes": modes,
                       "states.variances": torch.tensor(self.states.variances), "seen.signals": self.seen.signals,
                       "basis.signature": torch.tensor(signature), "base.mean": model.base.mean,
                       "base.factor": model.base.factor}
            parts = {"emulator": (model.base.emulator, [Emulator]), "network": (model.network, [SensorNetwork]),
                     "spectrum": model.spectrum, "support": model.support}
            config = {"standard_prior": model.standard_prior, "total_variance": self.states.total_variance,
                      "std": self.seen.std, "most": self.seen.most, "strongest": self.seen.strongest,
                      "updates": model.base.updates}
            write_content(path, _FORMAT, tensors, parts, config, self.history)
        on_root(comm, write)


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
    content, denoiser, seen = on_root(U.comm, lambda: _read(path))
    key, mean, modes, variances = (content.tensors[f"states.{name}"].numpy() for name in _STATE_PARTS)
    basis.check_signature(content.tensors["basis.signature"].numpy(), path)
    columns = owned_columns(key, U)
    if columns is None:
        raise FileError(f"{path} belongs to another mesh or space of states: pass those of its training.")
    states = ModalBasis(U, field(U, mean[columns], name="mean"), modes[:, columns], variances,
                        content.config["total_variance"])
    return FamilyModel(basis, states, denoiser, content.history, seen)


def _read(path) -> tuple[Content, OperatorDenoiser, Seen]:
    """Content of a file, and the parts that know no mesh."""
    with read_content(path, _FORMAT) as content:
        tensors, config = content.tensors, content.config
        missing = {"basis.signature", *(f"states.{name}" for name in _STATE_PARTS)} - set(tensors)
        missing |= {"total_variance"} - set(config)
        if missing:
            raise KeyError(f"{sorted(missing)} missing")
        base = OperatorBase(tensors["base.mean"], tensors["base.factor"], content.part("emulator", Emulator),
                            int(config["updates"]))
        denoiser = OperatorDenoiser(base, content.part("network", SensorNetwork), content.part("spectrum", Spectrum),
                                    content.part("support", Support), bool(config["standard_prior"]))
        seen = Seen(tensors["seen.signals"], tuple(config["std"]), config["most"], config["strongest"])
        return content, denoiser, seen
