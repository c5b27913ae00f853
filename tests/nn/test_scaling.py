"""The smoothing scale of a layer's input at run time: exact, stored with the plan, and read by the branch too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.nn import CorruptWeightError, LayerSpec, PackedLinear, Scaling, TransformSpec
from hf_lowbit.rounding import round_to_nearest

SCALE = torch.logspace(-2, 2, 64).bfloat16().float()


def layer(spec: LayerSpec) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    packed = PackedLinear.from_float(linear, spec)
    packed.set_transform(Scaling(), Scaling.stored(SCALE))
    return linear, packed


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(7, 64) * SCALE


def test_weights_and_inputs_cancel() -> None:
    """x / s and W diag(s), not the other way round."""
    linear, packed = layer(LayerSpec(WeightSpec(bits=8)))
    matrix, x = packed.to_matrix("weight", linear.weight), inputs()
    torch.testing.assert_close(matrix, linear.weight * SCALE)
    torch.testing.assert_close(packed.transformed(x), x / SCALE)
    torch.testing.assert_close(packed.transformed(x) @ matrix.t(), x @ linear.weight.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.from_matrix("weight", matrix), linear.weight)
    assert packed.transformed(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("activation", [None, ActivationSpec("int", 8, group_size=64)], ids=["W8A16", "W8A8"])
def test_the_branch_reads_the_scaled_input(activation: ActivationSpec | None) -> None:
    """Factors in scaled coordinates: a full-rank branch makes the layer exact whatever the codes lose."""
    linear, packed = layer(LayerSpec(WeightSpec(bits=2, group_size=64), activation, 48))
    matrix = packed.to_matrix("weight", linear.weight.detach())
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    a, b = vh.bfloat16().float(), (u * s).bfloat16().float()
    packed.set_low_rank_factors("weight", a, b)
    packed.set_packed("weight", round_to_nearest(matrix - b @ a, packed.layer_spec.weight))
    x = inputs()
    torch.testing.assert_close(
        packed(x), linear(x).detach(), rtol=0.02, atol=0.02 * float(linear(x).detach().abs().max())
    )
    torch.testing.assert_close(packed.dequantized(), linear.weight.detach(), rtol=0, atol=0.01)
    dense = packed.to_float(torch.float32)
    if activation is None:
        torch.testing.assert_close(packed(x), dense(x), rtol=1e-3, atol=1e-3)


def test_it_is_plain_data_with_positive_scales(tmp_path: Path) -> None:
    assert TransformSpec.from_dict(Scaling().to_dict()) == Scaling()
    linear, packed = layer(LayerSpec(WeightSpec(bits=8)))
    packed.set_packed("weight", round_to_nearest(packed.to_matrix("weight", linear.weight), packed.layer_spec.weight))
    packed.check()
    packed.weight_transform_scale[3] = 0
    with pytest.raises(CorruptWeightError, match="scale holds values that are not positive"):
        packed.check()


def test_gradients_reach_the_input() -> None:
    linear, packed = layer(LayerSpec(WeightSpec(bits=8)))
    packed.set_packed("weight", round_to_nearest(packed.to_matrix("weight", linear.weight), packed.layer_spec.weight))
    x = inputs().requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], packed.dequantized().sum(0), rtol=1e-3, atol=1e-3)
