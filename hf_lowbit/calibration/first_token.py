"""Which layers read a text's tokens, and whether the first of these is the same in all texts: found on the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.listening import layers_of_kind, told_inputs
from hf_lowbit.calibration.units import Batch, first_sample, without_cache
from hf_lowbit.nn.constant_token import same_token

TEXT = (
    "encoder_hidden_states"  # diffusers' name of a denoiser's argument for the tokens of the text, [batch, tokens, in]
)


@torch.no_grad()
def find_text_layers(model: nn.Module, batch: Batch) -> list[str]:
    """Linear layers that read the tokens of the text as the model gets them: keys and values of cross-attention.

    No class or layer name says so, but one forward of the batch's first sample. A model that projects the text first
    (a context embedder, as of SD3 and Flux) has this projection alone; one without text has none.
    """
    sample = first_sample(without_cache(model, batch))
    text = sample.get(TEXT)
    if not isinstance(text, Tensor) or text.dim() != 3:
        return []
    found: dict[str, None] = {}

    def keep(name: str, module: nn.Module, x: Any) -> None:
        if isinstance(x, Tensor) and x.shape == text.shape and x.data_ptr() == text.data_ptr():
            found[name] = None

    with told_inputs(layers_of_kind(model, (nn.Linear,)), keep):
        model(**sample)
    return list(found)


def constant_first_token(batches: Sequence[Batch]) -> Tensor | str:
    """The first token that all texts of the data share, float32 ``[in]``; or why there is none.

    Rows of zeros (the negative prompts of some pipelines) say nothing. Texts differ if their first tokens do by more
    than the floats' own precision, as with trained embeddings, weighted prompts, or encoders that read both ways (T5).
    """
    constant: Tensor | None = None
    for batch in batches:
        text = batch.get(TEXT)
        if not isinstance(text, Tensor) or text.dim() != 3:
            return f"some of the data has no {TEXT}"
        first = text[:, 0]
        first = first[first.any(dim=-1)]
        if constant is None and len(first):
            constant = first[0].float()
        if constant is not None and not bool(same_token(first, constant, text.dtype).all()):
            return "the first token of the text is not the same in all samples of the data"
    return "the first token of the text is zero in all samples of the data" if constant is None else constant
