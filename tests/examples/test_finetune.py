"""The example of fine-tuning runs as it stands there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.cli.conftest import llama  # noqa: F401  # a fixture, found here by its name

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.py"


@pytest.mark.slow
def test_the_example_runs(llama: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("trl")
    source, output = tmp_path / "source", tmp_path / "tuned"
    shutil.copytree(llama, source)
    AutoTokenizer.from_pretrained(llama, eos_token="<s>", pad_token="<s>").save_pretrained(source)
    command = [sys.executable, EXAMPLE, source, output, "--steps", "3", "--length", "32"]
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bits per weight" in done.stdout
    assert json.loads((output / "lowbit_adapter" / "adapter_config.json").read_text())["r"] == 16
