"""What is told beside an answer: measurements that fit no parameter, and modes of which nothing is known."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from firedrake import Function, FunctionSpace, UnitIntervalMesh, exp
from scipy.stats import chi2

from fem_diffusion.diffusion import CallableNoise, GaussianNoise, MeasurementWarning
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.chains import ConvergenceWarning, reference_latents
from fem_diffusion.reference.exact import exact
from fem_diffusion.reference.hmc import hmc
from fem_diffusion.reference.laplace import laplace
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.looks import conflict, unseen
from fem_diffusion.reference.pcn import pcn
from fem_diffusion.reference.point import map_point

V = FunctionSpace(UnitIntervalMesh(16), "CG", 1)
PLACES = np.linspace(0.05, 0.95, 12)[:, None]
STD = 0.1


class Pointwise:
    """The state m, or exp(m), with its derivative."""

    M = U = V

    def __init__(self, bent=False):
        self.bent = bent

    def __call__(self, m):
        return Function(V).interpolate(exp(m) if self.bent else m)

    def solve_many(self, parameters):
        return np.exp(parameters) if self.bent else parameters

    def sensitivity(self, m, rows):
        rows = rows.toarray() if hasattr(rows, "toarray") else rows
        return rows * (np.exp(m.dat.data_ro) if self.bent else 1.0)


def _problem(bent=False, noise=STD):
    return InverseProblem(GaussianPrior(V, 0.5, 0.5), Pointwise(bent), point_sensors(V, PLACES), noise)


def _measured(problem, seed, broken=None):
    y = problem.measurements(problem.prior.sample_many(1, seed), seed=seed)[0]
    if broken is not None:
        y[broken] += 2.0
    return y


QUICK = {"seed": 1, "chains": 4, "progress": False}
REFERENCES = {"map_point": lambda *given: map_point(*given), "laplace": lambda *given: laplace(*given),
              "hmc": lambda *given: hmc(*given, draws=200, **QUICK),
              "pcn": lambda *given: pcn(*given, draws=2000, **QUICK), "exact": lambda *given: exact(*given)}


@pytest.mark.filterwarnings("ignore::fem_diffusion.reference.chains.ConvergenceWarning")
@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_a_broken_sensor_is_told_and_a_sound_one_is_not(name, bent):
    if name == "exact" and bent:
        return
    reference, problem = REFERENCES[name], _problem(bent)
    reference(problem, _measured(problem, 3))
    with pytest.warns(MeasurementWarning) as told:
        reference(problem, _measured(problem, 3, broken=4))
    told = [x for x in told if x.category is MeasurementWarning]
    assert len(told) == 1 and f"the others contradict sensor {problem.names[4]} (" in str(told[0].message)
    assert "Check this sensor, the noise" in str(told[0].message)
    # It points at the line of the call.
    assert told[0].filename == __file__


def test_noise_that_is_said_wrong_is_told_either_way():
    sensors = point_sensors(V, np.linspace(0.01, 0.99, 40)[:, None])
    problem = replace(_problem(), observation=sensors)
    y = _measured(problem, 3)
    for factor, words in ((3.0, "in conflict with the problem. Check the units"), (1 / 10, "noise is smaller than")):
        with pytest.warns(MeasurementWarning, match=words):
            laplace(replace(problem, noise=STD / factor), y)


@pytest.mark.parametrize("reference", [exact, laplace])
def test_right_noise_raises_no_alarm_in_200_linear_problems(reference):
    """At a level of 1e-5 on either side 0.004 are expected; a warning here is an error."""
    problem = _problem()
    for seed in range(200):
        reference(problem, _measured(problem, seed))


def test_the_level_is_kept_by_residuals_of_draws():
    """p-values of the mean square over draws are no smaller, in law, than those of the noise."""
    problem, rng = _problem(), np.random.default_rng(0)
    basis = karhunen_loeve(problem.prior)
    rows = problem.observation.rows @ basis.scaled_modes.T
    S = np.linalg.inv(np.eye(basis.r) + rows.T @ rows / STD**2)
    chance = []
    for _ in range(2000):
        y = rows @ rng.standard_normal(basis.r) + STD * rng.standard_normal(12)
        z = S @ rows.T @ y / STD**2 + rng.standard_normal((16, basis.r)) @ np.linalg.cholesky(S).T
        chance.append(chi2.sf((((z @ rows.T - y) / STD)**2).sum(axis=1).mean(), 12))
    for level in (0.001, 0.01, 0.1):
        assert np.mean(np.array(chance) < level) < level + 4 * np.sqrt(level / 2000)


def test_heavy_tails_are_no_conflict():
    """Draws of a Student law often lie where chi-square has none."""
    def density(y, clean):
        return torch.distributions.StudentT(3.0, clean, STD).log_prob(y).sum(1)
    noise = CallableNoise(lambda y, g: y + STD * torch.distributions.StudentT(3.0).sample(y.shape), density)
    torch.manual_seed(0)
    problem = _problem(noise=noise)
    latent = LatentProblem(problem, np.zeros(12))
    sizes = latent._likelihood._sizes
    assert chi2.sf(np.quantile(sizes, 0.995), 12) < 1e-5
    assert latent.chances(np.quantile(sizes, 0.995)) == (1.0, pytest.approx(1.0))
    readings = np.zeros((1, 12))
    readings[0, 2] = 100.0
    with pytest.warns(MeasurementWarning, match="contradict sensor " + re.escape(problem.names[2])):
        conflict(latent, readings, "draws")


def test_solves_that_fail_with_further_modes_leave_them_to_the_others_or_are_told():
    """NaN is no answer, and never a good one."""
    few = karhunen_loeve(GaussianPrior(V, 1.0, 0.6), 2)
    calls = []

    def solver(fails):
        def solve(m):
            calls.append(1)
            if fails(few.encode(m.dat.data_ro[None])[0], m):
                raise RuntimeError("no state here")
            return m.copy(deepcopy=True)
        return solve

    def beyond(z, m):
        return np.abs(m.dat.data_ro - few.decode(z[None])[0]).max() > 1e-8
    whole = _problem()
    latent = LatentProblem(whole, np.zeros(12), few)
    right = unseen(latent, np.zeros((400, 2)))[0]
    some = replace(whole, forward=solver(lambda z, m: beyond(z, m) and m.dat.data_ro[5] > 0.4))
    found, readings = unseen(LatentProblem(some, np.zeros(12), few), np.zeros((400, 2)))
    assert np.isfinite(readings).all() and right / 2 < found < 2 * right
    none = replace(whole, forward=solver(beyond))
    assert np.isnan(unseen(LatentProblem(none, np.zeros(12), few), np.zeros((4, 2)))[0])
    with pytest.warns(ConvergenceWarning, match="of the basis add to readings is not known.*no state here"):
        hmc(none, np.zeros(12), basis=few, draws=100, **QUICK)


def test_a_basis_is_chosen_with_the_solves_that_succeed():
    def sometimes(m):
        return m.copy(deepcopy=True) if m.dat.data_ro[3] < 0.3 else 1 / 0
    problem = replace(_problem(noise=1e-3), forward=sometimes)
    assert reference_latents(problem, np.zeros(12), None).r == reference_latents(
        _problem(noise=1e-3), np.zeros(12), None).r

    def never(m):
        raise RuntimeError("no state")
    with pytest.warns(ConvergenceWarning, match="not known, because the forward problem fails.*no state"):
        reference_latents(replace(problem, forward=never, noise=GaussianNoise(std=1e-3)), np.zeros(12), None)
