"""OmniQuant: the numbered tests of its method page, on a tiny Llama; the transformation alone is in
tests/calibration/test_equivalent.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowbit
import hf_lowbit_omniquant.recipe
from hf_lowbit import OmniQuantConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import reconstruct
from hf_lowbit.config import ConfigError
from hf_lowbit.formats.packed import scales
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding.learned import LearnedClipping
from hf_lowbit_omniquant.recipe import first_logit
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import (
    IDLE,
    logit_error,
    one_token,
    outlier_llama,
    quantized,
    relative,
    tiny_moe,
    values_of,
)

W2 = {"bits": 2, "group_size": 32}
FAST: dict[str, Any] = {"learning_rate": 0.1}  # 80 steps are to do what thousands would


def nearest(**values: Any) -> Any:
    return quantized(outlier_llama(), hf_lowbit.RTNConfig(symmetric=False, **values))


# 1
@pytest.mark.parametrize("symmetric", [True, False])
def test_without_training_ranges_are_shrunk_by_two_percent(symmetric: bool) -> None:
    values = {"bits": 4, "group_size": 32, "symmetric": symmetric, "scale_dtype": "float32"}
    ours = packed_modules(quantized(outlier_llama(), OmniQuantConfig(epochs=0, **values)))
    theirs = packed_modules(quantized(outlier_llama(), hf_lowbit.RTNConfig(**values)))
    for name, module in ours.items():
        ratio = scales(module.packed()) / scales(theirs[name].packed())
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.98201379), rtol=1e-5, atol=0)


# 1
def test_infinite_logits_round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_lowbit_omniquant.recipe, "first_logit", lambda bits: float("inf"))
    ours, theirs = values_of(quantized(outlier_llama(), OmniQuantConfig(epochs=0, **W2))), values_of(nearest(**W2))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


# 3, 4, 5
def test_training_moves_the_ranges_alone_and_lowers_every_blocks_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []

    def spy(block: Block, learned: dict[str, LearnedClipping], training: Any, transformation: Any) -> Any:
        assert transformation is None
        assert training.iterations == 20 * len(block) == 80 and training.optimizer == "adam"
        before = copy.deepcopy(block.module.state_dict())
        first, last = reconstruct(block, learned, training)
        assert last < 0.8 * first
        for name, value in block.module.state_dict().items():
            assert torch.equal(value, before[name])
        for weight in learned.values():
            assert bool((weight.upper != 4.0).any()) and bool((weight.lower != 4.0).any())
        blocks.append(sorted(learned))
        return first, last

    monkeypatch.setattr(hf_lowbit_omniquant.recipe, "reconstruct", spy)
    quantized(outlier_llama(), OmniQuantConfig(**W2, **FAST))
    assert len(blocks) == 2 and len(blocks[0]) == 7


# 6
def test_two_bits_gain_much_and_eight_lose_nothing() -> None:
    """At 8 bits single runs differ by 15 %; ranges that started at the authors' 4.0 would lose four times as much."""
    reference = outlier_llama()
    two = logit_error(quantized(outlier_llama(), OmniQuantConfig(**W2, **FAST)), reference)
    eight = logit_error(quantized(outlier_llama(), OmniQuantConfig(bits=8, group_size=32)), reference)
    assert two < 0.8 * logit_error(nearest(**W2), reference)
    assert eight < 1.3 * logit_error(nearest(bits=8, group_size=32), reference)


def test_ranges_start_at_the_same_part_of_a_step_above_four_bits() -> None:
    assert [first_logit(bits) for bits in (1, 2, 3, 4)] == [4.0] * 4
    lost = [2**bits * (1 - torch.sigmoid(torch.tensor(first_logit(bits), dtype=torch.float64))) for bits in (4, 6, 8)]
    assert lost == pytest.approx([float(lost[0])] * 3, rel=0.02)


def test_quantized_inputs_are_seen_in_training() -> None:
    """Learned with 4-bit inputs, and run with them, ranges are better than those learned without."""
    reference, values = outlier_llama(), {"bits": 3, "group_size": None, "activation_bits": 4}
    ours = logit_error(quantized(outlier_llama(), OmniQuantConfig(**values, **FAST)), reference)
    rtn = logit_error(nearest(**values), reference)
    assert ours < 0.9 * rtn


W4A4: dict[str, Any] = {"bits": 4, "group_size": None, "activation_bits": 4}


@pytest.mark.parametrize(
    ("values", "learned"),
    [({}, False), ({"let": True}, True), ({"activation_bits": 8}, True), ({"activation_bits": 8, "let": False}, False)],
)
def test_the_transformation_is_learned_where_inputs_are_quantized(
    values: dict[str, Any], learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    def spy(block: Block, weights: dict[str, LearnedClipping], training: Any, transformation: Any) -> Any:
        found.append(transformation is not None)
        return reconstruct(block, weights, training, transformation)

    monkeypatch.setattr(hf_lowbit_omniquant.recipe, "reconstruct", spy)
    quantized(outlier_llama(), OmniQuantConfig(bits=4, group_size=32, epochs=1, **values))
    assert found == [learned, learned]


def test_the_transformation_makes_the_most_of_quantized_inputs() -> None:
    """Learned, it beats clipping alone, and SmoothQuant's scale, which is where learning starts."""
    reference = outlier_llama()
    start = logit_error(quantized(outlier_llama(), OmniQuantConfig(epochs=0, **W4A4)), reference)
    learned = logit_error(
        quantized(outlier_llama(), OmniQuantConfig(**W4A4, **FAST, let_learning_rate=0.02)), reference
    )
    clipped = logit_error(quantized(outlier_llama(), OmniQuantConfig(let=False, **W4A4, **FAST)), reference)
    assert learned < 0.9 * start and learned < 0.9 * clipped


@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper", "qwen3_moe", "mamba"])
def test_transformed_models_reload_bit_equal(name: str, tmp_path: Path) -> None:
    """Norms with biases, transposed weights, cross-attention and experts."""
    tiny = MODELS[name]
    model = tiny.load(tiny.create(tmp_path / "float"))
    expected = tiny.run(model)
    inputs = {key: torch.atleast_1d(torch.as_tensor(value)) for key, value in tiny.inputs(torch.float32).items()}
    data = {"dataset": [inputs] * 2, "num_samples": 2}
    hf_lowbit.quantize(model, OmniQuantConfig(bits=8, group_size=None, activation_bits=8, epochs=1, **data))
    assert relative(tiny.run(model), expected) < 0.1
    model.save_pretrained(tmp_path / "packed")
    reloaded = tiny.load(tmp_path / "packed")
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(tiny.run(reloaded), tiny.run(model))


@pytest.mark.parametrize("values", [{"format": "nf", "bits": 3}, {"format": "fp_e2m1"}, {"format": "ternary"}])
def test_other_formats(values: dict[str, Any]) -> None:
    symmetric = values["format"] == "ternary"
    model = quantized(outlier_llama(), OmniQuantConfig(group_size=32, symmetric=symmetric, epochs=2, **values))
    assert all(torch.isfinite(value).all() for value in values_of(model).values())


def test_the_same_seed_gives_the_same_bits() -> None:
    a, b = (values_of(quantized(outlier_llama(), OmniQuantConfig(epochs=2, **W2))) for _ in range(2))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_experts_without_tokens_are_rounded_to_nearest_and_noted() -> None:
    model = quantized(tiny_moe(), OmniQuantConfig(epochs=2, **W2), one_token())
    notes = [warning for warning in hf_lowbit.report(model).warnings if warning.endswith(IDLE)]
    assert len(notes) == 2 * 2 * 2, "two of four experts, gate_up and down, in two blocks"
    values = values_of(model)
    theirs = values_of(quantized(tiny_moe(), hf_lowbit.RTNConfig(symmetric=False, **W2)))
    for expert in range(4):
        name = f"model.layers.0.mlp.experts.gate_up_proj[{expert}]"
        stack = name.partition("[")[0]
        same = torch.equal(values[stack][expert], theirs[stack][expert])
        assert same == any(note.startswith(name) for note in notes)


def test_what_has_no_inputs_is_noted_once() -> None:
    model = quantized(outlier_llama(), OmniQuantConfig(epochs=1, quantize_embeddings=True, **W2))
    notes = [warning for warning in hf_lowbit.report(model).warnings if "embed" in warning and "nearest" in warning]
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": -1}, "epochs must be an integer of at least 0, not -1"),
        ({"epochs": 2.5}, "epochs must be an integer of at least 0, not 2.5"),
        ({"epochs": True}, "epochs must be an integer of at least 0, not True"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, not 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a number above 0, not inf"),
        ({"learning_rate": "1e-2"}, "learning_rate must be a number above 0, not '1e-2'"),
        ({"let_learning_rate": -1.0}, "let_learning_rate must be a number above 0, not -1.0"),
        ({"let": "yes"}, "let must be True, False or None, not 'yes'"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"OmniQuantConfig: {message}"):
        OmniQuantConfig(bits=4, **values)
