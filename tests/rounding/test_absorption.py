"""Exact columns that absorb errors: the closed form is QUIK's sweep with the floats in the last places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import WeightSpec, decode
from hf_lowbit.rounding.absorption import Absorption, absorption
from hf_lowbit.rounding.feedback import CholeskyError
from hf_lowbit.rounding.gptq import gptq

ROWS, COLUMNS = 12, 40
INDEX = torch.tensor([3, 11, 30, 38])
REST = torch.tensor([i for i in range(COLUMNS) if i not in INDEX])
SPEC = WeightSpec(bits=4, scale_dtype="float32")
DAMPING = 0.01


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs with four outlier channels, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight, x, mix = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((ROWS, COLUMNS), (300, COLUMNS), (COLUMNS, COLUMNS))
    )
    x = x @ (torch.eye(COLUMNS) + 0.3 * mix)
    x[:, INDEX] *= 30
    return weight, x.t() @ x / len(x)


def quik(weight: Tensor, h: Tensor, index: Tensor = INDEX) -> tuple[Tensor, Absorption]:
    """The weight that is applied: codes, and floats with what they absorbed."""
    absorbing = absorption(h, index, DAMPING)
    codes = decode(gptq(weight, SPEC, absorbing.hessian, damping=DAMPING).packed).double()
    return codes.index_copy(1, index, absorbing.absorbed(weight, codes)), absorbing


def sweep(weight: Tensor, damped: Tensor) -> Tensor:
    """A plain transcription: columns permuted, floats last, every error taken from all columns after it."""
    order = torch.cat([REST, INDEX])
    work = weight[:, order].clone()
    factor = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    scale = weight[:, REST].abs().amax(1) / 7.5
    for i in range(len(REST)):
        q = (work[:, i] / scale).round().clamp(-8, 7) * scale
        error = (work[:, i] - q) / factor[i, i]
        work[:, i] = q
        work[:, i + 1 :] -= error.outer(factor[i, i + 1 :])
    return work[:, torch.argsort(order)]


def cost(weight: Tensor, applied: Tensor, h: Tensor) -> float:
    error = weight - applied
    return float(((error @ h) * error).sum())


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_sweep_with_the_floats_last(seed: int) -> None:
    weight, h = problem(seed)
    applied, absorbing = quik(weight, h)
    added = torch.empty(COLUMNS, dtype=torch.float64)
    added[INDEX] = DAMPING * h.diagonal()[INDEX].mean()
    added[REST] = DAMPING * absorbing.hessian.diagonal()[REST].mean()
    torch.testing.assert_close(applied, sweep(weight, h + added.diag()), rtol=1e-5, atol=1e-5)


def test_the_floats_move_and_the_others_lie_on_their_grid() -> None:
    weight, h = problem()
    applied, _ = quik(weight, h)
    assert (applied[:, INDEX] - weight[:, INDEX]).abs().mean() > 1e-3
    steps = applied[:, REST] / (weight[:, REST].abs().amax(1, keepdim=True) / 7.5)
    torch.testing.assert_close(steps, steps.round().clamp(-8, 7), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_absorbing_beats_leaving_the_floats_out(seed: int) -> None:
    """QUIK, test 3."""
    weight, h = problem(seed)
    applied, _ = quik(weight, h)
    alone = h.clone()
    alone[INDEX], alone[:, INDEX] = 0, 0
    kept = decode(gptq(weight, SPEC, alone, damping=DAMPING).packed).double()
    kept[:, INDEX] = weight[:, INDEX]
    assert cost(weight, applied, h) < 0.95 * cost(weight, kept, h)


def test_columns_may_come_in_any_order() -> None:
    """QUIK, test 7: what is permuted on the way in comes out permuted. (Its columns are all of one power.)"""
    weight, h = problem()
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(4))
    places = torch.argsort(order)[INDEX]
    one, other = absorption(h, INDEX, DAMPING), absorption(h[order][:, order], places, DAMPING)
    torch.testing.assert_close(one.hessian[order][:, order], other.hessian)
    torch.testing.assert_close(one.gain[order], other.gain)
    torch.testing.assert_close(
        one.absorbed(weight, torch.zeros_like(weight)), other.absorbed(weight[:, order], torch.zeros_like(weight))
    )


def test_everything_exact_leaves_nothing_to_round() -> None:
    weight, h = problem()
    applied, absorbing = quik(weight, h, torch.arange(COLUMNS))
    assert not absorbing.hessian.any() and not absorbing.gain.any()
    assert torch.equal(applied, weight)


def test_channels_that_follow_an_outlier_cost_nothing() -> None:
    """Float32, and a channel that is a tenth of an outlier: nothing is left of it, and nothing is negative."""
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) * 50
    x[:, 5] = x[:, 2] / 10
    absorbing = absorption(x.t() @ x / 200, torch.tensor([2]), 1e-9)
    assert (absorbing.hessian.diagonal() >= 0).all()
    assert absorbing.hessian[5, 5] < 1e-4 and absorbing.gain[5, 0] == pytest.approx(0.1, rel=1e-4)


def test_silent_columns_absorb_nothing() -> None:
    absorbing = absorption(torch.zeros(4, 4), torch.tensor([1, 2]), DAMPING)
    assert not absorbing.gain.any()
    with pytest.raises(CholeskyError, match="exact columns"):
        absorption(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), torch.tensor([0, 1]), DAMPING)
