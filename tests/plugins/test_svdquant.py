"""SVDQuant as a plugin: what it gains, what is stored and runs, and what becomes of layers it cannot treat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import hf_lowbit
import hf_lowbit_svdquant.recipe
from hf_lowbit import LowRankConfig, RTNConfig, SmoothQuantConfig, SVDQuantConfig
from hf_lowbit.compensation.absorption import absorb
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import decode
from hf_lowbit.kernels.activation import quantize_tokens, restore_tokens
from hf_lowbit.nn import Scaling
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding.feedback import CholeskyError
from tests.matrix.conftest import data_of
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import logit_error, one_token, outlier_llama, quantized, tiny_moe

INPUTS = {"group_size": 32, "activation_bits": 4, "activation_group_size": 32}
BATCH = {"input_ids": torch.arange(40)[None]}


def config(rank: int = 8, **values: Any) -> SVDQuantConfig:
    return SVDQuantConfig(**{**INPUTS, "low_rank": LowRankConfig(rank), "smooth_steps": 5, **values})


def gpt2() -> Any:
    """With outliers behind the activation, where no scale can be folded."""
    torch.manual_seed(0)
    model = MODELS["gpt2"].build().eval()
    for block in model.transformer.h:
        block.mlp.c_fc.bias.data[[3, 30]] = 30.0
    return model


def notes_of(model: Any, ending: str) -> list[str]:
    return [warning for warning in hf_lowbit.report(model).warnings if ending in warning]


def test_each_step_gains() -> None:
    """Squared errors, measured: to nearest 0.30, smoothed 0.17, with the branch 0.03, with GPTQ 0.02."""
    reference = outlier_llama()
    found = [
        logit_error(quantized(outlier_llama(), one), reference)
        for one in (
            RTNConfig(**INPUTS),
            SmoothQuantConfig(**INPUTS, bits=4),
            config(),
            config(gptq=True),
        )
    ]
    assert found[0] > 1.2 * found[1] > 2.4 * found[2] and found[2] > 1.1 * found[3], found


def test_weights_alone() -> None:
    reference, model = outlier_llama(), quantized(outlier_llama(), config(activation_bits=None))
    rtn = quantized(outlier_llama(), RTNConfig(group_size=32))
    assert logit_error(model, reference) < 0.5 * logit_error(rtn, reference)
    assert all(module.layer_spec.activation is None for module in packed_modules(model).values())


@pytest.mark.parametrize("build", [outlier_llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("bits", [4, None], ids=["W4A4", "W4A16"])
def test_what_is_stored_is_what_runs(build: Any, bits: int | None, tmp_path: Path) -> None:
    model = quantized(build(), config(activation_bits=bits))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(reloaded) == fingerprint(model)
    with torch.no_grad():
        assert torch.equal(reloaded(**BATCH).logits, model(**BATCH).logits)
        if bits is None:
            expected = hf_lowbit.dequantize(reloaded)(**BATCH).logits
            torch.testing.assert_close(model(**BATCH).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_layer_computes_the_papers_formula() -> None:
    """y = deq(Q(x / s)) deq(R)^T + (x / s) A^T B^T + b, the scale kept in the layer."""
    layer = packed_modules(quantized(gpt2(), config()))["transformer.h.0.mlp.c_proj"]
    assert layer.layer_spec.transform == Scaling() and layer.layer_spec.low_rank == 8
    scale = layer.transform_tensors()["scale"].view(torch.bfloat16).float()
    factors = layer.low_rank_factors("weight", torch.float32)
    assert factors is not None
    x = torch.randn(5, len(scale), generator=torch.Generator().manual_seed(0)) * scale
    read = restore_tokens(*quantize_tokens(x / scale, layer.layer_spec.activation))
    expected = (
        F.linear(read, decode(layer.packed())) + F.linear(F.linear(x / scale, factors[0]), factors[1]) + layer.bias
    )
    torch.testing.assert_close(layer(x), expected.detach(), rtol=1e-4, atol=1e-4)


# 5
def test_queries_keys_and_values_share_scale_and_a() -> None:
    for share in (True, False):
        layers = packed_modules(quantized(outlier_llama(), config(share_branch=share)))
        a = [layers[f"model.layers.0.self_attn.{name}_proj"].weight_low_rank_a for name in "qkv"]
        assert all(torch.equal(other, a[0]) for other in a[1:]) is share
        up, gate = (layers[f"model.layers.0.mlp.{name}_proj"].weight_low_rank_a for name in ("up", "gate"))
        assert torch.equal(up, gate) is share


def test_fields_reach_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def spy(parts: Any, inputs: Any, **options: Any) -> Any:
        calls.append({"spec": parts[0].spec, "groups": len(parts), **options})
        return absorb(parts, inputs, **options)

    monkeypatch.setattr(hf_lowbit_svdquant.recipe, "absorb", spy)
    quantized(outlier_llama(), SVDQuantConfig(smooth_steps=1, low_rank=LowRankConfig(4, factor_bits=8)))
    assert [call["groups"] for call in calls] == [3, 1, 2, 1] * 2
    assert all((call["iterations"], call["share"]) == (100, True) for call in calls)
    spec = calls[0]["spec"]
    assert (spec.weight.bits, spec.weight.group_size, spec.activation.bits, spec.activation.group_size) == (
        4,
        64,
        4,
        64,
    )
    assert (spec.low_rank, spec.factor_bits) == (4, 8)


def test_without_a_branch_it_is_smoothing_and_rounding() -> None:
    model = quantized(outlier_llama(), config(low_rank=None))
    assert not any(module.layer_spec.low_rank for module in packed_modules(model).values())
    reference = outlier_llama()
    rtn = quantized(outlier_llama(), RTNConfig(**INPUTS))
    assert logit_error(model, reference) < logit_error(rtn, reference)


def test_layers_smaller_than_the_rank_have_no_branch_and_are_noted() -> None:
    model = quantized(outlier_llama(), config(rank=40))
    ranks = {name.rpartition(".")[2]: m.layer_spec.low_rank for name, m in packed_modules(model).items()}
    assert ranks["k_proj"] == ranks["v_proj"] == 0 and ranks["q_proj"] == ranks["down_proj"] == 40
    assert len(notes_of(model, "low_rank.rank=40 exceeds the smaller side of a 32 x 64 matrix, no branch instead")) == 1


def test_experts_are_decomposed_and_not_smoothed() -> None:
    model = quantized(tiny_moe(), config(rank=4))
    layers = {name: module for name, module in packed_modules(model).items() if module.kind == "experts"}
    assert layers and all(module.layer_spec.low_rank == 4 for module in layers.values())
    assert len(notes_of(model, "layers of kind 'experts' are not smoothed")) == 2 * 2 * 4
    reference = tiny_moe()
    rtn = quantized(tiny_moe(), RTNConfig(**INPUTS))
    assert logit_error(model, reference) < logit_error(rtn, reference)


def test_matrices_without_tokens_are_noted() -> None:
    model = quantized(tiny_moe(), config(rank=4), one_token())
    assert len(notes_of(model, "decomposed by its weights alone")) == 2 * 2 * 2


def test_a_hessian_that_cannot_be_factorised_is_rounded_to_nearest_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Tensor, **options: Any) -> Any:
        raise CholeskyError("its Hessian is not positive definite even with damping=1")

    monkeypatch.setattr(hf_lowbit_svdquant.recipe, "gptq", fail)
    model = quantized(outlier_llama(), config(gptq=True))
    assert len(notes_of(model, "even with damping=1: rounded to nearest")) == 14
    assert fingerprint(model) == fingerprint(quantized(outlier_llama(), config()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"smooth_steps": 0}, "smooth_steps must be a positive integer, not 0"),
        ({"iterations": True}, "iterations must be a positive integer, not True"),
        ({"gptq": 1}, "gptq must be True or False, not 1"),
        ({"share_branch": None}, "share_branch must be True or False, not None"),
        ({"activation_static": True, "activation_group_size": None}, "activation_static must be False"),
        ({"inputs_to_not_convert": ["("]}, "inputs_to_not_convert: '\\(' is not a valid regular expression"),
        ({"inputs_to_not_convert": None}, "inputs_to_not_convert: "),
        ({"low_rank": LowRankConfig(metric="full")}, "low_rank.metric must be 'identity', not 'full'"),
        ({"low_rank": LowRankConfig(keep="adapter")}, "low_rank.keep must be 'branch', not 'adapter'"),
        ({"low_rank": LowRankConfig(iterations=3)}, "low_rank.iterations must be 1, not 3"),
        ({"low_rank": LowRankConfig(budget_bits=5)}, "low_rank.budget_bits must be None, not 5"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"SVDQuantConfig: {message}"):
        SVDQuantConfig(**values)


def test_config_round_trips() -> None:
    for one in (
        SVDQuantConfig(),
        SVDQuantConfig(activation_bits=None),
        SVDQuantConfig(low_rank=None),
        config(gptq=True),
    ):
        assert SVDQuantConfig.from_dict(one.to_dict()) == one
    assert SVDQuantConfig(activation_bits=None).activation_group_size is None


def test_inputs_of_a_denoisers_embedders_modulations_and_output_stay_as_they_are() -> None:
    tiny = MODELS["dit"]
    names = ("pos_embed.proj", "transformer_blocks.0.norm1.linear", "proj_out_2", "transformer_blocks.0.attn1.to_q")
    found = {}
    for chosen in ({}, {"inputs_to_not_convert": [r".*to_q"]}):
        torch.manual_seed(0)
        own = config(rank=2, smooth_steps=1, iterations=1, num_samples=2, **chosen)
        model = hf_lowbit.quantize(tiny.build().eval(), own, data=data_of(tiny))
        layers = packed_modules(model)
        found[len(chosen)] = [layers[name].layer_spec.activation is None for name in names]
    assert found == {0: [True, True, True, False], 1: [False, False, False, True]}
