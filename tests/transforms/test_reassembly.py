"""Channel reassembly as mathematics: splitting is exact, merging costs what the formula says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_lowbit.formats import ActivationSpec
from hf_lowbit.kernels.activation import quantize_tokens
from hf_lowbit.nn import Reassembly
from hf_lowbit.transforms.reassembly import (
    Assignment,
    ReassemblyError,
    assign,
    candidates,
    disassemble,
    pair_errors,
    split_counts,
)

CHANNELS, ROWS, TOKENS = 48, 20, 64


@pytest.fixture
def inputs() -> Tensor:
    """Three outlier channels, the worst fifty times as large."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, CHANNELS)
    x[:, 7] *= 50
    x[:, [3, 30]] *= 15
    return x


@pytest.fixture
def weight() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, CHANNELS)


def largest(x: Tensor) -> Tensor:
    return x.abs().amax(0)


def errors_of(x: Tensor, weight: Tensor) -> Tensor:
    return pair_errors(x.double().t() @ x.double(), weight.double().t() @ weight.double())


def spec_of(assignment: Assignment) -> tuple[Reassembly, dict[str, Tensor]]:
    tensors = {**assignment._asdict(), "factor": assignment.factor.view(torch.int32)}
    return Reassembly(len(assignment.source)), tensors


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("threshold", [0.05, 1.0, 2.7, 10.0, 1000.0])
def test_splitting_preserves_the_product(inputs: Tensor, weight: Tensor, threshold: float) -> None:
    counts = split_counts(largest(inputs), threshold)
    x, w = disassemble(inputs, weight, counts)
    assert x.shape[1] == w.shape[1] == int(counts.sum())
    assert relative(x @ w.t(), inputs @ weight.t()) < 1e-5


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.5, 7.0])
def test_no_copy_exceeds_the_threshold(inputs: Tensor, weight: Tensor, threshold: float) -> None:
    x, _ = disassemble(inputs, weight, split_counts(largest(inputs), threshold))
    assert float(x.abs().max()) <= threshold * (1 + 1e-6)


def test_a_threshold_above_everything_splits_nothing(inputs: Tensor) -> None:
    assert split_counts(largest(inputs), float(largest(inputs).max())).eq(1).all()


def test_channels_without_input_are_left_alone() -> None:
    assert split_counts(torch.tensor([0.0, 3.0]), 1.0).tolist() == [1, 3]


def test_the_width_is_restored_and_the_parts_agree(inputs: Tensor, weight: Tensor) -> None:
    """The assignment's factors, its inverse direction and an explicit split and merge are one and the same map."""
    counts = split_counts(largest(inputs), 12.0)
    assignment = assign(counts, errors_of(inputs, weight))
    spec, tensors = spec_of(assignment)
    x, w = spec.inputs(inputs, tensors), spec.weights(weight, tensors)
    assert x.shape == inputs.shape and w.shape == weight.shape
    assert spec.problem(tensors, ROWS, CHANNELS) is None
    assert assignment.target.sort().values.equal(assignment.target)
    copies, columns = disassemble(inputs, weight, counts)
    place = {int(c): int(counts[: int(c)].sum()) for c in assignment.source.unique()}
    for target in range(CHANNELS):  # mean of the cluster's activations, sum of its columns
        members = []
        for channel in assignment.source[assignment.target == target].tolist():
            members.append(place[channel])
            place[channel] += 1
        torch.testing.assert_close(x[:, target], copies[:, members].mean(1))
        torch.testing.assert_close(w[:, target], columns[:, members].sum(1))
    assert relative(x @ w.t(), inputs @ spec.folded(w, tensors).t()) < 1e-5


def test_merging_identical_channels_is_exact(inputs: Tensor, weight: Tensor) -> None:
    inputs = inputs.clone()
    inputs[:, 20:40] = inputs[:, 19:20]
    spec, tensors = spec_of(assign(split_counts(largest(inputs), 30.0), errors_of(inputs, weight)))
    assert spec.entries > CHANNELS
    product = spec.inputs(inputs, tensors) @ spec.weights(weight, tensors).t()
    assert relative(product, inputs @ weight.t()) < 1e-5


@pytest.mark.parametrize(("a", "b"), [(0, 1), (3, 30), (7, 8)])
def test_the_error_of_one_pair_is_the_closed_form(inputs: Tensor, weight: Tensor, a: int, b: int) -> None:
    x, w = inputs.double(), weight.double()
    merged_x, merged_w = x.clone(), w.clone()
    merged_x[:, a] = merged_x[:, b] = (x[:, a] + x[:, b]) / 2
    merged_w[:, a], merged_w[:, b] = w[:, a] + w[:, b], 0
    error = (merged_x @ merged_w.t() - x @ w.t()).square().sum()
    torch.testing.assert_close(errors_of(inputs, weight)[a, b], error)


def test_split_channels_are_never_merged(inputs: Tensor, weight: Tensor) -> None:
    """Not even when merging them would cost nothing."""
    counts = split_counts(largest(inputs), 12.0)
    errors = errors_of(inputs, weight)
    errors[counts > 1] = errors[:, counts > 1] = 0
    assignment = assign(counts, errors)
    shared = torch.bincount(assignment.target)[assignment.target] > 1
    assert shared.any() and not (counts[assignment.source.long()] > 1)[shared].any()


def test_the_cheapest_pairs_are_merged() -> None:
    """Even places look for odd ones: 0 and 1 cost nothing, so that they make room for a copy of 5."""
    x = torch.tensor([[1.0, 1.0, 3.0, -2.0, 5.0, 20.0], [2.0, 2.0, -1.0, 4.0, 1.0, 10.0]])
    weight = torch.eye(6)
    assignment = assign(split_counts(largest(x), 10.0), errors_of(x, weight))
    assert assignment.source.tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert assignment.target.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert assignment.factor.tolist() == [0.5, 0.5, 1, 1, 1, 0.5, 0.5]


def test_quantized_inputs_with_an_outlier_lose_less_than_half(inputs: Tensor, weight: Tensor) -> None:
    """W4A4 of a layer with a fifty-fold outlier: the input's error counts, so the weights stay float here."""
    channels = 256
    torch.manual_seed(2)
    x = torch.randn(TOKENS, channels) + torch.randn(TOKENS, 1)
    x[:, 7] *= 50
    weight = torch.randn(ROWS, channels)
    four = ActivationSpec(bits=4)

    def mse(x: Tensor, w: Tensor, exact: Tensor) -> float:
        codes, scale, _ = quantize_tokens(x, four)
        return float((codes.float() * scale @ w.t() - exact).square().mean())

    plain = mse(x, weight, x @ weight.t())
    errors = errors_of(x, weight)
    best = plain
    for counts in candidates(largest(x), 0.2, 64):
        spec, tensors = spec_of(assign(counts, errors))
        best = min(best, mse(spec.inputs(x, tensors), spec.weights(weight, tensors), x @ weight.t()))
    assert best < plain / 2


def test_candidates_split_more_and_more_up_to_the_ratio(inputs: Tensor) -> None:
    found = candidates(largest(inputs), 0.5, 1000)
    extra = [int(counts.sum()) - CHANNELS for counts in found]
    assert len(extra) > 3 and extra == sorted(set(extra)) and extra[0] > 0 and extra[-1] <= CHANNELS // 2
    few = [int(counts.sum()) - CHANNELS for counts in candidates(largest(inputs), 0.5, 3)]
    assert len(few) == 3 and set(few) <= set(extra) and (few[0], few[-1]) == (extra[0], extra[-1])


def test_nothing_to_try_without_outliers() -> None:
    assert candidates(torch.ones(8), 0.2, 10) == []
    assert candidates(torch.zeros(8), 0.2, 10) == []


def test_bad_requests_are_refused(inputs: Tensor, weight: Tensor) -> None:
    with pytest.raises(ReassemblyError, match="positive"):
        split_counts(largest(inputs), 0.0)
    for call in (lambda m: split_counts(m, 1.0), lambda m: candidates(m, 0.2, 4)):
        with pytest.raises(ReassemblyError, match="NaN or infinite"):
            call(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ReassemblyError, match="higher threshold"):
        assign(split_counts(largest(inputs), 0.5), errors_of(inputs, weight))
    with pytest.raises(ReassemblyError, match="higher threshold"):
        assign(torch.tensor([3]), torch.zeros(1, 1))


def test_an_odd_width_works(inputs: Tensor, weight: Tensor) -> None:
    x, w = inputs[:, :31], weight[:, :31]
    spec, tensors = spec_of(assign(split_counts(largest(x), 20.0), errors_of(x, w)))
    assert spec.entries > 31 and spec.problem(tensors, 1, 31) is None
