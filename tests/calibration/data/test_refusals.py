"""What is refused before any work, and how it is said."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from transformers import T5Config, T5ForConditionalGeneration

from hf_lowbit.calibration.data import DataError
from tests.calibration.data.helpers import IDS, TEXTS, no_tokenizer, prepare, tiny_whisper
from tests.evaluation.tiny import tiny_llama
from tests.matrix.models import MODELS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "a NoneType is no calibration data: calibration data is one of: a file"),
        (3, "a int is no calibration data"),
        (b"text", "a bytes is no calibration data"),
        ("some text to learn from", "is no file and no dataset.*'self'.*a list of texts"),
        ("missing.txt", "there is no file 'missing.txt'"),
        ([], "an empty list"),
        (["a", "", "b"], "text 1 is empty"),
        (["a", 3], "item 1 is a token id and item 0 a text"),
        ([3, "a"], "item 1 is a text and item 0 a token id"),
        (["a", None], "item 1 is a NoneType"),
        ([object()], "a list whose items are object"),
        (
            TEXTS[:1],
            "the data holds 2 windows of 16 tokens; num_samples=4: give more text, or lower num_samples or seq",
        ),
        (IDS[:3], "the data holds 3 sequences; num_samples=4: give more"),
        (IDS[0], "the data holds 1 windows of 16 tokens; num_samples=4: give more tokens"),
        (IDS + 1, "the data holds 29, and the model has 29 tokens: the ids come from a tokenizer of another model"),
        (IDS - 5, "the data holds -5; token ids are not negative"),
        (IDS.float(), "torch.float32; token ids are integers"),
        (IDS.bool(), "torch.bool; token ids are integers"),
        (IDS[None], "one or two dimensions"),
        ([[1.5], [2.5], [3.5], [4.5]], "sequence 0 holds torch.float64"),
        ([[1], [2], [3], [29]], "sequence 3 holds 29, and the model has 29 tokens"),
        ([["a"], ["b"], ["c"], ["d"]], "sequence 0 holds no token ids"),
        ([[1], [], [2], [3]], r"sequence 1 has the shape \[0\]"),
        ([[[1]], [[2]], [[3]], [[4]]], r"sequence 0 has the shape \[1, 1\]"),
    ],
)
def test_data_that_is_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(data)


@pytest.mark.parametrize("name", ["num_samples", "sequence_length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_numbers_that_are_refused(name: str, value: float) -> None:
    with pytest.raises(DataError, match=f"{name} is {value}; it must be an integer"):
        prepare(TEXTS, **{name: value})


@pytest.mark.parametrize("data", [TEXTS, IDS, "self"])
def test_more_positions_than_the_model_has(data: Any) -> None:
    with pytest.raises(
        DataError, match="sequence_length is 65, and the model has 64 positions: lower it to at most 64"
    ):
        prepare(data, MODELS["gpt2"].build(), no_tokenizer, sequence_length=65)


def test_a_dataset_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"'org/name' is no file, and no dataset.*ConnectionError: no route"):
        prepare("org/name")


def test_tokenizers_that_are_refused() -> None:
    remedy = "pass token ids .* or a model folder that holds the tokenizer"

    def broken() -> Any:
        raise OSError("no tokenizer.json")

    for source, message in (
        (None, "came without one"),
        (broken, "OSError: no tokenizer.json"),
        (lambda: None, "none was"),
    ):
        with pytest.raises(DataError, match=f"{message}.*{remedy}"):
            prepare(TEXTS, None, source)
    with pytest.raises(DataError, match="29 tokens and the model 20: it is a tokenizer of another model"):
        prepare(TEXTS, tiny_llama(vocabulary=20))


@pytest.mark.parametrize("data", [TEXTS, IDS, IDS.tolist()])
def test_texts_and_ids_are_for_causal_language_models(data: Any) -> None:
    sizes = {"vocab_size": 29, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    for model in (tiny_whisper(), T5ForConditionalGeneration(T5Config(**sizes)), MODELS["unet"].build()):
        with pytest.raises(DataError, match=r"calibrate causal language models of transformers, and .* is none"):
            prepare(data, model)
