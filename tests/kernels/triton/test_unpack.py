"""The instructions that unpack codes, run by a few lines of Python: no GPU is needed to know what they give."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import WeightSpec, pack_codes
from hf_lowbit.kernels.triton.unpack import TABLE, Unpacking, codes_of_unit, octets, scaled, unpacking, words_of_unit
from tests.kernels.cpu.matrices import FORMATS

ARITHMETIC = [
    name
    for name, fields in FORMATS.items()
    if fields["bits"] not in (5, 7) and (name == "nf4" or not name.startswith(("nf", "power", "fitted")))
]
WITH_INSTRUCTIONS = [  # the others are looked up in memory
    (name, dtype)
    for name in ARITHMETIC
    for dtype in (torch.bfloat16, torch.float16)
    if unpacking(WeightSpec(**FORMATS[name]), dtype) != TABLE
]


def run(instructions: str, inputs: list[Tensor], count: int, dtype: torch.dtype) -> list[Tensor]:
    """The pairs of floats ``[n, 2]`` of each output."""
    results = execute(instructions, inputs, count, dtype)
    return [torch.stack([part & 0xFFFF, part >> 16], -1).to(torch.uint16).view(dtype).double() for part in results]


def execute(instructions: str, inputs: list[Tensor], count: int, dtype: torch.dtype) -> list[Tensor]:
    """PTX on words ``[n]`` in int64; the outputs likewise."""
    chunks = inputs[0]
    registers: dict[str, Tensor | int] = {f"${count + i}": words for i, words in enumerate(inputs)}

    def read(name: str) -> Tensor:
        value = registers[name] if name in registers else int(name, 0)
        return torch.as_tensor(value, dtype=torch.int64)

    def floats(name: str) -> Tensor:
        value = read(name)
        halves = torch.stack([value & 0xFFFF, value >> 16 & 0xFFFF], -1)
        return torch.where(halves >= 2**15, halves - 2**16, halves).to(torch.int16).view(dtype).double()

    def compute(name: str, operands: list[str]) -> Tensor:
        if name.startswith("fma"):
            x, y, z = (floats(operand) for operand in operands)
            bits = (x * y + z).to(dtype).view(torch.int16).long() & 0xFFFF
            return bits[..., 0] | bits[..., 1] << 16
        a, *rest = (read(operand) for operand in operands)
        if name == "prmt.b32":
            octets = torch.stack([part.expand(chunks.shape) >> 8 * i & 255 for part in (a, rest[0]) for i in range(4)])
            picks = [(rest[1].expand(chunks.shape) >> 4 * i & 15).unsqueeze(0) for i in range(4)]
            assert all(bool((pick < 8).all()) for pick in picks)
            return torch.stack([octets.gather(0, pick)[0] << 8 * i for i, pick in enumerate(picks)]).sum(0)
        if name == "lop3.b32":
            assert int(rest[2]) in (0xEA, 0x6A)
            return (a & rest[0]) | rest[1] if int(rest[2]) == 0xEA else (a & rest[0]) ^ rest[1]
        simple = {"mov.b32": lambda: a, "shr.u32": lambda: a >> rest[0], "and.b32": lambda: a & rest[0]}
        return simple.get(name, lambda: a << rest[0] & 0xFFFFFFFF)()

    for statement in instructions.strip("{} ").split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            name, out, *operands = re.split(r"[ ,]+", statement.strip())
            registers[out] = compute(name, operands)
    return [read(f"${index}") for index in range(count)]


def random_units(spec: WeightSpec) -> tuple[Tensor, list[Tensor]]:
    """Codes ``[300, 2, count]`` of pairs of units, and the words ``[300]`` of them, as instructions read them."""
    count, words = codes_of_unit(spec.bits), words_of_unit(spec.bits)
    written = torch.arange(2**spec.bits)[torch.isfinite(spec.number_format.table)]
    written = written[written < 3] if spec.format == "ternary" else written
    codes = written[torch.randint(len(written), (300, 2, count), generator=torch.Generator().manual_seed(0))]
    if not words:
        chunks = (codes << torch.arange(count) * spec.bits).sum(-1)
        return codes, [chunks[:, 0] | chunks[:, 1] << 16]
    packed = pack_codes(codes.to(torch.uint8), spec.bits).long() & 0xFFFFFFFF
    return codes, [packed[:, unit, word] for word in range(words) for unit in range(2)]


@pytest.mark.parametrize(("name", "dtype"), WITH_INSTRUCTIONS)
def test_instructions_give_the_values_of_the_table(name: str, dtype: torch.dtype) -> None:
    spec = WeightSpec(**FORMATS[name])
    how, table = unpacking(spec, dtype), spec.number_format.table.double()
    assert how.instructions is not None
    codes, words = random_units(spec)
    for index, values in enumerate(run(how.instructions, words, codes.shape[-1], dtype)):
        expected = table[codes[:, :, index]]
        expected = expected.to(dtype).double() if spec.format == "nf" else expected
        assert torch.equal(how.step * values + how.offset, expected)


@pytest.mark.parametrize(("name", "dtype"), WITH_INSTRUCTIONS)
def test_scaled_ones_give_decoded_weights(name: str, dtype: torch.dtype) -> None:
    spec = WeightSpec(**FORMATS[name])
    codes, words = random_units(spec)
    count, scales = codes.shape[-1], torch.tensor([0.37, 1.5]).to(dtype)
    pair = int(scales.view(torch.int16)[0]) | int(scales.view(torch.int16)[1]) << 16
    instructions = scaled(unpacking(spec, dtype), count, count + len(words), dtype)
    assert instructions is not None
    words.append(torch.full((300,), pair))
    for index, values in enumerate(run(instructions, words, count, dtype)):
        expected = spec.number_format.table[codes[:, :, index]].to(dtype) * scales
        assert torch.equal(values, expected.double())


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_integers_become_the_tops_of_bytes(bits: int) -> None:
    codes = torch.randint(2**bits, (300, 32 // bits), generator=torch.Generator().manual_seed(0))
    words = pack_codes(codes.to(torch.uint8), bits).long()[:, 0] & 0xFFFFFFFF
    for index, result in enumerate(execute(octets(bits), [words], 8 // bits, torch.float16)):
        values = (result[:, None] >> 8 * torch.arange(4)).to(torch.int8).long()
        assert torch.equal(values, (codes[:, index :: 8 // bits] - 2 ** (bits - 1)) * 2 ** (8 - bits))


def test_what_is_not_exact_is_not_scaled() -> None:
    assert scaled(TABLE, 4, 5, torch.bfloat16) is None
    assert scaled(Unpacking("{ }", 0.3, 0.0), 4, 5, torch.bfloat16) is None


def test_what_has_arithmetic() -> None:
    for bits in (1, 2, 3, 4, 6, 8):
        for dtype in (torch.bfloat16, torch.float16):
            assert unpacking(WeightSpec(bits=bits), dtype).instructions is not None
    for format in ("fp_e2m1", "float8_e4m3fn", "float8_e5m2"):
        bits = 4 if format == "fp_e2m1" else 8
        assert unpacking(WeightSpec(format=format, bits=bits), torch.bfloat16).instructions is not None
    assert unpacking(WeightSpec(format="nf", bits=3), torch.bfloat16) == TABLE
