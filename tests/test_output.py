"""The output folder: checked before the work, complete after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_lowbit
from hf_lowbit import RTNConfig, quantization
from hf_lowbit.output import prepare_output, stored_config

CONFIG = RTNConfig(group_size=16)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if quantization starts."""

    def started(*args: Any) -> None:
        raise AssertionError("the output folder was not checked first")

    monkeypatch.setattr(quantization, "_quantize_module", started)


def test_a_plain_modules_result_is_written(tmp_path: Path) -> None:
    model = hf_lowbit.quantize(net(), CONFIG, output=tmp_path / "a" / "b")
    loaded = hf_lowbit.load(tmp_path / "a" / "b", net())
    x = torch.randn(3, 32)
    assert torch.equal(loaded(x), model(x))


def test_a_folders_result_loads_by_its_library(checkpoint: Path, tmp_path: Path) -> None:
    result = hf_lowbit.quantize(checkpoint, CONFIG, output=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in result.state_dict().items())


@pytest.mark.usefixtures("no_work")
def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for output in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(NotADirectoryError, match="is a file"):
            hf_lowbit.quantize(net(), CONFIG, output=output)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_files_of_others(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="did not write; name a new or empty folder"):
        hf_lowbit.quantize(net(), CONFIG, output=tmp_path / "out", resume=resume)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("denied", ["out", "."])
def test_a_folder_that_cannot_be_written(tmp_path: Path, denied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may its parent be closed: the result is made there and moved."""
    (tmp_path / "out").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / denied and allowed(path, mode))
    with pytest.raises(PermissionError, match="cannot be written"):
        hf_lowbit.quantize(net(), CONFIG, output=tmp_path / "out")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    hf_lowbit.quantize(net(), CONFIG, output=tmp_path / "out")
    assert (tmp_path / "out" / "lowbit_report.json").exists()


def test_a_relative_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf_lowbit.quantize(net(), CONFIG, output="out")
    assert (tmp_path / "out" / "lowbit_config.json").exists()


def test_a_finished_result_is_taken_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    first = hf_lowbit.quantize(checkpoint, CONFIG, output=tmp_path / "out")
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    again = hf_lowbit.quantize(checkpoint, CONFIG, output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in first.state_dict().items())


def test_resume_false_starts_over(checkpoint: Path, tmp_path: Path) -> None:
    hf_lowbit.quantize(checkpoint, CONFIG, output=tmp_path / "out")
    hf_lowbit.quantize(checkpoint, RTNConfig(bits=8), output=tmp_path / "out", resume=False)
    stored = stored_config(tmp_path / "out")
    assert stored is not None and stored.bits == 8


def test_the_result_of_another_config_or_source_is_not_taken(checkpoint: Path, tmp_path: Path) -> None:
    hf_lowbit.quantize(checkpoint, CONFIG, output=tmp_path / "out")
    for config, source in ((RTNConfig(bits=3), str(checkpoint)), (CONFIG, "org/other"), (CONFIG, None)):
        with pytest.raises(FileExistsError, match="another run; name another folder, or pass resume=False"):
            prepare_output(tmp_path / "out", config, source, resume=True)


def test_a_failure_writes_nothing(tmp_path: Path) -> None:
    model = net()
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        hf_lowbit.quantize(model, CONFIG, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config", ["", "{}", '{"quantization_config": 3}', '{"quantization_config": {"quant_method": "awq"}}']
)
def test_a_stored_config_that_cannot_be_read_is_none(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert stored_config(tmp_path) is None


def test_a_stored_config_is_read_from_either_file(tmp_path: Path) -> None:
    for name in ("config.json", "lowbit_config.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_text(json.dumps({"quantization_config": CONFIG.to_dict()}))
        assert stored_config(folder) == CONFIG
