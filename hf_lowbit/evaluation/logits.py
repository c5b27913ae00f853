"""Next-token log-probabilities of one window, a few positions at a time, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# A causal language model, or any function from token ids [1, n] to logits [1, n, vocabulary].
LogitSource = nn.Module | Callable[[Tensor], Tensor]

_CHUNK_ELEMENTS = 2**23  # 32 MB of float32


def next_token_logits(source: LogitSource, window: Tensor) -> Tensor:
    """Logits that predict ``window[1:]``, in the source's own dtype and on its device.

    Args:
        window: token ids, int64 [n].

    Returns:
        [n - 1, vocabulary].
    """
    ids = window.unsqueeze(0)
    if isinstance(source, nn.Module):
        device = next((parameter.device for parameter in source.parameters()), ids.device)
        output = source(input_ids=ids.to(device), use_cache=False)
        logits: Tensor = output.logits
    else:
        logits = source(ids)
    return logits[0, :-1]


def log_probability_chunks(name: str, *logits: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Float32 log-softmax of several logits [n, vocabulary] over the same rows, on the device of the first.

    Yields:
        The rows, and one [rows, vocabulary] tensor for each argument: never the whole window in float32.

    Raises:
        FloatingPointError: NaN or infinite logits; the message begins with ``name``.
    """
    rows, vocabulary = logits[0].shape
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        chunks = tuple(values[part].to(logits[0].device, torch.float32) for values in logits)
        for index, chunk in enumerate(chunks):
            if not bool(torch.isfinite(chunk).all()):
                which = "the model" if index == 0 else "the reference"
                raise FloatingPointError(f"{name}: {which} gives NaN or infinite logits")
        yield part, tuple(torch.log_softmax(chunk, dim=-1) for chunk in chunks)


@contextmanager
def evaluation_mode(*sources: LogitSource | None) -> Iterator[None]:
    """Dropout off and no gradients inside; the modules' training modes are restored at the end."""
    modules = [module for source in sources if isinstance(source, nn.Module) for module in source.modules()]
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
