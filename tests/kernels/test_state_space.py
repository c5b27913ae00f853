"""The reference of scan and convolution against the recurrence, token by token; what both routes refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_lowbit.kernels import Operand, causal_convolution, quantize_codes, selective_scan
from tests.kernels.mixers import SHAPES, by_tokens, cast, compare_traced, in_codes, relative, restored, scan_inputs


@pytest.mark.parametrize("tokens", (1, 2, 37, 150))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_recurrence(shape: str, tokens: int) -> None:
    inputs = scan_inputs(shape, 2, tokens)
    output, state, sizes = by_tokens(inputs)
    result = selective_scan(**inputs, return_state=True)
    assert result.state is not None and result.peaks is None
    assert relative(result.output, output) < 1e-12 and relative(result.state, state) < 1e-12
    with_peaks = selective_scan(**inputs, peaks_every=16)
    assert with_peaks.state is None and with_peaks.peaks is not None
    assert relative(with_peaks.output, output) < 1e-12
    expected = torch.stack([part.amax(1) for part in sizes.split(16, 1)], 1)
    assert relative(with_peaks.peaks, expected) < 1e-7  # they are float32


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("shape", ("mamba", "mamba-2"))
def test_goes_on_where_it_stopped(shape: str, backend: str | None) -> None:
    inputs = cast(scan_inputs(shape, 2, 23), torch.float32)
    whole = selective_scan(**inputs, return_state=True, backend=backend)
    state = inputs.pop("state").clone()
    outputs = []
    for part in (slice(0, 9), slice(9, 10), slice(10, 23)):
        own: dict[str, Any] = {
            k: Operand(v.values[:, part]) if isinstance(v, Operand) else v for k, v in inputs.items()
        }
        result = selective_scan(**own, state=state, update=True, backend=backend)
        assert result.state is state
        outputs.append(result.output)
    assert whole.state is not None
    assert relative(torch.cat(outputs, 1), whole.output) < 1e-6 and relative(state, whole.state) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_mean_their_values(shape: str) -> None:
    coded = in_codes(scan_inputs(shape, 2, 19, torch.float32), clusters=4)
    output, state, _ = by_tokens(restored(coded))
    result = selective_scan(**coded, return_state=True, backend="reference")
    assert result.output.dtype == torch.float32 and result.state is not None and result.state.dtype == torch.int8
    assert relative(result.output, output) < 1e-5
    expected = quantize_codes(state, coded["state_scale"][coded["state_cluster"]])
    assert float((result.state.int() - expected.int()).abs().float().mean()) < 1e-3  # ties may fall either way


@pytest.mark.parametrize("backend", (None, "reference"))
def test_floats_with_a_scale_are_rounded_to_codes(backend: str | None) -> None:
    x, scale, weight = torch.randn(2, 9, 8), torch.rand(8) / 50 + 0.01, torch.randn(8, 4)
    codes = quantize_codes(x, scale)
    state = torch.zeros(2, 8, 4, dtype=torch.int8)
    again = state.clone()
    rounded = causal_convolution(Operand(x, scale), weight, None, state, update=True, backend=backend)
    coded = causal_convolution(Operand(codes, scale), weight, None, again, update=True, backend=backend)
    assert torch.equal(rounded, coded) and torch.equal(state, again)
    assert torch.equal(state, codes[:, -4:].transpose(1, 2))


def test_what_is_on_the_grid_keeps_its_code() -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8)
    for scale in torch.rand(200, generator=torch.Generator().manual_seed(0)) * 10:
        values = codes.float() * scale
        assert torch.equal(quantize_codes(values, scale), codes)
        assert torch.equal(torch.round(values / scale), codes.float())  # as layers that divide have it
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.5, -3.5, 1e9])
    assert quantize_codes(odd, torch.ones(1)).tolist() == [0, 127, -127, 2, -4, 127]


@pytest.mark.parametrize("backend", (None, "reference"))
def test_convolution_is_torchs(backend: str | None) -> None:
    for taps, channels, tokens in ((4, 24, 70), (2, 5, 3), (3, 130, 1), (4, 200, 40)):
        x, weight, bias = torch.randn(2, tokens, channels), torch.randn(channels, taps), torch.randn(channels)
        padded = F.pad(x.transpose(1, 2), (taps - 1, 0))
        expected = F.conv1d(padded, weight[:, None], bias, groups=channels).transpose(1, 2)
        plain = causal_convolution(Operand(x), weight, bias, silu=False, backend=backend)
        assert relative(plain, expected) < 1e-6
        assert relative(causal_convolution(Operand(x), weight, bias, backend=backend), F.silu(expected)) < 1e-6
        state = torch.zeros(2, channels, taps)
        parts = [
            causal_convolution(Operand(x[:, i : i + 1]), weight, bias, state, update=True, backend=backend)
            for i in range(tokens)
        ]
        assert relative(torch.cat(parts, 1), F.silu(expected)) < 1e-6
        assert torch.equal(state, F.pad(x.transpose(1, 2), (taps, 0))[..., -taps:])


@pytest.mark.parametrize("shape", ("mamba", "odd", "odd, own decays"))
def test_gradients(shape: str) -> None:
    inputs = scan_inputs(shape, 1, 5)
    names = [name for name, value in inputs.items() if name != "dt_limit"]
    tensors = [v.values if isinstance(v := inputs[name], Operand) else v for name in names]
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def call(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(names, given, strict=True))
        own: dict[str, Any] = {k: Operand(v) if isinstance(inputs[k], Operand) else v for k, v in named.items()}
        result = selective_scan(**own, dt_limit=(0.0, float("inf")), return_state=True)
        assert result.state is not None
        return result.output, result.state

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


def test_gradients_pass_the_rounding() -> None:
    x, weight = torch.randn(1, 6, 8, requires_grad=True), torch.randn(8, 4)
    scale = torch.tensor([0.02])
    through = causal_convolution(Operand(x, scale), weight, None, silu=False)
    (gradient,) = torch.autograd.grad(through.sum(), x)
    (expected,) = torch.autograd.grad(causal_convolution(Operand(x), weight, None, silu=False).sum(), x)
    assert torch.equal(gradient, expected)
    with torch.no_grad():
        assert relative(through, causal_convolution(Operand(x, scale), weight, None, silu=False)) < 1e-6


@pytest.mark.parametrize(("coded", "compiler"), [(False, "aot_eager"), (True, "aot_eager"), (True, "inductor")])
def test_is_traced_whole_and_equal(coded: bool, compiler: str) -> None:
    compare_traced(coded, compiler=compiler)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dt": ({"dt": Operand(torch.randn(2, 7, 19))}, r"dt [2, 7, 19] must be [2, 7, 20]"),
    "B": ({"B": Operand(torch.randn(2, 6, 1, 16))}, r"B [2, 6, 1, 16] must be [2, 7, 1, 16]"),
    "z": ({"z": Operand(torch.randn(2, 7, 21))}, r"z [2, 7, 21] must be [2, 7, 20]"),
    "state": ({"state": torch.zeros(2, 16, 20)}, r"state [2, 16, 20] must be [2, 20, 16]"),
    "codes": ({"C": Operand(torch.zeros(2, 7, 1, 16, dtype=torch.int8))}, "int8 C needs a scale"),
    "coded state": ({"state": torch.zeros(2, 20, 16, dtype=torch.int8)}, "needs a state_scale"),
    "scale": ({"state_scale": torch.ones(3, 4)}, r"state_scale [3, 4] must be [clusters, 1] or [clusters, 16]"),
    "no state": ({"state": None, "update": True}, "update=True needs a state"),
    "peaks": ({"peaks_every": 0}, "peaks_every is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name: str) -> None:
    change, message = BAD[name]
    inputs = cast(scan_inputs("mamba", 2, 7), torch.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        selective_scan(**{**inputs, **change})


def test_a_convolution_names_what_does_not_fit() -> None:
    weight = torch.randn(8, 4)
    x = Operand(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match=r"x \[2, 8, 3\] must be \[batch, T, 8\]"):
        causal_convolution(Operand(torch.randn(2, 8, 3)), weight, None)
    with pytest.raises(ValueError, match=r"state \[2, 8, 3\] must be \[2, 8, 4\]"):
        causal_convolution(x, weight, None, torch.zeros(2, 8, 3))
    with pytest.raises(ValueError, match="need the scale of x"):
        causal_convolution(x, weight, None, torch.zeros(2, 8, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="needs a state to update"):
        causal_convolution(x, weight, None, update=True)
