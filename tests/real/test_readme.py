"""The README's Python examples run as they stand there, in one process, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lowbit.testbed import calibration_text, smollm2, whisper_tiny_en

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]


def test_examples_run(tmp_path: Path) -> None:
    """Repository ids are replaced by the cached folders; pushing has its own tests against the local Hub."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    program = "\n".join(block for block in blocks if "push_to_hub" not in block)
    assert program.count("from_pretrained") >= 6
    places = {"HuggingFaceTB/SmolLM2-135M-Instruct": smollm2(), "openai/whisper-tiny.en": whisper_tiny_en()}
    assets = ("sd-fashion", "mamba2-debian", "debian-text/calibration.txt")
    for name, folder in {**places, **{f"tests/assets/{name}": ROOT / "tests/assets" / name for name in assets}}.items():
        assert f'"{name}"' in program
        program = program.replace(f'"{name}"', f'"{folder}"')
    (tmp_path / "prose.txt").write_text(calibration_text())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {"smollm2-4bit", "sd-fashion-8bit", "mamba2-8bit", "my-adapter"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert float(result.stdout.split()[0]) < 4.6
