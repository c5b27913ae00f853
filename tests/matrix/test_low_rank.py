"""Every method takes a low-rank part that is solved for with its layers' inputs, and saves and reloads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowbit
from hf_lowbit import LowRankConfig
from hf_lowbit.plan import packed_modules
from tests.matrix.conftest import config_of, data_of
from tests.matrix.models import MODELS, TinyModel, fingerprint

RANK = 3
OWN = ("svdquant",)  # its branch is the method, of the weight and not of its error: other metrics are refused


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_weighted_by_its_inputs_it_saves_and_reloads(
    method: Any, name: str, float_folder: Callable[[TinyModel], Path], tmp_path: Path
) -> None:
    check(method, MODELS[name], float_folder(MODELS[name]), tmp_path)


@pytest.mark.parametrize("method_name", ["rtn", "gptq"])
def test_experts_too(method_name: str, float_folder: Callable[[TinyModel], Path], tmp_path: Path) -> None:
    tiny = MODELS["qwen3_moe"]
    check(hf_lowbit.methods()[method_name], tiny, float_folder(tiny), tmp_path)


def test_convolutions_too(float_folder: Callable[[TinyModel], Path], tmp_path: Path) -> None:
    tiny = MODELS["whisper"]
    check(hf_lowbit.methods()["rtn"], tiny, float_folder(tiny), tmp_path)


def check(method: Any, tiny: TinyModel, folder: Path, tmp_path: Path) -> None:
    config = config_of(method, tiny)
    metric = "identity" if method.name in OWN else "full"
    config.low_rank, config.dataset, config.num_samples = LowRankConfig(RANK, metric=metric), data_of(tiny), 2
    model = tiny.load(folder, quantization_config=config)
    modules = packed_modules(model)
    assert {module.layer_spec.low_rank for module in modules.values()} == {RANK}
    for module in modules.values():
        for parameter in module.packed_parameters:
            assert any(factor.any() for factor in module.low_rank_factors(parameter, torch.float32) or ())
    output, report = tiny.run(model), hf_lowbit.report(model)
    assert all(layer.low_rank == RANK for layer in report.layers)
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    reloaded = tiny.load(tmp_path / "packed")
    assert fingerprint(reloaded) == fingerprint(model)
    assert torch.equal(tiny.run(reloaded), output)
