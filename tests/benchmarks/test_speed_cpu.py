"""What the benchmarks of the CPU's kernels print, of small matrices."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import crossovers, speed_cpu
from hf_lowbit.formats import WeightSpec
from hf_lowbit.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason="they measure the native library")


def test_products_and_what_they_are_compared_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_cpu, "COLD_BYTES", 4096)
    cold = [speed_cpu.random_packed(32, 64, WeightSpec(bits=4, group_size=32)) for _ in range(3)]
    floats, memory = [torch.randn(32, 64) for _ in range(2)], torch.ones(4096, dtype=torch.uint8)
    result = speed_cpu.measure(cold, floats, torch.randn(2, 64), memory, rounds=2)
    assert set(result) == {"read_gb_s", "us", "float32_us", "bfloat16_us", "int8_us", "gb_s"}
    assert all(value > 0 for value in result.values())
    codes_and_scales = 32 * 64 // 2 + 32 * 2 * 2
    assert result["gb_s"] == pytest.approx(codes_and_scales / result["us"] / 1e3)
    assert re.fullmatch(r" *\d+ us, +\d+% of reading.*int8 inputs .*", speed_cpu.describe(result))


def test_calls_take_turns() -> None:
    turns: list[str] = []
    calls = {"a": lambda i: turns.append(f"a{i}"), "b": lambda i: turns.append(f"b{i}")}
    assert set(speed_cpu.microseconds(calls, {"a": 2, "b": 1}, blocks=2)) == {"a", "b"}
    assert turns == ["a0", "b0", "a0", "a1", "b0", "a2", "a3", "b1"]  # once each to warm up


def test_crossovers() -> None:
    matrix = cpu.describe(speed_cpu.random_packed(32, 64, WeightSpec(bits=4, group_size=32)))
    assert matrix is not None
    assert re.fullmatch(r"registers +[\d.]+ ms, tiles +[\d.]+ ms", crossovers.compare(torch.randn(2, 64), matrix))
    assert re.fullmatch(r"decoded +[\d.]+ ms, unfolded +[\d.]+ ms", crossovers.compare_convolution(32, 2))
