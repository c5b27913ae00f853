"""What a model can take: which kind of input, how many token ids, how many positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_lowbit.calibration.data.result import DataError


def require_language_model(model: Any, source: str) -> None:
    """Raise DataError unless the model is one of transformers that reads token ids and nothing else.

    Args:
        source: what the user passed, in the plural.
    """
    if getattr(model, "main_input_name", None) == "input_ids" and not model.config.is_encoder_decoder:
        return
    raise DataError(
        f"{source} calibrate causal language models of transformers, and {type(model).__name__} is none: "
        "pass recordings for a speech model, or batches of its keyword arguments for any other"
    )


def token_embedding(model: Any) -> Any:
    """The module that embeds a model's token ids; None if it does not tell, or has none."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        return model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises where there are none
        return None


def vocabulary_size(model: Any) -> int | None:
    """How many token ids the model knows; None if it does not tell."""
    sizes = [_text_setting(model, "vocab_size"), getattr(token_embedding(model), "num_embeddings", None)]
    known = [size for size in sizes if isinstance(size, int)]
    return min(known) if known else None


def check_ids(ids: Tensor, model: Any, name: str = "input_ids") -> None:
    """Raise DataError for token ids (any shape, not empty) that the model does not know."""
    low, high, size = int(ids.min()), int(ids.max()), vocabulary_size(model)
    if low < 0:
        raise DataError(f"{name} holds {low}; token ids are not negative")
    if size is not None and high >= size:
        raise DataError(
            f"{name} holds {high}, and the model has {size} tokens: the ids come from a tokenizer of another model"
        )


def check_length(length: int, model: Any, name: str = "sequence_length") -> None:
    """Raise DataError for more positions than the model has."""
    most = _text_setting(model, "max_position_embeddings")
    if isinstance(most, int) and length > most:
        raise DataError(f"{name} is {length}, and the model has {most} positions: lower it to at most {most}")


def decoder_positions(model: Any) -> int | None:
    """How many tokens a speech model's decoder takes; None if it does not tell."""
    for name in ("max_target_positions", "max_position_embeddings"):
        positions = _text_setting(model, name)
        if isinstance(positions, int):
            return positions
    return None


def _text_setting(model: Any, name: str) -> Any:
    config: Any = getattr(model, "config", None)
    return getattr(config.get_text_config(), name, None) if hasattr(config, "get_text_config") else None
