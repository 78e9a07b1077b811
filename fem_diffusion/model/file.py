"""A trained model as one file: bases by keys of the mesh, tensors and settings, checked to make up a model."""

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from fem_diffusion import files
from fem_diffusion.checks import LARGEST
from fem_diffusion.diffusion import Denoiser, TrainingRange
from fem_diffusion.diffusion.packing import REMEDY, pack, pack_denoiser, unpack, unpack_denoiser, unpack_law
from fem_diffusion.errors import FileError
from fem_diffusion.fields.basis import ModalBasis, pack_basis, unpack_basis
from fem_diffusion.fields.coefficients import by_component, on_root
from fem_diffusion.fields.keyed import gather_rows, own_columns, read_everywhere
from fem_diffusion.problem import InverseProblem

if TYPE_CHECKING:
    from fem_diffusion.model.model import Model

__all__ = ["read_model", "write_model"]

# Normal numbers of levels at which noise is compared.
_LEVELS = -2.0, 0.0, 2.0
# Latents of the fields at which transforms of the prior are compared.
_PLACE = 0.5


def write_model(path: str | os.PathLike, model: "Model") -> None:
    """Write all of a model but its problem; see `Model.save` (collective)."""
    arrays, values = pack_basis(model.basis, "basis")
    if model.states is not None:
        parts = pack_basis(model.states, "states")
        arrays, values = arrays | parts[0], values | parts[1]

    if model.rows is not None:
        arrays = arrays | {"rows": gather_rows(model.basis.V, model.rows)}

    if model.seen is not None:
        arrays = arrays | {"seen": model.seen.numpy()}

    if model.near is not None:
        arrays = arrays | {"near": model.near}

    parameter = _parameter(model.problem, model.basis)

    def write() -> None:
        tensors, settings = pack_denoiser(model.denoiser, model.history)
        seen, shown = pack({"range": model.range})
        files.write(path, "model", arrays | tensors | seen | {
            "noise": _noise(model.problem, model.denoiser), "parameter": parameter},
                    values | settings | shown | {"family": model.problem.family, "linear": model.linear,
                                                 "names": model.problem.names})
    on_root(model.problem.comm, write)


def read_model(path: str | os.PathLike, problem: InverseProblem) -> dict:
    """The parts of a model by their names in `Model`; see `load_model` (collective)."""
    content = read_everywhere(problem.comm, path, "model", REMEDY)
    denoiser, history = unpack_denoiser(content)
    basis = unpack_basis(content, "basis", problem.V, problem.prior)
    denoiser = unpack_law(content, denoiser, problem.noise)
    if basis.r != denoiser.base.r:
        raise content.error("holds a basis and a model of different sizes")
    same = content.value("names", list) == list(problem.names) and problem.k in (None, denoiser.base.k)
    if content.value("family", bool) != problem.family or not same:
        raise FileError(f"{path} was trained for other sensors: pass the problem of its training.")
    stored, found = content.array("noise", None), _noise(problem, denoiser)
    if stored.shape != found.shape or not np.allclose(stored, found, rtol=1e-6, atol=0):
        raise FileError(f"{path} was trained for other noise: pass the problem of its training.")
    stored, found = content.array("parameter", None), _parameter(problem, basis)
    if stored.shape != found.shape or not np.allclose(stored, found, rtol=1e-6, atol=1e-9 * np.abs(stored).max()):
        raise FileError(f"{path} was trained with another transform of the prior: pass the problem of its training.")
    parts = {"basis": basis, "denoiser": denoiser, "history": history, "linear": content.value("linear", bool)}
    if "rows" in content.arrays:
        rows = content.array("rows", denoiser.base.k, len(content.arrays["basis.key"]))
        parts["rows"] = rows[:, own_columns(content, "basis.key", "basis.element", problem.V)]
    if "seen" in content.arrays:
        seen = content.array("seen", None, denoiser.base.k + len(problem.levels))
        if (np.abs(seen) > LARGEST).any():
            raise content.error("holds readings too large to calculate with")
        parts["seen"] = torch.from_numpy(seen)
    if "near" in content.arrays:
        parts["near"] = content.array("near", denoiser.base.k)
    if not problem.family:
        return parts
    states = unpack_basis(content, "states", problem.U)
    if states.r != denoiser.base.k:
        raise content.error("holds states and a model of different sizes")
    return parts | {"states": states, "range": _range(content, states.r)}


def _parameter(problem: InverseProblem, basis: ModalBasis) -> np.ndarray:
    """What the prior's transform makes of two fields: sum and sum of squares of each component (collective)."""
    values = problem.prior.transform_many(basis.decode(np.array([[_PLACE], [-_PLACE]]) * np.ones(basis.r)))
    parts = by_component(problem.M, values)
    return problem.comm.allreduce(np.concatenate([np.append(part.sum(axis=1), (part**2).sum(axis=1))
                                                  for part in parts]))


def _noise(problem: InverseProblem, denoiser: Denoiser) -> np.ndarray:
    """Standard deviations of the noise of fixed sensors at mean readings, at some numbers of its levels.

    None of noise of the user's own; of outliers the density there as well.
    """
    noise, at = problem.noise, denoiser.base.emulator.offset[None]
    at = at if denoiser.readings is None else denoiser.readings.inverse(at)
    if problem.family or noise is None or not noise.told:
        return np.zeros(0)
    places = [torch.cat([at, at.new_full((1, len(noise.levels)), x)], 1) for x in (_LEVELS if noise.levels else [0.0])]
    found = [noise.covariance(x).diagonal().sqrt().numpy() for x in places]
    if noise.heavy and noise.log_density is not None:
        found += [noise.log_density(at[0], x).numpy() for x in places]
    return np.concatenate(found)


def _range(content: files.Content, s: int) -> TrainingRange:
    """What training has seen of sensors."""
    seen = unpack(content, "range", TrainingRange, {"signals": (None, s)}, dtype=torch.float32)
    if seen is None:
        raise content.error("does not hold what training has seen of sensors")
    pair = isinstance(seen.std, list) and len(seen.std) == 2
    if not pair or not all(type(x) in (int, float) and 0 < x < np.inf for x in (*seen.std, seen.strongest, seen.most)):
        raise content.error("does not hold what training has seen of sensors")
    return replace(seen, std=tuple(seen.std))
