"""References and measures that say how good a posterior is; no file here imports Firedrake."""

from fem_diffusion.diagnostics.distances import moment_p_values, sliced_wasserstein
from fem_diffusion.diagnostics.reference import HMCResult, gauss_newton, hmc, linear_gaussian_posterior

__all__ = ["HMCResult", "gauss_newton", "hmc", "linear_gaussian_posterior", "moment_p_values",
           "sliced_wasserstein"]
