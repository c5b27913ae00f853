"""Codes to int32 words and back, along the last dimension.

The dense layout is compressed-tensors' (its packer does the work): code i of a row occupies bits [i*b, (i+1)*b) of a
little-endian bit stream, words may split a code, each row is padded to a whole word. Base 3 holds five ternary codes
per byte.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 21  # packers build int32/int64 temporaries: bound them, so that peak memory stays small
_TRITS_PER_BYTE = 5
_TRIT_WEIGHTS = (1, 3, 9, 27, 81)


def packed_columns(columns: int, bits: int, packing: str = "dense") -> int:
    """Number of int32 words that ``columns`` codes of ``bits`` bits occupy."""
    if packing == "base3":
        return math.ceil(math.ceil(columns / _TRITS_PER_BYTE) / 4)
    return math.ceil(columns * bits / 32)


def pack_codes(codes: Tensor, bits: int, packing: str = "dense") -> Tensor:
    """uint8 codes ``[..., columns]`` to int32 words ``[..., packed_columns]``."""
    flat = codes.reshape(-1, codes.shape[-1])
    words = torch.empty(
        flat.shape[0], packed_columns(flat.shape[1], bits, packing), dtype=torch.int32, device=codes.device
    )
    pack = _pack_base3 if packing == "base3" else _pack_dense
    for rows in _row_chunks(flat):
        words[rows] = pack(flat[rows], bits)
    return words.reshape(*codes.shape[:-1], -1)


def unpack_codes(words: Tensor, bits: int, columns: int, packing: str = "dense") -> Tensor:
    """int32 words ``[..., packed_columns]`` to uint8 codes ``[..., columns]``."""
    flat = words.reshape(-1, words.shape[-1])
    codes = torch.empty(flat.shape[0], columns, dtype=torch.uint8, device=words.device)
    unpack = _unpack_base3 if packing == "base3" else _unpack_dense
    for rows in _row_chunks(codes):
        codes[rows] = unpack(flat[rows], bits, columns)
    return codes.reshape(*words.shape[:-1], columns)


def _row_chunks(matrix: Tensor) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, matrix.shape[1]))
    return [slice(start, start + step) for start in range(0, matrix.shape[0], step)]


def _pack_dense(codes: Tensor, bits: int) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)  # its packer adds this offset back
    return pack_to_int32(signed, bits)


def _unpack_dense(words: Tensor, bits: int, columns: int) -> Tensor:
    """Whole bytes where no code crosses one, else shift and mask over the ``bits`` words that hold 32 codes each."""
    if 8 % bits == 0:
        octets = words.contiguous().view(torch.uint8).unsqueeze(-1)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = octets if bits == 8 else (octets >> shifts) & ((1 << bits) - 1)
        return codes.reshape(words.shape[0], -1)[:, :columns]
    rows = words.shape[0]
    blocks = -(-columns // 32)
    padded = torch.nn.functional.pad(words, (0, blocks * bits - words.shape[1])).reshape(rows, blocks, bits)
    start = torch.arange(32, device=words.device) * bits
    word, shift = start // 32, start % 32
    low = torch.bitwise_right_shift(padded[..., word], shift.int()) & _low_bits(32 - shift)
    spill = (shift + bits - 32).clamp(min=0)
    following = padded[..., (word + 1).clamp(max=bits - 1)] & ((1 << spill) - 1).int()
    codes = (low | following << (bits - spill).int()) & ((1 << bits) - 1)
    return codes.reshape(rows, -1)[:, :columns].to(torch.uint8)


def _low_bits(count: Tensor) -> Tensor:
    """int32 masks of ``count`` low bits: an arithmetic right shift copies the sign bit in, which must not stay."""
    mask = (torch.ones_like(count, dtype=torch.int64) << count) - 1
    return torch.where(mask > 2**31 - 1, mask - 2**32, mask).int()


def _pack_base3(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    words = packed_columns(columns, bits, "base3")
    padded = torch.nn.functional.pad(codes, (0, words * 4 * _TRITS_PER_BYTE - columns))
    weights = torch.tensor(_TRIT_WEIGHTS, dtype=torch.uint8, device=codes.device)
    digits = padded.reshape(rows, words * 4, _TRITS_PER_BYTE) * weights  # at most 2 * 121 = 242: fits uint8
    return digits.sum(-1, dtype=torch.uint8).view(torch.int32)


def _unpack_base3(words: Tensor, bits: int, columns: int) -> Tensor:
    digits = words.contiguous().view(torch.uint8).unsqueeze(-1)
    weights = torch.tensor(_TRIT_WEIGHTS, dtype=torch.uint8, device=words.device)
    return (digits // weights % 3).reshape(words.shape[0], -1)[:, :columns]
