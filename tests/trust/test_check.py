"""Verdicts on posteriors that are right, and on every usual fault; exact ones pass."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from firedrake import Function, FunctionSpace, UnitIntervalMesh
from mpi4py import MPI
from scipy.sparse import issparse

from fem_diffusion import (
    CallableNoise, Check, GaussianNoise, GaussianPrior, InputError, InverseProblem, Samples, SolveError, check,
    exact, karhunen_loeve, point_sensors,
)
from fem_diffusion.diffusion import Distance

V = FunctionSpace(UnitIntervalMesh(20, comm=MPI.COMM_SELF), "CG", 1)
STD = 0.3
# Posteriors that are exact for another problem say so.
TOLD = pytest.mark.filterwarnings("ignore::fem_diffusion.diffusion.MeasurementWarning")


class Bent:
    """The state m + bend m²."""

    M = U = V

    def __init__(self, bend):
        self.bend = bend

    def __call__(self, m):
        return Function(V, val=self.solve_many(m.dat.data_ro[None])[0])

    def solve_many(self, parameters):
        return parameters + self.bend * parameters**2

    def sensitivity(self, m, rows):
        return (rows.toarray() if issparse(rows) else rows) * (1 + 2 * self.bend * m.dat.data_ro)


class Given:
    """A posterior of a user's own, whose samples are stretched about their mean and shifted by so many of its std."""

    def __init__(self, problem, y, draw, wide=1.0, shift=0.0):
        self.problem, self.y, self.draw, self.wide, self.shift = problem, y, draw, wide, shift

    def sample(self, n, *, seed):
        x = self.draw(n, seed)
        mean, std = x.mean(axis=0), x.std(axis=0)
        return Samples(V, mean + self.wide * (x - mean) + self.shift * std, np.empty((n, 0)))


def _problem(bend=0.0, noise=STD, k=20, forward=None):
    places = np.linspace(0.04, 0.97, k)[:, None]
    return InverseProblem(GaussianPrior(V, 1.0, 0.3), forward or Bent(bend), point_sensors(V, places), noise)


def _pair(problem, seed, noise=1.0):
    """A prior sample, and what the sensors read of it, with this many times the noise."""
    m = problem.prior.sample_many(1, seed)
    clean = problem.readings(m)
    y = problem.noise.sample(torch.from_numpy(clean), torch.Generator().manual_seed(seed)).numpy()
    return m[0], (clean + noise * (y - clean))[0]


def _chains(problem, y, m):
    """Independent draws of a posterior: Hamiltonian chains from one draw of it, which the truth of y is."""
    basis = karhunen_loeve(problem.prior, 21)
    modes, rows, bend = basis.scaled_modes, problem.observation.rows.toarray(), problem.forward.bend
    start = basis.encode(m[None])
    measured = torch.from_numpy(y)

    def clean(z):
        field = z @ modes
        return (field + bend * field**2) @ rows.T

    def energy(z):
        return (z**2).sum(axis=1) / 2 - problem.noise.log_density(measured, torch.from_numpy(clean(z))).numpy()

    def slope(z):
        at = torch.from_numpy(clean(z)).requires_grad_()
        score = -torch.autograd.grad(problem.noise.log_density(measured, at).sum(), at)[0].numpy()
        return z + (score @ rows * (1 + 2 * bend * (z @ modes))) @ modes.T
    std = problem.noise.covariance(torch.from_numpy(clean(start))).diagonal().sqrt().numpy()
    sensed = (rows * (1 + 2 * bend * m)) @ modes.T / std[:, None]
    root = np.linalg.cholesky(np.linalg.inv(np.eye(21) + sensed.T @ sensed))

    def draw(n, seed):
        rng, z = np.random.default_rng(seed), np.tile(start, (n, 1))
        for _ in range(25):
            first, x, length = rng.standard_normal(z.shape), z, 0.2 * rng.uniform(0.8, 1.2)
            v = first - length / 2 * slope(x) @ root
            for leap in range(8):
                x = x + length * v @ root.T
                v = v - length / (1 + (leap == 7)) * slope(x) @ root
            change = energy(z) - energy(x) + ((first**2).sum(axis=1) - (v**2).sum(axis=1)) / 2
            z = np.where((np.log(rng.uniform(size=n)) < change)[:, None], x, z)
        return z @ modes
    return draw


def _run(problem, number, wide=1.0, shift=0.0, noise=1.0, broken=0.0, seed=0):
    """Checks of posteriors of so many measurements."""
    found = []
    for i in range(seed, seed + number):
        m, y = _pair(problem, i, noise)
        y[5] += broken
        if problem.forward.bend or not problem.noise.constant:
            draw = _chains(problem, y, m)
        else:
            right = exact(problem, y)

            def draw(n, seed, right=right):
                return right.sample(n, seed=seed).values
        found.append(check(Given(problem, y, draw, wide, shift), seed=i))
    return found


SLOW = [pytest.param(bend, id=f"bent by {bend}", marks=pytest.mark.slow) for bend in (0.15, 0.4)]


@pytest.mark.parametrize("bend", [pytest.param(0.0, id="linear"), *SLOW])
def test_exact_posteriors_pass_19_times_in_20(bend):
    found = Counter(x.verdict for x in _run(_problem(bend), 200))
    assert found["trustworthy"] >= 190, found


FAULTS = {"too wide": {"wide": 2.0}, "too narrow": {"wide": 0.5}, "biased": {"shift": 1.0}}


@pytest.mark.parametrize("verdict", FAULTS)
@pytest.mark.parametrize("bend, number", [(0.0, 30), (0.4, 10), pytest.param(0.15, 100, marks=pytest.mark.slow)])
def test_every_fault_of_a_posterior_is_recognised(verdict, bend, number):
    found = _run(_problem(bend), number, **FAULTS[verdict])
    assert sum(x.verdict == verdict for x in found) >= 0.9 * number, Counter(x.verdict for x in found)
    assert all(x.light != "green" for x in found)
    if bend == 0:
        width, shift = (np.mean([getattr(x, name) for x in found]) for name in ("width", "shift"))
        assert abs(width / FAULTS[verdict].get("wide", 1.0) - 1) < 0.05
        assert abs(shift - 0.95 * FAULTS[verdict].get("shift", 0.05)) < 0.15


@TOLD
@pytest.mark.parametrize("bend, number", [(0.0, 30), (0.4, 10), pytest.param(0.15, 100, marks=pytest.mark.slow)])
def test_a_measurement_that_goes_not_with_its_model_is_recognised(bend, number):
    for fault in ({"broken": 10 * STD}, {"noise": 3.0}):
        # The posterior is exact, of a problem that is not that of the measurement.
        found = _run(_problem(bend), number, **fault)
        assert sum(x.verdict == "conflict" for x in found) >= 0.9 * number, Counter(x.verdict for x in found)
        if "broken" in fault:
            name = _problem().names[5]
            assert sum(x.worst == (name,) for x in found) >= 0.9 * number
            assert name in str(found[0]) and "is expected beside the others" in str(found[0])
            assert all(x.sensor_p[5] < 1e-6 for x in found)
        else:
            assert sum("noise is larger than assumed" in str(x) for x in found) >= 0.7 * number


@TOLD
def test_sensors_on_which_solver_and_training_disagree_are_both_named():
    """Where readings bend, a wrong one can make a sound one look wrong beside the solver."""
    problem = _problem()
    _, y = _pair(problem, 0)
    y[5] += 3.0
    right, name = exact(problem, y), problem.names[5] if problem.names else "5"

    def look(worst):
        posterior = Given(problem, y, lambda n, seed: right.sample(n, seed=seed).values)
        posterior.distance = Distance(3.0, 1.0, 1e-3, (0.0,) * len(y), worst, 100, False, "unlike")
        found = check(posterior)
        assert found.verdict == "conflict" and found.worst == (name,)
        return found.sentences[0]
    assert look((name,)).endswith("Check this sensor, or leave it out.") and look(()).endswith("or leave it out.")
    assert "But compared with the training it is sensor other: check all of them" in look(("other",))


@TOLD
def test_noise_that_is_smaller_than_assumed_is_recognised_where_there_are_sensors_enough():
    found = _run(_problem(k=60), 20, noise=1 / 3)
    assert sum("noise is smaller than assumed" in str(x) for x in found) >= 18


def test_relative_noise_counts_as_it_does_at_the_predicted_readings():
    problem = _problem(0.15, GaussianNoise(std=0.1, relative=0.1))
    assert sum(x.verdict == "trustworthy" for x in _run(problem, 30)) >= 27
    for fault, verdict in (({"wide": 2.0}, "too wide"), ({"broken": 3.0}, "conflict")):
        assert sum(x.verdict == verdict for x in _run(problem, 10, **fault)) >= 9


def _skew(clean, generator):
    white = torch.rand(clean.shape, generator=generator, dtype=clean.dtype)
    return clean - STD * (torch.log(white) + 1)


def _skew_density(y, clean):
    away = (y - clean) / STD + 1
    return torch.where(away > 0, -away, -torch.inf).sum(1) - len(y) * np.log(STD)


@TOLD
@pytest.mark.parametrize("density", [None, _skew_density], ids=["without density", "with density"])
def test_noise_of_the_users_own_is_taken_as_it_is_drawn(density):
    problem, gauss = _problem(noise=CallableNoise(_skew, density)), _problem()
    verdicts = []
    for i in range(20):
        _, y = _pair(problem, i)
        y[5] += 3.0 * (i % 2)
        right = exact(gauss, y)
        found = check(Given(problem, y, lambda n, seed: right.sample(n, seed=seed).values), seed=i)
        verdicts.append(found.verdict)
        assert ("no log_density" in str(found)) == (density is None)
    assert verdicts[1::2].count("conflict") >= 9
    if density is None:
        # The Gaussian posterior is that of the noise's mean and covariance.
        assert verdicts[::2].count("trustworthy") >= 9


def test_a_solver_without_derivative_is_looked_at_by_differences():
    bent = Bent(0.15)

    class Plain:
        M = U = V
        solve_many = staticmethod(bent.solve_many)

        def __call__(self, m):
            return bent(m)
    smooth, plain = _problem(0.15), _problem(forward=Plain())
    counts = {}
    for name, fault in {"trustworthy": {}, **FAULTS, "conflict": {"broken": 3.0}}.items():
        found = []
        for i in range(10):
            m, y = _pair(smooth, i)
            y[5] += fault.get("broken", 0.0)
            draw = _chains(smooth, y, m)
            found.append(check(Given(plain, y, draw, fault.get("wide", 1.0), fault.get("shift", 0.0)), seed=i))
        assert found[0].pulls == 0 and found[0].solves < 70 and "no derivative" in str(found[0])
        counts[name] = sum(x.verdict == name for x in found)
    assert min(counts.values()) >= 8, counts


def test_many_sensors_do_not_cost_an_adjoint_solve_each():
    problem = _problem(0.15, k=150)
    for name, fault in {"trustworthy": {}, **FAULTS, "conflict": {"broken": 3.0}}.items():
        found = _run(problem, 10, **fault)
        assert sum(x.verdict == name for x in found) >= 9, (name, Counter(x.verdict for x in found))
        assert found[0].solves < 70 and found[0].pulls < 50


class Folded(Bent):
    """The state m³ - 3m, which has a top of 2 at m = -1."""

    def solve_many(self, parameters):
        return parameters**3 - 3 * parameters

    def sensitivity(self, m, rows):
        return (rows.toarray() if issparse(rows) else rows) * (3 * m.dat.data_ro**2 - 3)


@pytest.mark.parametrize("k", [1, 20])
def test_samples_from_which_no_step_leads_to_the_measurement_are_no_verdict_on_sensors(k):
    """On the top of a fold at -1 the search ends at once; a parameter of 2.49 would give the readings of 9."""
    problem, y = _problem(forward=Folded(0.0), k=k), np.full(k, 9.0)

    def around(centre):
        found = check(Given(problem, y, lambda n, seed: centre + 0.05 * problem.prior.sample_many(n, seed)))
        return found, [line for line in found.sentences if "No parameter near the samples explains" in line]
    found, (lost,) = around(-1.0)
    assert found.verdict == "biased" and found.light == "red" and found.misfit > 20
    # 7 / 0.3 noise standard deviations.
    assert re.search(r"leaves 2[23] times the residual of the noise. The samples are far from the posterior", lost)
    assert "laplace(problem, y) tells. posterior.correct(...) mends that" in lost
    assert not any("conflicts with model or noise" in line for line in found.sentences)
    # Beside the truth the same measurement is explained.
    assert not around(2.45)[1]


@TOLD
def test_samples_that_are_far_off_are_told_before_a_prior_that_is_too_narrow():
    """All readings ask for five prior standard deviations, and the samples are far from there."""
    problem = _problem()
    y = _pair(problem, 0)[1] + 5.0
    right = exact(problem, y)

    def look(shift):
        return check(Given(problem, y, lambda n, seed: right.sample(n, seed=seed).values, shift=shift))
    off = look(3.0)
    assert off.verdict == "biased" and off.light == "red"
    assert re.match(r"The samples are off by [\d.]+ posterior standard deviations", off.sentences[0])
    assert "times as far from the prior mean" in off.sentences[1]
    right_there = look(0.0)
    assert right_there.verdict == "conflict" and "times as far from the prior mean" in right_there.sentences[0]


@pytest.mark.parametrize("fails, words", [
    (lambda values: True, "none at the prior mean (RuntimeError: no state here): mend the solver, or choose a prior"),
    (lambda values: abs(values).max() > 0, "has one at the prior mean (RuntimeError: no state here): .* take pcn(")])
def test_a_solver_that_fails_for_all_samples_is_told_with_what_helps(fails, words):
    problem = _problem()
    y = _pair(problem, 0)[1]

    def solve(m):
        if fails(m.dat.data_ro):
            raise RuntimeError("no state here")
        return m.copy(deepcopy=True)
    posterior = Given(_problem(forward=solve), y, lambda n, seed: problem.prior.sample_many(n, seed))
    words = re.escape(words).replace(r"\.\*", ".*")
    with pytest.raises(SolveError, match="no solution for 30 of 30 samples, and " + words):
        check(posterior)


def test_a_check_says_what_it_found_and_draws_it(tmp_path):
    problem = _problem()
    _, y = _pair(problem, 0)
    right = exact(problem, y)
    found = check(Given(problem, y, lambda n, seed: right.sample(n, seed=seed).values))
    assert isinstance(found, Check) and found.verdict == "trustworthy" and found.light == "green"
    assert str(found).startswith("Check: trustworthy (green)\n- Samples explain the measurement")
    assert found.solves < 55 and found.pulls < 100 and found.readings.shape[1:] == (20,)
    assert 0.7 < found.misfit < 1.3 and found.misfit_p > 0.01 and np.isnan(found.distance) and found.worst == ()
    np.testing.assert_allclose(found.noise_std, STD)
    np.testing.assert_array_equal(found.y, y)
    figure = found.plot()
    figure.savefig(tmp_path / "check.png")
    assert [axes.get_ylabel()[:9] for axes in figure.axes] == ["reading", "predicted", "direction"]
    # The same seed gives the same, and another one other samples.
    again, other = (check(Given(problem, y, lambda n, seed: right.sample(n, seed=seed).values), seed=s) for s in (0, 1))
    assert str(again) == str(found) and other.width != found.width


def test_what_cannot_be_checked_is_refused():
    problem = _problem()
    _, y = _pair(problem, 0)
    right = exact(problem, y)
    good = Given(problem, y, lambda n, seed: right.sample(n, seed=seed).values)
    for change, words in ((lambda: check(problem), "give a posterior with sample, problem and y"),
                          (lambda: check(good, 5), "at least 30"), (lambda: check(good, seed=-1), "seed"),
                          (lambda: check(good, data=np.zeros(3)), "without a model"),
                          (lambda: check(Given(_problem(noise=None), y, good.draw)), "noise of the measurement")):
        with pytest.raises(InputError, match=words):
            change()


def test_samples_that_are_all_lost_have_a_verdict_with_many_sensors_as_well():
    problem = _problem(0.1, k=120)
    y = _pair(problem, 0)[1]
    found = check(Given(problem, y, lambda n, seed: 100 + problem.prior.sample_many(n, seed)))
    assert (found.verdict, found.light) == ("biased", "red") and "no solution for" in str(found)
    assert "Samples miss" not in str(found) and "posterior.correct(...) mends that" in str(found)
