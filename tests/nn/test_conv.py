"""Packed convolutions: every geometry of torch's, with and without quantized inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.nn import LayerSpec, PackedModule, conv

Pack = Callable[[nn.Module, LayerSpec], PackedModule]
GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": 2},
    {"padding": 2},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": "same", "dilation": 2},
    {"padding": 1, "dilation": 2, "stride": 3},
    {"groups": 4},
    {"groups": 8, "padding": 1},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "stride": 2},
    {"padding": 1, "padding_mode": "replicate", "groups": 2},
    {"padding": "same", "padding_mode": "reflect"},
    {"bias": False},
]
every_geometry = pytest.mark.parametrize(
    "geometry", GEOMETRIES, ids=lambda g: "-".join(f"{k}={v}" for k, v in g.items()) or "plain"
)
every_size = pytest.mark.parametrize("dimensions", [1, 2])


def convolution(dimensions: int, geometry: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    if dimensions == 1:
        return nn.Conv1d(8, 16, 3, **geometry)
    return nn.Conv2d(8, 16, (3, 2), **geometry)


def signal(dimensions: int, batch: bool = True) -> Tensor:
    shape = (2, 8, 11) if dimensions == 1 else (2, 8, 9, 12)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x if batch else x[0]


@every_geometry
@every_size
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("low_rank", [0, 2])
def test_equals_torch_with_dequantized_weights(
    dimensions: int, geometry: dict[str, Any], batch: bool, low_rank: int, pack: Pack
) -> None:
    module = pack(convolution(dimensions, geometry), LayerSpec(WeightSpec(), low_rank=low_rank))
    x = signal(dimensions, batch)
    expected = module.to_float(torch.float32)(x)
    y = module(x)
    assert y.shape == expected.shape
    assert torch.allclose(y, expected, atol=1e-5)


@every_geometry
@every_size
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("low_rank", [0, 2])
def test_quantized_patches_stay_close_to_full_precision(
    dimensions: int, geometry: dict[str, Any], batch: bool, low_rank: int, pack: Pack
) -> None:
    spec = LayerSpec(WeightSpec(), ActivationSpec("int", 8), low_rank)
    module = pack(convolution(dimensions, geometry), spec)
    x = signal(dimensions, batch)
    expected = module.to_float(torch.float32)(x)
    y = module(x)
    assert y.shape == expected.shape
    assert (y - expected).norm() < 0.01 * expected.norm()


@every_size
@pytest.mark.parametrize("group_size", [None, "tensor", 3])
def test_patches_that_need_no_rounding_are_exact(dimensions: int, group_size: Any, pack: Pack) -> None:
    """Inputs of -1, 0, 1 are on every patch's grid, so that only the layout can be wrong."""
    module = pack(
        convolution(dimensions, {"groups": 2, "padding": 1, "stride": 2}),
        LayerSpec(WeightSpec("int", 4, group_size), ActivationSpec()),
    )
    x = signal(dimensions).sign()
    assert torch.allclose(module(x), module.to_float(torch.float32)(x), atol=1e-5)


@every_size
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_patches_in_narrow_types(dimensions: int, dtype: torch.dtype, pack: Pack) -> None:
    module = pack(convolution(dimensions, {"padding": 1}), LayerSpec(WeightSpec(), ActivationSpec())).to(dtype)
    x = signal(dimensions).to(dtype)
    expected = module.to_float(torch.float32).float()(x.float())
    y = module(x)
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < 0.02 * expected.norm()


@every_size
def test_gradient_reaches_the_input(dimensions: int, pack: Pack) -> None:
    for activation in (None, ActivationSpec()):
        module = pack(convolution(dimensions, {"padding": 1, "groups": 2}), LayerSpec(WeightSpec(), activation))
        x, y = (signal(dimensions).requires_grad_() for _ in range(2))
        upstream = torch.randn_like(module(x))
        module(x).backward(upstream)
        module.to_float(torch.float32)(y).backward(upstream)
        assert x.grad is not None and y.grad is not None
        assert torch.allclose(x.grad, y.grad, atol=1e-4)


@every_size
def test_an_empty_batch(dimensions: int, pack: Pack) -> None:
    for activation in (None, ActivationSpec()):
        module = pack(convolution(dimensions, {}), LayerSpec(WeightSpec(), activation))
        assert module(signal(dimensions)[:0]).shape == module.to_float(torch.float32)(signal(dimensions)[:0]).shape


@pytest.mark.parametrize("size, unfolded", [((5, 8), True), ((9, 12), False)])  # 21 and 77 output positions
def test_few_positions_are_unfolded_not_decoded(
    size: tuple[int, int], unfolded: bool, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pack(convolution(2, {}), LayerSpec(WeightSpec()))
    x = torch.randn(1, 8, *size, generator=torch.Generator().manual_seed(2))
    expected = module.to_float(torch.float32)(x)
    decoded = []
    original = module._convolve_decoded
    monkeypatch.setattr(module, "_convolve_decoded", lambda padded: decoded.append(1) or original(padded))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
    assert bool(decoded) != unfolded


@pytest.mark.parametrize("low_rank", [0, 2])
def test_large_kernels_are_decoded_in_parts(low_rank: int, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "_DECODED_BYTES", 1)  # sixteen channels at a time
    torch.manual_seed(0)
    module = pack(nn.Conv2d(8, 40, (3, 2), stride=2), LayerSpec(WeightSpec(), low_rank=low_rank))
    x = torch.randn(3, 8, 9, 12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(module(x), module.to_float(torch.float32)(x), rtol=1e-4, atol=1e-5)
