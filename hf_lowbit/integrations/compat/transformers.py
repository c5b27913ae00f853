"""Private and undocumented names of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# transformers: the base of the op that is run on each tensor while a checkpoint loads.
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

__all__ = [
    "AUTO_QUANTIZATION_CONFIG_MAPPING",
    "AUTO_QUANTIZER_MAPPING",
    "ConversionOps",
    "HfQuantizer",
    "base_model_prefix",
    "compile_everywhere",
    "forget_ties",
    "keep_in_fp32",
    "mark_initialized",
    "mark_quantized",
    "name_or_path",
    "output_embeddings",
    "tie_companions",
    "tied_weights",
    "was_loaded",
    "with_companions",
]


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the parameter it shares storage with (``all_tied_weights_keys``)."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tie_companions(model: nn.Module, target: str, source: str) -> None:
    """Make transformers tie one more pair of parameters, and leave the first out of saved files."""
    keys: Any = model.all_tied_weights_keys
    keys[target] = source


def forget_ties(model: nn.Module) -> Callable[[], None]:
    """Make transformers save and load apart what shares no weight any more; returns what undoes it."""
    keys: Any = getattr(model, "all_tied_weights_keys", None)
    if not keys:
        return lambda: None
    before = dict(keys)
    for target, source in before.items():
        one, other = (model.get_submodule(name.rpartition(".")[0]) for name in (target, source))
        if getattr(one, "weight", None) is not getattr(other, "weight", None):
            del keys[target]
    config: Any = model.config
    configs = [c for c in {id(c): c for c in (config, config.get_text_config())}.values() if len(keys) < len(before)]
    tied = [(c, c.tie_word_embeddings) for c in configs if hasattr(c, "tie_word_embeddings")]
    for c, _ in tied:
        c.tie_word_embeddings = False

    def undo() -> None:
        keys.update(before)
        for c, value in tied:
            c.tie_word_embeddings = value

    return undo


def keep_in_fp32(model: nn.Module) -> tuple[str, ...]:
    """Patterns of modules that a transformers model keeps in float32."""
    names: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    strict: Any = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return tuple({*names, *strict})


def base_model_prefix(model: nn.Module) -> str:
    """Prefix under which a model with a head holds its base ("model", "transformer"), or ""."""
    return str(getattr(model, "base_model_prefix", "") or "")


def mark_quantized(model: nn.Module, quantizer: HfQuantizer) -> None:
    """Set the attributes by which transformers knows a quantized model, as ``from_pretrained`` does."""
    from transformers.quantizers.base import _assign_is_quantized

    config = quantizer.quantization_config
    attributes = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": config.quant_method}
    for name, value in attributes.items():
        object.__setattr__(model, name, value)
    model_config: Any = model.config
    model_config.quantization_config = config
    _assign_is_quantized(model)


def compile_everywhere(config: Any) -> None:
    """Make `generate` compile its step with this CompileConfig on a CPU, too: transformers does on GPUs alone."""
    config._compile_all_devices = True


def name_or_path(model: Any) -> str:
    """Folder or repository that a model was loaded from."""
    return str(model.config.name_or_path)


def output_embeddings(model: Any) -> nn.Module | None:
    """A model's output projection; None for models without one."""
    module: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return module


def mark_initialized(module: nn.Module) -> None:
    """Keep transformers from drawing random numbers into a module whose weights it has not seen arrive (offload)."""
    object.__setattr__(module, "_is_hf_initialized", True)


def was_loaded(parameter: nn.Parameter) -> bool:
    """True for a parameter that came from the checkpoint, or lies offloaded on disk."""
    return parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)


def with_companions(conversions: list[Any], suffixes: tuple[str, ...]) -> list[Any]:
    """For transformers before 5.21: converters of ``*.weight`` that also merge and split the companions.

    The copies are kept for saving although loading floats does not use them, and splitting keeps dimensions of one.
    """
    from transformers.core_model_loading import WeightConverter

    expanded = []
    for conversion in conversions:
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        if not isinstance(conversion, WeightConverter) or not all(source.endswith(".weight") for source in sources):
            expanded.append(conversion)
            continue
        for suffix in ("", *suffixes):
            longer = [source + suffix for source in sources], [target + suffix for target in targets]
            companion = WeightConverter(*longer, operations=[_exactly_split(op) for op in conversion.operations])
            companion._was_used = bool(suffix)
            expanded.append(companion)
    return expanded


def _exactly_split(operation: ConversionOps) -> ConversionOps:
    """The operation, or one that merges experts and splits them again without dropping other dimensions of one."""
    from transformers.core_model_loading import MergeModulelist, SplitModulelist

    if type(operation) is not MergeModulelist:
        return operation

    class Split(SplitModulelist):
        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **keywords: Any) -> Any:  # type: ignore[override]
            stacked = [value[0] if isinstance(value, list) else value for value in input_dict.values()]
            convert: Any = super().convert
            parts = convert(input_dict, source_patterns, target_patterns, **keywords)
            per_stack = len(parts) // len(stacked)
            return {
                name: part.reshape(stacked[i // per_stack].shape[1:]) for i, (name, part) in enumerate(parts.items())
            }

        @property
        def reverse_op(self) -> ConversionOps:
            return Merge(self.dim)

    class Merge(MergeModulelist):
        @property
        def reverse_op(self) -> ConversionOps:
            return Split(self.dim)

    return Merge(operation.dim)
