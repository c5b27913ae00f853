"""The other commands on a tiny model, the help texts and the entry points."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.hub.fixture import Hub


def test_methods(run: Run, run_json) -> None:
    listed = run_json("methods")["methods"]["rtn"]
    assert {"summary", "paper", "domains", "needs_data", "formats", "fields"} <= set(listed)
    assert listed["fields"]["group_size"]["default"] == 128 and "dataset" not in listed["fields"]
    assert "rtn" in run("methods").stdout and "group_size = 128" in run("methods", "rtn").stdout
    assert run("methods", "nothing").exit_code == 2


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys, hf_lowbit.cli\n"
        "try: hf_lowbit.cli.app(['quantize', '--help'])\n"
        "except SystemExit as end: assert end.code in (0, None)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--group-size" in done.stdout


def test_module_entry_point() -> None:
    command = [sys.executable, "-m", "hf_lowbit.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hf-lowbit ")


def test_evaluate_and_save(run: Run, run_json, llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run_json("quantize", llama, "--method", "rtn", "--bits", 4, "--group-size", 32, "--output", folder)
    options = ("--data", text, "--sequence-length", 64, "--max-tokens", 600)
    values = run_json("evaluate", folder, "--reference", llama, *options, "--save")
    assert {"perplexity", "kl", "top1_agreement"} <= set(values["intervals"]) and values["tokens"] == 600
    assert values["kl"] > 0 and 0 <= values["top1_agreement"] <= 1
    kept = json.loads((folder / "lowbit_report.json").read_text())["evaluation"]
    assert kept["kl"] == values["kl"] and kept["command"].startswith("hf-lowbit evaluate out --reference llama")
    assert str(tmp_path) not in json.dumps(kept)
    assert f"{values['kl']:.4g}" in (folder / "README.md").read_text()
    assert run_json("inspect", folder)["evaluation"] == kept
    shown = run("evaluate", llama, "--reference", llama, *options)
    assert "0.0000 nats per token" in shown.stdout and "100.0 % of next tokens" in shown.stdout


def test_evaluate_errors(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    assert run("evaluate", tmp_path / "nowhere").exit_code == 2
    assert "no file" in run("evaluate", llama, "--data", tmp_path / "none.txt").stderr
    short = tmp_path / "short.txt"
    short.write_text("word")
    assert "too short" in run("evaluate", llama, "--data", short).stderr
    unquantized = run("evaluate", llama, "--data", text, "--save")
    assert unquantized.exit_code == 2 and "not quantized" in unquantized.stderr


def test_an_edited_card_is_kept(run_json, llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run_json("quantize", llama, "--method", "rtn", "--bits", 4, "--group-size", 32, "--output", folder)
    (folder / "README.md").write_text("mine")
    run_json("evaluate", folder, "--data", text, "--sequence-length", 64, "--save")
    assert (folder / "README.md").read_text() == "mine"


def test_dequantize(run: Run, run_json, quantized: Path, llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from hf_lowbit.plan import packed_modules

    values = run_json("dequantize", quantized, "--output", tmp_path / "float")
    assert values["bytes"] > 0
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    restored, packed = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "float", quantized))
    for module in packed_modules(packed).values():
        module.backend = "reference"  # decodes and multiplies as the float model does: the sums have one order
    ids = torch.arange(1, 20).unsqueeze(0)
    assert torch.equal(restored(ids).logits, packed(ids).logits)
    assert (tmp_path / "float" / "tokenizer.json").exists()
    assert run("dequantize", quantized, "--output", tmp_path / "float").exit_code == 2
    assert "not quantized" in run("dequantize", llama, "--output", tmp_path / "other").stderr


def test_push_refuses_a_damaged_folder_first(run: Run, llama: Path) -> None:
    result = run("push", llama, "nobody/nothing")
    assert result.exit_code == 2 and "not quantized" in result.stderr


@pytest.mark.parametrize("arguments", [["methods", "--json"], ["quantize", "--help"]])
def test_optimum_alias(arguments: list[str]) -> None:
    pytest.importorskip("optimum.commands")
    code = "from optimum.commands.optimum_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "lowbit", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "rtn" in json.loads(done.stdout)["methods"] if "--json" in arguments else "--group-size" in done.stdout


def test_optimum_registration_is_light() -> None:
    pytest.importorskip("optimum.commands")
    code = (
        "import sys, optimum.commands.register.register_lowbit as module\n"
        "assert module.REGISTER_COMMANDS\n"
        "assert not {'torch', 'transformers', 'hf_lowbit', 'typer'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_push(hub: Hub, quantized: Path) -> None:
    script = "import sys; from hf_lowbit.cli import app; app(sys.argv[1:])"
    earlier = len(hub.requests())
    values = json.loads(hub.python(script, "push", str(quantized), "someone/llama-w4", "--private", "--json"))
    assert values["repo_id"] == "someone/llama-w4" and values["bits_per_weight"]["model"] == 4.5
    assert len([request for request in hub.requests()[earlier:] if "/commit/" in request]) == 1
    listed = hub.python("from huggingface_hub import list_repo_files; print(list_repo_files('someone/llama-w4'))")
    for name in ("model.safetensors", "config.json", "lowbit_report.json", "README.md", "tokenizer.json"):
        assert name in listed
