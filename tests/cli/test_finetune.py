"""hf-lowbit finetune: a text file to an adapter that a reload computes with, and what is refused before the work."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Run

QUICK = ("--max-length", 32, "--batch-size", 4, "--rank", 4, "--learning-rate", 0.01, "--no-gradient-checkpointing")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=torch.arange(1, 20)[None]).logits
    return result


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    import hf_lowbit  # noqa: F401  (what makes transformers know the format)

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_an_adapter_for_a_quantized_model(run: Run, run_json, quantized: Path, text: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    output = tmp_path / "adapter"
    values = run_json("finetune", quantized, "--data", text, "--output", output, "--epochs", 2, *QUICK)
    loss = values["held_out_loss"]
    assert loss["after"] < loss["before"] - 0.2
    assert values["losses"][-1]["loss"] < values["losses"][0]["loss"]
    assert values["adapter"]["initialisation"] == "zero" and values["adapter"]["alpha"] == 8
    stored = json.loads((output / "lowbit_finetune.json").read_text())
    assert stored["held_out_loss"] == loss and stored["model"] == "llama-w4" and str(tmp_path) not in json.dumps(stored)
    assert f"{loss['after']:.4f} nats" in (output / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))  # no checkpoints are left
    base = load(quantized)
    before = logits(base)
    assert not torch.equal(logits(PeftModel.from_pretrained(base, output)), before)
    again = run("finetune", quantized, "--data", text, "--output", output, *QUICK)
    assert again.exit_code == 2 and "not empty" in again.stderr


def test_a_float_model_is_quantized_first_and_its_compensation_trained(
    run: Run, run_json, llama: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    quantization = ("--method", "rtn", "--bits", 2, "--group-size", 32)
    values = run_json("finetune", llama, "--data", text, "--output", output, "--steps", 12, *QUICK, *quantization)
    assert values["held_out_loss"]["after"] < values["held_out_loss"]["before"] - 0.2
    assert values["adapter"] == {
        "rank": 4, "alpha": 4, "parameters": values["adapter"]["parameters"],
        "initialisation": "compensation of the rounding error",
    }  # fmt: skip
    assert "## Fine-tuning" in (output / "README.md").read_text() and (output / "tokenizer.json").is_file()
    model = load(output)
    trained = logits(model)
    model.disable_adapters()
    assert not torch.equal(logits(model), trained)
    refused = run("finetune", output, "--data", text, "--output", tmp_path / "no", *QUICK, "--alpha", 8)
    assert refused.exit_code == 2 and "alpha is for a new adapter" in refused.stderr
    further = run_json("finetune", output, "--data", text, "--output", tmp_path / "further", "--steps", 4, *QUICK)
    assert further["held_out_loss"]["before"] == pytest.approx(values["held_out_loss"]["after"], abs=1e-4)


def chats(folder: Path, count: int = 12) -> Path:
    path = folder / "chats.jsonl"
    turns = [
        [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": f"It is {i + 1}."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Yes."},
        ]
        for i in range(count)
    ]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    return path


TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
REWRITING = "{{ messages | length }}" + TEMPLATE  # what is said at first depends on what comes last


@pytest.mark.parametrize("template", [TEMPLATE, REWRITING])
def test_the_loss_of_conversations_is_on_the_assistant(llama: Path, template: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from hf_lowbit.finetuning.examples import IGNORED, collate, read_examples

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = template
    examples = read_examples(str(chats(tmp_path)), tokenizer, 128)
    row = examples.rows[3]
    counted = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    if template == TEMPLATE:
        assert counted == "It is 4.<s>Yes.<s>" and "assistant's turns" in examples.description
    else:
        assert row["labels"] == row["input_ids"] and "all turns" in examples.description
    batch = collate([row, {"input_ids": [1], "labels": [1]}], padding=0)
    assert batch["labels"].shape == batch["input_ids"].shape == (2, len(row["input_ids"]))
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]), 1]
    assert (batch["labels"][1, 1:] == IGNORED).all()


def test_conversations_are_trained_on(run: Run, run_json, quantized: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "chat-model"
    shutil.copytree(quantized, folder)
    options = ("--data", chats(tmp_path), "--output", tmp_path / "out", "--epochs", 4, *QUICK[2:], "--max-length", 128)
    refused = run("finetune", folder, *options)
    assert refused.exit_code == 2 and "no chat template" in refused.stderr
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    values = run_json("finetune", folder, *options)
    assert values["held_out_loss"]["after"] < values["held_out_loss"]["before"] - 0.2


def test_the_rows_of_a_dataset(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    from transformers import AutoTokenizer

    from hf_lowbit.finetuning.examples import read_examples

    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    (tmp_path / "talk").mkdir()
    chats(tmp_path / "talk")
    assert len(read_examples(str(tmp_path / "talk"), tokenizer, 128).rows) == 12
    (tmp_path / "prose").mkdir()
    lines = [json.dumps({"text": f"Sentence number {i}."}) for i in range(30)]
    (tmp_path / "prose" / "train.jsonl").write_text("\n".join(lines))
    examples = read_examples(str(tmp_path / "prose"), tokenizer, 32)
    assert {len(row["input_ids"]) for row in examples.rows} == {32} and examples.rows[0]["labels"][1:]
    assert len(examples.texts) == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "none.txt"], "there is no file 'none.txt'"),
        (["--data", "{text}", "--batch-size", 4000], "fewer than one batch of 4000"),
        (["--data", "{text}", "--max-length", 5000], "exceeds the 2048 positions"),
        (["--data", "{text}", "--max-length", 32, "--rank", 65], "rank=65 exceeds the smaller side of"),
        (["--data", "{text}", "--rank", 0], "rank must be a positive integer"),
        (["--data", "{text}", "--bits", 4], "--bits needs --method"),
        (["--data", "{text}", "--method", "rtn"], "is quantized already"),
        (["--data", "{text}", "--learning-rate", 2], "learning_rate must lie between 0 and 1"),
    ],
)
def test_wrong_request(run: Run, quantized: Path, text: Path, tmp_path: Path, options: list[Any], message: str) -> None:
    given = [str(option).replace("{text}", str(text)) for option in options]
    result = run("finetune", quantized, "--output", tmp_path / "out", *given)
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_float_model_needs_a_method(run: Run, llama: Path, text: Path, tmp_path: Path) -> None:
    result = run("finetune", llama, "--data", text, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "not quantized" in result.stderr


def test_a_killed_run_goes_on(run: Run, run_json, quantized: Path, text: Path, tmp_path: Path) -> None:
    options = ["--data", text, "--steps", 40, "--max-length", 32, "--batch-size", 4, "--rank", 4]
    whole = run_json("finetune", quantized, *options, "--output", tmp_path / "whole")
    output = tmp_path / "killed"
    arguments = [str(part) for part in ("finetune", quantized, *options, "--output", output)]
    process = subprocess.Popen([sys.executable, "-m", "hf_lowbit.cli", *arguments], stderr=subprocess.DEVNULL)
    states = tmp_path / ".killed.lowbit-finetune" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(states.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not output.exists()
    other = run("finetune", quantized, *options, "--seed", 1, "--output", output)
    assert other.exit_code == 2 and "--restart" in other.stderr
    resumed = run(*arguments)
    assert resumed.exit_code == 0 and "resuming from checkpoint-" in resumed.stderr, resumed.stderr
    stored = json.loads((output / "lowbit_finetune.json").read_text())
    assert stored["held_out_loss"]["before"] == pytest.approx(whole["held_out_loss"]["before"], abs=1e-5)
    assert stored["held_out_loss"]["after"] == pytest.approx(whole["held_out_loss"]["after"], abs=1e-3)
