"""Folding scales into the sites of a block: SmoothQuant's formula, AWQ's search.

Scales that divide a norm are moved, by up to 0.4 % as a rule, to where the divided weight is a bfloat16 number: it is
stored in the model's own type, and rounding it after the codes are chosen would change every token, most where the
norm adds one to it [ours].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.inspected import OutputError, Quantize, captured_calls, common_owner, simulated
from hf_lowbit.calibration.parallel import combine, processes
from hf_lowbit.calibration.sites import Site, find_sites, fold_site
from hf_lowbit.calibration.statistics import Magnitude
from hf_lowbit.transforms.fold import expand_scale, gather_repeats, input_weights
from hf_lowbit.transforms.scales import activation_scale, smoothing_scale


@torch.no_grad()
def smooth(block: Block, alpha: float) -> list[Site]:
    """Fold SmoothQuant's scale into every site after a norm (arXiv 2211.10438, equation 4).

    Consumers that stay float, such as routers, are multiplied too, but their weights do not count [ours].

    Returns:
        The sites it was folded into.

    Raises:
        ValueError: the block returns NaN or infinite values.
    """
    magnitudes = block.magnitudes()
    folded = []
    for site in block_sites(block, ("norm",)):
        magnitude = input_magnitude(block, site, magnitudes)
        if magnitude is None:
            continue
        scale = balancing_scale(block, site, magnitude, alpha)
        fold_site(block.module, site, storable_scale(block.module, site, scale))
        folded.append(site)
    return folded


@torch.no_grad()
def balancing_scale(block: Block, site: Site, magnitude: Magnitude, alpha: float) -> Tensor:
    """SmoothQuant's scale for a site (arXiv 2211.10438, equation 4), float32 ``[site.channels]``.

    Of a head that several others read the largest values over all of them count.
    """
    quantized = [block.module.get_submodule(name) for name in site.consumers if keys_of(block, name)]
    weight = torch.stack([_column_absmax(module) for module in quantized]).amax(0)
    inputs, weights = (gather_repeats(x, site.repeat, site.head_dim).amax(0) for x in (magnitude.maximum, weight))
    return smoothing_scale(inputs, weights, alpha)


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
        batches: of the data (of each process), that errors are measured on.

    Returns:
        Name of the module before each site -> the chosen ratio.

    Raises:
        ValueError: the block returns NaN or infinite values.
    """
    magnitudes = block.magnitudes()
    chosen: dict[str, float] = {}
    for site in block_sites(block):
        magnitude = input_magnitude(block, site, magnitudes)
        if magnitude is None or site.previous is None:
            continue
        mean = gather_repeats(magnitude.mean, site.repeat, site.head_dim).mean(0)
        scales = {
            n / steps: storable_scale(block.module, site, activation_scale(mean, n / steps)) for n in range(steps)
        }
        scales[0.0] = torch.ones_like(mean)
        errors = _errors(block, site, list(scales.values()), quantize, min(batches, len(block)))
        best = list(scales)[int(errors.argmin())]  # the first of equals: no scaling before some
        if best:
            fold_site(block.module, site, scales[best])
        chosen[site.previous] = best
    return chosen


def block_sites(block: Block, kinds: tuple[str, ...] = ("norm", "linear")) -> list[Site]:
    """The block's sites, found on the first sequence of its data (of the first process).

    A layer whose input two of them would scale is left to the first: statistics are taken before anything is folded.
    """
    layers = list(dict.fromkeys(matrix.layer for matrix in block.matrices.values()))
    args, kwargs = first_sequence(block)
    try:
        found = [find_sites(block.module, args, kwargs, layers, block.seed)]
    except ValueError as error:
        raise ValueError(f"{block.name}: {error}") from None
    if processes() > 1:  # experts that lie idle in one process' data need not in another's
        dist.broadcast_object_list(found, 0)
    sites, scaled = [], set[str]()
    for site in found[0]:
        if site.kind in kinds and scaled.isdisjoint(site.consumers):
            sites.append(site)
            scaled.update(site.consumers)
    return sites


def first_sequence(block: Block) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The block's arguments for the first batch, cut to one sequence: tensors that have the batch first.

    Whole where a batch has as many sequences as tokens, and nothing tells which is which.
    """
    args, kwargs = block.arguments(0)
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1]
    if not tensors or tensors[0].shape[0] in tensors[0].shape[1:-1]:
        return args, kwargs
    size = tensors[0].shape[0]

    def cut(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.dim() and value.shape[0] == size else value

    return tree_map(cut, (args, kwargs))


def keys_of(block: Block, layer: str) -> list[str]:
    """Keys of the matrices of a layer whose inputs a site scales: of experts, the stacked first projection."""
    return [
        key
        for key, matrix in block.matrices.items()
        if matrix.layer == layer and (matrix.expert is None or matrix.parameter == "gate_up_proj")
    ]


def input_magnitude(block: Block, site: Site, magnitudes: dict[str, Magnitude]) -> Magnitude | None:
    """The statistic of what a site's consumers read; None where no token reaches a matrix of theirs.

    Experts read parts of the same tensor: together, all of it.
    """
    keys = [key for layer in site.consumers for key in keys_of(block, layer)]
    found = list({id(magnitudes[key]): magnitudes[key] for key in keys if key in magnitudes}.values())
    if not any(magnitude.tokens for magnitude in found):
        return None
    whole = Magnitude(len(found[0].maximum), found[0].maximum.device)
    for part in found:
        whole.tokens += part.tokens
        for total, more in zip(whole.summed(), part.summed(), strict=True):
            total += more
        for largest, other in zip(whole.largest(), part.largest(), strict=True):
            largest.copy_(torch.maximum(largest, other))
    return whole


def storable_scale(block: nn.Module, site: Site, scale: Tensor) -> Tensor:
    """The scale nearby, float64, that leaves a norm's divided weight a bfloat16 number, and float16 in its range.

    1 for channels that have none. Sites after linear layers, which are mostly quantized themselves, keep theirs.
    """
    if site.kind != "norm" or site.previous is None:
        return scale
    weight: Tensor = block.get_submodule(site.previous).weight.detach()  # type: ignore[operator]
    one = float(site.offset)
    gain = weight.double() + one
    divided = (gain / scale.double() - one).bfloat16().double() + one
    exact = gain / divided
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, 1.0)


def _column_absmax(module: nn.Module) -> Tensor:
    """Largest |w| of every input column over all of a module's weights, ``[columns]``."""
    moved = [weight.detach().abs().float().movedim(dim, -1) for weight, dim in input_weights(module)]
    return torch.stack([weight.reshape(-1, weight.shape[-1]).amax(0) for weight in moved]).amax(0)


def _errors(block: Block, site: Site, scales: list[Tensor], quantize: Quantize, batches: int) -> Tensor:
    """Squared output error of the inspected module for every scale, float64 ``[scales]``."""
    module = block.module.get_submodule(common_owner(block.module, site.consumers))
    measured = OutputError(module, captured_calls(block, module, batches), len(scales))
    consumers = {layer: keys for layer in site.consumers if (keys := keys_of(block, layer))}
    for index, scale in enumerate(scales):
        with simulated(block, consumers, expand_scale(scale, site.repeat, site.head_dim), quantize):
            measured.measure(index)
    combine([measured])
    return measured.errors
