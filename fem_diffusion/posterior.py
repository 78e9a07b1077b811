"""Train, condition, sample, summarise: Functions in, Functions out."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from firedrake import CheckpointFile, Function, VTKFile

from fem_diffusion.bridge import ModalBasis
from fem_diffusion.diffusion import (
    CallableNoise, Denoiser, Formulation, GaussianNoise, History, TrainingOptions, fit_denoiser, log_density,
    sample_latents,
)
from fem_diffusion.diffusion.model_file import read_model, write_model
from fem_diffusion.errors import DataError, InputError, InstallError
from fem_diffusion.field_geometry import field_geometry, on_mesh
from fem_diffusion.fields import field, on_root, owned_size
from fem_diffusion.simulation import DataSet

__all__ = ["ConditionalModel", "Posterior", "Samples", "fit", "load_model"]

_TAIL_STREAM = 0x7A11


def fit(data: DataSet, basis: ModalBasis, noise: GaussianNoise | CallableNoise | None, *,
        network: str = "latents", options: TrainingOptions = TrainingOptions(),
        checkpoint: str | os.PathLike | None = None, progress: bool = True) -> "ConditionalModel":
    """Train a conditional diffusion model on simulated pairs.

    Parameters
    ----------
    data : DataSet
        Pairs of fields and noise-free observations.
    basis : ModalBasis
        Coordinates of the fields.
    noise : GaussianNoise, CallableNoise or None
        Noise of the measurements, drawn afresh in every batch; None where the observations already hold noise.
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
    if network not in ("latents", "field"):
        raise InputError(f"The network is 'latents' or 'field', not {network!r}.")
    if len(data) == 0 or len(data.fields) != len(data.observations):
        raise DataError(f"The data set holds {len(data.fields)} fields and {len(data.observations)} observations: "
                        "simulate pairs first.")
    comm = basis.V.comm
    z = basis.encode(data.fields)
    y = torch.as_tensor(data.observations, dtype=torch.float64)
    geometry = field_geometry(basis) if network == "field" else None

    def run():
        return fit_denoiser(z, y, noise, standard_prior=basis.standard_prior, options=options, checkpoint=checkpoint,
                            geometry=geometry, progress=progress)
    denoiser, history = on_root(comm, run)
    return ConditionalModel(basis, denoiser, history)


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
        y = np.asarray(y, dtype=float)
        k = self.denoiser.base.k
        if y.shape != (k,):
            raise InputError(f"The model was trained for {k} sensors; the measurement has shape {y.shape}.")
        bad = np.flatnonzero(~np.isfinite(y)).tolist()
        if bad:
            raise InputError(f"The readings of sensors {bad} are not finite. A model for this set of sensors needs "
                             "all of them: repair the readings, or train a model without those sensors.")
        return Posterior(self, y)

    def save(self, path: str | os.PathLike) -> None:
        """Write base, network and training curve to a safetensors file; the basis has `ModalBasis.save`.

        Parameters
        ----------
        path : path
            The file, written atomically by rank 0.
        """
        signature = self.basis.signature
        on_root(self.basis.V.comm, lambda: write_model(path, signature, self.denoiser, self.history))


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
               progress: bool = False) -> "Samples":
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
        if n < 1:
            raise InputError(f"The number of samples must be at least 1, not {n}.")
        basis = self.model.basis
        comm = basis.V.comm

        def draw():
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

    def log_density(self, samples: "Samples") -> np.ndarray:
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


@dataclass(frozen=True)
class Samples:
    """Samples of the parameter: a sequence of Functions with summaries.

    Parameters
    ----------
    V : firedrake.functionspaceimpl.WithGeometry
        Space of the parameter.
    values : numpy.ndarray
        Owned coefficients, shape (n, n_owned).
    latents : torch.Tensor
        Latents, shape (n, r), global.
    """

    V: object
    values: np.ndarray
    latents: torch.Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Function:
        return field(self.V, self.values[index], name=f"sample_{index}")

    def __iter__(self) -> Iterator[Function]:
        return (self[i] for i in range(len(self)))

    def component(self, i: int) -> "Samples":
        """Samples of one component of a mixed parameter, for pictures and files; `latents` stay those of all.

        Parameters
        ----------
        i : int
            Index of the component.

        Returns
        -------
        Samples
            In the component's own space.

        Raises
        ------
        InputError
            If there is no such component.
        """
        if not 0 <= i < len(self.V):
            raise InputError(f"There is no component {i}: the parameter has {len(self.V)}, counted from 0.")
        sizes = [owned_size(W) for W in self.V]
        columns = slice(sum(sizes[:i]), sum(sizes[:i + 1]))
        return Samples(self.V[i].collapse() if len(self.V) > 1 else self.V, self.values[:, columns], self.latents)

    def mean(self) -> Function:
        """Pointwise mean at the nodes."""
        return field(self.V, self.values.mean(axis=0), name="mean")

    def std(self) -> Function:
        """Pointwise standard deviation at the nodes."""
        if len(self) < 2:
            raise InputError("A standard deviation needs at least 2 samples.")
        return field(self.V, self.values.std(axis=0, ddof=1), name="std")

    def quantile(self, q: float) -> Function:
        """Pointwise quantile at the nodes, 0 <= q <= 1."""
        if not 0 <= q <= 1:
            raise InputError(f"A quantile lies between 0 and 1, not at {q}.")
        return field(self.V, np.quantile(self.values, q, axis=0), name=f"quantile_{q:g}")

    def save(self, folder: str | os.PathLike, count: int = 20) -> None:
        """Write summaries and the first samples for restart (CheckpointFile) and for viewing (VTK).

        Parameters
        ----------
        folder : path
            Receives ``samples.h5``, which appears when it is whole, and ``summary.pvd``; of a mixed parameter a
            folder for each component, ``component_0`` and so on.
        count : int
            Number of samples in the checkpoint.

        Raises
        ------
        InstallError
            If VTK is not installed; the checkpoint is written all the same.
        """
        folder, comm = Path(folder), self.V.comm
        if len(self.V) > 1:
            for i in range(len(self.V)):
                self.component(i).save(folder / f"component_{i}", count)
            return
        on_root(comm, lambda: folder.mkdir(parents=True, exist_ok=True))
        summary = [self.mean(), self.std(), self.quantile(0.025), self.quantile(0.975)]
        partial = folder / "samples.partial.h5"
        with CheckpointFile(str(partial), "w", comm=comm) as file:
            file.save_mesh(self.V.mesh())
            for function in summary + [self[i] for i in range(min(count, len(self)))]:
                file.save_function(function)
        on_root(comm, lambda: partial.replace(folder / "samples.h5"))
        try:
            file = VTKFile(str(folder / "summary.pvd"), comm=comm)
        except ModuleNotFoundError as error:
            raise InstallError(f"{folder / 'samples.h5'} is written; files for viewing need VTK: "
                               "pip install 'fem_diffusion[vtk]'.") from error
        file.write(*summary)

    def plot(self, axes=None, truth: Function | None = None, **kwargs):
        """Draw the samples; see `fem_diffusion.plot.plot_samples`."""
        from fem_diffusion.plot import plot_samples
        return plot_samples(self, axes=axes, truth=truth, **kwargs)
