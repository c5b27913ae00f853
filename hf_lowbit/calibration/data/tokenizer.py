"""The tokenizer or processor, loaded only where it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_lowbit.calibration.data.limits import vocabulary_size
from hf_lowbit.calibration.data.request import Request
from hf_lowbit.calibration.data.result import DataError

_REMEDY = "pass token ids (or batches of model inputs), or a model folder that holds the tokenizer's files"


def load_processor(source: Callable[[], Any] | None) -> Any:
    """What ``source`` returns.

    Raises:
        DataError: there is no source, or it fails.
    """
    if source is None:
        raise DataError(f"this data needs a tokenizer, and the model came without one: {_REMEDY}")
    try:
        loaded = source()
    except Exception as error:
        raise DataError(f"the tokenizer cannot be loaded ({type(error).__name__}: {error}): {_REMEDY}") from error
    if loaded is None:
        raise DataError(f"this data needs a tokenizer, and none was found: {_REMEDY}")
    return loaded


def load_tokenizer(request: Request) -> Any:
    """The tokenizer, taken out of its processor if there is one.

    Raises:
        DataError: it cannot be loaded, or has more tokens than the model.
    """
    loaded = load_processor(request.tokenizer_source)
    tokenizer = getattr(loaded, "tokenizer", loaded)
    size = vocabulary_size(request.model)
    if size is not None and len(tokenizer) > size:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {size}: it is a tokenizer of another model"
        )
    return tokenizer
