"""Gaussian priors on unusual spaces: periodic extrusions, symmetric tensors, constants along lines, numbers."""

import numpy as np
import pytest
import torch
from firedrake import (
    COMM_SELF, COMM_WORLD, Constant, DirichletBC, ExtrudedMesh, Function, FunctionSpace, Mesh,
    PeriodicUnitIntervalMesh, PeriodicUnitSquareMesh, SpatialCoordinate, TensorFunctionSpace, UnitCubeMesh,
    UnitIntervalMesh, UnitSquareMesh, VectorFunctionSpace, as_vector, assemble, dx, exp,
)

from fem_diffusion.prior.expansion import karhunen_loeve
from fem_diffusion.fields.modes import mass_action
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import coefficients
from fem_diffusion.observation.linear import functionals, point_sensors
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior
from fem_diffusion.prior.product import ProductPrior


def test_the_seam_of_a_periodic_extrusion_is_like_any_other_place():
    """Correlations over an eighth of the height, against those on a doubly periodic mesh of the same cells."""
    def correlations(mesh):
        V = FunctionSpace(mesh, "CG", 1)
        x, z = (coefficients(Function(V).interpolate(c)) for c in SpatialCoordinate(mesh))
        line = [np.flatnonzero((np.abs(x - 0.5) < 1e-9) & (np.abs(np.sin(np.pi * (z - k / 8))) < 1e-9))[0]
                for k in range(8)]
        return GaussianPrior(V, 1.0, 0.15).covariance_matrix()[line, np.roll(line, -1)]
    seam = correlations(ExtrudedMesh(PeriodicUnitIntervalMesh(16), 16, periodic=True))
    np.testing.assert_allclose(seam, correlations(PeriodicUnitSquareMesh(16, 16, quadrilateral=True)), rtol=1e-9)


@pytest.mark.parametrize("mesh", [UnitSquareMesh(5, 4), UnitCubeMesh(2, 2, 2)], ids=["2D", "3D"])
def test_entries_of_symmetric_tensors_are_independent_copies_of_the_scalar_field(mesh):
    """In the mass inner product the entries beside the diagonal count twice; in the prior's law they must not."""
    V, scalar = TensorFunctionSpace(mesh, "CG", 1, symmetry=True), FunctionSpace(mesh, "CG", 1)
    b, std = V.block_size, Constant(np.full(V.value_shape, 2.0))
    expected = np.kron(GaussianPrior(scalar, 2.0, 0.4).covariance_matrix(), np.eye(b))
    prior = GaussianPrior(V, std, 0.4)
    np.testing.assert_allclose(prior.covariance_matrix(), expected, atol=1e-9)
    plain = np.kron(GaussianPrior(scalar, 2.0, 0.4, normalise=False).covariance_matrix(), np.eye(b))
    np.testing.assert_allclose(GaussianPrior(V, std, 0.4, normalise=False).covariance_matrix(), plain, atol=1e-9)
    variance = prior.sample_many(2000, seed=1).reshape(2000, -1, b).var(axis=(0, 1))
    np.testing.assert_allclose(variance, 4.0, rtol=0.15)
    # The basis has the law's variances in the inner product of tensors, and every draw has standard normal latents.
    basis = karhunen_loeve(prior, V.dim())
    gram = basis.modes @ mass_action(V)(basis.modes).T
    np.testing.assert_allclose(gram, np.eye(V.dim()), atol=1e-9)
    np.testing.assert_allclose(basis.scaled_modes.T @ basis.scaled_modes, expected, atol=1e-7)
    z = torch.randn(2, basis.r, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(basis.encode(basis.decode(z)), z, atol=1e-6)
    # A condition on one entry holds for it alone.
    held = GaussianPrior(V, std, 0.4, bcs=DirichletBC(V.sub(1), 3.0, 1))
    sides = DirichletBC(V, 0, 1).nodes
    values = coefficients(held.sample(0)).reshape(-1, b)[sides]
    np.testing.assert_allclose(values[:, 1], 3.0)
    assert values[:, 0].std() > 0.1


def test_a_symmetric_tensor_is_read_once_an_entry():
    mesh = UnitSquareMesh(5, 4)
    V, (x, y) = TensorFunctionSpace(mesh, "CG", 1, symmetry=True), SpatialCoordinate(mesh)
    u = Function(V).interpolate(Constant(np.array([[1.0, 2.0], [2.0, 0.0]])) * x + Constant(np.diag([0.0, 3.0])) * y)
    sensors = point_sensors(V, [[0.3, 0.4], [0.55, 0.9]])
    assert sensors.names[:3] == ("(0.3, 0.4)[0, 0]", "(0.3, 0.4)[0, 1]", "(0.3, 0.4)[1, 1]") and len(sensors) == 6
    np.testing.assert_allclose(sensors(u), [0.3, 0.6, 1.2, 0.55, 1.1, 2.7])
    np.testing.assert_allclose(functionals(V, [lambda u: u[1, 0] * dx])(u), [1.0])


def lines(comm=COMM_WORLD):
    """A space of fields that are constant along the extrusion, and that of the base mesh."""
    base = UnitSquareMesh(5, 4, comm=comm)
    mesh = ExtrudedMesh(base, 3)
    mesh.coordinates.dat.data[:, 2] *= 2 + mesh.coordinates.dat.data_ro[:, 0]   # the height varies
    return FunctionSpace(mesh, "CG", 2, vfamily="R", vdegree=0), FunctionSpace(base, "CG", 2)


@pytest.mark.parallel([1, 2])
def test_a_field_that_is_constant_along_the_extrusion_has_the_law_of_the_base_mesh():
    V, base = lines()
    x, (s, t) = SpatialCoordinate(V.mesh()), SpatialCoordinate(base.mesh())
    ours = GaussianPrior(V, 1 + x[0], 0.4, mean=x[1], bcs=DirichletBC(V, 3 * x[1], 2))
    theirs = GaussianPrior(base, 1 + s, 0.4, mean=t, bcs=DirichletBC(base, 3 * t, 2))
    on_base = GaussianPrior(V, 1 + s, 0.4, mean=t, bcs=DirichletBC(V, 3 * x[1], 2))
    for prior in (ours, on_base):
        np.testing.assert_allclose(prior.sample_many(3, seed=1), theirs.sample_many(3, seed=1), atol=1e-9)
        np.testing.assert_allclose(coefficients(prior.pointwise_std()), coefficients(theirs.pointwise_std()))
    # The copy is in its place: the sample read on the bottom of the extruded mesh is that of the base mesh.
    places = np.array([[0.33, 0.21], [0.71, 0.93]])
    values = [point_sensors(f.function_space(), p)(f) for f, p in (
        (ours.sample(1), np.column_stack([places, [0.1, 1.7]])), (theirs.sample(1), places))]
    np.testing.assert_allclose(values[0], values[1], atol=1e-9)
    basis = karhunen_loeve(ours, 5)
    latents = basis.encode(ours.sample_many(400, seed=2))
    assert np.abs(np.cov(latents.T) - np.eye(5)).max() < 5 / np.sqrt(400)
    again = TransformedPrior(ours, exp)
    np.testing.assert_allclose(again.sample_many(2, seed=1), np.exp(ours.sample_many(2, seed=1)))


@pytest.mark.parametrize("bad", [
    lambda V, x: GaussianPrior(V, 1 + x[2], 0.4),
    lambda V, x: GaussianPrior(V, 1.0, 0.4, mean=x[2]),
    lambda V, x: GaussianPrior(V, 1.0, 0.4, bcs=DirichletBC(V, x[2], 1)).sample(0),
    lambda V, x: TransformedPrior(GaussianPrior(FunctionSpace(V.mesh(), "CG", 1), 1.0, 0.4), exp, V),
    lambda V, x: TransformedPrior(GaussianPrior(V, 1.0, 0.4), lambda m: x[2] + 0 * m),
    lambda V, x: TransformedPrior(GaussianPrior(V, 1.0, 0.4), exp, FunctionSpace(V.mesh(), "R", 0)),
    lambda V, x: GaussianPrior(FunctionSpace(V.mesh(), "R", 0), 1.0, mean=x[0]),
], ids=["std", "mean", "condition", "field to lines", "expression", "lines to number", "number"])
def test_interpolation_is_no_average(bad):
    """Interpolated into constants, z over the unit height is 0.83 at one place, not the mean 0.5."""
    V = lines()[0]
    with pytest.raises(InputError, match="is no average.*CallablePrior"):
        bad(V, SpatialCoordinate(V.mesh()))


def test_an_average_by_the_users_own_sampler():
    V = lines(COMM_SELF)[0]
    R = FunctionSpace(V.mesh(), "R", 0)
    prior = GaussianPrior(V, 1.0, 0.4)
    average = CallablePrior(R, lambda seed: Function(R).assign(assemble(prior.sample(seed) * dx) / 2.5))
    expected = assemble(prior.sample(3) * dx) / assemble(Constant(1.0) * dx(V.mesh()))
    assert float(average.sample(3)) == pytest.approx(expected)


def test_errors_on_unusual_spaces_tell_the_remedy():
    V, base = lines(COMM_SELF)
    mesh = V.mesh()
    moved = Mesh(Function(mesh.coordinates))
    numbers = FunctionSpace(mesh, "R", 0)
    for action, words in [
        (lambda: GaussianPrior(V, 1.0, 0.4, bcs=DirichletBC(V, 0, "top")).sample(0), "markers of the sides"),
        (lambda: GaussianPrior(FunctionSpace(mesh, "R", 0, vfamily="CG", vdegree=1), 1.0, 0.4), "vfamily"),
        (lambda: GaussianPrior(FunctionSpace(moved, "CG", 1, vfamily="R", vdegree=0), 1.0, 0.4), "ExtrudedMesh"),
        (lambda: GaussianPrior(numbers, 1.0, 0.4), "leave out correlation_length"),
        (lambda: GaussianPrior(numbers, 1.0, bcs=DirichletBC(numbers, 0, 1)), "leave out"),
        (lambda: GaussianPrior(base, 1.0), "correlation_length is None"),
        (lambda: GaussianPrior(base, 1.0, 0.4, normalise="no"), "True or False"),
    ]:
        with pytest.raises(InputError, match=words):
            action()


@pytest.mark.parallel([1, 2])
def test_numbers_are_independent_normals_and_leave_other_components_their_modes():
    mesh = UnitSquareMesh(5, 4)
    number, three = FunctionSpace(mesh, "R", 0), VectorFunctionSpace(mesh, "R", 0, dim=3)
    one = GaussianPrior(number, 2.0, mean=5.0)
    many = GaussianPrior(three, [1.0, 2.0, 3.0], mean=[0.0, 1.0, -1.0])
    comm = mesh.comm
    for prior, mean, std in ((one, [5.0], [2.0]), (many, [0.0, 1.0, -1.0], [1.0, 2.0, 3.0])):
        draws = np.hstack(comm.allgather(prior.sample_many(4000, seed=0)))
        np.testing.assert_allclose(draws.mean(axis=0), mean, atol=4 * max(std) / np.sqrt(4000))
        np.testing.assert_allclose(np.cov(draws.T), np.diag(np.square(std)).squeeze(), atol=0.45)
        np.testing.assert_allclose(np.hstack(comm.allgather(coefficients(prior.pointwise_std()))), std)
        np.testing.assert_allclose(np.hstack(comm.allgather(coefficients(prior.mean))), mean)
        basis = karhunen_loeve(prior)
        np.testing.assert_allclose(np.sqrt(basis.variances), sorted(std, reverse=True))   # the mesh has volume 1
        assert basis.r == len(std) and basis.retained == pytest.approx(1.0)
    positive = TransformedPrior(many, lambda f: as_vector([exp(f[0]), f[1], f[2]]))
    fields, values = many.sample_many(2, seed=3), positive.sample_many(2, seed=3)
    if comm.rank == 0:
        np.testing.assert_allclose(values, np.column_stack([np.exp(fields[:, 0]), fields[:, 1:]]))
    # Beside a field, that has the modes it has alone.
    wide = GaussianPrior(FunctionSpace(mesh, "CG", 1), 1.0, 0.4)
    alone, together = karhunen_loeve(wide, 4), karhunen_loeve(ProductPrior([wide, one, many]), [4, 1, 3])
    assert together.standard_prior and together.r == 8
    field_modes = together.scaled_modes[np.argsort(-together.variances, kind="stable")][:, :alone.modes.shape[1]]
    kept = [row for row in field_modes if comm.allreduce(np.abs(row).max(initial=0.0)) > 1e-12]
    np.testing.assert_allclose(kept, alone.scaled_modes, atol=1e-9)
    latents = together.encode(together.prior.sample_many(400, seed=4))
    assert np.abs(np.cov(latents.T) - np.eye(8)).max() < 5 / np.sqrt(400)


@pytest.mark.parametrize("end", ["bottom", "top"])
def test_conditions_on_a_seam_are_refused(end):
    mesh = ExtrudedMesh(UnitIntervalMesh(4, comm=COMM_SELF), 4, periodic=True)
    V = FunctionSpace(mesh, "CG", 1)
    with pytest.raises(InputError, match="no part of the mesh's boundary"):
        GaussianPrior(V, 1.0, 0.3, bcs=DirichletBC(V, 0, end))
