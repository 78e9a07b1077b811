"""From an inverse problem and its joint samples to a trained model."""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from mpi4py import MPI

from fem_diffusion.checks import check_choice, check_flag, check_kind, check_options
from fem_diffusion.citations import cite
from fem_diffusion.diffusion import (
    NETWORKS, Denoiser, GaussianNoise, History, LayoutFamily, Noise, TrainingOptions, TrainingRange, fit_denoiser,
)
from fem_diffusion.diffusion.base.visible import informed_turn, visible_modes
from fem_diffusion.diffusion.maps.noise import carried
from fem_diffusion.diffusion.training.scales import Scales, choose_scales
from fem_diffusion.diffusion.training.loop import hold_out
from fem_diffusion.errors import DataError, InputError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import coefficients, largest, on_root, owned_size
from fem_diffusion.fields.events import event
from fem_diffusion.fields.geometry import field_geometry
from fem_diffusion.model.families import layout_family, sample_basis
from fem_diffusion.model.model import Model, check_basis, check_law
from fem_diffusion.model.tail import linear_tail, pair_rows
from fem_diffusion.observation.family import SensorFamily
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.product import is_gaussian
from fem_diffusion.problem import InverseProblem
from fem_diffusion.progress import tell
from fem_diffusion.simulation.simulate import DataSet

__all__ = ["fit"]

# POD modes that are looked at, at most, and pairs that each mode wants.
_MOST_POD, _PAIRS_A_MODE = 128, 4
# What modes may miss of a reading, in units of its noise.
_MISSED = 0.25
# Share of a mode that may be outside of those that derivatives are in.
_OUTSIDE = 1e-6
# Leading modes by which a scale of the readings is chosen.
_LOOKED_AT = 32
# Pairs with which measurements are compared.
_SEEN = 1000
# Held-out pairs that tell an emulator's error wherever the prior is.
_JUDGES = 20
# Pairs of which one may not hold so much of the spread of a reading: a lognormal law has a tenth to a half in one.
_MANY, _ONE = 100, 0.5
# The normal number of small noise, and a variance beside which the level itself is seen.
_LOW, _SHARP = -1.3, 1e-2


def fit(problem: InverseProblem, data: DataSet, *, basis: ModalBasis | None = None, network: str = "latents",
        options: TrainingOptions = TrainingOptions(), state_modes: int | None = None,
        scales: str = "choose", checkpoint: str | os.PathLike | None = None, progress: bool = True) -> Model:
    """Train a conditional diffusion model on simulated pairs.

    Parameters
    ----------
    problem : InverseProblem
        Of fixed sensors, whose noise is drawn afresh in training, or of a family, of which every training sample gets
        fresh sensors with fresh noise. Without noise the readings of the data hold it already.
    data : DataSet
        Of that problem; of a family with states. Derivatives take part where the law of the noise is known.
    basis : ModalBasis, optional
        Coordinates of the fields. Where left out, as many leading modes of the prior as the readings can tell from
        their noise, or, where the data hold derivatives, the directions among the modes of which readings tell; the
        rest of a Gaussian prior is drawn when sampling.
    network : {"latents", "field"} or str
        For fixed sensors fully connected between latents and measurements, or with layers on the mesh, for one scalar
        unknown that enters the forward map through a nonlinearity at every point; see docs/field_network.md. Another
        name of `fem_diffusion.diffusion.NETWORKS` for a network of one's own.
    state_modes : int, optional
        For a family, number of POD modes that states are written in; where left out, as many as keep all but 1e-8 of
        the variance, at most 256.
    scales, options, checkpoint, progress
        As for `fit_denoiser`; rank 0 trains.

    Raises
    ------
    InputError, DataError, FileError, SolveError
        If the pairs are too few, inconsistent, not finite or without the states of a family, the basis or the network
        does not fit, or training fails; see also `fit_denoiser`.

    UserWarning tells where a few pairs hold most of the spread of a sensor's readings.
    """
    start = time.perf_counter()
    check_flag(progress, "progress")
    check_kind(problem, "problem", InverseProblem, "InverseProblem(prior, forward, observation, noise)")
    check_kind(data, "data", DataSet, "what simulate or load_pairs returned")
    check_options(options, TrainingOptions)
    check_choice(scales, "scales", ("choose", "identity"))
    check_choice(network, "network", [name for name, kind in NETWORKS.items() if not kind.families])
    if problem.family and network != "latents":
        raise InputError("A family has a network over its sensors: leave network out.")
    if not len(data) or len(data.coefficients) != len(data):
        raise DataError(f"The data set holds {len(data.coefficients)} fields and {len(data)} readings: simulate first.")
    if data.chosen:
        raise DataError(f"The last {data.chosen} pairs were chosen by refine, near a measurement, and are of no prior "
                        "draw: give the data set of simulate, or refine(model, data, y, n) again.")
    if not problem.comm.allreduce(data.coefficients.shape[1:] == (owned_size(problem.V),), MPI.LAND):
        raise DataError(f"The data set holds fields of another space than {problem.V}: simulate the problem itself.")
    if problem.k not in (None, data.readings.shape[1]):
        raise DataError(f"The data set holds readings of {data.readings.shape[1]} sensors and the problem has "
                        f"{problem.k}: simulate the problem itself.")
    states = shown = None
    noise, seen = problem.noise, torch.as_tensor(data.readings)
    if problem.levels:
        seen = torch.cat([seen, torch.as_tensor(problem.normal_levels(np.asarray(data.coefficients)))], 1)
    if isinstance(problem.observation, SensorFamily):
        states, seen, noise = layout_family(problem.observation, data, state_modes)
        shown = TrainingRange.of(noise)
    elif state_modes is not None:
        raise InputError("state_modes is for families: leave it out.")
    choose = choose_scales if scales == "choose" else _as_they_are
    given, informed = basis is not None, _informed(problem, data, seen, choose)
    if basis is not None:
        basis = check_basis(basis, problem)
    elif informed is not None and not NETWORKS[network].mesh:
        basis = informed
    else:
        basis = _visible(problem, data, seen, noise, choose)
    slopes = None if informed is None else sloped(problem, data, basis)
    with event("encode"):
        z = basis.encode(data.coefficients)
    standard_prior = is_standard(data, basis, z)
    check_law(basis, problem)
    geometry = field_geometry(basis) if NETWORKS[network].mesh else None

    def run() -> tuple[Denoiser, History]:
        return fit_denoiser(torch.from_numpy(z), seen, noise, slopes=slopes,
                            network=None if problem.family else network,
                            standard_prior=standard_prior, scales=scales, options=options, checkpoint=checkpoint,
                            geometry=geometry, progress=progress)
    cite("Dasgupta2025")
    with event("train"):
        denoiser, history = on_root(problem.comm, run)
    if not problem.family:
        _tell_outliers(problem, data, denoiser)
    apart = len(hold_out(torch.from_numpy(z), options)[1])
    if denoiser.base.emulator.head is not None and apart < _JUDGES:
        tell(f"fit: {apart} held-out pairs judge the emulator, too few to know its error in the tails of the prior: "
             "posterior.check() and posterior.correct(...) are for such a model; laplace(problem, y) needs no pairs.",
             progress and problem.comm.rank == 0)
    linear, rows = _rest(problem, data, basis, denoiser, given)
    some = np.unique(np.linspace(0, len(seen) - 1, _SEEN).round().astype(int))
    model = Model(problem, basis, denoiser, history, states, shown, linear, rows, seen[some].double())
    tell(f"fit: {len(data):,} pairs, {model.summary}; {time.perf_counter() - start:.0f} s",
         progress and problem.comm.rank == 0)
    return model


def _tell_outliers(problem: InverseProblem, data: DataSet, denoiser: Denoiser) -> None:
    """Warn where one pair in hundreds holds much of the spread of a sensor's readings: regressions see that alone.

    Readings are meant on the scale of the denoiser.
    """
    scale, readings = denoiser.readings, np.asarray(data.readings)
    readings = readings if scale is None else scale.forward(torch.as_tensor(readings)).numpy()
    squares = (readings - np.median(readings, axis=0))**2
    total = squares.sum(axis=0)
    share = np.divide(squares.max(axis=0), total, out=np.zeros_like(total), where=total > 0)
    wild = np.flatnonzero(share > _ONE) if len(data) >= _MANY else []
    if len(wild):
        names = problem.names or [str(i) for i in range(len(total))]
        warnings.warn(f"One of {len(data):,} pairs holds {share.max():.0%} of the spread of the readings of "
                      f"{names[int(share.argmax())]}{f' ({len(wild)} such sensors)' * (len(wild) > 1)}: the prior or "
                      "the solver has tails so heavy that the model hardly sees other pairs. Take a prior with lighter "
                      "tails, or hmc, which needs no training.", stacklevel=3)


def is_standard(data: DataSet, basis: ModalBasis, z: np.ndarray) -> bool:
    """Whether latents (n, r) of training fields are N(0, I); DataError where they should be and are not."""
    basis.check_draws(z, len(data.skipped) / (len(data) + len(data.skipped)))
    # Where solves have failed, the solver has chosen among the prior's samples.
    return basis.standard_prior and not data.skipped


def _rest(problem: InverseProblem, data: DataSet, basis: ModalBasis, denoiser: Denoiser,
          given: bool) -> tuple[bool, np.ndarray | None]:
    """Whether readings are known to be linear in the modes left out, and by which rows where pairs alone tell.

    A warning where modes of a `given` basis of a Gaussian prior miss more of the readings than noise forgives and
    nothing is known of the others: those come from the prior, whatever the readings say of them.
    """
    noise, base = problem.noise, denoiser.base
    if problem.family or not (isinstance(noise, GaussianNoise) and base.emulator.affine) or (
            noise.levels or not basis.standard_prior or denoiser.readings is not None):
        return False, None
    if linear_tail(problem, basis, base, known=False) is not None:
        return True, None
    covariance = noise.covariance(torch.as_tensor(data.readings).double())
    unit = covariance.diagonal().clamp(min=1e-300).sqrt()
    values, axes = torch.linalg.eigh(covariance / unit / unit[:, None])
    axes = axes / values.clamp(min=1e-4).sqrt() / unit[:, None]
    worst = float(torch.linalg.eigvalsh(axes.T @ (base.scatter - covariance) @ axes)[-1].clamp(min=0).sqrt())
    if worst < _MISSED:
        return False, None
    if not problem.derived and problem.prior.core is problem.prior:
        rows = pair_rows(problem, data)
        if linear_tail(problem, basis, base, False, rows) is not None:
            return True, rows
    if given:
        warnings.warn(f"The {basis.r} modes leave up to {worst:.2g} noise standard deviations of the readings "
                      "unexplained, and samples draw all other modes from the prior: take more modes, leave basis out, "
                      "or give the forward problem its sensitivity.", stacklevel=3)
    return False, None


def _as_they_are(*pairs: object) -> Scales:
    """In place of `choose_scales`: the users' own."""
    return Scales()


def _informed(problem: InverseProblem, data: DataSet, seen: torch.Tensor,
              choose: Callable[..., Scales]) -> ModalBasis | None:
    """The modes of the data's derivatives, turned to what readings tell of; None where derivatives are of no use."""
    if data.derivatives is None or data.basis is None:
        return None
    covariance = known_noise(problem.noise, seen)
    if covariance is None:
        warnings.warn("The data hold derivatives, which are of use where all sensors have noise of a known law: they "
                      "are left out.", stacklevel=3)
        return None
    slopes = torch.from_numpy(_with_levels(problem, data))
    z = torch.from_numpy(data.basis.encode(data.coefficients))

    def turn() -> torch.Tensor:
        scales = choose(z, seen.double(), problem.noise, None, True)
        _, mapped, turned = scales.pairs(z, seen.double(), slopes)
        law = carried(problem.noise, scales.readings)
        assert law is not None and turned is not None
        return informed_turn(turned, _sharpest(law, mapped))
    return replace(data.basis, turn=on_root(problem.comm, turn).numpy())


def known_noise(noise: Noise | None, seen: torch.Tensor) -> torch.Tensor | None:
    """As `_sharpest`, of noise whose law is known and that all sensors have; None of another."""
    if noise is None or not noise.told:
        return None
    covariance = _sharpest(noise, seen)
    return covariance if bool((covariance.diagonal() > 0).all()) else None


def _with_levels(problem: InverseProblem, data: DataSet) -> np.ndarray:
    """The data's derivatives, with those of the levels' numbers behind them, (n, k + l, R)."""
    assert data.basis is not None and data.derivatives is not None
    rows = problem.normal_levels(data.basis.scaled_modes).T
    return np.concatenate([data.derivatives, np.tile(rows, (len(data), 1, 1))], axis=1)


def _sharpest(noise: Noise, seen: torch.Tensor) -> torch.Tensor:
    """Covariance (k + l, k + l) at readings with the levels' numbers behind them, (n, k + l), of the least noise.

    Small noise shows most modes, and the levels are to be among them.
    """
    if not noise.levels:
        return noise.covariance(seen.double())
    low, k = seen.double().clone(), seen.shape[1] - len(noise.levels)
    low[:, k:] = _LOW
    return torch.block_diag(noise.covariance(low), _SHARP * torch.eye(len(noise.levels), dtype=low.dtype))


def sloped(problem: InverseProblem, data: DataSet, basis: ModalBasis) -> torch.Tensor:
    """The data's derivatives by the latents of a basis, with those of the levels' numbers behind them: (n, k + l, r).

    InputError where the basis has other modes (collective).
    """
    assert data.basis is not None
    across = data.basis.encode(coefficients(data.basis.mean) + basis.scaled_modes)
    lost = basis.scaled_modes - across @ data.basis.scaled_modes
    if largest(basis.V.comm, lost) > _OUTSIDE * largest(basis.V.comm, basis.scaled_modes):
        raise InputError("The basis holds more than the modes that derivatives of the data are in: leave basis out, "
                         "take data.basis.leading(r), or simulate(..., derivatives=basis).")
    return torch.from_numpy(_with_levels(problem, data) @ across.T)


def _visible(problem: InverseProblem, data: DataSet, seen: torch.Tensor,
             noise: LayoutFamily | Noise | None, choose: Callable[..., Scales]) -> ModalBasis:
    """As many leading modes of the prior as readings, of a family those of many sensors, can tell from their noise."""
    most = max(1, len(data) // _PAIRS_A_MODE)
    if is_gaussian(problem.prior.core):
        basis = karhunen_loeve(problem.prior, most=most)
    else:
        basis = replace(sample_basis(problem.V, data.coefficients, most=_MOST_POD), prior=problem.prior)
    basis = basis.leading(min(most, basis.r))
    z = torch.from_numpy(basis.encode(data.coefficients))

    def count() -> int:
        if isinstance(noise, LayoutFamily):
            rows, std = noise.dense()
            return visible_modes(z, seen @ rows.T, torch.diag(std**2), basis.standard_prior)
        scales = choose(z[:, :_LOOKED_AT], seen.double(), noise, None, basis.standard_prior)
        _, mapped, _ = Scales(None, scales.readings).pairs(z, seen.double())
        law = carried(noise, scales.readings)
        if law is None:
            return visible_modes(z, mapped, None, False)
        return visible_modes(z, mapped, _sharpest(law, mapped), basis.standard_prior and (law.constant or law.law))
    return basis.leading(on_root(problem.comm, count))
