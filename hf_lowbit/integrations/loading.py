"""Opening, adopting and saving models of either library: what the engine needs to know of them."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.integrations import transformers as transformers_adapter
from hf_lowbit.integrations.compat import transformers as compat
from hf_lowbit.integrations.origin import name_or_path
from hf_lowbit.integrations.saving import attach_saving
from hf_lowbit.plan import ModelFacts
from hf_lowbit.state import state_of

logger = logging.getLogger("hf_lowbit")

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DENOISERS = ("unet", "transformer", "transformer_2", "prior")


def load_quantized(source: str | Path, config: LowbitConfig | None = None, components: list[str] | None = None) -> Any:
    """Load a folder or repository, quantizing it while it loads if a config is given.

    A pipeline comes back as a pipeline, anything else as the class its config names.

    Raises:
        ConfigError: the folder is neither a transformers nor a diffusers model, or lacks a named component.
    """
    if is_pipeline(source):
        return _load_pipeline(source, config, components)
    if components:
        raise ConfigError(f"{source} is not a pipeline: it has no components {', '.join(components)}")
    stored = read_json(source, "config.json")
    if stored is None:
        raise ConfigError(f"{source} has no config.json or model_index.json: it is no transformers or diffusers model")
    arguments = {} if config is None else {"quantization_config": config}
    if "_class_name" in stored:
        from diffusers import AutoModel

        return AutoModel.from_pretrained(str(source), torch_dtype=stored_dtype(source), **arguments)
    return model_class_of(stored).from_pretrained(source, dtype="auto", **arguments)


def model_class_of(stored: dict[str, Any]) -> Any:
    """The class that a config.json of transformers names, or AutoModel."""
    import transformers

    architectures = stored.get("architectures") or []
    model_class = getattr(transformers, architectures[0], None) if architectures else None
    return model_class or transformers.AutoModel


def pipeline_components(pipeline: Any, components: list[str] | None = None) -> list[str]:
    """Names of the parts of a pipeline to quantize: those asked for, or its denoisers.

    Raises:
        ConfigError: not a pipeline, or it lacks such a part.
    """
    parts = getattr(pipeline, "components", None)
    if not isinstance(parts, dict):
        raise ConfigError(f"a module, pipeline, folder or repository is needed, not a {type(pipeline).__name__}")
    models = [name for name, part in parts.items() if isinstance(part, nn.Module)]
    return _choose(models, components)


def is_pipeline(source: str | Path) -> bool:
    """True for a folder or repository of a diffusers pipeline."""
    return read_json(source, "model_index.json") is not None


def stored_components(source: str | Path, components: list[str] | None = None) -> list[str]:
    """:func:`pipeline_components` of a folder or repository, by its index: no weight is read.

    Raises:
        ConfigError: it lacks such a part.
    """
    index = read_json(source, "model_index.json") or {}
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    return _choose([name for name, entry in parts.items() if entry[0] in ("diffusers", "transformers")], components)


def model_facts(model: nn.Module, shared: tuple[frozenset[str], ...]) -> ModelFacts:
    """Facts of a live model: transformers' own where it is one, and the weights that modules share."""
    if _is_transformers(model):
        facts = transformers_adapter.facts_of(model)
        return replace(facts, tied=shared or facts.tied)
    if _is_diffusers(model):
        from hf_lowbit.integrations import diffusers as diffusers_adapter

        return replace(diffusers_adapter.facts_of(model), tied=shared)
    return ModelFacts(tied=shared)


def forget_ties(model: nn.Module) -> Callable[[], None]:
    """Have a model saved and loaded with weights apart that are shared no more; returns what undoes it."""
    return compat.forget_ties(model) if _is_transformers(model) else lambda: None


def adopt(model: nn.Module, config: LowbitConfig) -> None:
    """Make a model that was quantized in place save and push like one that was quantized on loading."""
    if _is_transformers(model):
        transformers_adapter.adopt(model, config)
        attach_saving(model)
    elif _is_diffusers(model):
        from hf_lowbit.integrations import diffusers as diffusers_adapter

        diffusers_adapter.adopt(model, config)
        attach_saving(model)


def dequantize_model(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Make a quantized model a float one, in place; the library it belongs to forgets that it was quantized."""
    if _is_transformers(model):
        model.dequantize(*(() if dtype is None else (dtype,)))
    elif _is_diffusers(model):
        model.dequantize()
        if dtype is not None:
            model.to(dtype)
    else:
        floats = (p.dtype for p in model.parameters() if p.is_floating_point())
        transformers_adapter.dequantize_modules(model, dtype or next(floats, torch.float32))
    return model


def _load_pipeline(source: str | Path, config: LowbitConfig | None, components: list[str] | None) -> Any:
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    dtype = stored_dtype(source)  # one for all parts: transformers' and diffusers' own defaults differ
    if config is None:
        return DiffusionPipeline.from_pretrained(str(source), torch_dtype=dtype)
    chosen = stored_components(source, components)
    mapping = PipelineQuantizationConfig(quant_mapping=dict.fromkeys(chosen, config))
    pipeline = DiffusionPipeline.from_pretrained(str(source), quantization_config=mapping, torch_dtype=dtype)
    unquantized = [name for name in chosen if state_of(getattr(pipeline, name, None)) is None]
    if unquantized:
        raise ConfigError(f"components without a model to quantize: {', '.join(unquantized)}")
    return pipeline


def _choose(models: list[str], components: list[str] | None) -> list[str]:
    missing = [name for name in components or () if name not in models]
    if missing:
        raise ConfigError(f"the pipeline has no component {', '.join(missing)}; it has {', '.join(models)}")
    chosen = components or [name for name in DENOISERS if name in models]
    if not chosen:
        raise ConfigError(f"no denoiser among the components {', '.join(models)}; name the ones to quantize")
    return chosen


def read_json(source: str | Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a folder or repository; None if it has none."""
    from transformers.utils import cached_file

    path = Path(source) / name
    if Path(source).is_dir():
        return json.loads(path.read_text()) if path.is_file() else None
    found = cached_file(
        str(source), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=True
    )
    return None if found is None else json.loads(Path(found).read_text())


def processing_of(model: nn.Module) -> Any:
    """The tokenizer or processor that lies beside the weights a transformers model was loaded from.

    Raises:
        ConfigError: the model was not loaded from a folder or repository, or there is none.
    """
    source = name_or_path(model)
    if not source:
        raise ConfigError("the model was not loaded from a folder or repository, so that its tokenizer is unknown")
    from transformers import AutoProcessor, AutoTokenizer

    for loader in (AutoProcessor, AutoTokenizer):
        try:
            return loader.from_pretrained(source)
        except (OSError, ValueError, ImportError, KeyError):
            continue
    raise ConfigError(f"no tokenizer or processor loads from {source}")


def stored_dtype(source: str | Path) -> torch.dtype:
    """The floating type that most weights of a local diffusers folder have; float32 for a repository."""
    counts: Counter[str] = Counter()
    for path in Path(source).glob("**/*.safetensors"):
        with safe_open(path, "pt") as file:
            counts.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    floats = [name for name, _ in counts.most_common() if name in _FLOATS]
    return _FLOATS[floats[0]] if floats else torch.float32


def _is_transformers(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _is_diffusers(model: nn.Module) -> bool:
    if "diffusers" not in sys.modules:
        return False
    from diffusers import ModelMixin

    return isinstance(model, ModelMixin)
