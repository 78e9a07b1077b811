"""Leading modes against dense eigenpairs, also where variances are equal, few, or fall slowly."""

import numpy as np
import pytest
from firedrake import DirichletBC, FunctionSpace, SpatialCoordinate, UnitSquareMesh, assemble, dx, sin

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import field
from fem_diffusion.fields.lanczos import Lanczos
from fem_diffusion.fields.modes import Covariance, leading_modes, mass_action, sample_covariance
from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.prior.gaussian import GaussianPrior

N = 441


@pytest.fixture(scope="module")
def V():
    return FunctionSpace(UnitSquareMesh(20, 20), "CG", 1)


def covariance(V, variances):
    """A covariance with these variances along orthonormal modes (n, N) of its own, which are returned as well."""
    mass = mass_action(V)
    modes = np.random.default_rng(5).standard_normal((len(variances), N))
    modes = np.linalg.solve(np.linalg.cholesky(modes @ mass(modes).T), modes)
    return Covariance(
        lambda x: (x @ modes.T * variances) @ modes,
        lambda n, seed: np.random.default_rng(seed).standard_normal((n, len(variances))) * np.sqrt(variances) @ modes
    ), modes, mass


def angles(modes, truth, mass):
    """Largest sine between a span and the truth."""
    return np.sqrt(np.maximum(1 - np.linalg.svd(modes @ mass(truth).T)[1].min()**2, 0))


def test_modes_are_those_of_the_dense_problem(V):
    bcs = DirichletBC(V, 0, 1)
    prior = GaussianPrior(V, 1.0, 0.2, bcs=bcs)
    C, M = prior.covariance_matrix(), mass_action(V)(np.eye(N))
    L = np.linalg.cholesky(M)
    truth = np.linalg.eigvalsh(L.T @ C @ L)[::-1]
    for r in (1, 40, 420):
        basis = karhunen_loeve(prior, r)
        np.testing.assert_allclose(basis.variances, truth[:r], rtol=1e-9, atol=1e-12 * truth[0])
        assert np.abs(basis.modes @ M @ basis.modes.T - np.eye(r)).max() < 1e-10
    kept = np.searchsorted(np.cumsum(truth), 0.95 * truth.sum()) + 1
    assert abs(karhunen_loeve(prior, retained=0.95).r - kept) <= 1
    assert karhunen_loeve(prior, retained=0.95, most=5).r == 5


@pytest.mark.parametrize("variances, r", [
    (np.r_[np.full(60, 2.0), 1.0 / np.arange(1, 300)], 64),
    (np.r_[np.full(60, 2.0), 1.0 / np.arange(1, 300)], 30),
    (np.ones(N), 50),
], ids=["equal ones and others", "some of equal ones", "white"])
def test_more_modes_of_equal_variance_than_a_block_are_all_found(V, variances, r):
    C, truth, mass = covariance(V, variances)
    modes, found, total = leading_modes(C, V, (), r)
    np.testing.assert_allclose(found, np.sort(variances)[::-1][:r], rtol=1e-6)
    outside = modes - modes @ mass(truth[:max(r, 60)]).T @ truth[:max(r, 60)]
    assert len(variances) == N or (outside * mass(outside)).sum() < 1e-6
    # Of independent draws, 64 of them.
    tail = variances.sum() - found.sum()
    assert total - found.sum() == pytest.approx(tail, rel=6 * np.sqrt(2 * (variances**2).sum() / 64) / tail)


def test_a_start_that_misses_modes_is_found_out(V):
    # The first draws see nothing of the largest ones.
    C, truth, mass = covariance(V, np.r_[np.full(3, 5.0), 1.0 / np.arange(1, 200)])

    def blind(n, seed):
        x = C.draws(n, seed)
        return x - (x @ mass(truth[:3]).T @ truth[:3] if seed <= 1 else 0)
    modes, found, _ = leading_modes(Covariance(C.apply, blind), V, (), 10)
    np.testing.assert_allclose(found[:4], [5, 5, 5, 1], rtol=1e-6)
    assert angles(modes[:3], truth[:3], mass) < 1e-5


def test_variances_that_hardly_fall_are_told(V):
    fine = FunctionSpace(UnitSquareMesh(40, 40), "CG", 1)
    mass, size = mass_action(fine), fine.dim()
    spread = np.linspace(1, 1 - 1e-3, size)
    lumped = mass(np.ones((1, size)))[0]
    C = Covariance(lambda x: spread * x / lumped, lambda n, seed: np.random.default_rng(seed).standard_normal(
        (n, size)) * np.sqrt(spread / lumped))
    with pytest.warns(RuntimeWarning, match="fall too slowly"):
        leading_modes(C, fine, (), 4)


def test_what_has_fewer_modes_is_an_error_unless_they_will_do(V):
    C, truth, mass = covariance(V, np.array([3.0, 2.0, 1.0]))
    with pytest.raises(InputError, match="3 modes of positive variance"):
        leading_modes(C, V, (), 4)
    modes, found, _ = leading_modes(C, V, (), 4, fewer=True)
    np.testing.assert_allclose(found, [3, 2, 1], rtol=1e-9)
    with pytest.raises(InputError, match="zero"):
        leading_modes(Covariance(C.apply, lambda n, seed: np.zeros((n, N))), V, (), 1)


def test_sample_covariance_keeps_share_and_cap(V):
    samples = GaussianPrior(V, 1.0, 0.3).sample_many(30, 0)
    C = sample_covariance(V, samples - samples.mean(axis=0))
    modes, found, total = leading_modes(C, V, (), retained=1 - 1e-8, most=25, fewer=True)
    assert len(found) == 25
    modes, found, total = leading_modes(C, V, (), retained=1 - 1e-8, fewer=True)
    assert len(found) == 29 and found.sum() == pytest.approx(total, rel=1e-8)


def test_what_is_beside_a_space_is_orthonormal_also_where_it_is_almost_inside(V):
    mass = mass_action(V)
    space = Lanczos(lambda x: x, mass, V.comm, N)
    rng = np.random.default_rng(0)
    space.extend(space.beside(rng.standard_normal((30, N))))
    nearly = rng.standard_normal((5, 30)) @ space.basis + 1e-9 * rng.standard_normal((5, N))
    new = space.beside(nearly)
    assert len(new) == 5
    assert np.abs(space.inner(new, new) - np.eye(5)).max() < 1e-12
    assert np.abs(space.inner(space.basis, new)).max() < 1e-12
    assert len(space.beside(nearly, least=1e-3)) == 0


@pytest.mark.parallel([1, 2, 3])
def test_modes_of_equal_variance_have_the_same_directions_on_any_number_of_ranks():
    square = FunctionSpace(UnitSquareMesh(16, 16, diagonal="crossed"), "CG", 1)
    basis = karhunen_loeve(GaussianPrior(square, 1.0, 0.3), 9)
    assert abs(basis.variances[1] / basis.variances[2] - 1) < 1e-10
    x, y = SpatialCoordinate(square.mesh())
    seen = [assemble(field(square, mode) * (x + y**3 + sin(3 * x) * y) * dx) for mode in basis.modes]
    np.testing.assert_allclose(seen, ON_ONE_RANK, atol=1e-6)


ON_ONE_RANK = [1.05602142, 0.52858875, -0.04698002, 0.01344767, 0.16880271, 0.22099994, 0.02831757, 0.04006689,
               0.02732775]
