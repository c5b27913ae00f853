"""A tiny Llama with a tokenizer, and the command line called as a user calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from hf_lowbit.cli import app

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def run() -> Run:
    """``run("inspect", folder)``: the result has exit_code, stdout and stderr."""

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


@pytest.fixture(scope="session")
def run_json(run: Run) -> Callable[..., dict[str, Any]]:
    """Run with ``--json``: stdout must be one JSON object and nothing else."""

    def call(*arguments: object) -> dict[str, Any]:
        result = run(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        values = json.loads(result.stdout)
        assert isinstance(values, dict)
        return values

    return call


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama with two layers and a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "llama"
    vocabulary = {symbol: index for index, symbol in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized(llama: Path, run_json: Callable[..., dict[str, Any]]) -> Path:
    """The Llama in 4 bits, groups of 32. Tests must not change it."""
    folder = llama.parent / "llama-w4"
    run_json("quantize", llama, "--method", "rtn", "--bits", 4, "--group-size", 32, "--output", folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 1,800 bytes."""
    path = tmp_path_factory.mktemp("texts") / "prose.txt"
    path.write_text("\n\n".join(f"Paragraph {number} says something else." for number in range(50)))
    return path
