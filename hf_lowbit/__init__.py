"""hf_lowbit: published low-bit methods for the Hugging Face ecosystem.

Importing makes transformers, diffusers and PEFT know every installed method: at once where the library's quantizers are
imported already, else the moment they are. Everything else is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from hf_lowbit.integrations.registration import register_all

__version__ = "0.1.0"

_LAZY = {
    "BlockWeights": "hf_lowbit.calibration.placement",
    "ConfigError": "hf_lowbit.config",
    "LowRankConfig": "hf_lowbit.config",
    "LowbitConfig": "hf_lowbit.config",
    "Method": "hf_lowbit.method",
    "MethodName": "hf_lowbit.config",
    "Recipe": "hf_lowbit.method",
    "Report": "hf_lowbit.reporting",
    "TuningConfig": "hf_lowbit.config",
    "add_elastic_connection": "hf_lowbit.integrations.elastic",
    "compare": "hf_lowbit.evaluation.pictures",
    "compile_config": "hf_lowbit.integrations.compiling",
    "dequantize": "hf_lowbit.quantization",
    "export_model": "hf_lowbit.export",
    "load": "hf_lowbit.plain",
    "methods": "hf_lowbit.method",
    "prepare_for_training": "hf_lowbit.integrations.peft",
    "push_to_hub": "hf_lowbit.integrations.hub",
    "quantize": "hf_lowbit.quantization",
    "remove_elastic_connection": "hf_lowbit.integrations.elastic",
    "report": "hf_lowbit.integrations.hub",
    "save": "hf_lowbit.plain",
    "search_bits": "hf_lowbit.search",
    "search_blocks": "hf_lowbit.search",
    "search_pipeline": "hf_lowbit.search.pipeline",
}

register_all(engine="hf_lowbit.engine:calibrate_loaded")


def __getattr__(name: str) -> Any:
    """Public names, and the config class of every installed method."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    from hf_lowbit.method import methods

    for method in methods().values():
        if method.config_class.__name__ == name:
            return method.config_class
    raise AttributeError(f"module 'hf_lowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    from hf_lowbit.method import methods

    return sorted([*globals(), *_LAZY, *(method.config_class.__name__ for method in methods().values())])
