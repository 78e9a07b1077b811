"""A model trained on one mesh runs on another mesh of the same domain: the same law to Monte Carlo error.

The networks act on latents, and latents belong to modes that are orthonormal in L2 and carry signs fixed by the
geometry; layers on the mesh integrate through the mass matrix. So the basis of another mesh is all that has to be
exchanged, and what ignores the mass matrix will not do.
"""

from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from firedrake import Function, FunctionSpace, RectangleMesh, SpatialCoordinate, UnitSquareMesh, dx, exp

from fem_diffusion import (
    CallableNoise, DataSet, GaussianNoise, GaussianPrior, InverseProblem, ModalBasis, Sampler, TrainingOptions, fit,
    exact, functionals, karhunen_loeve, point_sensors, simulate,
)
from fem_diffusion.comparison import sliced_wasserstein
from fem_diffusion.fields.modes import mass_action
from fem_diffusion.fields.geometry import field_geometry
from fem_diffusion.diffusion.training.scales import Scales

LENGTH, R, DRAWS, SEEDS = 1.43, 12, 800, 4
OPTIONS = TrainingOptions(steps=300, evaluate_every=100, width=32, depth=1)
Y = np.array([2.9, 0.4, 1.1, 0.5])
POINTS = [(x, y) for x in np.linspace(0.1, 1.3, 6) for y in (0.1, 0.5, 0.9)]


def _space(n, graded):
    """CG 1 on a rectangle whose eigenvalues lie well apart, cells of equal size or small ones at the left."""
    mesh = RectangleMesh(n, n, LENGTH, 1.0)
    if graded:
        x = mesh.coordinates.dat.data[:, 0]
        x[:] = LENGTH * (0.3 * x / LENGTH + 0.7 * (x / LENGTH)**2)
    return FunctionSpace(mesh, "CG", 1)


def _prior(V):
    return GaussianPrior(V, std=0.8, correlation_length=0.8)


@cache
def _basis(n, graded):
    return karhunen_loeve(_prior(_space(n, graded)), R)


def _observation(V):
    """Averages of the state exp(m) under four bumps."""
    x, y = SpatialCoordinate(V.mesh())
    bumps = [exp(-20 * ((x - a)**2 + (y - b)**2)) for a, b in ((0.2, 0.3), (0.7, 0.8), (1.1, 0.3), (1.3, 0.6))]
    return functionals(V, [lambda u, bump=bump: 20 / np.pi * bump * u * dx for bump in bumps])


# Without a known law there is no correction: the network does all that the joint Gaussian does not.
NOISES = {"latents": GaussianNoise(std=0.1), "field": CallableNoise(
    lambda y, generator: y + 0.1 * torch.randn(y.shape, generator=generator, dtype=y.dtype))}


def _problem(basis, noise):
    V, prior = basis.V, _prior(basis.V) if basis.prior is None else basis.prior
    return InverseProblem(prior, lambda m: Function(V).interpolate(exp(m)), _observation(V), noise)


def _seen(model, seed):
    """Samples of exp(m) at points that all meshes share, and what they give the sensors of their own mesh."""
    V = model.basis.V
    samples = model.condition(Y).sample(DRAWS, seed=seed, sampler=Sampler(steps=8), refill=False, progress=False)
    states = np.exp(samples.values)
    return np.hstack([point_sensors(V, POINTS).apply(states), _observation(V).apply(states)])


@pytest.fixture(scope="module")
def data():
    basis = _basis(20, False)
    fields = basis.prior.sample_many(2000, seed=1)
    return basis, DataSet(fields, _observation(basis.V).apply(np.exp(fields)))


@pytest.fixture(scope="module", params=["latents", "field"])
def coarse(request, data):
    """A model, its samples on the mesh of its training, and distances between independent sets of them."""
    basis, pairs = data
    with pytest.MonkeyPatch.context() as patch:   # what scales or learnt noise would do, the network does
        patch.setattr("fem_diffusion.diffusion.training.fit.choose_scales", lambda *_: Scales())
        patch.setattr("fem_diffusion.diffusion.training.denoising.Denoising.surpassed", lambda *_: None)
        model = fit(_problem(basis, NOISES[request.param]), pairs, basis=basis, network=request.param, options=OPTIONS,
                    progress=False)
    assert model.history.best_step > 0  # the network is in use
    sets = [_seen(model, seed) for seed in range(SEEDS)]
    return model, sets, [sliced_wasserstein(a, b) for a, b in combinations(sets, 2)]


def _distance(coarse, basis):
    """Mean distance of the samples in another basis from those on the coarse mesh, and what chance alone allows."""
    model, sets, chance = coarse
    moved = _seen(replace(model, problem=_problem(basis, model.problem.noise), basis=basis), seed=SEEDS)
    return np.mean([sliced_wasserstein(a, moved) for a in sets]), np.mean(chance) + 3 * np.std(chance)


def _without_mass_matrix(right):
    """Modes orthonormal in the Euclidean product of coefficients, with the signs that fit the right ones best."""
    variances, modes = np.linalg.eigh(right.prior.covariance_matrix())
    variances, modes = variances[::-1][:R], modes.T[::-1][:R]
    signs = np.sign((mass_action(right.V)(modes) * right.modes).sum(axis=1))
    return ModalBasis(right.V, right.mean, modes * signs[:, None], variances, right.total_variance)


@pytest.mark.parametrize("graded", [False, True], ids=["uniform", "graded"])
def test_finer_mesh_has_the_same_law(coarse, graded):
    distance, chance = _distance(coarse, _basis(40, graded))
    assert distance < chance


def test_modes_without_mass_matrix_have_another_law(coarse):
    distance, chance = _distance(coarse, _without_mass_matrix(_basis(20, True)))
    assert distance > 3 * chance


@pytest.mark.parametrize("coarse", ["field"], indirect=True)
@pytest.mark.parametrize("mass_matrix", [True, False], ids=["integrals", "sums"])
def test_sums_over_nodes_have_another_law(coarse, monkeypatch, mass_matrix):
    def geometry(basis):
        right = field_geometry(basis, points=10**6)  # all nodes, which are dense at the left
        sums = right.modes.T / right.modes.shape[1]
        return right if mass_matrix else replace(right, projector=sums)
    monkeypatch.setattr("fem_diffusion.fields.geometry.field_geometry", geometry)
    distance, chance = _distance(coarse, _basis(20, True))
    assert distance < chance if mass_matrix else distance > 1.5 * chance


class _Identity:
    """The field itself, with its derivative."""

    def __init__(self, V):
        self.M = self.U = V

    def __call__(self, m):
        return m.copy(deepcopy=True)

    def solve_many(self, parameters):
        return parameters.copy()

    def sensitivity(self, m, rows):
        return rows.toarray()


def test_what_the_modes_leave_out_is_known_on_another_mesh():
    """Point sensors of a rough field read another rest there than in training."""
    def problem(n):
        V = FunctionSpace(UnitSquareMesh(n, n), "CG", 1)
        sensors = point_sensors(V, [(x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)])
        return InverseProblem(GaussianPrior(V, std=1.0, correlation_length=0.4), _Identity(V), sensors, 0.1)
    here, there = problem(10), problem(13)
    model = fit(here, simulate(here, 1500, seed=1, progress=False), basis=karhunen_loeve(here.prior, 12),
                options=OPTIONS, progress=False)
    y = here.measurements(here.prior.sample_many(1, 5), seed=77)[0]
    moved = replace(model, problem=there, basis=karhunen_loeve(there.prior, 12))
    draws, right = moved.condition(y).sample(3000, seed=2, progress=False), exact(there, y)
    mean, std = (f.dat.data_ro for f in (right.mean(), right.std()))
    assert np.abs((draws.mean().dat.data_ro - mean) / std).max() < 0.4
    assert np.linalg.norm(draws.std().dat.data_ro - std) < 0.05 * np.linalg.norm(std)
    assert np.sqrt(np.mean(((there.readings(draws.values) - y) / 0.1)**2)) < 1.15
