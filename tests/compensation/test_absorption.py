"""SVDQuant's decomposition: the numbered tests of its method page, its table among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_lowbit.compensation import low_rank_factors
from hf_lowbit.compensation.absorption import Absorbed, Part, absorb, sketched_factors
from hf_lowbit.formats import ActivationSpec, WeightSpec, decode
from hf_lowbit.kernels.activation import quantize_tokens, restore_tokens
from hf_lowbit.nn import LayerSpec
from hf_lowbit.transforms.scales import smoothing_scale

W4 = WeightSpec("int", 4, 64)
A4 = ActivationSpec("int", 4, group_size=64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(weight: Tensor, rank: int, activation: ActivationSpec | None = A4, **more: Any) -> Part:
    return Part(weight, LayerSpec(W4, activation, rank), **more)


def outputs(found: Absorbed, inputs: Tensor, activation: ActivationSpec | None = A4) -> Tensor:
    (a, b), codes = found.factors[0], decode(found.packed[0])
    read = inputs if activation is None else restore_tokens(*quantize_tokens(inputs, activation))
    return read @ codes.t() + inputs @ a.t() @ b.t()


def relative(found: Absorbed, weight: Tensor, inputs: Tensor, activation: ActivationSpec | None = A4) -> float:
    right = inputs @ weight.t()
    return ((outputs(found, inputs, activation) - right).norm() / right.norm()).item()


def toy() -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs with eight of 512 channels thirty times as large, and SmoothQuant's scale."""
    weight, inputs = normal(512, 512) / 512**0.5, normal(1024, 512, seed=1)
    inputs[:, ::64] *= 30
    return weight, inputs, smoothing_scale(inputs.abs().amax(0), weight.abs().amax(0), 0.5)


def largest(matrix: Tensor) -> float:
    """Mean over groups of the largest magnitude."""
    return matrix.unflatten(1, (-1, 64)).abs().amax(-1).mean().item()


# 1
@pytest.mark.parametrize("activation", [None, A4], ids=["W4A16", "W4A4"])
@pytest.mark.parametrize("bits", [2, 4])
def test_full_rank_is_exact_whatever_the_bits(bits: int, activation: ActivationSpec | None) -> None:
    weight, inputs = normal(48, 64), normal(32, 64, seed=1)
    found = absorb([Part(weight, LayerSpec(WeightSpec("int", bits, 64), activation, 48))], inputs)
    assert relative(found, weight, inputs, activation) < 2e-3


def test_rank_zero_is_rounding_alone() -> None:
    weight = normal(64, 128)
    found = absorb([part(weight, 0)], normal(32, 128, seed=1), iterations=5)
    assert torch.equal(found.residuals[0], weight) and found.factors[0][0].shape == (0, 128)


def test_errors_do_not_grow_with_the_rank() -> None:
    weight, inputs = normal(64, 128) @ normal(128, 128, seed=2), normal(64, 128, seed=1)
    errors = [absorb([part(weight, rank, None)], inputs).error for rank in (0, 4, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True)


# 2
def test_the_table_of_the_method_page() -> None:
    """Smoothing helps most, then the branch, and the branch alone little."""
    weight, inputs, scale = toy()
    smooth = (weight * scale, inputs / scale)
    errors = {
        "rtn": relative(absorb([part(weight, 0)], inputs), weight, inputs),
        "branch alone": relative(absorb([part(weight, 32)], inputs), weight, inputs),
        **{f"rank {r}": relative(absorb([part(smooth[0], r)], smooth[1]), *smooth) for r in (0, 16, 32, 64)},
    }
    page = {"rtn": 0.198, "branch alone": 0.176, "rank 0": 0.094, "rank 16": 0.061, "rank 32": 0.057, "rank 64": 0.051}
    assert sorted(errors, key=errors.__getitem__) == sorted(page, key=page.__getitem__)
    assert errors == pytest.approx(page, rel=0.15)


# 3
def test_turns_never_end_worse_than_one() -> None:
    weight, inputs, scale = toy()
    once, often = (absorb([part(weight * scale, 16)], inputs / scale, iterations=n) for n in (1, 20))
    assert often.error <= once.error
    assert (
        absorb([part(weight, 16, None)], inputs, iterations=20).error < absorb([part(weight, 16, None)], inputs).error
    )


# 4
def test_residuals_are_smaller_than_weights() -> None:
    weight, inputs, scale = toy()
    (rest,) = absorb([part(weight * scale, 32)], inputs / scale).residuals
    assert rest.norm() < 0.85 * (weight * scale).norm()
    assert largest(rest) < 0.7 * largest(weight * scale)


# 5
def test_layers_of_one_input_share_a() -> None:
    weights, inputs = [normal(rows, 128, seed=rows) for rows in (64, 32, 32)], normal(64, 128, seed=1)
    shared = absorb([part(weight, 8) for weight in weights], inputs)
    assert all(torch.equal(a, shared.factors[0][0]) for a, _ in shared.factors)
    _, b = low_rank_factors(torch.cat(weights), 8)
    torch.testing.assert_close(torch.cat([b for _, b in shared.factors]), b.bfloat16().float())
    own = absorb([part(weight, 8) for weight in weights], inputs, share=False)
    assert not torch.equal(own.factors[0][0], own.factors[1][0])
    left = [sum(float(rest.square().sum()) for rest in found.residuals) for found in (own, shared)]
    assert left[0] < left[1]


def test_layers_of_other_ranks_and_stacked_projections_have_their_own() -> None:
    weights = [normal(64, 128, seed=n) for n in range(2)]
    found = absorb([part(weights[0], 8), part(weights[1], 4, branches=2)])
    (a, b), (stacked_a, stacked_b) = found.factors
    assert (a.shape, b.shape, stacked_a.shape, stacked_b.shape) == ((8, 128), (64, 8), (8, 128), (64, 4))
    torch.testing.assert_close(weights[1][:32] - found.residuals[1][:32], stacked_b[:32] @ stacked_a[:4])


@pytest.mark.parametrize("bits", [16, 4])
def test_residuals_are_those_of_the_stored_factors(bits: int) -> None:
    weight = normal(64, 128)
    found = absorb([Part(weight, LayerSpec(W4, None, 8, factor_bits=bits))])
    a, b = found.factors[0]
    torch.testing.assert_close(found.residuals[0], weight - b @ a)
    if bits == 4:
        assert len(a[0, :64].unique()) <= 16
    else:
        assert torch.equal(a, a.bfloat16().float())


def test_the_sketch_is_close_and_always_the_same() -> None:
    matrix = normal(300, 40, seed=1) @ normal(40, 400, seed=2) + normal(300, 400)
    exact, close = ((matrix - b @ a).norm() for a, b in (low_rank_factors(matrix, 20), sketched_factors(matrix, 20)))
    assert exact <= close * (1 + 1e-5) and close < 1.01 * exact
    assert torch.equal(sketched_factors(matrix, 20)[0], sketched_factors(matrix, 20)[0])
    assert torch.equal(sketched_factors(matrix[:60], 20)[0], low_rank_factors(matrix[:60], 20)[0])
    assert sketched_factors(matrix, 0)[0].shape == (0, 400)


def test_a_rank_that_exceeds_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 65 exceeds the smaller side"):
        absorb([part(normal(64, 128), 65)])
