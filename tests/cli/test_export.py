"""``hf-lowbit export`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_export(run: Run, run_json, quantized: Path, tmp_path: Path) -> None:
    """The folder is complete: transformers loads model and tokenizer from it, with the weights of the packed model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_lowbit.plan import packed_modules

    values = run_json("export", quantized, "--to", "compressed-tensors", "--output", tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert values == {
        "model": str(quantized),
        "output": str(tmp_path / "out"),
        "format": "compressed-tensors",
        "storage": "pack-quantized",
        "layers": 14,
        "groups": 1,
        "bytes": size,
        "vllm": [],
    }
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "compressed-tensors" and str(tmp_path) not in json.dumps(stored)
    exported, packed = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", quantized))
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "out")("some text")["input_ids"]])
    assert torch.allclose(exported(ids).logits, packed(ids).logits, atol=1e-5)
    for name, module in packed_modules(packed).items():
        assert torch.equal(exported.get_parameter(f"{name}.weight"), module.dequantized())


def test_text_and_warnings(run: Run, run_json, llama: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    options = ("--bits", 8, "--group-size", 32, "--set", "activation_bits=8", "--output", packed)
    run_json("quantize", llama, "--method", "rtn", *options)
    result = run("export", packed, "--output", tmp_path / "out")
    assert result.exit_code == 0 and "compressed-tensors, int-quantized" in result.stdout
    assert "vLLM: with 8-bit inputs it takes symmetric 8-bit weights with one scale per row" in result.stderr


def test_refusals(run: Run, run_json, llama: Path, quantized: Path, tmp_path: Path) -> None:
    """One line on stderr, exit code 2, and no folder."""
    packed, out = tmp_path / "packed", tmp_path / "out"
    options = ("--set", "format=nf", "--bits", 4, "--group-size", 32, "--output", packed)
    run_json("quantize", llama, "--method", "rtn", *options)
    for arguments, message in (
        ((packed,), "model.layers.0.self_attn.q_proj: format 'nf' is a table of values"),
        ((llama,), "not quantized by hf_lowbit"),
        ((tmp_path / "nowhere",), "there is no folder"),
        ((quantized, "--to", "gguf"), "unknown export format 'gguf'"),
    ):
        result = run("export", *arguments, "--output", out)
        assert result.exit_code == 2 and result.stdout == "" and message in result.stderr
        assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    taken = run("export", quantized, "--output", llama)
    assert taken.exit_code == 2 and "not empty" in taken.stderr
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["packed"]
