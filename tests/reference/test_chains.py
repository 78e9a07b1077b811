"""Chains sample the right law, know their error, go on where they were killed, and are refused where they are wrong."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from firedrake import COMM_WORLD, FunctionSpace, UnitSquareMesh, conditional, gt

from fem_diffusion.diffusion import CallableNoise, MeasurementWarning
from fem_diffusion.errors import FileError, InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import TransformedPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.chains import ConvergenceWarning, accepted_chains
from fem_diffusion.reference.exact import exact
from fem_diffusion.reference.hmc import _Hamiltonian, hmc, run_hmc
from fem_diffusion.reference.laplace import laplace
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.pcn import _CrankNicolson, pcn
from fem_diffusion.reference.walk import Chains, diagnosed, learnt, walk

Y = np.array([1.4, 1.3, 1.2])


class Toy:
    """The banana as a density alone: two latents, of which z_0 and z_1 - z_0² are read; what chains ask for."""

    everyone, problem, r, differentiable = COMM_WORLD, SimpleNamespace(comm=COMM_WORLD), 2, True

    def __init__(self, y=(0.6, -0.4), std=(0.5, 0.1), relative=0.0, wrong=1.0, wall=np.inf):
        self.y, self.std, self.relative = np.array(y), np.array(std), relative
        self.wrong, self.wall, self.solves, self.pulls, self.failure = wrong, wall, 0, 0, "wall"
        self.unrestricted = False

    def allowed(self, z):
        return np.ones(len(z), dtype=bool)

    def _read(self, z):
        return np.stack([z[:, 0], z[:, 1] - z[:, 0]**2], axis=1)

    def energy(self, z):
        self.solves += len(z)
        read = self._read(z)
        variance = self.std**2 + (self.relative * read)**2
        energy = (z**2).sum(1) / 2 + ((read - self.y)**2 / variance + np.log(variance)).sum(1) / 2
        return np.where(z[:, 0] > self.wall, np.inf, energy)

    def _gradient(self, z, read, slope):
        variance = self.std**2 + (self.relative * read)**2
        error = read - self.y
        score = error / variance + self.relative**2 * read * (1 / variance - error**2 / variance**2)
        pulled = np.stack([score[:, 0] - 2 * slope * score[:, 1], score[:, 1]], axis=1)
        return z + pulled

    def energy_and_gradient(self, z):
        self.pulls += len(z)
        energy, gradient = self.energy(z), self.wrong * self._gradient(z, self._read(z), z[:, 0])
        return energy, np.where(np.isinf(energy)[:, None], 0.0, gradient)

    def linear_force(self, z):
        jacobian = np.array([[1.0, 0.0], [-2 * z[0], 1.0]])
        return lambda x: self._gradient(x, self._read(z[None]) + (x - z) @ jacobian.T, z[0])


def _truth(toy, functions, width=6.0, n=1201):
    """Posterior means of functions of two latents by quadrature."""
    x = np.linspace(-width, width, n)
    z = np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1).reshape(-1, 2)
    energy = toy.energy(z)
    weights = np.exp(energy.min() - energy)
    return [float((weights * f(z)).sum() / weights.sum()) for f in functions]


FUNCTIONS = [lambda z: z[..., 0], lambda z: z[..., 1], lambda z: z[..., 0]**2, lambda z: z[..., 1]**2,
             lambda z: z[..., 0] * z[..., 1], lambda z: 1.0 * (z[..., 0] > 0.5)]


def _scores(found, right, functions=FUNCTIONS):
    """How far means over chains (chains, n, r) are from the right ones, in their own standard errors."""
    scores = []
    for f, value in zip(functions, right):
        x = f(found.draws)
        effective = float(diagnosed(x[:, :, None])[1][0])
        scores.append((x.mean() - value) / (x.std() / np.sqrt(min(effective, x.size))))
    return np.abs(scores)


def _run(toy, **given):
    start = np.random.default_rng(0).standard_normal((8, 2)) * 0.3
    settings = {"centre": np.array([0.3, 0.0]), "factor": 0.5 * np.eye(2), "seed": 1, "draws": 1000}
    return run_hmc(toy, start, **settings | given)


def _walk(toy, **given):
    """As `_run`, by moves without gradients."""
    def begin():
        return np.random.default_rng(0).standard_normal((8, 2)) * 0.3, np.zeros(2), np.eye(2)
    settings = {"chains": 8, "seed": 1, "warmup": 500, "draws": 5000, "most": 9, "budget": None, "path": None,
                "progress": False, "name": "pcn"}
    return walk(toy, _CrankNicolson(toy, begin), **settings | given)


@pytest.mark.parametrize("given", [{}, {"relative": 0.5}], ids=["constant", "relative"])
@pytest.mark.parametrize("run, std", [(lambda toy: _run(toy, exact=True), (0.5, 0.1)), (_walk, (0.5, 0.1)),
                                      (lambda toy: _run(toy, exact=False, draws=2000), (0.5, 0.6))],
                         ids=["exact", "pcn", "linear"])
def test_draws_of_a_bent_posterior_have_the_moments_of_quadrature(given, run, std):
    toy = Toy(std=std, **given)
    found = run(toy)
    assert _scores(found, _truth(toy, FUNCTIONS)).max() < 4.5
    assert found.acceptance > 0.15 and found.bulk.min() > 150


class _Rigged:
    """Random numbers that are not what a move needs: momenta or steps too small, proposals that are all accepted."""

    def __init__(self, rng, broken):
        self.rng, self.broken = rng, broken

    def standard_normal(self, shape):
        return self.rng.standard_normal(shape) * (0.7 if self.broken == "momentum" else 1.0)

    def uniform(self, *args, size=None):
        drawn = self.rng.uniform(*args, size=size)
        return drawn if size is None or self.broken == "momentum" else 1e-300 + 0 * drawn


@pytest.mark.parametrize("kernel, run, broken", [
    (_Hamiltonian, lambda toy: _run(toy, exact=True), "momentum"), (_CrankNicolson, _walk, "momentum"),
    (_Hamiltonian, lambda toy: _run(toy, exact=False), "acceptance"), (_CrankNicolson, _walk, "acceptance"),
    (_Hamiltonian, lambda toy: _run(toy, exact=True), "law"), (_CrankNicolson, _walk, "law")])
def test_broken_chains_are_seen_by_the_same_test(kernel, run, broken, monkeypatch):
    toy, move = Toy(), kernel.move
    right = _truth(toy, FUNCTIONS)
    if broken == "law":
        toy.y = np.array([0.2, -0.4])
    else:
        monkeypatch.setattr(kernel, "move", lambda self, state, rng: move(self, state, _Rigged(rng, broken)))
    assert _scores(run(toy), right).max() > 6


def test_a_wrong_gradient_costs_acceptance_and_keeps_the_law():
    good, bad = _run(Toy(), exact=True), _run(Toy(wrong=1.4), exact=True)
    assert _scores(bad, _truth(Toy(), FUNCTIONS)).max() < 4.5
    # The warm-up shortens the step until proposals are accepted, and each draw takes more of them.
    assert bad.acceptance / bad.solves < 0.7 * good.acceptance / good.solves


def test_the_force_is_linear_where_that_is_accepted_and_exact_elsewhere():
    assert not _run(Toy(std=(0.5, 2.0)), draws=10).exact
    bent = _run(Toy())
    assert bent.exact and bent.acceptance > 0.6
    assert _scores(bent, _truth(Toy(), FUNCTIONS)).max() < 4.5


def test_failed_solves_cut_the_posterior():
    """A model that has no solution for large first numbers leaves half a law."""
    toy = Toy(wall=0.405)   # between two nodes of the quadrature
    for found in (_run(toy, exact=True), _walk(toy)):
        assert found.draws[:, :, 0].max() <= 0.405 and np.isfinite(found.energies).all()
        assert _scores(found, _truth(toy, FUNCTIONS[:5]), FUNCTIONS[:5]).max() < 4.5
    with pytest.raises(SolveError, match="no solution where chains start .wall."):
        _run(Toy(wall=-9.0), exact=True)


def test_step_mass_and_length_are_found():
    """A normal law of other scales than believed: one quarter turn forgets where it began."""
    class Normal(Toy):
        def energy(self, z):
            self.solves += len(z)
            return ((z / np.array([0.01, 3.0]))**2).sum(1) / 2

        def _gradient(self, z, read, slope):
            return z / np.array([0.01, 3.0])**2
    found = _run(Normal(), exact=True, factor=np.eye(2), centre=np.zeros(2), draws=500)
    assert found.step > 0.5 and found.leaps <= 3 and found.bulk.min() > 1000
    np.testing.assert_allclose(found.draws.reshape(-1, 2).std(axis=0), [0.01, 3.0], rtol=0.1)


def _source(transform=None, noise=0.05, points=((0.4, 0.5), (0.6, 0.5), (0.9, 0.1))):
    V = FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)
    prior = GaussianPrior(V, 1.0, 0.6, mean=0.3)
    prior = prior if transform is None else TransformedPrior(prior, transform)
    forward = AdvectionDiffusion(V, V, "source", bcs=Boundary(dirichlet={1: 1.0}))
    return InverseProblem(prior, forward, point_sensors(V, list(points)), noise)


@pytest.mark.parametrize("reference", [hmc, pcn, laplace])
def test_references_agree_with_the_exact_posterior(reference, monkeypatch):
    monkeypatch.setattr("fem_diffusion.reference.pcn._WARMUP", 400)
    problem = _source(noise=0.3)
    right, basis = exact(problem, Y), karhunen_loeve(problem.prior, 7)
    found = reference(problem, Y, seed=2, basis=basis, **{} if reference is laplace else {"progress": False})
    mean, std = coefficients(right.mean()), coefficients(right.std())
    if reference is laplace:
        np.testing.assert_allclose(coefficients(found.mean()), mean, atol=0.02 * std.max())
        np.testing.assert_allclose(coefficients(found.std()), std, rtol=0.02)
        found = found.sample(4000, seed=1)
        effective = 4000.0
    else:
        assert found.rhat.max() <= 1.01 and found.ess.min() >= 400
        effective = found.ess.min()
        assert "R-hat" in repr(found) and found.method == reference.__name__
    assert np.abs((coefficients(found.mean()) - mean) / std).max() < 4.5 / np.sqrt(effective) + 0.02
    assert np.abs(coefficients(found.std()) / std - 1).max() < 4.5 / np.sqrt(effective) + 0.02


def test_heavy_tails_of_noise_are_sampled():
    """Student's noise with three degrees of freedom: a posterior with two humps, where readings disagree."""
    def density(y, clean):
        return torch.distributions.StudentT(3.0, clean, 0.2).log_prob(y).sum(1)

    def function(clean, generator):
        draws = torch.randn((4, *clean.shape), generator=generator, dtype=clean.dtype)
        return clean + 0.2 * draws[0] / torch.sqrt(draws[1:].square().sum(0) / 3)
    noise = CallableNoise(function, density)
    problem = _source(noise=noise)
    found = hmc(problem, Y, basis=karhunen_loeve(problem.prior, 4), seed=0, chains=8, draws=150, progress=False)
    latent = LatentProblem(problem, Y, karhunen_loeve(problem.prior, 4))
    z = laplace(problem, Y, basis=latent.basis).factor @ np.random.default_rng(1).standard_normal((4, 4000)) * 1.5
    centre = laplace(problem, Y, basis=latent.basis)
    z = (centre.centre[:, None] + z).T
    x = np.linalg.solve(1.5 * centre.factor, (z - centre.centre).T)
    weights = np.exp(-latent.energy(z) + (x**2).sum(0) / 2)
    weights /= weights.sum()
    mean = weights @ z
    std = np.sqrt(weights @ (z - mean)**2)
    error = np.sqrt(1 / found.ess.min() + (weights**2).sum())
    ours = found.record.draws.reshape(-1, 4)
    assert np.abs((ours.mean(0) - mean) / std).max() < 4.5 * error
    assert np.abs(ours.std(0) / std - 1).max() < 4.5 * error


@pytest.mark.parametrize("reference", [hmc, pcn])
def test_a_killed_run_goes_on_and_gives_the_same(reference, tmp_path, monkeypatch):
    problem = _source(noise=0.2)
    settings = {"seed": 3, "chains": 4, "draws": 30, "progress": False, "basis": karhunen_loeve(problem.prior, 4)}
    monkeypatch.setattr("fem_diffusion.reference.pcn._WARMUP", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        whole = reference(problem, Y, **settings)
        path, solve, calls = tmp_path / "chains", problem.forward.solve_many, []
        monkeypatch.setattr("fem_diffusion.reference.walk._PAUSE", 0.0)

        def killed(parameters):
            calls.append(len(parameters))
            if sum(calls) > 0.7 * whole.record.solves:
                raise KeyboardInterrupt
            return solve(parameters)
        monkeypatch.setattr(problem.forward, "solve_many", killed)
        with pytest.raises(KeyboardInterrupt):
            reference(problem, Y, **settings, path=path)
        monkeypatch.setattr(problem.forward, "solve_many", lambda x: calls.append(len(x)) or solve(x))
        calls.clear()
        found = reference(problem, Y, **settings, path=path)
        assert sum(calls) < 0.5 * whole.record.solves
        np.testing.assert_array_equal(found.record.draws, whole.record.draws)
        np.testing.assert_array_equal(found.draws.values, whole.draws.values)
        assert found.record.step == whole.record.step and found.record.solves < 1.02 * whole.record.solves
        # More draws go on from there; fewer are the first ones.
        more = reference(problem, Y, **settings | {"draws": 40}, path=path)
        np.testing.assert_array_equal(more.record.draws[:, :30], whole.record.draws)
        fewer = reference(problem, Y, **settings | {"draws": 20}, path=path)
        np.testing.assert_array_equal(fewer.record.draws, whole.record.draws[:, :20])
        for change, y, words in [({"seed": 4}, Y, "another run"), ({"chains": 5}, Y, "another run"),
                                 ({}, Y + 1, "another run")]:
            with pytest.raises(FileError, match=words):
                reference(problem, y, **settings | change, path=path)
        with pytest.raises(FileError, match="another problem"):
            reference(replace(problem, noise=0.3), Y, **settings, path=path)


def test_chains_that_stay_apart_are_refused():
    """Two humps, far from each other: every chain stays in its own."""
    class Apart(Toy):
        def energy(self, z):
            self.solves += len(z)
            return ((z[:, 0]**2 - 1) / 0.05)**2 / 2 + (z**2).sum(1) / 2

        def _gradient(self, z, read, slope):
            return z + np.stack([2 * z[:, 0] * (z[:, 0]**2 - 1) / 0.05**2, 0 * z[:, 0]], axis=1)
    start = np.array([[1.0, 0.0], [-1.0, 0.0]] * 2)
    found = run_hmc(Apart(), start, centre=np.zeros(2), factor=0.03 * np.eye(2), seed=0, warmup=50, draws=100,
                    exact=True)
    assert found.rhat[0] > 1.5 and not found.converged
    problem = _source()
    latent = LatentProblem(problem, Y, karhunen_loeve(problem.prior, 2))
    settings = {"seed": 0, "progress": False}
    with pytest.raises(SolveError, match="have not converged: after 100 draws.*several modes"):
        accepted_chains(latent, found, "hmc", asked=None, path=None, **settings)
    with pytest.raises(SolveError, match="They are kept in here"):
        accepted_chains(latent, found, "hmc", asked=None, path="here", **settings)
    # Draws of another law have other residuals, too.
    with pytest.warns((ConvergenceWarning, MeasurementWarning)) as told:
        accepted_chains(latent, found, "hmc", asked=100, path=None, **settings)
    first, second = (str(x.message) for x in told[:2])
    assert "not quite converged: the largest R-hat" in first and "The residuals of the draws are" in second


def test_chains_that_stick_in_a_tail_are_told_where_the_user_has_chosen_the_draws():
    """One chain in eight stays out for a quarter of the run: R-hat is no alarm, and few draws are effective."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal((8, 200, 2))
    draws[0, :50, 0] = 2.5 + 0.1 * draws[0, :50, 0]
    problem = _source()
    latent = LatentProblem(problem, Y, karhunen_loeve(problem.prior, 2))

    def chains(draws):
        energies = (draws**2).sum(axis=2) / 2
        told = diagnosed(np.concatenate([draws, energies[:, :, None]], axis=2))
        return Chains(draws, energies, 0.8, *told, 0.5, 3, True, 2000, 0)

    def told(draws):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            accepted_chains(latent, chains(draws), "pcn", asked=200, seed=0, path=None, progress=False)
        return any("not quite converged" in str(x.message) for x in found)
    stuck = chains(draws)
    assert 1.01 < stuck.rhat.max() < 1.05 and np.minimum(stuck.bulk, stuck.tail).min() < 400
    assert told(draws) and not told(rng.standard_normal((8, 200, 2)))


def test_a_budget_of_solves_ends_a_run():
    found = _run(Toy(), budget=9000, exact=True, draws=None, warmup=50)
    assert 9000 - 8 * 65 < found.solves <= 9000
    assert found.draws.shape[0] == 8 and np.isfinite(found.energies).all() and found.draws.shape[1] > 5
    none = _run(Toy(), budget=100, exact=True, draws=None)
    assert none.draws.shape[1] == 0 and np.isnan(none.rhat).all() and not none.converged


def test_an_open_number_of_draws_is_as_many_as_it_takes():
    found = _run(Toy(std=(0.5, 2.0)), draws=None)
    assert found.converged and found.draws.shape[1] < 500
    short = _run(Toy(), draws=None, most=30)
    assert short.draws.shape[1] == 30 and not short.converged


def test_modes_that_readings_see_are_added_or_told():
    problem = _source(noise=0.002)
    three = karhunen_loeve(problem.prior, 3)
    y, = LatentProblem(problem, Y, three).readings(np.array([[0.5, -0.5, 0.5]]))
    with pytest.warns(ConvergenceWarning, match="Modes past the 3 of the basis add"):
        hmc(problem, y, basis=three, seed=0, chains=8, draws=100, progress=False)
    rough = _source(noise=1e-5)
    rough = replace(rough, prior=GaussianPrior(rough.M, 1.0, 0.3, mean=0.3))
    few = karhunen_loeve(rough.prior)
    y, = rough.measurements(rough.prior.sample_many(1, 0), seed=0)
    r = hmc(rough, y, seed=0, chains=8, draws=100, progress=False).draws.latents.shape[1]
    assert r == 36 > few.r


def test_a_step_in_the_transform_needs_no_gradient(monkeypatch):
    problem = _source(lambda f: conditional(gt(f, 0.0), 2.0, 1.0), noise=0.2)
    y, basis = [1.2, 1.2, 1.1], karhunen_loeve(problem.prior, 6)
    monkeypatch.setattr("fem_diffusion.reference.pcn._WARMUP", 300)
    found = pcn(problem, y, basis=basis, seed=0, draws=1800, progress=False)
    latent = LatentProblem(problem, y, basis)
    z = np.random.default_rng(5).standard_normal((4000, 6))
    weights = np.exp(-latent.energy(z) - latent.log_prior(z))
    weights /= weights.sum()
    right = weights @ latent.parameters(z)
    error = np.sqrt((weights**2).sum() + 1 / found.ess.min())
    assert np.abs(coefficients(found.mean()) - right).max() < 4.5 * 0.5 * error
    assert found.record.acceptance > 0.2


def test_the_covariance_is_learnt_from_draws_and_believed_without():
    rng = np.random.default_rng(0)
    root = np.array([[2.0, 0.0], [1.0, 0.3]])
    many = rng.standard_normal((8, 2000, 2)) @ root.T
    found = learnt(np.eye(2), many)
    np.testing.assert_allclose(found @ found.T, root @ root.T, rtol=0.05, atol=0.02)
    few = learnt(root, rng.standard_normal((2, 1, 2)))
    np.testing.assert_allclose(few @ few.T, root @ root.T, rtol=0.2)


def test_bad_arguments_of_chains():
    problem = _source()
    for reference in (hmc, pcn):
        for given, words in [({"chains": 1}, "chains is 1: give an integer of at least 2"),
                             ({"draws": 2.0}, "draws is"), ({"most": 0}, "most is 0"),
                             ({"progress": "no"}, "progress is 'no'"), ({"seed": None}, "seed is None"),
                             ({"path": 3}, "path is 3")]:
            with pytest.raises(InputError, match=words):
                reference(problem, Y, **{"seed": 0, "progress": False} | given)
