"""Folding scales into the sites of a block: SmoothQuant's formula, AWQ's search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.sites import Site, find_sites, fold_site
from hf_lowbit.calibration.statistics import Magnitude
from hf_lowbit.transforms.fold import gather_repeats, input_weights
from hf_lowbit.transforms.scales import activation_scale, smoothing_scale

Quantize = Callable[[str, Tensor], Tensor]  # key, weight [rows, columns] -> its dequantized values


def block_sites(block: Block, kinds: tuple[str, ...] = ("norm", "linear")) -> list[Site]:
    """The block's sites, found on the first sequence of its data."""
    layers = list(dict.fromkeys(matrix.layer for matrix in block.matrices.values()))
    args, kwargs = first_sequence(block)
    return [site for site in find_sites(block.module, args, kwargs, layers, block.seed) if site.kind in kinds]


def first_sequence(block: Block) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The block's arguments for the first batch, cut to one sequence: tensors that have the batch first."""
    args, kwargs = block.arguments(0)
    flowing = next(
        (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1), None
    )
    size = 1 if flowing is None else flowing.shape[0]

    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == size else value

    return torch.utils._pytree.tree_map(cut, (args, kwargs))  # type: ignore[no-any-return]


def keys_of(block: Block, layer: str) -> list[str]:
    """Keys of the matrices of a layer whose inputs a site scales: of experts, the stacked first projection."""
    return [
        key
        for key, matrix in block.matrices.items()
        if matrix.layer == layer and (matrix.expert is None or matrix.parameter == "gate_up_proj")
    ]


def input_magnitude(block: Block, site: Site, magnitudes: dict[str, Magnitude]) -> Magnitude | None:
    """The statistic of what a site's consumers read; None where no matrix of theirs has one.

    Experts read parts of the same tensor: the one with the most tokens stands for all [ours].
    """
    found = [magnitudes[key] for layer in site.consumers for key in keys_of(block, layer) if key in magnitudes]
    return max(found, key=lambda magnitude: magnitude.tokens) if found else None


@torch.no_grad()
def smooth(block: Block, alpha: float) -> list[Site]:
    """Fold SmoothQuant's scale into every site after a norm (arXiv 2211.10438, equation 4).

    Returns:
        The sites it was folded into.
    """
    magnitudes = block.magnitudes()
    folded = []
    for site in block_sites(block, ("norm",)):
        magnitude = input_magnitude(block, site, magnitudes)
        if magnitude is None:
            continue
        weight = torch.stack([_column_absmax(block.module.get_submodule(name)) for name in site.consumers]).amax(0)
        scale = smoothing_scale(magnitude.maximum, weight, alpha)
        fold_site(block.module, site, scale)
        folded.append(site)
    return folded


def _column_absmax(module: nn.Module) -> Tensor:
    """Largest |w| of every input column over all of a module's weights, ``[columns]``."""
    largest = []
    for weight, dim in input_weights(module):
        others = [d for d in range(weight.dim()) if d != dim % weight.dim()]
        largest.append(weight.detach().abs().float().amax(others))
    return torch.stack(largest).amax(0)


@torch.no_grad()
def search_scales(block: Block, quantize: Quantize, steps: int = 20, batches: int = 4) -> dict[str, float]:
    """AWQ's search (arXiv 2306.00978, section 3.2): per site the ratio with the least error of the inspected module.

    The inspected module is the smallest one that holds all consumers: the attention for its projections, the MLP for
    gate and up, a layer alone otherwise, as in the authors' code. Ratio 0, no scaling, is among the candidates. The
    scales are folded one site after the other. Inputs come from the quantized part of the model [ours; the authors'
    code takes the float model's].

    Args:
        quantize: what the codes will be; its error is what is searched.
        steps: ratios n / steps for n below it.
        batches: of the data, that errors are measured on.

    Returns:
        Name of the module before each site -> the chosen ratio.
    """
    magnitudes = block.magnitudes()
    chosen = {}
    for site in block_sites(block):
        magnitude = input_magnitude(block, site, magnitudes)
        if magnitude is None or site.previous is None:
            continue
        mean = gather_repeats(magnitude.mean, site.repeat, site.head_dim).mean(0)
        scales = {n / steps: activation_scale(mean, n / steps) for n in range(steps)}
        errors = _errors(block, site, scales, quantize, min(batches, len(block)))
        best = min(errors, key=lambda ratio: errors[ratio])
        fold_site(block.module, site, scales[best])
        chosen[site.previous] = best
    return chosen


def _errors(
    block: Block, site: Site, scales: dict[float, Tensor], quantize: Quantize, batches: int
) -> dict[float, float]:
    """Squared output error of the inspected module for every ratio."""
    from hf_lowbit.transforms.fold import expand_scale

    module = block.module.get_submodule(_common_owner(site.consumers))
    calls = _calls(block, module, batches)
    targets = [block_output(module(*args, **kwargs)) for args, kwargs in calls]
    layers = [block.module.get_submodule(name) for name in site.consumers]
    keys = [keys_of(block, name) for name in site.consumers]
    weights = [[(weight, dim, weight.detach().clone()) for weight, dim in input_weights(layer)] for layer in layers]
    errors = {}
    for ratio, scale in scales.items():
        factor = expand_scale(scale, site.repeat, site.head_dim)
        for names, parts in zip(keys, weights, strict=True):
            if names:  # routers and other consumers stay float: scaled there and back, they are what they were
                _simulate(block, names, parts, factor, quantize)
        errors[ratio] = sum(
            float((block_output(module(*args, **kwargs)) - target).square().sum())
            for (args, kwargs), target in zip(calls, targets, strict=True)
        )
        for parts in weights:
            for weight, _, original in parts:
                weight.data.copy_(original)
    return errors


def _simulate(
    block: Block, keys: list[str], parts: list[tuple[nn.Parameter, int, Tensor]], factor: Tensor, quantize: Quantize
) -> None:
    """Put Q(W diag(s)) diag(1/s) in the place of W."""
    for weight, dim, original in parts:
        shape = [1] * weight.dim()
        shape[dim] = -1
        weight.data.copy_(original * factor.reshape(shape))
    for key in keys:
        matrix = block.matrices[key].weight
        matrix.copy_(quantize(key, matrix))
    for weight, dim, _ in parts:
        shape = [1] * weight.dim()
        shape[dim] = -1
        weight.data.div_(factor.reshape(shape))


def _calls(block: Block, module: nn.Module, batches: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of a module in the block's first batches."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        for batch in range(batches):
            block.run(batch)
    finally:
        handle.remove()
    return calls


def block_output(value: Any) -> Tensor:
    """The first floating tensor of what a module returned."""
    leaves = torch.utils._pytree.tree_leaves(value)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _common_owner(names: tuple[str, ...]) -> str:
    """The deepest module that holds all of them; one name is its own."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
