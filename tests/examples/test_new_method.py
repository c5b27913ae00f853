"""The example plugin of CONTRIBUTING.md is found like a third party's, and keeps the matrix' promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "new_method"


def test_contributing_shows_the_example_as_it_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in ("__init__.py", "recipe.py"):
        assert (EXAMPLE / "hf_lowbit_stochastic" / name).read_text().strip() in text, name


def test_the_example_joins_the_matrix(tmp_path: Path) -> None:
    """Its entry point is all that makes the suite run it."""
    metadata = tmp_path / "hf_lowbit_stochastic-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hf-lowbit-stochastic\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[hf_lowbit.methods]\nstochastic = hf_lowbit_stochastic:METHOD\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(EXAMPLE)])}
    chosen = "stochastic and (llama or qwen3_moe or whisper) and not float16"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/matrix/test_promises.py", "-k", chosen, "-p", "no:cacheprovider"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout.splitlines()[-1]
