"""The models of rows: float, quantized by hf_lowbit, or by a peer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import hf_lowbit
from mambas.peers import peer_arguments
from mambas.rows import Row
from mambas.settings import RANDOM, TEXT, TRAINED


def load(row: Row, folder: Path, data: Mapping[str, Any]) -> Any:
    """The model of a row in float32 unless its fields say otherwise, and evaluating.

    Args:
        data: num_samples, sequence_length, seed and dataset, for methods that calibrate.
    """
    from transformers import AutoModelForCausalLM

    fields = {**row.fields}
    arguments: dict[str, Any] = {"dtype": getattr(torch, fields.pop("dtype", "float32"))}
    if row.is_peer:
        arguments |= peer_arguments(row)
    elif row.method != "float":
        arguments["quantization_config"] = config_of(row, data)
    if not row.mixed:
        return AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()
    config = arguments.pop("quantization_config")
    model = AutoModelForCausalLM.from_pretrained(folder, **arguments)
    return hf_lowbit.quantize(model, hf_lowbit.search_blocks(model, config).config).eval()


def config_of(row: Row, data: Mapping[str, Any]) -> Any:
    """Of a method of hf_lowbit. Raises KeyError where it is not installed."""
    method = hf_lowbit.methods()[row.method]
    config = method.config_class(**row.fields, seed=data["seed"])
    return dataclasses.replace(config, **data) if method.needs_data or config.has_static_inputs else config


def calibration(settings: Any) -> dict[str, Any]:
    """The documentation that the models were trained on."""
    return {
        "dataset": str(TEXT / "calibration.txt"),
        "num_samples": settings.samples,
        "sequence_length": settings.length,
        "seed": settings.seed,
    }


def source(model: str, work: Path) -> tuple[Path, dict[str, Any]]:
    """Folder of a float model, made in ``work`` where its weights are random, and few samples to calibrate it on."""
    data: dict[str, Any] = {"num_samples": 4, "sequence_length": 128, "seed": 0}
    if model not in RANDOM:
        return TRAINED[model], {**data, "dataset": str(TEXT / "calibration.txt")}
    folder = work / model
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        _random(model).save_pretrained(folder)
    ids = torch.randint(1, 50_000, (4, 128), generator=torch.Generator().manual_seed(0))
    return folder, {**data, "dataset": ids}


def _random(model: str) -> Any:
    """The sizes of state-spaces/mamba-130m and mamba2-130m."""
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50_288, "tie_word_embeddings": True}
    if model == "mamba-130m":
        return MambaForCausalLM(MambaConfig(**sizes, state_size=16))
    heads = {"num_heads": 24, "head_dim": 64, "n_groups": 1, "state_size": 128, "chunk_size": 256}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, **heads))
