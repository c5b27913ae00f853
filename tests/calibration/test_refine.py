"""A method's last step: it sees the float model, the quantized one and the data, and its failure undoes everything."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hf_lowbit
from hf_lowbit.calibration.block import Block
from hf_lowbit.engine import Run, calibrate
from hf_lowbit.method import Recipe
from hf_lowbit.plan import packed_modules
from hf_lowbit.rounding import round_to_nearest
from tests.matrix.models import MODELS, fingerprint


def nearest(block: Block) -> None:
    for key, matrix in block.matrices.items():
        block.pack(key, round_to_nearest(matrix.weight, matrix.spec))


def config() -> hf_lowbit.LowbitConfig:
    ids = torch.randint(0, 250, (4, 8))
    return hf_lowbit.GPTQConfig(bits=4, group_size=32, dataset=ids, num_samples=4, sequence_length=8)


def test_refine_sees_both_models_and_is_reported(tmp_path: Path) -> None:
    model = MODELS["llama"].build().eval()
    before = copy.deepcopy(model)
    seen: list[str] = []

    def refine(original: nn.Module, quantized: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        assert fingerprint(original) == fingerprint(before) and not packed_modules(original)
        assert quantized is model and packed_modules(quantized)
        assert [len(batch["input_ids"]) for batch in batches] == [4] and batches[0]["use_cache"] is False
        quantized.model.norm.weight.data.mul_(2)
        seen.append("refined")
        return ["the norm is doubled"]

    calibrate(model, config(), Recipe(calibrate=nearest, refine=refine), Run(folder=tmp_path / "run"))
    assert seen == ["refined"] and "the norm is doubled" in hf_lowbit.report(model).warnings
    assert torch.equal(model.model.norm.weight, 2 * before.model.norm.weight)


def test_a_refine_that_fails_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = MODELS["llama"].build().eval()
    before = fingerprint(model)

    def refine(original: nn.Module, quantized: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        calibrate(model, config(), Recipe(calibrate=nearest, refine=refine), Run(folder=tmp_path / "run"))
    assert fingerprint(model) == before
