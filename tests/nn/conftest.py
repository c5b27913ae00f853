"""Packed modules made as quantization makes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from hf_lowbit.method import Recipe
from hf_lowbit.nn import LayerSpec, PackedModule, kind_of
from hf_lowbit.nn.kinds import KINDS
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.tensorwise import Outcome, quantize_parameter

Pack = Callable[[nn.Module, LayerSpec], PackedModule]


@pytest.fixture
def pack() -> Pack:
    """Quantize a float module by rounding to nearest; the float module stays as it is."""

    def quantized(module: nn.Module, spec: LayerSpec) -> PackedModule:
        kind = kind_of(module)
        assert kind is not None
        packed = KINDS[kind].from_float(module, spec)
        for name in packed.packed_parameters:
            packed.allocate(name, packed=False)
            quantize_parameter(packed, name, getattr(packed, name), Recipe(round_to_nearest), "layer", Outcome())
        return packed.eval()

    return quantized
