"""hf-lowbit inspect: what is counted, and what is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "copy"))


def test_report_and_headers_agree(run_json, copy: Path) -> None:
    """Without the report the same is counted from headers and plan."""
    reported = run_json("inspect", copy)
    (copy / "lowbit_report.json").unlink()
    counted = run_json("inspect", copy)
    assert reported["counted_from"].startswith("report") and counted["counted_from"].startswith("headers")
    for key in ("bits_per_weight", "packed_bytes", "elements", "other_bytes", "tensor_bytes"):
        assert counted[key] == reported[key], key
    assert {layer["name"]: layer["packed_bytes"] for layer in counted["layers"]} == {
        layer["name"]: layer["packed_bytes"] for layer in reported["layers"]
    }


@pytest.mark.parametrize(
    "options",
    [("--format", "ternary", "--set", "packing=base3"), ("--set", "symmetric=false"), ("--format", "codebook")],
)
@pytest.mark.parametrize("group", ["row", "tensor", "16"])
def test_counting_without_report(run_json, llama: Path, tmp_path: Path, options: tuple[str, ...], group: str) -> None:
    output = tmp_path / "out"
    made = run_json("quantize", llama, "--method", "rtn", "--group-size", group, *options, "--output", output)
    (output / "lowbit_report.json").unlink()
    counted = run_json("inspect", output)
    assert counted["packed_bytes"] == made["packed_bytes"]
    assert counted["elements"] == pytest.approx(made["elements"], rel=0.3 if "base3" in options[-1] else 0)


def test_layers_table(run: Run, quantized: Path) -> None:
    result = run("inspect", quantized, "--layers")
    assert result.exit_code == 0 and "model.layers.1.mlp.down_proj.weight" in result.stdout
    assert "bits per weight" in result.stdout and "groups of 32" in result.stdout


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _other_model(folder: Path) -> None:
    report = json.loads((folder / "lowbit_report.json").read_text())
    report["layers"][3]["packed_bytes"] += 4
    (folder / "lowbit_report.json").write_text(json.dumps(report))


def _broken_report(folder: Path) -> None:
    (folder / "lowbit_report.json").write_text("{")


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_plan(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["plan"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "damaged"),
        (_empty_weights, "damaged"),
        (_remove_weights, "no weights"),
        (_other_model, "bytes in the weight files"),
        (_broken_report, "cannot be read"),
        (_broken_config, "cannot be read"),
        (_no_config, "not a model that hf_lowbit saved"),
        (_no_plan, "no plan"),
    ],
)
def test_damage(run: Run, copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    result = run("inspect", copy, "--json")
    assert result.exit_code == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_other_folders(run: Run, llama: Path, tmp_path: Path) -> None:
    assert "not quantized" in run("inspect", llama).stderr
    assert "there is no folder" in run("inspect", tmp_path / "nowhere").stderr
    (tmp_path / "model_index.json").write_text("{}")
    assert "pipeline without a component" in run("inspect", tmp_path).stderr


def test_shards(run: Run, run_json, quantized: Path, tmp_path: Path) -> None:
    from hf_lowbit.integrations.loading import load_quantized

    load_quantized(quantized).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    whole, sharded = run_json("inspect", quantized), run_json("inspect", tmp_path / "sharded")
    assert sharded["packed_bytes"] == whole["packed_bytes"]
    shards[1].unlink()
    assert f"the file {shards[1].name} is missing" in run("inspect", tmp_path / "sharded").stderr


def test_plain_module(run_json, tmp_path: Path) -> None:
    from torch import nn

    import hf_lowbit

    module = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    hf_lowbit.save(hf_lowbit.quantize(module, hf_lowbit.RTNConfig(bits=4, group_size=32)), tmp_path / "plain")
    values = run_json("inspect", tmp_path / "plain")
    assert values["elements"] == 64 * 32 + 32 * 8 and values["bits_per_weight"] == 4.5


def test_experts_are_split_on_disk(run_json, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 32}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **counts, num_experts_per_tok=2)).save_pretrained(tmp_path / "float")
    output = tmp_path / "out"
    made = run_json("quantize", tmp_path / "float", "--method", "rtn", "--group-size", 32, "--output", output)
    (output / "lowbit_report.json").unlink()
    counted = run_json("inspect", output)
    assert (counted["packed_bytes"], counted["elements"]) == (made["packed_bytes"], made["elements"])


def test_tied_layers_are_counted_once(run_json, llama: Path, tmp_path: Path) -> None:
    output, tied = tmp_path / "out", ("--set", "quantize_embeddings=true")
    made = run_json("quantize", llama, "--method", "rtn", "--group-size", 32, *tied, "--output", output)
    (output / "lowbit_report.json").unlink()
    counted = run_json("inspect", output)
    assert (counted["packed_bytes"], counted["elements"]) == (made["packed_bytes"], made["elements"])


def test_pipeline(run_json, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    source = Path(__file__).parents[1] / "assets" / "dit-fashion"
    made = run_json("quantize", source, "--method", "rtn", "--group-size", 32, "--output", tmp_path / "out")
    assert list(made["components"]) == ["transformer"] and made["bits_per_weight"] < 5
    assert made["layers"][0]["component"] == "transformer" and made["warnings"][0].startswith("transformer: ")
    assert run_json("inspect", tmp_path / "out")["packed_bytes"] == made["packed_bytes"]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("--set", "activation_static=true", "--data", "self", "--set", "num_samples=2"), "int 8 bits, static"),
        (("--set", "activation_group_size=16"), "int 8 bits, groups of 16"),
    ],
)
def test_quantized_inputs_are_named(
    run, run_json, llama: Path, tmp_path: Path, options: tuple[str, ...], kind: str
) -> None:
    """From the report, and counted from headers without it; in the totals, for each layer, and in the card."""
    output, eight = tmp_path / "out", ("--bits", 8, "--set", "activation_bits=8", "--set", "sequence_length=16")
    made = run_json("quantize", llama, "--method", "rtn", "--group-size", "row", *eight, *options, "--output", output)
    assert {layer["activation"] for layer in made["layers"]} == {kind}
    shown = " ".join(run("inspect", output, "--layers").stdout.split())
    assert f"{kind}, int8 products ({len(made['layers'])})" in shown and f"inputs {kind}" in shown
    assert f"| {kind} |" in (output / "README.md").read_text()
    (output / "lowbit_report.json").unlink()
    counted = run_json("inspect", output)
    assert {(layer["activation"], layer["arithmetic"]) for layer in counted["layers"]} == {(kind, "int8")}
    assert (counted["packed_bytes"], counted["elements"]) == (made["packed_bytes"], made["elements"])
