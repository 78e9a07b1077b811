"""A posterior beside the solver itself, for one measurement and some 50 solves: a verdict in words with numbers.

The samples' fields are written in the prior's own modes, many of them, so that what a model leaves out or draws from
the prior is looked at, too. `fem_diffusion.trust.local` and
`fem_diffusion.reference.residual` hold the mathematics.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import chi2

from fem_diffusion.certificate import VISIBLE
from fem_diffusion.checks import alike, check_count, check_seed, stream
from fem_diffusion.diffusion import Distance
from fem_diffusion.errors import InputError
from fem_diffusion.model.posterior import Posterior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.residual import Residual, residual
from fem_diffusion.trust.beside import SEARCH, Local, at_levels, gaussian, in_modes, unseen
from fem_diffusion.trust.local import Shape, shapes
from fem_diffusion.trust.neighbours import local_calibration, more_pairs

if TYPE_CHECKING:
    from fem_diffusion.simulation.data_set import DataSet

__all__ = ["Check", "check"]

# p-value below which something is wrong; there are some ten of them, and exact posteriors are to pass 19 times in 20.
_LEVEL = 0.003
# Residual in units of that of the noise from which a search is taken to have found nothing.
_LOST = 10.0
# Faults that are too small to matter: of the mean in posterior standard deviations, of the width as a factor, of the
# width in one direction.
_SHIFT, _WIDTH, _ONE_WIDTH = 0.25, 1.25, 1.5
# Faults with which nothing should be decided.
_SHIFT_BAD, _WIDTH_BAD = 0.75, 1.75


@dataclass(frozen=True, eq=False, repr=False)
class Check:
    """What `check` found; printed as a verdict in words.

    Parameters
    ----------
    verdict : str
        "trustworthy", "too wide", "too narrow", "biased", or "conflict", where the measurement does not go together
        with model or noise.
    light : str
        "green"; "yellow" where the answer is usable with care; "red".
    sentences : tuple of str
        What was found and what to do, in plain words.
    misfit, misfit_p : float
        Readings predicted by samples minus measurement in units of the noise, root mean square; p-value of what no
        parameter near the samples explains.
    sensor_p, worst : numpy.ndarray, tuple of str
        p-value of each sensor given the others, shape (k,); names of those that the others contradict.
    distance, distance_p : float
        As `Distance` has them; NaN where the posterior has none.
    width, shift : float
        Posterior standard deviation over what the solver allows, and how far the samples are off in units of that, root
        mean squares over the directions of which the data tell.
    widths : numpy.ndarray
        The width in each of these directions, the best told first.
    refill : float
        What modes past those of the model can add to a reading, in standard deviations of its noise.
    calibration_p : float or None
        Of the truths of the nearest pairs of `data` being draws of their posteriors.
    pairs : str or None
        Whether more pairs would help, from `data`.
    solves, pulls : int
        Forward and adjoint solves that were spent.
    readings, y, noise_std : numpy.ndarray
        Noise-free predictions of samples (n, k), the measurement (k,) and the noise's standard deviation (k,).
    names : tuple of str
        Of the sensors.
    """

    verdict: str
    light: str
    sentences: tuple[str, ...]
    misfit: float
    misfit_p: float
    sensor_p: np.ndarray
    worst: tuple[str, ...]
    distance: float
    distance_p: float
    width: float
    shift: float
    widths: np.ndarray
    refill: float
    calibration_p: float | None
    pairs: str | None
    solves: int
    pulls: int
    readings: np.ndarray
    y: np.ndarray
    noise_std: np.ndarray
    names: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"Check: {self.verdict} ({self.light})", *(f"- {line}" for line in self.sentences)])

    __repr__ = __str__

    def plot(self) -> Any:
        """Readings against predictions, sensor by sensor, and widths, as a Matplotlib figure."""
        from fem_diffusion.trust.picture import plot_check

        return plot_check(self)


def check(posterior: Any, solves: int = 50, *, seed: int = 0, data: "DataSet | None" = None) -> Check:
    """Look at a posterior beside the solver, at its own measurement (collective).

    Parameters
    ----------
    posterior : Posterior
        Of a model, or any other object with ``sample(n, seed=)``, ``problem`` and ``y``, such as the references.
    solves : int
        Forward solves that may be spent, about, at least 30; each comes with an adjoint one, and each sensor with a
        few.
    seed : int
        Of the samples.
    data : DataSet, optional
        Pairs of the problem, held out from training: those whose readings are near to the measurement show whether the
        model is calibrated there, and all of them whether more would help.

    Raises
    ------
    InputError
        If an argument is of the wrong kind, there are no sensors or no noise of the problem's own, or data are given
        for a posterior without a model.
    SolveError
        If the forward problem has no solution for nearly all samples, and none at the prior mean, or no derivative.
    """
    problem, y = getattr(posterior, "problem", None), getattr(posterior, "y", None)
    if not isinstance(problem, InverseProblem) or y is None or not callable(getattr(posterior, "sample", None)):
        raise InputError(f"posterior is of type {type(posterior).__name__}: give a posterior with sample, problem and "
                         "y, such as model.condition(y) or laplace(problem, y).")
    solves, seed, y = alike(problem.comm, lambda: {
        "solves": check_count(solves, "solves", least=30), "seed": check_seed(seed), "y": np.asarray(y, dtype=float)})
    if not len(y):
        raise InputError("Without a sensor the posterior is the prior: there is nothing to check.")
    problem, y, notes, draws = gaussian(problem, y)
    latent, z, own = in_modes(posterior, problem, y, solves - SEARCH, seed, notes)
    if latent.problem.levels:
        latent, z, note = at_levels(latent, z, seed)
        draws = gaussian(latent.problem, y)[3]
        notes.append(note)
    found = Local(latent, z, solves)
    refill = unseen(latent, own, found.jacobian) if own is not None else 0.0
    whiten = latent.noise_matrix(found.at)
    errors = None if draws is None else draws @ whiten.T
    rest = latent.everyone.bcast(residual(
        found.jacobian @ found.z - found.misfit, found.jacobian @ found.jacobian.T, whiten, errors,
        stream(seed, "check"), _LEVEL))
    if not found.settled:
        rest = replace(rest, p=1.0, prior_p=1.0, largest_p=1.0, odd=(), sensor_p=np.full(len(y), np.nan))
    told, others = (None, None) if found.lost else latent.everyone.bcast(
        shapes(found.samples, found.gradient, found.jacobian))
    distance = getattr(posterior, "distance", None)
    calibration_p = pairs = fault = None
    if data is not None:
        if not isinstance(posterior, Posterior):
            raise InputError("data shows how a model answers near the measurement: leave it out for a posterior "
                             "without a model.")
        (calibration_p, fault), pairs = local_calibration(posterior, data, seed), more_pairs(posterior, data)
    names = tuple(map(str, problem.names or range(len(y))))
    std = np.linalg.norm(np.linalg.inv(whiten), axis=1)
    expected = [(names[i], *map(float, (y[i], y[i] - rest.t[i] * rest.spread[i], rest.spread[i])))
                for i in rest.odd]
    misfit = float(np.sqrt((latent.whitened(found.readings)**2).mean()))
    unlike = distance.worst if isinstance(distance, Distance) and distance.message else ()
    verdict, light, sentences = _judge(rest, told, others if latent.basis.standard_prior else None, expected, unlike,
                                       misfit, len(y))
    notes += found.notes
    if not found.settled:
        light = "yellow" if light == "green" else light
        if verdict == "trustworthy" and not found.lost and misfit > np.sqrt(chi2(len(y)).isf(_LEVEL) / len(y)):
            verdict, light = "conflict", "red"
            sentences = [f"Samples miss the readings by {_size(misfit)} noise standard deviations (root mean square), "
                         "and about 1 is expected: model, noise or posterior are wrong."]
    if found.failed > 0:
        light = "red" if found.failed > len(z) // 4 else "yellow" if light == "green" else light
    if found.lost:
        verdict = "biased" if verdict == "trustworthy" else verdict
        sentences = [] if verdict == "biased" else sentences
        notes.append(_REPAIR)
    if refill > VISIBLE and getattr(posterior, "tail", None) is None:
        light = "yellow" if light == "green" else light
        notes.append(f"Modes that the model draws from the prior add up to {refill:.2g} noise standard deviations to a "
                     "reading, whatever the data say of them: fit with more modes, or correct the samples.")
    if isinstance(distance, Distance) and distance.message:
        light = "yellow" if light == "green" else light
        notes.append(f"The measurement is unlike those of the training (p = {_p(distance.p)}), mostly at "
                     f"{_listed(distance.worst)}.")
    if calibration_p is not None:
        good = calibration_p >= _LEVEL
        light = "yellow" if light == "green" and not good else light
        verdict = fault if fault and not good and verdict == "trustworthy" else verdict
        notes.append(f"On the pairs nearest to this measurement the model is "
                     f"{'calibrated' if good else f'not calibrated, but {fault}'} (p = {_p(calibration_p)}).")
    if pairs:
        notes.append(pairs)
    main = told or others
    return Check(verdict, light, (*sentences, *notes), misfit, min(rest.p, 1.0), rest.sensor_p,
                 tuple(names[i] for i in rest.odd), *((distance.value, distance.p) if isinstance(distance, Distance)
                                                      else (np.nan, np.nan)),
                 np.nan if main is None else main.width, np.nan if main is None else main.shift,
                 np.zeros(0) if told is None else told.widths, refill, calibration_p, pairs, latent.solves,
                 latent.pulls, found.readings, y, std, names)


def _judge(rest: Residual, told: Shape | None, others: Shape | None, odd: Sequence[tuple], unlike: tuple[str, ...],
           misfit: float, k: int) -> tuple[str, str, list[str]]:
    """Verdict, light and sentences."""
    verdict, light, words = "trustworthy", "green", []
    worse = {"green": 0, "yellow": 1, "red": 2}

    def say(kind: str, colour: str, sentence: str) -> None:
        nonlocal verdict, light
        verdict = kind if verdict == "trustworthy" else verdict
        light = max(light, colour, key=lambda x: worse[x])
        words.append(sentence)
    ratio = rest.size / rest.expected
    # Where without the odd ones the others are odd still, it is not the sensors.
    if rest.p < _LEVEL and ratio > _LOST and (not odd or k == 1 or rest.others_p < _LEVEL):
        say("biased", "red", f"No parameter near the samples explains the measurement: the best that was found leaves "
            f"{_size(ratio)} times the residual of the noise. The samples are far from the posterior, or noise or "
            f"model are wrong, which a correction or laplace(problem, y) tells. {_REPAIR}")
    elif odd and rest.largest_p < _LEVEL and (len(odd) == k or rest.others_p >= _LEVEL or rest.p >= _LEVEL):
        reads = "; ".join(f"sensor {name} reads {value:.4g}, where {mean:.4g} ± {std:.2g} is expected"
                          + " beside the others" * (k > 1) for name, value, mean, std in odd)
        # A wrong reading moves the point at which others are looked at, and there they may look wrong in its place.
        doubtful = unlike and not {name for name, *_ in odd}.intersection(unlike)
        say("conflict", "red", f"The measurement conflicts with model or noise: {reads} (p = {_p(rest.largest_p)}). "
            + (f"But compared with the training it is {_listed(unlike)}: check all of them, and leave out only what "
               "leaves no conflict to a further check." if doubtful else
               f"Check {'this sensor' if len(odd) == 1 else 'these sensors'}, or leave "
               f"{'it' if len(odd) == 1 else 'them'} out."))
    elif rest.p < _LEVEL and ratio > 1:
        say("conflict", "red", f"Even the parameter that fits best leaves {ratio:.2g} times the residual that the noise"
            f" explains (p = {_p(rest.p)}), and no few sensors alone make it: the noise is larger than assumed, or the "
            "model is wrong.")
    elif rest.p < _LEVEL:
        say("conflict", "yellow", f"The residual is only {ratio:.2g} times what the noise would leave "
            f"(p = {_p(rest.p)}): the noise is smaller than assumed, and the posterior wider than it need be.")
    faults = []
    if rest.prior_p < _LEVEL / 2 and rest.prior > 1 and others is not None:
        faults.append((rest.prior, "conflict", False, f"The parameter that fits best is {rest.prior:.2g} times as far "
                       f"from the prior mean as expected (p = {_p(rest.prior_p)}): the prior is too narrow, or a "
                       "sensor is wrong."))
    for shape, where in ((told, "of which the data tell"), (others, "of which the data tell little")):
        if shape is None:
            continue
        where = f"in the {f'{shape.count} directions' if shape.count > 1 else 'direction'} {where}"
        if shape.shift_p < _LEVEL and shape.shift > _SHIFT:
            faults.append((shape.shift, "biased", shape.shift > _SHIFT_BAD, "The samples are off by "
                           f"{_size(shape.shift)} posterior standard deviations (root mean square) {where} "
                           f"(p = {_p(shape.shift_p)})."))
        farthest = shape.widths[np.abs(np.log(shape.widths)).argmax()]
        whole = shape.width_p < _LEVEL and abs(np.log(shape.width)) > np.log(_WIDTH)
        if whole or shape.widest_p < _LEVEL / 2 and abs(np.log(farthest)) > np.log(_ONE_WIDTH):
            width = shape.width if whole else farthest
            up, size = width > 1, abs(np.log2(width))
            one = f", up to {_size(shape.widths.max())} in one" if up and shape.count > 1 else ""
            faults.append((size, "too wide" if up else "too narrow", size > np.log2(_WIDTH_BAD), "The posterior is "
                           f"{'wider' if up else 'narrower'} than data and prior {'allow' if up else 'say'} by about a "
                           f"factor of {_size(2**size)} {where}{one} (p = {_p(min(shape.width_p, shape.widest_p))})."))
    # Those with which nothing should be decided are told first.
    for _, kind, bad, sentence in sorted(faults, key=lambda fault: (fault[2], fault[0]), reverse=True):
        say(kind, "red" if bad else "yellow", sentence)
    if verdict in ("biased", "too wide", "too narrow"):
        words.append(_REPAIR)
    if verdict == "trustworthy":
        main = told or others
        words.append(f"Samples explain the measurement: their readings miss it by {misfit:.1f} noise standard "
                     f"deviations (root mean square), and what nothing explains of it is as the noise would leave it "
                     f"(p = {_p(rest.p)}).")
        if main is not None:
            words.append(f"The posterior is as wide as the solver says (factor {main.width:.2f}) and where it says "
                         f"(off by {main.shift:.2f} posterior standard deviations), as far as these solves tell.")
    return verdict, light, words


_REPAIR = "posterior.correct(...) mends that with the solver; laplace(problem, y) and hmc(problem, y) need no model."


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.2g}"


def _size(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else "more than 100"


def _listed(names: tuple[str, ...]) -> str:
    return f"sensor{'s' * (len(names) > 1)} {' and '.join([', '.join(names[:-1]), names[-1]] if names[1:] else names)}"
