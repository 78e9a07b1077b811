"""Conditional diffusion in latent coordinates, torch only: no file here imports Firedrake."""

from fem_diffusion.diffusion.base.density import EmulatorDensity, emulator_density
from fem_diffusion.diffusion.base.emulator import Emulator, fit_emulator
from fem_diffusion.diffusion.base.fitted import fit_base, linear_base, plain_base
from fem_diffusion.diffusion.base.gaussian import GaussianBase, Located
from fem_diffusion.diffusion.base.layouts import Layout, LayoutFamily, LayoutKind
from fem_diffusion.diffusion.denoiser import Conditioned, Denoiser
from fem_diffusion.diffusion.formulation import (
    Formulation, constant_moment, straight_line, sub_variance_preserving, variance_exploding, variance_preserving,
)
from fem_diffusion.diffusion.maps.monotone import MonotoneMap
from fem_diffusion.diffusion.network import NETWORKS, MeanNetwork, ScoreModule, ScoreNetwork
from fem_diffusion.diffusion.network.mesh import FieldGeometry, FieldNetwork
from fem_diffusion.diffusion.network.mlp import ResidualMLP
from fem_diffusion.diffusion.network.sensors import SensorNetwork
from fem_diffusion.diffusion.noise import GaussianNoise, Noise, as_noise
from fem_diffusion.diffusion.noise_laws import CallableNoise, JoinedNoise, StudentNoise, join_noise
from fem_diffusion.diffusion.sampling.hamiltonian import hamiltonian_move
from fem_diffusion.diffusion.sampling.likelihood import log_density
from fem_diffusion.diffusion.sampling.placement import Spectrum, fit_spectrum, place_angles
from fem_diffusion.diffusion.sampling.sample import METHODS, Sampler, churn, sample_latents
from fem_diffusion.diffusion.sampling.support import Support, find_support
from fem_diffusion.diffusion.training.collapse import Collapse, CollapseWarning, measure_collapse
from fem_diffusion.diffusion.training.fit import fit_denoiser
from fem_diffusion.diffusion.training.loop import History, TrainingOptions
from fem_diffusion.diffusion.training.range import (
    Distance, FamilyWarning, MeasurementWarning, TrainingRange, measure_distance,
)

__all__ = [
    "CallableNoise", "Collapse", "CollapseWarning", "Conditioned", "Denoiser", "Distance", "Emulator",
    "EmulatorDensity", "FamilyWarning", "FieldGeometry", "FieldNetwork", "Formulation", "GaussianBase",
    "GaussianNoise", "History", "JoinedNoise", "Layout", "LayoutFamily", "LayoutKind", "Located", "METHODS",
    "MeanNetwork", "MeasurementWarning", "MonotoneMap", "NETWORKS", "Noise", "ResidualMLP", "Sampler",
    "ScoreModule", "ScoreNetwork", "SensorNetwork", "Spectrum", "StudentNoise", "Support", "TrainingOptions",
    "TrainingRange", "as_noise", "churn", "constant_moment", "emulator_density", "find_support", "fit_base",
    "fit_denoiser", "fit_emulator", "fit_spectrum", "hamiltonian_move", "join_noise", "linear_base", "log_density",
    "measure_collapse", "measure_distance", "place_angles", "plain_base", "sample_latents", "straight_line",
    "sub_variance_preserving", "variance_exploding", "variance_preserving",
]
