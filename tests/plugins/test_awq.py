"""AWQ: the numbered tests of its method page, on a tiny Llama with outlier channels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit import AWQConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.scaling import search_scales
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import decode
from hf_lowbit.rounding import round_to_nearest
from tests.plugins.outliers import (
    IDLE,
    logit_error,
    one_token,
    outlier_llama,
    outputs_of,
    quantized,
    relative,
    tiny_moe,
    values_of,
    walk,
)

QKV = ("q_proj", "k_proj", "v_proj")


def search(block: Block, steps: int = 20) -> dict[str, float]:
    return search_scales(block, lambda key, weight: nearest(weight, block.matrices[key].spec), steps)


def nearest(weight: Tensor, spec: Any) -> Tensor:
    return decode(round_to_nearest(weight, spec))


# 1, 3, 8
def test_scales_are_normalised_folded_once_and_change_no_output() -> None:
    """The norm is divided once, though three layers read it, and each of them is multiplied by the same."""
    seen = []

    def step(block: Block) -> None:
        before, module = outputs_of(block), copy.deepcopy(block.module)
        chosen = search(block)
        assert relative(outputs_of(block), before) < 1e-5
        assert set(chosen) == {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}
        scale = module.input_layernorm.weight / block.module.input_layernorm.weight
        seen.append(float(scale.max() / scale.min()))
        assert float(scale.max() * scale.min()) == pytest.approx(1.0, rel=0.01)
        for name in QKV[:2]:
            old, new = (getattr(m.self_attn, name).weight for m in (module, block.module))
            torch.testing.assert_close(new, old * scale, rtol=1e-4, atol=1e-7)

    walk(outlier_llama(), step)
    assert min(seen) > 1.5, "outliers were to be found"


# 2
def test_the_chosen_scale_loses_no_more_than_none() -> None:
    """Measured apart from the search: the attention's output with its three inputs rounded, scaled or not."""
    gains = []

    def attention(block: Block, module: nn.Module) -> Tensor:
        outputs: list[Tensor] = []
        handle = module.self_attn.register_forward_hook(lambda m, args, output: outputs.append(output[0]))
        for batch in range(len(block)):
            args, kwargs = block.arguments(batch)
            module(*args, **kwargs)
        handle.remove()
        return torch.stack(outputs)

    def step(block: Block) -> None:
        plain = copy.deepcopy(block.module)
        expected = attention(block, plain)
        search(block)
        scaled = copy.deepcopy(block.module)
        scaled.self_attn.o_proj = plain.self_attn.o_proj
        scaled.self_attn.v_proj.weight = nn.Parameter(
            plain.self_attn.v_proj.weight * plain.input_layernorm.weight / scaled.input_layernorm.weight
        )  # before its own outputs were divided
        for module in (plain, scaled):
            for name in QKV:
                weight = getattr(module.self_attn, name).weight
                weight.data = nearest(weight, block.matrices[f"self_attn.{name}.weight"].spec)
        gains.append(relative(attention(block, plain), expected) / relative(attention(block, scaled), expected))

    walk(outlier_llama(), step)
    assert min(gains) > 1.1


# 5
def test_equal_channels_are_not_scaled() -> None:
    """The first norm reads +-1 in every channel, and its weights are 1."""
    model = outlier_llama()
    embedding = model.model.embed_tokens.weight.data
    embedding.copy_(torch.where(embedding > 0, 1.0, -1.0))
    model.model.layers[0].input_layernorm.weight.data.fill_(1.0)
    chosen = []

    def step(block: Block) -> None:
        chosen.append(search(block, 5)["input_layernorm"])
        if len(chosen) == 1:
            assert bool((block.module.input_layernorm.weight == 1).all())

    walk(model, step)
    assert chosen[0] == 0.0 and chosen[1] > 0.0


# 6
def test_outliers_cost_less_than_when_rounded_to_nearest() -> None:
    reference = outlier_llama()
    awq, scaled, rtn = (
        logit_error(quantized(outlier_llama(), config), reference)
        for config in (
            AWQConfig(bits=3, group_size=32),
            AWQConfig(bits=3, group_size=32, clip=False),
            hf_lowbit.RTNConfig(bits=3, group_size=32, symmetric=False),
        )
    )
    assert scaled < 0.7 * rtn
    assert awq < 0.7 * rtn


# 7
@pytest.mark.parametrize("never", [None, ["down_proj"]])
def test_queries_and_keys_are_never_clipped(never: list[str] | None) -> None:
    """Without scales, what is not clipped is rounded to nearest, bit by bit."""
    options = {} if never is None else {"never_clip": never}
    awq = values_of(quantized(outlier_llama(), AWQConfig(bits=3, group_size=32, scale_steps=1, **options)))
    rtn = values_of(quantized(outlier_llama(), hf_lowbit.RTNConfig(bits=3, group_size=32, symmetric=False)))
    same = {name.split(".")[-2] for name in awq if torch.equal(awq[name], rtn[name])}
    assert same == ({"q_proj", "k_proj"} if never is None else {"down_proj"})


def test_the_default_names_layers_not_blocks() -> None:
    from hf_lowbit.plan.patterns import first_match

    patterns = AWQConfig(bits=4).never_clip
    for name in (
        "a.q_proj",
        "a.k_proj",
        "k_proj",
        "a.query",
        "a.key",
        "a.query_key_value",
        "a.Wqkv",
        "a.to_q",
        "a.q_a",
    ):
        assert first_match(patterns, name) is not None, name
    for name in ("block_sparse_moe.w1", "key_encoder.fc1", "a.v_proj", "a.out_proj", "a.c_attn", "q_proj.bottleneck"):
        assert first_match(patterns, name) is None, name


# 8
def test_no_type_and_no_shape_of_what_stays_changes() -> None:
    model = outlier_llama().bfloat16()
    before = {name: (p.dtype, p.shape) for name, p in model.named_parameters()}
    norm = model.model.layers[0].input_layernorm.weight.clone()
    quantized(model, AWQConfig(bits=4, group_size=32))
    after = {name: (p.dtype, p.shape) for name, p in model.named_parameters() if p.is_floating_point()}
    assert after.items() <= before.items()
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, norm)


def test_whole_matrices_of_one_scale_are_clipped() -> None:
    awq, rtn = (
        values_of(quantized(outlier_llama(), config))
        for config in (
            AWQConfig(bits=3, group_size="tensor", scale_steps=1),
            hf_lowbit.RTNConfig(bits=3, group_size="tensor", symmetric=False),
        )
    )
    assert not torch.equal(awq["model.layers.0.mlp.down_proj.weight"], rtn["model.layers.0.mlp.down_proj.weight"])


def test_experts_without_tokens_are_noted() -> None:
    model = quantized(tiny_moe(), AWQConfig(bits=4, group_size=32), one_token())
    notes = [warning for warning in hf_lowbit.report(model).warnings if warning.endswith(IDLE)]
    assert len(notes) == 2 * 2 * 2, "two of four experts, gate_up and down, in two blocks"
    assert "model.layers.0.mlp.experts." in notes[0]


def test_what_has_no_inputs_is_noted_once() -> None:
    model = quantized(outlier_llama(), AWQConfig(bits=4, group_size=32, quantize_embeddings=True))
    notes = [warning for warning in hf_lowbit.report(model).warnings if "embed" in warning and "nearest" in warning]
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale_steps": 0}, "scale_steps must be a positive integer, not 0"),
        ({"scale_steps": 2.0}, "scale_steps must be a positive integer, not 2.0"),
        ({"clip": 1}, "clip must be True or False, not 1"),
        ({"never_clip": "q_proj"}, "never_clip must be a list of names, not 'q_proj'"),
        ({"never_clip": ["("]}, "never_clip: '\\(' is not a valid regular expression"),
        ({"never_clip": [3]}, "never_clip: a module name or regular expression is expected, not 3"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"AWQConfig: {message}"):
        AWQConfig(bits=4, **values)
