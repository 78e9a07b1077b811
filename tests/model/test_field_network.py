"""The network with layers on the mesh: its integrals, its structure, its file, and bases that it does not fit."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from firedrake import COMM_SELF, Function, FunctionSpace, RectangleMesh, SpatialCoordinate, VectorFunctionSpace, exp
from mpi4py import MPI
from scipy.sparse import csr_matrix

from fem_diffusion import (
    DataSet, GaussianPrior, InverseProblem, Observation, Sampler, TrainingOptions, fit, karhunen_loeve, load_model, pod,
)
from fem_diffusion.diffusion import FieldGeometry, FieldNetwork, Layout, linear_base
from fem_diffusion.fields.modes import mass_action
from fem_diffusion.errors import InputError, FileError
from fem_diffusion.fields.geometry import field_geometry
from fem_diffusion.diffusion.training.scales import Scales

R, K = 10, 3


def _basis(comm=MPI.COMM_WORLD, degree=1):
    V = FunctionSpace(RectangleMesh(14, 14, 1.7, 1.0, comm=comm), "CG", degree)
    return karhunen_loeve(GaussianPrior(V, 0.7, 0.6, mean=0.3), R)


def _problem(basis):
    V = basis.V
    rows = csr_matrix(np.eye(V.dim())[::70])
    observation = Observation(V, rows, tuple(map(str, range(rows.shape[0]))), np.full((rows.shape[0], 2), np.nan))
    return InverseProblem(basis.prior, lambda m: Function(V).interpolate(exp(m)), observation)


def _arrays(geometry):
    return FieldGeometry(*(getattr(geometry, f.name).numpy() for f in fields(geometry)))


@pytest.fixture(scope="module")
def basis():
    return _basis()


@pytest.fixture(scope="module")
def network(basis):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FieldNetwork(R, K, width=16, depth=1, channels=3).on(field_geometry(basis))


@pytest.mark.parametrize("degree", [1, 2])
def test_projection_is_that_of_the_mass_matrix(degree):
    basis = _basis(degree=degree)
    z = np.random.default_rng(1).standard_normal((50, R))
    geometry = _arrays(field_geometry(basis))
    assert geometry.modes.shape == (R, 3 * R)
    np.testing.assert_allclose(geometry.modes @ geometry.projector, np.eye(R), atol=1e-10)
    # Of squares of fields, which are no combinations of modes, up to the error of the quadrature.
    values, total = basis.decode(z), basis.variances.sum()
    exact = mass_action(basis.V)(values**2) @ basis.modes.T * np.sqrt(1.7) / total
    at_points = geometry.mean + z * geometry.std @ geometry.modes
    error = at_points**2 @ geometry.projector - exact
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(exact)
    every = _arrays(field_geometry(basis, points=10**6))
    assert every.modes.shape[1] == basis.V.dim()
    error = (every.mean + z * every.std @ every.modes)**2 @ every.projector - exact
    assert np.linalg.norm(error) < 0.005 * np.linalg.norm(exact)


def test_gradients_of_a_linear_field():
    V = FunctionSpace(RectangleMesh(6, 6, 1.7, 1.0), "CG", 1)
    x, y = SpatialCoordinate(V.mesh())
    geometry = field_geometry(pod(V, [Function(V).interpolate(s * (x - 2 * y) + 3 * y) for s in (-1, 1)], 1))
    slopes = geometry.gradients[:, 0] / geometry.gradients[0, 0, 0]
    np.testing.assert_allclose(slopes, np.outer([1, -2], np.ones(3)), atol=1e-8)
    np.testing.assert_allclose(geometry.mean_gradient[0] / geometry.mean_gradient[1].abs().max(), 0, atol=1e-8)
    # Units: the mode is a multiple of x - 2 y, and the distance between modes the root of the area.
    values, at = geometry.modes[0], np.sqrt(1.7) / geometry.gradients[0, 0, 0]
    assert float((values.max() - values.min()) * at) <= 1.7 + 2 + 1e-8


def test_what_the_network_sees_of_a_measurement_knows_no_units(basis, network):
    generator = torch.Generator().manual_seed(0)
    operator, y = (torch.randn(K, n, generator=generator, dtype=torch.float64) for n in (R, 5))
    seen = []
    for unit in (torch.ones(K).double(), torch.tensor([1e-12, 1.0, 1e12]).double()):
        base = linear_base(operator * unit[:, None], 0.1 * torch.diag(unit**2))
        layout = Layout.readings(K, base.mean)
        seen.append(network.see(base, layout, y.T * unit, base.locate(layout, y.T * unit)))
    assert [len(part) for part in seen[0]] == [5, 5, 1]
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parallel([1, 2])
def test_geometry_does_not_depend_on_the_ranks():
    ours, alone = field_geometry(_basis()), field_geometry(_basis(COMM_SELF))
    for name in ("modes", "projector", "gradients", "mean", "mean_gradient", "std"):
        np.testing.assert_allclose(getattr(ours, name), getattr(alone, name), atol=1e-6)


def test_zero_before_training_and_every_weight_learns(network):
    g = torch.Generator().manual_seed(2)
    v, angle = torch.randn(4, 5, R, generator=g), torch.full((1, 1, 1), 0.7)
    seen = torch.randn(5, K, generator=g), torch.randn(5, R, generator=g), torch.randn(5, R, R, generator=g)
    assert not network(v, angle, *seen).any()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=g)
    network(v, angle, *seen).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters())
    whole = network(v, angle, *seen)
    torch.testing.assert_close(network(v[:, 1:3], angle, *(x[1:3] for x in seen)), whole[:, 1:3])
    # What all measurements share need not be repeated.
    one = seen[2][:1]
    torch.testing.assert_close(network(v, angle, *seen[:2], one), network(v, angle, *seen[:2], one.expand(5, R, R)))


def test_file_keeps_the_law_and_no_mesh(basis, tmp_path, monkeypatch):
    # Logarithms would leave the network nothing to do.
    monkeypatch.setattr("fem_diffusion.diffusion.training.fit.choose_scales", lambda *_: Scales())
    samples = basis.prior.sample_many(600, seed=1)
    # Readings that hold noise of an unknown law: the network has all to do.
    readings = np.exp(samples[:, ::70])
    data = DataSet(samples, readings + 0.1 * np.random.default_rng(0).standard_normal(readings.shape))
    problem = _problem(basis)
    options = TrainingOptions(steps=150, evaluate_every=75, width=16, depth=1)
    settings = {"basis": basis, "options": options, "checkpoint": tmp_path / "training.pt", "progress": False}
    model = fit(problem, data, network="field", **settings)
    with pytest.raises(FileError, match="other data"):
        fit(problem, data, **settings)
    assert isinstance(model.denoiser.network, FieldNetwork)
    model.save(tmp_path / "model.safetensors")
    again = load_model(tmp_path / "model.safetensors", problem)
    first, second = (m.condition(data.readings[0]).sample(20, seed=1, sampler=Sampler(steps=4)).values
                     for m in (model, again))
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert "modes" not in model.denoiser.network.state_dict()


def test_what_does_not_fit_is_told(basis, network):
    data = DataSet(np.zeros((5, basis.V.dim())), np.zeros((5, K)))
    with pytest.raises(InputError, match="'latents', 'field'"):
        fit(_problem(basis), data, basis=basis, network="fourier")
    V = VectorFunctionSpace(basis.V.mesh(), "CG", 1)
    with pytest.raises(InputError, match="fully connected"):
        field_geometry(pod(V, np.random.default_rng(0).standard_normal((10, V.dim())), 4))
    with pytest.raises(InputError, match="more points"):
        field_geometry(basis, points=5)
    with pytest.raises(InputError, match="10 latents"):
        network.on(field_geometry(karhunen_loeve(basis.prior, 4)))
    with pytest.raises(InputError, match="positive"):
        FieldNetwork(R, K, channels=0)
