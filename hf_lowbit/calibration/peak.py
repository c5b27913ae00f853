"""How much memory a calibration will need, said before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_lowbit.calibration.placement import Placement
from hf_lowbit.calibration.stacks import find_stacks, layers_of
from hf_lowbit.plan import PlannedLayer


def predict_peak(
    model: nn.Module,
    layers: Mapping[str, PlannedLayer],
    batches: Sequence[dict[str, Any]],
    targets: bool,
    limit: int,
    placement: Placement | None = None,
) -> str:
    """One line: the model, one block in float32 with the statistics of its inputs, and the activations; on the host and
    on the device each, where these are two.

    The activations are estimated for a language model: one vector of the hidden size per token. Blocks whose weights
    are read when they are reached count as what they will be packed.
    """
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(t.numel() * t.element_size() for t in tensors if not t.is_meta)
    if any(t.is_meta for t in tensors):
        held += sum(_packed(model.get_submodule(name), layer) for name, layer in layers.items())
    block = statistics = 0
    for stack in find_stacks(model, layers):
        for name in stack.blocks:
            block = max(block, 4 * sum(p.numel() for p in model.get_submodule(name).parameters()))
            widths = [_columns(model.get_submodule(layer)) for layer in layers_of(name, layers)]
            statistics = max(statistics, 4 * sum(width * width for width in widths))
    hidden = getattr(getattr(model, "config", None), "hidden_size", None) or 0
    tokens = sum(_tokens(batch) for batch in batches) if hidden else 0
    activations = 4 * tokens * hidden * (2 if targets else 1)
    kept = min(activations, limit)
    spilled = f" ({_mb(activations - kept)} more on disk)" if activations > kept else ""
    if placement is not None and placement.device != placement.host:
        inside = {id(t) for name in placement.blocks for t in model.get_submodule(name).parameters()}
        around = sum(t.numel() * t.element_size() for t in model.parameters() if id(t) not in inside)
        return (
            f"predicted peak of tensors: on {placement.device} {_mb(max(around, block + statistics))} (a block "
            f"{_mb(block)} with statistics {_mb(statistics)}; before the first one {_mb(around)} around the blocks), "
            f"on {placement.host} {_mb(held + kept)}: model {_mb(held)}, activations {_mb(kept)}{spilled}"
        )
    return (
        f"predicted peak of tensors: {_mb(held + block + statistics + kept)}: model {_mb(held)}, "
        f"one block {_mb(block)}, statistics {_mb(statistics)}, activations {_mb(kept)}{spilled}"
    )


def _packed(module: nn.Module, layer: PlannedLayer) -> int:
    """Bytes of the codes of a layer that is on the meta device."""
    return sum(p.numel() for p in module.parameters() if p.is_meta) * layer.spec.weight.bits // 8


def _columns(module: nn.Module) -> int:
    weight = next(iter(module.parameters()))
    return int(getattr(module, "in_features", weight.shape[-1]))


def _tokens(batch: dict[str, Any]) -> int:
    ids = batch.get("input_ids", batch.get("decoder_input_ids"))
    return ids.numel() if isinstance(ids, Tensor) else 0


def _mb(size: int) -> str:
    return f"{size / 2**20:.0f} MB"
