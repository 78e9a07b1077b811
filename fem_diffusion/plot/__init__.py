"""Pictures for talks: samples with their uncertainty, posterior predictive, training curve."""

from fem_diffusion.plot.diagnostics import plot_calibration, plot_history, plot_predictive
from fem_diffusion.plot.samples import plot_samples

__all__ = ["plot_calibration", "plot_history", "plot_predictive", "plot_samples"]
