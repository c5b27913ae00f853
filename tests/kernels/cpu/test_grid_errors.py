"""The native sums of rounding errors against torch's in float64, on every instruction set that runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import NumberFormat, get_format
from hf_lowbit.kernels import cpu, rounding_errors

FORMATS = [("int", bits) for bits in range(2, 9)] + [("nf", 4), ("lloyd", 3), ("ternary", 2), ("fp_e4m3", 8)]


def expected(grouped: Tensor, scale: Tensor, zero: Tensor, number_format: NumberFormat, importance: Tensor) -> Tensor:
    units = grouped / torch.where(scale == 0, 1.0, scale)[..., None] + zero[..., None]
    values = (number_format.decode(number_format.encode(units)).double() - zero[..., None]) * scale[..., None]
    return ((grouped - values).square() * importance).sum(-1)


def example(size: int, number_format: NumberFormat, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights beyond the grids' ends and on the borders of codes; a group without weights; odd zero points."""
    generator = torch.Generator().manual_seed(seed)
    grouped = torch.randn(7, 3, size, generator=generator)
    scale = torch.rand(7, 3, generator=generator) * 1.5 / number_format.max_value + 1e-3
    grouped[1] = (grouped[1] / scale[1, :, None]).round() * scale[1, :, None] + scale[1, :, None] / 2
    grouped[2, 1], scale[2, 1] = 0.0, 0.0
    zero = torch.randint(-1, 2, (7, 3), generator=generator).float()
    return grouped, scale, zero, torch.rand(3, size, generator=generator)


@pytest.mark.parametrize("size", [1, 16, 24, 64, 100])
@pytest.mark.parametrize(("name", "bits"), FORMATS)
def test_equals_torch(name: str, bits: int, size: int, instruction_set: str) -> None:
    number_format = get_format(name, bits)
    grouped, scale, zero, importance = example(size, number_format)
    found = rounding_errors(grouped, scale, zero, number_format, importance)
    exact = expected(grouped, scale, zero, number_format, importance)
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=1e-9)


def test_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    for name, bits in FORMATS:
        number_format = get_format(name, bits)
        given = example(24, number_format)
        found = rounding_errors(*given[:3], number_format, given[3])
        torch.testing.assert_close(found.double(), expected(*given[:3], number_format, given[3]), rtol=2e-5, atol=1e-9)


def test_tensors_that_do_not_lie_in_order() -> None:
    number_format = get_format("int", 3)
    grouped, scale, zero, importance = example(32, number_format)
    straight = rounding_errors(grouped, scale, zero, number_format, importance)
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (grouped, scale, zero)]
    assert torch.equal(rounding_errors(*turned, number_format, importance), straight)
    one = [t[:, :1].expand(7, 3) for t in (scale, zero)]
    copied = [t.contiguous() for t in one]
    assert torch.equal(
        rounding_errors(grouped, *one, number_format, importance),
        rounding_errors(grouped, *copied, number_format, importance),
    )


def test_threads_do_not_change_bits() -> None:
    number_format, threads = get_format("lloyd", 4), torch.get_num_threads()
    grouped, scale, zero, importance = example(64, number_format)
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(rounding_errors(grouped, scale, zero, number_format, importance))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
