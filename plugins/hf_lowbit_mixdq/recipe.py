"""The recipe of MixDQ: nothing is learned, but ranges are kept from what would spoil them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.concatenations import find_concatenations
from hf_lowbit.calibration.first_token import constant_first_token, find_text_layers
from hf_lowbit.calibration.splitting import split_layers
from hf_lowbit.method import Recipe
from hf_lowbit.nn import PackedLinear
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.parts import round_parts
from hf_lowbit_mixdq.config import MixDQConfig


@dataclass
class _Found:
    """What the float model shows on the data: layers that read the text, their constant, and concatenations."""

    text_layers: list[str] = field(default_factory=list)
    token: Tensor | None = None
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)


def make_recipe(config: MixDQConfig) -> Recipe:
    """Rounded to nearest; with static inputs, after the float model was looked at on the data."""
    if not config.has_static_inputs:
        return Recipe(rounding=round_to_nearest)
    found = _Found()

    def prepare(model: nn.Module, batches: Sequence[dict[str, Any]]) -> list[str]:
        if config.split_shortcuts:
            found.parts = find_concatenations(model, batches[0])
        return _look_at_text(model, batches, found) if config.bos_aware else []

    @torch.no_grad()
    def calibrate(block: Block) -> None:
        widths = split_layers(block, found.parts)
        for key, matrix in block.matrices.items():
            module, weight = matrix.skeleton, matrix.weight
            if found.token is not None and block.full_name(matrix.layer) in found.text_layers:
                assert isinstance(module, PackedLinear)
                product = weight.double() @ found.token.to(weight.device).double()
                module.set_constant_token(found.token, product)
            if key in widths:
                packed = round_parts(weight, matrix.spec, widths[key], round_to_nearest)
            else:
                packed = round_to_nearest(weight, matrix.spec)
            block.pack(key, packed)

    return Recipe(rounding=round_to_nearest, calibrate=calibrate, prepare=prepare)


def _look_at_text(model: nn.Module, batches: Sequence[dict[str, Any]], found: _Found) -> list[str]:
    """Fill in the layers that read the text, and their constant; a line for the report."""
    found.text_layers = find_text_layers(model, batches[0])
    if not found.text_layers:
        return ["no layer reads the tokens of a text: bos_aware has nothing to do in this model"]
    token = constant_first_token(batches)
    layers = f"{len(found.text_layers)} layers that read the text"
    if isinstance(token, str):
        return [f"{token}: the inputs of the {layers} are quantized as all others are (bos_aware)"]
    found.token = token
    return [f"{layers} store the product of its first token, and leave it out of their inputs' range (bos_aware)"]
