"""What finds the stored scales of a layer's inputs.

The searches of single methods are in files of their own: :mod:`hf_lowbit.calibration.input_ranges` (Q-Diffusion's) and
:mod:`hf_lowbit.calibration.floating_point_inputs`. Running means of the ranges of batches, which Q-Diffusion's code
has, depend on the order of the batches and on how many processes share them; the plain range stands for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import integer_grid

if TYPE_CHECKING:
    from hf_lowbit.calibration.static_inputs import InputHistogram


class FitInputs(Protocol):
    """A search for the scales of one layer's inputs."""

    def __call__(self, histogram: InputHistogram, spec: ActivationSpec) -> tuple[ActivationSpec, Tensor, Tensor | None]:
        """The specification completed, scale and shift.

        Args:
            histogram: counts of the values that the layer multiplies, per timestep and group as ``spec`` asks.

        Returns:
            The specification; float32 scale ``[(timesteps,) (groups,)]``; shift of the same shape, None for a symmetric
            format without one.
        """


def fit_range(
    histogram: InputHistogram, spec: ActivationSpec, percentile: float = 100.0
) -> tuple[ActivationSpec, Tensor, Tensor | None]:
    """Scales that cover all inputs, or a share of |x| in percent: a :class:`FitInputs`.

    A group of zeros beside others has the scale 1.
    """
    limit = histogram.largest_magnitude(percentile)
    low, high = torch.maximum(histogram.low, -limit), torch.minimum(histogram.high, limit)
    if not spec.symmetric:
        scale, shift = integer_grid(low, high, spec.bits)
        idle = scale == 0
        return spec, torch.where(idle, torch.ones_like(scale), scale), torch.where(idle, torch.zeros_like(shift), shift)
    if not spec.shift:
        return spec, torch.where(limit == 0, torch.ones_like(limit), limit / spec.limit), None
    scale = (high - low) / 2 / spec.limit
    return spec, torch.where(scale == 0, torch.ones_like(scale), scale), (high + low) / 2
