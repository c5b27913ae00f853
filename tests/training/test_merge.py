"""A trained adapter merged: into floats, from a model or a folder, and into codes again, with training going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import hf_lowbit
from hf_lowbit import LowRankConfig
from hf_lowbit.cli import app
from hf_lowbit.plan import packed_modules
from tests.integrations.tiny_peft import load, quantized, relative_error, run
from tests.training.formats import FORMATS
from tests.training.tiny import adapted, train, trainer

COMPENSATED: dict[str, Any] = {"bits": 2, "low_rank": LowRankConfig(4, keep="adapter")}
MODELS = {name: FORMATS[name] for name in ("int3", "nf4", "ternary", "branch")} | {"compensated": COMPENSATED}
every_model = pytest.mark.parametrize("fields", MODELS.values(), ids=list(MODELS))


def trained(fields: dict[str, Any], folder: Path) -> tuple[Any, torch.Tensor]:
    """A trained PEFT model and its output."""
    model = adapted(quantized("llama", **fields))
    train(trainer(model, folder / "run", steps=4))
    return model, run("llama", model)


@every_model
def test_merged_into_a_float_model(fields: dict[str, Any], tmp_path: Path) -> None:
    model, expected = trained(fields, tmp_path)
    hf_lowbit.dequantize(model.get_base_model())
    merged = model.merge_and_unload()
    assert not packed_modules(merged) and relative_error(run("llama", merged), expected) < 1e-5
    if fields is COMPENSATED:  # transformers, which had the compensation loaded, saves no model that it calls adapted
        return
    merged.save_pretrained(tmp_path / "float")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert type(plain.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert torch.equal(run("llama", plain), run("llama", merged))


@every_model
def test_the_command_line_merges_a_folder(fields: dict[str, Any], tmp_path: Path) -> None:
    quantized("llama", **fields).save_pretrained(tmp_path / "packed")
    model, expected = trained(fields, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ["dequantize", tmp_path / "packed", "--adapter", tmp_path / "adapter", "--output", tmp_path / "float"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert not packed_modules(plain) and relative_error(run("llama", plain), expected) < 1e-5


def test_the_command_line_says_what_is_no_adapter(tmp_path: Path) -> None:
    quantized("llama").save_pretrained(tmp_path / "packed")
    arguments = ["dequantize", tmp_path / "packed", "--adapter", tmp_path / "packed", "--output", tmp_path / "float"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and "adapter_config.json" in result.stderr
    assert not (tmp_path / "float").exists()


@pytest.mark.parametrize("name", ["int4", "int8", "branch"])
def test_merged_into_codes_and_trained_further(name: str, tmp_path: Path) -> None:
    model, expected = trained(FORMATS[name], tmp_path)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load("llama", tmp_path / "merged", torch.float32)
    assert torch.equal(run("llama", again), run("llama", merged)) and packed_modules(again)
    assert relative_error(run("llama", again), expected) < {"int8": 0.02}.get(name, 0.35)
    losses = train(trainer(adapted(again), tmp_path / "run", learning_rate=3e-3))
    assert losses[-1] < losses[0]


def test_training_goes_on_after_a_reload_of_base_and_adapter(tmp_path: Path) -> None:
    model, expected = trained(FORMATS["nf4"], tmp_path)
    base = model.get_base_model()
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    base.save_pretrained(tmp_path / "packed")
    packed = hf_lowbit.prepare_for_training(load("llama", tmp_path / "packed", torch.float32))
    again = PeftModel.from_pretrained(packed, tmp_path / "adapter", is_trainable=True)
    assert torch.equal(run("llama", again), expected)
    losses = train(trainer(again, tmp_path / "run", learning_rate=3e-3))
    assert losses[-1] < losses[0]
