"""A run that is killed at any moment resumes, and ends with the bits of one that was not."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_lowbit
from hf_lowbit.calibration.checkpoint import ResumeError
from tests.matrix.models import MODELS, fingerprint

_RUN = """
import json, sys
import torch
import hf_lowbit
torch.set_num_threads(1)
source, output = sys.argv[1:]
ids = torch.randint(0, 250, (8, 24), generator=torch.Generator().manual_seed(0))
config = hf_lowbit.GPTQConfig(bits=4, group_size=32, dataset=ids, num_samples=8, sequence_length=24)
print("ready", flush=True)
hf_lowbit.quantize(source, config, output=output)
"""


def data() -> torch.Tensor:
    return torch.randint(0, 250, (8, 24), generator=torch.Generator().manual_seed(0))


def config(**values: Any) -> Any:
    return hf_lowbit.GPTQConfig(
        bits=4, group_size=32, **{"dataset": data(), "num_samples": 8, "sequence_length": 24, **values}
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of eight blocks, so that there is something to be killed in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("source") / "llama"
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
    return folder


def start(source: Path, output: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(source), str(output)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_killed_ten_times_it_ends_with_the_same_bits(source: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    assert start(source, tmp_path / "whole").wait() == 0
    whole = time.monotonic() - begun
    chance = random.Random(0)
    for _ in range(10):
        process = start(source, tmp_path / "killed")
        time.sleep(chance.uniform(0, 0.8 * whole))
        process.kill()
        process.wait()
    assert start(source, tmp_path / "killed").wait() == 0
    results = [fingerprint(MODELS["llama"].load(tmp_path / name, torch.float32)) for name in ("whole", "killed")]
    assert results[0] == results[1]
    reports = [json.loads((tmp_path / name / "lowbit_report.json").read_text()) for name in ("whole", "killed")]
    assert [layer["error"] for layer in reports[0]["layers"]] == [layer["error"] for layer in reports[1]["layers"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"], "nothing is left beside them"


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    from hf_lowbit.calibration.progress import Progress

    step = Progress.step

    def counted(self: Progress, name: str, restored: bool) -> None:
        step(self, name, restored)
        if self.done == blocks:
            raise Interrupted

    monkeypatch.setattr(Progress, "step", counted)


def test_finished_blocks_are_taken_not_computed_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            hf_lowbit.quantize(source, config(), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    caplog.set_level(logging.INFO, "hf_lowbit")
    hf_lowbit.quantize(source, config(), output=tmp_path / "out")
    taken = [record.message for record in caplog.records if "taken from the earlier run" in record.message]
    assert len(taken) == 5


def test_another_run_is_not_resumed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            hf_lowbit.quantize(source, config(), output=tmp_path / "out")
    for other in ({"bits": 3}, {"dataset": data() + 1}, {"damping": 0.02}):
        with pytest.raises(ResumeError, match="resume=False"):
            hf_lowbit.quantize(source, config() if not other else _with(other), output=tmp_path / "out")
    result = hf_lowbit.quantize(source, _with({"bits": 3}), output=tmp_path / "out", resume=False)
    assert hf_lowbit.report(result).layers[0].bits == 3


def _with(values: dict[str, Any]) -> Any:
    fields = {"bits": 4, "group_size": 32, "dataset": data(), "num_samples": 8, "sequence_length": 24, **values}
    return hf_lowbit.GPTQConfig(**fields)


def test_an_interrupted_live_model_is_as_it_was(source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_LOWBIT_HOME", str(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        model = MODELS["llama"].load(source, dtype)
        before = fingerprint(model)
        with monkeypatch.context() as patch:
            interrupt_after(patch, 3)
            with pytest.raises(Interrupted):
                hf_lowbit.quantize(model, config())
        assert fingerprint(model) == before
        hf_lowbit.quantize(model, config())
        assert fingerprint(model) != before
    assert not list((tmp_path / "resume").iterdir())
