"""A scale and a Hadamard transform after it: exact together, and what is stored is the scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.formats import SpecError, WeightSpec
from hf_lowbit.nn import LayerSpec, PackedLinear, Scaling, TransformSpec
from hf_lowbit.nn.transforms import Hadamard, ScaledHadamard

SCALE = torch.logspace(-1, 1, 24).bfloat16().float()
TENSORS = Scaling.stored(SCALE)
BOTH = ScaledHadamard(12)


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(7, 24) * SCALE


def test_it_is_one_transform_after_the_other_and_cancels() -> None:
    x, weight = inputs(), torch.randn(5, 24)
    assert torch.equal(BOTH.inputs(x, TENSORS), Hadamard(12).inputs(x / SCALE, {}))
    read, matrix = BOTH.inputs(x, TENSORS), BOTH.weights(weight, TENSORS)
    torch.testing.assert_close(read @ matrix.t(), x @ weight.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(BOTH.folded(matrix, TENSORS), weight, rtol=1e-5, atol=1e-5)
    assert BOTH.inputs(x.bfloat16(), TENSORS).dtype == torch.bfloat16


def test_a_layer_stores_and_checks_it() -> None:
    torch.manual_seed(0)
    packed = PackedLinear.from_float(nn.Linear(24, 16), LayerSpec(WeightSpec(bits=8)))
    packed.set_transform(BOTH, TENSORS)
    assert TransformSpec.from_dict(BOTH.to_dict()) == BOTH
    assert set(packed.transform_tensors()) == {"scale"}
    assert BOTH.problem(TENSORS, 16, 24) is None
    assert BOTH.problem({"scale": torch.zeros(24, dtype=torch.int16)}, 16, 24) is not None
    with pytest.raises(SpecError, match="do not divide 20"):
        BOTH.companions(16, 20)
    with pytest.raises(SpecError, match="no Hadamard matrix of order 6"):
        ScaledHadamard(6)
