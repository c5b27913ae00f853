"""Codes to words and back: exact, in compressed-tensors' layout, pinned byte for byte."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lowbit.formats import pack_codes, packing, unpack_codes
from hf_lowbit.formats.packing import packed_columns

exhaustive = settings(deadline=None, derandomize=True, max_examples=60)
WIDTHS = range(1, 9)

# The bytes of codes (17 * i + 5) mod 2^bits, i = 0..12, as one little-endian bit stream padded to whole words: made
# with Python integers, not with the packer.
GOLDEN = {
    1: "55150000",
    2: "39393901",
    3: "f5118df511000000",
    4: "6587a9cbed0f0100",
    5: "c51e9cf4e2cd3f1001000000",
    6: "8575e289b6f28df702110000",
    7: "05cb0997d4aef90dcf0b1805",
    8: "05162738495a6b7c8d9eafc0d1000000",
}


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


@exhaustive
@given(
    bits=st.integers(1, 8),
    leading=st.lists(st.integers(1, 3), max_size=3).map(tuple),
    columns=st.integers(1, 101),
    seed=st.integers(0, 2**16),
)
def test_dense_round_trip_is_exact(bits: int, leading: tuple[int, ...], columns: int, seed: int) -> None:
    codes = random_codes((*leading, columns), bits, seed)
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (*leading, packed_columns(columns, bits))
    assert torch.equal(unpack_codes(words, bits, columns), codes)


@exhaustive
@given(leading=st.lists(st.integers(1, 3), max_size=3).map(tuple), columns=st.integers(1, 101), seed=st.integers(0, 99))
def test_base3_round_trip_is_exact(leading: tuple[int, ...], columns: int, seed: int) -> None:
    codes = torch.randint(0, 3, (*leading, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack_codes(codes, 2, "base3")
    assert words.shape == (*leading, packed_columns(columns, 2, "base3"))
    assert torch.equal(unpack_codes(words, 2, columns, "base3"), codes)


@exhaustive
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), columns=st.integers(1, 101), seed=st.integers(0, 99))
def test_layout_is_that_of_compressed_tensors(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = random_codes((rows, columns), bits, seed)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    words = pack_codes(codes, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, torch.Size((rows, columns))), signed)


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden_bytes_pin_the_layout(bits: int) -> None:
    codes = torch.tensor([(17 * i + 5) % 2**bits for i in range(13)], dtype=torch.uint8)
    assert pack_codes(codes, bits).view(torch.uint8).numpy().tobytes().hex() == GOLDEN[bits]
    assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, 13), codes)


def test_golden_bytes_pin_base3() -> None:
    codes = torch.tensor([2, 1, 0, 2, 1] + [2] * 5 + [1, 0], dtype=torch.uint8)
    # 2 + 1*3 + 0*9 + 2*27 + 1*81 = 140; 2*121 = 242; 1
    assert pack_codes(codes, 2, "base3").view(torch.uint8).tolist() == [140, 242, 1, 0]


@pytest.mark.parametrize(
    ("columns", "bits", "packing_name", "words"),
    [
        (1, 1, "dense", 1), (32, 1, "dense", 1), (33, 1, "dense", 2), (31, 3, "dense", 3), (33, 3, "dense", 4),
        (64, 4, "dense", 8), (5, 8, "dense", 2), (20, 2, "base3", 1), (21, 2, "base3", 2), (1, 2, "base3", 1),
    ],
)  # fmt: skip
def test_sizes(columns: int, bits: int, packing_name: str, words: int) -> None:
    assert packed_columns(columns, bits, packing_name) == words


@pytest.mark.parametrize("layout", ["dense", "base3"])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    codes = random_codes((17, 45), 2) % 3
    words = pack_codes(codes, 2, layout)
    monkeypatch.setattr(packing, "_CHUNK_ELEMENTS", 100)
    assert torch.equal(pack_codes(codes, 2, layout), words)
    assert torch.equal(unpack_codes(words, 2, 45, layout), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_rows_stay_no_rows(bits: int) -> None:
    words = torch.empty(0, packed_columns(7, bits), dtype=torch.int32)
    assert unpack_codes(words, bits, 7).shape == (0, 7)
