"""Priors: pointwise variance, correlation, boundary conditions, batches, transforms, parallel runs."""

import numpy as np
import pytest
from firedrake import (
    Cofunction, DirichletBC, Function, FunctionSpace, MixedFunctionSpace, SpatialCoordinate, Submesh,
    TestFunction, TrialFunction, UnitCubeMesh, UnitIntervalMesh, UnitSquareMesh, VectorFunctionSpace,
    as_vector, assemble, conditional, dx, exp, gt, inner, interpolate, sin,
)
from mpi4py import MPI

from fem_diffusion.errors import InputError
from fem_diffusion.prior import matern as _matern
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.matern import matern_correlation
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior, level_set


def coordinates(V):
    """Nodes of a scalar space on one rank, shape (n, gdim)."""
    mesh = V.mesh()
    W = VectorFunctionSpace(mesh, V.ufl_element(), dim=mesh.geometric_dimension)
    return Function(W).interpolate(SpatialCoordinate(mesh)).dat.data_ro.reshape(-1, mesh.geometric_dimension)


def space(dim, degree=1):
    """A small scalar space of CG elements on the unit interval, square or cube."""
    mesh = {1: UnitIntervalMesh, 2: UnitSquareMesh, 3: UnitCubeMesh}[dim](*[{1: 40, 2: 16, 3: 6}[dim]] * dim)
    return FunctionSpace(mesh, "CG", degree)


@pytest.fixture(scope="module")
def square():
    return space(2)


@pytest.mark.parametrize("dim, smoothness", [(1, None), (1, 3.5), (2, None), (2, 3), (3, None), (3, 0.5)])
def test_variance_is_that_asked_for_up_to_corners(dim, smoothness):
    V = space(dim)
    prior = GaussianPrior(V, 2.0, 0.3, smoothness=smoothness)
    C = prior.covariance_matrix()
    np.testing.assert_allclose(np.diag(C), 4.0, rtol=1e-9)
    np.testing.assert_allclose(prior.pointwise_std().dat.data_ro, 2.0, rtol=1e-12)
    assert np.linalg.eigvalsh(C).min() > -1e-12


@pytest.mark.parametrize("dim, n, length, smoothness, tolerance", [
    (1, 200, 0.1, 1.5, 0.01), (1, 200, 0.1, 3.5, 0.01), (2, 48, 0.15, 1.0, 0.02), (2, 48, 0.15, 3.0, 0.02)])
def test_correlation_inside_is_matern(dim, n, length, smoothness, tolerance):
    V = FunctionSpace(UnitIntervalMesh(n) if dim == 1 else UnitSquareMesh(n, n), "CG", 1)
    prior = GaussianPrior(V, 1.0, length, smoothness=smoothness)
    x = coordinates(V)
    r = np.linalg.norm(x - 0.5, axis=1)
    unit = np.zeros((1, len(r)))
    unit[0, np.argmin(r)] = 1.0
    correlation = prior.apply_covariance(unit)[0]
    near = r < 1.5 * length
    expected = matern_correlation(r[near], length, smoothness)
    np.testing.assert_allclose(correlation[near], expected, atol=tolerance)


def test_matern_formula():
    assert matern_correlation(0.0, 0.3, 1.0) == 1.0
    r = np.linspace(0, 2, 5)
    np.testing.assert_allclose(matern_correlation(r, 0.7, 0.5), np.exp(-r / 0.7), rtol=1e-12)
    x = np.sqrt(3) * r / 0.7
    np.testing.assert_allclose(matern_correlation(r, 0.7, 1.5), (1 + x) * np.exp(-x), rtol=1e-12)


class GivenNoise:
    """Stands in for Firedrake's WhiteNoiseGenerator, with the prior's own noise."""

    def __init__(self, b):
        self.b = b

    def sample(self, apply_riesz=False, **kwargs):
        return self.b.riesz_representation() if apply_riesz else self.b


@pytest.mark.parametrize("smoothness", [1, 3])
def test_batches_agree_with_firedrakes_operator(square, smoothness):
    bc = DirichletBC(square, 0, 1)
    prior = GaussianPrior(square, 1.5, 0.2, smoothness=smoothness, normalise=False, bcs=bc)
    many = prior.sample_many(3, 7)
    noise = Cofunction(square.dual())
    for row, b in zip(many, prior._operator.white_noise(np.random.default_rng(7), 3)):
        noise.dat.data_wo[:] = b
        firedrakes = prior.covariance.sample(rng=GivenNoise(noise))
        np.testing.assert_allclose(1.5 * firedrakes.dat.data_ro, row, atol=1e-10)
    x = assemble(SpatialCoordinate(square.mesh())[0] * TestFunction(square) * dx)
    expected = 1.5**2 * prior.covariance.apply_action(x).dat.data_ro
    np.testing.assert_allclose(prior.apply_covariance(x.dat.data_ro[None])[0], expected, atol=1e-10)


@pytest.mark.parametrize("degree", [1, 3])
def test_white_noise_has_the_mass_matrix_as_covariance(degree):
    V = VectorFunctionSpace(UnitSquareMesh(4, 5), "CG", degree)
    op = GaussianPrior(V, 1.0, 0.3)._operator
    difference = op.noise.matTransposeMult(op.noise) - op.mass
    assert difference.norm() < 1e-13 * op.mass.norm()


@pytest.mark.parametrize("signs", [False, True])
def test_white_noise_of_normals_and_of_signs(square, signs, monkeypatch):
    op, n = GaussianPrior(square, 1.0, 0.3)._operator, 10000
    b = op.white_noise(np.random.default_rng(1), n, signs)
    M = op.mass.convert("dense").getDenseArray()
    unit = np.sqrt(M.diagonal())
    # Largest of 41,905 entries of a sample covariance: five standard errors, sqrt(2/n) at most.
    assert (abs(b.T @ b / n - M) / unit / unit[:, None]).max() < 5.5 * np.sqrt(2 / n)
    assert abs(b.mean(axis=0) / unit).max() < 5 / np.sqrt(n)
    monkeypatch.setattr(_matern, "_NOISE_BYTES", 1)   # one at a time
    np.testing.assert_array_equal(op.white_noise(np.random.default_rng(1), 3, signs), b[:3])


@pytest.mark.parametrize("bcs", [False, True])
def test_covariance_is_symmetric_and_that_of_the_samples(bcs):
    V = FunctionSpace(UnitSquareMesh(8, 8), "CG", 1)
    prior = GaussianPrior(V, 1.0, 0.4, mean=2.0, bcs=[DirichletBC(V, 0, 1)] if bcs else ())
    n = V.dim()
    C = prior.apply_covariance(np.eye(n))
    np.testing.assert_allclose(C, C.T, atol=1e-12)
    count = 20000
    deviations = prior.sample_many(count, 3) - prior.mean.dat.data_ro
    # entries of the sample covariance of Gaussians have variance (C_ii C_jj + C_ij²) / count
    bound = 6 * np.sqrt((np.outer(np.diag(C), np.diag(C)) + C**2) / count)
    assert (abs(deviations.T @ deviations / count - C) <= bound + 1e-14).all()
    assert (abs(deviations.mean(axis=0)) <= 6 * np.sqrt(np.diag(C) / count) + 1e-14).all()


def test_karhunen_loeve_traces(square):
    """The eigenvalues of C M sum to the integral of the variance, as bases rely on."""
    prior = GaussianPrior(square, 0.7, 0.3)
    M = assemble(inner(TrialFunction(square), TestFunction(square)) * dx, mat_type="aij").petscmat
    M = M.convert("dense").getDenseArray()
    eigenvalues = np.linalg.eigvals(prior.covariance_matrix() @ M)
    assert abs(eigenvalues.imag).max() < 1e-12 and eigenvalues.real.min() > -1e-12
    assert 0.8 * 0.49 < eigenvalues.real.sum() < 0.49  # less than 0.49 as CG cannot hold all of the field


def test_dirichlet_conditions_are_exact_and_variance_returns_inside(square):
    x = SpatialCoordinate(square.mesh())
    bcs = [DirichletBC(square, 1 + sin(x[1]), 1), DirichletBC(square, -2.0, 2)]
    prior = GaussianPrior(square, 0.5, 0.15, mean=3 + 0 * x[0], bcs=bcs)
    points = coordinates(square)
    left, right = points[:, 0] < 1e-12, points[:, 0] > 1 - 1e-12
    for f in (prior.sample(1), prior.mean):
        np.testing.assert_allclose(f.dat.data_ro[left], 1 + np.sin(points[left, 1]), atol=1e-14)
        np.testing.assert_allclose(f.dat.data_ro[right], -2.0, atol=1e-14)
    std = prior.pointwise_std().dat.data_ro
    inside = abs(points[:, 0] - 0.5) < 0.1  # free edges included
    assert std[left].max() == 0.0
    np.testing.assert_allclose(std[inside], 0.5, rtol=0.05)
    np.testing.assert_allclose(std**2, np.diag(prior.covariance_matrix()), atol=1e-12)
    middle = prior.mean.dat.data_ro[inside]
    assert abs(middle - 3).max() < 0.2 and prior.mean.dat.data_ro.max() < 3 + 1e-3  # the lift decays


def test_vector_field_with_a_condition_on_one_component():
    V = VectorFunctionSpace(UnitSquareMesh(6, 6), "CG", 2)
    bc = DirichletBC(V.sub(1), 4.0, (1, 2, 3, 4))
    prior = GaussianPrior(V, as_vector([1.0, 2.0]), 0.3, mean=[1.0, 0.0], bcs=bc)
    diagonal = np.diag(prior.covariance_matrix()).reshape(-1, 2)
    np.testing.assert_allclose(diagonal[:, 0], 1.0, rtol=1e-9)
    assert 2 < diagonal[:, 1].max() <= 4 + 1e-9 and diagonal[:, 1].min() == 0
    f = prior.sample(0)
    boundary = V.sub(1).boundary_nodes("on_boundary")
    np.testing.assert_allclose(f.dat.data_ro[boundary, 1], 4.0, atol=1e-14)
    C = prior.covariance_matrix().reshape(len(diagonal), 2, len(diagonal), 2)
    assert abs(C[:, 0, :, 1]).max() == 0.0  # independent components


def test_std_varies_in_space(square):
    x = SpatialCoordinate(square.mesh())
    std = Function(square).interpolate(1 + x[0])
    for value in (std, 1 + x[0]):
        prior = GaussianPrior(square, value, 0.3)
        np.testing.assert_allclose(np.diag(prior.covariance_matrix()), std.dat.data_ro**2, rtol=1e-9)


@pytest.mark.parametrize("marker", [2, (1, 2, 3, 4)])
def test_boundary_submesh(marker):
    mesh = UnitSquareMesh(24, 24)
    if isinstance(marker, tuple):  # the closed boundary curve
        W = FunctionSpace(mesh, "HDiv Trace", 0)
        indicator = Function(W)
        DirichletBC(W, 1.0, "on_boundary").apply(indicator)
        mesh.mark_entities(indicator, 77)
        marker = 77
    V = FunctionSpace(Submesh(mesh, 1, marker), "CG", 1)
    prior = GaussianPrior(V, 1.0, 0.25)
    assert prior.smoothness == 1.5
    C = prior.covariance_matrix()
    np.testing.assert_allclose(np.diag(C), 1.0, rtol=1e-9)
    points = coordinates(V)
    i = np.argmin(np.linalg.norm(points - [1, 0.5], axis=1))
    j = np.argmin(np.linalg.norm(points - [1, 0.75], axis=1))
    assert C[i, j] == pytest.approx(matern_correlation(0.25, 0.25, 1.5), abs=0.03)


def test_seeds(square):
    prior = GaussianPrior(square, 1.0, 0.2)
    again = GaussianPrior(square, 1.0, 0.2)
    a = prior.sample_many(300, 5)
    np.testing.assert_allclose(a, again.sample_many(300, 5), atol=1e-13)
    np.testing.assert_allclose(a[:7], prior.sample_many(7, 5), atol=1e-13)  # blocks of other sizes
    np.testing.assert_allclose(prior.sample(5).dat.data_ro, a[0], atol=1e-13)
    assert abs(a - prior.sample_many(300, 6)).max() > 1


@pytest.mark.parametrize("width", [4, _matern._WIDTH])
def test_estimated_variance_of_large_spaces(square, width, monkeypatch):
    monkeypatch.setattr(_matern, "_WIDTH", width)   # with a few columns almost all of it is drawn, with many nothing is
    bcs = DirichletBC(square, 0, 1)
    for smoothness, length in ((1, 0.1), (1, 0.5), (3, 0.2)):
        exact = GaussianPrior(square, 1.0, length, bcs=bcs, smoothness=smoothness)
        expected = exact.pointwise_std().dat.data_ro
        with monkeypatch.context() as patch:
            patch.setattr(_matern, "_EXACT_LIMIT", 10)
            estimated = GaussianPrior(square, 1.0, length, bcs=bcs, smoothness=smoothness)
            op = estimated._operator
            found, truth = _matern.pointwise_variance(op), _matern.pointwise_variance(op, exact=True)
            free = op.free > 0
            # The standard error is 0.02 at the worst node and less at the others, which are correlated.
            error = found[free] / truth[free] - 1
            assert abs(error).max() < 4 * 0.02 and np.sqrt((error**2).mean()) < 0.02 and not found[~free].any()
            np.testing.assert_allclose(np.diag(estimated.covariance_matrix()), expected**2, rtol=0.08)
            np.testing.assert_allclose(estimated.pointwise_std().dat.data_ro, expected, rtol=0.08)


def test_estimated_variance_takes_few_solves(monkeypatch):
    prior = GaussianPrior(FunctionSpace(UnitSquareMesh(96, 96), "CG", 1), 1.0, 0.1)   # too large to be exact
    solved, solve = [], _matern.MaternOperator.solve
    monkeypatch.setattr(_matern.MaternOperator, "solve", lambda op, x: solved.append(len(x)) or solve(op, x))
    variance = _matern.pointwise_variance(prior._operator)
    assert sum(solved) < 1000   # 833, and 1,281 without stress on the boundary
    x = coordinates(prior.V)
    some = np.argsort(np.linalg.norm(x[:, None] - np.array([[0, 0], [0.03, 0.5], [0.5, 0.5], [1, 0.9]]), axis=2), 0)[:3]
    unit = np.zeros((some.size, prior.V.dim()))
    unit[np.arange(some.size), some.ravel()] = 1
    y = prior._operator.root(unit)
    exact = (y * _matern.multiply(prior._operator.mass, y)).sum(axis=1)
    np.testing.assert_allclose(variance[some.ravel()], exact, rtol=4 * 0.02)


def test_iterative_solver(square):
    parameters = {"ksp_type": "cg", "pc_type": "icc", "ksp_rtol": 1e-12}
    prior = GaussianPrior(square, 1.0, 0.2, solver_parameters=parameters)
    direct = GaussianPrior(square, 1.0, 0.2)
    np.testing.assert_allclose(prior.sample_many(2, 0), direct.sample_many(2, 0), atol=1e-8)


@pytest.mark.parallel([1, 2, 3])
def test_same_prior_and_samples_on_any_number_of_ranks():
    V = FunctionSpace(UnitSquareMesh(10, 10), "CG", 1)
    x = SpatialCoordinate(V.mesh())
    bcs = DirichletBC(V, 1 + x[1], 1)
    prior = GaussianPrior(V, 1 + x[0], 0.3, bcs=bcs)
    dual = coefficients(assemble((1 + x[0] * x[1]) * TestFunction(V) * dx))
    variance = V.comm.allreduce(prior.apply_covariance(dual[None])[0] @ dual)
    std, f, g = prior.pointwise_std(), prior.sample(2), prior.sample(2)
    invariants = [variance] + [assemble(e * dx) for e in (std**2, prior.mean, f * x[0], f**2)]
    np.testing.assert_allclose(invariants, ON_ONE_RANK, rtol=1e-9)
    transformed = assemble(TransformedPrior(prior, exp).sample(2) * dx)  # interpolates, so the halo counts
    assert transformed == pytest.approx(assemble(interpolate(exp(f), V) * dx), rel=1e-12)
    h = f.copy(deepcopy=True)
    bcs.apply(h)
    assert assemble((f - h)**2 * dx) < 1e-28 and assemble((f - g)**2 * dx) < 1e-28
    deviations = prior.sample_many(4000, 1) - coefficients(prior.mean)
    functional = V.comm.allreduce(deviations @ dual)
    assert functional.var() == pytest.approx(variance, rel=6 * np.sqrt(2 / 4000))


# variance of a functional, integrals of variance and mean, two of a sample
ON_ONE_RANK = [0.9510659826654, 2.1032951051378, 0.32154975766505, -0.28680000674666, 1.1233772365499]


@pytest.mark.parallel([1, 3])
def test_same_vector_and_boundary_samples_and_estimated_variance_on_any_number_of_ranks(monkeypatch):
    values = []
    mesh = UnitSquareMesh(5, 5)
    for V in (VectorFunctionSpace(mesh, "CG", 3), FunctionSpace(Submesh(mesh, 1, 2), "CG", 2)):
        x = SpatialCoordinate(V.mesh())
        f = GaussianPrior(V, 1.0, 0.3).sample(4)
        values += [assemble((f[0] if V.value_shape else f) * (1 + x[1]**2) * dx), assemble(inner(f, f) * dx)]
    np.testing.assert_allclose(values, FIELDS_ON_ONE_RANK, rtol=1e-9)
    V = FunctionSpace(mesh, "CG", 1)
    exact = GaussianPrior(V, 1.0, 0.3)._scale
    monkeypatch.setattr(_matern, "_EXACT_LIMIT", 10)
    prior = GaussianPrior(V, 1.0, 0.3)
    assert V.comm.allreduce(abs(prior._scale / exact - 1).max(), op=MPI.MAX) < 0.04
    # Asked for, the exact spread of what the estimated scale gives.
    truth = coefficients(prior.pointwise_std(exact=True))
    assert V.comm.allreduce(abs(truth * exact / prior._scale - 1).max(), op=MPI.MAX) < 1e-8
    if V.comm.size > 1:
        with pytest.raises(InputError, match="one rank"):
            prior.covariance_matrix()


FIELDS_ON_ONE_RANK = [-0.31574842462644, 1.4717036695173, -0.17553352069703, 0.30365444828093]


def test_transforms(square):
    base = GaussianPrior(square, 0.8, 0.3)
    fields = base.sample_many(4, 9)
    log_normal = TransformedPrior(base, exp)
    np.testing.assert_allclose(log_normal.sample_many(4, 9), np.exp(fields), rtol=1e-14)
    np.testing.assert_allclose(log_normal.sample(9).dat.data_ro, np.exp(fields[0]), rtol=1e-12)
    levels = TransformedPrior(base, level_set([1.0, 2.0, 5.0], [-0.5, 0.5]))
    expected = np.array([1.0, 2, 5])[np.digitize(fields, [-0.5, 0.5])]
    np.testing.assert_array_equal(levels.transform_many(fields), expected)
    cells = FunctionSpace(square.mesh(), "DG", 0)
    by_cell = TransformedPrior(log_normal, lambda f: f**2, V=cells)
    expected = Function(cells).interpolate(log_normal.sample(9)**2)
    np.testing.assert_allclose(by_cell.sample(9).dat.data_ro, expected.dat.data_ro, rtol=1e-12)
    assert by_cell.sample_many(2, 9).shape == (2, cells.dim())
    slope = TransformedPrior(base, lambda f: f.dx(0), V=cells)  # not pointwise in the coefficients
    expected = Function(cells).interpolate(base.sample(9).dx(0))
    np.testing.assert_allclose(slope.sample_many(3, 9)[0], expected.dat.data_ro, atol=1e-11)
    finer = FunctionSpace(UnitSquareMesh(20, 20), "CG", 1)
    there = TransformedPrior(base, lambda f: 2 * f, V=finer).sample(9)  # another mesh
    expected = Function(finer).interpolate(base.sample(9))
    np.testing.assert_allclose(there.dat.data_ro, 2 * expected.dat.data_ro, atol=1e-12)


def test_callable_prior(square):
    x = SpatialCoordinate(square.mesh())

    def bump(seed):
        return Function(square).interpolate(conditional(gt(x[0], np.random.default_rng(seed).random()), 1, 0))

    prior = CallablePrior(square, bump)
    np.testing.assert_array_equal(prior.sample(3).dat.data_ro, bump(3).dat.data_ro)
    many = prior.sample_many(5, 3)
    assert many.shape == (5, square.dim()) and len(np.unique(many.sum(axis=1))) > 1
    np.testing.assert_array_equal(many, prior.sample_many(5, 3))
    assert TransformedPrior(prior, exp).sample(3).dat.data_ro.max() == pytest.approx(np.e)


def test_input_errors(square):
    mesh = square.mesh()
    other = FunctionSpace(mesh, "CG", 2)
    prior = GaussianPrior(square, 1.0, 0.3)
    vector = VectorFunctionSpace(mesh, "CG", 1)
    for action, words in [
        (lambda: GaussianPrior(FunctionSpace(mesh, "DG", 1), 1.0, 0.3), "CG elements"),
        (lambda: GaussianPrior(FunctionSpace(mesh, "R", 0), 1.0, 0.3), "leave out correlation_length"),
        (lambda: GaussianPrior(MixedFunctionSpace([square, other]), 1.0, 0.3), "mixed"),
        (lambda: GaussianPrior(square, 1.0, 0.0), "correlation_length"),
        (lambda: GaussianPrior(square, 1.0, np.nan), "correlation_length"),
        (lambda: GaussianPrior(square, 1.0, "long"), "correlation_length"),
        (lambda: GaussianPrior(square, -1.0, 0.3), "negative"),
        (lambda: GaussianPrior(square, np.inf, 0.3), "std is inf"),
        (lambda: GaussianPrior(square, "big", 0.3), "give real numbers"),
        (lambda: GaussianPrior(square, 1.0, 0.3, mean=[1.0, 2.0]), r"mean has the shape \(2,\): give \(\)"),
        (lambda: GaussianPrior(square, 1.0, 0.3, smoothness=1.5), "choose one of 1.0, 3.0"),
        (lambda: GaussianPrior(square, 1.0, 0.3, smoothness="rough"), "smoothness"),
        (lambda: GaussianPrior(square, 1.0, 0.3, bcs=[DirichletBC(other, 0, 1)]), "bcs"),
        (lambda: GaussianPrior(square, 1.0, 0.3, bcs=[1]), "bcs"),
        (lambda: prior.sample(-1), "seed"),
        (lambda: prior.sample(None), "seed"),
        (lambda: prior.sample_many(0, 1), "n is 0"),
        (lambda: prior.apply_covariance(np.zeros((2, 3))), "shape"),
        (lambda: level_set([1, 2], [0.0, 1.0]), "one value more"),
        (lambda: level_set([1, 2, 3], [1.0, 0.0]), "increasing"),
        (lambda: TransformedPrior(prior, lambda f: 3), "UFL expression"),
        (lambda: TransformedPrior(prior, exp, V=vector), "value shape"),
        (lambda: TransformedPrior(prior, exp).transform_many(np.zeros(3)), "shape"),
        (lambda: CallablePrior(square, 3), "seed to Function"),
        (lambda: CallablePrior(square, lambda seed: Function(other)).sample(0), "expected a Function in"),
        (lambda: CallablePrior(square, lambda seed: 1.0).sample(0), "returned float"),
    ]:
        with pytest.raises(InputError, match=words):
            action()


def test_interpolated_functions_of_other_spaces(square):
    coarse = FunctionSpace(square.mesh(), "DG", 0)
    prior = GaussianPrior(square, Function(coarse).assign(2.0), 0.3, mean=Function(coarse).assign(1.0))
    np.testing.assert_allclose(prior.mean.dat.data_ro, 1.0)
    assert assemble(interpolate(prior.mean, coarse)).dat.data_ro[0] == pytest.approx(1.0)
