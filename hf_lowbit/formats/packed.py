"""PackedTensor: codes and their companions, and how they decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_lowbit.formats.number_format import look_up
from hf_lowbit.formats.packing import unpack_codes
from hf_lowbit.formats.second_level import decode_values, encode_values
from hf_lowbit.formats.spec import SCALE_DTYPES, WeightSpec, bit_pattern_dtype

_CHUNK_ELEMENTS = 1 << 20


@dataclass
class PackedTensor:
    """A quantized matrix (or stack of matrices) as it lies in memory and on disk.

    Attributes:
        weight: int32 ``[..., rows, packed_columns]``.
        scale: ``[..., rows or 1, groups]``, bit patterns of the spec's scale type (int16, or int32 for float32).
        zero_point: None; packed int32 codes for integer grids; bit patterns like ``scale`` for other tables.
        table: None, or int32 ``[2^bits]``, bit patterns of a float32 table fitted to this tensor.
        spec: how to read them.
        columns: inputs per row.
        scale_range, zero_point_range: None; where the spec has ``scale_bits``, ``scale`` and a real ``zero_point`` are
            int32 words of codes, and these their offsets and steps, bit patterns ``[..., row groups, groups, 2]``.
    """

    weight: Tensor
    scale: Tensor
    spec: WeightSpec
    columns: int
    zero_point: Tensor | None = None
    table: Tensor | None = None
    scale_range: Tensor | None = None
    zero_point_range: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Suffix -> tensor, "" for the codes; the suffixes of :meth:`WeightSpec.companions`."""
        stored = {
            "": self.weight,
            "_scale": self.scale,
            "_scale_range": self.scale_range,
            "_zero_point": self.zero_point,
            "_zero_point_range": self.zero_point_range,
            "_table": self.table,
        }
        return {suffix: tensor for suffix, tensor in stored.items() if tensor is not None}

    def __getitem__(self, index: int) -> PackedTensor:
        """One matrix of a stack."""
        parts = (self.zero_point, self.scale_range, self.zero_point_range)
        zero_point, *ranges = (None if part is None else part[index] for part in parts)
        weight, scale = self.weight[index], self.scale[index]
        return PackedTensor(weight, scale, self.spec, self.columns, zero_point, self.table, *ranges)

    def rows(self, index: slice | Tensor) -> PackedTensor:
        """Some rows of a matrix, by slice or by a 1-D index tensor; one scale for the whole tensor stays shared.

        Scales that are codes are decoded: rows that share an offset and a step may not all be among them.
        """

        def select(tensor: Tensor) -> Tensor:  # unlike tensor[index], index_select refuses negative rows
            return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)

        one_scale = self.spec.group_size == "tensor" and self.scale.shape[0] == 1
        scale = self.scale if one_scale else select(self.scale)
        zero_point = self.zero_point if one_scale or self.zero_point is None else select(self.zero_point)
        weight, ranges = select(self.weight), (self.scale_range, self.zero_point_range)
        selected = PackedTensor(weight, scale, self.spec, self.columns, zero_point, self.table, *ranges)
        if self.scale_range is None:
            return selected
        numbers = torch.arange(self.weight.shape[0], device=weight.device)
        return _with_plain_scales(selected, numbers[index] if isinstance(index, slice) else index)


def to_bits(values: Tensor, dtype_name: str) -> Tensor:
    """float32 values rounded to ``dtype_name`` and viewed as integers."""
    dtype = SCALE_DTYPES[dtype_name]
    return values.to(dtype).contiguous().view(bit_pattern_dtype(dtype))


def from_bits(bits: Tensor, dtype_name: str) -> Tensor:
    """Inverse of :func:`to_bits`, as float32."""
    return bits.view(SCALE_DTYPES[dtype_name]).float()


def to_stored(values: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor | None]:
    """float32 scales or real zero points ``[rows or 1, groups]`` as a spec stores them.

    Returns:
        Bit patterns and None; or words of codes, and their offsets and steps.
    """
    if spec.scale_bits is None:
        return to_bits(values, spec.scale_dtype), None
    words, ranges = encode_values(values, spec, SCALE_DTYPES[spec.scale_dtype])
    return words, to_bits(ranges, spec.scale_dtype)


def scales(packed: PackedTensor) -> Tensor:
    """float32 scales ``[..., rows or 1, groups]``."""
    return _real_values(packed, packed.scale, packed.scale_range)


def zero_points(packed: PackedTensor) -> Tensor | None:
    """float32 zero points in table units, shaped like the scales; None for symmetric formats."""
    if packed.zero_point is None:
        return None
    if packed.spec.has_integer_zero_point:
        codes = unpack_codes(packed.zero_point, packed.spec.bits, packed.spec.groups(packed.columns))
        return packed.spec.number_format.decode(codes)
    return _real_values(packed, packed.zero_point, packed.zero_point_range)


def with_plain_scales(packed: PackedTensor) -> PackedTensor:
    """The same values with scales, and real zero points, that are no codes: what kernels read.

    They are float32 bit patterns, new ones; a tensor whose scales are plain is returned as it is.
    """
    return packed if packed.scale_range is None else _with_plain_scales(packed, None)


def _with_plain_scales(packed: PackedTensor, index: Tensor | None) -> PackedTensor:
    """Of all rows, or where ``packed`` holds some of them with the ranges of all, of the rows ``index``."""
    zero_point = packed.zero_point
    if zero_point is not None and packed.spec.has_coded_zero_point:
        zero_point = to_bits(_real_values(packed, zero_point, packed.zero_point_range, index), "float32")
    scale = to_bits(_real_values(packed, packed.scale, packed.scale_range, index), "float32")
    return PackedTensor(packed.weight, scale, packed.spec.first_level, packed.columns, zero_point, packed.table)


def _real_values(packed: PackedTensor, stored: Tensor, ranges: Tensor | None, index: Tensor | None = None) -> Tensor:
    spec = packed.spec
    if ranges is None:
        return from_bits(stored, spec.scale_dtype)
    return decode_values(stored, from_bits(ranges, spec.scale_dtype), spec, spec.groups(packed.columns), index)


def table_of(packed: PackedTensor) -> Tensor:
    """float32 ``[2^bits]``: the stored table, or the format's."""
    if packed.table is not None:
        return packed.table.view(torch.float32)
    return packed.spec.number_format.table.to(packed.weight.device)


def decode(packed: PackedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dequantized matrix ``[..., rows, columns]``: scale * (table[code] - zero_point), in float32, rounded once."""
    packed = with_plain_scales(packed)
    if packed.weight.dim() > 2:
        return torch.stack([decode(packed[index], dtype) for index in range(packed.weight.shape[0])])
    rows = packed.weight.shape[0]
    values = torch.empty(rows, packed.columns, dtype=dtype, device=packed.weight.device)
    step = max(1, _CHUNK_ELEMENTS // packed.columns)
    for start in range(0, rows, step):
        values[start : start + step] = decode_rows(packed, slice(start, start + step))
    return values


def decode_rows(packed: PackedTensor, rows: slice | Tensor) -> Tensor:
    """float32 rows ``[n, columns]`` of a packed matrix, by slice or by a 1-D index tensor."""
    selected = packed.rows(rows)
    spec = selected.spec
    codes = unpack_codes(selected.weight, spec.bits, packed.columns, spec.packing)
    scale, zero_point = scales(selected), zero_points(selected)
    values = look_up(table_of(packed), codes).unflatten(-1, (scale.shape[-1], -1))
    if zero_point is not None:
        values -= zero_point.unsqueeze(-1)
    values *= scale.unsqueeze(-1)
    return values.reshape(codes.shape)
