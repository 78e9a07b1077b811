"""What is told beside an answer: measurements that fit no parameter, and modes of which nothing is known."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from firedrake import Function, FunctionSpace, UnitIntervalMesh, exp
from scipy.integrate import quad
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
from fem_diffusion.reference.residual import _tail

V = FunctionSpace(UnitIntervalMesh(16), "CG", 1)
PLACES = np.linspace(0.05, 0.95, 12)[:, None]
STD = 0.1


class Pointwise:
    """The state m, or exp(m), with its derivative."""

    def __init__(self, bent=False, space=V):
        self.M = self.U = space
        self.bent = bent

    def __call__(self, m):
        return Function(self.U).interpolate(exp(m) if self.bent else m)

    def solve_many(self, parameters):
        return np.exp(parameters) if self.bent else parameters

    def sensitivity(self, m, rows):
        rows = rows.toarray() if hasattr(rows, "toarray") else rows
        return rows * (np.exp(m.dat.data_ro) if self.bent else 1.0)


class Squared(Pointwise):
    """The state m², with its derivative."""

    def __call__(self, m):
        return Function(self.U).interpolate(m**2)

    def solve_many(self, parameters):
        return parameters**2

    def sensitivity(self, m, rows):
        return 2 * super().sensitivity(m, rows) * m.dat.data_ro


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


@pytest.mark.filterwarnings("ignore::fem_diffusion.reference.chains.ConvergenceWarning")
@pytest.mark.parametrize("bent", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_a_broken_sensor_that_many_modes_take_in_is_told(name, bent):
    """Forty modes read by sixteen sensors: residuals are those of the noise, but no prior field is so uneven."""
    if name == "exact" and bent:
        return
    fine = FunctionSpace(UnitIntervalMesh(60), "CG", 1)
    problem = InverseProblem(GaussianPrior(fine, 0.5, 0.2), Pointwise(bent, fine),
                             point_sensors(fine, np.linspace(0.05, 0.95, 16)[:, None]), 0.05)
    y = _measured(problem, 0)
    REFERENCES[name](problem, y)
    with pytest.warns(MeasurementWarning, match="Nothing near the .* explains the measurement.* in conflict with the "
                      "problem, for the others contradict sensor " + re.escape(problem.names[4])) as told:
        REFERENCES[name](problem, y + 1.0 * (np.arange(16) == 4))
    assert [x.filename for x in told if x.category is MeasurementWarning] == [__file__]


def test_an_alarm_at_a_poor_minimum_ends_with_more_starts():
    """Where a state m² has the sign of m wrong in between, the search ends at a parameter that explains little."""
    fine = FunctionSpace(UnitIntervalMesh(60), "CG", 1)
    problem = InverseProblem(GaussianPrior(fine, 1.0, 0.2), Squared(space=fine),
                             point_sensors(fine, np.linspace(0.05, 0.95, 16)[:, None]), 0.1)
    y = _measured(problem, 45)
    with pytest.warns(MeasurementWarning, match="Nothing near the most probable parameter explains"):
        poor = map_point(problem, y)
    assert map_point(problem, y, starts=6, seed=1).energy < poor.energy - 10


def test_a_prior_that_is_too_narrow_is_told():
    """All sensors agree on a field that is nine prior standard deviations from the mean."""
    problem = _problem()
    y = _measured(problem, 3) + 9 * 0.5
    J = problem.observation.rows @ karhunen_loeve(problem.prior, V.dim()).scaled_modes.T / STD
    inverse = np.linalg.inv(np.eye(12) + J @ J.T)
    far = np.linalg.norm(J.T @ inverse @ y / STD) / np.sqrt(np.trace(J @ J.T @ inverse))
    with pytest.warns(MeasurementWarning, match=f"fits best is {far:.2g} times as far from the prior mean as prior and "
                      "noise let expect: the measurement is in conflict with the problem. Check sensors, the prior"):
        exact(problem, y)


def test_the_mean_of_draws_of_two_modes_is_no_point_to_look_from():
    """A state m² has two, and its derivative is zero between them."""
    prior = GaussianPrior(V, 1.0, 2.0)
    problem = InverseProblem(prior, Squared(), point_sensors(V, PLACES), STD)
    basis = karhunen_loeve(prior, 1)
    z = np.array([[1.5], [-1.5]])
    clean = LatentProblem(problem, np.zeros(12), basis).readings(z)[0]
    latent = LatentProblem(problem, clean + STD * np.random.default_rng(0).standard_normal(12), basis)
    assert latent.differentiable and np.abs(latent.linearised(np.zeros(1))[0]).max() > 5
    assert conflict(latent, latent.readings(z), "draws", z=np.zeros(1)).light == "green"


def test_tails_of_a_residual_are_bounded_and_not_by_much():
    """Against chi-square, and against a numerical inversion for squares of different weights (Imhof 1961)."""
    uneven = np.geomspace(1e-2, 1.0, 8)

    def above(value):
        def wave(u):
            angle = np.arctan(uneven * u).sum() / 2 - u * value / 2
            return np.sin(angle) / (u * np.prod((1 + (uneven * u)**2)**0.25))
        return 0.5 + quad(wave, 0, np.inf, limit=2000)[0] / np.pi
    one = np.array([1.0, 0.0, 0.0])
    for weights, value, chance in ((np.ones(8), 40.0, chi2.sf(40, 8)), (np.ones(8), 0.4, chi2.cdf(0.4, 8)),
                                   (one, 20.0, chi2.sf(20, 1)), (one, 1e-4, chi2.cdf(1e-4, 1)),
                                   (uneven, 20.0, above(20.0)), (uneven, 0.05, 1 - above(0.05))):
        assert chance <= _tail(weights, value) < 100 * chance
    assert _tail(np.zeros(3), 1.0) == 1.0 and _tail(one, 0.0) == 1.0


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
