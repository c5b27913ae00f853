"""device_map and offload."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.matrix.conftest import quantized
from tests.matrix.models import MODELS, TinyModel, fingerprint

LLAMA = MODELS["llama"]
_DISK = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
_DISK |= {"model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps_give_the_same_bits(
    method: Any, tiny: TinyModel, device_map: str, artefact: Callable[..., Any], float_folder: Any
) -> None:
    if tiny.is_denoiser and device_map == "auto" and not torch.cuda.is_available():
        device_map = "cpu"  # diffusers' "auto" needs an accelerator
    saved = artefact(method, tiny)
    assert fingerprint(tiny.load(saved.folder, device_map=device_map)) == saved.tensors
    placed = quantized(method, tiny, float_folder(tiny), device_map=device_map)
    assert fingerprint(placed) == saved.tensors


def test_a_quantized_model_runs_and_saves_from_disk(method: Any, artefact: Callable[..., Any], tmp_path: Path) -> None:
    saved = artefact(method, LLAMA)
    model = LLAMA.load(saved.folder, device_map=_DISK, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(LLAMA.run(model), saved.output)
    model.save_pretrained(tmp_path / "saved")
    assert fingerprint(LLAMA.load(tmp_path / "saved")) == saved.tensors


def test_quantizing_into_disk_offload_is_refused(method: Any, float_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="offloaded to disk"):
        quantized(method, LLAMA, float_folder(LLAMA), device_map=_DISK, offload_folder=tmp_path / "offload")
