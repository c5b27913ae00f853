"""Rounding to nearest of specifications that may be open still."""

from __future__ import annotations

from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.rounding.floating_point import round_floating_point
from hf_lowbit.rounding.nearest import round_to_nearest
from hf_lowbit.rounding.power import round_power


def round_completely(weight: Tensor, spec: WeightSpec) -> PackedTensor:
    """Round to nearest; what the specification leaves open, an exponent or a floating-point split, is searched first.

    Arguments and errors: :func:`hf_lowbit.rounding.round_to_nearest`.
    """
    if not spec.is_open:
        return round_to_nearest(weight, spec)
    return round_floating_point(weight, spec) if spec.format == "fp" else round_power(weight, spec)
