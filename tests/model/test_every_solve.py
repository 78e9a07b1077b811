"""Models from derivatives: exact where the problem is, better than values alone elsewhere, whole in files."""

from dataclasses import replace

import numpy as np
import pytest
from firedrake import DirichletBC, Function, FunctionSpace, TestFunction, UnitSquareMesh, dx, exp, grad, inner
import torch
from mpi4py import MPI

from fem_diffusion.diffusion import CallableNoise, TrainingOptions
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.forward.steady import Steady
from fem_diffusion.model.fit import fit
from fem_diffusion.model.model import load_model
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.gaussian import GaussianPrior
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


def test_derivatives_without_known_gaussian_noise_are_left_out_with_a_word(bent):
    problem, data = bent
    few = replace(OPTIONS, steps=10, evaluate_every=10)
    for noise in (None, CallableNoise(lambda clean, g: clean + 0.1)):
        with pytest.warns(UserWarning, match="they are left out"):
            assert fit(replace(problem, noise=noise), data, options=few, **QUIET).basis.turn is None
