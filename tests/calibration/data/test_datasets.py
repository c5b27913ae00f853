"""Datasets by their id, by their folder and loaded by the user."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_lowbit.calibration.data import DataError
from hf_lowbit.evaluation import tokenize
from tests.calibration.data.helpers import IDS, TEXTS, no_tokenizer, prepare, rows, with_eos
from tests.evaluation.tiny import CHARACTERS, tiny_tokenizer


@pytest.mark.parametrize("column", ["text", "content", "poem"])
def test_a_dataset_of_texts_holds_the_same_as_a_list(column: str) -> None:
    texts = [TEXTS[0], "", None, *TEXTS[1:]]
    dataset = datasets.Dataset.from_dict({"number": [0] * 6, column: texts})
    result = prepare(dataset, num_samples=10)
    assert result.fingerprint == prepare(TEXTS, num_samples=10).fingerprint
    assert result.description == f"Dataset, column {column!r}"
    assert prepare(dataset.to_iterable_dataset(), num_samples=10).fingerprint == result.fingerprint


def test_a_large_dataset_is_read_in_blocks_that_the_seed_draws() -> None:
    """Each row is a window of its own number, so that the samples tell which rows were read."""
    dataset = datasets.Dataset.from_dict({"text": [CHARACTERS[row // 256] * 15 for row in range(26 * 256)]})
    seen = [
        {
            token
            for row in rows(prepare(dataset, None, lambda: with_eos(False), num_samples=8, seed=seed))
            for token in row
        }
        for seed in (0, 0, 1)
    ]
    assert seen[0] == seen[1] != seen[2]
    assert all(len(letters - {27}) == 1 for letters in seen)


@pytest.mark.parametrize("format", [None, "torch", "numpy"])
def test_a_dataset_of_ids_has_samples_in_its_rows(format: str | None) -> None:
    dataset = datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "text": ["a"] * 10})
    result = prepare(dataset.with_format(format), None, no_tokenizer, num_samples=10)
    assert rows(result) == IDS[:, :16].tolist()
    assert rows(prepare(dataset.to_iterable_dataset(), num_samples=3)) == IDS[:3, :16].tolist()


def test_a_folder_is_loaded_by_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "train.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    result = prepare(str(tmp_path / "poems"), num_samples=10)
    assert result.fingerprint == prepare(TEXTS, num_samples=10).fingerprint
    assert result.description == "dataset poems"
    with pytest.raises(DataError, match=r"no dataset that can be loaded.*train\[2"):
        prepare(f"{tmp_path / 'poems'}@train[2", num_samples=10)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext:wikitext-103-v1@test", ("Salesforce/wikitext", "wikitext-103-v1", "test")),
        ("org/name", ("org/name", None, "train")),
        ("org/na.me:en-v1.0@train[:10%]", ("org/na.me", "en-v1.0", "train[:10%]")),
        ("name@validation", ("name", None, "validation")),
    ],
)
def test_datasets_by_their_id(name: str, asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(path: str, config: str | None, split: str) -> datasets.Dataset:
        calls.append((path, config, split))
        return datasets.Dataset.from_dict({"text": ["aaa\n", "", "bb\n", "cc"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    result = prepare(name, None, lambda: with_eos(), num_samples=1, sequence_length=10)
    assert calls == [asked]
    assert result.description == f"dataset {name}"
    joined = "aaa?bb?cc" if "Salesforce" in asked[0] else "aaa?zbb?zcc"  # lines as they are, else the EOS token "z"
    assert rows(result) == [[0, *tokenize(tiny_tokenizer(), joined)[:9]]]


def test_datasets_by_their_id_need_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=re.escape('pip install "hf_lowbit[eval]"')):
        prepare("wikitext")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}), "pass one of 'train'"),
        (datasets.Dataset.from_dict({"text": []}), "has no rows"),
        (datasets.Dataset.from_dict({"a": ["b"], "c": ["d"]}), "the columns 'a', 'c'"),
        (datasets.Dataset.from_dict({"text": [1, 2]}), "column 'text', text 0 is a int"),
        (datasets.Dataset.from_dict({"text": ["short"]}), "holds 0 windows of 16 tokens; num_samples=4"),
        (datasets.Dataset.from_dict({"audio": [{"array": [0.0], "sampling_rate": 16000}]}), "the columns 'audio'"),
    ],
)
def test_datasets_that_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(dataset)
