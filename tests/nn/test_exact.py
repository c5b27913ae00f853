"""Layers that keep some weights exact: multiplied by the input as it is, stored with the plan, counted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_lowbit.formats import ActivationSpec, SpecError, WeightSpec, decode
from hf_lowbit.kernels import packed_linear
from hf_lowbit.nn import (
    KINDS,
    CorruptWeightError,
    ExactColumns,
    ExactSparse,
    ExactSpec,
    LayerSpec,
    PackedLinear,
    Reassembly,
    connect_siblings,
    keep_columns,
    keep_weights,
    kind_of,
    register_exact,
)
from hf_lowbit.plan import Plan, PlanError, PlannedLayer
from hf_lowbit.reporting import describe
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.tensorwise import pack_parameter

CHANNELS, ROWS = 32, 24
SPEC = LayerSpec(WeightSpec(bits=3, symmetric=False, group_size=16))
INDEX = torch.tensor([9, 2, 30])  # of the channels with large inputs, in no order
every_kind = pytest.mark.parametrize("kind", ["columns", "sparse"])


def inputs(tokens: int = 12) -> Tensor:
    torch.manual_seed(3)
    x = torch.randn(tokens, CHANNELS)
    x[:, INDEX] *= 40
    return x


def large(matrix: Tensor) -> Tensor:
    """The 5 % largest weights; none of the first row."""
    mask = matrix.abs() >= matrix.abs().flatten().kthvalue(int(0.95 * matrix.numel())).values
    mask[0] = False
    return mask


def pack(module: nn.Module, kind: str | None, spec: LayerSpec = SPEC) -> PackedLinear:
    """A packed layer with an exact part, as calibration makes it; the float module stays as it is."""
    layer = KINDS[str(kind_of(module))].from_float(module, spec)
    assert isinstance(layer, PackedLinear)
    if spec.transform is not None:
        layer.set_transform(spec.transform, identity(spec.transform))
    weight = layer.weight.detach()
    matrix = layer.to_matrix("weight", weight)
    if kind == "columns":
        layer.set_exact(*keep_columns(matrix, INDEX))
        codes = round_to_nearest(layer.without_exact("weight", matrix), spec.weight)
    else:
        mask = large(matrix)
        codes = round_to_nearest(matrix.masked_fill(mask, 0), spec.weight)
        layer.set_exact(*keep_weights(matrix, decode(codes), mask))
    pack_parameter(layer, "weight", weight, codes, "layer")
    return layer.eval()


def identity(transform: Any) -> dict[str, Tensor]:
    """Channels in reverse: source i goes to target -i."""
    source = torch.arange(transform.entries, dtype=torch.int32)
    factor = torch.ones(transform.entries).view(torch.int32)
    return {"source": source, "target": source.flip(0), "factor": factor}


def float_layer(kind: str = "linear") -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(CHANNELS, ROWS) if kind == "linear" else Conv1D(ROWS, CHANNELS)


@every_kind
@pytest.mark.parametrize("module", ["linear", "transformers_conv1d"])
@pytest.mark.parametrize("low_rank", [0, 3])
@pytest.mark.parametrize("transform", [None, Reassembly(CHANNELS)])
@torch.no_grad()
def test_an_ordinary_layer_with_its_weights_computes_the_same(
    kind: str, module: str, low_rank: int, transform: Reassembly | None
) -> None:
    layer = pack(float_layer(module), kind, replace(SPEC, low_rank=low_rank, transform=transform))
    layer.check()
    ordinary = layer.to_float(torch.float32)
    assert type(ordinary) is type(float_layer(module))
    for x in (inputs(), inputs(1), inputs(6).reshape(2, 3, CHANNELS), inputs()[:0]):
        torch.testing.assert_close(layer(x), ordinary(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_kept_columns_are_the_float_ones_and_their_codes_do_not_matter() -> None:
    linear = float_layer()
    layer = pack(linear, "columns")
    assert torch.equal(layer.dequantized()[:, INDEX], linear.weight[:, INDEX].half().float())
    rest = torch.ones(CHANNELS, dtype=torch.bool).index_fill(0, INDEX, False)
    assert torch.equal(layer.dequantized()[:, rest], decode(layer.packed())[:, rest])
    before = layer(inputs())
    everything = round_to_nearest(linear.weight * torch.where(rest, 1.0, -1.0), SPEC.weight)
    codes = layer.packed()
    assert codes.zero_point is not None and everything.zero_point is not None
    layer.set_packed("weight", replace(codes, weight=_mixed(codes.weight, everything.weight, rest)))
    torch.testing.assert_close(layer(inputs()), before)


def _mixed(words: Tensor, others: Tensor, take: Tensor) -> Tensor:
    from hf_lowbit.formats import pack_codes, unpack_codes

    codes, other = (unpack_codes(w, 3, CHANNELS) for w in (words, others))
    return pack_codes(torch.where(take, codes, other), 3)


@pytest.mark.parametrize(
    "activation", [ActivationSpec(bits=4), ActivationSpec(bits=8), ActivationSpec("float8_e4m3fn")]
)
@torch.no_grad()
def test_kept_columns_do_not_enter_a_tokens_scale(activation: ActivationSpec) -> None:
    """QUIK, test 4: the split product is that of the masked input, and of the outliers with their floats."""
    linear = float_layer()
    layer = pack(linear, "columns", replace(SPEC, activation=activation))
    x = inputs()
    rest = x.index_fill(1, INDEX, 0)
    expected = packed_linear(rest, layer.packed(), activation) + layer.bias
    expected += F.linear(x[:, INDEX], linear.weight[:, INDEX].half().float())
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    exact = F.linear(x, layer.dequantized(), layer.bias)
    whole = packed_linear(x, round_to_nearest(linear.weight, SPEC.weight), activation) + layer.bias
    assert (layer(x) - exact).norm() < 0.2 * (whole - exact).norm()


@torch.no_grad()
def test_kept_weights_are_exact_whatever_their_codes() -> None:
    linear = float_layer()
    mask = large(linear.weight)
    layer = pack(linear, "sparse")
    kept, weight = layer.dequantized()[mask], linear.weight[mask]
    torch.testing.assert_close(kept, weight, rtol=0, atol=2**-11 * float(weight.abs().max()))
    assert torch.equal(layer.dequantized()[~mask], decode(layer.packed())[~mask])
    pointers, columns = layer.weight_exact_pointers, layer.weight_exact_columns
    assert columns.dtype == torch.int16 and pointers.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]


@torch.no_grad()
def test_wide_layers_store_wide_columns() -> None:
    assert ExactSparse(7).companions(4, 1 << 15)["columns"][1] == torch.int16
    assert ExactSparse(7).companions(4, (1 << 15) + 1)["columns"][1] == torch.int32
    matrix = torch.zeros(1, 40_000)
    matrix[0, 39_999] = 3.0
    spec, tensors = keep_weights(matrix, torch.zeros_like(matrix), matrix > 0)
    assert spec.problem(tensors, 1, 40_000) is None
    assert torch.equal(spec.product(matrix, tensors, 1), torch.tensor([[9.0]]))


@every_kind
def test_gradients_reach_the_input(kind: str) -> None:
    layer = pack(float_layer(), kind)
    x, reference = inputs().requires_grad_(), inputs().requires_grad_()
    layer(x).square().sum().backward()
    layer.to_float(torch.float32)(reference).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-3, atol=1e-2)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_inputs_keep_their_type(kind: str, dtype: torch.dtype) -> None:
    layer = pack(float_layer(), kind)
    exact, y = layer(inputs()), layer(inputs().to(dtype))
    assert y.dtype == dtype
    assert float((y.float() - exact).norm() / exact.norm()) < 0.02
    layer.to(dtype)  # no cast changes what is stored
    assert torch.equal(layer(inputs().to(dtype)), y)


@every_kind
@torch.no_grad()
def test_copies_and_traces_compute_the_same(kind: str) -> None:
    layer = pack(float_layer(), kind)
    expected = layer(inputs())
    assert torch.equal(copy.deepcopy(layer)(inputs()), expected)
    exported = torch.export.export(layer, (inputs(),)).module()
    torch.testing.assert_close(exported(inputs()), expected)


@every_kind
@torch.no_grad()
def test_a_low_rank_branch_repairs_what_is_left(kind: str) -> None:
    linear = float_layer()
    layer = pack(linear, kind, replace(SPEC, low_rank=ROWS))
    assert float((layer(inputs()) - linear(inputs())).norm() / linear(inputs()).norm()) < 0.01


@every_kind
@torch.no_grad()
def test_the_error_is_that_of_both_parts(kind: str) -> None:
    linear = float_layer()
    layer = pack(linear, kind)
    done = pack_parameter(layer, "weight", linear.weight, layer.packed(), "layer")
    expected = (linear.weight - layer.dequantized()).norm() / linear.weight.norm()
    assert done.error == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_layers_with_an_exact_part_have_no_siblings() -> None:
    attention = nn.Module()
    for name, kind in (("q_proj", "columns"), ("k_proj", "sparse"), ("v_proj", "sparse")):
        setattr(attention, name, pack(float_layer(), kind))
    assert connect_siblings(attention) == 0


@every_kind
@torch.no_grad()
def test_everything_stored_is_counted(kind: str) -> None:
    layer, plain = pack(float_layer(), kind), pack(float_layer(), kind)
    plain.set_exact(None)
    assert not [key for key in plain.state_dict() if "_exact_" in key]
    (entry,), (other,) = (describe(nn.Sequential(module), "rtn").layers for module in (layer, plain))
    exact = layer.layer_spec.exact
    assert exact is not None
    extra = {"columns": 3 * 4 + 2 * 3 * ROWS, "sparse": 4 * (ROWS + 1) + (2 + 2) * exact.count}[kind]
    assert entry.packed_bytes - other.packed_bytes == extra
    assert entry.bits_per_weight == pytest.approx(other.bits_per_weight + 8 * extra / (ROWS * CHANNELS))
    assert f"exact={exact.count} {kind}" in repr(layer)


@every_kind
@pytest.mark.parametrize("module", ["linear", "transformers_conv1d"])
@torch.no_grad()
def test_another_weight_keeps_the_same_places_exact(kind: str, module: str) -> None:
    """What merging an adapter relies on."""
    layer = pack(float_layer(module), kind)
    fresh = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(8))
    kept = layer.without_exact("weight", torch.ones(ROWS, CHANNELS)) == 0
    codes = round_to_nearest(layer.without_exact("weight", fresh), SPEC.weight)
    places = {part: t.clone() for part, t in layer.exact_tensors().items() if part != "values"}
    layer.fit_exact("weight", fresh, decode(codes))
    layer.set_packed("weight", codes)
    layer.check()
    torch.testing.assert_close(layer.arranged(layer.dequantized())[kept], fresh[kept], rtol=2**-10, atol=2**-10)
    assert all(torch.equal(layer.exact_tensors()[part], places[part]) for part in places)


def test_specs_round_trip_as_plain_data() -> None:
    columns, sparse = (replace(SPEC, exact=exact) for exact in (ExactColumns(3), ExactSparse(40, "bfloat16")))
    assert columns.to_dict()["exact"] == {"kind": "columns", "count": 3, "dtype": "float16"}
    for spec in (columns, sparse):
        assert LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert "exact" not in SPEC.to_dict()
    plan = Plan({"a.q": PlannedLayer("linear", columns), "a.k": PlannedLayer("linear", sparse)})
    assert Plan.from_list(plan.to_list(), ["a", "a.q", "a.k"]).layers == plan.layers


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"kind": "os.system", "count": 4}, "unknown kind of exact part"),
        ({"count": 4}, "unknown kind of exact part"),
        ("columns", "an object with a kind"),
        ({"kind": "columns"}, "other parameters"),
        ({"kind": "columns", "count": 4, "path": "x"}, "other parameters"),
        ({"kind": "columns", "count": "4"}, "positive integer"),
        ({"kind": "sparse", "count": 0}, "positive integer"),
        ({"kind": "sparse", "count": 4, "dtype": "float32"}, "dtype must be one of float16, bfloat16"),
    ],
)
def test_stored_exact_parts_that_cannot_be_are_refused(stored: Any, message: str) -> None:
    entry = {"kind": "linear", **SPEC.to_dict(), "exact": stored, "modules": ["a"]}
    with pytest.raises(PlanError, match=message):
        Plan.from_list([entry], ["a"])


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "embedding", "experts"])
def test_other_kinds_of_layers_are_refused(kind: str) -> None:
    entry = {"kind": kind, **replace(SPEC, exact=ExactColumns(4)).to_dict(), "modules": ["a"]}
    with pytest.raises(PlanError, match="cannot have an exact part"):
        Plan.from_list([entry], ["a"])
    if kind == "embedding":
        packed = KINDS[kind].from_float(nn.Embedding(8, 16), SPEC)
        with pytest.raises(SpecError, match="cannot have an exact part"):
            packed.set_exact(*keep_columns(torch.ones(8, 16), torch.tensor([1])))


def test_tensors_of_other_shapes_are_refused() -> None:
    layer = PackedLinear.from_float(float_layer(), SPEC)
    spec, tensors = keep_columns(layer.weight.detach(), INDEX)
    with pytest.raises(ValueError, match="has the tensors"):
        layer.set_exact(ExactColumns(4), tensors)
    with pytest.raises(ValueError, match="has the tensors"):
        layer.set_exact(spec, {**tensors, "values": tensors["values"].view(torch.float16)})
    with pytest.raises(SpecError, match="does not have 33 columns"):
        layer.set_exact(ExactColumns(33), tensors)
    with pytest.raises(SpecError, match="positive integer"):
        keep_columns(layer.weight.detach(), INDEX[:0])


def test_large_values_take_bfloat16_and_values_without_a_type_are_refused() -> None:
    matrix = torch.ones(ROWS, CHANNELS)
    matrix[3, 9] = 1e6
    spec, tensors = keep_columns(matrix, INDEX)
    assert spec.dtype == "bfloat16"
    torch.testing.assert_close(
        spec.merged(torch.zeros_like(matrix), tensors)[:, INDEX], matrix[:, INDEX], rtol=4e-3, atol=0
    )
    for value in (float("nan"), float("inf"), 3.4e38):
        matrix[3, 9] = value
        with pytest.raises(ValueError, match="NaN, infinite or too large"):
            keep_columns(matrix, INDEX)


@pytest.mark.parametrize(
    ("kind", "part", "place", "value", "message"),
    [
        ("columns", "index", 0, -1, "ascending choice"),
        ("columns", "index", 2, CHANNELS, "ascending choice"),
        ("columns", "index", 1, 2, "ascending choice"),
        ("columns", "values", (3, 1), 0x7E00, "NaN or infinite"),
        ("sparse", "pointers", 0, 1, "do not divide"),
        ("sparse", "pointers", ROWS, 5, "do not divide"),
        ("sparse", "pointers", 2, 99, "do not divide"),
        ("sparse", "columns", 4, CHANNELS, "columns lie outside"),
        ("sparse", "columns", 4, -1, "columns lie outside"),
        ("sparse", "values", 4, 0x7C00, "NaN or infinite"),
    ],
)
def test_damaged_tensors_are_found(kind: str, part: str, place: Any, value: int, message: str) -> None:
    layer = pack(float_layer(), kind)
    layer.check()
    getattr(layer, f"weight_exact_{part}")[place] = value
    with pytest.raises(CorruptWeightError, match=message):
        layer.check()


def test_a_kinds_name_is_taken_once() -> None:
    class Other(ExactColumns):
        kind = "columns"

    assert register_exact(ExactColumns) is ExactColumns
    with pytest.raises(ValueError, match="already registered"):
        register_exact(Other)
    assert ExactSpec.from_dict({"kind": "sparse", "count": 40}) == ExactSparse(40)


@every_kind
def test_empty_layers_wait_for_a_checkpoint(kind: str) -> None:
    layer = pack(float_layer(), kind)
    make: Callable[..., Any] = PackedLinear.from_float
    empty = make(float_layer(), layer.layer_spec)
    empty.allocate("weight", packed=True)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(inputs()), layer(inputs()))
