"""The posterior of one measurement by a trained model: Functions out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fem_diffusion.checks import check_count, check_device, check_flag, check_seed
from fem_diffusion.diffusion import Conditioned, Denoiser, Layout, Sampler, log_density, sample_latents
from fem_diffusion.errors import InputError
from fem_diffusion.fields.basis import ModalBasis
from fem_diffusion.fields.coefficients import coefficients, on_root
from fem_diffusion.fields.events import event
from fem_diffusion.problem import InverseProblem
from fem_diffusion.samples import Samples

__all__ = ["Posterior"]

_TAIL_STREAM = 0x7A11


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """p(m | y) for one measurement, ready to be sampled.

    Parameters
    ----------
    problem : InverseProblem
        With the sensors and noise of the measurement.
    basis : ModalBasis
        Coordinates of the fields.
    denoiser : Denoiser
        The trained model.
    y : numpy.ndarray
        The measurement, shape (k,), in units of the layout where there is one.
    layout : Layout or None
        The sensors of the measurement where they are those of a family.
    tail : Tail or None
        What readings tell of the modes past those of the basis.
    """

    problem: InverseProblem
    basis: ModalBasis
    denoiser: Denoiser
    y: np.ndarray
    layout: Layout | None = None
    tail: "Tail | None" = None
'''
