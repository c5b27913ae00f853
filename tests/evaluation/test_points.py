"""Points read from where evaluations are kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_lowbit.evaluation.points import Point, SourceError, read_points
from hf_lowbit.reporting import REPORT_FILE, LayerReport, Report

EVALUATION = {
    "perplexity": 20.5,
    "kl": 0.1,
    "top1_agreement": 0.8,
    "reference_perplexity": 20.0,
    "intervals": {"kl": [0.09, 0.11], "perplexity": [19.0, 22.0]},
    "tokens": 1000,
}
VALUES = {"perplexity": 20.5, "kl": 0.1, "top1_agreement": 0.8, "reference_perplexity": 20.0}
INTERVALS = {"kl": (0.09, 0.11), "perplexity": (19.0, 22.0)}


def write(folder: Path, content: Any) -> Path:
    path = folder / "rows.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_saved_model(tmp_path: Path) -> None:
    layer = LayerReport("a.weight", "linear", "int", 4, 64, True, "int8", 16, 9, activation="int 8 bits")
    (tmp_path / REPORT_FILE).write_text(Report("rtn", [layer], evaluation=EVALUATION).to_json())
    assert read_points(tmp_path) == [Point("rtn, inputs int 8 bits", 4.5, VALUES, INTERVALS)]


def test_what_evaluate_prints(tmp_path: Path) -> None:
    printed = {"model": "x", "method": "gptq", "bits_per_weight": 3.25, **EVALUATION}
    expected = Point("gptq", 3.25, VALUES, INTERVALS)
    assert read_points(write(tmp_path, printed)) == [expected]
    assert read_points(write(tmp_path, [printed, printed])) == [expected, expected]


def test_rows_of_a_benchmark(tmp_path: Path) -> None:
    rows = [{"variant": "gptq-asym", "bits_per_weight": 3.3, "kl": 0.2}, {"variant": "rtn", "failed": "no memory"}]
    assert read_points(write(tmp_path, {"model": "x", "rows": rows})) == [Point("gptq-asym", 3.3, {"kl": 0.2})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("words", "is not JSON"),
        ([1], "holds no evaluations"),
        ([], "holds no evaluations"),
        ({"rows": [{"variant": "rtn", "failed": "x"}]}, "holds no evaluations"),
        ({"model": "float", "perplexity": 20.0}, 'without "method", "bits_per_weight"'),
        ({"method": "rtn", "bits_per_weight": 4.5}, "one of kl"),
    ],
)
def test_files_that_hold_nothing(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_points(write(tmp_path, content))


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no file or folder"):
        read_points(tmp_path / "none")
    with pytest.raises(SourceError, match="it has no report"):
        read_points(tmp_path)
    (tmp_path / REPORT_FILE).write_text(Report("rtn", []).to_json())
    with pytest.raises(SourceError, match="was not measured yet: hf-lowbit evaluate"):
        read_points(tmp_path)
