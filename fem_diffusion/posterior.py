"""Train, condition, sample: Functions in, Functions out."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.checks import check_choice, check_count, check_device, check_flag, check_readings, check_seed
from fem_diffusion.diffusion import (
    CallableNoise, Denoiser, Formulation, GaussianNoise, History, TrainingOptions, fit_denoiser, log_density,
    sample_latents,
)
from fem_diffusion.diffusion.model_file import read_model, write_model
from fem_diffusion.errors import DataError, InputError
from fem_diffusion.fields.geometry import field_geometry, on_mesh
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.samples import Samples
from fem_diffusion.simulation.simulate import DataSet

__all__ = ["ConditionalModel", "Posterior", "fit", "load_model"]

_TAIL_STREAM = 0x7A11


def fit(data: DataSet, basis: ModalBasis, noise: GaussianNoise | CallableNoise | float | Sequence[float] | None, *,
        network: str = "latents", options: TrainingOptions = TrainingOptions(),
        checkpoint: str | os.PathLike | None = None, progress: bool = True) -> "ConditionalModel":
    """Train a conditional diffusion model on simulated pairs.

    Parameters
    ----------
    data : DataSet
        Pairs of fields and noise-free observations.
    basis : ModalBasis
        Coordinates of the fields.
    noise : GaussianNoise, CallableNoise, float, array_like of shape (k,) or None
        Noise of the measurements, drawn afresh in every batch; numbers are standard deviations, None says that the
        observations already hold noise.
    network : {"latents", "field"}
        Fully connected between latents and measurements, or with layers on the mesh, for one scalar unknown that enters
        the forward map through a nonlinearity at every point; see docs/field_network.md.
    options : TrainingOptions
        Settings of the training loop.
    checkpoint : path, optional
        Training writes its state there and resumes from it.
    progress : bool
        Show a progress bar on rank 0.

    Returns
    -------
    ConditionalModel
        The same on all ranks; rank 0 trains.

    Raises
    ------
    InputError, DataError, FileError
        If the pairs are too few, inconsistent or not finite, or the network is unknown or does not fit the basis; see
        also `train`.
    """
    check_choice(network, "network", ("latents", "field"))
    check_training(data, basis, progress)
    if len(data) == 0 or len(data.fields) != len(data.observations):
        raise DataError(f"The data set holds {len(data.fields)} fields and {len(data.observations)} observations: "
                        "simulate pairs first.")
    comm = basis.V.comm
    z = torch.from_numpy(basis.encode(data.fields))
    standard_prior = is_standard(data, basis, z)
    y = torch.as_tensor(data.observations)
    geometry = field_geometry(basis) if network == "field" else None

    def run():
        return fit_denoiser(z, y, noise, standard_prior=standard_prior, options=options, checkpoint=checkpoint,
                            geometry=geometry, progress=progress)
    denoiser, history = on_root(comm, run)
    return ConditionalModel(basis, denoiser, history)


def check_training(data: DataSet, basis: ModalBasis, progress: bool) -> None:
    """Raise InputError where an argument of `fit` or `fit_family` is of the wrong kind."""
    check_flag(progress, "progress")
    if not isinstance(data, DataSet):
        raise InputError(f"data is of type {type(data).__name__}: give what simulate or load_pairs returned.")
    if not isinstance(basis, ModalBasis):
        raise InputError(f"basis is of type {type(basis).__name__}: give karhunen_loeve(prior) or pod(...).")


def is_standard(data: DataSet, basis: ModalBasis, z: torch.Tensor) -> bool:
    """Whether latents (n, r) of training fields are N(0, I); DataError where they should be and are not."""
    basis.check_draws(z, len(data.skipped) / (len(data) + len(data.skipped)))
    # Where solves have failed, the solver has chosen among the prior's samples.
    return basis.standard_prior and not data.skipped


@dataclass(frozen=True)
class ConditionalModel:
    """A trained model of p(m | y).

    A model moves to another mesh of the same domain by the basis alone: ``ConditionalModel(other_basis,
    model.denoiser, model.history)``, where both bases are Karhunen-Loeve bases of one prior, of equal size.

    Parameters
    ----------
    basis : ModalBasis
        Coordinates of the fields.
    denoiser : Denoiser
        Gaussian base and network.
    history : History
        Training curve.
    """

    basis: ModalBasis
    denoiser: Denoiser
    history: History

    def __post_init__(self):
        if self.basis.r != self.denoiser.base.r:
            raise InputError(f"The basis has {self.basis.r} modes and the model {self.denoiser.base.r} latents: pass a "
                             "basis of the same size, of the prior of the training.")
        object.__setattr__(self, "denoiser", on_mesh(self.denoiser, self.basis))

    def condition(self, y: Sequence[float]) -> "Posterior":
        """Posterior for one measurement.

        Parameters
        ----------
        y : array_like of shape (k,)
            The measurement, in the units and order of the training observations; the same on all ranks.

        Returns
        -------
        Posterior

        Raises
        ------
        InputError
            If the measurement is of the wrong length or not finite; the message names the sensors.
        """
        y = check_readings(y, self.denoiser.base.k)
        self.denoiser.base.check_measurements(torch.from_numpy(y)[None])
        return Posterior(self, y)

    def save(self, path: str | os.PathLike) -> None:
        """Write base, network and training curve to a safetensors file; the basis has `ModalBasis.save`.

        Parameters
        ----------
        path : path
            The file, written whole or not at all by rank 0.

        Raises
        ------
        FileError
            If it cannot be written.
        """
        signature = self.basis.signature
        on_root(self.basis.V.comm, lambda: write_model(path, signature, self.denoiser, self.history))

    def __reduce_ex__(self, protocol):
        raise InputError("A ConditionalModel holds a mesh and cannot be copied or pickled: use its save, and "
                         "load_model.")


def load_model(path: str | os.PathLike, basis: ModalBasis) -> ConditionalModel:
    """Read what `ConditionalModel.save` wrote; no code in the file is run.

    Parameters
    ----------
    path : path
        The file.
    basis : ModalBasis
        The basis of the training: computed again, or from `load_basis`.

    Returns
    -------
    ConditionalModel

    Raises
    ------
    FileError
        If the file is truncated, foreign or belongs to another basis.
    """
    if not isinstance(basis, ModalBasis):
        raise InputError(f"basis is of type {type(basis).__name__}: give that of the training, karhunen_loeve(prior).")
    signature, denoiser, history = on_root(basis.V.comm, lambda: read_model(path))
    basis.check_signature(signature, path)
    return ConditionalModel(basis, denoiser, history)


@dataclass(frozen=True)
class Posterior:
    """p(m | y) for one measurement, ready to be sampled.

    Parameters
    ----------
    model : ConditionalModel
        The trained model.
    y : numpy.ndarray
        The measurement, shape (k,).
    """

    model: ConditionalModel
    y: np.ndarray

    def sample(self, n: int, *, seed: int, alpha: float | Callable[[torch.Tensor], torch.Tensor] = 0.0,
               steps: int = 20, formulation: Formulation | None = None, method: str | None = None,
               coordinates: str = "whitened", nodes: str | None = None, refill: bool | None = None,
               corrections: int | None = None, device: str = "cpu", callback: Callable | None = None,
               progress: bool = False) -> Samples:
        """Draw samples of the parameter.

        Parameters
        ----------
        n : int
            Number of samples.
        seed : int
            Of all draws.
        alpha, steps, formulation, method, coordinates, nodes, corrections, callback
            Of the sampler, as for `sample_latents`: without them the probability-flow ODE in 20 network evaluations, at
            noise levels chosen from the spectrum of the posterior. The callback runs on rank 0 alone: it must not call
            Firedrake, which would wait for the other ranks.
        refill : bool, optional
            Draw the modes past r from the prior; where left out, for a Gaussian prior only.
        device : str
            Where the network runs.
        progress : bool
            Show a progress bar on rank 0.

        Returns
        -------
        Samples

        Raises
        ------
        InputError
            If a number is out of range or a word unknown.
        """
        n, seed, progress = check_count(n), check_seed(seed), check_flag(progress, "progress")
        refill = None if refill is None else check_flag(refill, "refill")
        basis = self.model.basis
        comm = basis.V.comm

        def draw():
            check_device(device)
            y = torch.as_tensor(self.y, dtype=torch.float64, device=device)
            generator = torch.Generator(device).manual_seed(seed)
            return sample_latents(self.model.denoiser.to(device), y.expand(n, -1), formulation, alpha=alpha,
                                  steps=steps, method=method, coordinates=coordinates, nodes=nodes,
                                  corrections=corrections, callback=callback, progress=progress,
                                  generator=generator).cpu()
        z = on_root(comm, draw)
        refill = basis.standard_prior if refill is None else refill
        # A stream of its own, apart from that of the latents and from those of the training pairs.
        tail_seed = int(np.random.SeedSequence([seed, 0, _TAIL_STREAM]).generate_state(1)[0])
        values = basis.parameters(z, tail_seed if refill else None)
        return Samples(basis.parameter_space, values, z)

    def __reduce_ex__(self, protocol):
        raise InputError("A Posterior holds a mesh and cannot be copied or pickled: save the model and the samples.")

    def log_density(self, samples: Samples) -> np.ndarray:
        """Log density of the samples' latents under the diffusion model, without corrections, by `log_density`.

        Parameters
        ----------
        samples : Samples
            Of this posterior or another one of the same model.

        Returns
        -------
        numpy.ndarray
            Shape (n,), the same on all ranks; the modes past r are left out.

        Raises
        ------
        InputError
            If the samples have another number of latents.
        """
        def run():
            y = torch.as_tensor(self.y).expand(len(samples), -1)
            # Random probes are drawn only for many latents.
            return log_density(self.model.denoiser, samples.latents, y, generator=torch.Generator().manual_seed(0))
        return on_root(self.model.basis.V.comm, run).numpy()
