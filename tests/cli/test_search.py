"""hf-lowbit search: a config within the budget that quantize accepts, and refusals before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

SMALL = ("--set", "num_samples=4", "--set", "sequence_length=32", "--group-size", 32)


def test_the_written_config_quantizes_to_the_budget(run_json, llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "mixed.json"
    command = ("search", llama, "--method", "gptq", "--data", text, *SMALL, "--bits-per-weight", 4.1)
    found = run_json(*command, "--output", output)
    assert found["model"] == str(llama) and found["metric"] == "hessian"
    assert 3.9 < found["bits_per_weight"] <= 4.1
    assert len({group["bits"] for group in found["groups"]}) > 1
    assert json.loads(output.read_text()) == found["config"]
    made = run_json("quantize", llama, "--config", output, "--data", text, "--output", tmp_path / "out")
    assert made["bits_per_weight"] == found["bits_per_weight"]
    chosen = {f"{name}.weight": group["bits"] for group in found["groups"] for name in group["layers"]}
    assert {layer["name"]: layer["bits"] for layer in made["layers"] if layer["elements"]} == chosen


def test_terminal_output_lists_groups(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "mixed.json"
    options = ("--candidates", "3,4", "--metric", "output", "--output", output)
    fixed = ("--set", "overrides.down_proj.bits=8", "--data", text, *SMALL)
    result = run("search", llama, "--method", "rtn", "--bits-per-weight", 4, *options, *fixed)
    assert result.exit_code == 2 and "cannot be reached" in result.stderr and not output.exists()
    result = run("search", llama, "--method", "rtn", *options, *fixed, "--bits-per-weight", 5)
    assert result.exit_code == 0, result.stderr
    assert "model.layers.0.self_attn.{q_proj, k_proj, v_proj}" in result.stdout
    assert "8 (given)" in result.stdout and "loss at 3" in result.stdout and "of at most 5\n" in result.stdout
    assert f"hf-lowbit quantize {llama} --config {output} --output DIR" in result.stdout  # rtn needs no data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits-per-weight", "1"], "2.5 to 8.5 bits per weight"),
        (["--bits-per-weight", "9"], "2.5 to 8.5 bits per weight"),
        (["--candidates", "2,x"], "--candidates takes bits separated by commas"),
        (["--ranks", "0,x"], "--ranks takes ranks separated by commas"),
        (["--ranks", "0,2", "--metric", "kl"], "use 'hessian' for ranks"),
        (["--candidates", "4,11"], "the candidate of 11 bits cannot be"),
        (["--metric", "guess"], "unknown metric 'guess'; known: hessian, output, kl"),
        (["--output", "nowhere/a.json"], "there is no folder 'nowhere'"),
        (["--output", "."], "is a folder"),
    ],
)
def test_wrong_requests(run: Run, llama: Path, text: Path, tmp_path: Path, options: list[str], message: str) -> None:
    default = () if "--output" in options else ("--output", tmp_path / "a.json")
    result = run("search", llama, "--method", "rtn", "--data", text, *SMALL, *default, *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert not (tmp_path / "a.json").exists()


def test_an_existing_file_is_kept(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("mine")
    result = run("search", llama, "--method", "rtn", "--data", text, *SMALL, "--output", tmp_path / "a.json")
    assert result.exit_code == 2 and "exists already" in result.stderr
    assert (tmp_path / "a.json").read_text() == "mine"


def test_ranks_share_the_budget(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "joint.json"
    options = ("--bits-per-weight", 3.5, "--candidates", "2,3", "--ranks", "0,2,4", "--output", output)
    result = run("search", llama, "--method", "rtn", "--data", text, *SMALL, *options)
    assert result.exit_code == 0, result.stderr
    assert "rank" in result.stdout and f"hf-lowbit quantize {llama} --config {output} --data" in result.stdout
    found = json.loads(output.read_text())
    assert found["low_rank"]["metric"] == "full"
    assert {fields["low_rank"] for fields in found["overrides"].values()} <= {0, 2, 4}


PIPELINE = Path(__file__).parents[1] / "assets" / "sd-fashion"


def test_a_pipeline_is_searched_by_its_pictures(run: Run, run_json, tmp_path: Path) -> None:
    output = tmp_path / "mixed.json"
    few = (
        "--set",
        'modules_to_not_convert=["(?!(conv_out|time_embedding.*|up_blocks.1.*attentions.0.*attn2.to_k)$).*"]',
    )
    drawing = ("--prompts", "a photo of a bag", "--steps", 1, "--call", "height=32", "--call", "width=32")
    budget = ("--candidates", "4,8", "--bits-per-weight", 8, "--bits-per-input", 16, "--pictures", 1)
    found = run_json("search", "--pipeline", PIPELINE, *few, *drawing, *budget, "--output", output)
    assert found["mean_bits"] == 8 and found["component"] == "unet"
    assert json.loads(output.read_text()) == found["config"] and found["config"]["quant_method"] == "lowbit_mixdq"
    kept = Path(found["measurements"])
    assert kept == tmp_path / "mixed.measurements.json" and len(json.loads(kept.read_text())["measurements"]) > 5
    again = run("search", PIPELINE, *few, *drawing, *budget, "--output", tmp_path / "b.json", "--measurements", kept)
    assert again.exit_code == 0 and "measurements are taken from" in again.stderr
    assert "bits per input" in again.stdout and "--prompts FILE" in again.stdout and "content" in again.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no prompt"),
        (["--prompts", "a bag", "--data", "self"], "--data is not for what is a pipeline"),
        (["--prompts", "a bag", "--bits-per-weight", "1"], "1 bits per weight cannot be reached"),
        (["--prompts", "a bag", "--objective", "guess"], "unknown objective 'guess'"),
        (["--prompts", "a bag", "--component", "decoder"], "no component decoder"),
        (["--prompts", "nowhere.txt"], "there is no file 'nowhere.txt'"),
    ],
)
def test_wrong_requests_of_a_pipeline(run: Run, tmp_path: Path, options: list[str], message: str) -> None:
    result = run("search", PIPELINE, "--output", tmp_path / "a.json", *options)
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""


def test_what_is_for_pipelines_only(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    common = ("search", llama, "--method", "rtn", "--output", tmp_path / "a.json")
    for options, message in (
        (("--pipeline", "--data", text), "is no pipeline"),
        (("--prompts", "a bag"), "--prompts is not for what is no pipeline: give --data"),
        ((), "a search needs calibration data: add --data"),
    ):
        result = run(*common, *options)
        assert result.exit_code == 2 and message in result.stderr
