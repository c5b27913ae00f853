"""Scales of static inputs: found on the data of a block whose layers are packed.

The block runs once more; what its layers then multiply, transformed and without the columns that are kept exact, has
the range that the scale must cover. In that run every call has a scale of its own, so that no layer sees inputs which
another's guess has clipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.parallel import combine
from hf_lowbit.formats import PackedTensor
from hf_lowbit.nn import LayerSpec, PackedModule
from hf_lowbit.plan import packed_modules

UNKNOWN_RANGE = "static inputs that are not finite, or zero, or missing on the calibration data: dynamic scales instead"
_BINS = 1 << 15  # magnitudes by the upper half of their bits, without the sign: bfloat16 numbers


class InputRange:
    """Distribution of |x| over all inputs of a layer: a :class:`hf_lowbit.calibration.statistics.Statistic`.

    Magnitudes are counted by their first 15 bits, so that a percentile is exact to 1/128 of itself, and the same
    however the data is shared among batches and processes. [ours; Quamba averages percentiles of samples]
    """

    def __init__(self, percentile: float, device: torch.device | None = None) -> None:
        self.tokens = 0
        self._percentile = percentile
        self._largest = torch.zeros(1, device=device)
        self._counts = torch.zeros(_BINS if percentile < 100 else 0, dtype=torch.int64, device=device)

    def update(self, x: Tensor) -> None:
        """Take in ``[..., columns]``."""
        if not x.numel():
            return
        self.tokens += x.numel() // x.shape[-1]
        magnitude = x.detach().float().abs()
        self._largest = torch.maximum(self._largest, magnitude.max())
        if self._counts.numel():
            self._counts += torch.bincount(magnitude.view(torch.int32).reshape(-1) >> 16, minlength=_BINS)

    def summed(self) -> list[Tensor]:
        return [self._counts] if self._counts.numel() else []

    def largest(self) -> list[Tensor]:
        return [self._largest]

    @property
    def limit(self) -> Tensor:
        """The magnitude that the percentile asks for, at most the largest; float32, a scalar."""
        largest = self._largest[0]
        if not self._counts.numel():
            return largest
        up_to = self._counts.cumsum(0).double()
        index = torch.searchsorted(up_to, up_to[-1:] * self._percentile / 100).clamp(max=_BINS - 2)
        bound = ((index.to(torch.int32) + 1) << 16).view(torch.float32)[0]  # the end of the bin
        return torch.minimum(bound, largest)


@torch.no_grad()
def set_static_inputs(block: Block, percentile: float = 100.0) -> None:
    """Give the packed layers of a block their input scales; those of no usable range get dynamic ones, and a note.

    Layers that read one input see the same values, and so have the same scale.

    Args:
        percentile: of |input| that the scale covers; 100: all of it.
    """
    modules = {name: m for name, m in packed_modules(block.module).items() if m.has_static_inputs}
    if not modules:
        return
    ranges = {
        (name, parameter): InputRange(percentile, block.device)
        for name, module in modules.items()
        for parameter in module.packed_parameters
    }
    with _observed(modules, ranges):
        for batch in range(len(block)):
            block.run(batch)
    combine(ranges.values())
    for name, module in modules.items():
        limits = {parameter: ranges[name, parameter].limit for parameter in module.packed_parameters}
        if not all(bool(torch.isfinite(limit)) and limit > 0 for limit in limits.values()):
            module.layer_spec = with_dynamic_inputs(module.layer_spec)
            for parameter in module.packed_parameters:
                block.note(f"{name}.{parameter}" if name else parameter, UNKNOWN_RANGE)
            continue
        activation = module.layer_spec.activation
        assert activation is not None
        for parameter, limit in limits.items():
            module.set_input_scale(parameter, limit / activation.limit)


def with_dynamic_inputs(spec: LayerSpec) -> LayerSpec:
    """The specification with scales that are made as inputs come, where it has static ones."""
    if spec.activation is None or not spec.activation.static:
        return spec
    return replace(spec, activation=replace(spec.activation, static=False))


@contextmanager
def _observed(modules: Mapping[str, PackedModule], ranges: Mapping[tuple[str, str], InputRange]) -> Iterator[None]:
    """Within it the modules' products update the ranges of their inputs."""
    try:
        for name, module in modules.items():
            own = {parameter: ranges[name, parameter] for parameter in module.packed_parameters}
            module.multiply = _Observed(module, own)  # type: ignore[method-assign]
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("multiply", None)


class _Observed:
    """In the place of :meth:`QuantizedInputs.multiply`."""

    def __init__(self, module: PackedModule, ranges: Mapping[str, InputRange]) -> None:
        self._multiply, self._ranges = module.multiply, ranges

    def __call__(self, x: Tensor, packed: PackedTensor, name: str = "weight", expert: int | None = None) -> Tensor:
        self._ranges[name].update(x)
        return self._multiply(x, packed, name, expert)
