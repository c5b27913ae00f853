"""Recordings as calibration data of a speech model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from hf_lowbit.calibration.data import CalibrationData, DataError
from tests.calibration.data.helpers import IDS, no_tokenizer, prepare, tiny_processor, tiny_whisper
from tests.evaluation.tiny import tiny_tokenizer

RATE = 16_000
WAVES = [np.sin(np.arange(8000 + 100 * i) * 0.01 * (i + 1)) for i in range(4)]


def listen(data: Any, model: Any = None, source: Any = tiny_processor, **options: Any) -> CalibrationData:
    numbers = {"num_samples": 3, **options}
    return prepare(data, tiny_whisper() if model is None else model, source, **numbers)


def as_dicts(waves: list[Any], **extra: Any) -> list[dict[str, Any]]:
    return [{"array": wave, "sampling_rate": RATE, **extra} for wave in waves]


@pytest.mark.parametrize(
    "data",
    [
        WAVES[:3],
        [torch.from_numpy(wave) for wave in WAVES[:3]],
        as_dicts(WAVES[:3]),
        [{"audio": item} for item in as_dicts(WAVES[:3])],
    ],
)
def test_recordings_in_any_form_give_the_same(data: Any) -> None:
    result = listen(data)
    assert result.fingerprint == listen([wave.astype(np.float32) for wave in WAVES[:3]]).fingerprint
    assert result.description == "list of 3 recordings"
    assert result.tokens == 3 * 100


def test_batches_are_as_the_model_takes_them() -> None:
    """The model's own greedy transcript, found again when each of its tokens is predicted from those before it."""
    model = tiny_whisper()
    for batch in listen(WAVES, model).batches:
        assert batch["input_features"].shape == (1, 16, 100) and batch["input_features"].dtype == torch.float32
        ids = batch["decoder_input_ids"]
        assert ids.dtype == torch.int64 and ids[0, 0] == 0 and 27 not in ids[0, 1:]
        with torch.no_grad():
            predicted = model.eval()(**batch).logits.argmax(dim=-1)
        assert torch.equal(predicted[0, :-1], ids[0, 1:])
        model.train()
    assert ids.shape[1] > 1


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_whisper()
    first = listen(WAVES, model)
    assert all(module.training for module in model.modules())
    assert listen(WAVES, model.eval()).fingerprint == first.fingerprint


def test_recordings_are_drawn_by_the_seed() -> None:
    drawn = [listen(WAVES, num_samples=2, seed=seed).fingerprint for seed in range(8)]
    assert len(set(drawn)) > 1
    assert drawn == [listen(WAVES, num_samples=2, seed=seed).fingerprint for seed in range(8)]


def test_known_texts_are_what_the_decoder_reads() -> None:
    """With the token that begins a transcript, without the one that ends it."""
    tokens = [0, *tiny_tokenizer()("abc")["input_ids"]]
    for text in ("abc", "abcz"):
        result = listen(as_dicts(WAVES, text=text))
        assert [batch["decoder_input_ids"].tolist() for batch in result.batches] == [[tokens]] * 3
    assert result.sample == tiny_tokenizer().decode(tokens)


@pytest.mark.parametrize(("sequence_length", "kept"), [(10, 10), (100, 24)])
def test_no_more_tokens_than_are_wanted_and_the_decoder_takes(sequence_length: int, kept: int) -> None:
    result = listen(as_dicts(WAVES, text="a" * 50), sequence_length=sequence_length)
    assert all(batch["decoder_input_ids"].shape == (1, kept) for batch in result.batches)


def test_a_dataset_of_recordings() -> None:
    items = [{"array": wave.tolist(), "sampling_rate": RATE} for wave in WAVES[:3]]
    dataset = datasets.Dataset.from_dict({"audio": items, "text": ["abc"] * 3})
    expected = listen(as_dicts(WAVES[:3], text="abc")).fingerprint
    assert listen(dataset).fingerprint == expected
    assert listen(dataset.to_iterable_dataset()).fingerprint == expected
    assert listen(dataset).description == "Dataset, column 'audio'"


def test_a_dataset_whose_decoder_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)
    dataset = datasets.Dataset.from_dict({"audio": ["a.wav"]}).cast_column("audio", datasets.Audio())
    with pytest.raises(DataError, match=r"rows cannot be decoded: .*torchcodec"):
        listen(dataset)


def test_a_model_without_a_decoder_takes_the_recording_alone() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    layers = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=29, **sizes, **layers, **positions))
    processor = SimpleNamespace(feature_extractor=Wav2Vec2FeatureExtractor())
    result = listen(WAVES[:3], model, lambda: processor)
    assert [batch["input_values"].shape for batch in result.batches] == [(1, len(wave)) for wave in WAVES[:3]]
    assert result.sample is None and result.tokens == sum(map(len, WAVES[:3]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WAVES[:2], "holds 2 recordings; num_samples=3: give more, or lower num_samples"),
        (
            [{"array": WAVES[0], "sampling_rate": 8000}] * 3,
            "recording 0 has 8000 Hz, the model takes 16000 Hz: resample it",
        ),
        ([{"array": WAVES[0]}] * 3, "must be an array of samples, or a dict with 'array' and 'sampling_rate'"),
        ([np.zeros(0)] * 3, r"float64 \[0\]; it must be mono"),
        ([np.zeros((2, 50))] * 3, r"float64 \[2, 50\]; it must be mono"),
        ([{"array": np.zeros(9, dtype=np.int16), "sampling_rate": RATE}] * 3, r"int16 \[9\]; it must be mono floating"),
        ([np.array([0.0, np.nan])] * 3, "recording 0 holds NaN or infinite samples"),
        (as_dicts(WAVES, text=3), "its text is a int"),
        ([WAVES[0], "text"], "item 1 is a text and item 0 a recording"),
    ],
)
def test_recordings_that_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        listen(data)


def test_processors_that_are_refused() -> None:
    with pytest.raises(DataError, match="came without one"):
        listen(WAVES, source=None)
    with pytest.raises(DataError, match="processor with its feature extractor, not a tokenizer alone"):
        listen(WAVES, source=tiny_tokenizer)
    with pytest.raises(
        DataError, match=r"of 80 values and the model takes input_features of 16: it is a processor of an"
    ):
        listen(WAVES, source=lambda: tiny_processor(mel_bins=80))
    larger = SimpleNamespace(**{**vars(tiny_processor()), "tokenizer": lambda text: {"input_ids": [29]}})
    with pytest.raises(DataError, match="decoder_input_ids holds 29, and the model has 29 tokens"):
        listen(as_dicts(WAVES, text="a"), source=lambda: larger)


def test_recordings_are_for_speech_models() -> None:
    with pytest.raises(DataError, match="recordings calibrate speech models, and LlamaForCausalLM takes input_ids"):
        prepare(WAVES, None, tiny_processor)
    with pytest.raises(DataError, match="pass recordings for a speech model"):
        listen(IDS, source=no_tokenizer)
