"""What pairs near a measurement say of a model there, and whether more pairs would help."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from fem_diffusion.checks import check_array, check_kind, stream
from fem_diffusion.diffusion import Sampler, sample_latents
from fem_diffusion.diffusion.base.visible import learning_gain
from fem_diffusion.diffusion.maps.noise import carried
from fem_diffusion.diffusion.training.scales import Scales
from fem_diffusion.errors import DataError, InputError
from fem_diffusion.fields.coefficients import on_root
from fem_diffusion.observation.linear import Observation
from fem_diffusion.simulation.data_set import DataSet
from fem_diffusion.trust.calibration import calibrate

if TYPE_CHECKING:
    from fem_diffusion.model.posterior import Posterior

__all__ = ["local_calibration", "more_pairs"]

# Pairs that are near, as a share of all and at most and at least; draws for each; latents that are looked at.
_SHARE, _MOST, _LEAST, _DRAWS, _LEADING = 0.1, 200, 40, 19, 10
# Log density of a measurement, in nats, that is worth more pairs.
_WORTH = 0.1


def local_calibration(posterior: "Posterior", data: DataSet, seed: int) -> tuple[float, str]:
    """p-value of the truths of the pairs nearest to a measurement being draws of their posteriors (collective).

    Beside it what is wrong most, if anything is: "biased", "too wide" or "too narrow". Near is meant in readings with
    noise, whitened over all pairs. InputError if the posterior has no model or the pairs are too few; DataError if they
    are of other sensors.
    """
    clean, sensors = _clean(posterior, data), posterior.sensors
    if sensors is None or len(clean) < _LEAST:
        raise InputError(f"{len(clean)} held-out pairs say nothing of a model near one measurement: give "
                         f"model.condition(y) and at least {_LEAST}, from simulate with another seed.")
    z, levels = posterior.basis.encode(data.coefficients)[:, :_LEADING], _levels(posterior, data)
    noise, y = posterior.problem.noise, posterior.y

    def run() -> tuple[float, str]:
        generator = torch.Generator().manual_seed(stream(seed, "neighbours"))
        noisy = torch.from_numpy(clean) if noise is None else noise.sample(_beside(clean, levels), generator)
        read, scale, at = noisy.numpy(), posterior.conditioned.readings, y
        white = read
        if scale is not None:
            white, at = scale.forward(noisy).numpy(), scale.forward(torch.from_numpy(y)).numpy()
        unit = white.std(axis=0).clip(min=1e-300)
        centre, white = white.mean(axis=0), (white - white.mean(axis=0)) / unit
        values, axes = np.linalg.eigh(white.T @ white / len(white))
        axes = axes / np.sqrt(values.clip(min=1e-10 * values[-1]))
        away = np.linalg.norm((white - (at - centre) / unit) @ axes, axis=1)
        near = np.argsort(away)[:min(_MOST, max(_LEAST, round(_SHARE * len(away))))]
        draws = sample_latents(sensors.locate(read[near]), _DRAWS, Sampler(), seed=stream(seed, "neighbours"),
                               progress=False)
        found = calibrate(draws.numpy()[:, :, :_LEADING], z[near])
        place = (found.ranks + 0.5) / (_DRAWS + 1) - 0.5
        # Means and mean sizes of uniform ranks, in units of their own chance.
        off, out = (12**0.5 * np.abs(place.mean(axis=0))).max(), 48**0.5 * (np.abs(place).mean(axis=0) - 0.25)
        size = out[np.abs(out).argmax()]
        return found.p_value, "biased" if off > abs(size) else "too narrow" if size > 0 else "too wide"
    return on_root(posterior.problem.comm, run)


def more_pairs(posterior: "Posterior", data: DataSet) -> str:
    """Whether more pairs than these would help the modes of a model, in words (collective)."""
    clean = _clean(posterior, data)
    z, noise = posterior.basis.encode(data.coefficients), posterior.problem.noise
    levels = _levels(posterior, data)

    def run() -> str:
        scales = Scales(posterior.conditioned.latents, posterior.conditioned.readings)
        latents, seen, _ = scales.pairs(torch.from_numpy(z), _beside(clean, levels))
        law = carried(noise, scales.readings)
        found = learning_gain(latents, seen[:, :clean.shape[1]], None if law is None else law.covariance(seen))
        if found is None:
            return "The pairs are too few to tell whether more would help."
        gain, missed = found
        if gain < _WORTH and missed > 1 and posterior.tail is None:
            return (f"So many pairs teach the readings to {missed:.2g} noise standard deviations only, and twice as "
                    "many would not do: take more modes, simulate many more, or near this measurement.")
        if gain < _WORTH:
            return f"Twice as many pairs would gain next to nothing over these {z.shape[1]} modes: there are enough."
        return (f"Twice as many pairs would gain about {gain:.2g} nats of a measurement's log density over these "
                f"{z.shape[1]} modes: simulate more.")
    return on_root(posterior.problem.comm, run)


def _levels(posterior: "Posterior", data: DataSet) -> np.ndarray:
    """Standard normal numbers (n, l) of the levels of the noise of pairs."""
    problem = posterior.problem
    return problem.normal_levels(np.asarray(data.coefficients)) if problem.levels else np.empty((len(data), 0))


def _beside(clean: np.ndarray, levels: np.ndarray) -> torch.Tensor:
    """Noise-free readings as noise takes them."""
    return torch.from_numpy(np.hstack([clean, levels]))


def _clean(posterior: "Posterior", data: DataSet) -> np.ndarray:
    """What the sensors of a posterior read of pairs, without noise, shape (n, k)."""
    check_kind(data, "data", DataSet, "what simulate or load_pairs returned")
    observation, k = posterior.problem.observation, len(posterior.y)
    if data.readings.shape[1] == k:
        return check_array(data.readings, "The readings", ("n", k))
    if data.states is None or not isinstance(observation, Observation):
        raise DataError(f"The pairs hold readings of {data.readings.shape[1]} sensors and the measurement {k}: give "
                        "pairs of the problem, for a family with states.")
    return observation.apply(data.states)
