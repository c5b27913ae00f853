"""Reordering the heads and channels of a block's Mamba-2 mixers, exactly, before anything is rounded (Quamba2).

Quamba2 (arXiv 2503.22879, section 4.2). Every parameter that has a place for a head or a channel is permuted, so that
nothing is permuted at inference and no permutation is stored. The mixer must return what it did before, on calibration
data [ours].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.inspected import captured_calls, first_output
from hf_lowbit.calibration.parallel import agree, combine
from hf_lowbit.nn import PackedMixer
from hf_lowbit.plan import replace_module
from hf_lowbit.transforms.reorder import Partition, ReorderError, Reordering, sort_and_cluster

STATISTICS = ("mean_then_max", "max")
_TOLERANCE = 1e-4  # of a mixer's output in float32, relative


@torch.no_grad()
def reorder_mixer(
    block: Block,
    name: str,
    skeleton: PackedMixer,
    clusters: tuple[int, int],
    statistic: str = "mean_then_max",
    partition: Partition | None = None,
) -> Reordering:
    """Sort and cluster the heads and channels of a mixer in place, by the magnitudes of its x on the block's data.

    Args:
        block: whose layers are all float.
        name: of the mixer in the block.
        skeleton: the packed mixer that will take its place, unpacked: it shares the mixer's parameters.
        clusters: m of heads in each state group, c of channels in each of these.
        statistic: "mean_then_max": the largest over samples of the mean of |x| over tokens, as in the authors' code;
            "max": the largest |x|, as in the paper.
        partition: see :func:`hf_lowbit.transforms.reorder.sort_and_cluster`.

    Raises:
        ReorderError: clusters that do not fit, x that is not finite, a mixer that cannot be reordered, or one that
            returns something else afterwards (which is a mistake here or in the mixer's code).
    """
    mixer, geometry = block.module.get_submodule(name), skeleton.geometry
    magnitude = channel_magnitudes(block, name, skeleton, statistic).view(geometry.heads, geometry.head_dim)
    try:
        order = sort_and_cluster(magnitude.cpu(), geometry.groups, *clusters, partition)
        calls = captured_calls(block, mixer, 1)
        before = [first_output(mixer(*args, **kwargs)) for args, kwargs in calls]
        permute_mixer(mixer, order)
        after = [first_output(mixer(*args, **kwargs)) for args, kwargs in calls]
    except ReorderError as problem:
        raise ReorderError(f"{block.full_name(name)}: {problem}") from None
    error = max(float((new - old).norm() / old.norm().clamp(min=1e-30)) for new, old in zip(after, before, strict=True))
    if not error <= _TOLERANCE:
        raise ReorderError(f"{block.full_name(name)}: the reordered mixer's output differs by {error:.2g}")
    return order


def channel_magnitudes(block: Block, name: str, skeleton: PackedMixer, statistic: str) -> Tensor:
    """The magnitude of every channel of x, after convolution and SiLU, float32 ``[H * P]``.

    See :func:`reorder_mixer`; the mixer computes in floats.
    """
    mixer, found = block.module.get_submodule(name), _Peaks(statistic)
    skeleton.listener = lambda site, x: found.update(x) if site == "x" else None
    _put(block, name, skeleton)
    try:
        for batch in range(len(block)):
            block.run(batch)
    finally:
        skeleton.listener = None
        _put(block, name, mixer)
    assert found.peaks is not None
    combine([found])
    agree(found.peaks)
    return found.peaks


def _put(block: Block, name: str, module: nn.Module) -> None:
    """Put a module in a layer's place; the layer may be the whole block."""
    if name:
        replace_module(block.module, name, module)
    else:
        block.module = module


class _Peaks:
    """The largest over samples, or over tokens, a statistic of x ``[samples, tokens, channels]``."""

    def __init__(self, statistic: str) -> None:
        if statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, not {statistic!r}")
        self.tokens = 0
        self.peaks: Tensor | None = None
        self._averages = statistic == "mean_then_max"

    def update(self, x: Tensor) -> None:
        self.tokens += x.shape[0] * x.shape[1]
        magnitude = x.detach().float().abs()
        peaks = (magnitude.mean(1) if self._averages else magnitude.amax(1)).amax(0)
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)

    def summed(self) -> list[Tensor]:
        return []

    def largest(self) -> list[Tensor]:
        return [] if self.peaks is None else [self.peaks]


def permute_mixer(mixer: nn.Module, order: Reordering) -> None:
    """Permute a float mixer of transformers, of the second generation, in place: parameters get new data.

    Rows of in_proj, channels of the convolution, A_log, D and dt_bias, the gated norm's weight, columns of out_proj.

    Raises:
        ReorderError: a multiplier of in_proj's outputs that a reloaded model would have in another order, or parameters
            of other sizes.
    """
    width, heads = len(order.channels), len(order.heads)
    states = mixer.get_submodule("conv1d").get_parameter("weight").shape[0] - width
    rows, channels = order.projection(states), order.convolution(states)
    multiplier = dict(mixer.named_buffers(recurse=False)).get("mup_vector")
    if multiplier is not None and not torch.equal(multiplier[..., rows.to(multiplier.device)], multiplier):
        raise ReorderError("its mup_vector differs between channels that would change places")
    sizes = {heads: order.heads, width: order.channels}  # some models have a D for every channel
    plan = [("in_proj.weight", 0, rows), ("in_proj.bias", 0, rows)]
    plan += [("conv1d.weight", 0, channels), ("conv1d.bias", 0, channels)]
    plan += [("norm.weight", 0, order.channels), ("out_proj.weight", 1, order.channels)]
    parameters = dict(mixer.named_parameters())
    plan += [(key, 0, sizes.get(len(parameters[key]), order.heads)) for key in ("A_log", "D", "dt_bias")]
    found = [(key, parameters[key], dim, index) for key, dim, index in plan if key in parameters]
    for key, parameter, dim, index in found:
        if not parameter.is_floating_point() or parameter.shape[dim] != len(index):
            raise ReorderError(f"{key} is {list(parameter.shape)} {parameter.dtype}, not {len(index)} floats")
    for _, parameter, dim, index in found:
        parameter.data = parameter.data.index_select(dim, index.to(parameter.device))
