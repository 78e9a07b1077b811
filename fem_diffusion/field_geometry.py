"""What a score network on fields has to know of the mesh: modes at points, and integrals through the mass matrix."""

import numpy as np
import torch
from firedrake import Function, SpatialCoordinate

from fem_diffusion.bridge import ModalBasis
from fem_diffusion.diffusion import Denoiser, FieldGeometry, FieldNetwork
from fem_diffusion.eigenmodes import mass_action
from fem_diffusion.errors import InputError
from fem_diffusion.fields import coefficients, geometric_key, on_root

__all__ = ["field_geometry", "on_mesh"]

_POINTS_PER_MODE = 3
_NODAL = ("Lagrange", "Discontinuous Lagrange", "Q", "DQ")


def field_geometry(basis: ModalBasis, points: int | None = None) -> FieldGeometry:
    """Modes at well spread nodes of the mesh, with weights in which integrals are those of the mass matrix.

    The network's fields are combinations of few modes, so a few nodes for each mode hold them. Every node of the mesh
    gives the integral of its basis function to the chosen node nearest by; then the weights are corrected such that
    all modes keep their inner products.

    Parameters
    ----------
    basis : ModalBasis
        Basis of the latents, in a scalar space of nodal elements.
    points : int, optional
        Number of nodes, all of them where there are fewer; three times the number of modes where left out.

    Returns
    -------
    FieldGeometry
        In double precision on the CPU, the same on all ranks.

    Raises
    ------
    InputError
        If the space is not scalar and nodal, or there are fewer points than modes.
    """
    V = basis.V
    points = _POINTS_PER_MODE * basis.r if points is None else points
    if len(V) > 1 or V.value_shape or V.ufl_element().family() not in _NODAL:
        raise InputError(f"A network on fields needs one scalar unknown with values at nodes, not {V}: take the fully "
                         "connected network.")
    x = np.stack([coefficients(Function(V).interpolate(c)) for c in SpatialCoordinate(V.mesh())])
    share = mass_action(V)(np.ones((1, x.shape[1])))
    rows = np.vstack([geometric_key(V), x, share, coefficients(basis.mean), basis.modes])
    parts = V.comm.gather(rows)
    return on_root(V.comm, lambda: _geometry(np.hstack(parts), len(x), basis.variances, points))


def on_mesh(denoiser: Denoiser, basis: ModalBasis) -> Denoiser:
    """The denoiser with its network on the mesh of a basis; the same one where the network has no layers on a mesh.

    Parameters
    ----------
    denoiser : Denoiser
        With a `FieldNetwork` of any mesh, or none yet.
    basis : ModalBasis
        Basis of the latents.

    Returns
    -------
    Denoiser
    """
    if not isinstance(denoiser.network, FieldNetwork):
        return denoiser
    network = denoiser.network.on(field_geometry(basis), denoiser.base)
    return Denoiser(denoiser.base, network, denoiser.spectrum, denoiser.support)


def _geometry(rows: np.ndarray, dimension: int, variances: np.ndarray, points: int) -> FieldGeometry:
    """Geometry from keys, coordinates, shares, mean and modes at all nodes, stacked as rows (., n)."""
    rows = rows[1:, np.argsort(rows[0])]  # whatever the numbering of the mesh, the same nodes are chosen
    x, share, mean, modes = rows[:dimension].T, rows[dimension], rows[dimension + 1], rows[dimension + 2:]
    measure, total = share.sum(), variances.sum()
    chosen, nearest = _spread_out(x, min(points, len(x)))
    if len(chosen) < len(modes):
        raise InputError(f"{len(chosen)} points cannot tell {len(modes)} modes apart: take more points or fewer modes.")
    weights = np.bincount(nearest, share / measure, minlength=len(chosen))
    scale, modes = np.sqrt(total / measure), modes[:, chosen] * np.sqrt(measure)
    projector = np.linalg.solve(modes * weights @ modes.T, modes * weights).T
    return FieldGeometry(*map(torch.as_tensor, (modes, projector, mean[chosen] / scale, np.sqrt(variances / total))))


def _spread_out(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` nodes of x (n, d), each as far from those before as can be, and the nearest one of each."""
    chosen, nearest, distance = np.zeros(count, dtype=int), np.zeros(len(x), dtype=int), np.full(len(x), np.inf)
    for i in range(count):
        chosen[i] = distance.argmax()
        new = ((x - x[chosen[i]])**2).sum(axis=1)
        nearest[new < distance] = i
        distance = np.minimum(distance, new)
    return chosen, nearest
