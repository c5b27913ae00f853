"""How codes become operands of the tensor cores: PTX for two units of codes at a time.

A unit is a chunk of 16 bits where these hold whole codes, else (3 and 6 bits) three words, the shortest run that does.

A code is put into the mantissa of a 16-bit float whose unit is one, so that base + code costs one instruction for two
codes; what the base adds to a product is taken away from its float32 sum, not from every weight (compare Kim et al.
2022, arXiv 2211.10017, and Frantar et al. 2024, arXiv 2408.11743, who subtract it there) - but from weights of 4 bits
without zero points, where that was measured to take less time than sums of the inputs. Small floating-point formats
are shifted into place and multiplied by a power of two. Other tables of sixteen values are looked up in registers, by
instructions that pick bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from hf_lowbit.formats import WeightSpec

CHUNK_BITS = 16
_WORD_BITS = 32


def words_of_unit(bits: int) -> int:
    """Three words, or 0 for a chunk of 16 bits."""
    return 0 if CHUNK_BITS % bits == 0 else 3


def codes_of_unit(bits: int) -> int:
    """How many codes lie in it."""
    return (words_of_unit(bits) * _WORD_BITS or CHUNK_BITS) // bits


@dataclass(frozen=True)
class Unpacking:
    """Values of a unit's codes: step * (what is given - base) + start; a table's if nothing is.

    Attributes:
        instructions: PTX; ``$0`` and so on are pairs of floats: the first codes of two units, the second ones, and so
            on. The operands after them are both units: two chunks in one, or the first words, the second, the third.
        step, offset: of the sum of products: step * sum(v x) + offset * sum(x), offset = start - step * base.
    """

    instructions: str | None = None
    step: float = 1.0
    offset: float = 0.0


TABLE = Unpacking()


@lru_cache(maxsize=256)
def unpacking(spec: WeightSpec, dtype: torch.dtype) -> Unpacking:
    """For a number format and inputs of bfloat16 or float16; :data:`TABLE` where there is no arithmetic for it."""
    if spec.has_fitted_table:
        return TABLE
    bits, codes = spec.bits, torch.arange(2**spec.bits, dtype=torch.float32)
    table = spec.number_format.table
    written = codes < 3 if spec.format == "ternary" else torch.ones_like(codes, dtype=torch.bool)
    start, step = float(table[0]), float(table[1] - table[0])
    moves, places = _places(bits)
    if torch.equal((start + step * codes)[written], table[written]):
        base = -128 if dtype == torch.bfloat16 and bits == 8 else 128 if dtype == torch.bfloat16 else 1024
        lines = [_integer(bits, i, source, shift, dtype) for i, (source, shift) in enumerate(places)]
        if bits == 4 and spec.symmetric and step == 1:
            lines += _multiply_add(1.0, start - base, len(places), dtype)
            return Unpacking(_block(moves + lines))
        return Unpacking(_block(moves + lines), step, start - step * base)
    for exponent_bits in range(1, min(bits, 6)):
        if (factor := _factor(table, exponent_bits, dtype)) is not None:
            lines = [
                _minifloat(bits, exponent_bits, factor, i, source, shift, dtype)
                for i, (source, shift) in enumerate(places)
            ]
            return Unpacking(_block(moves + lines))
    return Unpacking(_block([_look_up(table.to(dtype))])) if bits == 4 else TABLE


def octets(bits: int) -> str:
    """Instructions for integers of 2, 4 or 8 bits, less 2^(bits - 1) and times 2^(8 - bits), in a byte each.

    The first codes of the bytes of a word are ``$0``, and so on; the operand after them is the word.
    """
    count, mask = 8 // bits, hex(0x01010101 * (256 - (1 << (8 - bits))))
    lines = [
        f"shl.b32 t, ${count}, {8 - bits * (i + 1)}; lop3.b32 ${i}, t, {mask}, 0x80808080, 0x6A;" for i in range(count)
    ]
    return _block(lines)


def scaled(how: Unpacking, count: int, operand: int, dtype: torch.dtype) -> str | None:
    """Instructions that also multiply by a pair of scales, the given operand: rounded once, as decoded rows are.

    None where they do not say all, or the type does not hold what is added and multiplied.
    """
    if how.instructions is None:
        return None
    moves = [(how.step, how.offset)]
    if not _holds(dtype, how.offset):  # the base away first, an integer of few digits
        base = float(int(-how.offset / how.step))
        moves = [(1.0, -base), (how.step, how.offset + how.step * base)]
    if not all(_holds(dtype, number) for pair in moves for number in pair):
        return None
    lines: list[str] = []
    for step, offset in moves:
        if (step, offset) != (1.0, 0.0):
            lines += _multiply_add(step, offset, count, dtype)
    lines.append(f"mov.b32 c, {_twice(0x8000)};")
    lines += [f"fma.rn.{_name(dtype)} ${i}, ${i}, ${operand}, c;" for i in range(count)]
    return how.instructions[:-1] + " ".join(lines) + " }"


def _multiply_add(step: float, offset: float, count: int, dtype: torch.dtype) -> list[str]:
    """Every pair of outputs times ``step``, plus ``offset``."""
    constants = f"mov.b32 a, {_twice(_bits(step, dtype))}; mov.b32 b, {_twice(_bits(offset, dtype))};"
    return [constants, *(f"fma.rn.{_name(dtype)} ${i}, ${i}, a, b;" for i in range(count))]


def _name(dtype: torch.dtype) -> str:
    """Of pairs, in instructions."""
    return "bf16x2" if dtype == torch.bfloat16 else "f16x2"


def _holds(dtype: torch.dtype, number: float) -> bool:
    return float(torch.tensor(number, dtype=torch.float64).to(dtype)) == number


def _block(lines: Iterable[str]) -> str:
    return "{ .reg .b32 t, a, b, c, e, f, g, h, k, m; .reg .b32 w<12>; " + " ".join(lines) + " }"


def _places(bits: int) -> tuple[list[str], list[tuple[str, int]]]:
    """Instructions that bring 16 bits of both units into one register, and where each code lies: register and shift."""
    count = codes_of_unit(bits)
    if not words_of_unit(bits):
        return [], [(f"${count}", bits * i) for i in range(count)]
    windows: dict[int, str] = {}
    moves, places = [], []
    for bit in range(0, bits * count, bits):
        start = bit // 16 * 16
        if bit + bits > start + 16:  # across two chunks: the window half a chunk on
            start += 8
        if start not in windows:
            windows[start] = f"w{len(windows)}"
            moves.append(_window(start, count, windows[start]))
        places.append((windows[start], bit - start))
    return moves, places


def _window(start: int, first: int, register: str) -> str:
    """16 bits from ``start`` on, a whole byte, of two units whose words are the operands from ``first`` on."""
    word, octet = divmod(start // 8, 4)
    one, other = f"${first + 2 * word}", f"${first + 2 * word + 1}"
    if octet < 3:
        return f"prmt.b32 {register}, {one}, {other}, 0x{5 + octet}{4 + octet}{1 + octet}{octet};"
    return (
        f"prmt.b32 a, {one}, ${first + 2 * word + 2}, 0x0043; prmt.b32 b, {other}, ${first + 2 * word + 3}, 0x0043; "
        f"prmt.b32 {register}, a, b, 0x5410;"
    )


def _integer(bits: int, index: int, source: str, shift: int, dtype: torch.dtype) -> str:
    low = f"shr.u32 t, {source}, {shift};" if shift else f"mov.b32 t, {source};"
    mask = _twice((1 << bits) - 1)
    if dtype == torch.float16:  # 1024 + code
        return f"{low} lop3.b32 ${index}, t, {mask}, {_twice(0x6400)}, 0xEA;"
    if bits < 8:  # 128 + code
        return f"{low} lop3.b32 ${index}, t, {mask}, {_twice(0x4300)}, 0xEA;"
    # Eight bits do not fit the mantissa: 128 + the lower seven, less 128 or 256 as the highest bit is set or not.
    return (
        f"{low} lop3.b32 a, t, {_twice(0x7F)}, {_twice(0x4300)}, 0xEA; "
        f"lop3.b32 b, t, {_twice(0x80)}, {_twice(0x4380)}, 0x6A; "
        f"mov.b32 c, {_twice(0xBF80)}; fma.rn.bf16x2 ${index}, b, c, a;"
    )


def _minifloat(
    bits: int, exponent_bits: int, factor: float, index: int, source: str, shift: int, dtype: torch.dtype
) -> str:
    """Sign to the highest bit, exponent and mantissa to where the type's exponent ends."""
    mantissa = 7 if dtype == torch.bfloat16 else 10
    up = mantissa - (bits - 1 - exponent_bits) - shift
    move = f"shl.b32 m, {source}, {up};" if up >= 0 else f"shr.u32 m, {source}, {-up};"
    magnitude = _twice(((1 << (bits - 1)) - 1) << (up + shift))
    sign = f"shl.b32 a, {source}, {CHUNK_BITS - shift - bits};"
    both = f"and.b32 m, m, {magnitude}; lop3.b32 m, a, {_twice(0x8000)}, m, 0xEA;"
    scale = f"mov.b32 f, {_twice(_bits(factor, dtype))}; mov.b32 b, {_twice(0x8000)};"
    return f"{move} {sign} {both} {scale} fma.rn.{_name(dtype)} ${index}, m, f, b;"


def _look_up(table: torch.Tensor) -> str:
    """Four codes of each chunk among sixteen values: low and high bytes of the lower and the upper eight, then one."""
    halves = table.view(torch.int16).int() & 0xFFFF
    low, high = ([int(value) for value in part] for part in (halves & 0xFF, halves >> 8))
    words = [hex(sum(part[first + i] << 8 * i for i in range(4))) for part in (low, high) for first in range(0, 16, 4)]
    low0, low1, low2, low3, high0, high1, high2, high3 = words
    lines = ["mov.b32 t, $4;"]
    for value_pairs in (("e", "f"), ("g", "h")):  # of the first chunk, and of the second
        lines += [
            "and.b32 a, t, 0x7777; shr.u32 m, t, 1; lop3.b32 m, m, 0x4444, 0x3210, 0xEA;",
            f"mov.b32 b, {low0}; mov.b32 c, {low1}; prmt.b32 b, b, c, a;",
            f"mov.b32 c, {low2}; mov.b32 k, {low3}; prmt.b32 c, c, k, a; prmt.b32 b, b, c, m;",
            f"mov.b32 c, {high0}; mov.b32 k, {high1}; prmt.b32 c, c, k, a;",
            f"mov.b32 k, {high2}; mov.b32 {value_pairs[0]}, {high3}; prmt.b32 k, k, {value_pairs[0]}, a;",
            "prmt.b32 c, c, k, m;",
            f"prmt.b32 {value_pairs[0]}, b, c, 0x5140; prmt.b32 {value_pairs[1]}, b, c, 0x7362; shr.u32 t, t, 16;",
        ]
    lines += ["prmt.b32 $0, e, g, 0x5410; prmt.b32 $1, e, g, 0x7632;"]
    lines += ["prmt.b32 $2, f, h, 0x5410; prmt.b32 $3, f, h, 0x7632;"]
    return " ".join(lines)


def _factor(table: torch.Tensor, exponent_bits: int, dtype: torch.dtype) -> float | None:
    """The power of two that turns a format's bits, in the place of the type's, into its values; None if none does.

    Codes of infinity and NaN are never written and do not count.
    """
    bits, mantissa = (len(table) - 1).bit_length(), 7 if dtype == torch.bfloat16 else 10
    up = mantissa - (bits - 1 - exponent_bits)
    if up < 0 or (dtype == torch.float16 and exponent_bits > 5):
        return None
    codes = torch.arange(len(table), dtype=torch.int32)
    raw = ((codes & (len(table) // 2 - 1)) << up).to(torch.int16).view(dtype).double()
    raw = torch.where(codes >= len(table) // 2, -raw, raw)
    usable = torch.isfinite(table) & torch.isfinite(raw)
    if not torch.equal(usable, torch.isfinite(table)) or not float(raw[usable][-1]):
        return None
    factor = float(table[usable][-1] / raw[usable][-1])
    fits = torch.tensor(factor).to(dtype).double() == factor
    exact = torch.equal(raw[usable] * factor + 0.0, table[usable].double() + 0.0)
    return factor if bool(fits) and exact else None


def _bits(value: float, dtype: torch.dtype) -> int:
    if dtype == torch.float16:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    return int(struct.unpack("<I", struct.pack("<f", value))[0]) >> 16


def _twice(half: int) -> str:
    return hex(half << 16 | half)
