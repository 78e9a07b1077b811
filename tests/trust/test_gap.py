"""The gap between amortised samples and the posterior of one measurement, as it is known for Gaussians."""

import numpy as np
import pytest
from firedrake import Function, FunctionSpace, SpatialCoordinate, UnitIntervalMesh, UnitSquareMesh, conditional

from fem_diffusion import Samples, amortised_gap, tell_gaps
from fem_diffusion.errors import InputError
from fem_diffusion.fields.coefficients import owned_size

N = 4000


def _normal(V, mean, std, seed=0):
    """Independent normal coefficients, the same at all nodes of V for a constant field."""
    white = np.random.default_rng(seed).standard_normal((N, 1))
    return Samples(V, mean + std * white * np.ones(owned_size(V)), np.empty((N, 0)))


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("family", ["CG", "R"])
def test_gap_of_normal_samples_is_that_of_their_law(family):
    V = FunctionSpace(UnitSquareMesh(4, 4), family, 1 if family == "CG" else 0)
    mean, std = Function(V).assign(2.0), Function(V).assign(0.5)
    gap = amortised_gap(_normal(V, 2.4, 0.6), mean, std)
    # Errors of sample moments: 0.6 / 0.5 / sqrt(N) of the mean, 1 / sqrt(2 N) of the standard deviation, four of them.
    assert gap.mean == pytest.approx(0.8, abs=4 * 1.2 / N**0.5) and gap.std == pytest.approx(1.2, rel=4 / (2 * N)**0.5)
    right = amortised_gap(_normal(V, 2.0, 0.5), mean, std)
    assert right.mean < 4 * right.chance and abs(right.std - 1) < 4 / (2 * N)**0.5


def test_fine_cells_count_no_more_than_others():
    mesh = UnitIntervalMesh(8)
    mesh.coordinates.dat.data[:] **= 3
    V = FunctionSpace(mesh, "DG", 0)
    left = Function(V).interpolate(conditional(SpatialCoordinate(mesh)[0] < 0.4, 1.0, 0.0))
    gap = amortised_gap(_normal(V, 0.0, 1.0), left, Function(V).assign(1.0))
    # Three quarters of the cells lie there, on 0.42 of the line; chance adds its square.
    assert left.dat.data_ro.sum() == 6
    assert gap.mean == pytest.approx(np.sqrt(0.75**3), abs=5 / N**0.5)


def test_words_hold_the_numbers():
    V = FunctionSpace(UnitIntervalMesh(2), "CG", 1)
    gap = amortised_gap(_normal(V, 3.0, 1.0), Function(V).assign(2.0), Function(V).assign(0.5))
    assert "mean off by 2 posterior standard deviations (0.016 is" in str(gap) and "deviation 2.0" in str(gap)
    both = tell_gaps([gap, amortised_gap(_normal(V, 2.0, 0.5), Function(V).assign(2.0), Function(V).assign(0.5))])
    assert "these 2 measurements: means off by 1.4" in both and "by 2 at most; standard deviations 1.0" in both


def test_what_cannot_be_compared_is_refused():
    mesh = UnitIntervalMesh(2)
    V, W = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0)
    samples, std = _normal(V, 0.0, 1.0), Function(V).assign(1.0)
    with pytest.raises(InputError, match="give both in one space"):
        amortised_gap(samples, Function(W), std)
    with pytest.raises(InputError, match="give both in one space"):
        amortised_gap(samples, Function(FunctionSpace(UnitIntervalMesh(2), "CG", 1)), std)
    with pytest.raises(InputError, match="std is zero|standard deviation of the posterior is zero"):
        amortised_gap(samples, std, Function(V))
    with pytest.raises(InputError, match="samples is of type"):
        amortised_gap(samples.values, std, std)
    pair = V * W
    with pytest.raises(InputError, match="component"):
        amortised_gap(Samples(pair, np.zeros((3, owned_size(pair))), np.empty((3, 0))), std, std)
