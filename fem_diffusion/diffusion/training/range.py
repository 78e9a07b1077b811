"""How far a layout is from those of the training."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fem_diffusion.diffusion.base.layouts import Layout, LayoutFamily

__all__ = ["FamilyWarning", "TrainingRange"]

# Share of a sensor's prior signal that the most similar training sensor may leave unexplained.
_UNLIKE = 0.1
# How far numbers of sensors and noise levels may leave the range of the training.
_BEYOND = 2.0
# Signals below this share of their noise, and of the strongest such ratio, are none.
_BLIND, _WEAK = 1e-3, 1e-6


class FamilyWarning(UserWarning):
    """An observation operator is far from those of the training: the base holds, the network extrapolates."""


@dataclass(frozen=True, eq=False)
class TrainingRange:
    """What training has seen of sensors.

    Parameters
    ----------
    signals, std : Tensor, tuple of float
        What each candidate sees of the state coordinates, of unit length, shape (K, s); smallest and largest noise over
        prior signal.
    most, strongest : int, float
        Readings in the largest layout; largest prior signal of a candidate, in units of its noise.
    """

    signals: Tensor
    std: tuple[float, float]
    most: int
    strongest: float

    @classmethod
    def of(cls, family: LayoutFamily) -> "TrainingRange":
        """What a family of layouts has to show."""
        signals = torch.cat([kind.rows.flatten(0, 1) for kind in family.kinds])
        std = torch.cat([kind.std.flatten(1) for kind in family.kinds], 1)
        ratio = std / signals.norm(dim=1)
        strongest = float((1 / ratio).max())
        # Candidates that see next to nothing, on a Dirichlet boundary, say nothing about noise either.
        ratio = ratio[_seeing(1 / ratio, strongest)]
        return cls(_unit(signals).float(), (float(ratio.min()), float(ratio.max())),
                   sum(kind.count[1] * kind.rows.shape[1] for kind in family.kinds), strongest)

    def warn(self, layout: Layout, names: Sequence[str]) -> None:
        """Warn where one layout, named row by row, is far from the training; the message names the measure."""
        findings = []
        strength, std = layout.rows[0].norm(dim=1), layout.variance[0].sqrt()
        seeing = torch.where(_seeing(strength / std, self.strongest))[0]
        rows = layout.rows[0][seeing]
        if len(rows):
            alike = (_unit(rows).float() @ self.signals.T).abs().amax(1)
            unlike = 1 - alike.clamp(max=1)**2
            worst = int(unlike.argmax())
            if float(unlike[worst]) > _UNLIKE:
                findings.append(f"sensor {names[int(seeing[worst])]}: the most similar training sensor leaves "
                                f"{unlike[worst]:.0%} of the prior variance of its signal unexplained (1 - squared "
                                "correlation)")
            ratio = std[seeing] / strength[seeing]
            low, high = float(ratio.min()) / self.std[0], float(ratio.max()) / self.std[1]
            if low < 1 / _BEYOND or high > _BEYOND:
                findings.append(f"noise over prior signal reaches {low:.2g} of the smallest and {high:.2g} of the "
                                "largest value of the training")
        if len(names) > _BEYOND * self.most:
            findings.append(f"{len(names)} readings, {len(names) / self.most:.1f} times the most in training")
        if findings:
            warnings.warn("This observation operator is far from the training family: " + "; ".join(findings)
                          + ". The Gaussian base holds for it, the network extrapolates; train with a family that has "
                          "such sensors.", FamilyWarning, stacklevel=3)


def _seeing(ratio: Tensor, strongest: float) -> Tensor:
    """Whether sensors with these ratios of signal to noise, which know no units, see anything."""
    return ratio > min(_BLIND, _WEAK * strongest)


def _unit(rows: Tensor) -> Tensor:
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)
