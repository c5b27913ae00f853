"""benchmarks/quality: every peer has its worker, windows and clusters are what they say."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import hf_lowbit
from hf_lowbit.evaluation.scores import WindowScores

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``part("judge")``: a module of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"quality.{name}")

    yield load


def test_every_variant_is_a_config_or_a_worker(part: Any) -> None:
    for variant in part("variants").VARIANTS.values():
        if variant.method.startswith("peer:"):
            peer = variant.method.removeprefix("peer:")
            assert (BENCHMARKS / "quality" / "workers" / f"peer_{peer}.py").exists(), peer
            assert (BENCHMARKS / "peers" / f"{peer}.txt").exists(), peer
        else:
            fields = {"bits": 4, "group_size": 64, **variant.fields}
            assert hf_lowbit.methods()[variant.method].config_class(**fields).bits == fields["bits"]


def test_windows_that_overlap_count_as_one(part: Any) -> None:
    scores = WindowScores()
    for tokens, kl in [(10, 1.0), (20, 3.0), (5, 0.5)]:
        scores.add(tokens, {"kl": kl, "top1_agreement": 1.0})
    together = part("judge")._clustered(scores, [0, 0, 1])
    assert together.tokens == [30, 5]
    assert together.sums == {"kl": [4.0, 0.5], "top1_agreement": [2.0, 1.0]}
    assert together.mean("kl") == scores.mean("kl")


@pytest.mark.real
def test_calibration_windows_are_whole_and_all_different(part: Any, tmp_path: Path) -> None:
    """The text holds 125 of 512 tokens: the others begin in the middle of these."""
    options = argparse.Namespace(model=None, samples=128, length=512, tokens=1024, seed=0)
    task = part("language").prepare(options, tmp_path)
    ids = torch.load(task.data)
    assert ids.shape == (128, 512)
    assert len(ids.unique(dim=0)) == 128
    assert not set(map(tuple, ids.tolist())) & {tuple(window.tolist()) for window in task.windows}
