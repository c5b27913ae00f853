"""Where a model's blocks are: its outermost lists of modules that hold planned layers, in the order they are called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Stack:
    """Modules that run one after the other, each on the output of the one before.

    Attributes:
        blocks: their names in the model. A single layer outside every list is a stack of one block: itself.
    """

    blocks: tuple[str, ...]

    @property
    def is_single_layer(self) -> bool:
        """True for one block; nothing flows from a block to the next."""
        return len(self.blocks) == 1


def find_stacks(model: nn.Module, planned: Collection[str], within: str = "") -> list[Stack]:
    """The outermost ModuleLists (and Sequentials) with at least two children, all holding planned layers.

    Args:
        planned: names of the layers to be quantized.
        within: a module's name, to look below it alone.

    Returns:
        Stacks in the order of definition; planned layers outside them are not in any.
    """
    stacks: list[Stack] = []
    for name, module in model.get_submodule(within).named_modules(prefix=within):
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        if any(name.startswith(f"{block}.") for stack in stacks for block in stack.blocks):
            continue  # inside a block
        blocks = tuple(f"{name}.{child}" if name else child for child, _ in module.named_children())
        if all(layers_of(block, planned) for block in blocks):
            stacks.append(Stack(blocks))
    return stacks


def inner_blocks(model: nn.Module, planned: Collection[str]) -> dict[str, str]:
    """Planned layer -> the innermost block around it, as a residual block or a transformer block within a U-Net's.

    A block is a member of a ModuleList, of any length, whose members all hold planned layers and are none themselves;
    it holds at least two, and no block of another layer.
    """
    members = {
        f"{name}.{child}": [f"{name}.{other}" for other, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for child, _ in module.named_children()
    }
    held = {member: layers_of(member, planned) for member in members}
    usable = {
        member: held[member]
        for member, others in members.items()
        if len(held[member]) > 1 and all(held[other] and other not in planned for other in others)
    }
    innermost = [m for m in usable if not any(other.startswith(f"{m}.") for other in usable)]
    return {layer: member for member in innermost for layer in usable[member]}


def layers_of(block: str, planned: Collection[str]) -> list[str]:
    """The planned layers within a block, the block itself included."""
    return [name for name in planned if name == block or name.startswith(f"{block}.")]


def loose_layers(stacks: list[Stack], planned: Collection[str]) -> list[str]:
    """Planned layers that are in no stack."""
    inside = {layer for stack in stacks for block in stack.blocks for layer in layers_of(block, planned)}
    return [name for name in planned if name not in inside]
