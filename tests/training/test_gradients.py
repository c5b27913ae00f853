"""Backward through packed layers: the gradient of the dequantized layer, and never a dense copy of its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lowbit import RTNConfig, quantize
from hf_lowbit.formats import WeightSpec, packed
from hf_lowbit.kernels import BACKENDS, autograd, cpu, packed_linear, reference, why_not
from hf_lowbit.nn import KINDS, Hadamard, LayerSpec, PackedModule, kind_of
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.tensorwise import pack_parameter
from tests.training.formats import FORMATS

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 48),
    "transformers_conv1d": lambda: Conv1D(48, 64),
    "conv1d": lambda: nn.Conv1d(16, 24, 4, stride=2),
    "conv2d": lambda: nn.Conv2d(16, 24, 3, dilation=2),
    "grouped": lambda: nn.Conv2d(32, 24, 3, groups=2, padding=1),
}
INPUTS = {"conv1d": (2, 16, 90), "conv2d": (2, 16, 11, 12), "grouped": (2, 32, 9, 9)}


def gradients(layer: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of its input, for a fixed input and a fixed gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(INPUTS.get(name, (3, 40, 64)), generator=generator).to(dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator).to(dtype))
    assert x.grad is not None and x.grad.dtype == dtype
    return x.grad


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if why_not(backend) is None])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("fields", FORMATS.values(), ids=list(FORMATS))
def test_gradients_are_those_of_the_dequantized_layer(fields: dict[str, Any], name: str, backend: str) -> None:
    config = RTNConfig(**{"group_size": 16, **fields, "backend": backend})
    module = quantize(nn.Sequential(LAYERS[name]()), config)[0]
    assert isinstance(module, PackedModule)
    expected = gradients(module.to_float(torch.float32), name)
    torch.testing.assert_close(gradients(module, name), expected, rtol=1e-4, atol=1e-4)
    narrow = gradients(module, name, torch.bfloat16)
    assert (narrow.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("low_rank", [0, 4])
def test_gradients_through_a_transform(low_rank: int) -> None:
    layer = nn.Linear(64, 48)
    module = KINDS[str(kind_of(layer))].from_float(layer, LayerSpec(WeightSpec(bits=3), low_rank=low_rank))
    module.set_transform(Hadamard(64))
    matrix = module.to_matrix("weight", layer.weight.detach())
    pack_parameter(module, "weight", layer.weight.detach(), round_to_nearest(matrix, module.layer_spec.weight), "layer")
    expected = gradients(module.to_float(torch.float32), "linear")
    torch.testing.assert_close(gradients(module, "linear"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [FORMATS["int4"], FORMATS["codebook"], FORMATS["branch"]])
def test_gradients_through_experts(fields: dict[str, Any]) -> None:
    from tests.nn.test_experts import HIDDEN, qwen, routed

    model = quantize(nn.Sequential(qwen()), RTNConfig(**{"group_size": 16, **fields}))
    tokens, index, weights = routed()
    found = []
    for module in (model[0], model[0].to_float(torch.float32)):
        x, share = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        module(x, index, share).backward(torch.linspace(-1, 1, 9 * HIDDEN).reshape(9, HIDDEN))
        found.append((x.grad, share.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many weights each call decodes, wherever that is done."""
    sizes: list[int] = []

    def counted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **named: Any) -> Tensor:
            result = function(*arguments, **named)
            sizes.append(result.numel())
            return result

        return call

    monkeypatch.setattr(cpu, "decode_rows", counted(cpu.decode_rows))
    for module in (packed, reference):
        monkeypatch.setattr(module, "decode_rows", counted(module.decode_rows))
    yield sizes


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if why_not(backend) is None])
@pytest.mark.parametrize("format", ["int", "nf"])
def test_backward_decodes_tiles(format: str, backend: str, decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of a large weight, each weight once; of a coded second level as well."""
    monkeypatch.setattr(reference, "_TILE_ELEMENTS", 1 << 19)
    rows, columns = 4096, 512
    weight = round_to_nearest(torch.randn(rows, columns), WeightSpec(format, 4, 64, scale_bits=8))
    x = torch.randn(40, columns, requires_grad=True)
    y = packed_linear(x, weight, backend=backend)
    decoded.clear()
    y.sum().backward()
    assert sum(decoded) == rows * columns and max(decoded) <= rows * columns // 2
    dense = packed.decode(weight)
    torch.testing.assert_close(x.grad, dense.sum(0).expand(40, -1), rtol=1e-3, atol=1e-2)


def test_a_convolution_keeps_codes_and_decodes_them_again(decoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lowbit.nn import conv

    monkeypatch.setattr(conv, "_DECODED_BYTES", 1 << 16)
    module = quantize(nn.Sequential(nn.Conv2d(64, 128, 3)), RTNConfig(bits=4, group_size=64))[0]
    x = torch.randn(2, 64, 12, 12, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = module(x)
    assert not kept or max(kept) < 64 * 128 * 9
    forward, parts = list(decoded), len(decoded)
    y.sum().backward()
    assert parts > 4 and decoded == forward * 2
    plain, z = module.to_float(torch.float32), x.detach().clone().requires_grad_()
    plain(z).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-3)


def test_parts_of_a_convolution_are_summed_in_float32() -> None:
    weight = torch.randn(512, 8, 3)
    parts = [slice(i, i + 1) for i in range(512)]
    x = torch.randn(1, 8, 5, dtype=torch.bfloat16, requires_grad=True)
    y = autograd.DecodedConvolution.apply(x, lambda own: weight[own].bfloat16(), parts, ((1,), (1,), 1))
    y.backward(torch.ones_like(y))
    exact = torch.nn.grad.conv1d_input(x.shape, weight.bfloat16().float(), torch.ones(1, 512, 3))
    assert (x.grad.float() - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("activation", [None, 8])
def test_under_autocast_a_packed_layer_computes_in_its_type(activation: int | None) -> None:
    layer = nn.Linear(64, 48)
    module = quantize(nn.Sequential(layer), RTNConfig(bits=4, group_size=16, activation_bits=activation))[0]
    x = torch.randn(3, 40, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    expected = module.dequantized().sum(0).expand(3, 40, -1)
    assert (x.grad - expected).norm() < 0.02 * expected.norm()
