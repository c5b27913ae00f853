"""The Triton scan against the recurrence: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.kernels import Operand, quantize_codes, selective_scan, triton
from tests.kernels.mixers import (
    REAL_SHAPES,
    SHAPES,
    by_tokens,
    cast,
    compare_traced,
    extreme_inputs,
    in_codes,
    lying_apart,
    moved,
    relative,
    restored,
    scan_inputs,
)

INTERPRETED = triton.interpreted()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-4}  # numpy has no bfloat16
if not INTERPRETED:
    TOLERANCE[torch.bfloat16] = 4e-3
FEW = ("mamba", "mamba-2", "odd", "odd, own decays", "one state")  # the interpreter is slow
KINDS = FEW if INTERPRETED else (*SHAPES, *REAL_SHAPES)
LONG = 23 if INTERPRETED else 300  # in segments, or in chunks


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one by one: let each hold more states, and make short prompts long ones."""
    if INTERPRETED:
        from hf_lowbit.kernels.triton import scan_launch

        for name, value in (("_STATES", 1 << 14), ("SEGMENT", 4), ("_CHUNK", 16)):
            monkeypatch.setattr(scan_launch, name, value)


def scanned(peaks_every: int | None = None, **inputs: Any) -> tuple[Tensor, Tensor, Any]:
    """Output, last state and peaks of the Triton kernels, on the CPU."""
    with torch.no_grad():
        output, state, peaks = selective_scan(
            **moved(inputs, DEVICE), return_state=True, peaks_every=peaks_every, backend="triton"
        )
    assert state is not None
    return output.cpu(), state.cpu(), None if peaks is None else peaks.cpu()


def agree(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Outputs and coded states but for the last digit of floats, which may take a code with it."""
    assert relative(result[0], expected[0]) < 4e-6
    assert float((result[1].int() - expected[1].int()).abs().float().mean()) < 1e-3


@pytest.mark.parametrize("shape", KINDS)
def test_equals_the_recurrence(shape: str) -> None:
    for tokens in (1, LONG):
        for dtype, tolerance in list(TOLERANCE.items())[: 1 if INTERPRETED and tokens > 1 else None]:
            inputs = cast(scan_inputs(shape, 2, tokens), dtype)
            expected, last, _ = by_tokens(cast(inputs, torch.float64))
            output, state, _ = scanned(**inputs)
            assert output.dtype == dtype and state.dtype == torch.float32
            assert relative(output, expected) < tolerance
            assert relative(state, last) < tolerance  # of bfloat16, products of factors little finer


@pytest.mark.parametrize("every", (4, 16))
@pytest.mark.parametrize("shape", ("mamba", "mamba-2", "odd"))
def test_peaks(shape: str, every: int) -> None:
    for tokens in (1, LONG):
        inputs = cast(scan_inputs(shape, 2, tokens), torch.float32)
        expected, last, sizes = by_tokens(cast(inputs, torch.float64))
        output, state, peaks = scanned(peaks_every=every, **inputs)
        assert peaks is not None and relative(output, expected) < 2e-6 and relative(state, last) < 2e-6
        assert relative(peaks, torch.stack([part.amax(1) for part in sizes.split(every, 1)], 1)) < 2e-6


@pytest.mark.parametrize("clusters", (1, 5))
@pytest.mark.parametrize("shape", KINDS)
def test_codes(shape: str, clusters: int) -> None:
    for tokens in (1, LONG):
        coded = in_codes(scan_inputs(shape, 2, tokens, torch.float32), clusters)
        expected, last, _ = by_tokens(restored(coded))
        output, state, _ = scanned(**coded)
        assert output.dtype == torch.float32 and relative(output, expected) < 1e-5
        codes = quantize_codes(last, coded["state_scale"][coded["state_cluster"]])
        assert state.dtype == torch.int8
        assert float((state.int() - codes.int()).abs().float().mean()) < 1e-3  # ties may fall either way
        own = moved(coded, DEVICE)
        with torch.no_grad():
            kept = selective_scan(**own, update=True, backend="triton").state
        assert kept is own["state"] and torch.equal(kept.cpu(), state)


@pytest.mark.parametrize("shape", ("mamba", "mamba-2"))
def test_goes_on_where_it_stopped(shape: str) -> None:
    inputs = moved(cast(scan_inputs(shape, 2, LONG), torch.float32), DEVICE)
    with torch.no_grad():
        whole = selective_scan(**inputs, return_state=True, backend="triton")
        state, outputs = inputs.pop("state").clone(), []
        for part in (slice(0, 11), slice(11, 12), slice(12, LONG)):
            own = {k: Operand(v.values[:, part]) if isinstance(v, Operand) else v for k, v in inputs.items()}
            result = selective_scan(**own, state=state, update=True, backend="triton")
            assert result.state is state
            outputs.append(result.output)
    assert whole.state is not None
    assert relative(torch.cat(outputs, 1), whole.output) < 1e-5 and relative(state, whole.state) < 1e-5


@pytest.mark.parametrize("shape", ("mamba", "mamba-2"))
def test_without_what_may_be_missing(shape: str) -> None:
    inputs = cast(scan_inputs(shape, 2, LONG), torch.float32)
    open_gate = Operand(torch.full_like(inputs["x"].values, 50.0))  # whose SiLU is 50 as well
    zeros = {name: torch.zeros_like(inputs[name]) for name in ("D", "dt_bias", "state")}
    expected, last, _ = by_tokens(cast(inputs | zeros | {"z": open_gate}, torch.float64))
    output, state, _ = scanned(**inputs | dict.fromkeys(("z", *zeros)))
    assert relative(50 * output, expected) < 1e-5 and relative(state, last) < 1e-5


def test_floats_are_rounded_to_the_same_codes() -> None:
    for shape in ("odd", "mamba-2"):
        inputs = cast(scan_inputs(shape, 2, LONG), torch.float32)
        coded = in_codes(inputs, clusters=1)
        rounded = {k: Operand(inputs[k].values, v.scale) if isinstance(v, Operand) else v for k, v in coded.items()}
        agree(scanned(**rounded), scanned(**coded))


def test_one_scale_for_all_states_of_a_cluster() -> None:
    coded = in_codes(scan_inputs("mamba-2", 2, 3, torch.float32), clusters=2)
    coded["state_scale"] = coded["state_scale"][:, :1].contiguous()
    many = coded | {"state_scale": coded["state_scale"].repeat(1, 64)}
    agree(scanned(**coded), scanned(**many))


@pytest.mark.parametrize("tokens", (3, LONG))
def test_reads_what_lies_apart(tokens: int) -> None:
    inputs = moved(cast(scan_inputs("mamba-2", 2, tokens), torch.float32), DEVICE)
    for other in lying_apart(inputs):
        for result, expected in zip(scanned(**{**inputs, **other})[:2], scanned(**inputs)[:2], strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_a_token_that_is_not_finite_touches_no_earlier_one(value: float) -> None:
    inputs = cast(scan_inputs("mamba", 2, 9), torch.float32)
    expected = scanned(**inputs)[0]
    inputs["x"].values[0, 5, 3] = value
    output = scanned(**inputs)[0]
    assert torch.equal(output[0, :5], expected[0, :5]) and torch.equal(output[1], expected[1])
    assert not torch.isfinite(output[0, 5:, 3]).any()


def test_extreme_steps_and_gates() -> None:
    inputs = extreme_inputs()
    output, state, _ = scanned(**inputs)
    expected, last, _ = by_tokens(cast(inputs, torch.float64))
    assert relative(output, expected) < 1e-5 and relative(state, last) < 1e-5


def test_small_steps_keep_their_digits() -> None:
    """softplus of very negative numbers is their exponential, not a rounded logarithm of nearly one."""
    dt = torch.linspace(-16, -2, 20).expand(1, 1, 20)
    inputs = cast(scan_inputs("mamba", 1, 1), torch.float32) | {"dt_limit": (0.0, float("inf")), "dt_bias": None}
    inputs |= {"dt": Operand(dt), "state": torch.zeros(1, 20, 16), "x": Operand(torch.ones(1, 1, 20))}
    _, state, _ = scanned(**inputs)
    expected = torch.nn.functional.softplus(dt.double()).mT * inputs["B"].values.double()[:, 0]
    torch.testing.assert_close(state.double(), expected, rtol=2e-6, atol=0)


def test_long_prompts_take_little_memory() -> None:
    """Spans whose states between chunks would be too many are scanned one after the other."""
    from hf_lowbit.kernels.triton import state_space

    for shape in ("mamba", "mamba-2"):
        inputs = in_codes(cast(scan_inputs(shape, 2, LONG), torch.float32), clusters=3)
        expected = scanned(**inputs)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state_space, "MOST_STATES", 2 * inputs["state"].numel())
            result = scanned(**inputs)
        agree(result, expected)


def test_gradients_go_through_the_reference() -> None:
    inputs = moved(cast(scan_inputs("mamba-2", 1, 3), torch.float32), DEVICE)
    inputs["x"].values.requires_grad_()
    selective_scan(**inputs, backend="triton").output.sum().backward()
    given = inputs["x"].values.grad
    inputs["x"].values.grad = None
    selective_scan(**inputs, backend="reference").output.sum().backward()
    assert given is not None and torch.equal(given, inputs["x"].values.grad)


@pytest.mark.parametrize("coded", (False, True))
def test_is_traced_whole_and_equal(coded: bool) -> None:
    compare_traced(coded, "triton", DEVICE)
