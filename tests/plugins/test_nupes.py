"""NUPES with learn=True, and the integer products of squares; the data-free half is in tests/rounding/test_power.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_lowbit
import hf_lowbit_nupes.learning
from hf_lowbit import AdaRoundConfig, NUPESConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import reconstruct
from hf_lowbit.config import ConfigError
from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec, decode, pack_codes, unpack_codes
from hf_lowbit.formats.packed import to_bits
from hf_lowbit.kernels import BACKENDS, multiplies_integers, packed_linear, why_not
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.rounding.learned import WholeSpaceRounding
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import (
    IDLE,
    logit_error,
    one_token,
    outlier_llama,
    quantized,
    relative,
    tiny_moe,
    token_batches,
    values_of,
)

W3: dict[str, Any] = {"bits": 3, "learn": True, "iterations": 40, "learning_rate": 0.05}
SHORT: dict[str, Any] = {"bits": 4, "learn": True, "iterations": 3}


def exponents(model: Any) -> dict[str, float | None]:
    return {name: module.layer_spec.weight.exponent for name, module in packed_modules(model).items()}


# 7
def test_learning_crosses_codes_and_lowers_the_error_of_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, jumps = [], []

    def error(block: Block, learned: dict[str, WholeSpaceRounding]) -> float:
        args, kwargs = block.arguments(0)
        hard = {key: weight.hard() for key, weight in learned.items()}
        output = block.output_of(torch.func.functional_call(block.module, hard, args, kwargs))
        return float((output - block.target(0)).square().mean())

    def spy(block: Block, learned: dict[str, WholeSpaceRounding], training: Any) -> Any:
        before, first = error(block, learned), {key: weight.final()[0] for key, weight in learned.items()}
        result = reconstruct(block, learned, training)
        errors.append((before, error(block, learned)))
        jumps.append(max(int((w.final()[0] - first[key]).abs().max()) for key, w in learned.items()))
        return result

    monkeypatch.setattr(hf_lowbit_nupes.learning, "reconstruct", spy)
    quantized(outlier_llama(), NUPESConfig(**{**W3, "bits": 4, "iterations": 80, "learning_rate": 0.08}))
    assert all(after < before for before, after in errors) and errors[0][1] < 0.8 * errors[0][0]
    assert max(jumps) > 1


def test_learning_beats_the_search_on_held_out_tokens() -> None:
    reference = outlier_llama()
    searched = logit_error(quantized(outlier_llama(), NUPESConfig(bits=3)), reference)
    assert logit_error(quantized(outlier_llama(), NUPESConfig(**W3)), reference) < 0.8 * searched


@pytest.mark.parametrize("bits", [3, 4])
def test_learned_it_loses_less_than_adaround_on_the_same_data(bits: int) -> None:
    reference = outlier_llama()
    fields: dict[str, Any] = {"bits": bits, "iterations": 60}
    adaround = logit_error(quantized(outlier_llama(), AdaRoundConfig(symmetric=True, **fields)), reference)
    assert logit_error(quantized(outlier_llama(), NUPESConfig(learn=True, **fields)), reference) < 0.9 * adaround


def test_scales_are_learned_unless_they_are_not_to_be() -> None:
    start, fixed, learned = (
        quantized(outlier_llama(), NUPESConfig(**{**W3, **fields}))
        for fields in ({"iterations": 0}, {"learn_scale": False}, {})
    )
    for name, module in packed_modules(start).items():
        scale = module.packed().scale
        assert torch.equal(packed_modules(fixed)[name].packed().scale, scale)
        assert not torch.equal(packed_modules(learned)[name].packed().scale, scale)


def test_the_learned_exponent_completes_the_spec_of_each_layer() -> None:
    found, start = (
        exponents(quantized(outlier_llama(), NUPESConfig(**W3))),
        exponents(quantized(outlier_llama(), NUPESConfig(bits=3))),
    )
    assert all(value is not None and 0.2 < value < 1 for value in found.values())
    assert len(set(found.values())) > 10 and any(abs(found[name] - start[name]) > 1e-3 for name in found)


def test_a_given_exponent_stays_to_the_last_bit() -> None:
    model = quantized(outlier_llama(), NUPESConfig(exponent=0.5, **{**W3, "iterations": 20}))
    assert set(exponents(model).values()) == {0.5}
    beyond = quantized(outlier_llama(), NUPESConfig(exponent=1.5, **SHORT))
    assert set(exponents(beyond).values()) == {1.5}


def test_without_iterations_it_is_the_search() -> None:
    model = quantized(outlier_llama(), NUPESConfig(bits=4, learn=True, iterations=0, search_clip=False))
    nearest = quantized(outlier_llama(), NUPESConfig(bits=4))
    for name, module in packed_modules(model).items():
        codes, other = (
            unpack_codes(m.packed().weight, 4, m.in_features).int() for m in (module, packed_modules(nearest)[name])
        )
        assert (codes != other).float().mean() < 0.01, "a searched exponent of one starts just below it"


def test_experts_of_a_layer_share_what_they_learn() -> None:
    experts = "model.layers.0.mlp.experts"
    learned = exponents(quantized(tiny_moe(), NUPESConfig(**{**W3, "iterations": 20})))[experts]
    searched = exponents(quantized(tiny_moe(), NUPESConfig(bits=3)))[experts]
    assert learned is not None and searched is not None and learned != pytest.approx(searched, abs=1e-4)


def test_experts_without_tokens_are_rounded_to_nearest_and_noted() -> None:
    model = quantized(tiny_moe(), NUPESConfig(**SHORT), one_token())
    notes = [warning for warning in hf_lowbit.report(model).warnings if warning.endswith(IDLE)]
    assert len(notes) == 2 * 2 * 2, "two of four experts, gate_up and down, in two blocks"
    note = next(note for note in notes if ".gate_up_proj[" in note)
    name, expert = note.partition(":")[0].removesuffix("]").split("[")
    module = packed_modules(model)[name.rpartition(".")[0]]
    weight = tiny_moe().get_parameter(name)[int(expert)].detach()
    nearest = decode(round_to_nearest(weight, module.layer_spec.weight))
    assert torch.equal(values_of(model)[name][int(expert)], nearest)


def test_what_cannot_be_learned_is_noted() -> None:
    overrides = {"q_proj": {"format": "nf"}, "k_proj": {"symmetric": False}}
    model = quantized(outlier_llama(), NUPESConfig(overrides=overrides, quantize_embeddings=True, **SHORT))
    warnings = hf_lowbit.report(model).warnings
    for part in ("q_proj", "k_proj"):
        assert sum(part in warning and "not learned" in warning for warning in warnings) == 2
    assert sum("embed_tokens" in warning and "nearest" in warning for warning in warnings) == 1


def test_data_is_asked_for_by_the_config_that_needs_it() -> None:
    with pytest.raises(ConfigError, match="'nupes' needs calibration data"):
        hf_lowbit.quantize(outlier_llama(), NUPESConfig(**SHORT))
    assert packed_modules(hf_lowbit.quantize(outlier_llama(), NUPESConfig(bits=4)))


def test_from_pretrained_asks_for_data_too(tmp_path: Path) -> None:
    folder = MODELS["llama"].create(tmp_path / "float")
    with pytest.raises(ConfigError, match="needs calibration data"):
        MODELS["llama"].load(folder, quantization_config=NUPESConfig(**SHORT))


@pytest.mark.parametrize("name", [pytest.param("unet", marks=pytest.mark.slow), *(n for n in MODELS if n != "unet")])
def test_a_learned_model_reloads_bit_equal(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    inputs = {key: torch.atleast_1d(torch.as_tensor(value)) for key, value in tiny.inputs(torch.float32).items()}
    model = tiny.load(tiny.create(tmp_path / "float"))
    hf_lowbit.quantize(model, NUPESConfig(dataset=[inputs], num_samples=1, **{**SHORT, "iterations": 1}))
    model.save_pretrained(tmp_path / "packed")
    reloaded = tiny.load(tmp_path / "packed")
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(tiny.run(reloaded), tiny.run(model))


def test_the_usual_rate_lets_short_runs_cross_a_code() -> None:
    assert NUPESConfig(bits=4, learn=True, iterations=10_000).rate == 1e-3
    assert NUPESConfig(bits=4, learn=True, iterations=50).rate == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"symmetric": False, "learn": True}, "learn=True needs symmetric=True"),
        ({"learn": 1}, "learn must be True or False, not 1"),
        ({"learn_scale": 0}, "learn_scale must be True or False, not 0"),
        ({"search_clip": None}, "search_clip must be True or False, not None"),
        ({"iterations": -1}, "iterations must be an integer of at least 0, not -1"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, not 0"),
        ({"regularization": float("inf")}, "regularization must be a number from 0 up, not inf"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"NUPESConfig: {message}"):
        NUPESConfig(bits=4, **values)


def test_partners_share_one_parameter() -> None:
    weights = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(0))
    spec = WeightSpec("power", 4, exponent=0.7)
    leader = WholeSpaceRounding(weights[0], spec)
    partner = WholeSpaceRounding(weights[1], spec, partner=leader)
    assert partner.exponent_logit is leader.exponent_logit
    assert [len(weight.parameter_groups()) for weight in (leader, partner)] == [2, 1]
    with pytest.raises(RoundingError, match="have one spec"):
        WholeSpaceRounding(weights[1], WeightSpec("power", 3, exponent=0.7), partner=leader)


# integer products: the level of code k is k |k| / qmax^2 of the scale
def squares(bits: int, rows: int = 24, columns: int = 256, group_size: int | None = None) -> PackedTensor:
    """Random codes whose scale is qmax^2 / 1024, so that a step is 2^-10 and every product is a float32 number."""
    spec = WeightSpec("power", bits, group_size, exponent=0.5, scale_dtype="float32")
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = torch.full((rows, spec.groups(columns)), (2 ** (bits - 1) - 1) ** 2 / 1024)
    return PackedTensor(pack_codes(codes, bits), to_bits(scale, "float32"), spec, columns)


def exact_product(x: Tensor, packed: PackedTensor) -> Tensor:
    """sum_i k_i |k_i| x_i 2^-10 in float64."""
    bits = packed.spec.bits
    k = unpack_codes(packed.weight, bits, packed.columns).double() - 2 ** (bits - 1)
    k = k.clamp(min=1 - 2 ** (bits - 1))
    return x.double() @ (k * k.abs()).T / 1024


@pytest.mark.parametrize("backend", [name for name in BACKENDS if why_not(name) is None])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("activation_bits", [4, 8])
def test_squares_multiply_exactly_as_integers(
    bits: int, activation_bits: int, group_size: int | None, backend: str
) -> None:
    """Inputs that are their own codes: what is left is the integer sum, and the rounding of its scale to float32.

    Sums stay below 256 * 49 * 127 = 1.6e6: one that is wrong by a single unit differs by more than is allowed.
    """
    packed, activation = squares(bits, group_size=group_size), ActivationSpec("int", activation_bits)
    most = 2 ** (activation_bits - 1) - 1
    x = torch.randint(-most, most + 1, (5, 256), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = most  # a token's scale is 1
    assert multiplies_integers(packed.spec, activation)
    product = packed_linear(x, packed, activation, backend).double()
    torch.testing.assert_close(product, exact_product(x, packed), rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_squares_beyond_int8_take_the_general_path(bits: int) -> None:
    packed, activation = squares(bits), ActivationSpec("int", 8)
    assert (2 ** (bits - 1) - 1) ** 2 > 127 and not multiplies_integers(packed.spec, activation)
    x = torch.randint(-127, 128, (5, 256), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127
    expected = exact_product(x, packed)
    error = (packed_linear(x, packed, activation, None).double() - expected).norm() / expected.norm()
    assert error < 1e-5


def test_other_exponents_do_not_pass_for_integers() -> None:
    activation = ActivationSpec("int", 8)
    assert not any(multiplies_integers(WeightSpec("power", 4, exponent=a), activation) for a in (0.3, 0.49, 0.7))


@torch.no_grad()
def test_a_model_of_squares_with_quantized_inputs_runs_on_integers() -> None:
    model = hf_lowbit.quantize(outlier_llama(), NUPESConfig(bits=4, exponent=0.5, activation_bits=8))
    assert all(
        multiplies_integers(module.layer_spec.weight, module.layer_spec.activation)
        for module in packed_modules(model).values()
        if module.layer_spec.activation is not None
    )
    batch = token_batches(1)[0]
    native = model(**batch).logits
    for module in packed_modules(model).values():
        module.backend = "reference"
    assert relative(native, model(**batch).logits) < 1e-4
