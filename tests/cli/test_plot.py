"""``hf-lowbit plot``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

pytest.importorskip("matplotlib")


def test_quality(run: Run, run_json, llama: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    options = ("--reference", llama, "--data", text, "--sequence-length", 64, "--max-tokens", 600)
    folder = tmp_path / "out"
    run_json("quantize", llama, "--method", "hqq", "--bits", 3, "--group-size", 32, "--output", folder)
    run_json("evaluate", folder, *options, "--save")
    (tmp_path / "rtn.json").write_text(json.dumps(run_json("evaluate", quantized, *options)))
    for metric in ("kl", "perplexity", "top1_agreement"):
        picture = tmp_path / f"{metric}.png"
        result = run("plot", folder, tmp_path / "rtn.json", "--output", picture, "--metric", metric, "--title", "Llama")
        assert result.exit_code == 0 and str(picture) in result.stdout.replace("\n", ""), result.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_layer_errors(run: Run, quantized: Path, tmp_path: Path) -> None:
    result = run("plot", quantized, quantized, "--errors", "--output", tmp_path / "errors.svg")
    assert result.exit_code == 0, result.stderr
    assert "<svg" in (tmp_path / "errors.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "picture.jpg"], "written as .png"),
        (["--output", "nowhere/picture.png"], "no folder 'nowhere'"),
        (["--output", "picture.png", "--metric", "loss"], "unknown metric 'loss'"),
        (["--output", "picture.png"], "not measured yet"),
    ],
)
def test_refusals(
    run: Run, quantized: Path, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("plot", quantized, *arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert not list(tmp_path.iterdir())


def test_errors_of_a_float_model(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("plot", llama, "--errors", "--output", tmp_path / "errors.png")
    assert result.exit_code == 2 and "not quantized" in result.stderr
