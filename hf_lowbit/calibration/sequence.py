"""The order in which a block's layers are called."""

from __future__ import annotations

import torch

from hf_lowbit.calibration.block import Block


@torch.no_grad()
def call_groups(block: Block) -> list[list[str]]:
    """Keys of the block's matrices, those that read the same tensor together, in the order of their calls.

    Layers that the first batch does not reach come last, in a group of their own.
    """
    order: list[tuple[object, list[str]]] = []
    layers: dict[str, list[str]] = {}
    for key, matrix in block.matrices.items():
        layers.setdefault(matrix.layer, []).append(key)

    def hook(layer: str, args: tuple[object, ...]) -> None:
        x = args[0] if args else None
        for tensor, keys in order:
            if tensor is x and x is not None:
                keys += layers[layer]
                return
        order.append((x, list(layers[layer])))

    handles = [
        block.module.get_submodule(layer).register_forward_pre_hook(lambda m, args, layer=layer: hook(layer, args))
        for layer in layers
    ]
    try:
        block.run(0)
    finally:
        for handle in handles:
            handle.remove()
    groups = [keys for _, keys in order]
    reached = {key for keys in groups for key in keys}
    rest = [key for key in block.matrices if key not in reached]
    return [*groups, rest] if rest else groups
