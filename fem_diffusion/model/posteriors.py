"""Posteriors of several measurements by the same sensors, such as readings at many times, all at once."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from fem_diffusion.checks import alike, check_choices, check_count, check_flag, check_kind, check_seed, stream
from fem_diffusion.diffusion import MeasurementWarning, Sampler, sample_latents
from fem_diffusion.diffusion.sampling.sample import out_of_range
from fem_diffusion.diffusion.sensors import EmulatedSensors
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.measurements.table import instant
from fem_diffusion.model.posterior import Posterior
from fem_diffusion.observation.linear import Observation
from fem_diffusion.progress import bar
from fem_diffusion.samples import Samples

if TYPE_CHECKING:
    from fem_diffusion.model.model import Model
    from fem_diffusion.trust.cross import CrossValidation

__all__ = ["Posteriors", "condition_all"]

_TOLD = 3


@dataclass(frozen=True, eq=False, repr=False)
class Posteriors:
    """A sequence of posteriors, one for each of m measurements, from `Model.condition_all`.

    ``posteriors[3]`` is one of them, ``posteriors[::6]`` are some, by a slice, a mask or their numbers.

    Parameters
    ----------
    each : tuple of Posterior
        With ``problem`` and ``y`` of the sensors that had not failed.
    times : numpy.ndarray
        When they were made, shape (m,).
    values : numpy.ndarray
        The measurements, NaN where a sensor failed, shape (m, k).
    sensors : EmulatedSensors
        All k sensors as the model sees them.
    names : tuple of str
        Of these.
    """

    each: tuple[Posterior, ...]
    times: np.ndarray
    values: np.ndarray
    sensors: EmulatedSensors
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.each)

    def __iter__(self) -> Iterator[Posterior]:
        return iter(self.each)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> "Posterior | Posteriors":
        """One posterior, or some of them; InputError where there is no such choice."""
        if isinstance(index, Integral) and not isinstance(index, bool):
            return self.each[int(index)]    # its IndexError ends a loop over a sequence
        chosen = check_choices(index, len(self), "posteriors")
        return replace(self, each=tuple(self.each[i] for i in chosen), times=self.times[chosen],
                       values=self.values[chosen])

    @property
    def far(self) -> np.ndarray:
        """Which measurements are so far from the training that the model is not asked, shape (m,), bool."""
        return np.array([one.far for one in self.each])

    @property
    def unlike(self) -> np.ndarray:
        """Which measurements are unlike those of the training, shape (m,), bool."""
        return np.array([one.distance is not None and bool(one.distance.message) for one in self.each])

    def sample(self, n: int, *, seed: int, sampler: Sampler = Sampler(), refill: bool | None = None,
               extrapolate: bool = False, progress: bool = True) -> list[Samples]:
        """Samples of each posterior, of all measurements by the same sensors at once; as `Posterior.sample`.

        InputError where a measurement is far from the training: leave those out, ``posteriors[~posteriors.far]``.
        """
        comm = self.each[0].problem.comm
        n, seed = alike(comm, lambda: {"n": check_count(n), "seed": check_seed(seed)})
        progress = check_flag(progress, "progress")
        check_kind(sampler, "sampler", Sampler, "a Sampler(...)")
        far = self.far
        if far.any() and not check_flag(extrapolate, "extrapolate"):
            raise InputError(
                f"The model does not extrapolate to {far.sum()} of the {len(self)} measurements, the first of "
                f"{instant(self.times[far][0])}, which are more than twice as far away as all that training has seen: "
                "leave them out, posteriors[~posteriors.far], and look at their sensors.")
        refill = self.each[0].basis.standard_prior if refill is None else check_flag(refill, "refill")
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, one in enumerate(self.each):
            groups.setdefault((id(one.sensors), one.far), []).append(i)
        found: list[Any] = [None] * len(self)
        with bar(len(groups), "sample", progress and comm.rank == 0) as shown:
            for number, ((_, beyond), members) in enumerate(groups.items()):
                mine = stream(seed, f"measurements {number}")
                for i, z in zip(members, self._latents(members, n, out_of_range(sampler, beyond), mine)):
                    found[i] = self._samples(self.each[i], z, stream(seed, f"rest {i}"), refill)
                shown.update()
        return found

    def _latents(self, members: list[int], n: int, sampler: Sampler, seed: int) -> np.ndarray:
        """Latents (B, n, r) of measurements by the same sensors, by their numbers."""
        sensors = self.each[members[0]].sensors
        assert sensors is not None
        y = np.stack([self.each[i].y for i in members])
        return on_root(self.each[0].problem.comm, lambda: sample_latents(
            sensors.locate(y), n, sampler, seed=seed, progress=False).numpy())

    @staticmethod
    def _samples(one: Posterior, z: np.ndarray, seed: int, refill: bool) -> Samples:
        return Samples.later(one.problem.M, lambda: one.fields(z, seed, refill, True), z)

    def cross_validate(self, *, draws: int = 200, seed: int = 0) -> "CrossValidation":
        """Each sensor predicted from the others at each time; see `fem_diffusion.trust.cross` (collective)."""
        from fem_diffusion.trust.cross import cross_validate

        return cross_validate(self.sensors, self.values, self.names, self.each[0].problem.comm, times=self.times,
                              draws=draws, seed=seed)

    def __repr__(self) -> str:
        return (f"Posteriors: {len(self)}, from {instant(self.times[0])} to {instant(self.times[-1])}, "
                f"{int(self.unlike.sum())} of measurements unlike the training\n{self.each[0]!r}")

    def __reduce_ex__(self, protocol: int) -> None:
        raise InputError("Posteriors hold a mesh and cannot be copied or pickled: save the model and the samples.")


def condition_all(model: "Model", y: ArrayLike, observation: Observation | None, noise: Any,
                  times: ArrayLike | None) -> Posteriors:
    """As `Model.condition_all`."""
    if model.near is not None:
        raise InputError("The model is refined for one measurement: take the model that was refined.")
    names = model.problem.names if observation is None else getattr(observation, "names", ())
    k = model.denoiser.base.k if observation is None else len(names)
    values = model.same(y, k, names, repeats=True)
    if values.ndim == 1:
        raise InputError(f"y has the shape {values.shape}: give measurements of shape (n, {k}), one row each.")
    there = ~np.isnan(values)
    some = np.array(there.any(axis=1))
    if not some.any():
        raise InputError(f"y holds no reading: give measurements of shape (n, {k}), one row each.")
    times = np.arange(len(values)) if times is None else np.asarray(times)
    if times.shape != (len(values),):
        raise InputError(f"times has the shape {times.shape} and there are {len(values)} measurements: give one of "
                         "each.")
    each: dict[int, Posterior] = {}
    told: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patterns, which = np.unique(there[some], axis=0, return_inverse=True)
        for number in range(len(patterns)):
            members = np.flatnonzero(some)[which.ravel() == number]
            # A part of the noise that is relative takes the reading, so each measurement is by sensors of its own.
            alone = observation is not None and not getattr(noise, "constant", True)
            for part in np.split(members, len(members)) if alone else [members]:
                each |= _together(model, values[part], part, observation, noise)
        whole = _whole(model, values[some][0], observation, noise)
    found = tuple(each[i] for i in sorted(each))
    result = Posteriors(found, times[some], values[some], whole, tuple(names or map(str, range(k))))
    messages = {one.distance.message for one in found if one.distance is not None}
    for warning in {str(one.message): one for one in told if str(one.message) not in messages}.values():
        warnings.warn(warning.message, stacklevel=3)
    if not some.all():
        warnings.warn(f"No sensor reads anything at {int((~some).sum())} of {len(some)} times, the first "
                      f"{instant(times[~some][0])}: they have no posterior.", MeasurementWarning, stacklevel=3)
    if result.unlike.any():
        counts = Counter(name for one in found if one.distance is not None for name in one.distance.worst)
        worst = ", ".join(f"{name} ({count} times)" for name, count in counts.most_common(_TOLD))
        warnings.warn(f"{int(result.unlike.sum())} of {len(found)} measurements are unlike those of the training, the "
                      f"first {instant(result.times[result.unlike][0])}, mostly at {worst}: "
                      "posteriors.cross_validate() shows which sensors the others contradict; "
                      "posteriors[i].distance.message has each by itself.",
                      MeasurementWarning, stacklevel=3)
    return result


def _together(model: "Model", values: np.ndarray, numbers: np.ndarray, observation: Observation | None,
              noise: Any) -> dict[int, Posterior]:
    """Posteriors of measurements (m, k) by the same sensors, by their numbers (m,)."""
    first = model.condition(values[0], observation, noise)
    assert first.sensors is not None
    y = values[:, ~np.isnan(values[0])]
    conditioned, found = first.sensors.locate(y), {}
    for i, number in enumerate(numbers.tolist()):
        found[number] = replace(
            first, conditioned=conditioned.select(torch.tensor([i])), y=y[i],
            distance=model.distance(first.problem, first.sensors, y[i]) if i else first.distance)
    return found


def _whole(model: "Model", y: np.ndarray, observation: Observation | None, noise: Any) -> EmulatedSensors:
    """All sensors, where some may have failed."""
    if observation is None:
        return model.sensors
    sensors = model.condition(np.nan_to_num(y, nan=float(np.nanmean(y))), observation, noise).sensors
    assert sensors is not None
    return sensors
