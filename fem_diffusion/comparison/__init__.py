"""The paper's protocol: distances, combinations of formulation and sampler, tables, pictures; no Firedrake."""

from fem_diffusion.comparison.combinations import FEW_SAMPLERS, SAMPLERS, Combination, Plan, combine
from fem_diffusion.comparison.distances import c2st, mmd, moment_p_values, sinkhorn, sliced_wasserstein
from fem_diffusion.comparison.protocol import Training, compare, run_protocol
from fem_diffusion.comparison.report import (
    Convergence, convergence, plot_costs, plot_overview, summarise, write_csv, write_markdown,
)

__all__ = [
    "Combination", "Convergence", "FEW_SAMPLERS", "Plan", "SAMPLERS", "Training", "c2st", "combine", "compare",
    "convergence", "mmd", "moment_p_values", "plot_costs", "plot_overview", "run_protocol", "sinkhorn",
    "sliced_wasserstein", "summarise", "write_csv", "write_markdown",
]
