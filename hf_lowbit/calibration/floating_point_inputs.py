"""Floating-point grids of static inputs: the split of exponent and mantissa and the clipping value, searched together.

The search is that of weights (:mod:`hf_lowbit.rounding.floating_point`), on the errors summed over all calibration data
and timesteps (Chen et al., arXiv 2408.06995, search "activations accumulated over several timesteps"; their candidates
are [U]). A layer has one split; each of its timesteps and groups has a clipping value of its own.
[ours] where the paper is silent:
 - formats without a sign are candidates where next to no input is negative;
 - with ``shift``, so are grids around a stored centre: without a sign from the smallest input on, as MSFP (arXiv
   2505.21591) has them for SiLU, or with one around the median. Inputs that no such grid serves better have no shift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec, get_format
from hf_lowbit.formats.floating_point import SPLITS, floating_point, unsigned_splits
from hf_lowbit.rounding.floating_point import CLIPS
from hf_lowbit.rounding.sorted_values import SortedValues

if TYPE_CHECKING:
    from hf_lowbit.calibration.static_inputs import InputHistogram

_FEW_NEGATIVE = 1e-4  # share of inputs
_WORTH_A_SHIFT = 0.95  # of the error without: zero is exact there, and nothing is left to add


class _Found(NamedTuple):
    """The best clipping values of one format: error in all, a float64 scalar; scale and shift ``[n]``."""

    error: Tensor
    name: str
    scale: Tensor
    shift: Tensor | None


def search_split(histogram: InputHistogram, spec: ActivationSpec) -> tuple[ActivationSpec, Tensor, Tensor | None]:
    """Floating-point format and clipping values that lose least: a :class:`hf_lowbit.calibration.fitting.FitInputs`.

    Args:
        histogram: of the inputs, per timestep and group as ``spec`` asks.
        spec: static; format "fp", or one whose split is given and stays. ``shift`` allows one.
    """
    shape, counts = histogram.counts.shape[:-1], histogram.counts.reshape(-1, len(histogram.values))
    occurring = counts.sum(0) > 0
    best = _search(histogram.values[occurring].float(), counts[:, occurring], spec)
    chosen = replace(spec, format=best.name, shift=best.shift is not None)
    idle = (best.scale == 0) & (best.scale > 0).any()  # a group of zeros beside others
    scale = torch.where(idle, torch.ones_like(best.scale), best.scale)
    return chosen, scale.reshape(shape), None if best.shift is None else best.shift.reshape(shape)


def _search(values: Tensor, counts: Tensor, spec: ActivationSpec) -> _Found:
    """Of n distributions: how often, ``[n, bins]``, each of the ascending values ``[bins]`` occurs."""
    if not len(values):
        nothing = torch.zeros(len(counts), device=counts.device)
        return _Found(nothing.sum(), SPLITS[spec.bits][0] if spec.is_open else spec.format, nothing, None)
    ascending = SortedValues.of(values, counts)
    clips = torch.tensor(CLIPS, dtype=torch.float32, device=values.device)
    best: _Found | None = None  # those without a shift come first
    for name, shift in _candidates(values, counts, spec):
        number_format = get_format(name, spec.bits)
        reach = _reach(values, counts, shift, signed=number_format.table.min().item() < 0)
        scale = reach.unsqueeze(1) * clips / number_format.max_value
        shifts = None if shift is None else shift.unsqueeze(1).expand_as(scale)
        errors, index = ascending.errors(number_format.table.unique().to(values.device), scale, shifts).min(1)
        bar = 1.0 if best is None or (shift is None) == (best.shift is None) else _WORTH_A_SHIFT
        if best is None or errors.sum() < bar * best.error:
            best = _Found(errors.sum(), name, scale.gather(1, index.unsqueeze(1)).squeeze(1), shift)
    assert best is not None
    return best


def _candidates(values: Tensor, counts: Tensor, spec: ActivationSpec) -> Iterator[tuple[str, Tensor | None]]:
    """Formats, and centres ``[n]`` of those that have one."""
    given = None if spec.is_open else floating_point(spec.format)
    signed, unsigned = SPLITS[spec.bits], unsigned_splits(spec.bits)
    if given is not None:
        signed, unsigned = ((spec.format,), ()) if given.signed else ((), (spec.format,))
    negative = counts[:, values < 0].sum() / counts.sum()
    for name in signed:
        yield name, None
    for name in unsigned if negative <= _FEW_NEGATIVE or not signed else ():
        yield name, None
    if spec.shift:
        smallest = _value_at(values, counts, 0.0)
        for name in unsigned if bool((smallest < 0).any()) else ():
            yield name, smallest
        median = _value_at(values, counts, 0.5)
        for name in signed:
            yield name, median


def _value_at(values: Tensor, counts: Tensor, share: float) -> Tensor:
    """The value ``[n]`` below which a share of each distribution lies."""
    up_to = counts.double().cumsum(1)
    index = torch.searchsorted(up_to, (up_to[:, -1:] * share).clamp(min=1)).clamp(max=len(values) - 1)
    return values[index.squeeze(1)]


def _reach(values: Tensor, counts: Tensor, shift: Tensor | None, signed: bool) -> Tensor:
    """Largest magnitude ``[n]``, from the centre on, of what occurs; without ``signed`` above it alone."""
    centred = values.unsqueeze(0) if shift is None else values - shift.unsqueeze(1)
    distance = centred.abs() if signed else centred.clamp(min=0)
    return (distance * (counts > 0)).amax(1)
