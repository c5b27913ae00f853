"""ActivationSpec: what inputs can be quantized to, and what a layer's overrides leave of the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_lowbit.formats import ActivationSpec, SpecError
from hf_lowbit.formats.activation import activation_of, inherited_fields

SPECS = [
    ActivationSpec(),
    ActivationSpec("int", 4, False, 64),
    ActivationSpec("int", 4, group_size=64),
    ActivationSpec("int", 8, static=True),
    ActivationSpec("float8_e4m3fn", 8, static=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_trips_through_json(spec: ActivationSpec) -> None:
    assert ActivationSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert json.loads(spec.json) == spec.to_dict()


def test_defaults_are_not_written() -> None:
    """Checkpoints of dynamic per-token inputs look as they did before there was anything else."""
    assert ActivationSpec("int", 8).to_dict() == {"format": "int", "bits": 8}
    assert ActivationSpec("int", 4, group_size=64).to_dict() == {"format": "int", "bits": 4, "group_size": 64}


def test_names_say_what_is_done() -> None:
    assert [str(spec) for spec in SPECS] == [
        "int 8 bits",
        "int 4 bits, asymmetric, groups of 64",
        "int 4 bits, groups of 64",
        "int 8 bits, static",
        "float8_e4m3fn 8 bits, static",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 0}, "group size of activations must be a positive integer or None, not 0"),
        ({"group_size": True}, "must be a positive integer or None, not True"),
        ({"group_size": "tensor"}, "must be a positive integer or None, not 'tensor'"),
        ({"static": 1}, "static must be True or False, not 1"),
        ({"format": "float8_e4m3fn", "symmetric": False}, "a float has no zero point"),
        ({"shift": True, "static": True}, "a shift is of static activations of a floating-point format"),
        ({"shift": True, "format": "float8_e4m3fn"}, "a shift is of static activations of a floating-point format"),
        ({"timesteps": ()}, "scales of timesteps are static ones, not those of int 8 bits, its timesteps"),
        ({"timesteps": (1, 2), "static": True}, r"distinct and in the order of denoising, the largest first: \(1, 2\)"),
        ({"timesteps": (2, 2.0), "static": True}, "distinct"),
        ({"timesteps": (True,), "static": True}, r"finite numbers of at least 0, not \(True,\)"),
        ({"timesteps": (-1,), "static": True}, "finite numbers of at least 0"),
        ({"timesteps": (float("nan"),), "static": True}, "finite numbers of at least 0"),
        ({"timesteps": "ab", "static": True}, "finite numbers of at least 0"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ActivationSpec(**values)


def test_groups_of_a_row() -> None:
    assert ActivationSpec().groups(100) == 1
    assert ActivationSpec("int", 4, group_size=25).groups(100) == 4
    with pytest.raises(SpecError, match="groups of 24, which do not divide 100 inputs"):
        ActivationSpec("int", 4, group_size=24).groups(100)


def test_timesteps_are_plain_data() -> None:
    spec = ActivationSpec("int", 8, False, 32, True, (961, 481.0, 0.5, 0))
    assert spec.timesteps == (961, 481, 0.5, 0) and spec.has_shift
    assert str(spec) == "int 8 bits, asymmetric, groups of 32, static, 4 timesteps"
    again = ActivationSpec.from_dict(json.loads(spec.json))
    assert again == spec and hash(again) == hash(spec)
    assert ActivationSpec(static=True, timesteps=()).to_dict()["timesteps"] == []
    shifted = ActivationSpec("float8_e4m3fn", 8, static=True, shift=True)
    assert shifted.has_shift and str(shifted) == "float8_e4m3fn 8 bits, shifted, static"


def test_neither_width_nor_format_is_full_precision() -> None:
    assert activation_of(None, None, True, 64, True) is None
    assert activation_of(None, "fp_e4m3fn", True, None, True) == ActivationSpec("float8_e4m3fn", 8, static=True)
    assert activation_of(4, None, False, 64, False) == ActivationSpec("int", 4, False, 64)
    assert activation_of(8, None, False, 64, True, True) == ActivationSpec("int", 8, False, 64, True, ())


@pytest.mark.parametrize(
    ("overrides", "reset"),
    [
        ({}, {}),
        ({"bits": 3}, {}),
        ({"activation_bits": 8}, {}),
        ({"activation_static": True, "activation_group_size": 64, "activation_symmetric": False}, {}),
        ({"activation_static": False}, {"activation_timesteps": False, "activation_shift": False}),
        ({"activation_format": "float8_e4m3fn"}, {"activation_symmetric": True}),
        ({"activation_format": "int"}, {"activation_shift": False}),
        ({"activation_format": None}, {"activation_shift": False}),
    ],
)
def test_what_cannot_go_with_an_override_is_reset(overrides: dict[str, Any], reset: dict[str, Any]) -> None:
    assert inherited_fields(overrides) == reset
