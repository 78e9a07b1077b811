"""Every public name and the file it comes from: the one list, which __init__.py reads and type checkers follow."""

from fem_diffusion.forward.advection_diffusion import AdvectionDiffusion as AdvectionDiffusion
from fem_diffusion.forward.transient import TransientAdvectionDiffusion as TransientAdvectionDiffusion
from fem_diffusion.prior.transformed import (
    CallablePrior as CallablePrior, GaussianPrior as GaussianPrior, TransformedPrior as TransformedPrior,
    level_set as level_set,
)
from fem_diffusion.prior.product import ProductPrior as ProductPrior
from fem_diffusion.observation.linear import (
    Observation as Observation, functionals as functionals, point_sensors as point_sensors,
)
from fem_diffusion.observation.instruments import (
    line_averages as line_averages, patch_averages as patch_averages, random_points as random_points,
)
from fem_diffusion.observation.family import OperatorFamily as OperatorFamily, SensorKind as SensorKind
from fem_diffusion.density_pde import (
    GaussianMixture as GaussianMixture, forward_density as forward_density, noise_times as noise_times,
    reverse_density as reverse_density,
)
from fem_diffusion.diffusion import (
    CallableNoise as CallableNoise, CollapseWarning as CollapseWarning, FamilyWarning as FamilyWarning,
    Formulation as Formulation, GaussianNoise as GaussianNoise, TrainingOptions as TrainingOptions, churn as churn,
    constant_moment as constant_moment, fit_denoiser as fit_denoiser, log_density as log_density,
    sample_latents as sample_latents, straight_line as straight_line,
    sub_variance_preserving as sub_variance_preserving, variance_exploding as variance_exploding,
    variance_preserving as variance_preserving,
)
from fem_diffusion.fields.basis import ModalBasis as ModalBasis, load_basis as load_basis
from fem_diffusion.fields.expansion import karhunen_loeve as karhunen_loeve, pod as pod
from fem_diffusion.simulation.simulate import (
    DataSet as DataSet, SkippedWarning as SkippedWarning, load_pairs as load_pairs, simulate as simulate,
    simulated_parameter as simulated_parameter,
)
from fem_diffusion.posterior import (
    ConditionalModel as ConditionalModel, Posterior as Posterior, fit as fit, load_model as load_model,
)
from fem_diffusion.samples import Samples as Samples, load_samples as load_samples
from fem_diffusion.many_operators import (
    FamilyModel as FamilyModel, fit_family as fit_family, load_family as load_family,
)
from fem_diffusion.errors import (
    DataError as DataError, FemDiffusionError as FemDiffusionError, FileError as FileError, InputError as InputError,
    InstallError as InstallError, SolveError as SolveError,
)

__version__: str
__all__: list[str]
