"""NUPES' learned half: codes over the whole code space and the exponents with them, block by block."""

from __future__ import annotations

from dataclasses import replace

import torch

from hf_lowbit.calibration.block import UNREACHED, Block
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.reconstruct import Training, output_channels, reconstruct
from hf_lowbit.formats import WeightSpec
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.clip import fit_clipped
from hf_lowbit.rounding.learned import WholeSpaceRounding
from hf_lowbit.rounding.power import search_exponent
from hf_lowbit.rounding.store import round_with
from hf_lowbit_nupes.config import NUPESConfig


def learn(block: Block, config: NUPESConfig) -> None:
    """Train what reads inputs, in tables of powers without zero points, and pack every matrix of the block.

    A layer has one table: its experts share a learned exponent [ours].
    """
    strength = config.regularization / output_channels(block)  # the loss is a mean over channels, not their sum
    tokens = {key: magnitude.tokens for key, magnitude in block.magnitudes().items()}
    learned: dict[str, WholeSpaceRounding] = {}
    specs: dict[str, WeightSpec] = {}  # by layer, of those that are not
    for layer in dict.fromkeys(matrix.layer for matrix in block.matrices.values()):
        parts = [matrix for matrix in block.matrices.values() if matrix.layer == layer]
        specs[layer] = spec = completed(parts)
        if spec.format != "power" or not spec.symmetric:
            continue
        leader: WholeSpaceRounding | None = None
        for part in parts:
            if tokens.get(part.key):
                learned[part.key] = WholeSpaceRounding(
                    part.weight, spec, round_with(fit_clipped, part.weight, spec) if config.search_clip else None,
                    regularization=strength, learn_exponent=part.spec.is_open, learn_scale=config.learn_scale,
                    partner=leader,
                )  # fmt: skip
                leader = leader or learned[part.key]
    if learned:
        reconstruct(block, learned, Training(config.iterations, config.rate, "adam", keep_best=False, decay=False))
    for key, weight in learned.items():
        specs[block.matrices[key].layer] = weight.result_spec
        block.pack(key, weight.pack())
    for key in block.unpacked:
        matrix = block.matrices[key]
        spec = specs[matrix.layer]
        learnable = spec.format == "power" and spec.symmetric
        block.notes.setdefault(key, UNREACHED if learnable else f"{spec.json} is not learned: rounded to nearest")
        block.pack(key, round_to_nearest(matrix.weight, spec))


def completed(parts: list[Matrix]) -> WeightSpec:
    """The spec of a layer's matrices; an open exponent is the one that fits the first parameter best, at most 1."""
    first = parts[0]
    if not first.spec.is_open:
        return first.spec
    stack = torch.stack([part.weight for part in parts if part.parameter == first.parameter])
    return replace(first.spec, exponent=min(1.0, search_exponent(stack, first.spec)))
