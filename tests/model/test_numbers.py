"""Unknown numbers (Real space), alone and beside a field, and fields constant along an extrusion: the whole job."""

import numpy as np
import pytest
from firedrake import (
    COMM_WORLD, ExtrudedMesh, Function, FunctionSpace, SpatialCoordinate, UnitIntervalMesh, UnitSquareMesh,
    VectorFunctionSpace, assemble, dx, inner,
)

from fem_diffusion import (
    GaussianPrior, InverseProblem, ProductPrior, TrainingOptions, fit, functionals, karhunen_loeve, load_basis,
    load_model, load_pairs, load_samples, point_sensors, simulate,
)
from fem_diffusion.comparison import moment_p_values
from fem_diffusion.errors import InstallError
from fem_diffusion.fields.coefficients import coefficients, on_root

OPTIONS = TrainingOptions(steps=40, evaluate_every=20, width=16, depth=1)
NOISE, N = 0.1, 2000


def _job(prior, forward, observation, r, folder):
    """Through files and back: samples, basis and readings that they belong to."""
    problem = InverseProblem(prior, forward, observation, NOISE)
    data = simulate(problem, 300, seed=1, path=folder / "pairs", progress=False)
    np.testing.assert_array_equal(load_pairs(folder / "pairs", problem).coefficients, data.coefficients)
    basis = karhunen_loeve(prior, r)
    model = fit(problem, data, basis=basis, options=OPTIONS, progress=False)
    y = data.readings[0]
    on_root(COMM_WORLD, lambda: folder.mkdir(exist_ok=True))
    model.save(folder / "model")
    basis.save(folder / "basis")
    np.testing.assert_allclose(load_basis(folder / "basis", prior.V).modes, basis.modes)
    samples = load_model(folder / "model", problem).condition(y).sample(N, seed=2, progress=False)
    try:
        samples.save(folder / "samples", count=20)
    except InstallError:    # without VTK
        pass
    np.testing.assert_array_equal(load_samples(folder / "samples", prior.V).values, samples.values[:20])
    return samples, basis, y


def _exact(prior, forward, observation, basis, y):
    """Mean and covariance of the latents under an affine forward problem."""
    offset = observation(forward(basis.functions(np.zeros((1, basis.r)))[0]))
    units = basis.functions(np.eye(basis.r))
    operator = np.array([observation(forward(m)) - offset for m in units]).T
    covariance = np.linalg.inv(np.eye(basis.r) + operator.T @ operator / NOISE**2)
    return covariance @ operator.T @ (y - offset) / NOISE**2, covariance


@pytest.fixture
def folder(tmp_path_factory):
    from pathlib import Path
    return Path(COMM_WORLD.bcast(str(tmp_path_factory.mktemp("numbers"))))


KINDS = "number", "two numbers", "number and field"


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_inferred(kind, folder):
    mesh = UnitSquareMesh(5, 5)
    x, V = SpatialCoordinate(mesh), FunctionSpace(mesh, "CG", 1)
    if kind == "number":
        prior, r = GaussianPrior(FunctionSpace(mesh, "R", 0), std=2.0, mean=1.0), 1

        def forward(m):
            return Function(V).interpolate(m * (1 + x[0]))
    elif kind == "two numbers":
        prior, r = GaussianPrior(VectorFunctionSpace(mesh, "R", 0, dim=2), std=2.0), 2

        def forward(m):
            return Function(V).interpolate(m[0] + m[1] * x[0])
    else:
        field = GaussianPrior(V, std=1.0, correlation_length=0.8)
        prior, r = ProductPrior([GaussianPrior(FunctionSpace(mesh, "R", 0), std=2.0), field]), (1, 4)

        def forward(m):
            number, f = m.subfunctions
            return Function(V).interpolate(3 * number * x[0] + f)
    sensors = point_sensors(V, [(0.2, 0.3), (0.6, 0.8), (0.9, 0.1)])
    samples, basis, y = _job(prior, forward, sensors, r, folder)
    # Of the field, what the modes leave out is in the readings, too.
    mean, covariance = _exact(prior, forward, sensors, basis, y)
    if kind == "number and field":
        exact = karhunen_loeve(field, 4)
        np.testing.assert_allclose(np.sort(basis.variances[basis.variances < 0.99]),
                                   np.sort(exact.variances / exact.total_variance)[-4:], rtol=1e-6)
    else:
        assert min(moment_p_values(samples.latents, mean, covariance)) > 1e-4
    drawn = samples.component(0).plot(truth=None)
    assert (drawn is None) == (COMM_WORLD.rank > 0)


def test_fields_constant_along_an_extrusion_are_inferred(folder):
    mesh = ExtrudedMesh(UnitIntervalMesh(12), 4)
    M, V = FunctionSpace(mesh, "CG", 1, vfamily="R", vdegree=0), FunctionSpace(mesh, "CG", 1)
    z = SpatialCoordinate(mesh)[1]
    prior = GaussianPrior(M, std=1.0, correlation_length=0.5)

    def forward(m):
        return Function(V).interpolate(m * (1 + z))
    sensors = point_sensors(V, [(0.2, 0.5), (0.6, 0.9)]) + functionals(V, [lambda u: u * dx])
    samples, basis, y = _job(prior, forward, sensors, 12, folder)
    mean, covariance = _exact(prior, forward, sensors, basis, y)
    assert min(moment_p_values(samples.latents, mean, covariance)) > 1e-4
    # The depth mean of (1 + z) is 1.5, and the whole is that times the integral of the field.
    f = samples[0]
    assert assemble(inner(f, f) * (1 + z) * dx) == pytest.approx(1.5 * assemble(inner(f, f) * dx))
    assert coefficients(f).shape == (len(prior.sample_many(1, 0)[0]),)


@pytest.mark.parallel(2)
def test_the_same_on_two_ranks(folder):
    """In one test, because starting ranks takes longer than the jobs."""
    for kind in KINDS:
        test_numbers_are_inferred(kind, folder / kind.replace(" ", "_"))
    test_fields_constant_along_an_extrusion_are_inferred(folder / "extruded")
