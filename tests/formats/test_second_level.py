"""Scales that are codes: what is stored, what it decodes to, and that everything which reads scales reads these."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hf_lowbit
from hf_lowbit import ConfigError, RTNConfig
from hf_lowbit.allocation.sizes import stored_sizes
from hf_lowbit.export.scheme import ExportError, scheme_of
from hf_lowbit.formats import ActivationSpec, PackedTensor, SpecError, WeightSpec, decode, decode_rows, unpack_codes
from hf_lowbit.formats.packed import from_bits, scales, with_plain_scales, zero_points
from hf_lowbit.formats.second_level import decode_values, encode_values
from hf_lowbit.kernels import kernel_of, look_up_rows, packed_linear, packed_linears, sliced_linear
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.nn import CorruptWeightError, LayerSpec, PackedExperts, PackedLinear
from hf_lowbit.plan import build_plan, packed_modules
from hf_lowbit.rounding import RoundingError, round_to_nearest
from hf_lowbit.rounding.gptq import gptq
from hf_lowbit.rounding.grid import Grid
from hf_lowbit.rounding.store import to_packed
from tests.matrix.models import MODELS, fingerprint
from tests.plugins.outliers import outlier_llama, tiny_moe

SPECS: dict[str, dict[str, Any]] = {
    "int": {"bits": 4},
    "int-zero": {"bits": 3, "symmetric": False},
    "int-real-zero": {"bits": 3, "symmetric": False, "real_zero_point": True},
    "int-real-zero-float16": {"bits": 3, "symmetric": False, "real_zero_point": True, "scale_dtype": "float16"},
    "one-bit": {"bits": 1, "symmetric": False},
    "nf": {"format": "nf", "bits": 4},
    "ternary-base3": {"format": "ternary", "bits": 2, "packing": "base3"},
    "fitted": {"format": "codebook", "bits": 3, "symmetric": False},
    "eight-bit-scales": {"bits": 4, "scale_bits": 8, "scale_group": 5},
}
every_spec = pytest.mark.parametrize("values", SPECS.values(), ids=SPECS)
REAL_ZERO = SPECS["int-real-zero"]


def spec_of(values: dict[str, Any]) -> WeightSpec:
    return WeightSpec(**{"group_size": 16, "scale_bits": 3, **values})


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    """Rows of different sizes, so that scales differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (0.2 + torch.rand(*shape[:-1], 1, generator=generator))


def same(first: PackedTensor, second: PackedTensor) -> bool:
    other = second.tensors()
    return first.tensors().keys() == other.keys() and all(torch.equal(t, other[s]) for s, t in first.tensors().items())


# scales and their codes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 16), (3, 7), (8, 256)])
def test_decoded_values_lie_within_half_a_step(dtype: torch.dtype, bits: int, size: int) -> None:
    """Of the grid between the smallest and the largest value of each group, beside what rounding both ends loses."""
    values = gaussian(37, 6).abs()
    spec = WeightSpec(group_size=16, scale_bits=bits, scale_group=size)
    decoded = decode_values(*encode_values(values, spec, dtype), spec, 6)
    for part, exact in zip(decoded.split(size), values.split(size), strict=True):
        low, high = exact.amin(0), exact.amax(0)
        rounding = torch.finfo(dtype).eps / 2 * (low.abs() + (high - low))
        assert bool(((part - exact).abs() <= (high - low) / (2**bits - 1) / 2 + rounding + 1e-7).all())
    assert len(decoded[:size].unique(dim=0)) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 16), (3, 5), (8, 16), (8, 256)])
def test_decoded_values_encode_to_the_same_bits(dtype: torch.dtype, bits: int, size: int) -> None:
    """Also where the range of a group is next to nothing beside its values, of either sign."""
    spec = WeightSpec(group_size=16, scale_bits=bits, scale_group=size)
    for seed, (centre, spread) in enumerate(
        itertools.product((0, 1e-4, -3e-3, 1.7, -40.0), 10.0 ** torch.arange(-9, 2))
    ):
        values = centre + float(spread) * gaussian(50, 64, seed=seed)
        words, ranges = encode_values(values, spec, dtype)
        again, ranges_again = encode_values(decode_values(words, ranges, spec, 64), spec, dtype)
        assert torch.equal(words, again) and torch.equal(ranges, ranges_again), (centre, spread)
        assert torch.equal(ranges, ranges.to(dtype).float())


def test_equal_values_are_as_good_as_their_type() -> None:
    spec = WeightSpec(group_size=16, scale_bits=3)
    values = torch.tensor([[0.0, 0.37, -5.0]]).repeat(16, 1)
    decoded = decode_values(*encode_values(values, spec, torch.bfloat16), spec, 3)
    assert torch.equal(decoded, values.bfloat16().float())


# the format
@pytest.mark.parametrize(("bits", "expected"), [(3, 3.625), (4, 4.625)])
def test_bits_per_weight_are_those_of_the_formula(bits: int, expected: float) -> None:
    """b + (3 + 3) / 16 + 64 / (16 * 16), where the codes of a row's scales fill whole words."""
    spec = spec_of({**REAL_ZERO, "bits": bits})
    stored = round_to_nearest(gaussian(32, 512), spec).tensors().values()
    assert sum(8 * tensor.nbytes for tensor in stored) / (32 * 512) == expected == bits + 6 / 16 + 64 / 256


@every_spec
@pytest.mark.parametrize("rows", [1, 32, 39])
def test_stored_tensors_are_the_companions(values: dict[str, Any], rows: int) -> None:
    packed, spec = round_to_nearest(gaussian(rows, 64), spec_of(values)), spec_of(values)
    assert {s: (tuple(t.shape), t.dtype) for s, t in packed.tensors().items()} == spec.companions((rows,), 64)
    assert ("_zero_point_range" in packed.tensors()) == (not spec.symmetric and not spec.has_integer_zero_point)


def test_a_stack_is_stored_matrix_by_matrix() -> None:
    spec, weight = spec_of(REAL_ZERO), gaussian(3, 20, 64)
    packed = round_to_nearest(weight, spec)
    assert {s: (tuple(t.shape), t.dtype) for s, t in packed.tensors().items()} == spec.companions((3, 20), 64)
    for i in range(3):
        assert same(packed[i], round_to_nearest(weight[i], spec))
    assert torch.equal(decode(packed), torch.stack([decode(packed[i]) for i in range(3)]))
    assert torch.equal(scales(packed), torch.stack([scales(packed[i]) for i in range(3)]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale_bits": 1}, "scale_bits must be 2 to 8, or None for plain scales, not 1"),
        ({"scale_bits": 3.0}, "scale_bits must be 2 to 8"),
        ({"scale_bits": True}, "scale_bits must be 2 to 8"),
        ({"scale_group": 0}, "scale_group must be a positive integer, not 0"),
        ({"scale_bits": None, "scale_group": 32}, "scale_group=32 needs scale_bits"),
        ({"group_size": None}, "scale_bits=3 needs a group_size in numbers"),
        ({"group_size": "tensor"}, "scale_bits=3 needs a group_size in numbers"),
        ({"scale_dtype": "float32"}, "scale_bits needs scale_dtype='bfloat16' or 'float16'"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec_of(values)


def test_a_spec_round_trips_and_names_its_plain_form() -> None:
    spec = spec_of({**REAL_ZERO, "scale_group": 8})
    assert WeightSpec.from_dict(spec.to_dict()) == spec and spec.to_dict()["scale_group"] == 8
    assert spec.first_level == WeightSpec(group_size=16, scale_dtype="float32", **REAL_ZERO)
    plain = WeightSpec(group_size=16)
    assert plain.first_level is plain and "scale_bits" not in plain.to_dict()


# rounding
@every_spec
@pytest.mark.parametrize("rows", [32, 39])
def test_codes_are_the_nearest_on_the_scales_as_they_are_stored(values: dict[str, Any], rows: int) -> None:
    weight = gaussian(rows, 64)
    packed = round_to_nearest(weight, spec_of(values))
    plain = with_plain_scales(packed)
    grid = Grid(scales(packed), torch.zeros(1) if (zero := zero_points(packed)) is None else zero)
    units = grid.to_table_units(weight.unflatten(1, (4, 16))).flatten(1)
    if packed.table is None:
        codes = unpack_codes(packed.weight, plain.spec.bits, 64, plain.spec.packing)
        assert torch.equal(codes, plain.spec.number_format.encode(units))
    assert (weight - decode(packed)).norm() < 0.9 * weight.norm()


def test_rounding_in_chunks_cuts_no_group_of_rows() -> None:
    """More than 2^20 weights, and a chunk that is no multiple of the group."""
    spec = WeightSpec(bits=4, group_size=64, scale_bits=3, scale_group=24)
    weight = gaussian(60, 32768)
    ends = (slice(0, 24), slice(24, 48), slice(48, 60))
    parts = [round_to_nearest(weight[rows], spec) for rows in ends]
    assert torch.equal(decode(round_to_nearest(weight, spec)), torch.cat([decode(part) for part in parts]))


@pytest.mark.parametrize("static_groups", [True, False])
def test_gptq_fits_its_codes_to_them(static_groups: bool) -> None:
    weight, x = gaussian(40, 64), gaussian(512, 64, seed=1)
    spec = spec_of(REAL_ZERO)
    result = gptq(weight.double(), spec, (x.t() @ x / 512).double(), static_groups=static_groups, damping=0.01)
    error, h = (weight - decode(result.packed)).double(), (x.t() @ x / 512).double()
    h += 0.01 * h.diagonal().mean() * torch.eye(64)
    assert result.loss == pytest.approx(((error @ h) * error).sum().item(), rel=1e-4)


def test_a_grid_that_was_not_fitted_for_them_is_refused() -> None:
    spec = spec_of({"bits": 4})
    with pytest.raises(RoundingError, match="use scale_bits=None"):
        to_packed(
            torch.zeros(16, 16, dtype=torch.uint8),
            Grid(torch.rand(16, 1), torch.zeros(16, 1)),
            spec,
            spec.number_format,
        )


def test_ranges_beyond_their_type_are_refused() -> None:
    with pytest.raises(RoundingError, match="do not fit scale_dtype='float16'"):
        round_to_nearest(1e7 * gaussian(16, 16), spec_of({"bits": 4, "scale_dtype": "float16"}))


# reading
@every_spec
def test_some_rows_decode_as_they_do_among_all(values: dict[str, Any]) -> None:
    packed = round_to_nearest(gaussian(39, 64), spec_of(values))
    whole, index = decode(packed), torch.tensor([38, 0, 17, 17])
    for rows in (index, slice(3, 21), slice(30, None), slice(0, 0)):
        assert torch.equal(decode_rows(packed, rows), whole[rows])
        assert torch.equal(decode(packed.rows(rows)), whole[rows])
    assert torch.equal(look_up_rows(packed, index, torch.float32), whole[index])
    for outside in (-1, 39):
        with pytest.raises(IndexError):
            look_up_rows(packed, torch.tensor([outside]), torch.float32)


@every_spec
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("tokens", [1, 70])
def test_products_are_those_of_the_decoded_weight(values: dict[str, Any], backend: str | None, tokens: int) -> None:
    packed = round_to_nearest(gaussian(39, 64), spec_of(values))
    x = gaussian(tokens, 64, seed=2).requires_grad_()
    expected = F.linear(x, decode(packed))
    y = packed_linear(x, packed, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    direction = gaussian(tokens, 39, seed=3)
    (gradient,) = torch.autograd.grad(y, x, direction)
    torch.testing.assert_close(gradient, direction @ decode(packed), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for result in packed_linears(x, [packed, packed], backend=backend):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@every_spec
def test_quantized_inputs(values: dict[str, Any]) -> None:
    packed, x, int8 = round_to_nearest(gaussian(39, 64), spec_of(values)), gaussian(5, 64, seed=2), ActivationSpec()
    codes, scale, _ = quantize_tokens(x, int8)
    expected = codes.float() * scale @ decode(packed).t()
    for y in (packed_linear(x, packed, int8), sliced_linear(codes, scale, packed, torch.float32)):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_traced_products() -> None:
    """Traced code decodes the scales, and calls operators that read plain ones."""
    layer = PackedLinear.from_float(nn.Linear(64, 39, bias=False), LayerSpec(spec_of(REAL_ZERO)))
    layer.allocate("weight", packed=True)
    layer.set_packed("weight", round_to_nearest(gaussian(39, 64), spec_of(REAL_ZERO)))
    x = gaussian(5, 64, seed=2)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_reports_name_the_decoding() -> None:
    packed = round_to_nearest(gaussian(32, 64), spec_of({"bits": 4}))
    plain = kernel_of(with_plain_scales(packed), None, None)
    assert kernel_of(packed, None, None) == f"{plain}, scales decoded"
    assert kernel_of(packed, None, "reference") == "torch, scales decoded"


# layers and models
@pytest.mark.parametrize("suffix", ["_scale_range", "_zero_point_range"])
def test_check_finds_ranges_that_cannot_be(suffix: str) -> None:
    spec = spec_of(REAL_ZERO)
    layer = PackedLinear.from_float(nn.Linear(64, 32), LayerSpec(spec))
    layer.allocate("weight", packed=True)
    layer.set_packed("weight", round_to_nearest(gaussian(32, 64), spec))
    layer.check()
    stored = getattr(layer, f"weight{suffix}")
    stored.data[0, 0, 1] = torch.tensor(float("nan"), dtype=torch.bfloat16).view(torch.int16)
    assert bool(from_bits(stored, "bfloat16").isnan().any())
    with pytest.raises(CorruptWeightError, match=f"weight{suffix} holds NaN"):
        layer.check()


def config(**values: Any) -> RTNConfig:
    return RTNConfig(
        **{"bits": 3, "group_size": 16, "symmetric": False, "real_zero_point": True, "scale_bits": 3, **values}
    )


def test_methods_that_keep_their_scales_refuse() -> None:
    with pytest.raises(ConfigError, match="HQQConfig: scale_bits=3: the method keeps its scales as they are"):
        hf_lowbit.HQQConfig(bits=4, symmetric=False, scale_bits=3)
    with pytest.raises(ConfigError, match="scale_bits=3: the method keeps"):
        hf_lowbit.HQQConfig(bits=4, symmetric=False, overrides={"q_proj": {"scale_bits": 3}})


def test_overrides_change_them_layer_by_layer() -> None:
    given = config(scale_group=8, overrides={"a": {"scale_bits": None}, "b": {"scale_bits": 4}})
    assert given.layer_spec("a").weight == WeightSpec(bits=3, group_size=16, symmetric=False, real_zero_point=True)
    assert (given.layer_spec("b").weight.scale_bits, given.layer_spec("c").weight.scale_bits) == (4, 3)
    assert given.layer_spec("b").weight.scale_group == 8
    assert RTNConfig.from_dict(given.to_dict()) == given


def test_export_refuses_by_name() -> None:
    with pytest.raises(ExportError, match="its scales are codes themselves"):
        scheme_of(LayerSpec(spec_of({"bits": 4})))


def test_experts_are_grouped_within_what_saving_splits() -> None:
    """Gate and up are stored apart: 24 rows each have no whole groups of 16."""
    experts = tiny_moe().model.layers[0].mlp.experts
    rows = experts.down_proj.shape[2]
    for size, divides in ((rows, True), (rows - 1, False)):
        plan = build_plan(nn.ModuleDict({"a": experts}), config(scale_group=size))
        assert (plan.layers["a"].spec.weight.scale_bits == 3) == divides
        assert any("plain scales instead" in warning for warning in plan.warnings) != divides
    assert isinstance(PackedExperts.from_float(experts, LayerSpec(spec_of(REAL_ZERO))), PackedExperts)


def test_scales_of_whole_rows_stay_plain() -> None:
    """Where no group divides the width there is one scale for each row."""
    plan = build_plan(nn.ModuleDict({"a": nn.Linear(14, 32), "b": nn.Linear(24, 32)}), config())
    assert plan.layers["a"].spec.weight == WeightSpec(bits=3, group_size=None, symmetric=False, real_zero_point=True)
    assert plan.layers["b"].spec.weight.scale_bits is None


@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe", "unet"])
def test_models_save_and_reload_bit_equal(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    folder = tiny.create(tmp_path / "float")
    given = config(quantize_embeddings=True) if name == "llama_tied" else config()
    model = tiny.load(folder, quantization_config=given)
    coded = [module for module in packed_modules(model).values() if module.layer_spec.weight.scale_bits]
    assert any(module.kind == ("experts" if name == "qwen3_moe" else module.kind) for module in coded)
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    reloaded = tiny.load(tmp_path / "packed")
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(tiny.run(reloaded), tiny.run(model))


def test_sizes_agree(tmp_path: Path) -> None:
    """The plan's, the report's, and what a folder without a report is counted to."""
    from hf_lowbit.cli.account import accounts

    model = outlier_llama()
    plan = build_plan(model, config(modules_to_not_convert=["lm_head"]))
    sizes = [stored_sizes(model, [name], {name: [layer]}) for name, layer in plan.layers.items()]
    quantized = hf_lowbit.quantize(model, config())
    report = hf_lowbit.report(quantized)
    assert sum(size.bits[0] for size in sizes) == 8 * report.packed_bytes
    quantized.save_pretrained(tmp_path)
    (tmp_path / "lowbit_report.json").unlink()
    (account,) = accounts(tmp_path).values()
    assert (account.report.packed_bytes, account.report.elements) == (report.packed_bytes, report.elements)
