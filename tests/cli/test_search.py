"""hf-lowbit search: a config within the budget that quantize accepts, and refusals before any work."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="module")
def mamba2(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Mamba-2 with four layers and the Llama's tokenizer."""
    from transformers import AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("models") / "mamba2", AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(folder)
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "chunk_size": 8}
    torch.manual_seed(0)
    Mamba2ForCausalLM(
        Mamba2Config(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, **heads, bos_token_id=0)
    ).save_pretrained(folder)
    return folder


def test_the_blocks_that_are_found_quantize(run_json, mamba2: Path, text: Path, tmp_path: Path) -> None:
    """W4AX of quamba2: the config says which blocks are W4A16."""
    output = tmp_path / "w4ax.json"
    bits = ("--set", "bits=4", "--set", "num_samples=4", "--set", "sequence_length=32")
    command = ("search", mamba2, "--method", "quamba2", *bits, "--group-size", 16, "--data", text, "--output", output)
    found = run_json(*command, "--blocks", "quarter")
    assert found["model"] == str(mamba2) and len(found["losses"]) == 4 and len(found["blocks"]) == 1
    assert json.loads(output.read_text()) == found["config"]
    overrides = found["config"]["overrides"]
    assert overrides and all(fields == {"activation_bits": None} for fields in overrides.values())
    made = run_json("quantize", mamba2, "--config", output, "--data", text, "--output", tmp_path / "out")
    reads = {layer["name"]: layer["activation"] for layer in made["layers"] if layer["name"].endswith("in_proj.weight")}
    full = f"{found['blocks'][0]}.mixer.in_proj.weight"
    assert len(reads) == 4 and [name for name, activation in reads.items() if activation is None] == [full]


def test_terminal_output_lists_blocks(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "blocks.json"
    fields = ("--set", "activation_bits=4", "--data", text, *SMALL, "--output", output)
    result = run("search", llama, "--method", "rtn", *fields, "--blocks", 1)
    assert result.exit_code == 0, result.stderr
    assert "model.layers.1" in result.stdout and result.stdout.count("full precision") == 1
    assert "1 of 2" in result.stdout and f"hf-lowbit quantize {llama} --config {output} --data {text}" in result.stdout


def test_blocks_may_get_other_fields(run_json, llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "blocks.json"
    better = ("--better", "bits=8", "--better", "group_size=row")
    found = run_json(
        "search", llama, "--method", "rtn", "--data", text, *SMALL, "--output", output, "--blocks", 1, *better
    )
    assert found["config"]["bits"] == 4 and found["blocks"] == [max(found["losses"], key=found["losses"].get)]
    overrides = list(found["config"]["overrides"].values())
    assert overrides and all(fields == {"bits": 8, "group_size": None} for fields in overrides)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--better", "bits=8"], "--better is not for what is searched without --blocks"),
        (["--blocks", "1", "--better", "bats=8"], "cannot set bats"),
        (["--blocks", "some"], "--blocks takes a number of blocks, or quarter, not 'some'"),
        (["--blocks", "3"], "count must be a number of blocks, from 0 to 2, not 3"),
        (["--blocks", "1", "--bits-per-weight", "4"], "--bits-per-weight is not for what is searched by --blocks"),
        (["--blocks", "1", "--set", "activation_bits=none"], "this config quantizes none: --set activation_bits=8"),
        (["--method", "quamba2"], "quamba2 packs state-space mixers whole.*--blocks on the command line"),
        (["--method", "quamba2", "--blocks", "1"], "quamba2 quantizes state-space mixers, and this LlamaForCausalLM"),
    ],
)
def test_wrong_requests_of_blocks(
    run: Run, llama: Path, text: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    method = () if "--method" in options else ("--method", "rtn", "--set", "activation_bits=8", "--group-size", 32)
    fields = ("--set", "num_samples=4", "--set", "sequence_length=32", "--data", text, "--output", tmp_path / "a.json")
    result = run("search", llama, *method, *fields, *options)
    assert result.exit_code == 2 and re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "a.json").exists()


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
