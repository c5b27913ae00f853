"""Memory handed back: of mapped checkpoints the pages, of tensors that are parts of them what lies beside."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_lowbit.calibration import heap
from hf_lowbit.calibration.heap import alone, hand_back_pages

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def mapped(folder: Path, elements: int) -> dict[str, Tensor]:
    """Two tensors of a mapped file."""
    torch.manual_seed(0)
    save_file({name: torch.randn(elements) for name in "ab"}, folder / "model.safetensors")
    os.sync()  # the system keeps pages that are not on disk yet
    return load_file(folder / "model.safetensors")


def resident(kind: str) -> int:
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def test_a_part_of_something_larger_is_copied() -> None:
    whole = torch.randn(8, 4)
    assert alone(whole) is whole
    part = alone(whole[2:4])
    assert torch.equal(part, whole[2:4]) and part.untyped_storage().nbytes() == 32


@linux
def test_a_mapped_tensor_is_copied(tmp_path: Path) -> None:
    tensor = mapped(tmp_path, 64)["a"]
    copied = alone(tensor)
    assert copied.data_ptr() != tensor.data_ptr() and torch.equal(copied, tensor)
    assert alone(copied) is copied


@linux
def test_pages_of_a_mapped_file_go_and_come_back(tmp_path: Path) -> None:
    tensors = mapped(tmp_path, 1 << 25)
    total = [tensor.sum() for tensor in tensors.values()]  # reads all of it
    before = resident("RssFile")
    hand_back_pages(tensors.values())
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert resident("RssFile") < before - size / 2  # each processor may hold tens of megabytes back
    assert [tensor.sum() for tensor in tensors.values()] == total


@linux
def test_values_that_were_changed_in_place_are_not_lost(tmp_path: Path) -> None:
    tensors = mapped(tmp_path, 1 << 16)
    expected = {name: tensor + 1 for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor += 1
    hand_back_pages(tensors.values())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_what_is_not_mapped_is_left_alone() -> None:
    tensors = [torch.randn(1 << 16), torch.zeros(0), torch.empty(4, device="meta")]
    expected = tensors[0].clone()
    hand_back_pages(tensors)
    assert torch.equal(tensors[0], expected)
    assert all(alone(tensor) is tensor for tensor in tensors)


def test_without_a_list_of_mappings_nothing_is_known_of_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(heap, "_MAPS", tmp_path / "absent")
    tensor = mapped(tmp_path, 64)["a"]
    assert alone(tensor) is tensor
    hand_back_pages([tensor])
