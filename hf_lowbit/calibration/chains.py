"""How blocks hang together: one real forward shows which are called, and what flows from block to block.

No class per model: which tensor of a block's arguments is the output of the block before is seen, as it is the same
object.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten


class NotAChain(Exception):
    """Blocks that do not run one after the other on each other's outputs."""


@dataclass(frozen=True)
class Flow:
    """What a block hands to the next.

    Attributes:
        outgoing: index of the tensor among a block's flattened outputs.
        incoming: index of the same tensor among the next block's flattened arguments.
        leaves: the block's other outputs as they were in one real forward, for the shape of what it returns.
        spec: structure of its outputs.
    """

    outgoing: int
    incoming: int
    leaves: tuple[Any, ...]
    spec: TreeSpec


@dataclass
class Seen:
    """What one forward shows of a module.

    Attributes:
        arguments: of its first call, flattened; empty of a module that is only counted.
        outputs: what that returned, flattened.
        spec: the structure of what it returned.
        calls: how often it was called.
    """

    arguments: list[Any]
    outputs: list[Any]
    spec: TreeSpec | None = None
    calls: int = 1


@torch.no_grad()
def probe(
    model: nn.Module, batch: dict[str, Any], names: Sequence[str], recorded: Collection[str] | None = None
) -> dict[str, Seen]:
    """One real forward: what it shows of the modules that it calls, in the order of their first calls.

    ``recorded``: those of which tensors are kept; of the others calls are counted. None for all.
    """
    seen: dict[str, Seen] = {}

    def before(name: str, args: Any, kwargs: Any) -> None:
        if name in seen:
            seen[name].calls += 1
        else:
            kept = recorded is None or name in recorded
            seen[name] = Seen(tree_flatten((args, kwargs))[0] if kept else [], [])

    def after(name: str, output: Any) -> None:
        if seen[name].spec is None and (recorded is None or name in recorded):
            seen[name].outputs, seen[name].spec = tree_flatten(output)

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda m, args, output, name=name: after(name, output)))
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def chain(blocks: Sequence[str], seen: Mapping[str, Seen]) -> tuple[list[int | None], list[Flow]]:
    """How a stack's blocks hang together: the flowing argument of each, and the flows between them.

    Raises:
        NotAChain: a block was not called, or is not fed by the one before.
    """
    missing = [block for block in blocks if block not in seen]
    if missing:
        raise NotAChain(f"{missing[0]} is not called")
    flows: list[Flow] = []
    incoming: list[int | None] = []
    for block, following in pairwise(blocks):
        outputs, arguments, spec = seen[block].outputs, seen[following].arguments, seen[block].spec
        pairs = [
            (i, j)
            for i, output in enumerate(outputs)
            for j, argument in enumerate(arguments)
            if isinstance(output, Tensor) and output is argument
        ]
        if len(pairs) != 1 or spec is None:
            raise NotAChain(f"{following} does not run on the output of {block}")
        leaves = tuple(None if index == pairs[0][0] else leaf for index, leaf in enumerate(outputs))
        flows.append(Flow(*pairs[0], leaves, spec))
        incoming.append(pairs[0][1])
    return [incoming[0], *incoming], flows
