"""Several unknowns as one prior on a mixed space, from prior to posterior samples."""

import numpy as np
import pytest
import torch
from firedrake import (
    DirichletBC, Function, FunctionSpace, Measure, Submesh, TestFunction, TrialFunction, UnitIntervalMesh,
    UnitSquareMesh, VectorFunctionSpace, as_vector, assemble, dx, exp, grad, inner, solve, split,
)
from scipy.stats import loguniform, lognorm

from fem_diffusion.fields.basis import load_basis
from fem_diffusion.prior.expansion import karhunen_loeve, pod
from fem_diffusion.diffusion import GaussianNoise, TrainingOptions
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients, field
from fem_diffusion.forward.steady import Steady
from fem_diffusion.model.fit import fit
from fem_diffusion.samples import Samples, load_samples
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.constrained import ConstrainedPrior
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.hierarchical import HierarchicalPrior
from fem_diffusion.prior.product import ProductPrior
from fem_diffusion.prior.scalar import ScalarPrior
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.latents import LatentProblem
from fem_diffusion.simulation.simulate import load_pairs, simulate


def two_unknowns(n=6):
    """A pressure in Pa and a velocity in m/s, with conditions on both: units six orders of magnitude apart."""
    mesh = UnitSquareMesh(n, n, name="square")
    P, W = FunctionSpace(mesh, "CG", 1), VectorFunctionSpace(mesh, "CG", 1)
    pressure = GaussianPrior(P, std=1e5, correlation_length=0.5, mean=2e5, bcs=DirichletBC(P, 1e5, 1))
    velocity = GaussianPrior(W, std=0.1, correlation_length=0.6, bcs=DirichletBC(W.sub(1), 0.3, 2))
    return pressure, velocity


@pytest.mark.parallel([1, 2])
def test_each_component_keeps_its_law_its_share_and_its_conditions(tmp_path):
    pressure, velocity = priors = two_unknowns()
    prior = ProductPrior(priors)
    comm = prior.V.comm
    basis = karhunen_loeve(prior, retained=0.95)
    alone = [karhunen_loeve(part, retained=0.95) for part in priors]
    assert basis.r == sum(part.r for part in alone) and (np.diff(basis.variances) <= 0).all()
    assert basis.retained == pytest.approx(np.mean([part.retained for part in alone]))
    z = torch.randn(5, basis.r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(basis.encode(basis.decode(z)), z, atol=1e-9)
    f = basis.functions(z)[0]
    for bc in prior.bcs:
        violation = f.copy(deepcopy=True)
        bc.apply(violation)
        assert comm.allreduce(np.abs(coefficients(violation) - coefficients(f)).max()) < 1e-9
    # Latents of draws are standard normal and the components independent; refilled fields are prior draws.
    draws = prior.sample_many(400, seed=1)
    latents = basis.encode(draws)
    assert np.abs(np.cov(latents.T) - np.eye(basis.r)).max() < 5 / np.sqrt(400)
    refilled = basis.decode(latents, refill_seed=2)
    for i in (0, 1):
        spread, ours, known = (assemble(inner(g.sub(i), g.sub(i)) * dx) for g in (
            field(prior.V, draws.std(axis=0)), field(prior.V, refilled.std(axis=0)), prior.pointwise_std()))
        # The latents are those of the draws: only the last 5 % of the variance is drawn anew.
        assert ours == pytest.approx(spread, rel=0.02) and spread == pytest.approx(known, rel=4 * np.sqrt(2 / 400))
    np.testing.assert_allclose(coefficients(prior.sample(1)), draws[0], rtol=1e-9)
    covector = coefficients(assemble(inner(as_vector([1.0, 1.0, 1.0]), TestFunction(prior.V)) * dx))
    image = prior.apply_covariance(covector[None])[0]
    first = pressure.apply_covariance(coefficients(assemble(TestFunction(pressure.V) * dx))[None])[0]
    np.testing.assert_allclose(image[:len(first)], first)
    np.testing.assert_allclose(coefficients(prior.mean)[len(first):], coefficients(velocity.mean))
    # A file keeps the weights of the components.
    path = comm.bcast(str(tmp_path)) + "/basis"
    basis.save(path)
    read = load_basis(path, prior.V)
    assert read.weights == basis.weights
    np.testing.assert_allclose(read.modes, basis.modes, rtol=1e-8, atol=1e-8 * np.abs(basis.modes).max())
    again = read.encode([read.functions(z)[0]])
    np.testing.assert_allclose(again[0], z[0], atol=1e-8)


def test_transforms_and_callables_and_pod_by_component():
    pressure, velocity = two_unknowns()
    positive = TransformedPrior(pressure, lambda p: exp(p / 1e5))
    prior = ProductPrior([positive, velocity])
    assert prior.V == ProductPrior([pressure, velocity]).V and prior.core.V == prior.V
    problem = InverseProblem(prior, lambda m: m, lambda u: assemble(split(u)[0] * dx))
    data = simulate(problem, 12, seed=0, progress=False)
    first = pressure.V.dim()
    pressures = prior.transform_many(data.coefficients)[:, :first]
    np.testing.assert_allclose(pressures, np.exp(data.coefficients[:, :first] / 1e5))
    basis = karhunen_loeve(prior, r=(3, 4))
    assert basis.r == 7 and basis.prior is prior and basis.standard_prior
    given = CallablePrior(pressure.V, pressure.sample)
    mixed = ProductPrior([given, velocity])
    draws = mixed.sample_many(60, seed=3)
    modes = pod(mixed.V, draws, (2, 3), bcs=mixed.bcs + prior.core.bcs[:1])
    assert modes.r == 5 and not modes.standard_prior
    scale = modes.encode(draws).std(axis=0, ddof=1)
    np.testing.assert_allclose(scale, 1.0, rtol=1e-6)
    fixed = [field(mixed.V, mode) for mode in modes.modes]
    for bc in prior.core.bcs:
        for mode in fixed:
            before = coefficients(mode)
            bc.zero(mode)
            np.testing.assert_array_equal(coefficients(mode), before)
    # One transform that joins both unknowns.
    joint = TransformedPrior(ProductPrior([pressure, velocity]), lambda f: split(f)[0] * split(f)[1][0], V=pressure.V)
    assert karhunen_loeve(joint, r=(2, 2)).functions(torch.zeros(1, 4))[0].function_space() == pressure.V


@pytest.mark.parallel(2)
def test_source_and_boundary_flux_are_inferred_together(tmp_path):
    """A source inside and a flux through the wall (on a submesh): the whole way, through files."""
    mesh = UnitSquareMesh(6, 6)
    wall = Submesh(mesh, 1, 1)
    U = FunctionSpace(mesh, "CG", 1)
    source = GaussianPrior(U, std=1.0, correlation_length=0.5)
    flux = GaussianPrior(FunctionSpace(wall, "CG", 1), std=0.2, correlation_length=0.5)
    prior = ProductPrior([source, flux])

    def forward(m):
        u, v, solution = TrialFunction(U), TestFunction(U), Function(U)
        f, q = m.subfunctions
        ds_wall = Measure("ds", mesh, 1, intersect_measures=(Measure("dx", wall),))
        rhs = f * v * dx + q * v * ds_wall
        solve((inner(grad(u), grad(v)) + u * v) * dx == rhs, solution)
        return solution
    sensors = point_sensors(U, [[0.1, 0.2], [0.2, 0.8], [0.8, 0.5]])
    folder = mesh.comm.bcast(str(tmp_path)) + "/pairs"
    problem = InverseProblem(prior, forward, sensors, GaussianNoise(std=0.01))
    data = simulate(problem, 40, seed=1, path=folder, block=20, progress=False)
    np.testing.assert_allclose(load_pairs(folder, problem).coefficients, data.coefficients)
    basis = karhunen_loeve(prior, r=(4, 3))
    model = fit(problem, data, basis=basis, options=TrainingOptions(steps=1), progress=False)
    samples = model.condition(data.readings[0]).sample(50, seed=2)
    q = samples.component(1)
    assert q.V == flux.V and len(q) == 50 and q.std().function_space() == flux.V
    np.testing.assert_allclose(coefficients(samples.quantile(0.5).sub(1)), coefficients(q.quantile(0.5)))
    assert q.plot(ylabel="flux") is not None or mesh.comm.rank
    with pytest.raises(InputError, match=r"samples.component\(0\).plot"):
        samples.plot()
    samples.save(folder + "/posterior", count=7)
    kept = load_samples(folder + "/posterior", prior.V)
    np.testing.assert_array_equal(kept.values, samples.values[:7])


def test_samples_of_a_component_are_saved(tmp_path):
    pressure, velocity = two_unknowns(3)
    prior = ProductPrior([pressure, velocity])
    samples = Samples(prior.V, prior.sample_many(3, 0), torch.zeros(3, 1))
    try:
        samples.save(tmp_path)
    except ImportError:  # no VTK
        pass
    assert (tmp_path / "component_0" / "samples.h5").exists()
    with pytest.raises(InputError, match="no component 2"):
        samples.component(2)


def test_errors_tell_the_remedy():
    pressure, velocity = two_unknowns(3)
    prior = ProductPrior([pressure, velocity])
    positive = ProductPrior([TransformedPrior(pressure, exp), velocity])
    given = ProductPrior([CallablePrior(pressure.V, pressure.sample), velocity])
    for action, words in [
        (lambda: ProductPrior([pressure]), "at least two"),
        (lambda: ProductPrior([pressure, "velocity"]), "prior 1 is str"),
        (lambda: prior.sample(-1), "seed is -1"),
        (lambda: positive.transform_many(np.zeros((1, 3))), "shape"),
        (lambda: prior.apply_covariance(np.zeros(3)), "shape"),
        (lambda: positive.mean, "use that of `core`"),
        (lambda: given.apply_covariance(prior.sample_many(1, 0)), "CallablePrior, whose covariance"),
        (lambda: karhunen_loeve(given), "use pod"),
        (lambda: karhunen_loeve(prior, r=3), "give a number of modes for each"),
        (lambda: karhunen_loeve(pressure, r=(3, 1)), "one number of modes"),
        (lambda: pod(prior.V, prior.sample_many(9, 0), (1, 2, 3)), "2 components"),
    ]:
        with pytest.raises(InputError, match=words):
            action()


def test_a_component_may_be_of_several_unknowns_and_noise_levels_go_beside_it():
    """A field of unknown size with the noise's own unknown level, and a product that is constrained."""
    V = FunctionSpace(UnitIntervalMesh(12), "CG", 1)
    prior = HierarchicalPrior(V, std=lognorm(0.5), correlation_length=0.4)
    u, m, v = Function(V), Function(prior.V), TestFunction(V)
    F = (inner(grad(u), grad(v)) - 4 * split(m)[1] * v) * dx
    problem = InverseProblem(prior, Steady(F, u, m, DirichletBC(V, 0, (1, 2))), point_sensors(V, [[0.3], [0.6]]),
                             GaussianNoise(std=loguniform(0.005, 0.05)))
    assert [W.name for W in problem.M] == ["std", None, "noise level"] and len(problem.prior.priors) == 2
    draws = problem.prior.sample_many(3, seed=1)
    np.testing.assert_array_equal(draws, problem.prior.transform_many(problem.prior.core.sample_many(3, seed=1)))
    # The chain rule goes through all of it: readings along a direction of the latents, by differences.
    latent = LatentProblem(problem, np.zeros(2))
    z, way = np.random.default_rng(1).standard_normal((2, latent.r)) / 2
    ahead, behind = latent.readings(np.stack([z + 1e-4 * way, z - 1e-4 * way]))
    np.testing.assert_allclose(latent.pull(z, np.eye(3)) @ way, (ahead - behind) / 2e-4, rtol=1e-5, atol=1e-8)
    number = ScalarPrior(FunctionSpace(V.mesh(), "R", 0), lognorm(0.5))
    both = ConstrainedPrior(ProductPrior([GaussianPrior(V, 1.0, 0.4), number]),
                            lambda m: bool(m.subfunctions[1].dat.data_ro[0] > 1))
    whole = ProductPrior([both, GaussianPrior(V, 2.0, 0.3)])
    values = whole.sample_many(20, seed=1)
    assert (values[:, 13] > 1).all() and values.shape == (20, 27) and abs(values[:, 14:].std() / 2 - 1) < 0.3
    flat = ProductPrior([ProductPrior([GaussianPrior(V, 1.0, 0.4)] * 2), GaussianPrior(V, 1.0, 0.4)])
    assert len(flat.priors) == 3
