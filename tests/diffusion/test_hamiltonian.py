"""One Hamiltonian move leaves a law as it is, whatever the force, and refuses points that have no density."""

import pytest
import torch

from fem_diffusion.comparison import moment_p_values
from fem_diffusion.diffusion.sampling.hamiltonian import hamiltonian_move

MEAN = torch.tensor([0.5, -1.0, 0.0]).double()
COVARIANCE = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.5, 0.2], [0.0, 0.2, 1.5]]).double()
PRECISION = torch.linalg.inv(COVARIANCE)


def _energy(z):
    return ((z - MEAN) @ PRECISION * (z - MEAN)).sum(-1) / 2


def _force(z):
    return (z - MEAN) @ PRECISION


def _moved(energy=_energy, force=_force, moves=30, n=4000):
    """Smaller of the two p-values of moments after moves that start far off, and the share accepted."""
    generator, accepted = torch.Generator().manual_seed(0), []
    z = 3 * torch.ones(n, 3).double()
    for _ in range(moves):
        length = 0.4 * (0.8 + 0.4 * float(torch.rand((), generator=generator)))
        z, accept = hamiltonian_move(z, energy, force, length, 4, generator)
        accepted.append(accept.double().mean())
    assert z.shape == (n, 3) and accept.shape == (n,)
    return min(moment_p_values(z.numpy(), MEAN.numpy(), COVARIANCE.numpy())), float(torch.stack(accepted).mean())


def test_moves_find_a_gaussian_and_keep_it():
    p, accepted = _moved()
    assert p > 1e-3 and 0.9 < accepted < 1


def test_a_wrong_force_costs_acceptance_alone():
    p, accepted = _moved(force=lambda z: z - MEAN, moves=100)
    assert p > 1e-3 and accepted < 0.9


@pytest.mark.parametrize("broken", [lambda z: _energy(z) / 1.2, lambda z: _energy(z - 0.1), lambda z: 0 * z[..., 0]])
def test_a_wrong_energy_is_noticed(broken):
    assert _moved(energy=broken)[0] < 1e-6


@pytest.mark.parametrize("wall", [torch.inf, torch.nan, -torch.inf])
def test_points_without_a_density_are_refused(wall):
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(2, 500, 3, generator=generator).double()
    for _ in range(10):
        z, accept = hamiltonian_move(z, lambda z: torch.where((z > 0).all(-1), _energy(z), wall), _force, 0.3, 4,
                                     generator)
        assert (z > 0).all() and 0 < accept.double().mean() < 1
