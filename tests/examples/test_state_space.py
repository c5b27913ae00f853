"""The example of state-space models runs as it stands there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path) -> None:
    assets, output = ROOT / "tests" / "assets", tmp_path / "packed"
    data = ["--data", assets / "debian-text" / "calibration.txt", "--samples", "2", "--length", "64"]
    command = [sys.executable, ROOT / "examples" / "state_space.py", assets / "mamba2-debian", output, *data]
    done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    chosen = next(line for line in lines if line.startswith("W4A16: ")).removeprefix("W4A16: ").split(", ")
    assert len(chosen) == 1 and chosen[0].startswith("backbone.layers."), "a quarter of seven"
    assert any("bits per weight" in line for line in lines) and len(lines[-1]) > len("The package is installed by")
    overrides = json.loads((output / "config.json").read_text())["quantization_config"]["overrides"]
    assert any(chosen[0].rpartition(".")[2] in pattern for pattern in overrides)
