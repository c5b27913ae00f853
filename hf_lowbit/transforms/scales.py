"""Scales per input channel that move difficulty from activations to weights: formulas on tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lowbit.transforms.fold import FoldError

_SMALLEST, _LARGEST = 1e-5, 1e5
_AWQ_SMALLEST = 1e-4


def smoothing_scale(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """The scale that inputs are divided by and weight columns multiplied by, to balance their ranges.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha): SmoothQuant, equation 4 (arXiv 2211.10438). The weight's range is at
    least 1e-5 as in the authors' code; the scale stays within [1e-5, 1e5] and is 1 for channels that are never
    active, so that no norm's weight explodes [ours].

    Args:
        activation_absmax: largest |x| per channel over the calibration data, ``[channels]``.
        weight_absmax: largest |w| per column over all layers that read these channels, ``[channels]``.
        alpha: 0 leaves the whole difficulty to the activations, 1 to the weights.

    Returns:
        float32 ``[channels]``, positive.

    Raises:
        FoldError: alpha outside [0, 1], or ranges that differ in shape, are negative or not finite.
    """
    _check_fraction("alpha", alpha)
    a, w = _checked("activation_absmax", activation_absmax), _checked("weight_absmax", weight_absmax)
    if a.shape != w.shape:
        raise FoldError(f"activation_absmax has {a.shape[0]} channels, weight_absmax {w.shape[0]}")
    scale = a**alpha / w.clamp(min=_SMALLEST) ** (1 - alpha)
    return torch.where(a == 0, 1.0, scale.clamp(_SMALLEST, _LARGEST)).float()


def activation_scale(mean_abs: Tensor, ratio: float) -> Tensor:
    """The scale of one step of AWQ's search: a^ratio, normalised so that max(s) * min(s) = 1.

    AWQ (arXiv 2306.00978), section 3.2, with the lower bound of 1e-4 and the normalisation of the authors' code.

    Args:
        mean_abs: mean |x| per channel over the calibration data, ``[channels]``.
        ratio: 0 gives ones, that is no scaling; the search tries n / 20 for n < 20.

    Returns:
        float32 ``[channels]``, positive.

    Raises:
        FoldError: a ratio outside [0, 1], or means that are negative, not finite or not ``[channels]``.
    """
    _check_fraction("ratio", ratio)
    scale = (_checked("mean_abs", mean_abs) ** ratio).clamp(min=_AWQ_SMALLEST)
    return (scale / (scale.max() * scale.min()).sqrt()).float()


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise FoldError(f"{name} must be between 0 and 1, not {value!r}")


def _checked(name: str, values: Tensor) -> Tensor:
    if values.dim() != 1 or not values.numel():
        raise FoldError(f"{name} must be [channels], not of shape {tuple(values.shape)}")
    values = values.detach().double()
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise FoldError(f"{name} holds negative, NaN or infinite values")
    return values
