"""References and measures that say how good a posterior is.

No file but `fem_reference`, which is not imported here, imports Firedrake.
"""

from fem_diffusion.diagnostics.calibration import Calibration, calibrate, calibrate_model, sbc_p_values, sbc_ranks
from fem_diffusion.diagnostics.combinations import FEW_SAMPLERS, SAMPLERS, Combination, Sampler, combine
from fem_diffusion.diagnostics.distances import (
    c2st, energy_score, mmd, moment_p_values, sinkhorn, sliced_wasserstein,
)
from fem_diffusion.diagnostics.protocol import Training, compare, run_protocol
from fem_diffusion.diagnostics.reference import HMCResult, gauss_newton, hmc, linear_gaussian_posterior
from fem_diffusion.diagnostics.report import (
    Convergence, convergence, plot_costs, plot_overview, summarise, write_csv, write_markdown,
)

__all__ = [
    "Calibration", "Combination", "Convergence", "FEW_SAMPLERS", "HMCResult", "SAMPLERS", "Sampler", "Training",
    "c2st", "calibrate", "calibrate_model", "combine", "compare", "convergence", "energy_score", "gauss_newton", "hmc",
    "linear_gaussian_posterior", "mmd", "moment_p_values", "plot_costs", "plot_overview", "run_protocol",
    "sbc_p_values", "sbc_ranks", "sinkhorn", "sliced_wasserstein", "summarise", "write_csv", "write_markdown",
]
