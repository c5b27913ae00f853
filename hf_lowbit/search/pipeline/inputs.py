"""Inputs of a float model's layers as quantized ones would be: ranges found on data, and a context that rounds.

This measures what a width costs; what a search finds runs on codes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.listening import told_inputs
from hf_lowbit.calibration.units import Batch, without_cache

READS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass
class InputRange:
    """Of one layer's inputs.

    Attributes:
        widths: channels of the parts that have a range each.
        without_first: the first token of a sequence is left out: its product is stored.
        low, high: float32 ``[parts]``, with zero.
        size: inputs of one sample, those that are rounded.
    """

    widths: tuple[int, ...]
    without_first: bool = False
    low: Tensor | None = None
    high: Tensor | None = None
    size: int = 0

    def update(self, x: Tensor) -> None:
        """Take in ``[batch, tokens, channels]`` or ``[batch, channels]``, channels last."""
        x = x[:, 1:] if self.without_first else x
        self.size = max(self.size, x[0].numel())
        parts = x.detach().float().split(self.widths, dim=-1)
        low = torch.stack([part.amin() for part in parts]).clamp(max=0)
        high = torch.stack([part.amax() for part in parts]).clamp(min=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def rounded(self, x: Tensor, bits: int) -> Tensor:
        """x as asymmetric static codes of so many bits hold it: zero exactly, what lies outside clipped."""
        assert self.low is not None and self.high is not None
        steps = 2**bits - 1
        widths = torch.tensor(self.widths, device=x.device)
        scale = ((self.high - self.low) / steps).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-self.low / scale).round()
        scale, zero = (value.repeat_interleave(widths) for value in (scale, zero))
        codes = (x.float() / scale).round().clamp(-zero, steps - zero)
        result = (codes * scale).to(x.dtype)
        if self.without_first:
            result[:, :1] = x[:, :1]
        return result


@torch.no_grad()
def input_ranges(
    model: nn.Module,
    names: Collection[str],
    batches: Sequence[Batch],
    parts: Mapping[str, tuple[int, ...]],
    constant: Collection[str],
) -> dict[str, InputRange]:
    """The ranges of layers' inputs on recorded calls of a model; layers that are not called are left out.

    Args:
        names: of layers; those of other kinds than :data:`READS` have no range.
        parts: layer -> channels of its input's parts that have ranges of their own.
        constant: layers whose first token is a constant.
    """
    ranges: dict[str, InputRange] = {}

    def note(name: str, module: nn.Module, x: Tensor) -> None:
        moved = _channels_last(module, x)
        if name not in ranges:
            ranges[name] = InputRange(parts.get(name, (moved.shape[-1],)), name in constant and moved.dim() == 3)
        ranges[name].update(moved)

    with told_inputs(_layers(model, names), note):
        for batch in batches:
            model(**without_cache(model, batch))
    return ranges


@contextmanager
def quantized_inputs(
    model: nn.Module, bits: Mapping[str, int | None], ranges: Mapping[str, InputRange]
) -> Iterator[None]:
    """Within it these layers read rounded inputs; None, or no range: as they come."""

    def rounded(name: str, module: nn.Module, x: Tensor) -> Tensor | None:
        width, known = bits[name], ranges.get(name)
        if width is None or known is None:
            return None
        return _channels_first(module, known.rounded(_channels_last(module, x), width))

    with told_inputs(_layers(model, bits), rounded):
        yield


def _layers(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    modules = {name: model.get_submodule(name) for name in names}
    return {name: module for name, module in modules.items() if isinstance(module, READS)}


def _channels_last(module: nn.Module, x: Tensor) -> Tensor:
    return x if isinstance(module, nn.Linear) else x.movedim(1, -1)


def _channels_first(module: nn.Module, x: Tensor) -> Tensor:
    return x if isinstance(module, nn.Linear) else x.movedim(-1, 1)
