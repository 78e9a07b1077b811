"""Families of sensors in coordinates of the state: what training draws layouts from."""

import warnings

import numpy as np
import torch
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI

from fem_diffusion.checks import check_count
from fem_diffusion.diffusion import LayoutFamily, LayoutKind
from fem_diffusion.errors import DataError, InputError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import by_component, coefficients, field, owned_size
from fem_diffusion.fields.modes import leading_modes, sample_covariance
from fem_diffusion.observation.family import SensorFamily
from fem_diffusion.observation.linear import Observation
from fem_diffusion.simulation.data_set import DataSet

__all__ = ["layout_family", "project", "sample_basis"]

_STATES, _CHECKED, _MOST_MODES = 4000, 500, 256
_RETAINED = 1 - 1e-8
# What state modes may miss of a reading, in units of its noise.
_MISSED = 0.2


def layout_family(family: SensorFamily, data: DataSet,
                  state_modes: int | None) -> tuple[ModalBasis, torch.Tensor, LayoutFamily]:
    """What a family is in latent coordinates (collective), with `state_modes` as for `fit`.

    Returns POD modes of the states, coordinates (n, s) of the data's states in them, the same on all ranks, and the
    family as rows over such coordinates. DataError if the data have no states, or states that are not finite or all the
    same; InputError if so many modes cannot be had.
    """
    if data.states is None:
        raise DataError("A model of a family is trained on states, and the data set has none: "
                        "simulate(problem, n, seed=...) of a problem with a SensorFamily keeps them.")
    # The last states are not among those that the modes are made of.
    apart = min(_CHECKED, len(data) // 10)
    states = sample_basis(family.U, data.states[:len(data) - apart][:_STATES], state_modes)
    c = torch.from_numpy(states.encode(data.states))
    kinds = []
    for kind in family.kinds:
        rows, offset = project(kind.observation, states)
        std = torch.tensor(kind.std_range)
        _check_modes(kind.observation, data.states[len(data) - apart:], c[len(data) - apart:], rows, offset, std[0])
        shape = (-1, kind.series)
        kinds.append(LayoutKind(rows.unflatten(0, shape), offset.unflatten(0, shape), std.unflatten(1, shape),
                                kind.count))
    return states, c, LayoutFamily(tuple(kinds))


def sample_basis(U: WithGeometry, states: np.ndarray, size: int | None = None, most: int = _MOST_MODES) -> ModalBasis:
    """POD modes of samples, as many as asked for or as are needed, at most `most` and as many as the samples span."""
    mean = states.mean(axis=0)
    centred = states - mean
    finite = U.comm.allreduce(bool(np.isfinite(centred).all()), MPI.LAND)
    parts = by_component(U, centred) if finite and len(states) > 1 else []
    totals = np.array([sample_covariance(W, part).total for W, part in zip(U, parts)])
    if not (totals > 0).any():
        raise DataError("The states or fields are not finite or all the same: check the forward problem and the prior.")
    # Components of a mixed space count by shares of variance: pressures beside velocities lose nothing.
    totals = np.where(totals > 0, totals, 1.0) if len(U) > 1 else np.ones(1)
    units = np.concatenate([np.full(owned_size(W), total**0.5) for W, total in zip(U, totals)])
    most = min(most, len(states) - 1, U.dim())
    if size is not None and not 1 <= check_count(size, "state_modes") <= most:
        raise InputError(f"state_modes is {size}: between 1 and {most} modes can be had here.")
    modes, variances, total = leading_modes(sample_covariance(U, centred / units), U, (), size, retained=_RETAINED,
                                            most=most, fewer=True)
    return ModalBasis(U, field(U, mean, name="mean"), modes * units, variances, total,
                      weights=tuple((1 / totals).tolist()) if len(U) > 1 else None)


def project(observation: Observation, states: ModalBasis) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows over the state coordinates (k, s) and readings of the mean state (k,), the same on all ranks."""
    rows, offset = observation.apply(states.scaled_modes).T, observation.apply(coefficients(states.mean)[None])[0]
    return torch.tensor(rows), torch.tensor(offset)


def _check_modes(observation: Observation, states: np.ndarray, c: torch.Tensor, rows: torch.Tensor,
                 offset: torch.Tensor, std: torch.Tensor) -> None:
    """Warn where the state modes miss more of a reading than its noise forgives."""
    if not len(states):
        return
    missed = torch.tensor(observation.apply(states)) - offset - c @ rows.T
    worst = float((missed.square().mean(0).sqrt() / std).max())
    if worst > _MISSED:
        warnings.warn(f"The {rows.shape[1]} state modes miss up to {worst:.2g} noise standard deviations of a reading: "
                      "raise state_modes, or place sensors away from where the state is rough.", stacklevel=4)
