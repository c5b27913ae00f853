"""``hf-lowbit evaluate``: stages and tasks, and what is refused before the work."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.evaluation.test_tasks import write_task

CALIBRATION = ("--set", "num_samples=2", "--set", "sequence_length=64")


@pytest.fixture(scope="module")
def calibrated(llama: Path, text: Path, run_json) -> Path:
    """The Llama by a method that needs data, with quantized inputs. Tests must not change it."""
    folder = llama.parent / "llama-smooth"
    run_json(
        "quantize", llama, "--method", "smoothquant", "--bits", 4, "--data", text, *CALIBRATION, "--output", folder
    )
    return folder


def options(text: Path) -> tuple[object, ...]:
    return ("--data", text, "--sequence-length", 64, "--max-tokens", 600)


def test_stages_of_a_method_without_data(run: Run, run_json, llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run_json("quantize", llama, "--method", "rtn", "--bits", 3, "--group-size", 32, "--output", folder)
    values = run_json("evaluate", folder, "--reference", llama, "--stages", *options(text), "--save")
    assert list(values["stages"]) == ["float", "transformed", "rounded", "packed"] and values["requantized"] is True
    assert values["stages"]["transformed"]["kl"] == 0.0 < values["stages"]["rounded"]["kl"]
    assert values["kl"] == values["stages"]["packed"]["kl"]
    assert (values["method"], values["bits_per_weight"]) == ("rtn", 3.5)
    kept = json.loads((folder / "lowbit_report.json").read_text())["evaluation"]
    assert kept["stages"] == values["stages"] and "--stages" in kept["command"]
    assert "method" not in kept and str(tmp_path) not in json.dumps(kept)
    shown = run("evaluate", folder, "--reference", llama, "--stages", *options(text)).stdout
    assert [line.split()[0] for line in shown.splitlines()[2:6]] == list(values["stages"])
    assert "[" in shown and "predicted tokens" in shown


def test_stages_of_a_method_with_data(run: Run, run_json, llama: Path, calibrated: Path, text: Path) -> None:
    command = ("evaluate", calibrated, "--reference", llama, "--stages", *options(text))
    without = run_json(*command)
    assert list(without["stages"]) == ["float", "rounded", "packed"] and without["requantized"] is None
    values = run_json(*command, "--calibration", text)
    assert values["requantized"] is True and values["stages"]["transformed"]["kl"] < 1e-6
    assert {name: values["stages"][name] for name in without["stages"]} == without["stages"]
    assert values["method"] == "smoothquant, inputs int 8 bits"


def test_other_data_give_other_codes(run: Run, llama: Path, calibrated: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("0123456789 ÄÖÜ ?!$ " * 60)
    result = run(
        "evaluate", calibrated, "--reference", llama, "--stages", *options(text), "--calibration", other, "--json"
    )
    assert json.loads(result.stdout)["requantized"] is False
    assert "gave other codes than the model has" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages"], "add --reference"),
        (["--calibration", "self"], "--calibration is for --stages"),
        (["--limit", "3"], "--limit is about tasks"),
        (["--task-folder", "."], "--task-folder is about tasks"),
        (["--tasks", ","], "names separated by commas"),
        (["--tasks", "x", "--task-folder", "nowhere"], "no folder 'nowhere'"),
        (["--limit", "0"], "Invalid value for '--limit'"),
    ],
)
def test_refusals(run: Run, quantized: Path, arguments: list[str], message: str) -> None:
    result = run("evaluate", quantized, *arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_stages_need_a_quantized_model_and_data_that_exist(
    run: Run, llama: Path, calibrated: Path, quantized: Path
) -> None:
    result = run("evaluate", llama, "--reference", llama, "--stages")
    assert result.exit_code == 2 and "not quantized" in result.stderr
    result = run("evaluate", calibrated, "--reference", llama, "--stages", "--calibration", "none.txt")
    assert result.exit_code == 2 and "no file 'none.txt'" in result.stderr


def test_a_missing_harness_names_the_extra(run: Run, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("evaluate", quantized, "--tasks", "arc_easy")
    assert result.exit_code == 2 and "hf_lowbit[lm-eval]" in result.stderr


def test_tasks(run: Run, run_json, llama: Path, quantized: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    command = ("evaluate", quantized, "--reference", llama, *options(text), "--tasks", "tiny_choice")
    folder = write_task(tmp_path)
    values = run_json(*command, "--task-folder", folder, "--limit", 5)
    assert values["tasks"]["tiny_choice"]["samples"] == values["reference_tasks"]["tiny_choice"]["samples"] == 5
    assert values["kl"] > 0
    shown = run(*command, "--task-folder", folder).stdout
    assert "tiny_choice, acc" in shown and "(reference: 0." in shown
