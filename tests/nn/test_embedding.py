"""Packed embedding tables: rows are decoded when they are looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import LayerSpec, PackedEmbedding, PackedModule

Pack = Callable[[nn.Module, LayerSpec], PackedModule]


@pytest.mark.parametrize("group_size", [None, "tensor", 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("low_rank", [0, 3])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)])
def test_rows_are_those_of_the_dequantized_table(
    group_size: Any, symmetric: bool, low_rank: int, shape: tuple[int, ...], pack: Pack
) -> None:
    module = pack(nn.Embedding(20, 16), LayerSpec(WeightSpec("int", 3, group_size, symmetric), low_rank=low_rank))
    indices = torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(0))
    expected = module.to_float(torch.float32)(indices)
    y = module(indices)
    assert y.shape == expected.shape
    assert torch.allclose(y, expected, atol=1e-6)


@pytest.mark.parametrize("index", [-1, 20])
def test_an_index_out_of_range_raises_as_torch_does(index: int, pack: Pack) -> None:
    module = pack(nn.Embedding(20, 16), LayerSpec(WeightSpec()))
    with pytest.raises(IndexError):
        module.to_float(torch.float32)(torch.tensor([index]))
    with pytest.raises(IndexError):
        module(torch.tensor([index]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_padding_row_stays_zero(symmetric: bool, pack: Pack) -> None:
    module = pack(nn.Embedding(20, 16, padding_idx=3), LayerSpec(WeightSpec("nf", 4, symmetric=symmetric)))
    assert (module(torch.tensor([3])) == 0).all()
    restored = module.to_float(torch.float32)
    assert isinstance(restored, nn.Embedding) and restored.padding_idx == module.padding_idx == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_type_is_the_tables(dtype: torch.dtype, pack: Pack) -> None:
    indices = torch.tensor([1, 2])
    made = pack(nn.Embedding(20, 16, dtype=dtype), LayerSpec(WeightSpec()))
    cast = pack(nn.Embedding(20, 16), LayerSpec(WeightSpec())).to(dtype)
    assert made(indices).dtype == cast(indices).dtype == dtype
    assert "output_dtype" not in made.state_dict()


def test_max_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="max_norm"):
        PackedEmbedding.from_float(nn.Embedding(20, 16, max_norm=1.0), LayerSpec(WeightSpec()))
