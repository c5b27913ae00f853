"""QLoRA's base weights: the numbered tests of its method page, and bitsandbytes' codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import norm
from torch import Tensor

import hf_lowbit
from hf_lowbit import ConfigError, QLoRAConfig
from hf_lowbit.formats import PackedTensor, WeightSpec, decode, unpack_codes
from hf_lowbit.formats.packed import scales
from hf_lowbit.plan import packed_modules
from hf_lowbit_qlora import METHOD
from tests.matrix.models import MODELS

PLAIN = QLoRAConfig(scale_bits=None, scale_dtype="float32")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def rounded(weight: Tensor, config: Any = None, **spec: Any) -> PackedTensor:
    config = QLoRAConfig() if config is None else config
    weight_spec = WeightSpec(**spec) if spec else config.layer_spec("layer").weight
    return METHOD.make_recipe(config).rounding(weight, weight_spec)


def codes_of(packed: PackedTensor) -> Tensor:
    return unpack_codes(packed.weight, packed.spec.bits, packed.columns)


def rmse(weight: Tensor, packed: PackedTensor) -> float:
    """In units of the weights' deviation."""
    return ((decode(packed) - weight).norm() / weight.norm()).item()


# 1
def test_the_codebook_is_its_construction() -> None:
    table = QLoRAConfig().layer_spec("layer").weight.number_format.table
    positive = norm.ppf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1].numpy())
    negative = -norm.ppf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1].numpy())
    built = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float64)
    torch.testing.assert_close(table.double(), built / built.max(), rtol=0, atol=1e-6)
    assert (table.diff() > 0).all() and [table[i].item() for i in (0, 7, 15)] == [-1.0, 0.0, 1.0]


def waves(rows: int) -> Tensor:
    """The same everywhere, whatever draws random numbers."""
    steps = torch.arange(rows * 256, dtype=torch.float64)
    return ((steps * 0.37).sin() * (steps * 0.011).cos()).reshape(rows, 256).float()


# 2
def test_codes_are_those_of_bitsandbytes() -> None:
    """As bitsandbytes 0.50.2 gave them: quantize_4bit(waves(1), blocksize=64, quant_type="nf4"), hexadecimal."""
    theirs = (
        "7befffed9521000137befffed9521001147bdeffec9521001247bdeeedc95311"
        "00147beeffec9521111247bdeeedb8532112357abcdcba86433344679aaaa987"
        "65545566788887777788899887654444568abcccb97432112469ceeeeda63100"
        "23469bddddc9642111246aceeeeca631101136adeffeda631000136adffffda6"
    )
    packed = rounded(waves(1), PLAIN)
    assert "".join(f"{code:x}" for code in codes_of(packed).flatten().tolist()) == theirs
    assert torch.equal(scales(packed).flatten(), waves(1).reshape(4, 64).abs().amax(-1))


def test_double_quantized_scales_lie_as_close_as_those_of_bitsandbytes() -> None:
    """Uniform steps from the smallest to the largest, where bitsandbytes' lie closest around the mean.

    Its relative error of these scales, with compress_statistics=True, was 0.00271 (0.50.2).
    """
    weight = waves(512) * torch.linspace(0.5, 2, 512).unsqueeze(1)
    exact = weight.reshape(512, 4, 64).abs().amax(-1)
    ours = scales(rounded(weight, QLoRAConfig(scale_dtype="float16")))
    assert (ours - exact).norm() / exact.norm() < 0.00271
    assert (scales(rounded(weight)) / exact - 1).abs().max() < 2**-6  # bfloat16 offsets and steps


# 3
def test_the_largest_weight_of_a_block_is_exact() -> None:
    weight = normal(64, 128).abs()
    largest = weight.reshape(64, 2, 64).amax(-1)
    assert torch.equal(decode(rounded(weight, PLAIN)).reshape(64, 2, 64).amax(-1), largest)


# 4
@pytest.mark.parametrize(
    ("spec", "error"),
    [({"format": "nf"}, 0.0920), ({}, 0.1029), ({"symmetric": False, "real_zero_point": True}, 0.0896)],
    ids=["nf4", "int4", "int4 with zero points"],
)
def test_errors_on_normal_weights(spec: dict[str, Any], error: float) -> None:
    """Symmetric integers have the platform's full range, absmax / 7.5, and a little less error than by absmax / 7."""
    weight = normal(2048, 512)
    packed = rounded(weight, bits=4, group_size=64, scale_dtype="float32", **spec)
    assert rmse(weight, packed) == pytest.approx(error, abs=1e-3)


# 5
def test_double_quantization_changes_little() -> None:
    weight = normal(512, 256)
    assert rmse(weight, rounded(weight)) == pytest.approx(rmse(weight, rounded(weight, PLAIN)), rel=0.01)


# 6 and 7
def test_a_new_adapter_does_nothing_and_gets_all_gradients() -> None:
    torch.manual_seed(0)
    tiny = MODELS["llama"]
    model = hf_lowbit.prepare_for_training(hf_lowbit.quantize(tiny.build(), QLoRAConfig()).train())
    inputs = tiny.inputs(torch.float32)
    before = model(**inputs).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    output = adapted(**inputs).logits
    assert torch.equal(output.detach(), before)
    output.square().mean().backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert len(trained) == 2 * len(packed_modules(adapted)) and all("lora_" in name for name in trained)


# 8
def test_codes_do_not_depend_on_the_size_of_the_weights() -> None:
    weight = normal(300, 128)  # the last group of scales is smaller
    assert torch.equal(codes_of(rounded(8 * weight)), codes_of(rounded(weight)))
    packed = rounded(weight)
    assert torch.equal(codes_of(rounded(decode(packed), PLAIN)), codes_of(packed))


def test_bits_per_weight() -> None:
    packed = rounded(normal(256, 4096))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors().values())
    assert 8 * stored / (256 * 4096) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-9)


def test_layers_are_double_quantized_and_experts_of_few_rows_noted() -> None:
    moe = hf_lowbit.quantize(MODELS["qwen3_moe"].build(), QLoRAConfig())
    specs = {name: module.layer_spec.weight for name, module in packed_modules(moe).items()}
    assert all((spec.format, spec.bits, spec.group_size) == ("nf", 4, 64) for n, spec in specs.items() if "attn" in n)
    assert all(spec.scale_bits == (None if name.endswith("experts") else 8) for name, spec in specs.items())
    assert any("scale_group=256 does not divide the 32 rows" in warning for warning in hf_lowbit.report(moe).warnings)


def test_config() -> None:
    assert (PLAIN.scale_group, QLoRAConfig().scale_group) == (16, 256)
    assert QLoRAConfig.from_dict(PLAIN.to_dict()) == PLAIN
    with pytest.raises(ConfigError, match="scale_bits needs scale_dtype='bfloat16' or 'float16'"):
        QLoRAConfig(scale_dtype="float32")
    with pytest.raises(ConfigError, match="format 'nf' allows 2 to 4 bits"):
        QLoRAConfig(bits=8)
