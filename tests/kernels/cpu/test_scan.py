"""The native scan and convolution against the float64 reference, on every instruction set that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_lowbit.kernels import Operand, causal_convolution, quantize_codes, selective_scan
from tests.kernels.mixers import (
    SHAPES,
    by_tokens,
    cast,
    extreme_inputs,
    in_codes,
    lying_apart,
    relative,
    restored,
    scan_inputs,
)

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def native(**inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state and peaks; without gradients, with which the scan would go through torch."""
    with torch.no_grad():
        output, state, peaks = selective_scan(**inputs, return_state=True, peaks_every=16)
    assert state is not None and peaks is not None
    return output, state, peaks


@pytest.mark.parametrize("tokens", (1, 37))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_recurrence(shape: str, tokens: int, instruction_set: str) -> None:
    for dtype, tolerance in TOLERANCE.items():
        inputs = cast(scan_inputs(shape, 2, tokens), dtype)
        expected, last, sizes = by_tokens(cast(inputs, torch.float64))
        output, state, peaks = native(**inputs)
        assert output.dtype == dtype and state.dtype == torch.float32
        assert relative(output, expected) < tolerance
        assert relative(state, last) < 1e-6
        assert relative(peaks, torch.stack([part.amax(1) for part in sizes.split(16, 1)], 1)) < 1e-6
        with torch.no_grad():  # the common call, which keeps nothing
            assert torch.equal(selective_scan(**inputs).output, output)


@pytest.mark.parametrize("clusters", (1, 5))
@pytest.mark.parametrize("shape", SHAPES)
def test_codes(shape: str, clusters: int, instruction_set: str) -> None:
    for tokens in (1, 30):
        coded = in_codes(scan_inputs(shape, 2, tokens, torch.float32), clusters)
        expected, last, _ = by_tokens(restored(coded))
        output, state, _ = native(**coded)
        assert relative(output, expected) < 1e-6
        codes = quantize_codes(last, coded["state_scale"][coded["state_cluster"]])
        assert state.dtype == torch.int8
        assert float((state.int() - codes.int()).abs().float().mean()) < 1e-3  # ties may fall either way
        updated = coded["state"].clone()
        with torch.no_grad():
            kept = selective_scan(**{**coded, "state": updated}, update=True).state
        assert kept is not None and kept.data_ptr() == updated.data_ptr()
        assert torch.equal(kept, state)


def test_floats_are_rounded_to_the_same_codes(instruction_set: str) -> None:
    inputs = cast(scan_inputs("odd", 2, 20), torch.float32)
    coded = in_codes(inputs, clusters=1)
    rounded = {k: Operand(inputs[k].values, v.scale) if isinstance(v, Operand) else v for k, v in coded.items()}
    for result, expected in zip(native(**rounded), native(**coded), strict=True):
        assert torch.equal(result, expected)


def test_one_scale_for_all_states_of_a_cluster(instruction_set: str) -> None:
    coded = in_codes(scan_inputs("mamba-2", 2, 3, torch.float32), clusters=2)
    coded["state_scale"] = coded["state_scale"][:, :1].contiguous()
    many = coded | {"state_scale": coded["state_scale"].repeat(1, 64)}
    for result, expected in zip(native(**coded), native(**many), strict=True):
        assert torch.equal(result, expected)


def test_reads_what_lies_apart(instruction_set: str) -> None:
    inputs = cast(scan_inputs("mamba-2", 2, 12), torch.float32)
    for other in lying_apart(inputs):
        for result, expected in zip(native(**{**inputs, **other}), native(**inputs), strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("threads", (1, 2))
def test_threads_change_nothing(threads: int, instruction_set: str) -> None:
    inputs = cast(scan_inputs("mamba-2", 3, 64), torch.float32)
    before = torch.get_num_threads()
    expected = native(**inputs)
    torch.set_num_threads(threads)
    try:
        for result, one in zip(native(**inputs), expected, strict=True):
            assert torch.equal(result, one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_token_that_is_not_finite_touches_no_earlier_one(value: float, instruction_set: str) -> None:
    inputs = cast(scan_inputs("mamba", 2, 9), torch.float32)
    expected = native(**inputs)[0]
    inputs["x"].values[0, 5, 3] = value
    output = native(**inputs)[0]
    assert torch.equal(output[0, :5], expected[0, :5]) and torch.equal(output[1], expected[1])
    assert not torch.isfinite(output[0, 5:, 3]).any()


def test_extreme_steps_and_gates(instruction_set: str) -> None:
    inputs = extreme_inputs()
    output, state, _ = native(**inputs)
    expected, last, _ = by_tokens(cast(inputs, torch.float64))
    assert relative(output, expected) < 1e-6 and relative(state, last) < 1e-6


def test_slow_decays_do_not_drift(instruction_set: str) -> None:
    """A state that should halve over many tokens does: an exponential with a bias near 1 would add up."""
    tokens = 4000
    inputs: dict[str, Any] = {
        "x": Operand(torch.zeros(1, tokens, 4)),
        "dt": Operand(torch.full((1, tokens, 4), 1e-3).expm1().log()),
        "A": torch.full((4, 16), -0.17328679),
        "B": Operand(torch.ones(1, tokens, 1, 16)),
        "C": Operand(torch.ones(1, tokens, 1, 16)),
        "D": None,
        "state": torch.ones(1, 4, 16),
    }
    with torch.no_grad():
        state = selective_scan(**inputs, return_state=True).state
    assert state is not None and float((state - 0.5).abs().max()) < 1e-5


@pytest.mark.parametrize("taps", (1, 2, 4, 7))
def test_convolution(taps: int, instruction_set: str) -> None:
    for dtype, tolerance in TOLERANCE.items():
        for channels, tokens in ((20, 1), (133, 70), (300, 3)):
            x = torch.randn(2, tokens, channels).to(dtype)
            weight, bias = torch.randn(channels, taps), torch.randn(channels)
            state = torch.randn(2, channels, taps).to(dtype)
            inputs = torch.cat([state, x.transpose(1, 2)], 2)
            expected = F.conv1d(inputs[..., 1:].double(), weight[:, None].double(), bias.double(), groups=channels)
            result = causal_convolution(Operand(x), weight, bias, state, update=True)
            assert result.dtype == dtype
            assert relative(result, F.silu(expected).transpose(1, 2)) < tolerance
            assert torch.equal(state, inputs[..., -taps:])


@pytest.mark.parametrize("taps", (3, 4))
def test_convolution_of_codes(taps: int, instruction_set: str) -> None:
    for channels, tokens in ((20, 1), (133, 70)):
        scale, out_scale = torch.rand(channels) / 20 + 0.01, torch.rand(channels) / 20 + 0.02
        codes = torch.randint(-127, 128, (2, tokens, channels), dtype=torch.int8)
        state = torch.randint(-127, 128, (2, channels, taps), dtype=torch.int8)
        weight, past = torch.randn(channels, taps), state.clone()
        result = causal_convolution(Operand(codes, scale), weight, None, state, out_scale=out_scale, update=True)
        inputs = torch.cat([past, codes.transpose(1, 2)], 2)
        assert result.dtype == torch.int8 and torch.equal(state, inputs[..., -taps:])
        values = inputs[..., 1:].double() * scale[:, None]
        expected = F.silu(F.conv1d(values, weight[:, None].double(), groups=channels)).transpose(1, 2)
        difference = result.int() - quantize_codes(expected.float(), out_scale).int()
        assert float(difference.abs().float().mean()) < 1e-3


def test_the_library_refuses_what_it_cannot_read() -> None:
    from hf_lowbit.kernels.cpu import state_space
    from hf_lowbit.kernels.operand import Convolution

    codes = Operand(torch.zeros(1, 2, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="refused"):
        given = Convolution(codes, torch.ones(4, 2), None, None, True, None)
        state_space.causal_convolution(given, False, torch.float32)
    coded = in_codes(scan_inputs("mamba", 1, 2, torch.float32), clusters=3)
    with pytest.raises(ValueError, match="refused"):
        native(**coded | {"state_cluster": coded["state_cluster"] + 1})
