"""The contract with each library: every private or undocumented name that compat/ relies on does what it is used for.

When a release moves one, the test that fails names it.
"""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import nn

from tests.matrix.models import MODELS


def test_transformers_registries_map_names_to_classes() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    assert "bitsandbytes_4bit" in AUTO_QUANTIZER_MAPPING and "bitsandbytes_4bit" in AUTO_QUANTIZATION_CONFIG_MAPPING


def test_transformers_calls_the_quantizers_hooks() -> None:
    """Each method that the adapter overrides is called by transformers under this name."""
    from transformers import core_model_loading, modeling_utils
    from transformers.quantizers import base

    loading = inspect.getsource(core_model_loading)
    for name in ("param_needs_quantization", "get_quantize_ops", "quantization_operation", "convert"):
        assert name in loading, name
    modeling = inspect.getsource(modeling_utils)
    for name in ("preprocess_model", "postprocess_model", "is_serializable", "_is_hf_initialized"):
        assert name in modeling, name
    for name in ("_process_model_before_weight_loading", "_process_model_after_weight_loading", "_dequantize"):
        assert hasattr(base.HfQuantizer, name), name
    assert callable(base._assign_is_quantized)


def test_transformers_conversion_op_is_called_with_names_and_model() -> None:
    from transformers.core_model_loading import ConversionOps

    parameters = inspect.signature(ConversionOps.convert).parameters
    assert "input_dict" in parameters and any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_transformers_names_tied_weights() -> None:
    assert MODELS["llama_tied"].build().all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert MODELS["llama"].build().all_tied_weights_keys == {}


def test_transformers_names_float32_modules_and_prefix() -> None:
    from transformers import T5ForConditionalGeneration

    assert "wo" in T5ForConditionalGeneration._keep_in_fp32_modules
    assert MODELS["gpt2"].build().base_model_prefix == "transformer"


def test_transformers_marks_what_it_loaded(tmp_path: Path) -> None:
    """The mark by which a missing tensor is told from a loaded one."""
    model = MODELS["llama"].load(MODELS["llama"].create(tmp_path / "llama"))
    assert all(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())


def test_transformers_compiles_where_it_is_told_to() -> None:
    from transformers import CompileConfig
    from transformers.generation import GenerationMixin

    assert CompileConfig()._compile_all_devices is None
    assert "compile_config._compile_all_devices" in inspect.getsource(GenerationMixin)


def test_transformers_experts_have_the_layout_that_is_packed() -> None:
    from hf_lowbit.nn import kind_of

    experts = MODELS["qwen3_moe"].build().model.layers[0].mlp.experts
    assert kind_of(experts) == "experts"
    for name in ("is_transposed", "has_bias", "has_gate", "is_concatenated"):
        assert hasattr(experts, name), name
    assert type(experts)._apply_gate.__name__ == "_default_apply_gate"


def test_transformers_conv1d_is_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(6, 4)
    assert (module.nf, module.nx, tuple(module.weight.shape)) == (6, 4, (4, 6))


def test_diffusers_registries_and_hooks() -> None:
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from diffusers.quantizers.base import DiffusersQuantizer

    assert "bitsandbytes_4bit" in AUTO_QUANTIZER_MAPPING and "bitsandbytes_4bit" in AUTO_QUANTIZATION_CONFIG_MAPPING
    hooks = ("check_if_quantized_param", "create_quantized_param", "update_missing_keys", "_dequantize")
    for name in (*hooks, "_process_model_before_weight_loading", "_process_model_after_weight_loading"):
        assert hasattr(DiffusersQuantizer, name), name


def test_diffusers_model_attributes() -> None:
    model = MODELS["unet"].build()
    assert hasattr(type(model), "_keep_in_fp32_modules") and callable(model.register_to_config)
    assert "sample_size" in model._internal_dict


def test_peft_looks_its_dispatcher_up_when_it_is_needed() -> None:
    """Replacing the module's name changes which layer LoRA puts in."""
    import peft.tuners.lora.model as lora_model
    from peft import LoraConfig, get_peft_model

    seen = []
    original = lora_model.dispatch_default

    def spy(target: nn.Module, *arguments: object, **keywords: object) -> object:
        seen.append(target)
        return original(target, *arguments, **keywords)

    lora_model.dispatch_default = spy
    try:
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    finally:
        lora_model.dispatch_default = original
    assert len(seen) == 1 and isinstance(seen[0], nn.Linear)


def test_torch_int_mm_multiplies_int8() -> None:
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((3, 7), (7, 5)))
    assert torch.equal(torch._int_mm(a, b), a.int() @ b.int())
