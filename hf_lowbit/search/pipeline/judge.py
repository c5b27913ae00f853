"""What a changed denoiser is worth: the likeness of its pictures, and the noise in its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.divergence import SensitivityError
from hf_lowbit.calibration.units import Batch, without_cache
from hf_lowbit.evaluation.pictures.similarity import ssim

MOST_DB = 150.0  # of outputs that are equal as far as float32 can tell


class Judge:
    """Compares a model, as it is at the moment, with what it was at the start.

    Args:
        model: a pipeline's denoiser, float.
        draw: pictures ``[n, c, h, w]`` of the pipeline, always of the same prompts and noise.
        samples: calls of the model, keyword arguments.

    Raises:
        SensitivityError: the float pipeline's own pictures or outputs are not finite.
    """

    def __init__(self, model: nn.Module, draw: Callable[[], Tensor], samples: Sequence[Batch]) -> None:
        self._model, self._draw = model, draw
        self._samples = [without_cache(model, batch) for batch in samples]
        self._pictures = draw()
        self._outputs = [self._run(batch) for batch in self._samples]
        if not all(bool(torch.isfinite(x).all()) for x in (self._pictures, *self._outputs)):
            raise SensitivityError("the float pipeline draws pictures with NaN or infinite values: nothing to compare")

    def similarity(self) -> float:
        """Mean SSIM of the pictures, one window as large as they are: MixDQ's 511 on pictures of 512 pixels."""
        return float(ssim(_finite(self._draw()), self._pictures, window_size=None).mean())

    def pixel_error(self) -> float:
        """Mean squared difference of the pictures."""
        return float((_finite(self._draw()) - self._pictures).square().mean())

    def noise_ratio(self) -> float:
        """SQNR of the outputs in dB: signal over noise, both summed over all samples."""
        signal = noise = 0.0
        for batch, expected in zip(self._samples, self._outputs, strict=True):
            signal += float(expected.double().square().sum())
            noise += float((_finite(self._run(batch)).double() - expected.double()).square().sum())
        if noise <= signal * 10 ** (-MOST_DB / 10):
            return MOST_DB
        return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64).clamp(min=1e-30)))

    def _run(self, batch: Batch) -> Tensor:
        return first_tensor(self._model(**batch)).float()


def first_tensor(output: Any) -> Tensor:
    """What a denoiser returns, of a tensor, a tuple or diffusers' output object."""
    result = output if isinstance(output, Tensor) else output[0]
    assert isinstance(result, Tensor)
    return result


def _finite(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise SensitivityError("NaN or infinite values")
    return x
