"""Derivatives of transforms against finite differences, in spaces of every kind; priors of users' own."""

import re

import numpy as np
import pytest
from firedrake import (
    Function, FunctionSpace, MixedFunctionSpace, SpatialCoordinate, Submesh, UnitSquareMesh, VectorFunctionSpace,
    as_vector, cos, dot, exp, grad, split, sqrt,
)

from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import owned_size
from fem_diffusion.observation.family import SensorFamily, SensorKind
from fem_diffusion.observation.linear import point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve, pod
from fem_diffusion.prior.product import ProductPrior, is_gaussian
from fem_diffusion.prior.protocol import GaussianCore, Prior
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior, level_set

MESH = UnitSquareMesh(4, 3)
V, CELLS, NUMBER = (FunctionSpace(MESH, *element) for element in (("CG", 1), ("DG", 0), ("R", 0)))
VECTOR, NUMBERS = VectorFunctionSpace(MESH, "CG", 1), VectorFunctionSpace(MESH, "R", 0, dim=2)
FIELD, FLOW = GaussianPrior(V, 0.5, 0.4), GaussianPrior(VECTOR, 0.4, 0.5)
WALL = GaussianPrior(FunctionSpace(Submesh(MESH, 1, 1), "CG", 2), 0.3, 0.4)
SCALE = GaussianPrior(NUMBER, 0.3, mean=1.0)
LOG = TransformedPrior(FIELD, exp)
PAIR = ProductPrior([FIELD, FLOW])
X = SpatialCoordinate(MESH)

TRANSFORMED = {
    "pointwise": LOG, "to cells": TransformedPrior(FIELD, lambda f: f + f**2, V=CELLS),
    "gradient": TransformedPrior(FIELD, lambda f: sqrt(dot(grad(f), grad(f)) + 1), V=CELLS),
    "vector": TransformedPrior(FLOW, lambda f: as_vector([exp(f[0]), f[1] * cos(f[0])])),
    "vector to scalar": TransformedPrior(FLOW, lambda f: dot(f, f), V=FunctionSpace(MESH, "DG", 1)),
    "mixed": TransformedPrior(PAIR, lambda f: exp(split(f)[0]) * split(f)[1][1], V=CELLS),
    "twice": TransformedPrior(LOG, lambda f: f**2 + X[0] * f, V=CELLS),
    "product": ProductPrior([LOG, FLOW, TransformedPrior(WALL, exp)]),
    "of a product of transformed ones": TransformedPrior(ProductPrior([LOG, FLOW]),
                                                         lambda f: split(f)[0] * split(f)[1][0], V=V),
    "number": TransformedPrior(SCALE, exp), "number to field": TransformedPrior(SCALE, lambda c: exp(c) * X[0], V=V),
    "numbers": TransformedPrior(GaussianPrior(NUMBERS, 0.3), lambda c: c[0] * X[0] + exp(c[1]), V=V),
    "field and number": TransformedPrior(ProductPrior([FIELD, SCALE]), lambda f: split(f)[1] * exp(split(f)[0]), V=V),
    "other mesh": TransformedPrior(FIELD, lambda f: f**2, V=FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)),
    "levels": TransformedPrior(FIELD, level_set([1.0, 2.0], [0.0])),
    "constant": TransformedPrior(FIELD, lambda f: 3 + 0 * f + X[0]),
}


@pytest.mark.parallel([1, 2])
def test_derivatives_are_those_of_finite_differences():
    for name in TRANSFORMED:
        _compare(name)


def _compare(name):
    prior, comm = TRANSFORMED[name], MESH.comm
    at, directions = prior.core.sample_many(1, 3)[0], prior.core.sample_many(3, 4)
    rows = np.random.default_rng([5, comm.rank]).standard_normal((2, owned_size(prior.V)))
    step = 1e-5
    ahead, behind = (prior.transform_many(at + sign * step * directions) for sign in (1, -1))
    differences = comm.allreduce((ahead - behind) / (2 * step) @ rows.T)
    pulled = prior.pull_back(rows, at)
    assert pulled.shape == (2, owned_size(prior.core.V))
    found = comm.allreduce(directions @ pulled.T)
    size = max(1, np.abs(differences).max())
    np.testing.assert_allclose(found, differences, rtol=1e-6, atol=1e-7 * size, err_msg=name)
    # Where the transform is pointwise, its slopes are the diagonal.
    if name in ("pointwise", "number", "levels", "constant"):
        values = prior.core.sample_many(4, 7)
        slopes = prior.slope_many(values)
        for slope, value in zip(slopes, values):
            np.testing.assert_allclose(prior.pull_back(rows, value), rows * slope, atol=1e-12)
    elif name != "product":
        with pytest.raises(InputError, match="not pointwise.*use pull_back"):
            prior.slope_many(at[None])


def test_slopes_follow_from_one_transform_to_the_next():
    squared = TransformedPrior(LOG, lambda f: f**2)
    values = FIELD.sample_many(3, 1)
    np.testing.assert_allclose(squared.slope_many(values), 2 * np.exp(2 * values), rtol=1e-12)
    for transform in (lambda f: f + f.dx(0), lambda f: f + dot(grad(f), grad(f))):
        with pytest.raises(InputError, match="not pointwise"):
            TransformedPrior(FIELD, transform).slope_many(values)
    joint = ProductPrior([squared, SCALE])
    np.testing.assert_allclose(joint.slope_many(joint.core.sample_many(3, 1))[:, -1], 1.0)


def test_without_a_transform_parameters_are_the_fields():
    given = CallablePrior(V, FIELD.sample)
    for prior in (FIELD, given, PAIR, SCALE, ProductPrior([given, FLOW])):
        values = prior.sample_many(2, 1)
        assert prior.core is prior and isinstance(prior, Prior)
        np.testing.assert_array_equal(prior.transform_many(values), values)
        np.testing.assert_array_equal(prior.pull_back(values, values[0]), values)
        np.testing.assert_array_equal(prior.slope_many(values), 1.0)
        with pytest.raises(InputError, match="shape"):
            prior.transform_many(values[:, :-1])


def test_the_core_is_before_all_transforms():
    assert TRANSFORMED["twice"].core is FIELD and LOG.core is FIELD
    assert TRANSFORMED["product"].core.priors == (FIELD, FLOW, WALL)
    assert TRANSFORMED["product"].core.core is TRANSFORMED["product"].core
    assert TRANSFORMED["mixed"].core is PAIR
    assert is_gaussian(FIELD) and is_gaussian(PAIR) and isinstance(FIELD, GaussianCore)
    assert not is_gaussian(LOG) and not is_gaussian(TRANSFORMED["product"])


class Own(Prior):
    """What a user writes."""

    def __init__(self, V):
        self.V = V

    def sample_many(self, n, seed):
        return np.random.default_rng(seed).random((n, self.V.dim()))


def test_a_prior_of_the_users_own_needs_a_space_and_draws():
    prior = Own(V)
    assert prior.sample(3).function_space() == V and not is_gaussian(prior)
    positive = TransformedPrior(prior, exp)
    np.testing.assert_allclose(positive.sample_many(2, 1), np.exp(prior.sample_many(2, 1)))
    assert ProductPrior([prior, positive]).core.priors == (prior, prior)
    basis = pod(V, prior.sample_many(9, 0), 3, prior=positive)
    np.testing.assert_allclose(basis.parameters(np.ones((1, 3))), np.exp(basis.decode(np.ones((1, 3)))))
    assert not basis.standard_prior
    with pytest.raises(InputError, match="use pod"):
        karhunen_loeve(positive)
    with pytest.raises(InputError, match="refilled"):
        basis.parameters(np.ones((1, 3)), 1)


def test_modes_of_twice_transformed_fields_are_those_of_the_core():
    basis, plain = karhunen_loeve(TRANSFORMED["twice"], 4), karhunen_loeve(FIELD, 4)
    np.testing.assert_allclose(basis.modes, plain.modes)
    assert basis.functions(np.zeros((1, 4)))[0].function_space() == CELLS and basis.standard_prior
    joint = karhunen_loeve(TRANSFORMED["of a product of transformed ones"], (2, 2))
    assert joint.r == 4 and joint.V == MixedFunctionSpace([V, VECTOR])
    assert joint.functions(np.zeros((1, 4)))[0].function_space() == V


def test_a_leading_part_of_a_basis():
    basis = karhunen_loeve(LOG, 6)
    part = basis.leading(4)
    assert part.r == 4 and part.total_variance == basis.total_variance and part.prior is LOG and part.standard_prior
    values = FIELD.sample_many(3, 2)
    np.testing.assert_allclose(part.encode(values), basis.encode(values)[:, :4])
    np.testing.assert_allclose(part.retained, basis.variances[:4].sum() / basis.total_variance)
    for r, words in ((7, "at most as many"), (0, "r is 0")):
        with pytest.raises(InputError, match=words):
            basis.leading(r)


def test_what_has_no_derivative_is_told():
    wrong = TransformedPrior(ProductPrior([FIELD, FIELD]), lambda f: f.subfunctions[0] * f.subfunctions[1], V=V)
    with pytest.raises(InputError, match=r"as split\(field\)"):
        wrong.pull_back(np.ones((1, V.dim())), np.zeros(2 * V.dim()))
    cells = CallablePrior(CELLS, lambda seed: Function(CELLS).assign(seed))
    for prior in (TransformedPrior(FIELD, lambda f: f.dx(0)), TransformedPrior(cells, lambda f: f**2, V=V)):
        with pytest.raises(InputError, match="several values at the nodes.*a V of DG elements"):
            prior.pull_back(np.ones((1, V.dim())), np.zeros(prior.core.V.dim()))
    for rows, at in ((np.ones((1, 3)), np.zeros(V.dim())), (np.ones((1, V.dim())), np.zeros(3)),
                     (np.full((1, V.dim()), np.nan), np.zeros(V.dim()))):
        for prior in (LOG, PAIR):
            with pytest.raises(InputError):
                prior.pull_back(rows, at)


def test_representations_are_a_line():
    sensors = point_sensors(V, [(0.2, 0.2), (0.5, 0.5)])
    for thing, words in [
        (FIELD, "GaussianPrior(20 unknowns, .*std=0.5, correlation_length=0.4, ν=1, bcs=0"), (SCALE, "std=0.3, bcs"),
        (LOG, "TransformedPrior(exp of GaussianPrior(20"), (PAIR, r"ProductPrior\(\[GaussianPrior\(20"),
        (karhunen_loeve(LOG, 6), "ModalBasis: 6 Karhunen-Loeve modes with [0-9.]+% of the variance, 20 unknowns"),
        (pod(V, FIELD.sample_many(9, 0), 3), "3 POD modes"),
        (sensors, r"2 rows \(\(0.2, 0.2\), \(0.5, 0.5\)\) of states"),
        (SensorFamily(SensorKind(sensors, (0.1, 0.2), (1, 2))), "SensorKind: 1 to 2 of 2 sensors, std 0.1 to 0.2"),
    ]:
        pattern = words if "\\(" in words else words.replace("(", r"\(")
        assert re.search(pattern, repr(thing)) and "\n" not in repr(thing), repr(thing)
