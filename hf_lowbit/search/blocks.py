"""search_blocks(): which few blocks of a model are worth more than the others get.

Quamba2 runs some blocks W4A16 and the others W4A8 ("W4AX", arXiv 2503.22879, section 4.4), and looks for them by an
evolutionary search over whole models. Here [ours] each block is measured alone, losses add up, and the integer program
that allocates bits chooses: two quantizations and one forward per block, and the same answer every time.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hf_lowbit.allocation import Option, allocate, select_exactly
from hf_lowbit.calibration.divergence import logit_divergence, logits_of
from hf_lowbit.calibration.stacks import layers_of
from hf_lowbit.calibration.units import Batch, ready
from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.integrations.loading import model_facts
from hf_lowbit.plan import build_plan, replace_module
from hf_lowbit.plan.patterns import first_match
from hf_lowbit.quantization import quantize
from hf_lowbit.search.program import prepare
from hf_lowbit.search.ranks import on_batches
from hf_lowbit.state import shared_weights, state_of

logger = logging.getLogger("hf_lowbit")

_SHARE = 4  # the paper's 14 of 56 blocks


@dataclass(frozen=True)
class BlockChoice:
    """What a search of blocks found.

    Attributes:
        config: the given one, with the better fields of the chosen blocks as overrides.
        blocks: names of the chosen ones, in the order of the model.
        losses: block -> KL(float || quantized) of the next token, in nats, where this block alone is as the config has
            it, and all others have the better fields.
        least: the same where all have them.
    """

    config: LowbitConfig
    blocks: tuple[str, ...]
    losses: dict[str, float]
    least: float


@torch.no_grad()
def search_blocks(
    model: nn.Module,
    config: LowbitConfig,
    data: Any = None,
    count: int | None = None,
    better: Mapping[str, Any] = {"activation_bits": None},
    *,
    kl_samples: int = 8,
) -> BlockChoice:
    """Find the blocks that gain most from better fields. The model is only read.

    The model is quantized twice, with the config and with the better fields everywhere, and every block of the first is
    put into the second in turn. Both are rewritten alike beforehand (the same seed), so that they fit.

    Args:
        model: a float language model, on one device; two copies of it are made.
        config: of any method.
        data: calibration data; None takes ``config.dataset``.
        count: how many blocks get the better fields; None: a quarter.
        better: fields of ``overrides``; by default inputs in full precision.
        kl_samples: samples that predictions are compared on, or as many more as fill their last batch.

    Raises:
        ConfigError: fields, a count or a model that cannot be.
        DataError: unusable data.
        SensitivityError: a model without logits.
    """
    blocks, layers = _blocks(model, config)
    count = max(1, len(blocks) // _SHARE) if count is None else count
    if type(count) is not int or not 0 <= count <= len(blocks):
        raise ConfigError(f"count must be a number of blocks, from 0 to {len(blocks)}, not {count!r}")
    if type(kl_samples) is not int or kl_samples < 1:
        raise ConfigError(f"kl_samples must be a positive integer, not {kl_samples!r}")
    everywhere = _with_better(config, blocks, better, layers)
    batches = prepare(model, config, data).batches
    plain, best = (_quantized(model, asked, batches) for asked in (config, everywhere))
    samples = len(next(iter(batches[0].values())))
    compared = ready(model, batches[: math.ceil(kl_samples / samples)])
    was_training = model.training
    model.eval()
    try:
        expected = [logits_of(model, batch) for batch in compared]
    finally:
        model.train(was_training)

    def loss() -> float:
        found = [logit_divergence(own, logits_of(best, batch)) for own, batch in zip(expected, compared, strict=True)]
        return torch.cat(found).mean().item()

    least, losses = loss(), {}
    for name in blocks:
        kept = best.get_submodule(name)
        replace_module(best, name, plain.get_submodule(name))
        losses[name] = loss()
        replace_module(best, name, kept)
    picks = allocate([[Option(0, losses[name]), Option(1, least)] for name in blocks], count)
    chosen = tuple(name for name, pick in zip(blocks, picks, strict=True) if pick)
    logger.info("%d of %d blocks get %s: %s", len(chosen), len(blocks), dict(better), ", ".join(chosen))
    return BlockChoice(_with_better(config, chosen, better, layers), chosen, losses, least)


def _blocks(model: nn.Module, config: LowbitConfig) -> tuple[list[str], list[str]]:
    """Members of the outermost lists of modules that hold planned layers; and all planned layers."""
    if state_of(model) is not None:
        raise ConfigError("this model is quantized already: blocks are searched on the float model")
    layers = list(build_plan(model, replace(config, plan=None), model_facts(model, shared_weights(model))).layers)
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in found):
            found += [f"{name}.{child}" for child, _ in module.named_children() if layers_of(f"{name}.{child}", layers)]
    if not found:
        raise ConfigError(f"this {type(model).__name__} has no list of blocks to choose from")
    return found, layers


def _with_better(
    config: LowbitConfig, blocks: Sequence[str], better: Mapping[str, Any], layers: Sequence[str]
) -> LowbitConfig:
    """The config with the better fields for every layer of these blocks, beside those that its overrides give."""
    given = config.overrides or {}
    chosen: dict[str, dict[str, Any]] = {}
    for name in (layer for block in blocks for layer in layers_of(block, layers)):
        pattern = first_match(given, name)
        chosen[name] = {**(given[pattern] if pattern else {}), **better}
    return replace(config, overrides={**select_exactly(chosen, layers), **given} or None, plan=None)


def _quantized(model: nn.Module, config: LowbitConfig, batches: Sequence[Batch]) -> nn.Module:
    made: nn.Module = quantize(copy.deepcopy(model).eval(), on_batches(config, batches, len(batches)))
    return made
