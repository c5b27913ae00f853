"""Convolutions that quantize before they unfold: the same codes, and the same products, as of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.kernels import products, restore_tokens
from hf_lowbit.kernels.activation import integer_grid, quantize_tokens
from hf_lowbit.nn import LayerSpec, PackedModule
from hf_lowbit.nn.quantized_image import reads_image
from hf_lowbit.nn.timestep import at_timestep

Pack = Callable[[nn.Module, LayerSpec], PackedModule]
CONVOLUTIONS: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "3x3": (nn.Conv2d, (8, 12, 3), {"padding": 1}, (8, 6, 7)),
    "1x1": (nn.Conv2d, (8, 12, 1), {}, (8, 6, 7)),
    "1x1 stride": (nn.Conv2d, (8, 12, 1), {"stride": 2}, (8, 6, 7)),
    "stride": (nn.Conv2d, (8, 12, 3), {"stride": (2, 1), "padding": (0, 2)}, (8, 9, 7)),
    "dilation": (nn.Conv2d, (8, 12, (3, 2)), {"dilation": (1, 2), "padding": 2}, (8, 9, 7)),
    "reflect": (nn.Conv2d, (8, 12, 3), {"padding": 1, "padding_mode": "reflect"}, (8, 6, 7)),
    "same": (nn.Conv2d, (8, 12, 3), {"padding": "same", "bias": False}, (8, 6, 7)),
    "1d": (nn.Conv1d, (8, 12, 3), {"stride": 2, "padding": 1}, (8, 30)),
}
INPUTS = {
    "symmetric": ActivationSpec("int", 8, static=True),
    "asymmetric": ActivationSpec("int", 8, False, static=True),
    "6 bits": ActivationSpec("int", 6, False, static=True),
    "float8": ActivationSpec("float8_e4m3fn", 8, static=True),
    "timesteps": ActivationSpec("int", 8, False, static=True, timesteps=(900, 500, 100)),
}


def quantized(pack: Pack, name: str, activation: ActivationSpec, **weight: Any) -> tuple[PackedModule, Tensor]:
    torch.manual_seed(0)
    cls, args, kwargs, shape = CONVOLUTIONS[name]
    layer = pack(cls(*args, **kwargs), LayerSpec(WeightSpec(**weight), activation))
    x = torch.nn.functional.silu(3 * torch.randn(6, *shape))
    rows, groups = len(activation.timesteps or (0,)), activation.groups(layer.matrix_shape("weight")[1])
    high = x.max() * torch.linspace(1, 0.3, rows * groups)
    if activation.has_shift:
        layer.set_input_scale("weight", *integer_grid(x.min().expand_as(high), high, activation.bits))
    else:
        layer.set_input_scale("weight", high / activation.limit)
    return layer, x


def of_patches(layer: PackedModule, x: Tensor) -> Tensor:
    """The layer by the other way: one with a product of its own unfolds floats."""
    layer.multiply = layer.multiply  # type: ignore[method-assign]
    assert not reads_image(layer, x)  # type: ignore[arg-type]
    y: Tensor = layer(x)
    del layer.__dict__["multiply"]
    return y


@pytest.mark.parametrize(
    "form",
    [
        {"bits": 8, "group_size": None},
        {"bits": 4, "group_size": "tensor"},
        {"bits": 3, "group_size": None},
        {"format": "nf", "bits": 4, "group_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_it_is_the_product_of_patches(pack: Pack, name: str, activation: ActivationSpec, form: dict[str, Any]) -> None:
    layer, x = quantized(pack, name, activation, **form)
    assert reads_image(layer, x)  # type: ignore[arg-type]
    with at_timestep(torch.tensor([900, 900, 480, 120, 500, 3])):
        y, expected = layer(x), of_patches(layer, x)
    assert y.shape == expected.shape and (y - expected).abs().max() < 2e-6 * expected.abs().max()


@torch.no_grad()
def test_few_positions_are_not_worth_unpacking(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = quantized(pack, "3x3", INPUTS["asymmetric"], format="nf", bits=4, group_size=None)
    expected = of_patches(layer, x)
    monkeypatch.setattr(products, "sliced_linear", None)
    y = layer(x[:1, :, :3, :4])  # as many positions as rows
    inner = expected[:1, :, :2, :3]  # which do not see what was cut
    assert (y[..., :2, :3] - inner).abs().max() < 2e-6 * expected.abs().max()
    with pytest.raises(TypeError):
        layer(x[:1, :, :3, :5])


@pytest.mark.parametrize("size", [36, 18, 9])
@torch.no_grad()
def test_groups_of_channels(pack: Pack, size: int) -> None:
    activation = ActivationSpec("int", 8, False, size, static=True)
    layer, x = quantized(pack, "3x3", activation, bits=4, group_size=36)
    y, expected = layer(x), of_patches(layer, x)
    assert (y - expected).abs().max() < 2e-6 * expected.abs().max()


@torch.no_grad()
def test_padded_zeros_are_zero(pack: Pack) -> None:
    """As codes they are not: against the float convolution of what the codes stand for."""
    layer, x = quantized(pack, "3x3", INPUTS["asymmetric"], bits=8, group_size=None)
    tokens = quantize_tokens(x.reshape(1, -1), INPUTS["asymmetric"], *layer.input_table())
    assert not (tokens.codes == 0).all() and float(layer.input_table()[1]) != 0  # type: ignore[arg-type]
    read = restore_tokens(*tokens).reshape(x.shape)
    expected = layer.to_float(torch.float32)(read)
    assert (layer(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_sample_that_is_not_finite_is_not_hidden(pack: Pack) -> None:
    layer, x = quantized(pack, "3x3", INPUTS["asymmetric"], bits=8, group_size=None)
    x[1, 0, 3, 3] = torch.nan
    y = layer(x)
    assert y[1].isnan().any() and torch.isfinite(y[[0, 2, 3, 4, 5]]).all()


def test_gradients_take_the_other_way(pack: Pack) -> None:
    layer, x = quantized(pack, "3x3", INPUTS["asymmetric"], bits=8, group_size=None)
    x.requires_grad_()
    assert not reads_image(layer, x)  # type: ignore[arg-type]
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
