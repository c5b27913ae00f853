"""What a mixer keeps between calls, in a transformers cache: the convolution's last inputs and the recurrent state.

The layouts are the library's, ``[batch, channels, taps]`` and ``[batch, channels, n]`` or ``[batch, heads, P, n]``; a
quantized mixer keeps int8 codes in them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.kernels import quantize_codes


class States(NamedTuple):
    """Before the first token of a call; None where there is none, which counts as zeros.

    Attributes:
        convolution: ``[batch, channels, taps]``, int8 or floats.
        recurrent: ``[batch, channels, n]``, int8 or float32.
        steps: the call is of one token, after which the convolution's state may be changed in place.
        in_place: so may the recurrent one.
    """

    convolution: Tensor | None = None
    recurrent: Tensor | None = None
    steps: bool = False
    in_place: bool = False


def read_states(cache: Any, layer: int, tokens: int, taps: int, coded: tuple[bool, bool]) -> States:
    """The states of a layer for a call of so many tokens.

    Args:
        cache: of transformers, or None.
        coded: whether the convolution's and the recurrent state are int8 codes in this mixer.

    Raises:
        ValueError: the cache holds those of a model that keeps them otherwise.
    """
    if cache is None:
        return States()
    convolution, recurrent = kept_states(cache, layer)
    check_state("convolution", layer, convolution, coded[0])
    check_state("recurrent", layer, recurrent, coded[1])
    graph = torch.is_grad_enabled()  # which may hold on to the states: they are not changed in place
    steps = tokens == 1 and convolution is not None and not graph and not _records_past(cache, layer)
    if convolution is not None:
        convolution = convolution[..., -taps:].clone() if graph else convolution[..., -taps:]
    if recurrent is None:
        return States(convolution, None, steps)
    in_place = not graph and recurrent.dtype in (torch.int8, torch.float32)
    recurrent = recurrent.flatten(1, -2)
    if not in_place:
        recurrent = recurrent.clone() if recurrent.dtype == torch.int8 else recurrent.float().clone()
    return States(convolution, recurrent, steps, in_place)


def kept_states(cache: Any, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """The convolution's and the recurrent state in a cache of transformers; None before the first call."""
    if hasattr(cache, "get_conv_state"):
        return cache.get_conv_state(layer), cache.get_recurrent_state(layer)
    own = cache.layers[layer]  # the oldest transformers that is supported has no methods for it
    return (own.conv_states[0], own.recurrent_states[0]) if own.has_previous_state[0] else (None, None)


def _records_past(cache: Any, layer: int) -> bool:
    """Whether a cache keeps all inputs of the convolution, to go back."""
    return bool(getattr(cache.layers[layer], "record_past", False))


def keep_inputs(cache: Any, layer: int, x: Tensor, taps: int, scale: Tensor | None) -> None:
    """Put a convolution's inputs ``[batch, T, channels]`` into the cache: the last ones, or all for one that goes back.

    ``scale``: as int8 codes of it.
    """
    newest = x.detach() if _records_past(cache, layer) else x[:, -taps:].detach()
    codes = newest if scale is None else quantize_codes(newest, scale)
    cache.update_conv_state(codes.transpose(1, 2), layer, conv_kernel_size=taps)
    check_state("convolution", layer, kept_states(cache, layer)[0], scale is not None)  # of a cache that was reset


def check_state(what: str, layer: int, state: Tensor | None, is_coded: bool) -> None:
    """Raise ValueError for a state in the cache that is not kept as this mixer keeps it: int8 codes, or floats."""
    if state is not None and (state.dtype == torch.int8) != is_coded:
        own = "int8 codes of its stored scales" if is_coded else "floats"
        raise ValueError(
            f"layer {layer}: the cache holds a {what} state of {state.dtype} and this model keeps {own}: it is the "
            "cache of another model"
        )


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x ``[batch, T, channels]`` with zeros where the mask is zero: padding changes no state.

    ``mask``: ``[batch, T]``, or of all tokens so far, of which x are the last.
    """
    return x if mask is None else x * mask[:, -x.shape[1] :, None].to(x.dtype)
