"""The evaluation of a causal language model, as one JSON-ready dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_lowbit.evaluation.bootstrap import bootstrap_interval
from hf_lowbit.evaluation.perplexity import to_perplexity
from hf_lowbit.evaluation.scores import WindowScores, score_windows
from hf_lowbit.evaluation.windows import predicted_tokens, split_windows, tokenize

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    reference: PreTrainedModel | None = None,
    sequence_length: int = 512,
    max_tokens: int | None = 16384,
    seed: int = 0,
) -> dict[str, Any]:
    """Perplexity on held-out text and, with a reference, how far the model's predictions are from it.

    Non-overlapping windows of ``sequence_length`` tokens, each with the BOS token first if the tokenizer has one;
    means over predicted tokens; 95 % intervals by bootstrap over windows.

    Args:
        max_tokens: how much of the text is used, counted in its own tokens; None for all.
        seed: of the bootstrap.

    Returns:
        "perplexity"; with a reference "kl" (KL(reference || model), nats per token), "top1_agreement" (0 to 1) and
        "reference_perplexity"; "intervals", a [low, high] for each of the first three; "tokens" (predicted tokens),
        "windows", "sequence_length", "bos" (whether windows begin with it).

    Raises:
        ValueError: before any forward pass: the text fills less than one and a half windows, the tokenizer has more
            tokens than the model, or the reference another vocabulary size.
        FloatingPointError: NaN or infinite logits.
    """
    windows, facts = held_out_windows(model, reference, tokenizer, text, sequence_length, max_tokens)
    return {**summarize(score_windows(model, windows, reference), seed), **facts}


def held_out_windows(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    sequence_length: int,
    max_tokens: int | None,
) -> tuple[list[Tensor], dict[str, Any]]:
    """The windows of :func:`evaluate_language_model`, and its "sequence_length" and "bos"; refuses what it refuses."""
    _check_vocabularies(model, tokenizer, reference)
    bos = getattr(tokenizer, "bos_token_id", None)
    windows = split_windows(tokenize(tokenizer, text, max_tokens), sequence_length, bos)
    _check_length(windows, sequence_length)
    return windows, {"sequence_length": sequence_length, "bos": bos is not None}


def summarize(scores: WindowScores, seed: int = 0) -> dict[str, Any]:
    """The statistics of scored windows, with their intervals."""
    weights = _join_short_tail(scores.tokens, scores.tokens)
    interval = {
        name: bootstrap_interval(_join_short_tail(sums, scores.tokens), weights, seed=seed)
        for name, sums in scores.sums.items()
    }
    low, high = interval["negative_log_likelihood"]
    result: dict[str, Any] = {"perplexity": to_perplexity(scores.mean("negative_log_likelihood"))}
    intervals = {"perplexity": [to_perplexity(low), to_perplexity(high)]}
    for name in ("kl", "top1_agreement"):
        if name in scores.sums:
            result[name] = scores.mean(name)
            intervals[name] = list(interval[name])
    if "reference_negative_log_likelihood" in scores.sums:
        result["reference_perplexity"] = to_perplexity(scores.mean("reference_negative_log_likelihood"))
    return {**result, "intervals": intervals, "tokens": sum(scores.tokens), "windows": len(scores.tokens)}


def _check_vocabularies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, reference: PreTrainedModel | None
) -> None:
    size = _vocabulary_size(model)
    if len(tokenizer) > size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens and the model {size}: they do not belong together")
    if reference is not None and _vocabulary_size(reference) != size:
        raise ValueError(f"the reference has a vocabulary of {_vocabulary_size(reference)}, the model of {size}")


def _vocabulary_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _join_short_tail(values: Sequence[float], tokens: Sequence[int]) -> list[float]:
    """Values per window, a last window below half the first one's tokens counted with the one before it.

    Drawn alone, a window of a few tokens would decide a resample's mean.
    """
    if 2 * tokens[-1] >= tokens[0]:
        return list(values)
    return [*values[:-2], values[-2] + values[-1]]


def _check_length(windows: list[Tensor], sequence_length: int) -> None:
    tokens = predicted_tokens(windows)
    if len(windows) < 2 or len(_join_short_tail(tokens, tokens)) < 2:
        raise ValueError(
            f"the text is too short: it has {sum(tokens)} tokens to predict, and an interval needs at least one and a "
            f"half windows of {sequence_length}; give more text or a smaller sequence_length"
        )
