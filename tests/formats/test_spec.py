"""Specifications: strict plain data, from which the shape of every stored tensor follows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hf_lowbit.formats import ActivationSpec, SpecError, WeightSpec
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
        ({"format": "power"}, "needs an exponent"),
        ({"format": "power", "exponent": "half"}, "exponent must be a number"),
        ({"exponent": 0.5}, "exponent belongs to format 'power'"),
        ({"codebook": (0.0, 1.0)}, "codebook belongs to format 'codebook'"),
        ({"format": "codebook", "codebook": ("a", "b")}, "list of numbers"),
        ({"format": "codebook", "codebook": 3}, "list of numbers"),
        ({"format": "codebook", "bits": 9}, "1 to 8"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        WeightSpec(**values)


@pytest.mark.parametrize("values", [("int", 5), ("int", 8.0), ("float8_e4m3fn", 4), ("nf", 4), (["int"], 8)])
def test_unsupported_activations_are_refused(values: tuple[Any, Any]) -> None:
    with pytest.raises(SpecError, match="activations are quantized to"):
        ActivationSpec(*values)


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
