"""Fields to latents and back: exact on the span, exact on the boundary, the same on any number of ranks and mesh."""

from dataclasses import replace

import numpy as np
import pytest
from firedrake import (
    DirichletBC, Function, FunctionSpace, MixedFunctionSpace, RectangleMesh, SpatialCoordinate, Submesh, TestFunction,
    TrialFunction, VectorFunctionSpace, assemble, cos, dx, exp, inner, sin,
)
from mpi4py import MPI

from fem_diffusion import files
from fem_diffusion.fields import basis as basis_module
from fem_diffusion.fields.basis import load_basis, pack_basis
from fem_diffusion.prior.expansion import karhunen_loeve, pod
from fem_diffusion.errors import InputError, FileError
from fem_diffusion.fields.coefficients import coefficients, field
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import TransformedPrior
from fem_diffusion.prior.product import ProductPrior
from fem_diffusion.trust.start import extended

COMM = MPI.COMM_WORLD
ONE_RANK = [2.896157, 1.525495, 1.965467, 3.166785, 0.039326, 0.542295, -2.735722, 1.954885]


def _mesh(n=12):
    # Sides of different lengths: no covariance eigenvalue is double, so modes are unique.
    return RectangleMesh(n, n, 1.7, 1.0)


def _prior(V, conditions=True):
    x = SpatialCoordinate(V.mesh())
    bcs = [DirichletBC(V, 1 + x[1], 1)] if conditions else []
    return GaussianPrior(V, 0.7, 0.5, mean=0.3, bcs=bcs)


def _gram(basis):
    V = basis.V
    mass = assemble(inner(TrialFunction(V), TestFunction(V)) * dx, mat_type="aij").petscmat
    rows = []
    for mode in basis.modes:
        with field(V, mode).dat.vec_ro as vector:
            rows.append((mass * vector).array.copy())
    return COMM.allreduce(basis.modes @ np.array(rows).T)


def _boundary_error(basis, fields):
    worst = 0.0
    for values in fields:
        f = field(basis.V, values)
        for bc in basis.prior.bcs:
            g = f.copy(deepcopy=True)
            bc.apply(g)
            worst = max(worst, np.abs(coefficients(g) - values).max(initial=0.0))
    return COMM.allreduce(worst, MPI.MAX)


@pytest.mark.parallel([1, 2, 3])
def test_karhunen_loeve_round_trip_boundary_and_parseval(monkeypatch):
    basis = karhunen_loeve(_prior(FunctionSpace(_mesh(), "CG", 1)), 12)
    z = np.random.default_rng(0).standard_normal((5, 12))
    fields = basis.decode(z)
    np.testing.assert_allclose(basis.encode(fields), z, rtol=0, atol=1e-10)
    np.testing.assert_allclose(basis.encode([field(basis.V, f) for f in fields]), z, rtol=0, atol=1e-10)
    with monkeypatch.context() as patch:
        patch.setattr(basis_module, "_BYTES", 1)   # one field at a time
        np.testing.assert_allclose(basis.encode(fields), z, rtol=0, atol=1e-10)
        np.testing.assert_allclose(basis.encode(fields[0]), z[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(_gram(basis), np.eye(12), atol=1e-10)
    assert _boundary_error(basis, fields) < 1e-12
    assert _boundary_error(basis, basis.decode(z, refill_seed=1)) < 1e-12
    for values, latents in zip(fields, z):
        fluctuation = field(basis.V, values - coefficients(basis.mean))
        norm = assemble(inner(fluctuation, fluctuation) * dx)
        assert abs(norm - (basis.variances * latents**2).sum()) < 1e-10 * norm


@pytest.mark.parallel([1, 2, 3])
def test_latents_do_not_depend_on_the_ranks():
    basis = karhunen_loeve(_prior(FunctionSpace(_mesh(), "CG", 2)), 8)
    x, y = SpatialCoordinate(basis.V.mesh())
    z = basis.encode(Function(basis.V).interpolate(sin(3 * x) * cos(2 * y) + x * exp(y)))
    # Point values and norms do not depend on the partition, nor do latents; these were computed on one rank.
    np.testing.assert_allclose(z, ONE_RANK, rtol=0, atol=2e-6)


def test_two_meshes_agree_to_discretisation_error():
    errors, finest = [], None
    for n in (96, 24, 48):
        basis = karhunen_loeve(_prior(FunctionSpace(_mesh(n), "CG", 1)), 6)
        x, y = SpatialCoordinate(basis.V.mesh())
        z = basis.encode(Function(basis.V).interpolate(sin(3 * x) * cos(2 * y) + x * exp(y)))
        finest = z if finest is None else finest
        errors.append(np.abs(z - finest).max() / np.abs(finest).max())
    assert errors[2] < 0.03 and errors[2] < 0.4 * errors[1]


@pytest.mark.parallel([1, 2])
def test_proper_orthogonal_decomposition_recovers_the_samples():
    V = FunctionSpace(_mesh(), "CG", 1)
    prior = _prior(V)
    samples = prior.sample_many(30, seed=2)
    basis = pod(V, samples, 29, prior.bcs)
    assert abs(basis.retained - 1) < 1e-10
    assert COMM.allreduce(np.abs(basis.decode(basis.encode(samples)) - samples).max(), MPI.MAX) < 1e-9
    z = basis.encode(samples)
    np.testing.assert_allclose(np.cov(z.T), np.eye(29), atol=1e-8)
    np.testing.assert_allclose(_gram(basis), np.eye(29), atol=1e-9)


@pytest.mark.parametrize("make", [
    lambda mesh: VectorFunctionSpace(mesh, "CG", 1),
    lambda mesh: MixedFunctionSpace([VectorFunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)]),
    lambda mesh: FunctionSpace(mesh, "DG", 1), lambda mesh: FunctionSpace(mesh, "RT", 1),
], ids=["vector", "mixed", "DG", "RT"])
def test_decomposition_in_other_spaces(make):
    V = make(_mesh(4))
    samples = np.random.default_rng(0).standard_normal((10, V.dim()))
    basis = pod(V, samples, 9)
    np.testing.assert_allclose(basis.decode(basis.encode(samples)), samples, atol=1e-9)
    np.testing.assert_allclose(_gram(basis), np.eye(9), atol=1e-9)


def test_prior_draws_have_standard_normal_latents_and_refill_the_rest():
    prior = _prior(FunctionSpace(_mesh(8), "CG", 1), conditions=False)
    basis = karhunen_loeve(prior, 10)
    n = 4000
    z = basis.encode(prior.sample_many(n, seed=5))
    # Largest of 55 entries of a sample covariance: five standard errors sqrt(2/n).
    assert np.abs(np.cov(z.T) - np.eye(10)).max() < 5 * np.sqrt(2 / n)
    z = np.random.default_rng(0).standard_normal((n, 10))
    cut, full = basis.decode(z).var(axis=0), basis.decode(z, refill_seed=9).var(axis=0)
    assert cut.max() < 0.49 and basis.retained < 0.99
    np.testing.assert_allclose(full, 0.49, rtol=5.5 * np.sqrt(2 / n))
    np.testing.assert_allclose(basis.encode(basis.decode(z, refill_seed=9)), z, atol=1e-7)


def test_retained_variance_chooses_the_number_of_modes():
    prior = _prior(FunctionSpace(_mesh(8), "CG", 1), conditions=False)
    basis = karhunen_loeve(prior, retained=0.95)
    mass = assemble(inner(TrialFunction(basis.V), TestFunction(basis.V)) * dx).petscmat
    total = np.trace(mass[:, :] @ prior.covariance_matrix())
    # The tail is estimated from 64 draws: 2 % of the total where it is a tenth of it.
    assert abs(basis.total_variance / total - 1) < 0.02
    assert basis.retained >= 0.95 > (basis.variances[:-1].sum() / basis.total_variance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floating_types(dtype):
    basis = karhunen_loeve(_prior(FunctionSpace(_mesh(6), "CG", 1)), 5)
    z = np.ones((2, 5), dtype=dtype)
    found = basis.encode(basis.decode(z))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, z, rtol=0, atol=1e-5)


def test_transform_on_a_boundary_part():
    wall = Submesh(_mesh(10), 1, 3)
    prior = TransformedPrior(GaussianPrior(FunctionSpace(wall, "CG", 1), 0.5, 0.4), exp)
    basis = karhunen_loeve(prior, 6)
    z = np.random.default_rng(0).standard_normal((3, 6))
    np.testing.assert_allclose(basis.parameters(z), np.exp(basis.decode(z)), rtol=1e-12)
    assert all(f.function_space() == prior.V for f in basis.functions(z))


@pytest.mark.parallel([1, 2])
def test_a_basis_reads_back(tmp_path_factory):
    folder = COMM.bcast(str(tmp_path_factory.mktemp("basis")))
    basis = karhunen_loeve(_prior(FunctionSpace(_mesh(6), "CG", 1)), 5)
    basis.save(f"{folder}/basis")
    # Another mesh object, whose numbering on two ranks may differ.
    again = load_basis(f"{folder}/basis", FunctionSpace(_mesh(6), "CG", 1))
    np.testing.assert_allclose(again.variances, basis.variances)
    z = np.ones((1, 5))
    norms = [assemble(inner(f, f) * dx) for f in (basis.functions(z)[0], again.functions(z)[0])]
    assert abs(norms[0] - norms[1]) < 1e-12 * norms[0]
    np.testing.assert_allclose(_gram(again), np.eye(5), atol=1e-10)


@pytest.mark.parallel([1, 2])
def test_turned_latents_are_as_standard_and_read_back(tmp_path_factory):
    folder = COMM.bcast(str(tmp_path_factory.mktemp("basis")))
    prior = _prior(FunctionSpace(_mesh(6), "CG", 1))
    plain, rng = karhunen_loeve(prior, 8), np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((8, 3)))[0]
    basis = replace(plain, turn=turn)
    fields, z = prior.sample_many(3000, 1), rng.standard_normal((4, 3))
    np.testing.assert_allclose(basis.encode(fields), plain.encode(fields) @ turn, atol=1e-10)
    np.testing.assert_allclose(basis.encode(basis.decode(z)), z, atol=1e-10)
    basis.check_draws(basis.encode(fields))
    assert basis.r == 3 and basis.leading(2).r == 2 and 0 < basis.retained < plain.retained
    np.testing.assert_array_equal(basis.leading(2).scaled_modes, basis.scaled_modes[:2])
    assert _boundary_error(basis, basis.decode(z)) < 1e-12
    # Given their latents, fields have the rest of the prior: together they are draws of it.
    whole = plain.encode(basis.decode(rng.standard_normal((3000, 3)), 5))
    np.testing.assert_allclose(np.cov(whole.T), np.eye(8), atol=5 * np.sqrt(2 / 3000))
    basis.save(f"{folder}/basis")
    again = load_basis(f"{folder}/basis", prior.V, prior)
    np.testing.assert_allclose(again.encode(fields[:3]), basis.encode(fields[:3]), atol=1e-10)
    more = extended(basis)
    np.testing.assert_allclose(more.scaled_modes[:3], basis.scaled_modes, atol=1e-10)
    np.testing.assert_allclose(np.cov(more.encode(fields).T), np.eye(more.r), atol=6 * np.sqrt(2 / 3000))
    assert more.r > 8


def test_a_rotation_that_is_none_is_refused(tmp_path):
    prior = _prior(FunctionSpace(_mesh(4), "CG", 1))
    plain = karhunen_loeve(prior, 3)
    for wrong in (np.eye(3)[:2], 2 * np.eye(3), np.zeros((3, 0)), np.full((3, 1), np.nan)):
        arrays, values = pack_basis(plain, "basis")
        files.write(tmp_path / "basis", "basis", arrays | {"basis.turn": wrong}, values)
        with pytest.raises(FileError):
            load_basis(tmp_path / "basis", prior.V, prior)


def test_a_basis_of_another_mesh_space_or_kind_is_refused(tmp_path):
    V = FunctionSpace(_mesh(4), "CG", 1)
    basis = karhunen_loeve(_prior(V), 3)
    basis.save(tmp_path / "basis")
    for other in (FunctionSpace(_mesh(5), "CG", 1), FunctionSpace(V.mesh(), "CG", 2), FunctionSpace(V.mesh(), "DG", 1)):
        with pytest.raises(FileError, match="another mesh or space"):
            load_basis(tmp_path / "basis", other)
    (tmp_path / "foreign").write_bytes(b"nothing")
    with pytest.raises(FileError, match="no file that fem_diffusion reads"):
        load_basis(tmp_path / "foreign", V)
    with pytest.raises(FileError, match="No such file"):
        load_basis(tmp_path / "missing", V)


def test_a_basis_on_a_mesh_and_its_submesh_reads_back(tmp_path):
    mesh = _mesh(5)
    prior = ProductPrior([GaussianPrior(FunctionSpace(mesh, "CG", 1), 1.0, 0.5),
                          GaussianPrior(FunctionSpace(Submesh(mesh, 1, 1), "CG", 1), 1e-3, 0.5)])
    basis = karhunen_loeve(prior, (4, 3))
    basis.save(tmp_path / "basis")
    again = load_basis(tmp_path / "basis", prior.V)
    np.testing.assert_array_equal(again.modes, basis.modes)
    np.testing.assert_array_equal(coefficients(again.mean), coefficients(basis.mean))
    assert again.weights == basis.weights and again.total_variance == basis.total_variance


def test_a_basis_of_a_transformed_prior_needs_it_again(tmp_path):
    V = FunctionSpace(_mesh(5), "CG", 1)
    gaussian = GaussianPrior(V, 0.5, 0.5)
    prior = TransformedPrior(gaussian, exp)
    basis = karhunen_loeve(prior, 4)
    basis.save(tmp_path / "basis")
    with pytest.raises(InputError, match="pass the TransformedPrior"):
        load_basis(tmp_path / "basis", V)
    again, z = load_basis(tmp_path / "basis", V, prior), np.ones((1, 4))
    np.testing.assert_allclose(again.parameters(z, 3), basis.parameters(z, 3), rtol=1e-12)
    assert again.standard_prior and again.prior is prior
    for std, length, mean in ((0.5, 0.5, 1.0), (0.6, 0.5, 0.0), (0.5, 0.6, 0.0)):
        with pytest.raises(FileError, match="belongs to another prior"):
            load_basis(tmp_path / "basis", V, TransformedPrior(GaussianPrior(V, std, length, mean=mean), exp))
    # A product knows the shares of its components.
    both = ProductPrior([gaussian, GaussianPrior(V, 1e3, 0.4, mean=5.0)])
    karhunen_loeve(both, (3, 3)).save(tmp_path / "both")
    assert load_basis(tmp_path / "both", both.V, both).standard_prior
    with pytest.raises(FileError, match="belongs to another prior"):
        load_basis(tmp_path / "both", both.V, ProductPrior([gaussian, GaussianPrior(V, 2e3, 0.4, mean=5.0)]))
    with pytest.raises(InputError, match="not in V"):
        load_basis(tmp_path / "basis", V, GaussianPrior(FunctionSpace(V.mesh(), "CG", 2), 0.5, 0.5))
    # A POD basis stays one.
    pod(V, gaussian.sample_many(9, 0), 3).save(tmp_path / "pod")
    assert not load_basis(tmp_path / "pod", V, gaussian).standard_prior


def test_violated_conditions_of_a_small_component_are_noticed():
    """Pascals beside mole fractions: each component is measured in its own units."""
    mesh = _mesh(4)
    V = MixedFunctionSpace([FunctionSpace(mesh, "CG", 1)] * 2)
    size = V.sub(0).dim()
    samples = np.random.default_rng(0).standard_normal((10, 2 * size)) * np.repeat([1e12, 1e-3], size)
    bc = DirichletBC(V.sub(1), 0.0, 1)
    with pytest.raises(InputError, match="violate the boundary conditions"):
        pod(V, samples, (2, 2), bcs=[bc])


def test_wrong_input_is_refused():
    V = FunctionSpace(_mesh(4), "CG", 1)
    prior = _prior(V)
    basis = karhunen_loeve(prior, 3)
    other = FunctionSpace(_mesh(4), "CG", 2)
    samples = prior.sample_many(5, seed=0)
    for make, words in [
        (lambda: basis.encode(Function(other)), "cannot be encoded"),
        (lambda: basis.encode(np.zeros((2, 7))), "do not fit"),
        (lambda: basis.decode(np.zeros((2, 4))), r"\(B, 3\)"),
        (lambda: karhunen_loeve(prior, 1000), "free degrees of freedom"),
        (lambda: karhunen_loeve(prior, retained=1.0), "above 0 and below 1"),
        (lambda: pod(V, samples, 5), "more or ask for fewer"),
        (lambda: pod(V, samples, 2, [DirichletBC(V, 7.0, 1)]), "violate"),
        (lambda: pod(V, samples * np.nan, 2), "not finite"),
        (lambda: pod(V, samples, 2, prior.bcs).decode(np.zeros((1, 2)), refill_seed=0), "refilled"),
    ]:
        with pytest.raises(InputError, match=words):
            make()
