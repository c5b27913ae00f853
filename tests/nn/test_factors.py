"""Low-rank factors of 8 and 4 bits inside every kind of packed module."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_lowbit.formats import SpecError, WeightSpec
from hf_lowbit.nn import CorruptWeightError, LayerSpec, PackedModule
from tests.nn.test_experts import EXPERTS, HIDDEN, INTERMEDIATE, qwen, routed

Pack = Callable[[nn.Module, LayerSpec], PackedModule]
WEIGHT = WeightSpec("int", 2, 16)
INPUTS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "linear": (lambda: nn.Linear(64, 48), (torch.linspace(-1, 1, 5 * 64).reshape(5, 64),)),
    "transposed": (lambda: Conv1D(48, 64), (torch.linspace(-1, 1, 5 * 64).reshape(5, 64),)),
    "embedding": (lambda: nn.Embedding(96, 32), (torch.arange(7),)),
    "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), (torch.linspace(-1, 1, 16 * 36).reshape(1, 16, 6, 6),)),
    "grouped conv": (lambda: nn.Conv2d(32, 24, 3, groups=2), (torch.linspace(-1, 1, 32 * 36).reshape(1, 32, 6, 6),)),
    "experts": (qwen, routed()),
}


@pytest.fixture(params=INPUTS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    make, inputs = INPUTS[request.param]
    torch.manual_seed(0)
    return make(), inputs


def test_what_runs_is_what_is_stored(case: tuple[nn.Module, tuple[Tensor, ...]], pack: Pack) -> None:
    """The packed layer computes what the float layer with its dequantized weight does, closer than without."""
    (module, inputs), bits = case, 8
    packed = pack(module, LayerSpec(WEIGHT, low_rank=8, factor_bits=bits))
    plain = pack(module, LayerSpec(WEIGHT))
    with torch.no_grad():
        expected, output = packed.to_float(torch.float32)(*inputs), packed(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    for name in packed.packed_parameters:
        weight = getattr(module, name).detach()
        assert (packed.dequantized(name) - weight).norm() < 0.95 * (plain.dequantized(name) - weight).norm()
        stored = packed.companion_shapes(name)
        assert stored[f"{name}_low_rank_a"][1] == stored[f"{name}_low_rank_b"][1] == torch.int32
        (*_, rows), columns = packed.matrix_shape(name)
        words = sum(torch.Size(stored[f"{name}_low_rank_{part}"][0]).numel() for part in "ab")
        matrices = EXPERTS if len(packed.matrix_shape(name)[0]) == 2 else 1
        assert words >= matrices * 8 * (rows + packed.branches(name) * columns) * bits / 32
    packed.check()


def test_factors_of_fewer_bits_are_nearly_as_good(pack: Pack) -> None:
    torch.manual_seed(0)
    module = nn.Linear(96, 64)
    errors = {
        bits: (pack(module, LayerSpec(WEIGHT, low_rank=8, factor_bits=bits)).dequantized() - module.weight).norm()
        for bits in (16, 8, 4)
    }
    assert errors[16] <= errors[8] < 1.01 * errors[16] and errors[4] < 1.05 * errors[16]


def test_experts_keep_their_matrices_first(pack: Pack) -> None:
    """So that transformers can merge gate and up along the second dimension, and split them again."""
    module = pack(qwen(), LayerSpec(WEIGHT, low_rank=3, factor_bits=8))
    assert module.gate_up_proj_low_rank_a.shape == (EXPERTS, 2 * 3, HIDDEN // 4)
    assert module.gate_up_proj_low_rank_b.shape == (EXPERTS, 2 * 3, INTERMEDIATE // 4)
    assert module.gate_up_proj_low_rank_b_scale.shape == (EXPERTS, 2 * 3, 1)


def test_damage_is_found(pack: Pack) -> None:
    module = pack(nn.Linear(64, 48), LayerSpec(WEIGHT, low_rank=4, factor_bits=8))
    module.weight_low_rank_a_scale[0, 0] = 0x7FC0  # NaN
    with pytest.raises(CorruptWeightError, match="weight_low_rank_a_scale holds NaN"):
        module.check()
    other = pack(nn.Linear(64, 48), LayerSpec(WEIGHT, low_rank=4, factor_bits=8))
    other.weight_low_rank_b = nn.Parameter(other.weight_low_rank_b[:2], requires_grad=False)
    with pytest.raises(CorruptWeightError, match="weight_low_rank_b is"):
        other.check()


def test_the_specification_round_trips() -> None:
    spec = LayerSpec(WEIGHT, low_rank=4, factor_bits=8)
    assert LayerSpec.from_dict(spec.to_dict()) == spec and spec.to_dict()["factor_bits"] == 8
    assert "factor_bits" not in LayerSpec(WEIGHT, low_rank=4).to_dict()
    assert LayerSpec(WEIGHT, factor_bits=8) == LayerSpec(WEIGHT)  # no factors, no width of theirs
    with pytest.raises(SpecError, match="factor_bits must be one of 16, 8, 4"):
        LayerSpec(WEIGHT, low_rank=4, factor_bits=2)
