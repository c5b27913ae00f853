"""The remembered sums of a weight: never those of another."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import torch
from torch import nn

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.kernels import row_sums
from hf_lowbit.nn import LayerSpec, PackedModule

Pack = Callable[[nn.Module, LayerSpec], PackedModule]
SPEC = LayerSpec(WeightSpec(bits=4, group_size=16), ActivationSpec("int", 8, symmetric=False))


def layer(pack: Pack, seed: int) -> PackedModule:
    torch.manual_seed(seed)
    return pack(nn.Linear(32, 8), SPEC)


def test_they_are_computed_once(pack: Pack) -> None:
    packed = layer(pack, 0)
    sums = packed.row_sums()
    assert sums is not None and torch.equal(sums, row_sums(packed.packed(), 1))
    assert packed.row_sums() is sums
    assert set(packed.state_dict()) == {"weight", "weight_scale", "bias"}  # nothing of them is stored


def test_other_codes_have_other_sums(pack: Pack) -> None:
    packed, other = layer(pack, 0), layer(pack, 1)
    expected = other.row_sums()
    assert expected is not None and not torch.equal(packed.row_sums(), expected)  # type: ignore[arg-type]
    packed.set_packed("weight", other.packed())
    assert torch.equal(packed.row_sums(), expected)  # type: ignore[arg-type]
    for assign in (False, True):
        loaded = layer(pack, 0)
        loaded.row_sums()
        loaded.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(loaded.row_sums(), expected)  # type: ignore[arg-type]
    moved = layer(pack, 0)
    moved.row_sums()
    moved.get_parameter("weight").data = other.get_parameter("weight").data.clone()
    moved.get_parameter("weight_scale").data = other.get_parameter("weight_scale").data.clone()
    assert torch.equal(moved.row_sums(), expected)  # type: ignore[arg-type]


def test_copies_and_casts(pack: Pack) -> None:
    packed = layer(pack, 0)
    expected = packed.row_sums()
    assert expected is not None
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), packed.to(torch.bfloat16).half()):
        assert torch.equal(other.row_sums(), expected)
    changed = copy.deepcopy(packed)
    changed.get_parameter("weight_scale").mul_(0)
    assert not changed.row_sums().any() and torch.equal(packed.row_sums(), expected)  # type: ignore[union-attr,arg-type]


def test_without_a_shift_there_are_none(pack: Pack) -> None:
    assert pack(nn.Linear(32, 8), LayerSpec(SPEC.weight, ActivationSpec())).row_sums() is None
    assert pack(nn.Linear(32, 8), LayerSpec(SPEC.weight)).row_sums() is None
