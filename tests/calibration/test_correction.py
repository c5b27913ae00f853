"""``LowRankConfig(keep="fused")``: corrections trained block by block and fused before a method rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import hf_lowbit
from hf_lowbit import GPTQConfig, LowRankConfig, RTNConfig
from hf_lowbit.plan import packed_modules
from tests.calibration.test_low_rank import llama, tokens
from tests.matrix.models import MODELS

FUSED = LowRankConfig(4, keep="fused")


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**tokens(1)[0]).logits
    return logits


def error(config: Any) -> float:
    expected = output(llama())
    return float((output(hf_lowbit.quantize(llama(), config, data=tokens(2))) - expected).norm() / expected.norm())


def test_it_lowers_the_models_error_and_stores_nothing() -> None:
    plain, fused = (RTNConfig(bits=3, group_size=32, num_samples=4, low_rank=part) for part in (None, FUSED))
    assert error(fused) < 0.95 * error(plain)
    model = hf_lowbit.quantize(llama(), fused, data=tokens(2))
    assert all(module.layer_spec.low_rank == 0 for module in packed_modules(model).values())
    bare = hf_lowbit.quantize(llama(), plain)
    assert hf_lowbit.report(model).bits_per_weight == hf_lowbit.report(bare).bits_per_weight


def test_a_calibrated_method_rounds_the_corrected_weights() -> None:
    config = GPTQConfig(bits=3, group_size=32, num_samples=4)
    plain = hf_lowbit.quantize(llama(), config, data=tokens(2))
    fused = hf_lowbit.quantize(
        llama(), GPTQConfig(bits=3, group_size=32, num_samples=4, low_rank=FUSED), data=tokens(2)
    )
    modules = packed_modules(fused)
    same = [torch.equal(m.get_parameter("weight"), plain.get_submodule(n).weight) for n, m in modules.items()]
    assert len(same) == 14 and not all(same)


def test_single_layers_can_be_left_out_and_others_say_that_they_are() -> None:
    config = RTNConfig(bits=3, group_size=32, num_samples=4, low_rank=FUSED, overrides={"self_attn": {"low_rank": 0}})
    model = hf_lowbit.quantize(MODELS["qwen3_moe"].build().eval(), config, data=tokens(2))
    notes = hf_lowbit.report(model).warnings
    assert any("experts" in line and "fused into linear layers only" in line for line in notes)
    assert not any("self_attn" in line for line in notes)
