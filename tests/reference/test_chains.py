"""Chains sample the right law, know their own error, go on where they were killed, and are refused where they are wrong."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from firedrake import (
    COMM_WORLD, Function, FunctionSpace, UnitIntervalMesh, UnitSquareMesh, as_vector, VectorFunctionSpace, conditional,
    exp, gt,
)
from scipy.stats import norm

from fem_diffusion.diffusion import CallableNoise, GaussianNoise
from fem_diffusion.errors import FileError, InputError, SolveError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.physics import Boundary
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import TransformedPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference import hmc as module
from fem_diffusion.reference.chains import ConvergenceWarning
from fem_diffusion.reference.exact import exact
from fem_diffusion.reference.hmc import hmc, run_hmc
from fem_diffusion.reference.laplace import laplace
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.reference.pcn import pcn
from fem_diffusion.reference.walk import diagnosed, learnt

Y = np.array([1.4, 1.3, 1.2])


class Numbers:
    """A map of two numbers to two, with derivative, that counts and may fail."""

    def __init__(self, read, slope, fails=lambda m: False):
        mesh = UnitIntervalMesh(1, comm=COMM_WORLD)
        self.M = self.U = VectorFunctionSpace(mesh, "R", 0, dim=2)
        self.read, self.slope, self.fails, self.calls = read, slope, fails, 0

    def solve_many(self, parameters):
        self.calls += len(parameters)
        if any(self.fails(m) for m in parameters):
            raise RuntimeError("no solution")
        return np.array([self.read(m) for m in parameters])

    def __call__(self, m):
        u = Function(self.U)
        u.dat.data[:] = self.solve_many(coefficients(m)[None])[0]
        return u

    def sensitivity(self, m, rows):
        return rows @ self.slope(coefficients(m))


def _numbers(read, slope, noise, **given):
    from fem_diffusion.observation.linear import Observation
    from scipy.sparse import eye
    forward = Numbers(read, slope, **given)
    sensors = Observation(forward.U, eye(2, format="csr"), ("a", "b"), np.full((2, 1), np.nan))
    return InverseProblem(GaussianPrior(forward.M, 1.0, mean=as_vector([0.0, 0.0])), forward, sensors, noise)


def _bent(noise=0.1):
    """A banana: the second number is read after the square of the first has been taken off."""
    return _numbers(lambda m: np.array([m[0], m[1] - m[0]**2]), lambda m: np.array([[1.0, 0.0], [-2 * m[0], 1.0]]), noise)


def _truth(problem, y, functions, width=6.0, n=1201):
    """Posterior means of functions of two latents by quadrature."""
    x = np.linspace(-width, width, n)
    z = np.stack(np.meshgrid(x, x, indexing="ij"), axis=-1).reshape(-1, 2)
    readings = np.stack([problem.forward.read(z.T)[0], problem.forward.read(z.T)[1]], axis=1)
    latent = LatentProblem(problem, y)
    log = norm.logpdf(z).sum(1) + latent.log_likelihood(readings)
    weights = np.exp(log - log.max())
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


def _run(problem, y, **given):
    latent = LatentProblem(problem, y, karhunen_loeve(problem.prior, problem.V.dim()))
    start = np.random.default_rng(0).standard_normal((8, latent.r)) * 0.3
    settings = {"centre": np.zeros(latent.r), "factor": 0.5 * np.eye(latent.r), "seed": 1, "warmup": 100, "draws": 400}
    return run_hmc(latent, start, **settings | given)


RELATIVE = GaussianNoise(std=0.05, relative=0.5)


@pytest.mark.parametrize("noise", [GaussianNoise(std=[0.5, 0.1]), RELATIVE], ids=["constant", "relative"])
@pytest.mark.parametrize("exact_force", [True, False])
def test_draws_of_a_bent_posterior_have_the_moments_of_quadrature(noise, exact_force):
    problem, y = _bent(noise), np.array([0.6, -0.4])
    right = _truth(problem, y, FUNCTIONS)
    found = _run(problem, y, exact=exact_force, draws=800 if exact_force else 1500)
    assert _scores(found, right).max() < 4.5
    assert found.exact == exact_force and found.acceptance > 0.2


@pytest.mark.parametrize("broken", ["momentum", "acceptance", "energy"])
def test_broken_chains_are_seen(broken, monkeypatch):
    """The same test sees momenta that are too small, proposals that are all accepted, and a wrong law."""
    problem, y = _bent(GaussianNoise(std=[0.5, 0.1])), np.array([0.6, -0.4])
    right = _truth(problem, y, FUNCTIONS)
    move = module._Hamiltonian.move

    class Small:
        def __init__(self, rng):
            self.rng = rng

        def standard_normal(self, shape):
            return self.rng.standard_normal(shape) * (0.6 if broken == "momentum" else 1.0)

        def uniform(self, *args, size=None):
            drawn = self.rng.uniform(*args, size=size)
            return drawn if size is None or broken != "acceptance" else 0.0 * drawn + 1e-300

    def wrong(self, state, rng):
        return move(self, state, Small(rng))
    monkeypatch.setattr(module._Hamiltonian, "move", wrong)
    if broken == "energy":
        problem = replace(problem, noise=GaussianNoise(std=[0.5, 0.15]))
    found = _run(problem, y, exact=False if broken == "acceptance" else True, draws=800)
    assert _scores(found, right).max() > 6


def test_a_wrong_gradient_costs_acceptance_and_keeps_the_law():
    problem, y = _bent(GaussianNoise(std=[0.5, 0.1])), np.array([0.6, -0.4])
    right, slope = _truth(problem, y, FUNCTIONS), problem.forward.slope
    good = _run(problem, y, exact=True)
    problem.forward.slope = lambda m: 1.6 * slope(m)
    bad = _run(problem, y, exact=True, draws=1500)
    assert _scores(bad, right).max() < 4.5
    # The warm-up shortens the step until proposals are accepted: what is lost is distance.
    assert bad.step < 0.75 * good.step or bad.acceptance < 0.75 * good.acceptance


def _source(transform=None, noise=0.05, points=((0.4, 0.5), (0.6, 0.5), (0.9, 0.1))):
    V = FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)
    prior = GaussianPrior(V, 1.0, 0.6, mean=0.3)
    prior = prior if transform is None else TransformedPrior(prior, transform)
    forward = AdvectionDiffusion(V, V, "source", bcs=Boundary(dirichlet={1: 1.0}))
    return InverseProblem(prior, forward, point_sensors(V, list(points)), noise)


@pytest.mark.parametrize("reference", [hmc, pcn, laplace])
def test_references_agree_with_the_exact_posterior(reference):
    problem = _source(noise=0.2)
    right, basis = exact(problem, Y), karhunen_loeve(problem.prior, 12)
    found = reference(problem, Y, seed=2, basis=basis, **{} if reference is laplace else {"progress": False})
    mean, std = coefficients(right.mean()), coefficients(right.std())
    if reference is laplace:
        np.testing.assert_allclose(coefficients(found.mean()), mean, atol=0.01 * std.max())
        np.testing.assert_allclose(coefficients(found.std()), std, rtol=0.01)
        found = found.sample(4000, seed=1)
        effective = 4000.0
    else:
        assert found.rhat.max() <= 1.01 and found.ess.min() >= 400
        effective = found.ess.min()
        assert "R-hat" in repr(found) and found.method == reference.__name__
    assert np.abs((coefficients(found.mean()) - mean) / std).max() < 4.5 / np.sqrt(effective) + 0.01
    assert np.abs(coefficients(found.std()) / std - 1).max() < 4.5 / np.sqrt(effective) + 0.01


def test_the_force_is_linear_where_that_is_accepted_and_exact_elsewhere():
    easy = hmc(_source(lambda f: 0.5 * exp(f), noise=0.1), Y, seed=0, chains=4, draws=10, progress=False)
    assert not easy.record.exact and "linearised" in repr(easy)
    # Far from the most probable point the derivative is another one.
    problem = _numbers(lambda m: np.array([np.sinh(2 * m[0]), m[1]]),
                       lambda m: np.array([[2 * np.cosh(2 * m[0]), 0.0], [0.0, 1.0]]), GaussianNoise(std=[2.0, 0.5]))
    problem = replace(problem, noise=GaussianNoise(std=[3.0, 0.5]))
    found = _run(problem, np.array([0.0, 0.0]))
    assert _scores(found, _truth(problem, np.array([0.0, 0.0]), FUNCTIONS)).max() < 4.5


def test_heavy_tails_of_noise_are_sampled():
    """Student's noise with three degrees of freedom: a posterior with two humps where readings disagree."""
    import torch

    def density(y, clean):
        return torch.distributions.StudentT(3.0, clean, 0.2).log_prob(y).sum(1)

    def function(clean, generator):
        draws = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        for _ in range(3):
            pass
        chi = torch.randn((3, *clean.shape), generator=generator, dtype=clean.dtype).square().sum(0)
        return clean + 0.2 * draws / torch.sqrt(chi / 3)
    problem = _numbers(lambda m: np.array([m[0], m[0] + 0.3 * m[1]]), lambda m: np.array([[1.0, 0.0], [1.0, 0.3]]),
                       CallableNoise(function, density))
    y = np.array([0.0, 0.9])
    found = hmc(problem, y, seed=0, progress=False)
    assert _scores(found.record, _truth(problem, y, FUNCTIONS)).max() < 4.5


def test_failed_solves_cut_the_posterior():
    """A model that has no solution for positive first numbers leaves half a normal law."""
    problem = _numbers(lambda m: 0.3 * m, lambda m: 0.3 * np.eye(2), 1.0, fails=lambda m: m[0] > 0.4)
    found = _run(problem, np.zeros(2), exact=True, draws=1500)
    std = 1 / np.sqrt(1.09)
    phi, Phi = norm.pdf(0.4 / std), norm.cdf(0.4 / std)
    right = [-std * phi / Phi, 0.0, std**2 * (1 - 0.4 / std * phi / Phi)]
    assert found.draws[:, :, 0].max() <= 0.4
    assert _scores(found, right, FUNCTIONS[:3]).max() < 4.5


@pytest.mark.parametrize("kernel", ["hmc", "pcn"])
def test_a_killed_run_goes_on_and_gives_the_same(kernel, tmp_path, monkeypatch):
    problem, y = _bent(GaussianNoise(std=[0.5, 0.1])), np.array([0.6, -0.4])
    reference = {"hmc": hmc, "pcn": pcn}[kernel]
    settings = {"seed": 3, "chains": 4, "draws": 60, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        whole = reference(problem, y, **settings)
        path, calls = tmp_path / "chains", problem.forward.calls
        monkeypatch.setattr("fem_diffusion.reference.walk._PAUSE", 0.0)
        solve = problem.forward.solve_many

        def killed(parameters):
            if problem.forward.calls > 1.6 * calls:
                raise KeyboardInterrupt
            return solve(parameters)
        problem.forward.solve_many = killed
        with pytest.raises(KeyboardInterrupt):
            reference(problem, y, **settings, path=path)
        problem.forward.solve_many = solve
        found = reference(problem, y, **settings, path=path)
        assert problem.forward.calls < 2.2 * calls
        np.testing.assert_array_equal(found.record.draws, whole.record.draws)
        np.testing.assert_array_equal(found.draws.values, whole.draws.values)
        assert found.record.step == whole.record.step
        # More draws go on from there; fewer are the first ones.
        more = reference(problem, y, **settings | {"draws": 90}, path=path)
        np.testing.assert_array_equal(more.record.draws[:, :60], whole.record.draws)
        fewer = reference(problem, y, **settings | {"draws": 30}, path=path)
        np.testing.assert_array_equal(fewer.record.draws, whole.record.draws[:, :30])
        for change, words in ({"seed": 4}, "another run"), ({"chains": 5}, "another run"):
            with pytest.raises(FileError, match=words):
                reference(problem, y, **settings | change, path=path)
        with pytest.raises(FileError, match="another run"):
            reference(problem, y + 1, **settings, path=path)
        with pytest.raises(FileError, match="another problem"):
            reference(replace(problem, noise=0.3), y, **settings, path=path)


def test_chains_that_stay_apart_are_refused(tmp_path):
    """Two humps, far from each other: every chain stays in its own."""
    problem = _numbers(lambda m: np.array([m[0]**2, m[1]]), lambda m: np.array([[2 * m[0], 0.0], [0.0, 1.0]]), 0.05)
    latent = LatentProblem(problem, np.array([1.0, 0.0]))
    start = np.array([[1.0, 0.0], [-1.0, 0.0]] * 2)
    found = run_hmc(latent, start, centre=np.zeros(2), factor=0.05 * np.eye(2), seed=0, warmup=50, draws=100, exact=True)
    assert found.rhat[0] > 1.5 and not found.converged
    from fem_diffusion.reference.chains import accepted_chains
    settings = {"seed": 0, "progress": False}
    with pytest.raises(SolveError, match="have not converged: after 100 draws.*several modes"):
        accepted_chains(latent, found, "hmc", asked=None, path=None, **settings)
    with pytest.raises(SolveError, match="They are kept in here"):
        accepted_chains(latent, found, "hmc", asked=None, path="here", **settings)
    with pytest.warns(ConvergenceWarning, match="not quite converged"):
        accepted_chains(latent, found, "hmc", asked=100, path=None, **settings)


def test_a_budget_of_solves_ends_a_run():
    problem = _bent(GaussianNoise(std=[0.5, 0.1]))
    found = _run(problem, np.array([0.6, -0.4]), budget=1500, exact=True, draws=None)
    assert 1500 <= found.solves < 1500 + 8 * 70
    assert found.draws.shape[0] == 8 and np.isfinite(found.energies).all()
    none = _run(problem, np.array([0.6, -0.4]), budget=100, exact=True, draws=None)
    assert none.draws.shape[1] == 0 and np.isnan(none.rhat).all() and not none.converged


def test_modes_that_readings_see_are_added_or_told():
    problem = _source(noise=0.002)
    with pytest.warns(ConvergenceWarning, match="Modes past the 3 of the basis add"):
        hmc(problem, Y, basis=karhunen_loeve(problem.prior, 3), seed=0, chains=4, draws=10, progress=False)
    rough = _source(noise=0.0005)
    rough = replace(rough, prior=GaussianPrior(rough.M, 1.0, 0.15, mean=0.3))
    few = karhunen_loeve(rough.prior)
    found = hmc(rough, Y, seed=0, chains=4, draws=10, progress=False)
    assert found.draws.latents.shape[1] >= few.r


def test_a_step_in_the_transform_needs_no_gradient():
    problem = _source(lambda f: conditional(gt(f, 0.0), 2.0, 1.0), noise=0.1)
    y, basis = [1.2, 1.2, 1.1], karhunen_loeve(problem.prior, 6)
    found = pcn(problem, y, basis=basis, seed=0, progress=False)
    latent = LatentProblem(problem, y, basis)
    z = np.random.default_rng(5).standard_normal((4000, 6))
    weights = np.exp(-latent.energy(z) - latent.log_prior(z))
    weights /= weights.sum()
    right = weights @ latent.parameters(z)
    error = np.sqrt((weights**2).sum() + 1 / 400)
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
    problem = _bent()
    for reference in (hmc, pcn):
        for given, words in [({"chains": 1}, "chains is 1: give an integer of at least 2"), ({"draws": 2.0}, "draws is"),
                             ({"most": 0}, "most is 0"), ({"progress": "no"}, "progress is 'no'"),
                             ({"seed": None}, "seed is None"), ({"path": 3}, "path is 3")]:
            with pytest.raises(InputError, match=words):
                reference(problem, np.zeros(2), **{"seed": 0, "progress": False} | given)
