"""Number formats, granularity and packing: pure functions on tensors, no modules and no models."""

from hf_lowbit.formats.activation import ActivationSpec
from hf_lowbit.formats.number_format import NumberFormat, format_names, get_format
from hf_lowbit.formats.packed import PackedTensor, decode, decode_rows
from hf_lowbit.formats.packing import pack_codes, unpack_codes
from hf_lowbit.formats.spec import SpecError, WeightSpec

__all__ = [
    "ActivationSpec",
    "NumberFormat",
    "PackedTensor",
    "SpecError",
    "WeightSpec",
    "decode",
    "decode_rows",
    "format_names",
    "get_format",
    "pack_codes",
    "unpack_codes",
]
