"""Word error rate."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from hf_lowbit.evaluation.bootstrap import bootstrap_interval

_ERRORS = ("substitutions", "deletions", "insertions")


def normalize_transcript(text: str) -> str:
    """Lower case, no punctuation, single spaces.

    Apostrophes vanish ("don't" is one word); other punctuation separates words ("well-known" is two). Symbols such as
    a dollar sign stay, and numbers are not spelled out.
    """
    text = re.sub("['\u2018\u2019\u02bc]", "", unicodedata.normalize("NFKC", text).lower())
    text = "".join(" " if unicodedata.category(character).startswith("P") else character for character in text)
    return " ".join(text.split())


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Word error rate of transcripts, after normalization: (substitutions + deletions + insertions) / reference words.

    Args:
        references, hypotheses: one string an utterance, in the same order.
        seed: of the bootstrap over utterances.

    Returns:
        "wer", "substitutions", "deletions", "insertions", "words" (of the references), "utterances", and "intervals":
        {"wer": [low, high]}, empty for a single utterance.

    Raises:
        ValueError: no utterance, different numbers of them, or a reference without words.
        ImportError: jiwer is absent.
    """
    if len(references) != len(hypotheses) or not references:
        raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses: one of each an utterance")
    expected = [normalize_transcript(text) for text in references]
    if "" in expected:
        raise ValueError(f"reference {expected.index('')} has no words")
    process_words = _jiwer().process_words
    pairs = zip(expected, hypotheses, strict=True)
    outputs = [process_words(reference, normalize_transcript(hypothesis)) for reference, hypothesis in pairs]
    counts = {kind: [getattr(output, kind) for output in outputs] for kind in _ERRORS}
    errors = [sum(kinds) for kinds in zip(*counts.values(), strict=True)]
    words = [len(reference.split()) for reference in expected]
    several = len(words) > 1
    return {
        "wer": sum(errors) / sum(words),
        **{kind: sum(values) for kind, values in counts.items()},
        "words": sum(words),
        "utterances": len(words),
        "intervals": {"wer": list(bootstrap_interval(errors, words, seed=seed))} if several else {},
    }


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("the word error rate needs jiwer: pip install 'hf_lowbit[eval]'") from error
    return jiwer
