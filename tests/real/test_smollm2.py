"""SmolLM2-135M at 4 bits: size, quality and bit-equal reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowbit
from hf_lowbit.evaluation import evaluate_language_model
from hf_lowbit.testbed import smollm2, validation_text
from tests.matrix.models import fingerprint

pytestmark = pytest.mark.real
TOKENS = 1024


@pytest.fixture(scope="module")
def quantized() -> Any:
    """Loaded in float32, since not every processor multiplies bfloat16 fast."""
    config = hf_lowbit.RTNConfig(bits=4, group_size=64)
    return AutoModelForCausalLM.from_pretrained(smollm2(), quantization_config=config, dtype=torch.float32)


def test_size_and_coverage(quantized: Any) -> None:
    report = hf_lowbit.report(quantized)
    assert report.bits_per_weight <= 4.6
    assert len(report.layers) == 7 * 30, "seven projections in each of thirty layers"
    assert set(report.skipped) == {"model.embed_tokens", "lm_head"}
    assert not report.warnings


def test_reload_is_bit_equal(quantized: Any, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "packed", max_shard_size="20MB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 3
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")) == fingerprint(quantized)


def test_quality(quantized: Any) -> None:
    """Measured on the first 2048 tokens: KL 0.406 and 0.0016 nats, agreement 0.63 and 0.975 at 4 and 8 bits."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    reference = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    eight = AutoModelForCausalLM.from_pretrained(
        smollm2(), quantization_config=hf_lowbit.RTNConfig(bits=8), dtype=torch.float32
    )
    text = validation_text()
    four_bits, eight_bits = (
        evaluate_language_model(model, tokenizer, text, reference=reference, max_tokens=TOKENS)
        for model in (quantized, eight)
    )
    print(f"4 bits: {four_bits}\n8 bits: {eight_bits}")
    assert eight_bits["kl"] < 0.005 < four_bits["kl"] < 0.55
    assert four_bits["top1_agreement"] > 0.5 and eight_bits["top1_agreement"] > 0.95
    assert four_bits["perplexity"] < 1.6 * four_bits["reference_perplexity"]
