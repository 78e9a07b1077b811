"""Posteriors without training; no file but `finite_element`, which is not imported here, imports Firedrake."""

from fem_diffusion.reference.dense import HMCResult, gauss_newton, hmc, linear_gaussian_posterior

__all__ = ["HMCResult", "gauss_newton", "hmc", "linear_gaussian_posterior"]
