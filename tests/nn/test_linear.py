"""Packed linear layers with quantized inputs and branches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.kernels import packed_linear
from hf_lowbit.nn import LayerSpec, PackedModule

Pack = Callable[[nn.Module, LayerSpec], PackedModule]
every_class = pytest.mark.parametrize(
    "make", [lambda: nn.Linear(32, 24), lambda: Conv1D(24, 32)], ids=["linear", "conv1d"]
)
ACTIVATIONS = [ActivationSpec("int", 4), ActivationSpec("int", 8), ActivationSpec("float8_e4m3fn", 8)]


@every_class
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.format}{a.bits}")
@pytest.mark.parametrize("low_rank", [0, 4])
def test_only_the_packed_product_sees_rounded_inputs(
    make: Callable[[], nn.Module], activation: ActivationSpec, low_rank: int, pack: Pack
) -> None:
    """The branch multiplies the input as it is."""
    module = pack(make(), LayerSpec(WeightSpec(), activation, low_rank))
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    branch = module.dequantized() - module.dequantized(branch=False)
    branch = branch.t() if isinstance(make(), Conv1D) else branch
    expected = packed_linear(x, module.packed(), activation) + F.linear(x, branch) + module.bias
    assert torch.allclose(module(x), expected, atol=1e-5)


@every_class
def test_a_float32_bias_does_not_widen_the_output(make: Callable[[], nn.Module], pack: Pack) -> None:
    module = pack(make(), LayerSpec(WeightSpec()))
    assert module.bias.dtype == torch.float32
    assert module(torch.randn(2, 32).bfloat16()).dtype == torch.bfloat16


def test_tools_that_look_for_linear_layers_find_it(pack: Pack) -> None:
    module = pack(nn.Linear(32, 24), LayerSpec(WeightSpec()))
    assert isinstance(module, nn.Linear) and (module.in_features, module.out_features) == (32, 24)


def test_conv1d_is_packed_along_its_input(pack: Pack) -> None:
    original = Conv1D(24, 32)
    module = pack(original, LayerSpec(WeightSpec("int", 8)))
    assert module.weight.shape == (24, 8)
    assert (module.nf, module.nx) == (24, 32)
    assert torch.allclose(module.dequantized(), original.weight, atol=0.001)


def test_unpacked_modules_say_so() -> None:
    from hf_lowbit.nn import PackedLinear

    module = PackedLinear.from_float(nn.Linear(32, 24), LayerSpec(WeightSpec()))
    assert not module.is_packed() and module.weight.is_floating_point()
