"""``hf-lowbit compare``: the result, and what it refuses before the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

DIT = Path(__file__).parents[1] / "assets" / "dit-fashion"


def test_compare(run_json: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("0\n\n9\n")
    output = tmp_path / "result"
    twin = tmp_path / "twin"
    twin.symlink_to(DIT)
    values = run_json("compare", DIT, twin, "--prompts", prompts, "--prompts", "8", "--steps", 1, "--call",
        "guidance_scale=2", "--output", output)  # fmt: skip
    assert values["prompts"] == [0, 9, 8] and values["steps"] == 1 and values["output"] == str(output)
    assert [row["label"] for row in values["rows"]] == ["dit-fashion", "twin"]
    assert values["rows"][1]["ssim"] == 1
    assert sorted(path.name for path in output.iterdir()) == ["compare.json", "grid.png", "pareto.png"]


def test_refusals(run: Callable[..., Any], tmp_path: Path) -> None:
    taken, empty = tmp_path / "taken", tmp_path / "empty.txt"
    taken.mkdir()
    (taken / "something").touch()
    empty.touch()
    new = tmp_path / "new"
    cases = {
        "is not empty": (DIT, DIT, "--prompts", "1", "--output", taken),
        "no prompt": (DIT, DIT, "--prompts", empty, "--output", new),
        "there is no file": (DIT, DIT, "--prompts", "absent.txt", "--output", new),
        "two pipelines": (DIT, "--prompts", "1", "--output", new),
        "there is no folder": (DIT, tmp_path / "absent", "--prompts", "1", "--output", new),
        "no diffusion pipeline": (DIT, taken, "--prompts", "1", "--output", new),
        "class labels such as 0": (DIT, DIT, "--prompts", "a bag", "--output", new),
        "no picture classifier": (DIT, DIT, "--prompts", "1", "--classifier", taken, "--output", new),
    }
    for message, arguments in cases.items():
        result = run("compare", *arguments)
        assert result.exit_code == 2 and message in result.stderr, (message, result.stderr)
    assert not new.exists()
