"""Specifications: strict plain data, from which the shape of every stored tensor follows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowbit
from hf_lowbit import ConfigError, RTNConfig
from hf_lowbit.formats import ActivationSpec, SpecError, WeightSpec, decode
from hf_lowbit.rounding import round_to_nearest

FORMATS: list[dict[str, Any]] = [
    *[{"format": "int", "bits": bits} for bits in range(1, 9)],
    {"format": "nf", "bits": 3},
    {"format": "fp_e2m1", "bits": 4},
    {"format": "float8_e4m3fn", "bits": 8},
    {"format": "power", "bits": 4, "exponent": 0.5},
    {"format": "ternary", "bits": 2},
    {"format": "ternary", "bits": 2, "packing": "base3"},
    {"format": "codebook", "bits": 2, "codebook": (-1.0, 0.0, 0.5, 1.0)},
    {"format": "codebook", "bits": 3},
]


def label(values: dict[str, Any]) -> str:
    return "-".join(str(value) for value in values.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": -1}, "use None"),
        ({"group_size": 0}, "positive integer"),
        ({"group_size": 12.5}, "positive integer"),
        ({"group_size": True}, "positive integer"),
        ({"group_size": "column"}, "'tensor'"),
        ({"bits": 4.0}, "bits must be an integer"),
        ({"bits": True}, "bits must be an integer"),
        ({"bits": 9}, "1 to 8"),
        ({"symmetric": 1}, "symmetric must be True or False"),
        ({"scale_dtype": "int8"}, "scale_dtype must be one of"),
        ({"scale_dtype": ["bfloat16"]}, "scale_dtype must be one of"),
        ({"packing": "sparse"}, "'dense' or 'base3'"),
        ({"packing": "base3"}, "three values"),
        ({"format": "ternary", "bits": 2, "symmetric": False}, "symmetric"),
        ({"format": "nf", "bits": 8}, "2 to 4"),
        ({"format": "quaternary"}, "unknown number format"),
        ({"format": 4}, "by its name"),
        ({"format": "power", "bits": 9}, "2 to 8"),
        ({"format": "power", "exponent": 5.0}, "exponent <= 4"),
        ({"format": "power", "exponent": "half"}, "exponent must be a number"),
        ({"exponent": 0.5}, "exponent belongs to format 'power'"),
        ({"codebook": (0.0, 1.0)}, "codebook belongs to format 'codebook'"),
        ({"format": "codebook", "codebook": ("a", "b")}, "list of numbers"),
        ({"format": "codebook", "codebook": 3}, "list of numbers"),
        ({"format": "codebook", "bits": 9}, "1 to 8"),
        ({"real_zero_point": 1}, "real_zero_point must be True or False"),
        ({"real_zero_point": True}, "needs symmetric=False"),
        ({"real_zero_point": True, "symmetric": False, "bits": 1}, "one bit are real anyway"),
        ({"real_zero_point": True, "symmetric": False, "format": "nf"}, "'nf' are real anyway"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        WeightSpec(**values)


@pytest.mark.parametrize("values", [("int", 5), ("int", 8.0), ("float8_e4m3fn", 4), ("nf", 4), (["int"], 8)])
def test_unsupported_activations_are_refused(values: tuple[Any, Any]) -> None:
    with pytest.raises(SpecError, match="activations are quantized to"):
        ActivationSpec(*values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("float8_e4m3fn", 8, False), "a float has no zero point"),
        (("int", 4, 0), "symmetric must be True or False"),
    ],
)
def test_asymmetric_activations_that_cannot_be_are_refused(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ActivationSpec(*values)


def test_activations_round_trip_as_plain_data() -> None:
    asymmetric = ActivationSpec(bits=4, symmetric=False)
    assert asymmetric.to_dict() == {"format": "int", "bits": 4, "symmetric": False}
    assert ActivationSpec.from_dict(asymmetric.to_dict()) == asymmetric
    assert ActivationSpec().to_dict() == {"format": "int", "bits": 8}  # as it was before there were zero points


@pytest.mark.parametrize("group_size", [None, "tensor", 8])
@pytest.mark.parametrize(
    ("values", "symmetric"),
    [
        (values, symmetric)
        for values in FORMATS
        for symmetric in (True, False)
        if symmetric or values["format"] != "ternary"
    ],
)
def test_companions_are_what_rounding_stores(values: dict[str, Any], group_size: Any, symmetric: bool) -> None:
    for shape in ((5, 40), (3, 5, 40)):
        spec = WeightSpec(**values, group_size=group_size, symmetric=symmetric)
        if len(shape) == 3 and spec.has_fitted_table:
            continue  # refused: tests/rounding
        packed = round_to_nearest(torch.randn(shape, generator=torch.Generator().manual_seed(1)), spec)
        made = {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in packed.tensors().items()}
        assert made == spec.companions(shape[:-1], shape[-1])


@pytest.mark.parametrize(
    ("scale_dtype", "stored"), [("bfloat16", torch.int16), ("float16", torch.int16), ("float32", torch.int32)]
)
def test_scales_are_stored_as_integers(scale_dtype: str, stored: torch.dtype) -> None:
    companions = WeightSpec("nf", 4, symmetric=False, scale_dtype=scale_dtype).companions((3,), 8)
    assert companions["_scale"] == ((3, 1), stored)
    assert companions["_zero_point"] == ((3, 1), stored)


@pytest.mark.parametrize("group_size", [None, "tensor", 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_real_zero_points_of_integers_are_stored_like_scales(bits: int, group_size: Any) -> None:
    spec = WeightSpec("int", bits, group_size, symmetric=False, real_zero_point=True)
    assert not spec.has_integer_zero_point
    for shape in ((5, 40), (3, 5, 40)):
        companions = spec.companions(shape[:-1], shape[-1])
        assert companions["_zero_point"] == companions["_scale"]
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 2
        packed = round_to_nearest(weight, spec)
        made = {suffix: (tuple(tensor.shape), tensor.dtype) for suffix, tensor in packed.tensors().items()}
        assert made == companions
        assert (weight - decode(packed)).abs().max() <= 1.1 * (weight.max() - weight.min()) / (2**bits - 1) / 2 + 0.02


def test_a_real_zero_point_spends_no_level_on_an_absent_zero() -> None:
    """The range need not contain zero: weights around 10 keep all levels, which an integer zero point denies them."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) + 10
    integer = WeightSpec("int", 4, symmetric=False, scale_dtype="float32")
    errors = [
        (weight - decode(round_to_nearest(weight, spec))).abs().mean()
        for spec in (integer, replace(integer, real_zero_point=True))
    ]
    assert errors[1] < 0.5 * errors[0]


def test_a_config_passes_real_zero_points_on_where_they_can_be() -> None:
    overrides: dict[str, dict[str, Any]] = {
        "one": {"bits": 1},
        "other": {"format": "nf"},
        "even": {"symmetric": True},
        "coarse": {"real_zero_point": False},
    }
    config = RTNConfig(bits=4, symmetric=False, real_zero_point=True, overrides=overrides)
    real = {name: config.layer_spec(name).weight.real_zero_point for name in ("any", *overrides)}
    assert real == {"any": True, "one": False, "other": False, "even": False, "coarse": False}
    assert RTNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="needs symmetric=False"):
        RTNConfig(bits=4, real_zero_point=True)
    with pytest.raises(ConfigError, match="needs symmetric=False"):
        RTNConfig(bits=4, symmetric=False, overrides={"x": {"symmetric": True, "real_zero_point": True}})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_real_zero_points_survive_saving(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = RTNConfig(bits=bits, group_size=16, symmetric=False, real_zero_point=True)
    model = hf_lowbit.quantize(nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8)).eval(), config)
    hf_lowbit.save(model, tmp_path)
    again = hf_lowbit.load(tmp_path, nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 8)).eval())
    assert again[0].layer_spec.weight.real_zero_point
    assert again[0].weight_zero_point.dtype == torch.int16
    x = torch.randn(3, 32)
    assert torch.equal(model(x), again(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_open_power_spec_knows_its_shapes_and_not_its_values(symmetric: bool) -> None:
    spec = WeightSpec("power", 4, 8, symmetric=symmetric)
    complete = replace(spec, exponent=0.5)
    assert spec.is_open and not complete.is_open and not WeightSpec().is_open
    assert spec.companions((3,), 16) == complete.companions((3,), 16)
    assert WeightSpec.from_dict(json.loads(spec.json)) == spec
    with pytest.raises(ValueError, match="power' needs an exponent: give exponent=a"):
        spec.number_format  # noqa: B018
    with pytest.raises(ValueError, match="needs an exponent"):
        round_to_nearest(torch.ones(2, 16), spec)


def test_a_method_that_does_not_search_refuses_an_open_spec() -> None:
    with pytest.raises(ConfigError, match="RTNConfig: format 'power' needs an exponent"):
        RTNConfig(format="power")
    with pytest.raises(ConfigError, match="needs an exponent"):
        RTNConfig(overrides={"x": {"format": "power", "bits": 4}})


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(SpecError, match="group_size=16 does not divide the input width 40"):
        WeightSpec(group_size=16).companions((4,), 40)


@pytest.mark.parametrize("values", FORMATS, ids=label)
def test_dict_round_trip_through_json(values: dict[str, Any]) -> None:
    spec = WeightSpec(**values, group_size=16, scale_dtype="float16", symmetric=values["format"] == "ternary")
    assert WeightSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_dict_holds_defaults_only_where_readers_look_for_them() -> None:
    assert WeightSpec().to_dict() == {"format": "int", "bits": 4, "group_size": None}


def test_unknown_fields_are_named() -> None:
    with pytest.raises(SpecError, match="WeightSpec: colour, taste"):
        WeightSpec.from_dict({"format": "int", "taste": 1, "colour": 2})
    with pytest.raises(SpecError, match="ActivationSpec: taste"):
        ActivationSpec.from_dict({"taste": 1})


def test_activation_dict_round_trip() -> None:
    spec = ActivationSpec("int", 6)
    assert ActivationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
