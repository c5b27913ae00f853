"""What the evaluation of a speech model refuses before any work."""

from __future__ import annotations

from typing import Any

import pytest

from hf_lowbit.evaluation import evaluate_speech_model


@pytest.mark.parametrize(
    ("recordings", "options", "message"),
    [
        (["a.wav"], {}, "either transcripts or a reference"),
        (["a.wav"], {"transcripts": ["a"], "reference": object()}, "either transcripts or a reference"),
        ([], {"transcripts": []}, "0 recordings"),
        (["a.wav"], {"transcripts": ["a", "b"]}, "1 recordings and 2 transcripts"),
    ],
)
def test_refusals(recordings: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_speech_model(None, None, recordings, **options)
