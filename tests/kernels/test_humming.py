"""The backend "humming": when it is taken, what its package is given, and how long the reordered copy lives.

The package needs an NVIDIA GPU: here a stand-in plays its part, decoding what it was given. On a GPU where the package
is installed, tests/kernels/triton/test_humming.py multiplies with it.
"""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec, decode
from hf_lowbit.kernels import BACKENDS, humming, why_not
from hf_lowbit.rounding import round_to_nearest

SPEC = WeightSpec(bits=4, group_size=128)


def packed_of(rows: int = 64, columns: int = 256, spec: WeightSpec = SPEC) -> PackedTensor:
    return round_to_nearest(torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), spec)


class StandIn:
    """HummingLayer as far as it is used."""

    made: int = 0

    def __init__(self, rows: int, columns: int, weight_config: dict[str, Any], torch_dtype: torch.dtype) -> None:
        assert weight_config == {"dtype": "int4", "group_size": 128}
        self.shape, self.dtype, self.tensors, self.ready = (rows, columns), torch_dtype, {}, False
        StandIn.made += 1

    def to(self, device: torch.device) -> StandIn:
        return self

    def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def transform(self) -> None:
        self.ready = True

    def __call__(self, x: Tensor) -> Tensor:
        assert self.ready and x.is_contiguous()
        words, scale = self.tensors["weight"], self.tensors["weight_scale"]
        assert scale.dtype == self.dtype
        packed = PackedTensor(words, scale.view(torch.int16), SPEC, self.shape[1])
        return x @ decode(packed, x.dtype).t()


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    module = ModuleType("humming.layer")
    module.HummingLayer = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "humming", ModuleType("humming"))
    monkeypatch.setitem(sys.modules, "humming.layer", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    StandIn.made = 0
    return StandIn


def test_the_package_is_given_words_and_scales_as_they_lie(package: type[StandIn]) -> None:
    packed = packed_of()
    x = torch.randn(20, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(humming.linear(x, packed), x @ decode(packed, torch.bfloat16).t())
    assert package.made == 1


def test_a_weight_is_reordered_once_and_again_when_it_changes(package: type[StandIn]) -> None:
    packed, x = packed_of(), torch.ones(20, 256).bfloat16()
    for _ in range(3):
        humming.linear(x, packed)
    assert package.made == 1
    packed.scale.copy_((packed.scale.view(torch.bfloat16) * 2).view(torch.int16))
    y = humming.linear(x, packed)
    assert package.made == 2 and torch.equal(y, x @ decode(packed, torch.bfloat16).t())
    packed.weight.zero_()
    assert torch.equal(humming.linear(x, packed), x @ decode(packed, torch.bfloat16).t())


def test_the_copy_goes_with_the_weight(package: type[StandIn]) -> None:
    packed, before = packed_of(), len(humming._kept)
    humming.linear(torch.ones(20, 256).bfloat16(), packed)
    assert len(humming._kept) == before + 1
    del packed
    gc.collect()
    assert len(humming._kept) == before


def test_it_takes_what_was_measured_and_leaves_the_rest() -> None:
    def takes(tokens: int = 20, dtype: torch.dtype = torch.bfloat16, rows: int = 64, **fields: Any) -> bool:
        spec = WeightSpec(**{"bits": 4, "group_size": 128, **fields})
        return humming.takes(torch.ones(tokens, 256, dtype=dtype), packed_of(rows, 256, spec))

    assert takes() and takes(scale_dtype="float16", dtype=torch.float16)
    assert [takes(tokens) for tokens in (1, 16, 17, 1024, 1025)] == [False, False, True, True, False]
    for fields in ({"bits": 3}, {"group_size": 64}, {"symmetric": False}, {"format": "nf"}, {"scale_dtype": "float16"}):
        assert not takes(**fields)
    assert not takes(dtype=torch.float16) and not takes(rows=40)


def test_without_the_package_it_is_refused_by_name() -> None:
    assert "humming" in BACKENDS
    if humming.unavailable_because() is not None:
        assert why_not("humming") == (
            f"backend 'humming' does not run here ({humming.unavailable_because()}); 'reference' does"
        )
