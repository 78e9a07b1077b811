"""Priors with a constraint: draws, amortised samples, references and corrections are those of the restricted law."""

import numpy as np
import pytest
import torch
from firedrake import (
    DirichletBC, Function, FunctionSpace, TestFunction, UnitIntervalMesh, assemble, dx, exp, grad, inner,
)
from mpi4py import MPI
from scipy.stats import norm

from fem_diffusion import (
    CallablePrior, ConstrainedPrior, GaussianPrior, InverseProblem, ProductPrior, ScalarPrior, Steady, TrainingOptions,
    TransformedPrior, fit, hmc, karhunen_loeve, laplace, load_model, map_point, pcn, point_sensors, simulate,
)
from fem_diffusion.errors import InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients

QUIET = {"progress": False}
OPTIONS = TrainingOptions(steps=100, evaluate_every=50, width=16, depth=1)
Y = np.array([0.32, 0.42])


def _space(comm=MPI.COMM_SELF):
    return FunctionSpace(UnitIntervalMesh(12, comm=comm), "CG", 1)


def total(m):
    return assemble(m * dx)


def _gaussian(comm=MPI.COMM_SELF):
    return GaussianPrior(_space(comm), std=1.0, correlation_length=0.5, mean=1.0)


def _problem(prior, factor=4.0):
    V = prior.V
    u, m, v = Function(V), Function(V), TestFunction(V)
    F = (inner(grad(u), grad(v)) - factor * m * v) * dx
    return InverseProblem(prior, Steady(F, u, m, DirichletBC(V, 0, (1, 2))), point_sensors(V, [[0.3], [0.6]]), 0.1)


# Of the nodes of the line in an integral.
WEIGHTS = np.array([0.5, *np.ones(11), 0.5]) / 12


def small(m):
    """Less than the unconstrained posterior has in the mean: half of it is lost."""
    return bool((total(m) if m.comm.size > 1 else WEIGHTS @ m.dat.data_ro) < 0.9)


@pytest.mark.parallel([1, 2])
def test_draws_of_the_prior_are_those_that_are_inside():
    prior = ConstrainedPrior(_gaussian(MPI.COMM_WORLD), small)
    draws = prior.sample_many(12, seed=1)
    assert prior.allows(draws).all() and 0.2 < prior.allows(prior.core.sample_many(100, seed=1)).mean() < 0.7
    # The first draws stay, however many follow, and a transform or a product keeps the constraint.
    np.testing.assert_allclose(prior.sample_many(3, seed=1), draws[:3], rtol=1e-12, atol=1e-14)
    double = TransformedPrior(prior, lambda m: 2 * m)
    assert max(total(double.sample(seed)) for seed in range(8)) < 1.8
    both = ProductPrior([prior, GaussianPrior(prior.V, 1.0, 0.5)])
    assert both.allows(both.sample_many(20, seed=2)).all() and not both.allows(both.core.sample_many(20, seed=2)).all()
    twice = ConstrainedPrior(prior, lambda m: bool(total(m) > 0.5))
    assert all(0.5 < total(m) < 0.9 for m in (twice.sample(seed) for seed in range(8)))


@pytest.fixture(scope="module")
def right():
    """Mean and standard deviation of the posterior: prior draws with weights, those outside without any."""
    prior = _gaussian()
    problem = _problem(prior)
    draws = prior.sample_many(100_000, seed=11)
    rows = problem.sensitivity(prior.mean)
    log = -((draws @ rows.T - Y)**2).sum(axis=1) / 2 / 0.1**2
    w = np.exp(log - log.max()) * (draws @ WEIGHTS < 0.9)
    w /= w.sum()
    mean = w @ draws
    free = np.exp(log - log.max())
    return mean, np.sqrt(w @ (draws - mean)**2), np.sqrt((w**2).sum()), free @ draws / free.sum()


@pytest.fixture(scope="module")
def model():
    problem = _problem(ConstrainedPrior(_gaussian(), small))
    # A linear problem: forty pairs tell all, whether they are inside or not.
    return fit(problem, simulate(problem, 40, seed=1, **QUIET), options=OPTIONS, **QUIET)


@pytest.fixture(scope="module")
def posterior(model):
    return model.condition(Y)


def _made(way, posterior):
    """Samples of one way, and how many independent ones they are worth."""
    problem = posterior.problem
    if way == "amortised":
        return posterior.sample(3000, seed=1, **QUIET), 3000
    if way == "laplace":
        return laplace(problem, Y).sample(3000, seed=1), 3000
    if way == "corrected":
        found = posterior.correct(1500, seed=1, **QUIET)
        return found, found.certificate.ess
    found = {"hmc": hmc, "pcn": pcn}[way](problem, Y, seed=1, **QUIET)
    return found.draws, found.ess.min()


@pytest.mark.parametrize("way", ["amortised", "laplace", "corrected", "hmc", "pcn"])
def test_every_posterior_is_the_restricted_one(way, posterior, right):
    mean, std, error, free = right
    samples, effective = _made(way, posterior)
    error = 5 * np.hypot(error, effective**-0.5)
    assert (samples.values @ WEIGHTS).max() < 0.9
    assert (np.abs(coefficients(samples.mean()) - mean) < error * std).all()
    assert (np.abs(coefficients(samples.std()) / std - 1) < error).all()
    # Without the constraint the mean is another one.
    assert (np.abs(free - mean) / std).max() > 1.3 * error


def test_a_file_keeps_the_model_and_the_problem_the_constraint(model, posterior, tmp_path):
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model", posterior.problem).condition(Y).sample(300, seed=5, **QUIET)
    np.testing.assert_allclose(again.values, posterior.sample(300, seed=5, **QUIET).values, rtol=1e-9, atol=1e-12)
    assert (again.values @ WEIGHTS).max() < 0.9


def test_an_order_of_two_unknown_numbers_of_other_laws():
    """Truncated normal laws in closed form: what is left of the larger one has a mean that is known."""
    V = FunctionSpace(UnitIntervalMesh(1, comm=MPI.COMM_SELF), "R", 0)
    both = ProductPrior([ScalarPrior(V, norm(0, 1)), ScalarPrior(V, norm(0, 2))])
    prior = ConstrainedPrior(both, lambda m: bool(float(m.subfunctions[0]) < float(m.subfunctions[1])))
    a, b = prior.sample_many(4000, seed=3).T
    # Given a < b, b - a is half normal with scale sqrt(5), and E b = 4 / 5 E (b - a).
    gap = np.sqrt(5) * np.sqrt(2 / np.pi)
    assert (a < b).all()
    assert abs((b - a).mean() - gap) < 5 * np.sqrt(5) / np.sqrt(4000) and abs(b.mean() - 0.8 * gap) < 10 / np.sqrt(4000)


def test_where_hardly_anything_is_allowed_the_remedy_is_told(posterior):
    never = ConstrainedPrior(_gaussian(), lambda m: False)
    with pytest.raises(SolveError, match="allows 0 of 5,120 draws.*mend the constraint"):
        never.sample_many(3, seed=1)
    problem = _problem(ConstrainedPrior(_gaussian(), lambda m: bool(WEIGHTS @ m.dat.data_ro > 4.5)))
    model = fit(problem, simulate(problem, 40, seed=1, **QUIET), options=OPTIONS, **QUIET)
    with pytest.raises(SolveError, match="take hmc"):
        model.condition(Y).sample(10, seed=1, **QUIET)
    with pytest.raises(SolveError, match="not allowed by it: take hmc"):
        map_point(posterior.problem, Y + 0.2)


def test_modes_past_those_of_the_basis_keep_to_it_as_well():
    """Positive at one end, which the smoothest modes alone do not decide."""
    prior = ConstrainedPrior(TransformedPrior(_gaussian(), exp), lambda m: bool(m.dat.data_ro[0] < 3.0))
    problem = _problem(prior, 1.0)
    few = karhunen_loeve(prior, 3)
    found = laplace(problem, Y, basis=few).sample(300, seed=1)
    assert found.values[:, 0].max() < 3.0 and len(found) == 300


@pytest.mark.parametrize("answer, words", [(lambda m: 1.0, "inside gives 1.0"), (lambda m: m > 0, "inside gives"),
                                           (lambda m: None, "inside gives None")])
def test_a_constraint_that_is_none_is_refused(answer, words):
    with pytest.raises(InputError, match=words):
        ConstrainedPrior(_gaussian(), answer).sample_many(1, seed=0)


def test_arguments_of_another_kind_are_refused():
    with pytest.raises(InputError, match="inside"):
        ConstrainedPrior(_gaussian(), 3)
    with pytest.raises(InputError, match="prior"):
        ConstrainedPrior(3, small)
    own = ConstrainedPrior(CallablePrior(_space(), lambda seed: Function(_space()).assign(torch.rand(1).item())), small)
    assert "ConstrainedPrior" in repr(own)


@pytest.mark.parallel(2)
def test_other_answers_on_other_ranks_are_refused():
    prior = ConstrainedPrior(_gaussian(MPI.COMM_WORLD), lambda m: bool(MPI.COMM_WORLD.rank))
    with pytest.raises(InputError, match="another answer elsewhere"):
        prior.sample_many(1, seed=0)
