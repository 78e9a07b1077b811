"""The public names and where they live; `__init__.py` reads them here."""

from fem_diffusion.density_pde import GaussianMixture, forward_density, noise_times, reverse_density
from fem_diffusion.diffusion.denoiser import Conditioned, Denoiser
from fem_diffusion.diffusion.formulation import (
    Formulation, constant_moment, straight_line, sub_variance_preserving, variance_exploding, variance_preserving,
)
from fem_diffusion.diffusion.noise import CallableNoise, GaussianNoise
from fem_diffusion.diffusion.sampling.likelihood import log_density
from fem_diffusion.diffusion.sampling.sample import Sampler, churn, sample_latents
from fem_diffusion.diffusion.training.collapse import CollapseWarning
from fem_diffusion.diffusion.training.fit import fit_denoiser
from fem_diffusion.diffusion.training.loop import TrainingOptions
from fem_diffusion.diffusion.training.range import FamilyWarning
from fem_diffusion.errors import DataError, FemDiffusionError, FileError, InputError, InstallError, SolveError
from fem_diffusion.fields.basis import ModalBasis, load_basis
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion
from fem_diffusion.forward.callable import CallableForward
from fem_diffusion.forward.protocol import Differentiable, Forward
from fem_diffusion.forward.settings import Boundary, Physics, TimeSteps
from fem_diffusion.forward.transient import TransientAdvectionDiffusion
from fem_diffusion.model.file import load_model
from fem_diffusion.model.fit import fit
from fem_diffusion.model.model import Model
from fem_diffusion.model.posterior import Posterior
from fem_diffusion.observation.family import SensorFamily, SensorKind
from fem_diffusion.observation.instruments import line_averages, patch_averages, random_points
from fem_diffusion.observation.linear import Observation, functionals, point_sensors
from fem_diffusion.prior.expansion import karhunen_loeve, pod
from fem_diffusion.prior.gaussian import GaussianPrior
from fem_diffusion.prior.product import ProductPrior
from fem_diffusion.prior.protocol import Prior
from fem_diffusion.prior.transformed import CallablePrior, TransformedPrior, level_set
from fem_diffusion.problem import InverseProblem
from fem_diffusion.reference.exact import ExactPosterior, exact
from fem_diffusion.reference.hmc import ChainPosterior, hmc
from fem_diffusion.samples import Samples, load_samples
from fem_diffusion.simulation.simulate import DataSet, SkippedWarning, load_pairs, simulate, simulated_parameter
