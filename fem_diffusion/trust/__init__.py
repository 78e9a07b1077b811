"""How far a posterior can be trusted."""

from fem_diffusion.trust.calibration import (
    Calibration, calibrate, calibrate_model, energy_score, sbc_p_values, sbc_ranks,
)

__all__ = ["Calibration", "calibrate", "calibrate_model", "energy_score", "sbc_p_values", "sbc_ranks"]
