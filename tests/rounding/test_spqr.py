"""SpQR: the numbered tests of its method page, and a plain transcription of its steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit.formats import PackedTensor, WeightSpec, decode
from hf_lowbit.formats.second_level import decode_values, encode_values
from hf_lowbit.nn import LayerSpec, PackedLinear, keep_weights
from hf_lowbit.rounding import RoundingError
from hf_lowbit.rounding.feedback import CholeskyError
from hf_lowbit.rounding.gptq import gptq
from hf_lowbit.rounding.spqr import SpQRResult, spoilers, spqr, without

ROWS, COLUMNS = 32, 64
SPEC = WeightSpec(bits=3, group_size=16, symmetric=False, real_zero_point=True, scale_bits=3)
ORDERS = [False, True]
either_order = pytest.mark.parametrize("act_order", ORDERS, ids=["stored", "ordered"])


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(seed: int = 0, columns: int = COLUMNS, tokens: int = 256) -> Tensor:
    """Mean x x^T of random inputs, mixed so that channels correlate and differ in size."""
    x = gaussian(tokens, columns, seed=seed) @ gaussian(columns, columns, seed=seed + 1000)
    generator = torch.Generator().manual_seed(seed)
    x = x * torch.logspace(0, -1, columns, dtype=x.dtype)[torch.randperm(columns, generator=generator)]
    return x.t() @ x / tokens


def damped(h: Tensor, damping: float = 1.0) -> Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def weight_of(result: SpQRResult) -> Tensor:
    """Codes and outliers together."""
    return decode(result.packed).double().masked_scatter(result.outliers, result.values.double())


def proxy(weight: Tensor, rounded: Tensor, h: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    error = weight.double() - rounded.double()
    return ((error @ h) * error).sum().item()


def same(first: PackedTensor, second: PackedTensor) -> bool:
    return all(torch.equal(tensor, second.tensors()[suffix]) for suffix, tensor in first.tensors().items())


# The page's steps, one column at a time, every weight left out in its turn.
def min_max(group: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and unrounded zero ``[rows]`` of ``[rows, n]``, codes from 0."""
    low, high = group.amin(1), group.amax(1)
    scale = (high - low) / (2**bits - 1)
    return scale, -low / scale


def quantized(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scale[:, None] * ((w / scale[:, None] + zero[:, None]).round().clamp(0, 2**bits - 1) - zero[:, None])


def left_out(group: Tensor, diagonal: Tensor, bits: int) -> Tensor:
    """What each weight costs: the error of all less that of the others on a grid of their own."""
    whole = (quantized(group, *min_max(group, bits), bits) - group) / diagonal
    gains = []
    for k in range(group.shape[1]):
        others = [i for i in range(group.shape[1]) if i != k]
        rest = group[:, others]
        error = (quantized(rest, *min_max(rest, bits), bits) - rest) / diagonal[others]
        gains.append(whole.square().sum(1) - error.square().sum(1))
    return torch.stack(gains, 1)


def transcribed(weight: Tensor, h: Tensor, spec: WeightSpec, relative: float, act_order: bool) -> tuple[Tensor, Tensor]:
    """The weight with its outliers, and their mask."""
    order = torch.argsort(h.diagonal(), descending=True) if act_order else torch.arange(len(h))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped(h)[order][:, order]), upper=True)
    diagonal = upper.diagonal()[torch.argsort(order)]
    tau = relative * (weight.var(0) / diagonal.square()).mean()
    work, result, mask = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    grids: dict[int, tuple[Tensor, Tensor]] = {}

    def fit(first: int) -> tuple[Tensor, Tensor]:
        group = work[:, first : first + 16].clone()
        spoil = left_out(group, diagonal[first : first + 16], spec.bits) > tau
        mean = (group * ~spoil).sum(1) / (~spoil).sum(1)
        scale, zero = min_max(torch.where(spoil, mean[:, None], group), spec.bits)
        coded = (
            decode_values(*encode_values(part[:, None].float(), spec, torch.bfloat16), spec, 1)[:, 0].double()
            for part in (scale, zero - 2 ** (spec.bits - 1))  # codes from -2^(b-1), as they are stored
        )
        return next(coded), next(coded) + 2 ** (spec.bits - 1)

    if act_order:
        grids = {first: fit(first) for first in range(0, len(h), 16)}
    for visit, i in enumerate(order.tolist()):
        first = i - i % 16
        if first not in grids:
            grids[first] = fit(first)
        w = work[:, i].clone()
        q = quantized(w[:, None], *grids[first], spec.bits)[:, 0]
        error = (w - q) / diagonal[i]
        mask[:, i] = error.square() > tau
        result[:, i] = torch.where(mask[:, i], w, q)
        error = torch.where(mask[:, i], 0.0, error)
        work[:, order[visit:]] -= error.outer(upper[visit, visit:])
    return result, mask


@either_order
@pytest.mark.parametrize("relative", [0.05, 0.2])
def test_equality_with_the_steps_of_the_page(act_order: bool, relative: float) -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    result = spqr(weight, SPEC, h, act_order=act_order, outlier_threshold=relative)
    expected, mask = transcribed(weight, h, SPEC, relative, act_order)
    assert mask.any() and torch.equal(result.outliers, mask)
    torch.testing.assert_close(weight_of(result), expected, rtol=1e-5, atol=1e-6)


def test_leaving_out_two_weights_is_leaving_out_all() -> None:
    """Every other weight of a group leaves the range as it is."""
    group, diagonal = gaussian(200, 16), gaussian(16, seed=1).abs() + 0.1
    for threshold in (0.01, 0.1, 1.0):
        found = spoilers(group[:, None].float(), diagonal[None].float(), SPEC, SPEC.number_format, threshold)
        expected = left_out(group, diagonal, 3) > threshold
        assert (found[:, 0] != expected).sum() <= 1, "float32 against float64"
        assert 0 < expected.sum() < expected.numel()


def test_the_others_mean_takes_the_place_of_what_is_left_out() -> None:
    group = torch.tensor([[[1.0, 2.0, 3.0, 100.0]]])
    assert torch.equal(without(group, group > 50), torch.tensor([[[1.0, 2.0, 3.0, 2.0]]]))
    assert torch.equal(without(group, group > 0), torch.zeros(1, 1, 4))


# 1
@either_order
@pytest.mark.parametrize("group_size", [None, 16])
def test_without_any_addition_it_is_gptq(act_order: bool, group_size: int | None) -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    spec = WeightSpec(bits=3, group_size=group_size, symmetric=False)
    ours = spqr(weight, spec, h, outlier_threshold=math.inf, damping=0.01, act_order=act_order)
    theirs = gptq(weight, spec, h, act_order=act_order, static_groups=act_order)
    assert same(ours.packed, theirs.packed) and ours.loss == theirs.loss
    assert not ours.outliers.any() and len(ours.values) == 0


# 2
@either_order
def test_outliers_are_the_weights_of_their_moment(act_order: bool) -> None:
    """Without correlations no error moves another weight: outliers are the original ones. With them the first column
    that is visited is still original, later ones are not, and all costs are accounted for."""
    weight, powers = gaussian(ROWS, COLUMNS), torch.linspace(1, 2, COLUMNS).double()
    alone = spqr(weight, SPEC, powers.diag(), act_order=act_order)
    assert alone.outliers.any() and torch.equal(alone.values, weight[alone.outliers])
    h = correlated()
    result = spqr(weight, SPEC, h, act_order=act_order, outlier_threshold=0.02)
    first = int(h.diagonal().argmax()) if act_order else 0
    assert result.outliers[:, first].any()
    assert torch.equal(
        weight_of(result)[:, first][result.outliers[:, first]], weight[:, first][result.outliers[:, first]]
    )
    assert not torch.equal(result.values, weight[result.outliers])
    assert result.loss == pytest.approx(proxy(weight, weight_of(result), damped(h)), rel=1e-5)


# 3 and 4
@either_order
def test_a_lower_threshold_keeps_more_and_loses_less(act_order: bool) -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    results = [spqr(weight, SPEC, h, outlier_threshold=t, act_order=act_order) for t in (0.05, 0.2, 1.0, math.inf)]
    counts = [int(result.outliers.sum()) for result in results]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[1] > counts[3] == 0
    losses = [result.loss for result in results]
    assert losses[0] < losses[1] < losses[3] and losses[1] <= losses[2] <= losses[3]


# 5
@either_order
def test_injected_weights_are_found(act_order: bool) -> None:
    """One in a thousand, alone in their groups. Many more raise the variance, and with it the threshold, above them."""
    weight, h, clean = gaussian(64, 128), correlated(columns=128), gaussian(64, 128)
    rows, columns = torch.arange(0, 64, 8), torch.arange(5, 128, 16)
    weight[rows, columns] = torch.tensor([50.0, -50.0]).double().repeat(4)
    result, undisturbed = (spqr(w, SPEC, h, act_order=act_order) for w in (weight, clean))
    assert result.outliers[rows, columns].all()
    assert result.outliers.double().mean() < 0.05
    assert result.loss < 2 * undisturbed.loss, "their neighbours keep their resolution"
    assert gptq(weight, SPEC, h, damping=1.0).loss > 3 * result.loss  # measured: 4.3 times


def test_leaving_out_makes_grids_that_fewer_weights_spoil() -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    weight[::3, ::7] *= 6
    ours, plain = (spqr(weight, SPEC, h, leave_one_out=left) for left in (True, False))
    assert ours.loss < 0.8 * plain.loss


# 8
@either_order
@pytest.mark.parametrize("tokens", [1, 50])
def test_a_layer_computes_with_codes_and_outliers(act_order: bool, tokens: int) -> None:
    weight = gaussian(ROWS, COLUMNS)
    result = spqr(weight, SPEC, correlated(), act_order=act_order)
    decoded = decode(result.packed)
    wanted = decoded.masked_scatter(result.outliers, result.values.float())
    layer = PackedLinear.from_float(nn.Linear(COLUMNS, ROWS, bias=False), LayerSpec(SPEC))
    layer.set_exact(*keep_weights(wanted, decoded, result.outliers))
    layer.set_packed("weight", result.packed)
    x = gaussian(tokens, COLUMNS, seed=4).float()
    torch.testing.assert_close(layer(x), x @ wanted.t(), rtol=1e-3, atol=2e-3)  # differences are kept in float16
    torch.testing.assert_close(layer(x), x @ layer.dequantized().t(), rtol=1e-4, atol=1e-4)
    assert layer.layer_spec.exact.count == int(result.outliers.sum()) > 0


# the sweep
@either_order
def test_the_block_size_changes_nothing(act_order: bool) -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    first, *others = (spqr(weight, SPEC, h, act_order=act_order, block_size=size) for size in (1, 5, 16, 24, 128))
    for other in others:
        assert same(first.packed, other.packed) and torch.equal(first.outliers, other.outliers)
        torch.testing.assert_close(other.values, first.values)


@either_order
@pytest.mark.parametrize("factor", [1e-5, 1e4])
def test_the_scale_of_the_hessian_does_not_matter(act_order: bool, factor: float) -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    ours, scaled = (spqr(weight, SPEC, matrix, act_order=act_order) for matrix in (h, h * factor))
    assert same(ours.packed, scaled.packed) and torch.equal(ours.outliers, scaled.outliers)


@either_order
def test_columns_without_input_cost_nothing(act_order: bool) -> None:
    """Their weights count as zero: next to zero after rounding, where coded zero points leave none exactly."""
    weight, h, dead = gaussian(ROWS, COLUMNS), correlated(), torch.arange(2, COLUMNS, 7)
    h[dead], h[:, dead] = 0, 0
    large, none = weight.clone(), weight.clone()
    large[:, dead], none[:, dead] = 1e4, 0
    ours, theirs = (spqr(w, SPEC, h, act_order=act_order) for w in (large, none))
    assert same(ours.packed, theirs.packed) and torch.equal(ours.values, theirs.values)
    assert weight_of(ours)[:, dead].abs().max() < 1


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_any_number_of_rows(rows: int) -> None:
    """The last group of rows is smaller; a single row has no variance, and no outliers."""
    result = spqr(gaussian(rows, COLUMNS), SPEC, correlated())
    assert {s: (tuple(t.shape), t.dtype) for s, t in result.packed.tensors().items()} == SPEC.companions(
        (rows,), COLUMNS
    )
    assert bool(result.outliers.any()) == (rows > 1)


def test_values_are_in_the_order_of_their_places() -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated(tokens=4096)
    result = spqr(weight, SPEC, h, act_order=True, outlier_threshold=0.05)
    close = (result.values - weight[result.outliers]).abs() < 2
    assert len(close) > 20 and close.all()
    assert not torch.equal(result.values.sort().values, result.values)


def test_arguments_are_left_alone() -> None:
    weight, h = gaussian(ROWS, COLUMNS), correlated()
    before = weight.clone(), h.clone()
    spqr(weight, SPEC, h)
    assert torch.equal(weight, before[0]) and torch.equal(h, before[1])


@pytest.mark.parametrize("values", [{"symmetric": True, "real_zero_point": False}, {"bits": 1}, {"format": "nf"}])
def test_other_formats_are_refused(values: dict[str, Any]) -> None:
    spec = WeightSpec(**{"bits": 4, "group_size": 16, "symmetric": False, **values})
    with pytest.raises(RoundingError, match="SpQR rounds to integers with zero points"):
        spqr(gaussian(ROWS, COLUMNS), spec, correlated())


def test_failures_are_those_of_gptq() -> None:
    h = torch.eye(COLUMNS).double()
    h[0, 1] = h[1, 0] = 10.0
    with pytest.raises(CholeskyError, match="not positive definite even with damping=1"):
        spqr(gaussian(ROWS, COLUMNS), SPEC, h)
    with pytest.raises(RoundingError, match="weight holds NaN"):
        spqr(gaussian(ROWS, COLUMNS).fill_(float("nan")), SPEC, correlated())
