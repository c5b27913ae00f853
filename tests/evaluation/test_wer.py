"""Word error rates counted by hand."""

from __future__ import annotations

import sys

import pytest

from hf_lowbit.evaluation import normalize_transcript, word_error_rate


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  It was the BEST of times,\nit was...  ", "it was the best of times it was"),
        ("Don’t stop; don't!", "dont stop dont"),
        ("a well-known — “fact”", "a well known fact"),
        ("$5 or 10%", "$5 or 10"),
        ("...", ""),
    ],
)
def test_normalization(text: str, normal: str) -> None:
    assert normalize_transcript(text) == normal


def test_known_errors() -> None:
    result = word_error_rate(["one two three four", "Five six!"], ["one too three", "five, six seven"])
    assert (result["substitutions"], result["deletions"], result["insertions"]) == (1, 1, 1)
    assert result["wer"] == 3 / 6
    assert (result["words"], result["utterances"]) == (6, 2)
    low, high = result["intervals"]["wer"]
    assert low <= 0.5 <= high


def test_equal_and_empty_hypotheses() -> None:
    assert word_error_rate(["Hello, world."], ["hello world"])["wer"] == 0
    empty = word_error_rate(["hello world"], [""])
    assert (empty["wer"], empty["deletions"], empty["intervals"]) == (1.0, 2, {})


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        ([], [], "0 references"),
        (["a"], [], "1 references and 0"),
        (["a", "?!"], ["a", "b"], "reference 1 has no words"),
    ],
)
def test_refusals(references: list[str], hypotheses: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        word_error_rate(references, hypotheses)


def test_without_jiwer_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ImportError, match=r"hf_lowbit\[eval\]"):
        word_error_rate(["a"], ["a"])
