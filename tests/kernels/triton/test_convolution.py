"""The Triton convolution against torch's: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hf_lowbit.kernels import Operand, causal_convolution, quantize_codes
from tests.kernels.mixers import relative
from tests.kernels.triton.test_scan import DEVICE, INTERPRETED, TOLERANCE

# channels and tokens; on a GPU also those of mamba-130m and mamba2-130m
SIZES = [(20, 1), (133, 40), (300, 3)] + ([] if INTERPRETED else [(1536, 512), (1792, 512), (1792, 1)])


@pytest.mark.parametrize("taps", (1, 2, 4, 7))
def test_convolution(taps: int) -> None:
    for dtype, tolerance in TOLERANCE.items():
        for channels, tokens in SIZES:
            x = torch.randn(2, tokens, channels).to(dtype)
            weight, bias = torch.randn(channels, taps), torch.randn(channels)
            state = torch.randn(2, channels, taps).to(dtype)
            inputs = torch.cat([state, x.transpose(1, 2)], 2)
            expected = F.conv1d(inputs[..., 1:].double(), weight[:, None].double(), bias.double(), groups=channels)
            own = x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE), state.clone().to(DEVICE)
            plain = causal_convolution(Operand(own[0]), *own[1:], silu=False, backend="triton")
            assert relative(plain.cpu(), expected.transpose(1, 2)) < tolerance
            assert torch.equal(own[3].cpu(), state)
            result = causal_convolution(Operand(own[0]), *own[1:], update=True, backend="triton")
            assert result.dtype == dtype
            assert relative(result.cpu(), F.silu(expected).transpose(1, 2)) < tolerance
            assert torch.equal(own[3].cpu(), inputs[..., -taps:])


@pytest.mark.parametrize("taps", (3, 4))
def test_convolution_of_codes(taps: int) -> None:
    for channels, tokens in SIZES:
        scale, out_scale = torch.rand(channels) / 20 + 0.01, torch.rand(channels) / 20 + 0.02
        codes = torch.randint(-127, 128, (2, tokens, channels), dtype=torch.int8)
        state = torch.randint(-127, 128, (2, channels, taps), dtype=torch.int8)
        weight = torch.randn(channels, taps)
        x, own, kept = Operand(codes.to(DEVICE), scale.to(DEVICE)), weight.to(DEVICE), state.clone().to(DEVICE)
        result = causal_convolution(x, own, None, kept, out_scale=out_scale.to(DEVICE), update=True, backend="triton")
        inputs = torch.cat([state, codes.transpose(1, 2)], 2)
        assert result.dtype == torch.int8 and torch.equal(kept.cpu(), inputs[..., -taps:])
        values = inputs[..., 1:].double() * scale[:, None]
        expected = F.silu(F.conv1d(values, weight[:, None].double(), groups=channels)).transpose(1, 2)
        difference = result.cpu().int() - quantize_codes(expected.float(), out_scale).int()
        assert float(difference.abs().float().mean()) < 1e-3


def test_floats_with_a_scale_are_rounded_to_codes() -> None:
    x, scale, weight = torch.randn(2, 9, 8), torch.rand(8) / 50 + 0.01, torch.randn(8, 4, device=DEVICE)
    codes, scale = quantize_codes(x, scale), scale.to(DEVICE)
    state = torch.zeros(2, 8, 4, dtype=torch.int8, device=DEVICE)
    again = state.clone()
    rounded = causal_convolution(Operand(x.to(DEVICE), scale), weight, None, state, update=True, backend="triton")
    coded = causal_convolution(Operand(codes.to(DEVICE), scale), weight, None, again, update=True, backend="triton")
    assert torch.equal(rounded, coded) and torch.equal(state, again)
    assert torch.equal(state.cpu(), codes[:, -4:].transpose(1, 2))


def test_reads_what_lies_apart_and_updates_what_does() -> None:
    wide, weight = torch.randn(2, 6, 40, device=DEVICE), torch.randn(20, 4, device=DEVICE)
    kept = torch.randn(2, 20, 9, device=DEVICE)
    state, other = kept[..., -4:], kept[..., -4:].clone()
    for x in (wide[..., 7:27], wide.transpose(1, 2)[:, :6].transpose(1, 2)[..., :1].expand(2, 6, 20)):
        result = causal_convolution(Operand(x), weight, None, state, update=True, backend="triton")
        expected = causal_convolution(Operand(x.clone()), weight, None, other, update=True, backend="triton")
        assert torch.equal(result, expected) and torch.equal(state, other)
