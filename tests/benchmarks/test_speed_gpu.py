"""benchmarks/speed_gpu.py, as far as it needs no GPU: what is counted, and how results are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowbit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_case_has_a_name_of_its_own() -> None:
    from gpu.kernels import cases, name_of

    names = [name_of(*case) for case in cases()]
    assert len(set(names)) == len(names) and "int4 g128" in names


@pytest.mark.parametrize("tied", (True, False))
def test_a_token_reads_all_weights_but_an_embedding_that_is_only_looked_up(tied: bool) -> None:
    from gpu.models import read_bytes

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=1, intermediate_size=128, num_attention_heads=2, vocab_size=96,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    floats = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 3 * 64 + 96 * 64)  # once, tied or not
    assert read_bytes(model) == floats
    packed = hf_lowbit.quantize(
        model, hf_lowbit.RTNConfig(bits=4, group_size=64, quantize_embeddings=True, quantize_lm_head=True)
    )
    weights = 4 * 64 * 64 + 3 * 64 * 128 + 96 * 64
    assert read_bytes(packed) == weights // 2 + 2 * weights // 64 + 2 * 3 * 64  # codes, scales, norms


def test_models_generate_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import generating

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2, vocab_size=96
    )
    models = {name: LlamaForCausalLM(config).eval() for name in ("one", "other")}
    called: list[str] = []
    for name, model in models.items():
        forward = model.generate
        monkeypatch.setattr(model, "generate", lambda *a, n=name, f=forward, **k: called.append(n) or f(*a, **k))
    monkeypatch.setattr(generating, "prompt_of", lambda *_: torch.ones(1, 4, dtype=torch.int64))
    monkeypatch.setattr(generating, "NEW_TOKENS", 4)
    monkeypatch.setattr(generating, "TURNS", 2)
    found = generating.generate(models, {})
    assert called == ["one", "other"] * 3
    for row in found.values():
        assert len(row["turns"]) == 2 and row["tokens_per_s"] == max(row["turns"]) > 0 and row["first_call_s"] > 0


def report() -> dict[str, Any]:
    shape = {"shape": [64, 32], "bfloat16_us": 20.0}
    ours = [{**shape, "weight": "int4 g128", "tokens": n, "us": 5.0 * n, "kernel": "triton"} for n in (1, 4)]
    for row in ours:
        row |= {"copy_us": 1.0, "small_copy_us": 2.0}
    peers = [
        {**shape, "weight": "torch int4", "tokens": 1, "us": 10.0, "kernel": "torch int4", "error": 0.0},
        {"shape": [64, 32], "weight": "gemlite int4", "failed": "gemlite is not installed"},
    ]
    speed = {"tokens_per_s": 100.0, "gpu_ms": 2.0}
    model = {
        "shape": "1B", "variant": "4 bits", "bound": 1000.0, "memory_bytes": 5e8, "prefill_512": 10.0,
        "prefill_2048": 20.0, "graph_1": speed, "graph_16": {"failed": "RuntimeError: no"}, "eager": speed,
    }  # fmt: skip
    return {"device": "a GPU", "rows": [*ours, *peers], "models": [model]}


def test_tables_show_speeds_shares_and_failures() -> None:
    from gpu.table import kernel_line, kernel_table, model_table

    rows = report()["rows"]
    assert "4.00x bfloat16" in kernel_line(rows[0]) and "20% / 40% of the bandwidth" in kernel_line(rows[0])
    assert kernel_line(rows[-1]).endswith("gemlite is not installed")
    assert "| int4 g128 | 4.0 | 1.0 |" in kernel_table(rows) and "gemlite" not in kernel_table(rows)
    assert "| 1B 4 bits | 100 (50%) |  | 100 (50%) | RuntimeError: no | 10 | 20 | 0.50 |  |" in model_table(
        report()["models"]
    )


def test_it_draws_what_there_is(tmp_path: Path) -> None:
    from gpu.picture import draw

    draw(report(), tmp_path / "all.png")
    draw({**report(), "models": []}, tmp_path / "products.png")
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "products.png").stat().st_size > 1000
