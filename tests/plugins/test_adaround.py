"""AdaRound: what its method page promises of whole blocks; one weight alone is in tests/rounding/learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_lowbit
import hf_lowbit.calibration.adaptive
from hf_lowbit import AdaRoundConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import output_channels, reconstruct
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import decode, unpack_codes
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.learned import AdaptiveRounding
from hf_lowbit.rounding.learned.soft import rectified_sigmoid
from hf_lowbit.rounding.store import round_with
from tests.plugins.outliers import (
    IDLE,
    logit_error,
    one_token,
    outlier_llama,
    quantized,
    tiny_moe,
    values_of,
    walk,
)

W3: dict[str, Any] = {"bits": 3, "iterations": 40, "learning_rate": 0.08}


def codes(model: Any) -> dict[str, torch.Tensor]:
    packed = {name: module.packed() for name, module in packed_modules(model).items()}
    return {name: unpack_codes(p.weight, p.spec.bits, p.columns).int() for name, p in packed.items()}


# 1
def test_training_starts_at_the_float_block_and_ends_below_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first block: the inputs of the second are those of a quantized one."""
    losses = []

    def spy(block: Block, learned: dict[str, AdaptiveRounding], training: Any) -> Any:
        args, kwargs = block.arguments(0)
        nearest = {key: decode(round_to_nearest(w.ungrouped(w.weight), w.spec)) for key, w in learned.items()}
        output = block.output_of(torch.func.functional_call(block.module, nearest, args, kwargs))
        losses.append((*reconstruct(block, learned, training), float((output - block.target(0)).square().mean())))
        assert training.optimizer == "adam" and not training.keep_best
        return losses[-1]

    monkeypatch.setattr(hf_lowbit.calibration.adaptive, "reconstruct", spy)
    quantized(outlier_llama(), AdaRoundConfig(search_clip=False, **W3))
    first, last, nearest = losses[0]
    assert first < 0.1 * nearest and last < 0.1 * nearest


# 2, 4
def test_codes_are_neighbours_of_the_weight_and_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, undecided = [], []

    def spy(block: Block, learned: dict[str, AdaptiveRounding], training: Any) -> Any:
        before = {key: weight.final()[0] for key, weight in learned.items()}
        result = reconstruct(block, learned, training)
        for key, weight in learned.items():
            after, inside = weight.final()[0], weight.span > 0
            raised = after - weight.below
            assert raised.min() >= 0 and raised.max() <= 1
            moved.append((after != before[key]).float().mean().item())
            h = rectified_sigmoid(weight.logits.detach())[inside]
            undecided.append(((h > 0.05) & (h < 0.95)).float().mean().item())
        return result

    monkeypatch.setattr(hf_lowbit.calibration.adaptive, "reconstruct", spy)
    quantized(outlier_llama(), AdaRoundConfig(bits=4, iterations=100, learning_rate=0.15))
    assert all(0.02 < share < 0.6 for share in moved)
    assert max(undecided) < 0.25, "of a hundred steps"


# 5
def test_without_training_it_rounds_to_nearest() -> None:
    model = quantized(outlier_llama(), AdaRoundConfig(bits=4, iterations=0, search_clip=False))
    nearest = codes(quantized(outlier_llama(), hf_lowbit.RTNConfig(bits=4, group_size=None, symmetric=False)))
    assert all(torch.equal(value, nearest[name]) for name, value in codes(model).items())
    clipped = quantized(outlier_llama(), AdaRoundConfig(bits=4, iterations=0))
    float_model = outlier_llama()
    for name, module in packed_modules(clipped).items():
        weight = float_model.get_submodule(name).weight.detach()
        assert torch.equal(codes(clipped)[name], codes_of_searched(weight, module))


def codes_of_searched(weight: torch.Tensor, module: Any) -> torch.Tensor:
    packed = round_with(fit_clipped, weight, module.layer_spec.weight)
    return unpack_codes(packed.weight, packed.spec.bits, packed.columns).int()


def test_the_same_seed_gives_the_same_bits() -> None:
    a, b = (values_of(quantized(outlier_llama(), AdaRoundConfig(bits=4, iterations=8))) for _ in range(2))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


# 6
def test_held_out_tokens_gain() -> None:
    reference = outlier_llama()
    trained = logit_error(quantized(outlier_llama(), AdaRoundConfig(**W3)), reference)
    nearest = logit_error(quantized(outlier_llama(), AdaRoundConfig(**{**W3, "iterations": 0})), reference)
    assert trained < 0.9 * nearest


@pytest.mark.parametrize("values", [{"format": "nf", "bits": 3}, {"format": "fp_e2m1"}, {"symmetric": True, "bits": 3}])
def test_other_formats_gain_too(values: dict[str, Any]) -> None:
    reference, training = outlier_llama(), {"iterations": 40, "learning_rate": 0.08}
    trained = logit_error(quantized(outlier_llama(), AdaRoundConfig(**values, **training)), reference)
    nearest = logit_error(quantized(outlier_llama(), AdaRoundConfig(**values, iterations=0)), reference)
    assert trained < nearest


def test_the_penalty_is_weighed_beside_an_error_summed_over_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    strengths = set()

    def spy(block: Block, learned: dict[str, AdaptiveRounding], training: Any) -> Any:
        strengths.update(weight.regularization for weight in learned.values())
        return reconstruct(block, learned, training)

    monkeypatch.setattr(hf_lowbit.calibration.adaptive, "reconstruct", spy)
    quantized(outlier_llama(), AdaRoundConfig(bits=4, iterations=1))
    assert strengths == {0.01 / 64}
    seen = []
    walk(outlier_llama(), lambda block: seen.append(output_channels(block)), targets=True)
    assert seen == [64, 64]


def test_experts_without_tokens_are_rounded_to_nearest_and_noted() -> None:
    model = quantized(tiny_moe(), AdaRoundConfig(bits=4, iterations=2), one_token())
    notes = [warning for warning in hf_lowbit.report(model).warnings if warning.endswith(IDLE)]
    assert len(notes) == 2 * 2 * 2, "two of four experts, gate_up and down, in two blocks"


def test_the_usual_rate_lets_short_runs_decide() -> None:
    assert AdaRoundConfig(bits=4, iterations=20_000).rate == 1e-3
    assert AdaRoundConfig(bits=4, iterations=50).rate == pytest.approx(0.05)
    assert AdaRoundConfig(bits=4, iterations=50, learning_rate=0.1).rate == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iterations": -1}, "iterations must be an integer of at least 0, not -1"),
        ({"iterations": 1.5}, "iterations must be an integer of at least 0, not 1.5"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0, not 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0, not nan"),
        ({"regularization": -0.1}, "regularization must be a number from 0 up, not -0.1"),
        ({"search_clip": "yes"}, "search_clip must be True or False, not 'yes'"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"AdaRoundConfig: {message}"):
        AdaRoundConfig(bits=4, **values)


def test_data_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="'adaround' needs calibration data"):
        hf_lowbit.quantize(outlier_llama(), AdaRoundConfig(bits=4))
