"""Simulation-based calibration of corrected posteriors: true on average over the prior, where their starts are not."""

import warnings

import numpy as np
import pytest
from test_correct import Target
from test_correct_posterior import PLACES, bent, line, problem, trained

from fem_diffusion.errors import SolveError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.trust import calibrate
from fem_diffusion.trust.correct import corrected
from fem_diffusion.trust.weights import resample

DRAWS = 39


def judged(draws, truths):
    """p-value of uniform ranks, and how many standard errors the coverage of each level is off."""
    result = calibrate(np.array(draws), np.array(truths))
    return result.p_value, {level: (share - level) / result.coverage_error(level)
                            for level, share in result.coverage.items()}


def test_corrections_of_crude_starts_are_calibrated():
    """40 cases of two readings of a bent law, each from a normal start of no account."""
    rng = np.random.default_rng(11)
    draws, starts, truths = [], [], []
    for case in range(40):
        truth = rng.standard_normal((1, 2))
        target = Target(lambda z: np.stack([z[:, 0] + z[:, 1]**2 / 4, z[:, 1] - z[:, 0] / 2], axis=1), [0, 0],
                        [0.4, 0.6])
        target.y = target.f(truth)[0] + target.std * rng.standard_normal(2)
        z = 0.5 + 0.5 * rng.standard_normal((600, 2))
        found = corrected(target, target.start(z), target, 600, seed=case)
        weights = np.full(len(found.z), 1 / len(found.z)) if found.weights is None else found.weights
        draws.append(found.z[resample(weights, DRAWS, rng)])
        starts.append(z[:DRAWS])
        truths.append(truth[0])
    p, off = judged(draws, truths)
    assert p > 1e-3 and max(map(abs, off.values())) < 4
    p, off = judged(starts, truths)
    assert p < 1e-4


@pytest.mark.slow
def test_corrections_of_a_bad_model_are_calibrated_over_200_cases():
    """A finite element problem, and a model of four modes and 60 steps."""
    case = problem(bent)
    V, prior = line()
    model = trained(case)
    truths = [prior.sample(seed=1000 + i) for i in range(200)]
    at = [int(np.argmin(np.abs(V.mesh().coordinates.dat.data_ro - x))) for x in (0.0, 0.35, *np.ravel(PLACES), 1.0)]
    draws, starts = [], []
    for seed, truth in enumerate(truths):
        y = case.measurements(coefficients(truth)[None], seed=seed)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = model.condition(y)
            starts.append(posterior.sample(DRAWS, seed=seed, progress=False, extrapolate=True).values[:, at])
            try:
                samples = posterior.correct(800, seed=seed, draws=DRAWS, progress=False)
            except SolveError:
                samples = posterior.correct(4000, seed=seed, draws=DRAWS, progress=False)
        draws.append(samples.values[:, at])
    right = np.array([coefficients(truth)[at] for truth in truths])
    p, off = judged(draws, right)
    assert p > 1e-3 and max(map(abs, off.values())) < 4, (p, off)
    # They are too wide, which their coverage shows better than a test of all ranks.
    p, off = judged(starts, right)
    assert p < 1e-4 or max(map(abs, off.values())) > 4.5, (p, off)
