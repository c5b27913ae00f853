"""benchmarks/quality_diffusion.py: its rows are configs that exist, its prompts name classes, and it resumes."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hf_lowbit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``part("rows")``: a module of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"diffusion.{name}")

    yield load


def settings_of(part: Any, folder: Path, **values: Any) -> Any:
    asked = {"pipeline": "sd", "images": 4, "steps": 2, "calibration": 1, "timesteps": None, "iterations": None}
    return part("settings").Settings(**{**asked, "quick": True, "work": str(folder), **values})


def test_every_row_is_a_config(part: Any) -> None:
    rows = part("rows").all_rows()
    methods = {row.method for row in rows.values()} - {"float"}
    assert {"rtn", "adaround", "fp_diffusion", "mixdq", "q_diffusion", "quest", "svdquant", "vidit_q"} == methods
    for row in rows.values():
        if row.method != "float":
            hf_lowbit.methods()[row.method].config_class(**row.fields)


def test_prompts_name_their_classes(part: Any) -> None:
    from hf_lowbit.evaluation.pictures import PictureClassifier, labels_of_prompts

    settings = part("settings")
    labels = PictureClassifier.load(settings.CLASSIFIER).config.labels
    assert labels == settings.LABELS
    for classes in (True, False):
        wanted = [index % 10 for index in range(23)]
        assert labels_of_prompts(settings.prompts_of(classes, 23), labels).tolist() == wanted
        assert labels_of_prompts(settings.calibration_prompts(classes), labels).tolist() == list(range(10))
    assert not set(settings.prompts_of(False, 10)) & set(settings.calibration_prompts(False))


def test_results_are_kept_by_settings_and_failures_tried_again(part: Any, tmp_path: Path) -> None:
    path, rows = tmp_path / "out.json", part("rows").all_rows()
    settings, others = settings_of(part, tmp_path), settings_of(part, tmp_path, images=8)
    results = part("results").Results(path, settings)
    results.add(rows["rtn-w8a8"], {"fid": 1.0})
    results.add(rows["rtn-w4a8"], {"failed": "no"})
    part("results").Results(path, others).add(rows["rtn-w8a8"], {"fid": 2.0})
    again = part("results").Results(path, settings)
    assert again.has("rtn-w8a8") and not again.has("rtn-w4a8") and not again.has("quest-w8a8")
    assert again.rows["rtn-w8a8"]["fid"] == 1.0 and len(json.loads(path.read_text())["runs"]) == 2
    assert settings.folder != others.folder


def test_the_table_marks_what_is_within_noise(part: Any) -> None:
    rows = [{"name": "a", "fid": 0.5}, {"name": "b", "fid": 3.0}, {"name": "c", "failed": "out of memory"}]
    *_, near, far, failed = part("table").table(rows, {"fid": (1.0, 2.0)}).splitlines()
    assert "0.5000*" in near and "3.0000 " in far and "failed: out of memory" in failed
