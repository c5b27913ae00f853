"""Which models can be exported: every reason against one is found before anything is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_lowbit.export.scheme import PACKED, ExportError, Scheme, scheme_of
from hf_lowbit.formats.packed import scales
from hf_lowbit.integrations.adapters import adapter_names
from hf_lowbit.nn import PackedEmbedding, PackedExperts, PackedLinear, PackedModule, kind_of
from hf_lowbit.plan import packed_modules
from hf_lowbit.state import state_of

_KINDS = (PackedLinear, PackedEmbedding, PackedExperts)


def check_model(model: Any) -> dict[str, Scheme]:
    """Module name -> scheme of every packed module.

    Raises:
        ExportError: naming the first layer that cannot be exported, and why.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ExportError(f"a quantized transformers model can be exported, not a {type(model).__name__}")
    if state_of(model) is None:
        raise ExportError(f"this {type(model).__name__} is not quantized by hf_lowbit: there is nothing to export")
    if names := sorted(adapter_names(model)):
        raise ExportError(f"the format cannot hold the model's adapters ({', '.join(names)}): merge them first")
    modules = packed_modules(model)
    for name, module in model.named_modules():
        if name not in modules and kind_of(module) == PackedExperts.kind:
            raise ExportError(f"{name}: transformers reads the experts of such a model as packed, and these are floats")
    schemes = {}
    for name, module in modules.items():
        try:
            schemes[name] = scheme_of(module.layer_spec)
            _check_module(module, schemes[name], model.dtype)
        except ExportError as error:
            raise ExportError(f"{name}: {error}") from None
    _check_together(modules, schemes)
    return schemes


def is_uniform(schemes: dict[str, Scheme]) -> bool:
    """One scheme for all layers, and float inputs.

    Then transformers can decode each weight as it reads it; otherwise layers decode themselves at the first forward.
    """
    return len(set(schemes.values())) == 1 and not next(iter(schemes.values())).quantized_input


def _check_module(module: PackedModule, scheme: Scheme, dtype: torch.dtype) -> None:
    if type(module) not in _KINDS:
        raise ExportError(f"the format has linear layers, embeddings and experts, no layer of kind {module.kind!r}")
    for parameter in module.packed_parameters:
        packed = module.packed(parameter)
        if packed.weight.is_meta:
            raise ExportError("it is offloaded or on the meta device; load the model whole")
        values = scales(packed)
        if not torch.equal(values.to(dtype).float(), values):
            raise ExportError(
                f"its {module.layer_spec.weight.scale_dtype} scales are not exact in the model's own type, "
                f"{str(dtype).removeprefix('torch.')}, in which readers keep them: load the model with "
                "dtype=torch.float32 and export that, or quantize with another scale_dtype"
            )
    if isinstance(module, PackedExperts) and (scheme.quantized_input or not scheme.symmetric):
        what = "quantized inputs" if scheme.quantized_input else "zero points"
        raise ExportError(f"transformers reads fused experts of this format without their {what}")


def _check_together(modules: dict[str, PackedModule], schemes: dict[str, Scheme]) -> None:
    """What depends on the other layers: transformers' reader has gaps where layers differ."""
    experts = {schemes[name] for name, module in modules.items() if isinstance(module, PackedExperts)}
    if len(experts) > 1:
        raise ExportError(f"the model's experts have {len(experts)} formats; transformers reads one for all of them")
    if is_uniform(schemes):
        return
    for name, module in modules.items():
        if isinstance(module, PackedEmbedding):
            what = "packed embeddings"
        elif schemes[name].storage == PACKED and not schemes[name].symmetric:
            what = "packed zero points"
        else:
            continue
        raise ExportError(
            f"{name}: transformers reads {what} only where all quantized layers have one format, and float inputs"
        )


def unquantized_matrices(model: nn.Module, embeddings: bool) -> list[str]:
    """Names of modules that keep a float matrix ``weight``, as an "ignore" list has them."""
    packed = packed_modules(model)
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if name in packed or weight is None or weight.dim() != 2:
            continue
        if embeddings or not isinstance(module, nn.Embedding):
            names.append(name)
    return names
