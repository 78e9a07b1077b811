"""Every public name and the file it comes from: the one list, which __init__.py reads and type checkers follow."""

from fem_diffusion.certificate import Certificate as Certificate
from fem_diffusion.density_pde import (
    GaussianMixture as GaussianMixture, forward_density as forward_density, noise_times as noise_times,
    reverse_density as reverse_density,
)
from fem_diffusion.diffusion.denoiser import Conditioned as Conditioned, Denoiser as Denoiser
from fem_diffusion.diffusion.formulation import (
    Formulation as Formulation, constant_moment as constant_moment, straight_line as straight_line,
    sub_variance_preserving as sub_variance_preserving, variance_exploding as variance_exploding,
    variance_preserving as variance_preserving,
)
from fem_diffusion.diffusion.network import ScoreNetwork as ScoreNetwork
from fem_diffusion.diffusion.noise import GaussianNoise as GaussianNoise
from fem_diffusion.diffusion.noise_laws import (
    CallableNoise as CallableNoise, StudentNoise as StudentNoise, join_noise as join_noise,
)
from fem_diffusion.diffusion.sampling.likelihood import log_density as log_density
from fem_diffusion.diffusion.sampling.sample import Sampler as Sampler, churn as churn, sample_latents as sample_latents
from fem_diffusion.diffusion.training.collapse import CollapseWarning as CollapseWarning
from fem_diffusion.diffusion.training.fit import fit_denoiser as fit_denoiser
from fem_diffusion.diffusion.training.loop import History as History, TrainingOptions as TrainingOptions
from fem_diffusion.diffusion.training.range import (
    Distance as Distance, FamilyWarning as FamilyWarning, MeasurementWarning as MeasurementWarning,
)
from fem_diffusion.errors import (
    DataError as DataError, FemDiffusionError as FemDiffusionError, FileError as FileError, InputError as InputError,
    InstallError as InstallError, SolveError as SolveError,
)
from fem_diffusion.fields.coefficients import coefficients as coefficients, field as field
from fem_diffusion.fields.basis import ModalBasis as ModalBasis, load_basis as load_basis
from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion as AdvectionDiffusion
from fem_diffusion.forward.blocks import SkippedWarning as SkippedWarning
from fem_diffusion.forward.callable import CallableForward as CallableForward
from fem_diffusion.forward.march import March as March
from fem_diffusion.forward.protocol import Differentiable as Differentiable, Forward as Forward
from fem_diffusion.forward.physics import Boundary as Boundary, Physics as Physics, TimeSteps as TimeSteps
from fem_diffusion.forward.steady import Steady as Steady
from fem_diffusion.forward.taped import Taped as Taped
from fem_diffusion.forward.transient import TransientAdvectionDiffusion as TransientAdvectionDiffusion
from fem_diffusion.measurements.measurements import (
    Measurements as Measurements, read_measurements as read_measurements,
)
from fem_diffusion.measurements.table import Finding as Finding
from fem_diffusion.model.fit import fit as fit
from fem_diffusion.model.model import Model as Model, load_model as load_model
from fem_diffusion.model.posterior import Posterior as Posterior
from fem_diffusion.model.posteriors import Posteriors as Posteriors
from fem_diffusion.model.refine import refine as refine
from fem_diffusion.monitor.export import Largest as Largest
from fem_diffusion.observation.family import SensorFamily as SensorFamily, SensorKind as SensorKind
from fem_diffusion.observation.instruments import (
    line_averages as line_averages, patch_averages as patch_averages, random_points as random_points,
)
from fem_diffusion.observation.linear import (
    Observation as Observation, functionals as functionals, point_sensors as point_sensors,
)
from fem_diffusion.prior.expansion import karhunen_loeve as karhunen_loeve, pod as pod
from fem_diffusion.prior.constrained import ConstrainedPrior as ConstrainedPrior
from fem_diffusion.prior.gaussian import GaussianPrior as GaussianPrior
from fem_diffusion.prior.hierarchical import HierarchicalPrior as HierarchicalPrior
from fem_diffusion.prior.product import ProductPrior as ProductPrior
from fem_diffusion.prior.protocol import GaussianCore as GaussianCore, Prior as Prior
from fem_diffusion.prior.recipes import bounded as bounded, divergence_free as divergence_free
from fem_diffusion.prior.scalar import ScalarPrior as ScalarPrior
from fem_diffusion.prior.transformed import (
    CallablePrior as CallablePrior, TransformedPrior as TransformedPrior, level_set as level_set,
)
from fem_diffusion.problem import InverseProblem as InverseProblem
from fem_diffusion.reference.exact import ExactPosterior as ExactPosterior, exact as exact
from fem_diffusion.reference.chains import ChainPosterior as ChainPosterior, ConvergenceWarning as ConvergenceWarning
from fem_diffusion.reference.hmc import hmc as hmc
from fem_diffusion.reference.laplace import LaplacePosterior as LaplacePosterior, laplace as laplace
from fem_diffusion.reference.pcn import pcn as pcn
from fem_diffusion.reference.point import MapPoint as MapPoint, map_point as map_point
from fem_diffusion.samples import Samples as Samples, load_samples as load_samples
from fem_diffusion.simulation.journal import Journal as Journal
from fem_diffusion.simulation.simulate import (
    DataSet as DataSet, load_pairs as load_pairs, simulate as simulate,
    simulated_parameter as simulated_parameter,
)
from fem_diffusion.trust.check import Check as Check, check as check
from fem_diffusion.trust.cross import CrossValidation as CrossValidation
from fem_diffusion.trust.gap import Gap as Gap, amortised_gap as amortised_gap, tell_gaps as tell_gaps
from fem_diffusion.trust.report import report as report
