"""Gaussian priors on spaces that are not plain: periodic extrusions, symmetric tensors, constants along lines, numbers."""

import numpy as np
from firedrake import (ExtrudedMesh, Function, FunctionSpace, PeriodicUnitIntervalMesh, PeriodicUnitSquareMesh,
                       SpatialCoordinate)

from fem_diffusion.fields import coefficients
from fem_diffusion.problem.prior import GaussianPrior


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
