"""hf-lowbit quantize, and the errors that come before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_result_is_reported_and_loads(run_json, llama: Path, tmp_path: Path) -> None:
    from hf_lowbit import report
    from hf_lowbit.integrations.loading import load_quantized

    output = tmp_path / "out"
    values = run_json("quantize", llama, "--method", "rtn", "--bits", 3, "--group-size", "row", "--output", output)
    assert values["model"] == str(llama) and values["kept"] is False
    assert 3 < values["bits_per_weight"] < 3.5 and len(values["layers"]) == 14
    assert set(values["skipped"]) == {"model.embed_tokens", "lm_head"}
    assert report(load_quantized(output)).packed_bytes == values["packed_bytes"]
    assert (output / "tokenizer.json").exists()


def test_terminal_output_has_units(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("quantize", llama, "--method", "rtn", "--bits", 4, "--group-size", 48, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "bits per weight" in result.stdout and "time to quantize" in result.stdout
    assert "quantize_embeddings=True packs both" in result.stdout  # why the embedding was left out
    assert result.stderr.count("group_size=48 does not divide") == 2  # once for each input width, not repeated


def test_fields_are_set_by_name(run_json, llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = ("low_rank.rank=4", "overrides.layers.0.bits=8", "activation_bits=8", "quantize_embeddings=true")
    options = [part for setting in settings for part in ("--set", setting)]
    run_json("quantize", llama, "--method", "rtn", "--format", "int", "--group-size", 32, *options, "--output", output)
    stored = json.loads((output / "config.json").read_text())["quantization_config"]
    assert stored["low_rank"]["rank"] == 4 and stored["activation_bits"] == 8 and stored["quantize_embeddings"]
    assert stored["overrides"] == {"layers.0": {"bits": 8}}


def test_fields_from_a_file(run_json, llama: Path, quantized: Path, tmp_path: Path) -> None:
    """A saved model's own config makes the same model again; options override it."""
    again = run_json("quantize", llama, "--config", quantized / "config.json", "--output", tmp_path / "same")
    other = run_json(
        "quantize", llama, "--config", quantized / "config.json", "--bits", 2, "--output", tmp_path / "other"
    )
    assert again["packed_bytes"] == run_json("inspect", quantized)["packed_bytes"]
    assert other["bits_per_weight"] == again["bits_per_weight"] - 2


def test_finished_result_is_kept_or_replaced(run: Run, run_json, llama: Path, tmp_path: Path) -> None:
    command = ("quantize", llama, "--method", "rtn", "--group-size", 32, "--output", tmp_path / "out", "--bits")
    assert run_json(*command, 4)["kept"] is False
    assert run_json(*command, 4)["kept"] is True
    refused = run(*command, 3)
    assert refused.exit_code == 2 and "another run" in refused.stderr and "--restart" in refused.stderr
    assert run_json(*command, 3, "--restart")["kept"] is False
    assert run_json("inspect", tmp_path / "out")["layers"][0]["bits"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "rtnn"], "unknown method 'rtnn'; did you mean 'rtn'?"),
        ([], "no method is named"),
        (["--method", "rtn", "--set", "group_siz=64"], "no field group_siz; did you mean 'group_size'?"),
        (["--method", "rtn", "--set", "low_rank.ranks=4"], "no field low_rank.ranks"),
        (["--method", "rtn", "--set", "bits"], "--set takes field=value"),
        (["--method", "rtn", "--set", "dataset=x"], "dataset is given by --data"),
        (["--method", "rtn", "--format", "flaot"], "unknown number format 'flaot'"),
        (["--method", "rtn", "--bits", "11"], "1 to 8 bits"),
        (["--method", "rtn", "--group-size", "big"], "a number, 'row' or 'tensor'"),
        (["--method", "rtn", "--group-size", "-1"], "use None for one scale per row"),
        (["--method", "rtn", "--data", "none.txt"], "there is no file 'none.txt'"),
    ],
)
def test_wrong_request(run: Run, llama: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = run("quantize", llama, *options, "--output", tmp_path / "out")
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_foreign_output_is_refused(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = run("quantize", llama, "--method", "rtn", "--output", tmp_path, "--restart")
    assert result.exit_code == 2 and "did not write" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_missing_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = ("--method", "rtn", "--output", tmp_path / "out")
    result = run("quantize", tmp_path / "nowhere", *output)
    assert result.exit_code == 2 and "there is no folder" in result.stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = run("quantize", "nobody/nothing", *output)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_debug_shows_the_traceback(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("quantize", llama, "--method", "x", "--output", tmp_path / "out", "--debug")
    assert result.exit_code == 2 and "Traceback" in result.stderr


def test_a_low_rank_part_reads_data_and_is_counted(run: Run, run_json, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    settings = (
        "low_rank.rank=4",
        "low_rank.metric=diag",
        "low_rank.factor_bits=8",
        "num_samples=2",
        "sequence_length=32",
    )
    options = ["--method", "rtn", "--bits", 3, *(part for setting in settings for part in ("--set", setting))]
    refused = run("quantize", llama, *options, "--output", tmp_path / "out")
    assert refused.exit_code == 2 and "low_rank.metric='diag' needs calibration data" in refused.stderr
    values = run_json("quantize", llama, *options, "--data", text, "--output", tmp_path / "out")
    assert {layer["low_rank"] for layer in values["layers"]} == {4}
    assert run_json("inspect", tmp_path / "out")["packed_bytes"] == values["packed_bytes"]


def test_blocks_are_read_from_disk_and_computed_where_it_is_said(
    run_json, run: Run, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    few = ("--set", "num_samples=2", "--set", "sequence_length=32", "--data", tmp_path / "text.txt")
    command = ("quantize", llama, "--method", "gptq", "--bits", 4, "--group-size", "row", *few)
    placed = run_json(*command, "--device", "cpu", "--from-disk", "--output", tmp_path / "placed")
    plain = run_json(*command, "--output", tmp_path / "plain")
    assert [layer["error"] for layer in placed["layers"]] == [layer["error"] for layer in plain["layers"]]
    refused = run(*command, "--device", "nowhere", "--output", tmp_path / "none")
    assert refused.exit_code == 2 and "no device of torch's" in " ".join(refused.stderr.split())
    assert not (tmp_path / "none").exists()


def test_a_pipeline_draws_its_own_data(run_json, tmp_path: Path) -> None:
    """Class labels of a file and an option; other arguments of the call; provenance says what was drawn."""
    from tests.integrations.tiny_pipelines import dit_pipeline

    dit_pipeline().save_pretrained(tmp_path / "dit")
    (tmp_path / "labels.txt").write_text("1\n2\n")
    command = ("quantize", tmp_path / "dit", "--method", "gptq", "--bits", 4, "--group-size", 32)
    drawing = ("--prompts", tmp_path / "labels.txt", "--prompts", 5, "--steps", 4, "--timesteps", 2)
    output = ("--set", "num_samples=3", "--call", "guidance_scale=1", "--output", tmp_path / "out")
    assert run_json(*command, *drawing, *output)["kept"] is False
    stored = json.loads((tmp_path / "out/transformer/config.json").read_text())["quantization_config"]["provenance"]
    assert stored["trajectories"] == {"prompts": 3, "pictures": 3, "steps": 4, "guidance_scale": 1}
    assert len(stored["timesteps"]) == 2
    assert run_json(*command, *drawing, *output)["kept"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "prompts=... and steps=..."),
        (["--prompts", "none.txt"], "there is no file 'none.txt'"),
        (["--prompts", "a bag", "--component", "unet"], "no component unet"),
        (["--prompts", "a bag", "--steps", "0"], "--steps"),
        (["--prompts", "a bag", "--steps", "2", "--timesteps", "3"], "timesteps=3 cannot be recorded of steps=2"),
        (["--steps", "2"], "give prompts as well"),
        (["--prompts", "a bag", "--call", "height"], "--call takes name=value"),
        (["--prompts", "a bag", "--call", "steps=3"], "an option of its own: --steps"),
        (["--prompts", "a bag", "--data", "self"], "two sources of calibration data"),
        (["--prompts", "a bag"], "class labels, integers of at least 0, not 'a bag'"),
    ],
)
def test_wrong_request_of_a_pipeline(run: Run, tmp_path: Path, options: list[str], message: str) -> None:
    pipeline = Path(__file__).parents[1] / "assets/dit-fashion"
    result = run("quantize", pipeline, "--method", "gptq", *options, "--output", tmp_path / "out")
    assert result.exit_code == 2, result.stdout
    words = " ".join(result.stderr.replace("│", " ").split())
    assert message in words
    assert not list(tmp_path.iterdir())


def test_prompts_are_for_pipelines(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("quantize", llama, "--method", "gptq", "--prompts", "a bag", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "is no pipeline" in result.stderr
