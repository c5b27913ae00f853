"""The texts that are installed with the package."""

from __future__ import annotations

from importlib import resources

from hf_lowbit.testbed import calibration_text, two_cities_transcript, validation_text


def test_the_texts_are_long_enough_and_have_nothing_in_common() -> None:
    validation, calibration = validation_text(), calibration_text()
    assert len(validation) > 100_000
    assert len(calibration) > 250_000
    paragraphs = [{line for line in text.splitlines() if len(line) > 80} for text in (validation, calibration)]
    assert not paragraphs[0] & paragraphs[1]


def test_they_are_attributed() -> None:
    notice = (resources.files("hf_lowbit.testbed") / "data" / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for words in (
        "Raphaël Hertzog",
        "Roland Mas",
        "https://creativecommons.org/licenses/by-sa/3.0/",
        "What was changed",
    ):
        assert words in notice


def test_the_transcript_is_one_sentence() -> None:
    assert two_cities_transcript().startswith("It was the best of times")
    assert len(two_cities_transcript().split()) > 100
