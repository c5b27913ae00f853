"""Quantizing while loading never holds the float model: peak memory against packed size and largest tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.memory
ALLOWANCE = 150 << 20


def _checkpoint(folder: Path, layers: int) -> Path:
    """A random Llama of 2048 x 5632 (TinyLlama's shape), in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=layers, **sizes)
    torch.set_default_dtype(torch.bfloat16)
    try:
        LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


def _measure(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "tests.memory.probe", str(folder), json.dumps(fields)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    measured: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    print(json.dumps(measured))
    return measured


def _check(measured: dict[str, Any]) -> None:
    bound = measured["packed_bytes"] + 2 * measured["largest_float_bytes"] + ALLOWANCE
    assert measured["peak_bytes"] <= bound
    assert measured["bits_per_weight"] <= 4.6


def test_a_small_model(tmp_path: Path) -> None:
    """Two layers: 0.2 billion parameters."""
    _check(_measure(_checkpoint(tmp_path / "llama", 2), {"bits": 4, "group_size": 64}))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int", "nf"])
def test_a_billion_parameters(tmp_path: Path, format: str) -> None:
    """Twenty-two layers: 1.1 billion parameters, 2.2 GB of floats."""
    measured = _measure(_checkpoint(tmp_path / "llama", 22), {"format": format, "bits": 4, "group_size": 64})
    _check(measured)
    assert measured["peak_bytes"] < measured["float_bytes"] / 2
