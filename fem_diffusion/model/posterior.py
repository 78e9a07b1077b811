"""The posterior of one measurement by a trained model: Functions out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fem_diffusion.checks import check_count, check_device, check_flag, check_kind, check_seed
from fem_diffusion.diffusion import Conditioned, Distance, Sampler, log_density, sample_latents
from fem_diffusion.errors import InputError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.fields.events import event
from fem_diffusion.model.tail import LinearTail
from fem_diffusion.problem import InverseProblem
from fem_diffusion.samples import Samples

__all__ = ["Posterior"]

_TAIL_STREAM = 0x7A11


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """p(m | y) for one measurement by a trained model, ready to be sampled.

    Parameters
    ----------
    problem : InverseProblem
        Of fixed sensors: those of the measurement, of a family without those that failed, and their noise.
    basis : ModalBasis
        Coordinates of the fields.
    conditioned : Conditioned
        The denoiser with the measurement built in.
    y : numpy.ndarray
        The measurement, shape (k,), the same on all ranks, without sensors that failed.
    tail : LinearTail or None
        What the readings tell of modes past those of the basis, where the problem is linear.
    distance : Distance or None
        How far the measurement is from those of the training, where these are known.
    """

    problem: InverseProblem
    basis: ModalBasis
    conditioned: Conditioned
    y: np.ndarray
    tail: LinearTail | None = None
    distance: Distance | None = None

    def sample(self, n: int, *, seed: int, sampler: Sampler = Sampler(), refill: bool | None = None,
               extrapolate: bool = False, device: str = "cpu",
               callback: Callable[[int, float, torch.Tensor], None] | None = None, progress: bool = True) -> Samples:
        """Draw samples of the parameter.

        Parameters
        ----------
        sampler : Sampler
            How: the probability-flow ODE in 20 network evaluations where left out, at noise levels chosen from the
            spectrum of the posterior.
        refill : bool, optional
            Draw the modes past r as well, from the prior or, where the problem is linear, given the readings; where
            left out, for a Gaussian prior only.
        extrapolate : bool
            Draw even where the measurement is far outside the training: such samples are the start of a correction, and
            no answer.
        device : str
            Where the network runs.
        callback : Callable, optional
            As for `sample_latents`. It runs on rank 0 alone: it must not call Firedrake, which would wait for the other
            ranks.

        Raises
        ------
        InputError
            If a number is out of range or an argument of the wrong kind, or the measurement is more than twice as far
            as all that a model which is not exact has seen.
        """
        n, seed, progress = check_count(n), check_seed(seed), check_flag(progress, "progress")
        check_kind(sampler, "sampler", Sampler, "a Sampler(...)")
        if self.distance is not None and self.distance.far and not check_flag(extrapolate, "extrapolate"):
            raise InputError("The model does not extrapolate to this measurement, which is more than twice as far as "
                             f"all that training has seen: {', '.join(self.distance.worst)} read otherwise. Check those"
                             " sensors; or take laplace(problem, y), which needs no training, or "
                             "posterior.correct(...), which moves samples by the solver itself.")
        refill = self.basis.standard_prior if refill is None else check_flag(refill, "refill")

        def draw() -> np.ndarray:
            check_device(device)
            return sample_latents(self.conditioned.to(device), n, sampler, seed=seed, callback=callback,
                                  progress=progress)[0].cpu().numpy()
        with event("sample"):
            z = on_root(self.problem.comm, draw)
            # A stream of its own, apart from that of the latents and from those of the training pairs.
            stream = int(np.random.SeedSequence([seed, 0, _TAIL_STREAM]).generate_state(1)[0])
            values = self.basis.decode(z, stream if refill else None)
            if refill and self.tail is not None:
                part = self.basis.decode(z)
                values = part + self.tail.given(values - part, self.y, z, stream, self.problem.comm)
            return Samples(self.problem.M, self.problem.prior.transform_many(values), z)

    def predictive(self, n: int, *, seed: int) -> np.ndarray:
        """Readings with noise of n samples, shape (n, k), one solve each: what the sensors may read once more."""
        return self.problem.measurements(self.sample(n, seed=seed, progress=False).values, seed=seed)

    def log_density(self, samples: Samples) -> np.ndarray:
        """Log density (n,) of the samples' latents under the diffusion model, without corrections, by `log_density`.

        The samples are of this posterior or another one in the same basis, InputError if they have another number of
        latents. Modes past r are left out.
        """
        z = torch.as_tensor(check_kind(samples, "samples", Samples, "what sample returned").latents)[None]
        return on_root(self.problem.comm, lambda: log_density(self.conditioned, z)[0].numpy())

    def __repr__(self) -> str:
        network = "Gaussian" if self.conditioned.network is None else "Gaussian with a network"
        moves = "" if self.conditioned.density is None else ", samples corrected by the emulator's density"
        return f"Posterior: {network} over {self.basis.r} modes{moves}\n{self.problem!r}"

    def __reduce_ex__(self, protocol: int) -> None:
        raise InputError("A Posterior holds a mesh and cannot be copied or pickled: save the model and the samples.")
