"""The second level: scales and real zero points that are themselves stored as codes of a few bits.

The values of ``scale_group`` consecutive rows, those of the same columns, share an offset and a step of 16 bits each:
value = offset + code * step (second-order statistics of SpQR, arXiv 2306.03078; QLoRA's double quantization, arXiv
2305.14314, is of the same kind). Where the rows are no multiple of ``scale_group``, the last group is smaller.

The smallest value of a group has code 0 and the largest one the last code [ours: nearest codes on the rounded offset
and step may leave them out]. Therefore what was decoded encodes to the same codes, offset and step again, and a grid is
float32 values to those who fit it and to those who store it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_lowbit.formats.packing import pack_codes, unpack_codes

if TYPE_CHECKING:
    from hf_lowbit.formats.spec import WeightSpec

# Values that lie closer together, relative to the largest, share one: their 16-bit offset is no finer. It also leaves
# float32 enough digits of a range to tell which offset and step it was made from.
_FLAT = 2.0**-10


def encode_values(values: Tensor, spec: WeightSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 ``[rows, groups]`` as codes.

    Args:
        spec: one with ``scale_bits``.
        dtype: of offsets and steps, of 16 bits.

    Returns:
        int32 words ``[rows, packed groups]``, and offset and step, float32 ``[row groups, groups, 2]`` that ``dtype``
        holds exactly; infinite or NaN where it cannot hold them at all.
    """
    rows = values.shape[0]
    row_groups, last = spec.row_groups(rows), 2**spec.scale_bits - 1  # type: ignore[operator]
    padding = values[-1:].expand(row_groups * spec.scale_group - rows, -1)  # the last row again: no range grows
    grouped = torch.cat([values, padding]).float().unflatten(0, (row_groups, spec.scale_group))
    low, high = grouped.amin(1), grouped.amax(1)
    offset, step = (part.to(dtype).float() for part in (low, (high - low) / last))
    end = offset + last * step
    flat = (end - offset) <= _FLAT * torch.maximum(offset.abs(), end.abs())
    offset = torch.where(flat, ((low + high) / 2).to(dtype).float(), offset)
    step = torch.where(flat, 0.0, step)
    span = torch.where(flat, 1.0, high - low).unsqueeze(1)
    codes = ((grouped - low.unsqueeze(1)) / span * last).round().masked_fill(flat.unsqueeze(1), 0)
    words = pack_codes(codes.nan_to_num(0.0).to(torch.uint8).flatten(0, 1)[:rows], spec.scale_bits)  # type: ignore[arg-type]
    return words, torch.stack([offset, step], -1)


def decode_values(words: Tensor, ranges: Tensor, spec: WeightSpec, groups: int, index: Tensor | None = None) -> Tensor:
    """Inverse of :func:`encode_values`, also of a stack.

    Args:
        words: ``[..., rows, packed groups]``.
        ranges: offset and step, float32 ``[..., row groups, groups, 2]``.
        groups: scales per row.
        index: which rows ``words`` holds, int64 ``[n]``; None for all.

    Returns:
        float32 ``[..., rows, groups]``. A code times a step is exact, so that there is one rounding, on any device.
    """
    rows = torch.arange(words.shape[-2], device=words.device) if index is None else index
    codes = unpack_codes(words, spec.scale_bits, groups)  # type: ignore[arg-type]
    offset, step = ranges.index_select(-3, rows // spec.scale_group).unbind(-1)
    return codes * step + offset
