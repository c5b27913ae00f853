"""Activations are the same from memory and from disk."""

from __future__ import annotations

from pathlib import Path

import torch

from hf_lowbit.calibration.store import TensorStore


def test_what_exceeds_the_limit_is_on_disk(tmp_path: Path) -> None:
    tensors = [torch.randn(4, 8).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    with TensorStore(limit=4 * 8 * 4 + 10, folder=tmp_path) as store:
        keys = [store.put(tensor) for tensor in tensors]
        assert store.held == 128 and store.spilled == 64 + 128
        assert len(list(tmp_path.glob("*/*.safetensors"))) == 2
        for key, tensor in zip(keys, tensors, strict=True):
            assert store.get(key).dtype == tensor.dtype and torch.equal(store.get(key), tensor)
        store.replace(keys[0], tensors[1])
        assert torch.equal(store.get(keys[0]), tensors[1]) and store.held == 64
        store.drop(keys[2])
        assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
    assert not list(tmp_path.iterdir())
