"""How far a posterior can be trusted."""

from fem_diffusion.trust.calibration import (
    Calibration, calibrate, calibrate_model, energy_score, sbc_p_values, sbc_ranks,
)
from fem_diffusion.trust.gap import Gap, amortised_gap, tell_gaps

__all__ = [
    "Calibration", "Gap", "amortised_gap", "calibrate", "calibrate_model", "energy_score", "sbc_p_values", "sbc_ranks",
    "tell_gaps",
]
