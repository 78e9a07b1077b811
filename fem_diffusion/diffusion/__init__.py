"""Conditional diffusion in latent coordinates, torch only: no file here imports Firedrake."""

from fem_diffusion.diffusion.denoiser import Denoiser
from fem_diffusion.diffusion.formulation import Formulation, variance_exploding, variance_preserving
from fem_diffusion.diffusion.gaussian import GaussianBase, fit_base, linear_base
from fem_diffusion.diffusion.network import ResidualMLP
from fem_diffusion.diffusion.noise import CallableNoise, GaussianNoise
from fem_diffusion.diffusion.sampling import sample_latents
from fem_diffusion.diffusion.training import History, TrainingOptions, train

__all__ = [
    "CallableNoise", "Denoiser", "Formulation", "GaussianBase", "GaussianNoise", "History", "ResidualMLP",
    "TrainingOptions", "fit_base", "linear_base", "sample_latents", "train", "variance_exploding",
    "variance_preserving",
]
