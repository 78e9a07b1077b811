"""Conditional diffusion in latent coordinates, torch only: no file here imports Firedrake."""

from fem_diffusion.diffusion.collapse import Collapse, CollapseWarning, measure_collapse
from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.emulator import Emulator, fit_emulator
from fem_diffusion.diffusion.field_network import FieldGeometry, FieldNetwork
from fem_diffusion.diffusion.formulation import (
    Formulation, constant_moment, straight_line, sub_variance_preserving, variance_exploding, variance_preserving,
)
from fem_diffusion.diffusion.gaussian import GaussianBase, fit_base, linear_base, plain_base
from fem_diffusion.diffusion.likelihood import log_density
from fem_diffusion.diffusion.network import ResidualMLP
from fem_diffusion.diffusion.noise import CallableNoise, GaussianNoise, as_noise
from fem_diffusion.diffusion.nodes import Spectrum, fit_spectrum, place_angles
from fem_diffusion.diffusion.operator_base import Located, OperatorBase
from fem_diffusion.diffusion.operators import OperatorDenoiser, fit_operators
from fem_diffusion.diffusion.sampling.sample import METHODS, churn, evaluations, sample_latents
from fem_diffusion.diffusion.seen import FamilyWarning, Seen
from fem_diffusion.diffusion.sensor_network import SensorNetwork
from fem_diffusion.diffusion.sensors import LayoutLaw, SensorPool, Sensors
from fem_diffusion.diffusion.support import Support, find_support
from fem_diffusion.diffusion.training import History, TrainingOptions, fit_denoiser, train

__all__ = [
    "CallableNoise", "Collapse", "CollapseWarning", "Denoiser", "Emulator", "FamilyWarning", "FieldGeometry",
    "FieldNetwork", "Formulation", "GaussianBase", "GaussianNoise", "History", "LayoutLaw", "Located", "METHODS",
    "OperatorBase", "OperatorDenoiser", "ResidualMLP", "Seen", "SensorNetwork", "SensorPool", "Sensors", "Spectrum",
    "Support", "TrainingOptions", "as_noise", "churn", "constant_moment", "evaluations", "find_support", "fit_base",
    "fit_denoiser", "fit_emulator", "fit_operators", "fit_spectrum", "linear_base", "log_density",
    "measure_collapse", "place_angles", "plain_base", "sample_latents", "straight_line", "sub_variance_preserving",
    "train", "variance_exploding", "variance_preserving",
]
