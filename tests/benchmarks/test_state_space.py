"""benchmarks/state_space.py: its rows are configs that exist, it measures what it says, and it resumes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hf_lowbit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``part("rows")``: a module of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"mambas.{name}")

    yield load


@pytest.mark.parametrize("generation", [1, 2])
def test_every_row_is_a_config(part: Any, generation: int) -> None:
    rows = part("rows").all_rows(generation)
    methods = {"float", "rtn", "gptq", "signround", "auto", "quamba", "quamba2", *part("rows").PEERS}
    assert {row.method for row in rows.values()} == methods
    for row in rows.values():
        if row.method in hf_lowbit.methods():
            part("models").config_of(row, {"dataset": "text.txt", "num_samples": 1, "seed": 0})


def test_calibration_and_held_out_text_share_nothing(part: Any) -> None:
    texts = [
        (part("settings").TEXT / f"{name}.txt").read_text(encoding="utf-8") for name in ("held_out", "calibration")
    ]
    held_out, calibration = (text.splitlines() for text in texts)
    shared = set(held_out) & set(calibration)
    assert sum(map(len, shared)) < 0.02 * sum(map(len, held_out)), "headers and notices only"


def test_the_float_model_is_no_worse_through_its_cache(part: Any) -> None:
    """Token by token it predicts what it does in one pass, so that what differs in a row is the row's."""
    settings = part("settings").Settings("mamba2", tokens=48, length=24, prompt=8, samples=1)
    quality = part("quality").Quality(settings)
    facts = quality.measure(part("rows").all_rows(2)["float"])
    assert "failed" not in facts
    assert facts["kl"] == 0 and facts["decode"]["kl"] < 1e-6
    assert facts["perplexity_ratio"] == 1 and facts["tokens"] == 2 * 23 and facts["decode"]["tokens"] == 2 * 16
    heads, size, state, channels, taps, layers = 16, 32, 64, 16 * 32 + 2 * 4 * 64, 4, 7
    assert facts["state_bytes"] == 4 * layers * (heads * size * state + channels * taps)
    assert facts["checkpoint_bytes"] == pytest.approx(9.58e6, rel=0.01)


def test_a_row_that_cannot_run_says_where_and_why(part: Any) -> None:
    settings = part("settings").Settings("mamba", tokens=48, length=24, prompt=8, samples=1)
    row = part("rows").Row("wrong", "rtn", {"bits": 99})
    facts = part("quality").Quality(settings).measure(row)
    assert facts["stage"] == "load" and "99" in facts["failed"]


def test_the_ratio_of_perplexities_is_paired(part: Any) -> None:
    torch.manual_seed(0)
    reference = torch.randn(6, 9, 32)
    windows = torch.randint(0, 32, (6, 9))
    facts = part("quality").compare(reference + 0.01 * torch.randn_like(reference), reference, windows)
    low, high = facts["intervals"]["perplexity_ratio"]
    assert low < facts["perplexity_ratio"] < high
    assert high - low < 0.1 * (facts["intervals"]["perplexity"][1] - facts["intervals"]["perplexity"][0])


def test_results_are_kept_by_settings_and_failures_tried_again(part: Any, tmp_path: Path) -> None:
    path, rows = tmp_path / "out.json", part("rows").all_rows(1)
    make, file = part("settings").Settings, part("results").File
    settings = make("mamba")
    first = file(path)
    first.add(settings, rows["rtn-w8a8"], {"kl": 1.0})
    first.add(settings, rows["float"], {"kl": 0.0})
    first.add(settings, rows["gptq-w4a16"], {"failed": "ValueError: no"})
    first.add(settings, rows["torchao-int8"], {"failed": "NotImplementedError: aten.expand"})
    first.add(settings, rows["bitsandbytes-int8"], {"failed": "ImportError: not here"})
    first.add(make("mamba", samples=8), rows["rtn-w8a8"], {"kl": 2.0})
    first.add_speed("mamba", {}, [{"name": "float"}])
    again = file(path)
    assert [name for name in rows if again.has(settings, rows[name])] == ["float", "rtn-w8a8", "torchao-int8"]
    assert again.rows(settings)["rtn-w8a8"]["kl"] == 1.0 and next(iter(again.rows(settings))) == "float"
    changed = part("rows").Row("rtn-w8a8", "rtn", {"bits": 8})
    assert not again.has(settings, changed), "another config under the same name"
    assert len(json.loads(path.read_text())["quality"]) == 2
    again.add_speed("mamba", {}, [])
    assert len(file(path).speed) == 1


def test_speedups_are_of_the_same_round(part: Any) -> None:
    own = [{"prefill": 1.0, "decode": 2.0}, {"prefill": 10.0, "decode": 2.0}, {"prefill": 1.0, "decode": 4.0}]
    reference = [{"prefill": 2.0, "decode": 4.0}, {"prefill": 20.0, "decode": 2.0}, {"prefill": 2.0, "decode": 4.0}]
    facts = part("speed").summary(own, reference)
    assert facts == {"prefill_ms": 1.0, "prefill_speedup": 2.0, "decode_ms": 2.0, "decode_speedup": 1.0}


def test_the_tables_show_what_failed(part: Any) -> None:
    rows = [
        {"name": "a", "kl": 0.5, "decode": {"kl": 0.25}},
        {"name": "b", "stage": "prefill", "failed": "TypeError: x"},
    ]
    heading, good, bad = part("table").quality_table(rows).splitlines()
    assert "KL" in heading and "0.50000" in good and "0.25000" in good
    assert bad.split()[0] == "b" and "prefill failed: TypeError: x" in bad
