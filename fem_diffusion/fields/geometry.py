"""What a score network on fields has to know of the mesh: modes at points, and integrals through the mass matrix."""

from dataclasses import replace

import numpy as np
import torch
from firedrake import Function, SpatialCoordinate, TestFunction, TrialFunction, assemble, dx, grad, inner
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc

from fem_diffusion.diffusion import Denoiser, FieldGeometry, MeanNetwork, ScoreModule
from fem_diffusion.errors import InputError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import coefficients, generic_integrals, multiply, on_root, solve
from fem_diffusion.fields.modes import mass_action

__all__ = ["field_geometry", "on_mesh"]

_POINTS_PER_MODE = 3


def field_geometry(basis: ModalBasis, points: int | None = None) -> FieldGeometry:
    """Modes at well spread nodes of the mesh, with weights in which integrals are those of the mass matrix.

    The network's fields are combinations of few modes, so a few nodes for each mode hold them: `points` of them, three
    times the number of modes where left out, all where there are fewer. Every node of the mesh gives the integral of
    its basis function to the chosen node nearest by; then the weights are corrected such that all modes keep their
    inner products.

    In double precision on the CPU, the same on all ranks. InputError if the space of the basis is not scalar and nodal,
    or there are fewer points than modes.
    """
    V = basis.V
    points = _POINTS_PER_MODE * basis.r if points is None else points
    if basis.turn is not None:
        raise InputError("A network on fields sees the modes themselves: give a basis that is not turned.")
    if len(V) > 1 or V.value_shape or not V.finat_element.has_pointwise_dual_basis:
        raise InputError(f"A network on fields needs one scalar unknown with values at nodes, not {V}: take the fully "
                         "connected network.")
    x = np.stack([coefficients(Function(V).interpolate(c)) for c in SpatialCoordinate(V.mesh())])
    share = mass_action(V)(np.ones((1, x.shape[1])))
    values = np.vstack([coefficients(basis.mean), basis.modes])
    parts = V.comm.gather(np.vstack([generic_integrals(V), x, share, values, *_gradients(V, values)]))
    dimension = V.mesh().topological_dimension
    return on_root(V.comm, lambda: _geometry(np.hstack(parts), len(x), dimension, basis.variances, points))


def on_mesh(denoiser: Denoiser, basis: ModalBasis) -> Denoiser:
    """The denoiser with its `FieldNetwork`, of any mesh, on that of a basis; the same one where it has no such."""
    network = denoiser.network
    if not (isinstance(network, (MeanNetwork, ScoreModule)) and network.mesh):
        return denoiser
    return replace(denoiser, network=network.on(field_geometry(basis)))


def _gradients(V: WithGeometry, values: np.ndarray) -> list[np.ndarray]:
    """L2 projections to V of the derivatives of fields (B, n_owned), one array for each direction."""
    u, v = TrialFunction(V), TestFunction(V)
    mass = assemble(inner(u, v) * dx, mat_type="aij").petscmat
    ksp = PETSc.KSP().create(V.comm)
    ksp.setOperators(mass)
    ksp.setType("preonly")
    ksp.getPC().setType("lu")
    ksp.getPC().setFactorSolverType("mumps")
    gradients = [solve(ksp, multiply(assemble(inner(grad(u)[i], v) * dx, mat_type="aij").petscmat, values))
                 for i in range(V.mesh().geometric_dimension)]
    ksp.destroy()  # on all ranks together
    return gradients


def _geometry(rows: np.ndarray, d: int, dimension: int, variances: np.ndarray, points: int) -> FieldGeometry:
    """Geometry from keys, d coordinates, shares, mean, modes and their gradients at all nodes, as rows (., n)."""
    rows = rows[1:, np.argsort(rows[0])]  # whatever the numbering of the mesh, the same nodes are chosen
    x, share, fields = rows[:d].T, rows[d], rows[d + 1:].reshape(1 + d, 1 + len(variances), -1)
    measure, total = share.sum(), variances.sum()
    chosen, nearest = _spread_out(x, min(points, len(x)))
    if len(chosen) < len(variances):
        raise InputError(f"{len(chosen)} points cannot tell {len(variances)} modes apart: take more points or fewer "
                         "modes.")
    weights = np.bincount(nearest, share / measure, minlength=len(chosen))
    means, modes = fields[:, 0, chosen] / np.sqrt(total / measure), fields[:, 1:, chosen] * np.sqrt(measure)
    # The distance between modes makes derivatives as large as values; unlike a norm of theirs, it knows no mesh.
    distance = (measure / len(variances))**(1 / dimension)
    projector = np.linalg.solve(modes[0] * weights @ modes[0].T, modes[0] * weights).T
    parts = modes[0], projector, distance * modes[1:], means[0], distance * means[1:], np.sqrt(variances / total)
    return FieldGeometry(*map(torch.as_tensor, parts))


def _spread_out(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of `count` nodes of x (n, d), each as far from those before as can be, and the nearest one of each."""
    chosen, nearest, distance = np.zeros(count, dtype=int), np.zeros(len(x), dtype=int), np.full(len(x), np.inf)
    for i in range(count):
        chosen[i] = distance.argmax()
        new = ((x - x[chosen[i]])**2).sum(axis=1)
        nearest[new < distance] = i
        distance = np.minimum(distance, new)
    return chosen, nearest
