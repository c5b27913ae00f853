"""Texts and token ids as calibration data, and the fingerprint of all data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_lowbit.calibration.data import DataError
from hf_lowbit.calibration.data.text import cut
from hf_lowbit.evaluation import split_windows, tokenize
from tests.calibration.data.helpers import IDS, TEXTS, no_tokenizer, prepare, rows, with_eos
from tests.evaluation.tiny import CHARACTERS, tiny_llama, tiny_tokenizer

# Texts


def test_all_windows_of_a_text_are_those_of_the_perplexity_measurement() -> None:
    """With as many samples as there are windows, in the order of the text, and without its short tail."""
    text = " ".join(TEXTS)
    windows = split_windows(tokenize(tiny_tokenizer(), text), 16, bos_token_id=0)
    full = [window.tolist() for window in windows if len(window) == 16]
    result = prepare([text], num_samples=len(full))
    assert len(full) < len(windows)
    assert rows(result) == full
    assert [len(batch["input_ids"]) for batch in result.batches] == [8, len(full) - 8]
    assert result.description == "list of 1 texts"
    assert result.sample is not None and result.sample.startswith("<s>")
    assert result.tokens == 16 * len(full)


@pytest.mark.parametrize("bos", [True, False])
def test_texts_are_joined_by_the_eos_token(bos: bool) -> None:
    a, b, z = (CHARACTERS.index(c) + 2 for c in "abz")
    result = prepare(["aaa", "bb", "aa"], None, lambda: with_eos(bos), num_samples=1, sequence_length=9 + bos)
    assert rows(result) == [[0] * bos + [a, a, a, z, b, b, z, a, a]]


def test_texts_are_joined_by_an_empty_line_without_eos() -> None:
    a, b, unknown = CHARACTERS.index("a") + 2, CHARACTERS.index("b") + 2, 1
    result = prepare(["aaa", "bb"], num_samples=1, sequence_length=8)
    assert rows(result) == [[0, a, a, a, unknown, unknown, b, b]]


def test_samples_are_drawn_by_the_seed_without_replacement() -> None:
    every = rows(prepare(TEXTS, num_samples=13))
    first, again, other = (prepare(TEXTS, num_samples=5, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    for drawn in (rows(first), rows(other)):
        places = [every.index(row) for row in drawn]
        assert places == sorted(set(places))


def test_batches_are_as_the_model_takes_them() -> None:
    for batch in prepare(TEXTS, num_samples=5, batch_size=2).batches:
        assert list(batch) == ["input_ids"]
        assert batch["input_ids"].dtype == torch.int64 and not batch["input_ids"].is_inference()
        assert tiny_llama()(**batch).logits.shape == (*batch["input_ids"].shape, 29)


def test_the_result_cannot_be_changed_and_its_sample_is_short() -> None:
    result = prepare(["a" * 600], num_samples=1, sequence_length=500)
    assert result.sample is not None and len(result.sample) == 200
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.tokens = 0  # type: ignore[misc]


# Files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prose.txt", "\n\n".join(TEXTS)),
        ("prose.json", json.dumps(TEXTS)),
        ("records.json", json.dumps([{"text": text} for text in TEXTS])),
        ("lines.jsonl", "\n".join(json.dumps({"text": text, "id": 3}) for text in TEXTS) + "\n"),
        ("strings.JSONL", "\n\n".join(json.dumps(text) for text in TEXTS)),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_files_hold_the_same_as_lists(tmp_path: Path, name: str, content: str, kind: Any) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    result = prepare(kind(tmp_path / name), num_samples=10)
    assert result.fingerprint == prepare(TEXTS, num_samples=10).fingerprint
    assert result.description == f"text file {name}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "  \n", "text 0 is empty"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read as .txt text"),
        ("a.json", "{", "cannot be read as .json text"),
        ("a.json", '{"text": "a"}', "must hold a list"),
        ("a.json", "[]", "no text in it"),
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}', "record 1 has no field 'text'"),
        ("a.json", '["a", 3]', "text 1 is a int"),
        ("a.csv", "a,b", "ends with .txt, .json, .jsonl"),
    ],
)
def test_files_that_hold_no_texts(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        prepare(str(tmp_path / name))


# Token ids


@pytest.mark.parametrize(
    "data",
    [IDS, IDS.to(torch.int32), IDS.numpy().astype(np.uint16), IDS.tolist(), list(IDS), list(IDS.numpy()), tuple(IDS)],
)
def test_rows_of_ids_are_samples(data: Any) -> None:
    """Long ones are cut at their end; nothing is added, and no tokenizer is asked for."""
    result = prepare(data, None, no_tokenizer, num_samples=10, batch_size=4)
    assert rows(result) == IDS[:, :16].tolist()
    assert [len(batch["input_ids"]) for batch in result.batches] == [4, 4, 2]
    assert result.sample is None and result.tokens == 160
    assert result.fingerprint == prepare(IDS, None, None, num_samples=10, batch_size=4).fingerprint


@pytest.mark.parametrize("data", [IDS.flatten(), IDS.flatten().tolist()])
def test_one_row_of_ids_is_cut_into_windows(data: Any) -> None:
    result = prepare(data, num_samples=12)
    assert rows(result) == IDS.flatten()[:192].reshape(12, 16).tolist()
    assert result.description == "200 token ids"


def test_batches_hold_rows_of_equal_length() -> None:
    result = prepare([[1] * 5, [2] * 9, [3] * 5, [4] * 30], num_samples=4)
    assert [batch["input_ids"].tolist() for batch in result.batches] == [[[1] * 5, [3] * 5], [[2] * 9], [[4] * 16]]


def test_the_data_is_a_copy() -> None:
    ids = IDS.clone()
    result = prepare(ids, num_samples=10)
    ids.zero_()
    assert rows(result) == IDS[:, :16].tolist()


# The fingerprint


def test_the_fingerprint_changes_with_everything() -> None:
    """Values, types, shapes, keys, their order and the batches' order."""
    ids, mask = IDS[:4], torch.ones(4, 20)
    variants: list[list[dict[str, torch.Tensor]]] = [
        [{"input_ids": ids, "attention_mask": mask}],
        [{"attention_mask": mask, "input_ids": ids}],
        [{"input_ids": ids, "attention_mask": mask.bool()}],
        [{"input_ids": ids, "attention_mask": mask.bfloat16()}],
        [{"input_ids": ids, "position_ids": mask}],
        [{"input_ids": ids.flip(0), "attention_mask": mask}],
        [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}],
        [{"input_ids": ids[2:], "attention_mask": mask[2:]}, {"input_ids": ids[:2], "attention_mask": mask[:2]}],
    ]
    prints = [prepare(variant).fingerprint for variant in variants]
    assert len(set(prints)) == len(prints)
    assert prints == [prepare(variant).fingerprint for variant in variants]


def test_windows_of_nothing() -> None:
    assert cut([], 8).shape == (0, 8)
    assert cut([1, 2], 8, bos_token_id=0).shape == (0, 8)
