"""The posterior of one measurement by a trained model: Functions out."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from firedrake import Ensemble

from fem_diffusion.checks import alike, check_count, check_device, check_flag, check_kind, check_seed, stream
from fem_diffusion.diffusion import Conditioned, Distance, Sampler, log_density, sample_latents
from fem_diffusion.diffusion.sampling.sample import out_of_range
from fem_diffusion.diffusion.sensors import EmulatedSensors
from fem_diffusion.errors import InputError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import on_root, owned_size
from fem_diffusion.fields.events import event
from fem_diffusion.model.tail import LinearTail
from fem_diffusion.prior.draws import chunks, restricted
from fem_diffusion.problem import InverseProblem
from fem_diffusion.samples import Samples

if TYPE_CHECKING:
    from fem_diffusion.simulation.data_set import DataSet
    from fem_diffusion.trust.check import Check
    from fem_diffusion.trust.cross import CrossValidation

__all__ = ["Posterior"]


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
    sensors : EmulatedSensors or None
        Those of the measurement as the model sees them: it answers other measurements by them, or by some of them.
    """

    problem: InverseProblem
    basis: ModalBasis
    conditioned: Conditioned
    y: np.ndarray
    tail: LinearTail | None = None
    distance: Distance | None = None
    sensors: EmulatedSensors | None = None

    @property
    def far(self) -> bool:
        """Whether the measurement is so far from the training that the model is not asked."""
        return self.distance is not None and self.distance.far

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
            Draw even where the measurement is far outside the training: such samples, which the emulator's density does
            not move unless `sampler` says so, are the start of a correction, and no answer.
        device : str
            Where the network runs.
        callback : Callable, optional
            As for `sample_latents`. It runs on rank 0 alone: it must not call Firedrake, which would wait for the other
            ranks.

        Raises
        ------
        InputError
            If a number is out of range or another one on other ranks, an argument of the wrong kind, or the measurement
            more than twice as far as all that a model which is not exact has seen.
        SolveError
            If a constrained prior allows hardly any sample.
        """
        n, seed = alike(self.problem.comm, lambda: {"n": check_count(n), "seed": check_seed(seed)})
        progress = check_flag(progress, "progress")
        check_kind(sampler, "sampler", Sampler, "a Sampler(...)")
        if self.far and not check_flag(extrapolate, "extrapolate"):
            assert self.distance is not None
            raise InputError("The model does not extrapolate to this measurement, which is more than twice as far away "
                             f"as all that training has seen, mostly at sensor {', '.join(self.distance.worst)}: check "
                             "that; or take laplace(problem, y), which needs no training, or posterior.correct(...), "
                             "which moves samples by the solver itself.")
        refill = self.basis.standard_prior if refill is None else check_flag(refill, "refill")
        sampler = out_of_range(sampler, self.far)

        def draw(seed: int) -> np.ndarray:
            check_device(device)
            return sample_latents(self.conditioned.to(device), n, sampler, seed=seed, callback=callback,
                                  progress=progress)[0].cpu().numpy()
        allows = self.problem.prior.allows
        with event("sample"):
            if allows is None:
                z = on_root(self.problem.comm, lambda: draw(seed))
                return Samples.later(self.problem.M, lambda: self.fields(z, seed, refill, True), z)

            def again(number: int) -> tuple[np.ndarray, ...]:
                mine = stream(seed, f"round {number}")
                z = on_root(self.problem.comm, lambda: draw(mine))
                return self.fields(z, mine, refill), z
            fields, z = restricted(allows, n, again, "the model puts the posterior elsewhere; take hmc(problem, y) or "
                                   "posterior.correct(...), which keep to the constraint")
            return Samples(self.problem.M, self.problem.prior.transform_many(fields), z)

    def fields(self, z: np.ndarray, seed: int, refill: bool, transformed: bool = False) -> np.ndarray:
        """Coefficients of what `sample` makes of latents (n, r): fields (n, n_owned of V), or parameters."""
        out = np.empty((len(z), owned_size(self.problem.M if transformed else self.problem.V)))
        for part, tail in chunks(len(z), seed):
            values = self.basis.decode(z[part], tail if refill else None)
            if refill and self.tail is not None:
                modes = self.basis.decode(z[part])
                values -= modes
                values = self.tail.given(values, self.y, z[part], tail, self.problem.comm)
                values += modes
            out[part] = self.problem.prior.transform_many(values) if transformed else values
        return out

    def predictive(self, n: int, *, seed: int) -> np.ndarray:
        """Readings with noise of n samples, shape (n, k), one solve each: what the sensors may read once more."""
        return self.problem.measurements(self.sample(n, seed=seed, progress=False).values, seed=seed)

    def log_density(self, samples: Samples) -> np.ndarray:
        """Log density (n,) of the samples' latents by the model, as `diffusion.log_density` has it.

        The samples are of this posterior or another one in the same basis, InputError if they have another number of
        latents. Modes past r are left out.
        """
        z = torch.as_tensor(check_kind(samples, "samples", Samples, "what sample returned").latents)[None]
        return on_root(self.problem.comm, lambda: log_density(self.conditioned, z)[0].numpy())

    def correct(self, solves: int = 2000, *, seed: int, draws: int | None = None,
                log_prior: Callable[[np.ndarray], np.ndarray] | None = None, path: str | os.PathLike | None = None,
                ensemble: Ensemble | None = None, progress: bool = True) -> Samples:
        """Samples of the finite element posterior itself, by the forward problem, from amortised ones (collective).

        Samples get weights where their density is known and near; otherwise a surrogate of the forward problem learns
        from all solves where the posterior is, and its samples get weights or are accepted by the forward problem; with
        exact gradients where that fails. Modes past r take part.

        Parameters
        ----------
        solves : int
            Forward solves, at most, and as many adjoint ones; some dozens of them tell what modes that are left out add
            to readings.
        draws : int, optional
            Number of samples; as many as the solves give where left out.
        log_prior : callable, optional
            Log density of latents, (B, r) to (B,), of a POD basis, whose latents are not standard normal.
        path : path, optional
            A folder that keeps the solves: the same call goes on where it was, also with more solves.
        ensemble : firedrake.Ensemble, optional
            Shares out the solves over its members, each with a posterior on a mesh of its own communicator.

        The samples have a `certificate`. InputError is raised if an argument is out of range, or prior or noise has no
        density; SolveError if the solves do not suffice, with what would; FileError if the folder is of another run.

        Warns
        -----
        MeasurementWarning
            If the residuals of the corrected samples are not those of the noise.
        ConvergenceWarning
            If there are less than 100 effective samples, or R-hat is above 1.05; less than 30 or 1.2 are refused.
        """
        from fem_diffusion.trust.correct import correct

        return correct(self, solves, seed=seed, draws=draws, log_prior=log_prior, path=path, ensemble=ensemble,
                       progress=progress)

    def check(self, solves: int = 50, *, seed: int = 0, data: "DataSet | None" = None) -> "Check":
        """What some solves say about this posterior, in words and numbers: see `fem_diffusion.trust.check`."""
        from fem_diffusion.trust.check import check

        return check(self, solves, seed=seed, data=data)

    def cross_validate(self, *, draws: int = 200, seed: int = 0) -> "CrossValidation":
        """Each sensor predicted from the others, without a solve and without a truth (collective).

        It names sensors that disagree, tells how often predictions hold, and by what the noise would have to be
        multiplied; of measurements at many times `Posteriors` has the same. `draws` and `seed` are those of samples,
        where predictions are not known in closed form. See `fem_diffusion.trust.cross`. InputError where there are no
        two sensors, or a number is out of range.
        """
        from fem_diffusion.trust.cross import cross_validate

        if self.sensors is None:
            raise InputError("The posterior does not know its model's sensors: take one of model.condition(y).")
        names = self.problem.names or tuple(map(str, range(len(self.y))))
        return cross_validate(self.sensors, self.y[None], names, self.problem.comm, draws=draws, seed=seed)

    def report(self, path: str | os.PathLike, **given: Any) -> Path:
        """Write a page for people who decide, with the verdict of `check`; see `fem_diffusion.report`."""
        from fem_diffusion.trust.report import report

        return report(self, path, **given)

    def __repr__(self) -> str:
        network = "Gaussian" if self.conditioned.network is None else "Gaussian with a network"
        moves = "" if self.conditioned.density is None else ", samples corrected by the emulator's density"
        return f"Posterior: {network} over {self.basis.r} modes{moves}\n{self.problem!r}"

    def __reduce_ex__(self, protocol: int) -> None:
        raise InputError("A Posterior holds a mesh and cannot be copied or pickled: save the model and the samples.")
