"""Generative inversion for Firedrake: conditional diffusion models on finite element fields."""

import importlib

__version__ = "0.1.0"

# Rooms are imported when a name is first used, so that the torch-only room works where Firedrake is missing.
_ROOMS = {
    "fem_diffusion.forward.advection_diffusion": ["AdvectionDiffusion"],
    "fem_diffusion.forward.transient": ["TransientAdvectionDiffusion"],
    "fem_diffusion.prior.gaussian": ["GaussianPrior"],
    "fem_diffusion.prior.transformed": ["CallablePrior", "TransformedPrior", "level_set"],
    "fem_diffusion.prior.product": ["ProductPrior"],
    "fem_diffusion.prior.protocol": ["Prior"],
    "fem_diffusion.observation.linear": ["Observation", "functionals", "point_sensors"],
    "fem_diffusion.observation.instruments": ["line_averages", "patch_averages", "random_points"],
    "fem_diffusion.observation.family": ["SensorFamily", "SensorKind"],
    "fem_diffusion.density_pde": ["GaussianMixture", "forward_density", "noise_times", "reverse_density"],
    "fem_diffusion.diffusion": ["CallableNoise", "CollapseWarning", "FamilyWarning", "Formulation", "GaussianNoise",
                                "TrainingOptions", "churn", "constant_moment", "fit_denoiser", "log_density",
                                "sample_latents", "straight_line", "sub_variance_preserving", "variance_exploding",
                                "variance_preserving"],
    "fem_diffusion.fields.basis": ["ModalBasis", "load_basis"],
    "fem_diffusion.prior.expansion": ["karhunen_loeve", "pod"],
    "fem_diffusion.simulation.simulate": ["DataSet", "SkippedWarning", "load_pairs", "simulate", "simulated_parameter"],
    "fem_diffusion.posterior": ["ConditionalModel", "Posterior", "fit", "load_model"],
    "fem_diffusion.samples": ["Samples", "load_samples"],
    "fem_diffusion.many_operators": ["FamilyModel", "fit_family", "load_family"],
    "fem_diffusion.errors": ["DataError", "FemDiffusionError", "FileError", "InputError", "InstallError",
                             "SolveError"],
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}
_FIREDRAKE = (2026, 10)

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'fem_diffusion' has no attribute {name!r}")
    if not _HOME[name].startswith(("fem_diffusion.diffusion", "fem_diffusion.errors")):
        _check_firedrake()
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _check_firedrake() -> None:
    """Raise InstallError where Firedrake is missing or too old."""
    from importlib.metadata import PackageNotFoundError, version
    from fem_diffusion.errors import InstallError

    wanted = ".".join(map(str, _FIREDRAKE))
    remedy = (f"Install Firedrake {wanted} or newer (`make install` in a clone of fem_diffusion does it) and activate "
              "its environment; fem_diffusion.diffusion alone works without it.")
    try:
        found = version("firedrake")
    except PackageNotFoundError:
        raise InstallError(f"fem_diffusion needs Firedrake, which is not installed here. {remedy}") from None
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if numbers < _FIREDRAKE:
        raise InstallError(f"fem_diffusion needs Firedrake {wanted} or newer; here is {found}. {remedy}")
