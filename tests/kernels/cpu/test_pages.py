"""Tensors in large pages: the same objects and values, with storages of their own."""

from __future__ import annotations

import gc
import io
import mmap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_lowbit.kernels.cpu import gather_in_large_pages, pages


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    floats = [torch.randn(size, 5, generator=generator) for size in (3, 1, 40)]
    return [floats[0], floats[1].bfloat16(), (100 * floats[2]).int(), floats[2].half(), torch.empty(0, 4)]


def test_values_types_and_shapes_are_the_same() -> None:
    given = tensors()
    before = [tensor.clone() for tensor in given]
    places = [tensor.data_ptr() for tensor in given]
    moved = gather_in_large_pages(given)
    assert moved == sum(-(-tensor.nbytes // 64) * 64 for tensor in given) > 0
    gc.collect()  # what holds the memory is what lies in it
    for tensor, expected, place in zip(given, before, places, strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
        assert tensor.data_ptr() != place or not tensor.numel()
    starts = [tensor.data_ptr() for tensor in given if tensor.numel()]
    assert starts == sorted(starts) and all(start % 64 == 0 for start in starts)


def test_parameters_stay_themselves_and_shared_ones_shared() -> None:
    parameter = nn.Parameter(torch.arange(12, dtype=torch.int32).view(3, 4), requires_grad=False)
    other = nn.Parameter(parameter.data, requires_grad=False)
    values = parameter.data.clone()
    gather_in_large_pages([parameter, other, parameter])
    assert torch.equal(parameter, values) and parameter.data_ptr() == other.data_ptr()
    parameter.data[0, 0] = 7
    assert other[0, 0] == 7


def test_are_saved_like_others(tmp_path: object) -> None:
    given = {f"t{index}": tensor for index, tensor in enumerate(tensors()) if tensor.numel()}
    expected = {name: tensor.clone() for name, tensor in given.items()}
    gather_in_large_pages(given.values())
    save_file(given, f"{tmp_path}/model.safetensors")  # refuses tensors of one storage
    buffer = io.BytesIO()
    torch.save(given, buffer)
    buffer.seek(0)
    for loaded in (load_file(f"{tmp_path}/model.safetensors"), torch.load(buffer)):
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert buffer.getbuffer().nbytes < 2 * sum(tensor.nbytes for tensor in given.values()) + 8192


@pytest.mark.parametrize("missing", ["MADV_HUGEPAGE", "MAP_ANONYMOUS"])
def test_a_system_without_them_leaves_all_where_it_is(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, missing)
    given = tensors()
    places = [tensor.data_ptr() for tensor in given]
    assert pages.gather_in_large_pages(given) == 0
    assert [tensor.data_ptr() for tensor in given] == places
