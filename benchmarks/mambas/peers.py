"""torchao and bitsandbytes, through transformers."""

from __future__ import annotations

from typing import Any

import torch

from mambas.rows import Row


def peer_arguments(row: Row) -> dict[str, Any]:
    """Of ``from_pretrained``. Raises ImportError where the peer is not installed."""
    skip = row.fields.get("skip")
    if row.method == "torchao":
        from transformers import TorchAoConfig

        return {"quantization_config": TorchAoConfig(_torchao(row.fields), modules_to_not_convert=skip)}
    import bitsandbytes  # noqa: F401  transformers would speak of accelerate, too
    from transformers import BitsAndBytesConfig

    if row.fields["weights"] == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=skip,
        )  # fmt: skip
    return {"quantization_config": config, "device_map": "cpu"}


def _torchao(fields: dict[str, Any]) -> Any:
    """Its int4 weights for CPUs are a prototype."""
    from torchao import quantization

    if fields["weights"] == "int4":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=64)
    if "activations" in fields:
        return quantization.Int8DynamicActivationInt8WeightConfig()
    return quantization.Int8WeightOnlyConfig()
