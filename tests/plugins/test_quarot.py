"""QuaRot: the numbered tests of its method page that concern weights and inputs, and what becomes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_lowbit
import hf_lowbit_quarot.recipe
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.rotating import rotate_stream
from hf_lowbit.config import ConfigError, LowRankConfig
from hf_lowbit.nn import Hadamard
from hf_lowbit.plan import packed_modules
from hf_lowbit_quarot import QuaRotConfig
from hf_lowbit_quarot.recipe import transform_inputs
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import (
    logit_error,
    one_token,
    outlier_llama,
    outputs_of,
    quantized,
    relative,
    tiny_moe,
    token_batches,
    walk,
)

CHANNELS = torch.arange(0, 128, 16)


def wide_llama(stream: float = 30.0) -> LlamaForCausalLM:
    """Eight channels of the stream are thirty times as large as the others."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes)).eval()
    model.model.embed_tokens.weight.data[:, CHANNELS] *= stream
    for layer in model.model.layers:  # else the stream is next to nothing but the embedding
        layer.mlp.down_proj.weight.data *= 10
        layer.self_attn.o_proj.weight.data *= 10
    return model


@torch.no_grad()
def inputs_of(model: nn.Module) -> Tensor:
    """What the query projections read, ``[tokens, 128]``."""
    read: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args: read.append(args[0].reshape(-1, 128)))
        for name, module in model.named_modules()
        if name.endswith("q_proj")
    ]
    for batch in token_batches():
        model(**batch)
    for handle in handles:
        handle.remove()
    return torch.cat(read)


# 3, 4
def test_inputs_lose_their_outliers() -> None:
    def peak(x: Tensor) -> float:
        return float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean())

    def kurtosis(x: Tensor) -> float:
        return float((x**4).mean() / x.square().mean() ** 2)

    model = wide_llama()
    before = inputs_of(model)
    rotate_stream(model, token_batches(1))
    after = inputs_of(model)
    assert peak(before) > 6 and peak(after) < 4
    assert kurtosis(before) > 15 and 2 < kurtosis(after) < 3.5


# 5
def test_blocks_compute_the_same_with_what_is_rotated_online() -> None:
    """Float weights that were rewritten for the transforms read transformed inputs."""
    model, config = outlier_llama(), QuaRotConfig()
    done = rotate_stream(model, token_batches(1))
    seen = []

    def step(block: Block) -> None:
        before = outputs_of(block)
        assert transform_inputs(block, done.readers, config) == []
        for matrix in block.matrices.values():
            layer: Any = matrix.skeleton
            if layer.layer_spec.transform is None:
                continue
            seen.append(layer.layer_spec.transform)
            block.module.get_submodule(matrix.layer).weight.data = matrix.weight.clone()
            hook = lambda m, args, layer=layer: (layer.transformed(args[0]),)  # noqa: E731
            block.module.get_submodule(matrix.layer).register_forward_pre_hook(hook)
        assert relative(outputs_of(block), before) < 1e-5

    walk(model, step, config=config)
    assert seen == [Hadamard(4, 16), Hadamard(96)] * 2, "o_proj across its heads, down_proj"


# 7
def test_four_bits_lose_a_tenth_of_what_they_lose_unrotated() -> None:
    """Channels that every norm makes sixty times as large, and every reader weighs as much less."""

    def model() -> LlamaForCausalLM:
        made = wide_llama(stream=1.0)
        for layer in made.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.data[CHANNELS] *= 60
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
                layer.get_submodule(name).weight.data[:, CHANNELS] /= 60
        return made

    reference = model()
    ours = logit_error(quantized(model(), QuaRotConfig(weights="nearest", search_clip=False)), reference)
    plain = hf_lowbit.GPTQConfig(bits=4, group_size=None, activation_bits=4)
    assert ours < 0.1 * logit_error(quantized(model(), plain), reference)


def test_gptq_and_a_searched_range_lose_less_than_rounding_to_nearest() -> None:
    reference = outlier_llama()
    ours, nearest = (
        logit_error(quantized(outlier_llama(), QuaRotConfig(bits=3, activation_bits=8, **values)), reference)
        for values in ({}, {"weights": "nearest", "search_clip": False})
    )
    assert ours < 0.8 * nearest


@pytest.mark.parametrize("method", ["gptq", "signround"])
def test_other_methods_rotate_on_request(method: str) -> None:
    config_class = hf_lowbit.methods()[method].config_class
    short = {"iterations": 2} if method == "signround" else {}
    model = quantized(outlier_llama(), config_class(bits=3, group_size=32, rotate=True, **short))
    assert any("stream is rotated" in warning for warning in hf_lowbit.report(model).warnings)
    assert all(module.layer_spec.transform is None for module in packed_modules(model).values())
    assert bool((model.model.layers[0].input_layernorm.weight == 1).all())
    with pytest.raises(ConfigError, match="rotate must be True or False, not 1"):
        config_class(rotate=1)


def test_weights_alone_need_no_transforms() -> None:
    model = quantized(outlier_llama(), QuaRotConfig(activation_bits=None))
    assert all(module.layer_spec.transform is None for module in packed_modules(model).values())
    asked = quantized(outlier_llama(), QuaRotConfig(activation_bits=None, online=True))
    assert packed_modules(asked)["model.layers.0.mlp.down_proj"].layer_spec.transform == Hadamard(96)


def test_experts_have_no_transforms_and_are_noted_once() -> None:
    notes = hf_lowbit.report(quantized(tiny_moe(), QuaRotConfig(), one_token())).warnings
    why = "layers of its kind have no transforms: its inputs are quantized as they are"
    assert [note for note in notes if why in note] == [
        f"model.layers.{i}.mlp.experts.down_proj: {why}" for i in range(2)
    ]


def test_a_model_that_cannot_be_rotated_gets_transforms_alone() -> None:
    model = MODELS["gpt2"].build().eval().transformer
    batch = MODELS["gpt2"].inputs(torch.float32)
    hf_lowbit.quantize(model, QuaRotConfig(dataset=[batch], num_samples=1))
    assert any("not rotated: the model returns its stream" in note for note in hf_lowbit.report(model).warnings)
    specs = {name: module.layer_spec.transform for name, module in packed_modules(model).items()}
    assert all(isinstance(transform, Hadamard) for transform in specs.values())
    assert specs["h.0.attn.c_attn"] == specs["h.0.attn.c_proj"] == Hadamard(64)


def test_the_decoder_of_whisper_is_rotated_and_its_encoder_transformed() -> None:
    model = MODELS["whisper"].build().eval()
    batch = MODELS["whisper"].inputs(torch.float32)
    hf_lowbit.quantize(model, QuaRotConfig(dataset=[batch], num_samples=1))
    assert any("the residual stream is rotated" in note for note in hf_lowbit.report(model).warnings)
    specs = {name: module.layer_spec.transform for name, module in packed_modules(model).items() if "layers" in name}
    assert specs["model.decoder.layers.0.self_attn.q_proj"] is None, "folded"
    assert specs["model.decoder.layers.0.encoder_attn.k_proj"] == Hadamard(64)
    assert specs["model.encoder.layers.0.self_attn.q_proj"] == Hadamard(64)


def test_a_tied_head_is_stored_apart(tmp_path: Path) -> None:
    model = MODELS["llama_tied"].build().eval()
    model.model.norm.weight.data.uniform_(0.5, 1.5)
    quantized(model, QuaRotConfig(weights="nearest"))
    assert any("lm_head is no longer tied" in note for note in hf_lowbit.report(model).warnings)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(reloaded) == fingerprint(model)
    assert not reloaded.config.tie_word_embeddings
    assert not torch.equal(reloaded.lm_head.weight, reloaded.model.embed_tokens.weight)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = MODELS["llama_tied"].build().eval()
    before, keys = fingerprint(model), dict(model.all_tied_weights_keys)

    def fail(block: Block, *args: Any) -> list[str]:
        if block.name == "model.layers.1":
            assert not model.config.tie_word_embeddings and fingerprint(model) != before
            raise RuntimeError("out of luck")
        return transform_inputs(block, *args)

    monkeypatch.setattr(hf_lowbit_quarot.recipe, "transform_inputs", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        quantized(model, QuaRotConfig())
    assert fingerprint(model) == before and not packed_modules(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings and model.all_tied_weights_keys == keys


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "rtn"}, "weights must be 'gptq' or 'nearest', not 'rtn'"),
        ({"damping": 0}, "damping must lie above 0 and not above 10, not 0"),
        ({"search_clip": 1}, "search_clip must be True or False, not 1"),
        ({"online": 0}, "online must be True, False or None, not 0"),
        ({"low_rank": LowRankConfig(4, keep="adapter")}, 'low_rank keep="adapter" would compute on inputs before'),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"QuaRotConfig: {message}"):
        QuaRotConfig(**values)
