"""The ``quantization_config`` that compressed-tensors, transformers and vLLM read."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from torch import nn

from hf_lowbit.export.model import is_uniform, unquantized_matrices
from hf_lowbit.export.scheme import MIXED, ExportError, Scheme
from hf_lowbit.nn import PackedEmbedding, PackedExperts
from hf_lowbit.plan import packed_modules


def quantization_config(model: nn.Module, schemes: dict[str, Scheme]) -> dict[str, Any]:
    """The config of a model whose modules have these schemes.

    One scheme is targeted at the class "Linear" (and "Embedding"), and float layers are listed under "ignore". Several
    are targeted at the exact names of their modules: vLLM looks for classes before it looks into the layers it fuses,
    so that a class would hide the names. "dequantize" asks transformers to decode each weight as it reads it, which it
    does for one scheme only; it is then the one way that covers zero points and embeddings. Other readers ignore it.

    Raises:
        ExportError: the installed compressed-tensors does not accept the config.
    """
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig

    modules = packed_modules(model)
    embeddings = any(isinstance(module, PackedEmbedding) for module in modules.values())
    distinct = list(dict.fromkeys(schemes.values()))
    groups = {}
    for index, scheme in enumerate(distinct):
        if len(distinct) == 1:
            targets = ["Linear", "Embedding"] if embeddings else ["Linear"]
        else:
            targets = [_target(name, modules[name]) for name in schemes if schemes[name] == scheme]
        groups[f"group_{index}"] = {"targets": targets, **scheme.to_dict()}
    storage = {scheme.storage for scheme in distinct}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "format": storage.pop() if len(storage) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": unquantized_matrices(model, embeddings),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    try:
        QuantizationConfig.model_validate(config)
    except ValidationError as error:
        problem = " ".join(str(error).split())
        raise ExportError(f"the installed compressed-tensors does not take the config: {problem}") from None
    return {**config, "dequantize": True} if is_uniform(schemes) else config


def _target(name: str, module: nn.Module) -> str:
    """Fused experts are single linear layers on disk: transformers and vLLM find their group by such a pattern."""
    if isinstance(module, PackedExperts):
        return "re:" + name.replace(".", r"\.") + r"\.[0-9]+\..*"
    return name
