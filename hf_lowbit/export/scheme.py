"""Scheme: what compressed-tensors calls the format of a layer, and which of ours it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_lowbit.config import ConfigError
from hf_lowbit.formats import ActivationSpec
from hf_lowbit.nn import LayerSpec

PACKED, INTEGERS, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


class ExportError(ConfigError):
    """A model that the export's format cannot hold, or that its readers would not load as it is."""


@dataclass(frozen=True)
class Scheme:
    """Integer weights of one config group.

    Attributes:
        bits: 2 to 8.
        group_size: inputs that share a scale; None: a whole row ("channel").
        symmetric: False: with integer zero points.
        quantized_input: 8-bit inputs, a scale per token, made as they come.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    quantized_input: bool

    @property
    def storage(self) -> str:
        """The compression format: words of packed codes, or one int8 per weight where inputs are quantized too."""
        return INTEGERS if self.quantized_input else PACKED

    def to_dict(self) -> dict[str, Any]:
        """A config group without its targets."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
            "group_size": self.group_size,
            "dynamic": False,
        }
        token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        inputs = {**token, "group_size": None} if self.quantized_input else None
        return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": self.storage}


def scheme_of(spec: LayerSpec) -> Scheme:
    """The scheme of a layer. One scale for a whole tensor is written once per row.

    Raises:
        ExportError: with the reason, for everything that is not integers on a grid with integer zero points.
    """
    weight, activation = spec.weight, spec.activation
    extra = sorted(set(spec.to_dict()) - {"weight", "activation"})
    if "low_rank" in extra:
        raise ExportError('its low-rank branch has no place in the format; quantize with low_rank keep="fused"')
    if extra:
        raise ExportError(f"its {', '.join(extra)} has no place in the format")
    if weight.scale_bits is not None:
        raise ExportError("its scales are codes themselves (scale_bits), the format's are numbers: scale_bits=None")
    if weight.format != "int":
        raise ExportError(f"format {weight.format!r} is a table of values; the format holds integers only")
    if weight.bits == 1:
        raise ExportError("one bit stands for -1 and +1, which are no integers in a row; 2 to 8 bits can be exported")
    if not weight.symmetric and not weight.has_integer_zero_point:
        raise ExportError("its zero points are real numbers, the format's are integers: real_zero_point=False")
    if activation is not None and activation != ActivationSpec("int", 8):
        raise ExportError(
            f"its inputs are quantized to {activation}; of quantized inputs only int of 8 bits with a scale per "
            "token computes the same elsewhere"
        )
    if activation is None and not packs_densely(weight.bits):
        raise ExportError(
            f"the installed compressed-tensors does not pack {weight.bits}-bit codes in a dense stream; newer ones do"
        )
    group_size = weight.group_size if isinstance(weight.group_size, int) else None
    return Scheme(weight.bits, group_size, weight.symmetric, activation is not None)


def packs_densely(bits: int) -> bool:
    """Whether the installed compressed-tensors lets codes cross words, as hf_lowbit does; older ones do not."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), bits).shape[1] == bits
