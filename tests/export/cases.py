"""The combinations of format, model and type that can be exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import compressed_tensors

import hf_lowbit
from hf_lowbit.export.scheme import packs_densely
from tests.matrix.models import MODELS


@dataclass(frozen=True)
class Case:
    """A tiny model and how it is quantized.

    Attributes:
        storage: what ``format`` of the written config must be.
        groups: how many config groups it must have.
        config: fields of the RTNConfig.
        recent: whether only a transformers that decodes each weight as it reads it can load it.
        vllm: whether vLLM's loader is said to take it.
    """

    config: dict[str, Any]
    storage: str = "pack-quantized"
    groups: int = 1
    model: str = "llama"
    dtype: torch.dtype = torch.float32
    vllm: bool = True
    recent: bool = False

    def quantize(self, folder: Path) -> Any:
        """The quantized model; its float original is saved in ``folder``, and quantized while it loads."""
        torch.manual_seed(0)
        model = MODELS[self.model].build().to(self.dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder)
        return hf_lowbit.quantize(folder, hf_lowbit.RTNConfig(**self.config)).eval()


_W8A8 = {"bits": 8, "group_size": None, "activation_bits": 8}
_W4 = {"bits": 4, "group_size": 32, "activation_bits": None}
_EMBEDDINGS = {"quantize_embeddings": True, "quantize_lm_head": True}
_HALF, _BFLOAT = torch.float16, torch.bfloat16


def _int(bits: int, group_size: int | str | None, **fields: Any) -> dict[str, Any]:
    return {"bits": bits, "group_size": group_size, **fields}


def _asymmetric(bits: int, group_size: int | str | None, **fields: Any) -> dict[str, Any]:
    return _int(bits, group_size, symmetric=False, **fields)


def _mixed(pattern: str, bits: int, group_size: int | None) -> dict[str, Any]:
    return {"overrides": {pattern: {"bits": bits, "group_size": group_size}}}


_ALL = {
    "int4": Case(_int(4, 32)),
    "int4-asymmetric": Case(_asymmetric(4, 32)),
    "int8-row": Case(_int(8, None)),
    "int8-row-asymmetric": Case(_asymmetric(8, None)),
    "int8-tensor": Case(_int(8, "tensor")),
    "int8-tensor-asymmetric": Case(_asymmetric(8, "tensor")),
    "int2": Case(_int(2, 16)),
    "int3": Case(_int(3, 32)),
    "int3-asymmetric": Case(_asymmetric(3, 32), vllm=False),
    "int5-row-asymmetric": Case(_asymmetric(5, None), vllm=False),
    "int6-row": Case(_int(6, None)),
    "int7": Case(_int(7, 32)),
    "mixed-bits": Case(_int(4, 32, **_mixed(r".*\.down_proj", 8, 32)), groups=2),
    "mixed-groups": Case(_int(3, 32, **_mixed(r".*\.0\.mlp\..*", 6, None)), groups=2),
    "w8a8": Case(_W8A8, "int-quantized"),
    "w8a8-groups-asymmetric": Case({**_W8A8, **_asymmetric(8, 32)}, "int-quantized", vllm=False),
    "w4a8": Case({**_W8A8, "bits": 4}, "int-quantized", vllm=False),
    "w8a8-and-w4": Case({**_W8A8, "overrides": {r".*\.mlp\..*": _W4}}, "mixed-precision", 2),
    "embeddings": Case(_int(4, 32, **_EMBEDDINGS), vllm=False, recent=True),
    "embeddings-asymmetric": Case(_asymmetric(4, 32, **_EMBEDDINGS), vllm=False, recent=True),
    "tied": Case(_int(4, 32), model="llama_tied"),
    "tied-embeddings": Case(_int(8, None, **_EMBEDDINGS), model="llama_tied", vllm=False, recent=True),
    "bfloat16": Case(_int(4, 32), dtype=_BFLOAT),
    "bfloat16-asymmetric": Case(_asymmetric(8, 32), dtype=_BFLOAT),
    "bfloat16-w8a8": Case(_W8A8, "int-quantized", dtype=_BFLOAT),
    "float16": Case(_int(4, 32, scale_dtype="float16"), dtype=_HALF),
    "float32-scales": Case(_int(4, 32, scale_dtype="float32")),
    "experts": Case(_int(4, 32), model="qwen3_moe"),
    "experts-int3": Case(_int(3, None, scale_dtype="float32"), model="qwen3_moe"),
    "experts-mixed": Case(_int(4, 32, **_mixed(r".*\.self_attn\..*", 8, 32)), groups=2, model="qwen3_moe"),
    "mixed-experts": Case(_int(8, None, **_mixed(r".*\.experts", 4, 32)), groups=2, model="qwen3_moe"),
    "whisper": Case(_int(4, 32, modules_to_not_convert=["conv1", "conv2"]), model="whisper"),
    "mamba2": Case(_int(4, 32, modules_to_not_convert=["conv1d"]), model="mamba2", recent=True),
    "mamba2-ends": Case(
        _int(4, 32, modules_to_not_convert=["conv1d"], **_EMBEDDINGS), model="mamba2", vllm=False, recent=True
    ),
}
# The oldest compressed-tensors packs widths that do not divide 32 in another way, the oldest transformers decodes only
# after it has read everything: what they do not load is refused.
_DECODES_AS_IT_READS = hasattr(compressed_tensors, "CompressedTensorsDequantize")
CASES = {
    name: case
    for name, case in _ALL.items()
    if packs_densely(case.config["bits"]) and (_DECODES_AS_IT_READS or not case.recent)
}
