"""Floating-point grids for weights: the split of exponent and mantissa and the clipping value, searched together.

Chen et al. (arXiv 2408.06995) choose both per tensor by the squared error; they published no code, and the search is
that of Kuzmin et al. (arXiv 2208.09225), whose grid of clipping values theirs may differ from [U]. Every code is finite
(:mod:`hf_lowbit.formats.floating_point`), and the clipping value is the scale times the format's largest value, so that
no exponent bias is stored. [ours] where the papers are silent:
 - errors are exact sums over all weights, on scales as they are stored;
 - with one scale per row or group each takes its own best clipping value and votes for the split; ties of votes, and of
   errors, go to the split with the most mantissa bits, at 4 bits E1M2, the symmetric integers;
 - of short rows and groups every fifth clipping value is tried first, then those around the best;
 - a stack of experts has one split, as a layer has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.formats.floating_point import SPLITS, FloatingPoint, floating_point
from hf_lowbit.formats.packed import from_bits, to_bits
from hf_lowbit.rounding.grid import Grid, RoundingError, nonzero
from hf_lowbit.rounding.sorted_values import SortedValues
from hf_lowbit.rounding.store import round_to_grid, stack

CLIPS = tuple(0.1 + 1.1 * step / 110 for step in range(111))  # of the largest magnitude: linspace(0.1, 1.2, 111)
_COARSE = 5
_CHUNK_ELEMENTS = 1 << 22
_CACHED_ELEMENTS = 1 << 17  # of a chunk that is rounded over and over
_WEIGHTS_PER_LEVEL = 30  # with fewer, rounding all weights takes less time than looking every level's boundary up


def round_floating_point(weight: Tensor, spec: WeightSpec, clips: Sequence[float] = CLIPS) -> PackedTensor:
    """Round to the nearest values of floating-point grids with searched clipping values, and split where that is open.

    Args:
        weight: float ``[rows, columns]``, or ``[experts, rows, columns]``.
        spec: symmetric, format "fp" or "fp_eXmY"; any granularity.
        clips: clipping values to try, as shares of the largest magnitude of each group.

    Returns:
        A packed tensor whose spec names the split.

    Raises:
        RoundingError: another format or a zero point, NaN or infinite weights, or scales that ``spec.scale_dtype``
            cannot hold.
    """
    split, grid = search_grid(weight, spec, clips)
    complete = replace(spec, format=split)
    if weight.dim() == 2:
        return round_to_grid(weight, grid, complete, complete.number_format)
    parts = zip(weight, *(tensor.chunk(len(weight)) for tensor in grid), strict=True)
    return stack([round_to_grid(part, Grid(s, z), complete, complete.number_format) for part, s, z in parts])


def search_grid(weight: Tensor, spec: WeightSpec, clips: Sequence[float] = CLIPS) -> tuple[str, Grid]:
    """The split, and the scales of the best clipping values ``[n, groups]``, n being rows, those of all experts, or 1.

    Arguments and errors: :func:`round_floating_point`. "tensor" is a scale for each expert.
    """
    if not spec.symmetric or not spec.format.startswith("fp"):
        raise RoundingError(f"a split of exponent and mantissa is searched for symmetric formats 'fp', not {spec.json}")
    if not bool(torch.isfinite(weight).all()):
        raise RoundingError("the weight holds NaN or infinite values")
    names = SPLITS[spec.bits] if spec.is_open else (spec.format,)
    columns = weight.shape[-1]
    per_tensor = spec.group_size == "tensor"
    grouped = weight.reshape(1 if weight.dim() == 2 else len(weight), -1) if per_tensor else weight.reshape(-1, columns)
    groups = spec.groups(columns)
    sets = grouped.reshape(len(grouped) * groups, -1)
    step = max(1, _CHUNK_ELEMENTS // sets.shape[1])
    found = [_best_clips(chunk, spec, names, clips) for chunk in sets.split(step)]
    errors, scales = torch.cat([error for error, _ in found], 1), torch.cat([scale for _, scale in found], 1)
    winner = _elected(errors)
    scale = scales[winner].reshape(-1, groups)
    if bool(((scale == 0) & (sets.abs().amax(-1).reshape(scale.shape) > 0)).any()):
        raise RoundingError(f"scales do not fit scale_dtype={spec.scale_dtype!r}; use 'bfloat16' or 'float32'")
    return names[winner], Grid(scale, torch.zeros_like(scale))


def _best_clips(sets: Tensor, spec: WeightSpec, names: Sequence[str], clips: Sequence[float]) -> tuple[Tensor, Tensor]:
    """For each split (first dimension) and each set of weights ``[n, m]``: least error, and the scale that has it."""
    magnitudes = sets.float().abs()
    high = magnitudes.amax(-1, keepdim=True) * torch.tensor(clips, dtype=torch.float32, device=sets.device)
    by_levels = sets.shape[1] > _WEIGHTS_PER_LEVEL * 2 ** (spec.bits - 1)
    ascending = SortedValues.of(magnitudes) if by_levels else None
    found = []
    for name in names:
        complete = replace(spec, format=name)
        scale = _as_stored(high / complete.number_format.max_value, spec.scale_dtype)
        if ascending is not None:
            table = complete.number_format.table
            errors = ascending.errors(table[table >= 0].unique().to(sets.device), scale)
        else:
            split = floating_point(name)
            assert split is not None
            errors, scale = _near_the_best(magnitudes, split, scale)
        least, index = errors.min(-1)
        found.append((least, scale.gather(1, index.unsqueeze(1)).squeeze(1)))
    return torch.stack([error for error, _ in found]), torch.stack([scale for _, scale in found])


def _as_stored(scale: Tensor, dtype: str) -> Tensor:
    """Scales as they will be read back; 0, which serves no weight but zero, where storage cannot hold them."""
    return from_bits(to_bits(scale, dtype), dtype).nan_to_num_(0.0, 0.0, 0.0)


def _near_the_best(sets: Tensor, split: FloatingPoint, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of every fifth scale, of those between the neighbours of the best of these, and the scales, ``[n, k]``."""
    coarse = torch.arange(0, scale.shape[1], _COARSE, device=scale.device)
    first = scale[:, coarse]
    errors = _rounded_errors(sets, split, first)
    around = torch.arange(1 - _COARSE, _COARSE, device=scale.device)
    near = (coarse[errors.argmin(1)].unsqueeze(1) + around[around != 0]).clamp(0, scale.shape[1] - 1)
    second = scale.gather(1, near)
    return torch.cat([errors, _rounded_errors(sets, split, second)], 1), torch.cat([first, second], 1)


def _rounded_errors(sets: Tensor, split: FloatingPoint, scale: Tensor) -> Tensor:
    """Sum of squared errors, float64 ``[n, k]``, of sets ``[n, m]`` on grids of scales ``[n, k]``."""
    step = max(1, _CACHED_ELEMENTS // sets.shape[1])
    parts = []
    for x, own in zip(sets.split(step), scale.split(step), strict=True):
        each = own.unsqueeze(-1).unbind(1)
        parts.append(torch.stack([_difference(x, split, s).square_().sum(-1) for s in each], 1).double())
    return torch.cat(parts)


def _difference(x: Tensor, split: FloatingPoint, scale: Tensor) -> Tensor:
    return split.round(x / nonzero(scale)).mul_(scale).sub_(x)


def _elected(errors: Tensor) -> int:
    """Which of the splits ``[splits, n]`` most of the n sets lose least with; of equal numbers the smaller error."""
    own = errors.argmin(0)  # the first of equal ones
    votes = torch.bincount(own[errors.amax(0) > 0], minlength=len(errors))  # a set of zeros has no opinion
    totals = errors.sum(1)
    return max(range(len(errors)), key=lambda split: (int(votes[split]), -float(totals[split]), -split))
