"""Models from derivatives: exact where the problem is, better than values alone elsewhere, whole in files."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from firedrake import DirichletBC, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, exp, grad, inner
import torch
from mpi4py import MPI
from scipy.stats import lognorm, t

from fem_diffusion.diffusion import CallableNoise, StudentNoise, TrainingOptions
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.forward.steady import Steady
from fem_diffusion.model.fit import fit
from fem_diffusion.model.model import load_model
from fem_diffusion.model.refine import refine
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.scalar import ScalarPrior
from fem_diffusion.prior.transformed import TransformedPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.exact import exact
from fem_diffusion.simulation.simulate import simulate

QUIET = {"progress": False}
OPTIONS = TrainingOptions(steps=1500, evaluate_every=250, width=32, depth=2)


def _problem(transform=None, comm=MPI.COMM_SELF):
    V = FunctionSpace(UnitSquareMesh(6, 6, comm=comm), "CG", 1)
    u, m, v = Function(V), Function(V), TestFunction(V)
    F = (inner(grad(u), grad(v)) - 5 * m * v) * dx
    prior = GaussianPrior(V, 0.7, 0.5)
    prior = prior if transform is None else TransformedPrior(prior, transform)
    return InverseProblem(prior, Steady(F, u, m, DirichletBC(V, 0, 1)),
                          point_sensors(V, [[0.6, 0.3], [0.4, 0.8], [0.9, 0.9]]), 0.05)


@pytest.fixture(scope="module")
def bent():
    """A problem that is not linear, with 60 pairs and their derivatives."""
    problem = _problem(exp)
    return problem, simulate(problem, 60, seed=1, derivatives=True, **QUIET)


@pytest.mark.parallel([1, 2])
def test_ten_pairs_tell_the_whole_posterior_of_a_linear_problem():
    problem = _problem(comm=MPI.COMM_WORLD)
    model = fit(problem, simulate(problem, 10, seed=1, derivatives=True, **QUIET), **QUIET)
    # As many directions as sensors, and no network.
    assert model.basis.r == 3 and model.denoiser.network is None and model.denoiser.base.emulator.head is None
    y, = problem.measurements(problem.prior.sample_many(1, 7), seed=7)
    n, right = 4000, exact(problem, y)
    samples = model.condition(y).sample(n, seed=1, **QUIET)
    std = coefficients(right.std())
    assert (np.abs(coefficients(samples.mean()) - coefficients(right.mean())) < 5 * std / np.sqrt(n)).all()
    assert (np.abs(coefficients(samples.std()) / std - 1) < 5 / np.sqrt(2 * n)).all()


def test_derivatives_make_a_better_emulator_than_values_alone(bent, tmp_path):
    problem, data = bent
    new = simulate(problem, 300, seed=2, **QUIET)

    def error(data):
        model = fit(problem, data, options=OPTIONS, **QUIET)
        z = model.basis.encode(new.coefficients)
        return model, np.median(np.abs(model.denoiser.base.emulator(torch.from_numpy(z)).numpy() - new.readings)) / 0.05
    (model, with_them), (_, without) = error(data), error(replace(data, derivatives=None, basis=None))
    assert with_them < 0.5 * without and model.basis.turn is not None
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model", problem)
    np.testing.assert_allclose(again.basis.encode(new.coefficients), model.basis.encode(new.coefficients), atol=1e-8)
    y = new.readings[0]
    np.testing.assert_allclose(again.condition(y).sample(3, seed=1, **QUIET).values,
                               model.condition(y).sample(3, seed=1, **QUIET).values, rtol=1e-6, atol=1e-8)


def test_a_given_basis_keeps_its_modes(bent):
    problem, data = bent
    basis = data.basis.leading(25)
    few = replace(OPTIONS, steps=200, evaluate_every=50)
    assert fit(problem, data, basis=basis, options=few, **QUIET).basis is basis
    part = simulate(problem, 60, seed=1, derivatives=basis, **QUIET)
    with pytest.raises(InputError, match="more than the modes"):
        fit(problem, part, basis=karhunen_loeve(problem.prior, 30), **QUIET)


def test_derivatives_serve_noise_with_outliers_as_well():
    """Of a linear problem ten pairs know the readings; samples by importance weights of prior draws are the measure."""
    problem = replace(_problem(), noise=StudentNoise(0.4, 4.0))
    few = replace(OPTIONS, steps=10, evaluate_every=10)
    model = fit(problem, simulate(problem, 10, seed=1, derivatives=True, **QUIET), options=few, **QUIET)
    y, = problem.measurements(problem.prior.sample_many(1, 7), seed=7)
    samples = model.condition(y).sample(4000, seed=1, **QUIET)
    draws, rows = problem.prior.sample_many(30_000, seed=5), problem.sensitivity(problem.prior.mean)
    weights = np.exp(problem.noise.log_density(torch.from_numpy(y), torch.from_numpy(draws @ rows.T)).numpy())
    weights /= weights.sum()
    mean = weights @ draws
    std = np.sqrt(weights @ (draws - mean)**2)
    error = np.sqrt((weights**2).sum() + 1 / 4000)
    assert error < 0.04
    assert (np.abs(coefficients(samples.mean()) - mean) < 5 * std * error).all()
    assert (np.abs(coefficients(samples.std()) / std - 1) < 5 * error).all()


def test_derivatives_without_a_known_law_of_the_noise_are_left_out_with_a_word(bent):
    problem, data = bent
    few = replace(OPTIONS, steps=10, evaluate_every=10)
    for noise in (None, CallableNoise(lambda clean, g: clean + 0.1)):
        with pytest.warns(UserWarning, match="they are left out"):
            assert fit(replace(problem, noise=noise), data, options=few, **QUIET).basis.turn is None


def test_refine_learns_from_derivatives_where_the_pairs_have_them(bent):
    """Forty chosen simulations: those with derivatives leave less of the readings where the posterior is."""
    problem, data = bent
    y, = problem.measurements(problem.prior.sample_many(1, 7), seed=7)
    model = fit(problem, data, options=OPTIONS, **QUIET)

    def error(given, basis):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            first = fit(problem, given, basis=basis, options=OPTIONS, **QUIET)
            refined, more = refine(first, given, y, 40, seed=3, options=OPTIONS, **QUIET)
        z = model.condition(y).sample(200, seed=9, **QUIET)
        found = refined.denoiser.base.emulator(torch.from_numpy(z.latents)).numpy()
        return more, np.median(np.abs(found - problem.readings(problem.prior.transform_many(
            model.basis.decode(z.latents))))) / 0.05
    (more, with_them), (_, without) = error(data, None), error(replace(data, derivatives=None, basis=None), model.basis)
    assert more.chosen == 40 and more.derivatives.shape == (100, 3, more.basis.r) and with_them < 0.5 * without
    # They are those of the readings, beside the prior's and the chosen pairs alike.
    step = 1e-4 * np.eye(more.basis.r)[0]
    for i in (0, 99):
        ahead, behind = (problem.readings(problem.prior.transform_many(more.coefficients[i:i + 1] + sign * (
            step @ more.basis.scaled_modes)))[0] for sign in (1, -1))
        np.testing.assert_allclose(more.derivatives[i, :, 0], (ahead - behind) / 2e-4, rtol=1e-4, atol=1e-6)


def test_readings_with_tails_so_heavy_that_one_pair_hides_the_others_are_told():
    """Of a law without a mean, least squares sees the outermost draw, where pairs are too few to choose a scale by."""
    V = FunctionSpace(UnitSquareMesh(2, 2, comm=MPI.COMM_SELF), "CG", 1)
    R = FunctionSpace(V.mesh(), "R", 0)
    u, m, v = Function(V), Function(R), TestFunction(V)
    few = replace(OPTIONS, steps=10, evaluate_every=10)

    def model(law):
        sensors = point_sensors(V, [[0.5, 0.5]])
        problem = InverseProblem(ScalarPrior(R, law), Steady((u - m) * v * dx, u, m), sensors, 0.5)
        return fit(problem, simulate(problem, 150, seed=1, **QUIET), options=few, **QUIET)
    with pytest.warns(UserWarning, match="One of 150 pairs holds .* hmc, which needs no training"):
        model(t(0.5))
    model(lognorm(0.5))
